/** What a person does in the editor, and what others do to what is open. */
import type { Config } from './config.ts'
import * as demo from './demo.ts'
import { Drafts } from './drafts.ts'
import { merge } from './merge.ts'
import * as offline from './offline.ts'
import { readKept } from './kept.ts'
import { type Change, type Commit, type FileEntry, Project, Refused } from './project.ts'
import { begin, committed, note, screenChanged, watchScreen } from './screen.ts'
import { attempt, type Doc, get, patchDoc, patchFiles, project, say, sayError, set, use, useProjectEditorStore } from './state.ts'

export { project, say, useProjectEditorStore } from './state.ts'
export type { Conflict, Doc, Revision } from './state.ts'

const SOON = 200_000 // characters: as much is kept at each key

let drafts: Drafts
let heard = 0 // the highest revision that the channel told of
let later: ReturnType<typeof setTimeout> | undefined

// --- opening

export async function open(config: Config): Promise<void> {
  use(new Project(config))
  drafts = new Drafts(config.project_id)
  set({ config })
  await project.signIn()
  await reload()
  for (const path of await drafts.paths()) await openFile(path, false)
  const first = ['src/App.tsx', 'src/App.jsx', 'src/main.ts', 'index.html'].find((path) => get().files.has(path))
  if (first && !get().active) await openFile(first)
  project.onConfig = (config) => set({ config, shown: null, starting: null })
  let lost = false
  project.follow(onCommit, (connected) => {
    set({ connected })
    if (lost && connected) void attempt('Nobody says where the stack is now', () => project.renew()) // it may have been started again
    lost = !connected
    if (!connected) return
    void attempt('The files could not be read', reload)
    void readKept()
  })
  project.followScreen(({ applied, shown }) => screenChanged(applied, shown), readKept)
  void watchScreen(0)
  const openHere = project.followOpen((others) => set({ others }))
  openHere([...get().docs.keys()])
  useProjectEditorStore.subscribe(({ docs }, before) => {
    const paths = [...docs.keys()]
    if (docs !== before.docs && paths.join('\0') !== [...before.docs.keys()].join('\0')) openHere(paths)
  })
  keepForOffline()
}

/** The page without its stack: what was open is there to be read, what is typed is kept, nothing can be saved. */
export async function openKept(kept: offline.Kept): Promise<void> {
  use(new Project({ ...kept.config, password: '' }))
  drafts = new Drafts(kept.config.project_id)
  const docs = new Map<string, Doc>()
  for (const doc of kept.docs) docs.set(doc.path, { ...doc, text: (await drafts.read(doc.path))?.text ?? doc.base, saving: false, gone: false })
  set({ config: { ...kept.config, password: '' }, offline: kept.since, files: new Map(kept.files.map((file) => [file.path, file])), docs, active: kept.active })
}

/** Keep what the page shows, some seconds after it changed: a start without the stack shows it. */
function keepForOffline(): void {
  let timer: ReturnType<typeof setTimeout> | undefined
  const keep = () => {
    timer = undefined
    const { config, files, docs, active } = get()
    if (config) void offline.keep({ config, files: [...files.values()], docs: [...docs.values()].map(({ path, base, version }) => ({ path, base, version })), active, since: new Date().toISOString() })
  }
  useProjectEditorStore.subscribe((now, before) => {
    if (now.files !== before.files || now.docs !== before.docs || now.active !== before.active) timer ??= setTimeout(keep, 2000)
  })
  keep()
}

/** Read the list anew, and what is open and unchanged here. */
async function reload(): Promise<void> {
  const files = new Map((await project.list()).map((file) => [file.path, file]))
  set({ files })
  for (const doc of get().docs.values()) {
    const now = files.get(doc.path)
    if (!now) patchDoc(doc.path, { gone: doc.version > 0 })
    else if (now.version > doc.version) await readAgain(doc.path)
  }
}

async function readAgain(path: string): Promise<void> {
  if (get().docs.get(path)?.shared) return // its room tells
  const now = await project.read(path)
  if (now) theirs(path, now.content, now.version)
}

