/** What became of each commit: saved, applied, on the screen, and who wrote it. */
import type { Shown } from './project.ts'
import { get, project, type Revision, set, type Who } from './state.ts'

const KEPT_REVISIONS = 200

let waiting: AbortController | null = null
let waitsFor = 0
let begun = 0
let asking = false

/** Say at once what is being written; what it returns ends that. What became of it the database says. */
export function begin(title: string): () => void {
  const id = begun++
  set({ begun: [{ id, title }, ...get().begun] })
  return () => set({ begun: get().begun.filter((each) => each.id !== id) })
}

export function committed(revision: number, since: number, title: string, files: string[]): void {
  note({ revision, title, files, mine: true, who: null, turn: false, since, saved: performance.now() - since, applied: null, shown: null, outcome: null })
  void watchScreen(revision)
}

/** Add a commit, or what is now known of one that the channel told of before its answer came. */
export function note(one: Revision): void {
  if (one.mine && !one.files.some((path) => get().docs.get(path)?.shared)) one.who = { origin: 'user', people: [{ id: project.userId, name: null }] }
  const revisions = get().revisions.slice()
  const at = revisions.findIndex((each) => each.revision === one.revision)
  if (at < 0) revisions.unshift(one)
  else if (one.saved !== null) revisions[at] = { ...one, turn: revisions[at]!.turn, applied: revisions[at]!.applied, shown: revisions[at]!.shown, outcome: revisions[at]!.outcome }
  revisions.sort((a, b) => b.revision - a.revision)
  set({ revisions: revisions.slice(0, KEPT_REVISIONS) })
  void askWho()
}

/** Ask the history who made the revisions of which nobody knows, one after the other, the newest first. */
async function askWho(): Promise<void> {
  if (asking) return
  asking = true
  try {
    for (;;) {
      const one = get().revisions.find((each) => each.who === null)
      if (!one) return
      const found = await project.origin(one.revision)
      const people = found?.contributors?.length ? found.contributors : found?.changed_by ? [found.changed_by] : []
      const who: Who = { origin: found?.origin ?? 'user', people: people.map((id) => ({ id, name: id === found?.changed_by ? found.changed_by_name : null })) }
      set({ revisions: get().revisions.map((each) => (each.revision === one.revision ? { ...each, who } : each)) })
    }
  } catch (error) {
    console.warn('who made a revision is not known yet:', error) // asked again with the next one
  } finally {
    asking = false
  }
}

/** `who` in words. */
export function whoIs({ who, mine }: Revision): string {
  if (!who) return mine ? 'you' : 'another'
  if (who.origin === 'container') return 'a tool in the preview'
  if (who.origin === 'api') return 'a program' // whose name it wrote in is the project's owner's
  const others = who.people.filter(({ id }) => id !== project.userId)
  const names = [...(others.length < who.people.length ? ['you'] : []), ...others.map(({ name }) => name ?? 'another')]
  const all = names.join(', ') || 'another'
  return who.origin === 'room' ? `${all}, in one file` : who.origin === 'restore' ? `${all}, going back` : all
}

/** Notes how far the preview is. What the screen says now is said of its newest revision, and of older ones that were never shown. */
export function arrived(applied: number, shown: number | null, outcome: Shown['outcome'] | null = null): void {
  const now = performance.now()
  const newest = Math.max(applied, shown ?? 0)
  const revisions = get().revisions.map((each) => {
    const next = { ...each }
    if (next.applied === null && each.revision <= applied) next.applied = now - each.since
    if (next.shown === null && shown !== null && each.revision <= shown) next.shown = now - each.since
    const open = each.shown === null && each.outcome !== 'error'
    if (outcome && (each.revision === newest || (each.revision < newest && open))) next.outcome = outcome
    return next
  })
  set({ revisions, applied: Math.max(applied, get().applied), shown: shown ?? get().shown })
}

/** Wait until it is known what became of `revision`; one request at a time, for the newest. */
export async function watchScreen(revision: number): Promise<void> {
  if (waiting && revision <= waitsFor) return
  waiting?.abort()
  const control = (waiting = new AbortController())
  waitsFor = revision
  try {
    const found = await project.shown(revision, revision ? 20 : 0, control.signal)
    arrived(found.applied, found.shown?.revision ?? null, found.outcome)
    set({ errors: found.errors.filter((error) => error.kind !== 'console') })
  } catch (error) {
    if (!control.signal.aborted) console.warn('what is on the screen is not known:', error)
  } finally {
    if (waiting === control) waiting = null
  }
}

/** The preview says that something is new: the newest revision that anybody waits for is asked for again. */
export function screenChanged(applied: number, shown: number | null): void {
  arrived(applied, shown)
  void watchScreen(Math.max(applied, waitsFor))
}

/** While no page is shown: how the session's start goes, or why it does not. */
export async function readStart(): Promise<void> {
  const starting = await project.session().catch(() => null)
  if (starting) set({ starting })
}
