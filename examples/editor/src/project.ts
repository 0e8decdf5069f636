/** One project over supabase-js: every call that the editor makes of the database, of Storage and of the session API. */
import { createClient, type RealtimeChannel, type SupabaseClient } from '@supabase/supabase-js'

import { type Config, readConfig } from './config.ts'

/** A current file, without its content. */
export type FileEntry = { path: string; version: number; size: number; binary: boolean }

export type Change = { action?: 'update' | 'delete'; file_path: string; content?: string | null; content_hash?: string; encoding?: string; expected_version?: number }

/** What somebody committed, as the channel tells it. */
export type Commit = {
  revision: number
  timestamp: string
  sender: string | null
  label: string | null
  turn: boolean
  complete: boolean
  files: { path: string; deleted: boolean; version: number; content: string | null }[]
}

export type ScreenError = { kind: string; message: string; file: string | null; line: number | null; column: number | null; revision: number; count: number }
export type Shown = {
  outcome: 'shown' | 'error' | 'no_viewer' | 'applied' | 'behind'
  applied: number
  shown: { revision: number } | null
  errors: ScreenError[]
}

export type Version = { version: number; revision: number; created_at: string; is_deleted: boolean; size_bytes: number; encoding: string }

/** A revision that is kept. `name` is null for the end of a turn, which has the turn's `label`. */
export type Checkpoint = { name: string | null; label: string | null; revision: number; created_at: string }

/** What a tool in the preview made and was not written. `proposal`: of a file that people write; `conflict`: somebody saved meanwhile. */
export type Kept = {
  kind: 'proposal' | 'conflict'
  kept_id: string
  file_path: string
  action: 'upsert' | 'delete'
  size_bytes: number
  base_version: number
  current_version: number
  session_id: string
  created_at: string
}

/** Where a commit came from, as its history says. */
export type Origin = { origin: 'user' | 'room' | 'container' | 'restore' | 'api'; changed_by: string | null; changed_by_name: string | null; contributors: string[] | null }

/** A session as its agent said last. `start`: seconds from the start of its process to the end of each part. */
export type Session = {
  state: string
  agent?: { state: string | null; link: string | null; dev_server: string | null; start: Record<string, number>; problems: { kind: string; detail?: string; file_path?: string }[] }
}

/** An RPC that was refused. `code` is PT409 and its like; `details` is JSON where there are any. */
export class Refused extends Error {
  code: string
  details: string
  constructor(code: string, message: string, details: string) {
    super(message)
    this.code = code
    this.details = details
  }
}

/** Nobody could be asked: the network or the server is away. What was to be saved is kept. */
export class Unreachable extends Error {}

const PAGE = 1000 // rows: the most that PostgREST gives at once where nothing else is configured

export class Project {
  config: Config
  readonly supabase: SupabaseClient
  userId = ''
  /** Hears of another session or preview, after the stack was started again. */
  onConfig: (config: Config) => void = () => undefined
  private renewing: Promise<void> | null = null

  constructor(config: Config) {
    this.config = config
    this.supabase = createClient(config.supabase_url, config.anon_key, { auth: { persistSession: false } })
  }

  async signIn(): Promise<void> {
    const { email, password } = this.config
    const { data, error } = await this.supabase.auth.signInWithPassword({ email, password })
    if (error) throw new Error(`You could not be signed in: ${error.message}`)
    this.userId = data.user.id
  }

  /** Ask anew where everything is, and sign in again where the stack was started again, or the token was `refused`. */
  renew(refused = false): Promise<void> {
    this.renewing ??= this.signInAnew(refused).finally(() => {
      this.renewing = null
    })
    return this.renewing
  }

  private async signInAnew(refused: boolean): Promise<void> {
    const before = this.config
    const now = await readConfig().catch((error: Error) => {
      throw new Unreachable(error.message)
    })
    // Another stack at this address: what is typed is among the drafts.
    if (now.project_id !== before.project_id || now.anon_key !== before.anon_key) return location.reload()
    if (!refused && now.password === before.password) return
    this.config = now
    await this.signIn()
    if (now.session_id !== before.session_id || now.preview_url !== before.preview_url) this.onConfig(now)
  }