// --- files and tabs

export async function openFile(path: string, show = true): Promise<void> {
  if (get().docs.has(path)) {
    if (show) set({ active: path, history: null })
    return
  }
  if (get().files.get(path)?.binary) return say(`${path} is a binary file: drop another on the tree to replace it.`)
  await attempt(`${path} could not be opened`, async () => {
    const now = await project.read(path)
    const draft = await drafts.read(path)
    if (!now && !draft) return say(`${path} is not there any more.`)
    const doc: Doc = { path, base: now?.content ?? '', version: now?.version ?? 0, text: now?.content ?? '', saving: false, gone: false }
    set({ docs: new Map(get().docs).set(path, doc) })
    if (show || draft) set({ active: path, history: null })
    if (draft) restoreDraft(path, draft)
  })
}

/** What was not saved when the tab ended, on top of what others have saved since. */
function restoreDraft(path: string, draft: { text: string; base: string; version: number }): void {
  const doc = get().docs.get(path)!
  if (draft.version >= doc.version) return patchDoc(path, { text: draft.text })
  const merged = merge(draft.text, draft.base, doc.base)
  if (merged.clean) patchDoc(path, { text: merged.text })
  else set({ conflict: { path, mine: draft.text, theirs: doc.base, merged: merged.text, version: doc.version } })
}

export function closeFile(path: string): void {
  const docs = new Map(get().docs)
  const doc = docs.get(path)
  if (doc && doc.text !== doc.base && !confirm(`${path} is not saved. Close it all the same?`)) return
  docs.delete(path)
  void drafts.drop(path)
  const active = get().active === path ? ([...docs.keys()].at(-1) ?? null) : get().active
  set({ docs, active, history: null })
}

export function edit(path: string, text: string): void {
  const doc = get().docs.get(path)
  if (!doc || doc.text === text) return
  patchDoc(path, { text })
  if (text.length < SOON) return keepDraft(path)
  clearTimeout(later)
  later = setTimeout(keepDraft, 500, path) // a file of megabytes takes longer to write than a key to press
}

function keepDraft(path: string): void {
  const doc = get().docs.get(path)
  if (!doc) return
  if (doc.text === doc.base) return void drafts.drop(path)
  drafts.keep(path, { text: doc.text, base: doc.base, version: doc.version }).catch(() => {
    say(`${path} is too large for this browser to keep unsaved: save it before the tab is closed.`, 'error')
  })
}

// --- saving

export async function save(path: string): Promise<void> {
  const doc = get().docs.get(path)
  if (!doc || doc.shared) return
  if (doc.saving) return patchDoc(path, { again: true })
  if (doc.text === doc.base && !doc.gone) return
  const { text } = doc
  patchDoc(path, { saving: true })
  const end = begin(path)
  const since = performance.now()
  try {
    const saved = await project.save(path, text, doc.version)
    patchDoc(path, { base: text, version: saved.version, gone: false })
    patchFiles([[path, { path, version: saved.version, size: text.length, binary: false }]])
    keepDraft(path)
    committed(saved.revision, since, path, [path])
  } catch (error) {
    if (error instanceof Refused && error.code === 'PT409') await attempt(`${path} could not be read`, () => meetConflict(path, text))
    else sayError(`${path} was not saved, and is kept here`, error)
  } finally {
    end()
    const again = get().docs.get(path)?.again
    patchDoc(path, { saving: false, again: false })
    if (again) void save(path)
  }
}

/** Somebody saved meanwhile: merged and saved at once where the lines are others, shown where they are the same. */
async function meetConflict(path: string, mine: string): Promise<void> {
  const doc = get().docs.get(path)!
  const now = await project.read(path)
  const merged = merge(mine, doc.base, now?.content ?? '')
  const version = now?.version ?? 0
  if (!merged.clean) return set({ conflict: { path, mine, theirs: now?.content ?? '', merged: merged.text, version } })
  patchDoc(path, { base: now?.content ?? '', version, text: merged.text, saving: false, gone: !now })
  say(`${path} was merged with what somebody else saved.`)
  await save(path)
}

