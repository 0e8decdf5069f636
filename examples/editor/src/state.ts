/** What the page shows, as one zustand store, and what every action needs of it. */
import { create } from 'zustand'

import type { Config } from './config.ts'
import { type Checkpoint, type FileEntry, type Kept, type Origin, type Project, type ScreenError, type Session, type Shown, Unreachable, type Version } from './project.ts'

/** An open text file. `base` at `version` is what was last read or saved; `text` is what stands in the editor. `again`: a save was asked for while one was on its way. `shared`: its room saves it. */
export type Doc = { path: string; base: string; version: number; text: string; saving: boolean; again?: boolean; gone: boolean; shared?: boolean }

/** Two edits of the same lines: `merged` has both, between marks. */
export type Conflict = { path: string; mine: string; theirs: string; merged: string; version: number }

/** Who wrote a revision. `api`: a program with the service key. */
export type Who = { origin: Origin['origin']; people: { id: string; name: string | null }[] }

/** A commit on its way to the screen; times in milliseconds since it was begun here, or since it was heard of. `who` null: not known yet. */
export type Revision = {
  revision: number
  title: string
  files: string[]
  mine: boolean
  who: Who | null
  turn: boolean
  since: number
  saved: number | null
  applied: number | null
  shown: number | null
  outcome: Shown['outcome'] | null
}

export type State = {
  config: Config | null
  failed: string | null
  /** Set while nobody answers and the page shows what it kept: since when it is of. */
  offline: string | null
  connected: boolean
  files: Map<string, FileEntry>
  docs: Map<string, Doc>
  active: string | null
  goTo: { path: string; line: number; column: number; nonce: number } | null
  conflict: Conflict | null
  history: { path: string; versions: Version[] } | null
  checkpoints: { kept: Checkpoint[]; compared: { revision: number; diff: string } | null } | null
  session: Session | null
  /** The session as it was while no page was shown. */
  starting: Session | null
  revisions: Revision[]
  /** What was begun here and has no answer yet: shown at once, and taken back when it is refused. */
  begun: { id: number; title: string }[]
  /** What tools in the preview made and nobody decided yet; `deciding`: the panel is open. `stale`: of those that were refused, since the file changed. */
  kept: Kept[]
  deciding: boolean
  stale: ReadonlySet<string>
  errors: ScreenError[]
  applied: number
  shown: number | null
  notice: { text: string; kind: 'info' | 'error' } | null
  playing: boolean
  takeBack: (() => Promise<void>) | null
  others: Map<string, number> // in how many other editors a file is open
}

export const useProjectEditorStore = create<State>(() => ({
  config: null,
  failed: null,
  offline: null,
  connected: false,
  files: new Map(),
  docs: new Map(),
  active: null,
  goTo: null,
  conflict: null,
  history: null,
  checkpoints: null,
  session: null,
  starting: null,
  revisions: [],
  begun: [],
  kept: [],
  deciding: false,
  stale: new Set(),
  errors: [],
  applied: 0,
  shown: null,
  notice: null,
  playing: false,
  takeBack: null,
  others: new Map(),
}))

export const { getState: get, setState: set } = useProjectEditorStore

/** The project that is open. */
export let project: Project
export function use(opened: Project): void {
  project = opened
}

export function say(text: string, kind: 'info' | 'error' = 'info'): void {
  set({ notice: { text, kind } })
}

export function sayError(what: string, error: unknown): void {
  const why = error instanceof Unreachable ? 'nobody answers; it is tried again when you save' : (error as Error).message
  say(`${what}: ${why}.`, 'error')
}

export async function attempt(failed: string, work: () => Promise<unknown>): Promise<void> {
  try {
    await work()
  } catch (error) {
    sayError(failed, error)
  }
}

/** An entry null: there is no such file. */
export function patchFiles(change: Iterable<[string, FileEntry | null]>): void {
  const files = new Map(get().files)
  for (const [path, file] of change) {
    if (file) files.set(path, file)
    else files.delete(path)
  }
  set({ files })
}

export function patchDoc(path: string, change: Partial<Doc>): void {
  const doc = get().docs.get(path)
  if (doc) set({ docs: new Map(get().docs).set(path, { ...doc, ...change }) })
}