  /** Ask, and once more signed in again where that is what is missing. */
  private async signed<T extends { status: number }>(ask: () => PromiseLike<T>, ends = [401]): Promise<T> {
    const answer = await ask()
    if (!ends.includes(answer.status)) return answer
    await this.renew(answer.status === 401)
    return await ask()
  }

  private async call<T>(name: string, args: object): Promise<T> {
    const { data, error, status } = await this.signed(() => this.supabase.rpc(name, { project_uuid: this.config.project_id, ...args }))
    if (!error) return data as T
    if (status === 0 || status >= 500) throw new Unreachable(error.message)
    throw new Refused(error.code, error.message, error.details ?? '')
  }

  // --- reading

  async list(): Promise<FileEntry[]> {
    const found: FileEntry[] = []
    for (;;) {
      const { data, error } = await this.signed(() =>
        this.supabase
          .from('project_files_current')
          .select('file_path, version, size_bytes, encoding')
          .eq('project_id', this.config.project_id)
          .order('file_path')
          .range(found.length, found.length + PAGE - 1),
      )
      if (error) throw new Unreachable(error.message)
      for (const row of data) {
        found.push({ path: row.file_path, version: row.version, size: row.size_bytes, binary: row.encoding !== 'utf-8' })
      }
      if (data.length < PAGE) return found
    }
  }

  /** The current text of a file; null when it is not there. */
  async read(path: string): Promise<{ content: string; version: number } | null> {
    const { data, error } = await this.signed(() =>
      this.supabase
        .from('project_files_current')
        .select('content, version')
        .match({ project_id: this.config.project_id, file_path: path })
        .maybeSingle(),
    )
    if (error) throw new Unreachable(error.message)
    return data && { content: data.content ?? '', version: data.version }
  }

  /** Newest first. */
  async history(path: string): Promise<Version[]> {
    const { data, error } = await this.signed(() =>
      this.supabase
        .from('project_files')
        .select('version, revision, created_at, is_deleted, size_bytes, encoding')
        .match({ project_id: this.config.project_id, file_path: path })
        .order('version', { ascending: false })
        .limit(100),
    )
    if (error) throw new Unreachable(error.message)
    return data
  }

  /** What a version holds; of the older ones the table has splices alone. Nothing of a deletion, or of what is no text. */
  async content(path: string, version: number): Promise<string> {
    const found = await this.call<{ content: string | null }>('file_version', { p_file_path: path, p_version: version })
    return found.content ?? ''
  }

  /** Newest first. */
  async checkpoints(): Promise<Checkpoint[]> {
    return await this.call('list_checkpoints', {})
  }

  /** Oldest first. */
  async kept(): Promise<Kept[]> {
    const [proposals, conflicts] = await Promise.all([this.call<Kept[]>('list_proposals', {}), this.call<Kept[]>('list_conflicts', {})])
    const all = [...proposals.map((one): Kept => ({ ...one, kind: 'proposal' })), ...conflicts.map((one): Kept => ({ ...one, kind: 'conflict' }))]
    return all.sort((a, b) => a.created_at.localeCompare(b.created_at))
  }

  /** What the tool made; nothing of a deletion. */
  async keptContent({ kind, kept_id }: Kept): Promise<string> {
    const [one] = await this.call<{ content: string | null }[]>(kind === 'proposal' ? 'list_proposals' : 'list_conflicts', { p_kept_id: kept_id })
    if (!one) throw new Refused('PT410', 'it was decided already', '')
    return one.content ?? ''
  }

  /** Who made a revision. One file of it says so: a commit has one author. */
  async origin(revision: number): Promise<Origin | null> {
    const { data, error } = await this.signed(() =>
      this.supabase
        .from('project_history')
        .select('origin, changed_by, changed_by_name, contributors')
        .match({ project_id: this.config.project_id, revision })
        .limit(1),
    )
    if (error) throw new Unreachable(error.message)
    return data[0] ?? null
  }

  /** All that changed from one revision to now, as `git diff` prints it. */
  async diff(from: number): Promise<string> {
    return await this.call('diff_project', { p_from: from })
  }

  // --- writing. `expected`: the version that was edited; 0 for a new file.

  async save(path: string, content: string, expected: number): Promise<{ version: number; revision: number }> {
    return await this.call('upsert_project_file', { p_file_path: path, p_content: content, expected_version: expected })
  }