export async function resolveConflict(text: string): Promise<void> {
  const conflict = get().conflict
  if (!conflict) return
  set({ conflict: null })
  patchDoc(conflict.path, { base: conflict.theirs, version: conflict.version, text })
  await save(conflict.path)
}

export async function createFile(path: string): Promise<void> {
  const docs = new Map(get().docs).set(path, { path, base: '', version: 0, text: '', saving: false, gone: true })
  set({ docs, active: path, history: null })
  await save(path)
}

export async function removeFile(path: string): Promise<void> {
  const file = get().files.get(path)
  if (!file || !confirm(`Delete ${path}? Its history is kept.`)) return
  await commit(`${path} was not deleted`, `${path} deleted`, [path], () => project.remove(path, file.version), new Map([[path, null]]))
}

export async function renameFile(from: string, to: string): Promise<void> {
  const file = get().files.get(from)
  if (!file || from === to) return
  let renamed = false
  await commit(`${from} was not renamed`, `${from} → ${to}`, [from, to], async () => {
    const done = await project.rename(from, to, file.version)
    renamed = true
    return done
  }, new Map([[from, null], [to, { ...file, path: to, version: 0 }]]))
  const doc = get().docs.get(from)
  if (!renamed || !doc) return
  patchDoc(from, { text: doc.base }) // what is not saved goes on under the new name
  closeFile(from)
  await openFile(to)
  if (doc.text !== doc.base) edit(to, doc.text)
}

/** Text is saved as text; everything else goes to Storage under its hash. */
export async function addFiles(directory: string, given: File[]): Promise<void> {
  for (const file of given) {
    const path = directory ? `${directory}/${file.name}` : file.name
    await commit(`${path} was not added`, `${path} added`, [path], async () => {
      const text = file.size < 1_000_000 ? await asText(file) : null
      return text === null ? await project.upload(path, file) : await project.apply([{ file_path: path, content: text }])
    })
  }
}

async function asText(file: File): Promise<string | null> {
  try {
    const text = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(await file.arrayBuffer())
    return text.includes('\0') ? null : text
  } catch {
    return null
  }
}

/** Writes. `ahead` is what the tree shows at once: the database's answer stands over it, and a refusal takes it back. */
async function commit(failed: string, title: string, files: string[], work: () => Promise<{ revision: number }>, ahead = new Map<string, FileEntry | null>()): Promise<void> {
  const before = [...ahead.keys()].map((path) => [path, get().files.get(path) ?? null] as const)
  patchFiles(ahead)
  const end = begin(title)
  try {
    const since = performance.now()
    const { revision } = await work()
    committed(revision, since, title, files)
  } catch (error) {
    patchFiles(before.filter(([path]) => (get().files.get(path) ?? null) === ahead.get(path)).map(([path, file]) => [path, file]))
    sayError(failed, error)
  } finally {
    end()
  }
}

// --- history

export async function showHistory(path: string): Promise<void> {
  await attempt('The history could not be read', async () => set({ history: { path, versions: await project.history(path) } }))
}

export async function contentOf(path: string, version: number): Promise<string> {
  return await project.content(path, version)
}

export async function restore(path: string, version: number): Promise<void> {
  const [newest] = get().history?.versions ?? []
  if (!newest) return
  await commit(`${path} was not restored`, `${path} back at version ${version}`, [path], () => project.restore(path, version, newest.version))
  await showHistory(path)
}

// --- checkpoints, and the session

export async function showCheckpoints(): Promise<void> {
  await attempt('The checkpoints could not be read', async () => set({ checkpoints: { kept: await project.checkpoints(), compared: null }, history: null }))
}

export async function compare(revision: number): Promise<void> {
  await attempt(`Revision ${revision} could not be compared`, async () => {
    const diff = await project.diff(revision)
    const checkpoints = get().checkpoints
    if (checkpoints) set({ checkpoints: { ...checkpoints, compared: { revision, diff } } })
  })
}

