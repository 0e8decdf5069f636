/** What tools in the preview made and was not written: a member takes it or drops it. */
import { type Kept, Refused } from './project.ts'
import { begin, committed } from './screen.ts'
import { attempt, get, project, say, sayError, set } from './state.ts'

/** Read what waits for a decision; said of itself only where somebody looks at it. */
export async function readKept(): Promise<void> {
  const read = async () => {
    const kept = await project.kept()
    const stale = new Set([...get().stale].filter((id) => kept.some((each) => each.kept_id === id)))
    set({ kept, stale })
  }
  if (get().deciding) await attempt('The proposals could not be read', read)
  else await read().catch((error: Error) => console.warn('what tools propose is not known:', error.message))
}

export async function showKept(): Promise<void> {
  set({ deciding: true })
  await readKept()
}

/** Both texts: what the project has, and what the tool made. */
export async function bothOf(kept: Kept): Promise<[string, string]> {
  const [current, made] = await Promise.all([project.read(kept.file_path), project.keptContent(kept)])
  return [current?.content ?? '', made]
}

/** Take what a tool made, or drop it. `force`: over a version that the tool has not read. */
export async function decide(kept: Kept, take: boolean, force: boolean): Promise<void> {
  const path = kept.file_path
  const end = begin(`${path}, as a tool made it`)
  try {
    if (take && kept.kind === 'conflict' && (await hasMoved(kept))) return changed(kept)
    const since = performance.now()
    const { revision } = await project.decide(kept, take, force)
    if (revision !== undefined) committed(revision, since, `${path}, as a tool made it`, [path])
  } catch (error) {
    if (!(error instanceof Refused)) return sayError(`${path} was not decided`, error)
    if (error.code === 'PT409') return changed(kept)
    if (error.code === 'PT410' || error.code === 'PT404') say(`${path} was decided already, or the tool went on: this is what waits now.`)
    else sayError(`${path} was not decided`, error)
  } finally {
    end()
    await readKept()
  }
}

/** Whether somebody saved since the list was read: a conflict is taken over whatever is there, so it is asked before. */
async function hasMoved({ file_path, current_version }: Kept): Promise<boolean> {
  return ((await project.read(file_path))?.version ?? 0) !== current_version
}

function changed({ kept_id, file_path }: Kept): void {
  set({ stale: new Set(get().stale).add(kept_id) })
  say(`${file_path} has changed since. Compare it with what is there now, and take it over that if you want it.`, 'error')
}