  async remove(path: string, expected: number): Promise<{ revision: number }> {
    return await this.call('delete_project_file', { p_file_path: path, expected_version: expected })
  }

  async rename(from: string, to: string, expected: number): Promise<{ revision: number }> {
    return await this.call('rename_project_file', { p_from: from, p_to: to, expected_version: expected })
  }

  async restore(path: string, version: number, expected: number): Promise<{ revision: number }> {
    return await this.call('restore_project_file', { p_file_path: path, p_version: version, expected_version: expected })
  }

  /** Write what a tool made, or drop it. `force`: also where the file changed since the tool read it; a conflict says that by itself. */
  async decide({ kind, kept_id }: Kept, take: boolean, force: boolean): Promise<{ revision?: number }> {
    if (kind === 'conflict') return await this.call('resolve_conflict', { kept_id, p_take: take ? 'kept' : 'current' })
    return take ? await this.call('accept_proposal', { kept_id, p_force: force }) : await this.call('reject_proposal', { kept_id })
  }

  /** Name the revision of now: it can be brought back for as long as the name is there. */
  async keep(name: string): Promise<void> {
    await this.call('create_checkpoint', { p_name: name })
  }

  /** Make the whole project as it was at a revision, in one new commit. */
  async restoreProject(revision: number): Promise<{ revision: number; changed: number }> {
    return await this.call('restore_project', { revision, p_correlation_id: crypto.randomUUID() })
  }

  /** All of them or none, in one revision. Asked again after a lost answer it gives the first one. */
  async apply(changes: Change[]): Promise<{ revision: number }> {
    return await this.call('apply_project_files', { changes, p_correlation_id: crypto.randomUUID() })
  }

  /** Writes that the preview shows at the end, all at once: what an AI's turn is. */
  async turn(label: string, write: (save: (path: string, content: string) => Promise<void>) => Promise<void>): Promise<{ revision: number }> {
    const { turn_id } = await this.call<{ turn_id: string }>('begin_turn', { p_label: label })
    try {
      await write(async (path, content) => {
        await this.call('upsert_project_file', { p_file_path: path, p_content: content, p_turn_id: turn_id })
      })
      return await this.call('end_turn', { turn_id })
    } catch (error) {
      await this.call('abandon_turn', { turn_id }).catch(() => undefined) // it ends by its lease
      throw error
    }
  }

  /** The bytes go to Storage under their hash, and the project is told the hash. */
  async upload(path: string, bytes: Blob): Promise<{ revision: number }> {
    const digest = await crypto.subtle.digest('SHA-256', await bytes.arrayBuffer())
    const hash = Array.from(new Uint8Array(digest), (byte) => byte.toString(16).padStart(2, '0')).join('')
    const { error } = await this.supabase.storage
      .from('project-assets')
      .upload(`${this.config.project_id}/${hash}`, bytes, { contentType: bytes.type || 'application/octet-stream' })
    // 409: these bytes are there already.
    if (error && (error as { statusCode?: string }).statusCode !== '409') throw new Error(`${path} could not be uploaded: ${error.message}`)
    return await this.apply([{ file_path: path, content: null, content_hash: hash, encoding: 'base64' }])
  }

  // --- following

  /** `onCommit` hears of each commit; `onConnected` that a connection is there again: something may have been missed. */
  follow(onCommit: (commit: Commit) => void, onConnected: (connected: boolean) => void): RealtimeChannel {
    return this.supabase
      .channel(`project:${this.config.project_id}`, { config: { private: true } })
      .on('broadcast', { event: '*' }, ({ event, payload }) => {
        const commit = commitOf(event, payload)
        if (commit) onCommit(commit)
      })
      .subscribe((status) => onConnected(status === 'SUBSCRIBED'))
  }

  /** `onNews` hears that what is applied or shown has changed, at most once a second; `onKept` that something waits for a decision, or was decided. */
  followScreen(onNews: (news: { applied: number; shown: number | null; error_count: number }) => void, onKept: () => void): RealtimeChannel {
    return this.supabase
      .channel(`preview:${this.config.project_id}`, { config: { private: true } })
      .on('broadcast', { event: 'preview:status' }, ({ payload }) => {
        if (payload.session_id === this.config.session_id) onNews(payload as { applied: number; shown: number | null; error_count: number })
      })
      .on('broadcast', { event: 'write_back:kept' }, onKept)
      .subscribe()
  }