export async function keepRevision(name: string): Promise<void> {
  await attempt(`${name} was not kept`, async () => {
    await project.keep(name)
    await showCheckpoints()
  })
}

export async function restoreProject(revision: number): Promise<void> {
  if (!confirm(`Make the whole project as it was at revision ${revision}? What was written since stays in the history.`)) return
  await commit(`Revision ${revision} was not restored`, `back at revision ${revision}`, [], async () => {
    const done = await project.restoreProject(revision)
    if (done.changed === 0) say(`Nothing has changed since revision ${revision}.`)
    return done
  })
  await showCheckpoints()
}

export async function showSession(): Promise<void> {
  await attempt('The session could not be read', async () => set({ session: await project.session() }))
}

// --- what others do

function onCommit(commit: Commit): void {
  const missed = heard > 0 && commit.revision > heard + 1
  heard = Math.max(heard, commit.revision)
  const title = commit.label ?? (commit.files.length === 1 ? commit.files[0]!.path : `${commit.files.length} files`)
  note({
    revision: commit.revision, title, files: commit.files.map((file) => file.path), mine: commit.sender === project.userId, who: null, turn: commit.turn,
    since: performance.now(), saved: null, applied: null, shown: null, outcome: null,
  })
  void watchScreen(commit.revision)
  if (get().kept.some(({ file_path }) => commit.files.some(({ path }) => path === file_path))) void readKept()
  if (missed || !commit.complete) return void attempt('The files could not be read', reload)
  for (const file of commit.files) {
    const known = get().files.get(file.path)
    if (known && known.version >= file.version) continue // our own save's echo, or an older one
    if (file.deleted) {
      patchFiles([[file.path, null]])
      patchDoc(file.path, { gone: true })
      continue
    }
    patchFiles([[file.path, { path: file.path, version: file.version, size: file.content?.length ?? known?.size ?? 0, binary: known?.binary ?? false }]])
    if (!get().docs.has(file.path)) continue
    if (file.content === null) void attempt(`${file.path} could not be read`, () => readAgain(file.path))
    else theirs(file.path, file.content, file.version)
  }
}

/** Somebody else's version of an open file: taken where nothing was changed here, merged where other lines were. */
function theirs(path: string, content: string, version: number): void {
  const doc = get().docs.get(path)
  if (!doc || doc.saving || doc.shared || version <= doc.version) return
  if (doc.text === doc.base) return patchDoc(path, { base: content, text: content, version, gone: false })
  const merged = merge(doc.text, doc.base, content)
  if (!merged.clean) return // said when it is saved, or closed
  patchDoc(path, { base: content, text: merged.text, version, gone: false })
  keepDraft(path)
}

// --- rooms: a file that somebody else has open, too

export const knownDoc = (path: string): Doc | undefined => get().docs.get(path)

/** The file's room says which version it has; `clean`: it is what stands here. */
export function inRoom(path: string, version: number, clean: boolean): void {
  const doc = get().docs.get(path)
  if (!doc) return
  patchDoc(path, { shared: true, version, gone: false, ...(clean ? { base: doc.text } : {}) })
  keepDraft(path)
}

/** From here on the file is edited alone; `saved`: what its room saved last. */
export function leftRoom(path: string, saved: { base: string; version: number } | null): void {
  patchDoc(path, { shared: false, ...saved })
  keepDraft(path)
}

export function goTo(path: string, line: number, column: number): void {
  void openFile(path).then(() => set({ goTo: { path, line, column, nonce: Date.now() } }))
}

// --- an AI's turn, to be looked at

export async function playTurn(asTurn: boolean): Promise<void> {
  if (get().playing) return
  set({ playing: true })
  await attempt('The turn was not played', async () => {
    set({ takeBack: await demo.play(project, asTurn) })
  })
  set({ playing: false })
}

export async function takeBackTurn(): Promise<void> {
  const back = get().takeBack
  if (!back) return
  await attempt('It was not taken back', async () => {
    await back()
    set({ takeBack: null })
  })
}

export type { Change }
