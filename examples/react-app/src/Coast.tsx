import type { Hour } from './hours.ts'

const WIDTH = 1200
const HEIGHT = 640
const HORIZON = 360

/** The same stars every night: a small multiplicative generator, so that a reload moves none of them. */
function starAt(index: number) {
  const seed = (index + 1) * 48271
  return {
    x: (seed * 16807) % WIDTH,
    y: (seed * 69621) % (HORIZON - 40),
    r: 0.6 + (seed % 7) / 6,
  }
}

/** One crest of waves from edge to edge and beyond, so that it can drift without showing its end. */
function crest(y: number, length: number, height: number) {
  let path = `M ${-2 * length} ${y}`
  for (let x = -2 * length; x < WIDTH + 2 * length; x += length) {
    path += ` q ${length / 4} ${-height} ${length / 2} 0 t ${length / 2} 0`
  }
  return `${path} V ${HEIGHT} H ${-2 * length} Z`
}

function Boat({ index }: { index: number }) {
  const x = 330 + ((index * 397) % 760)
  const y = HORIZON + 22 + ((index * 53) % 120)
  const scale = 0.5 + (y - HORIZON) / 140
  return (
    <g transform={`translate(${x} ${y}) scale(${scale})`}>
      <g className="boat" style={{ animationDelay: `${-index * 0.7}s` }}>
        <path d="M -26 0 H 26 L 18 12 H -18 Z" fill="#5b3a2e" />
        <path d="M -2 -4 V -46 L 22 -6 Z" fill="#fdf6e7" />
        <path d="M -5 -4 V -38 L -20 -6 Z" fill="#e8dcc4" />
      </g>
    </g>
  )
}

export function Coast({ hour, boats }: { hour: Hour; boats: number }) {
  return (
    <svg className="coast" viewBox={`0 0 ${WIDTH} ${HEIGHT}`} preserveAspectRatio="xMidYMid slice" aria-hidden>
      <defs>
        <linearGradient id="sky" x2="0" y2="1">
          <stop stopColor={hour.sky[0]} />
          <stop offset="1" stopColor={hour.sky[1]} />
        </linearGradient>
        <linearGradient id="sea" x2="0" y2="1">
          <stop stopColor={hour.sea[0]} />
          <stop offset="1" stopColor={hour.sea[1]} />
        </linearGradient>
        <linearGradient id="beam">
          <stop stopColor="#ffe9a8" stopOpacity=".75" />
          <stop offset="1" stopColor="#ffe9a8" stopOpacity="0" />
        </linearGradient>
      </defs>

      <rect width={WIDTH} height={HORIZON} fill="url(#sky)" />
      {Array.from({ length: hour.stars }, (_, index) => {
        const { x, y, r } = starAt(index)
        return <circle key={index} cx={x} cy={y} r={r} fill="#fff" className="star" />
      })}
      <circle cx={hour.sun.x} cy={hour.sun.y} r="44" fill={hour.sun.colour} color={hour.sun.colour} className="sun" />

      <rect y={HORIZON} width={WIDTH} height={HEIGHT - HORIZON} fill="url(#sea)" />
      {Array.from({ length: boats }, (_, index) => (
        <Boat key={index} index={index} />
      ))}

      {hour.lit && (
        <path
          className="beam"
          d="M 0 -6 L 820 -90 V 130 L 0 6 Z"
          fill="url(#beam)"
          transform="translate(1000 190) rotate(180)"
        />
      )}
      <path d="M 880 420 Q 920 372 985 366 Q 1080 356 1200 384 V 640 H 820 Z" fill="#3a3340" />
      <path d="M 976 372 L 986 212 H 1014 L 1024 372 Z" fill="#f6efe3" />
      <path d="M 979 324 L 982.5 268 H 1017.5 L 1021 324 Z" fill="#d8483e" />
      <rect x="980" y="204" width="40" height="8" rx="2" fill="#3a3340" />
      <rect x="987" y="178" width="26" height="26" rx="3" fill={hour.lit ? '#ffe9a8' : '#b9c4cf'} />
      <path d="M 982 178 L 1000 160 L 1018 178 Z" fill="#d8483e" />

      <path className="wave slow" d={crest(470, 180, 14)} fill={hour.sea[1]} opacity=".45" />
      <path className="wave" d={crest(530, 240, 20)} fill={hour.sea[1]} opacity=".7" />
    </svg>
  )
}
