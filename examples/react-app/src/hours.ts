/** One time of day: what the picture is painted with. Edit a colour and watch the sky. */
export type Hour = {
  name: string
  sky: [top: string, bottom: string]
  sea: [far: string, near: string]
  sun: { x: number; y: number; colour: string }
  ink: string
  stars: number
  lit: boolean
}

export const hours: [Hour, Hour, Hour, Hour] = [
  {
    name: 'Dawn',
    sky: ['#6f8fc4', '#fbd3b4'],
    sea: ['#7fa0c0', '#3d6188'],
    sun: { x: 210, y: 318, colour: '#ffe6b8' },
    ink: '#24344f',
    stars: 0,
    lit: false,
  },
  {
    name: 'Noon',
    sky: ['#4f9fe0', '#cfeaf7'],
    sea: ['#4fa8c9', '#1c6a92'],
    sun: { x: 250, y: 90, colour: '#fff6d6' },
    ink: '#153a52',
    stars: 0,
    lit: false,
  },
  {
    name: 'Dusk',
    sky: ['#2b2a5c', '#f2916b'],
    sea: ['#a2607a', '#2a2b57'],
    sun: { x: 260, y: 338, colour: '#ffc37a' },
    ink: '#2b2a5c',
    stars: 18,
    lit: true,
  },
  {
    name: 'Night',
    sky: ['#060b1e', '#1d2f55'],
    sea: ['#1b2d50', '#0a1330'],
    sun: { x: 250, y: 110, colour: '#e9eefc' },
    ink: '#0d1733',
    stars: 70,
    lit: true,
  },
]