  /** `onOthers` hears which files are open elsewhere, in how many editors. What it returns is told what is open here. */
  followOpen(onOthers: (others: Map<string, number>) => void): (paths: string[]) => void {
    const me = crypto.randomUUID()
    let paths: string[] = []
    const channel = this.supabase.channel(`open:${this.config.project_id}`, { config: { private: true, presence: { key: me } } })
    const tell = () => void channel.track({ paths: paths.slice(0, 50) })
    channel
      .on('presence', { event: 'sync' }, () => {
        const others = new Map<string, number>()
        for (const [key, metas] of Object.entries(channel.presenceState<{ paths: string[] }>())) {
          if (key === me) continue
          for (const path of new Set(metas.flatMap((meta) => (Array.isArray(meta.paths) ? meta.paths : [])))) others.set(path, (others.get(path) ?? 0) + 1)
        }
        onOthers(others)
      })
      .subscribe((status) => status === 'SUBSCRIBED' && tell())
    return (now) => {
      paths = now
      if (channel.state === 'joined') tell()
    }
  }

  /** Whether a room saved any of the versions after `from`, up to `to`. */
  async savedByRoom(path: string, from: number, to: number): Promise<boolean> {
    const { data, error } = await this.signed(() =>
      this.supabase
        .from('project_files')
        .select('version')
        .match({ project_id: this.config.project_id, file_path: path, origin: 'room' })
        .gt('version', from)
        .lte('version', to)
        .limit(1),
    )
    if (error) throw new Unreachable(error.message)
    return data.length > 0
  }

  /** An address that lets into a file's room, once; null: there is none for this file, or for us. */
  async room(path: string): Promise<string | null> {
    const answer = await this.signed(async () => {
      const { data } = await this.supabase.auth.getSession()
      return await fetch(`${this.config.supabase_url}/v1/projects/${this.config.project_id}/rooms`, {
        method: 'POST',
        headers: { Authorization: `Bearer ${data.session?.access_token}`, 'Content-Type': 'application/json' },
        body: JSON.stringify({ path }),
      })
    })
    if (answer.ok) return (await answer.json()).url
    const { type } = await answer.json().catch(() => ({ type: '' }))
    if ([400, 403, 404].includes(answer.status) || type.endsWith(':no_rooms')) return null
    throw new Unreachable(`the session API answered ${answer.status}`)
  }

  /** What became of a revision on the screen; waits until that is known. */
  async shown(revision: number, wait: number, signal: AbortSignal): Promise<Shown> {
    return await this.ask(`/shown?revision=${revision}&wait=${wait}&quiet=0.05`, signal)
  }

  async session(): Promise<Session> {
    return await this.ask('')
  }

  private async ask<T>(what: string, signal?: AbortSignal): Promise<T> {
    // 404 and 410: the stack was started again, and has another session.
    const answer = await this.signed(async () => {
      const { data } = await this.supabase.auth.getSession()
      return await fetch(`${this.config.supabase_url}/v1/sessions/${this.config.session_id}${what}`, {
        headers: { Authorization: `Bearer ${data.session?.access_token}` },
        signal: signal ?? null,
      })
    }, [401, 404, 410])
    if (!answer.ok) throw new Unreachable(`the session API answered ${answer.status}`)
    return await answer.json()
  }
}

function commitOf(event: string, payload: any): Commit | null {
  const head = { revision: payload.revision, timestamp: payload.timestamp, sender: payload.sender ?? null, label: payload.label ?? null, turn: Boolean(payload.turn) }
  const one = (file: any, deleted: boolean) => ({ path: file.file_path, deleted, version: file.version, content: file.content ?? null })
  switch (event) {
    case 'file:update':
      return { ...head, complete: true, files: [one(payload, false)] }
    case 'file:delete':
      return { ...head, complete: true, files: [one(payload, true)] }
    case 'bulk:apply': // too many to be named: the list is read anew
      return { ...head, complete: payload.complete !== false, files: payload.files.map((file: any) => one(file, file.action === 'delete')) }
    default:
      return null
  }
}
