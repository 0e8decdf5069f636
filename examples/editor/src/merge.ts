/** Merges two edits of one text, line by line. */
import { diff3Merge } from 'node-diff3'

export type Merged = { text: string; clean: boolean }

const lines = (text: string) => text.split(/(?<=\n)/)

/** `base` is what both began with. Where they differ in the same lines both stand there, between git's marks. */
export function merge(mine: string, base: string, theirs: string): Merged {
  if (mine === theirs || theirs === base) return { text: mine, clean: true }
  if (mine === base) return { text: theirs, clean: true }
  let clean = true
  const parts = diff3Merge(lines(mine), lines(base), lines(theirs), { excludeFalseConflicts: true }).map((region) => {
    if (region.ok) return region.ok.join('')
    clean = false
    const { a, b } = region.conflict!
    return `<<<<<<< yours\n${closed(a.join(''))}=======\n${closed(b.join(''))}>>>>>>> theirs\n`
  })
  return { text: parts.join(''), clean }
}

const closed = (text: string) => (text === '' || text.endsWith('\n') ? text : `${text}\n`)
