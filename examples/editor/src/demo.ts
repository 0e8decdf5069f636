/** Plays what an AI does in a turn: a new page first, and then the forty components that it imports. */
import type { Change, Project } from './project.ts'

export const PAGE = 'src/App.tsx'
const COMPONENTS = 39
const name = (number: number) => `Part${String(number).padStart(2, '0')}`

function component(number: number): string {
  return `export function ${name(number)}() {
  return <li style={{ background: 'hsl(${(number * 37) % 360} 60% 80%)', color: '#222', padding: '0.6em 1em', borderRadius: 8 }}>part ${number}</li>
}
`
}

function page(numbers: number[], exported: string): string {
  return `${numbers.map((number) => `import { ${name(number)} } from './turn/${name(number)}.tsx'`).join('\n')}

${exported} App() {
  return (
    <main style={{ fontFamily: 'system-ui', padding: '2rem' }}>
      <h1>${COMPONENTS} parts, made in one turn</h1>
      <ul style={{ display: 'flex', flexWrap: 'wrap', gap: 8, listStyle: 'none', padding: 0 }}>
        ${numbers.map((number) => `<${name(number)} />`).join('\n        ')}
      </ul>
    </main>
  )
}
`
}

/** The files in the order in which they are written: the page imports what does not exist yet. */
function files(before: string): [string, string][] {
  const numbers = Array.from({ length: COMPONENTS }, (_, index) => index + 1)
  const exported = /export\s+default/.test(before) ? 'export default function' : 'export function'
  return [[PAGE, page(numbers, exported)], ...numbers.map((number): [string, string] => [`src/turn/${name(number)}.tsx`, component(number)])]
}

/** Writes them as one turn, or one save after the other. Gives what takes it all back. */
export async function play(project: Project, asTurn: boolean): Promise<() => Promise<void>> {
  const before = await project.read(PAGE)
  if (before === null) throw new Error(`The demonstration replaces ${PAGE}, which this project does not have.`)
  const written = files(before.content)
  if (asTurn) {
    await project.turn('forty files', async (save) => {
      for (const [path, content] of written) await save(path, content)
    })
  } else {
    for (const [path, content] of written) await project.apply([{ file_path: path, content }])
  }
  return async () => {
    const gone: Change[] = written.slice(1).map(([path]) => ({ action: 'delete', file_path: path }))
    await project.apply([{ file_path: PAGE, content: before.content }, ...gone])
  }
}
