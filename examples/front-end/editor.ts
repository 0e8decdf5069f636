// What an editor does with a project, with supabase-js. Every part between `region` and `endregion` stands in docs/front-end.md.

// #region connect
import { createClient, type SupabaseClient } from '@supabase/supabase-js'

export async function connect(url: string, anonKey: string, email: string, password: string, options = {}): Promise<SupabaseClient> {
  const supabase = createClient(url, anonKey, options)
  const { error } = await supabase.auth.signInWithPassword({ email, password })
  if (error) throw error
  return supabase
}

/** An RPC's answer, or its refusal thrown: `code` is PT409 and its like, `details` is JSON. */
export async function call<T = any>(supabase: SupabaseClient, name: string, args: object): Promise<T> {
  const { data, error } = await supabase.rpc(name, args)
  if (error) throw error
  return data
}
// #endregion

// #region save
/** Gives the version that the file is at now. `expected`: the version that was edited, 0 for a new file. */
export async function save(supabase: SupabaseClient, project: string, path: string, content: string, expected: number): Promise<number> {
  const saved = await call(supabase, 'upsert_project_file', {
    project_uuid: project,
    p_file_path: path,
    p_content: content,
    expected_version: expected,
  })
  return saved.version
}
// #endregion

// #region conflict
type Merge = (mine: string, theirs: string | null) => string

/** Saves, and when somebody else has saved meanwhile, merges with what they wrote. */
export async function saveMerged(
  supabase: SupabaseClient, project: string, path: string, content: string, expected: number, merge: Merge
): Promise<number> {
  for (;;) {
    try {
      return await save(supabase, project, path, content, expected)
    } catch (error: any) {
      if (error.code !== 'PT409') throw error
      const { data, error: failed } = await supabase
        .from('project_files_current')
        .select('content, version')
        .match({ project_id: project, file_path: path })
        .maybeSingle()
      if (failed) throw failed
      content = merge(content, data?.content ?? null)
      expected = data?.version ?? 0
    }
  }
}
// #endregion

// #region delete
export async function remove(supabase: SupabaseClient, project: string, path: string, expected: number): Promise<void> {
  await call(supabase, 'delete_project_file', { project_uuid: project, p_file_path: path, expected_version: expected })
}
// #endregion

// #region rename
/** The file's history goes on: `renamed_from` of the new version is the id of the last one under the old name. */
export async function rename(supabase: SupabaseClient, project: string, from: string, to: string, expected: number): Promise<void> {
  await call(supabase, 'rename_project_file', { project_uuid: project, p_from: from, p_to: to, expected_version: expected })
}
// #endregion

// #region many
type Change = { action?: 'update' | 'delete'; file_path: string; content?: string; expected_version?: number }

/** All of them or none: one revision, and the preview is updated once. A conflict names every path in `conflicts`. */
export async function writeMany(supabase: SupabaseClient, project: string, changes: Change[]): Promise<number> {
  const request = crypto.randomUUID() // asked again after a lost answer, the first answer is given again
  const done = await call(supabase, 'apply_project_files', { project_uuid: project, changes, p_correlation_id: request })
  return done.revision
}
// #endregion

// #region binary
/** The bytes go to Storage under their hash, the project is told the hash. */
export async function uploadBinary(supabase: SupabaseClient, project: string, path: string, bytes: Blob): Promise<number> {
  const digest = await crypto.subtle.digest('SHA-256', await bytes.arrayBuffer())
  const hash = Array.from(new Uint8Array(digest), (byte) => byte.toString(16).padStart(2, '0')).join('')
  const { error } = await supabase.storage.from('project-assets').upload(`${project}/${hash}`, bytes, { contentType: bytes.type })
  // These bytes are there already: somebody uploaded them before.
  if (error && (error as { statusCode?: string }).statusCode !== '409') throw error
  const change = { file_path: path, content: null, content_hash: hash, encoding: 'base64' }
  const done = await call(supabase, 'apply_project_files', { project_uuid: project, changes: [change] })
  return done.revision
}
// #endregion

// #region subscribe
type Row = { file_path: string; content: string | null; version: number }

/** `show` is given the whole tree at the start, after each reconnect, and after each commit of anybody. */
export function follow(supabase: SupabaseClient, project: string, show: (files: Row[]) => void) {
  const read = async () => show(await call<Row[]>(supabase, 'list_current_files', { project_uuid: project }))
  return supabase
    .channel(`project:${project}`, { config: { private: true } })
    .on('broadcast', { event: '*' }, read) // file:update, file:delete, bulk:apply: `revision` says which commit it was
    .subscribe((status) => {
      if (status === 'SUBSCRIBED') read() // a message may have been lost while nobody listened
    })
}
// #endregion

// #region restore
export async function restore(supabase: SupabaseClient, project: string, path: string): Promise<number> {
  const { data, error } = await supabase
    .from('project_files')
    .select('version, created_at, created_by, is_deleted')
    .match({ project_id: project, file_path: path })
    .order('version', { ascending: false })
  if (error) throw error
  const [current, ...before] = data
  const good = before.find((version) => !version.is_deleted)
  if (!good) throw new Error(`${path} has no earlier version`)
  const restored = await call(supabase, 'restore_project_file', {
    project_uuid: project,
    p_file_path: path,
    p_version: good.version,
    expected_version: current.version,
  })
  return restored.version
}
// #endregion

// #region session
/** The preview's session: the same one for the same `key`, however often it is asked for. */
export async function openSession(supabase: SupabaseClient, orchestrator: string, project: string, key: string) {
  const { data } = await supabase.auth.getSession()
  const headers = { Authorization: `Bearer ${data.session?.access_token}`, 'Content-Type': 'application/json' }
  let answer = await fetch(`${orchestrator}/v1/sessions`, {
    method: 'POST',
    headers: { ...headers, 'Idempotency-Key': key },
    body: JSON.stringify({ project_id: project }),
  })
  for (;;) {
    const session = await answer.json()
    if (!answer.ok) throw new Error(session.detail)
    if (!['requested', 'provisioning'].includes(session.state)) return session // `preview_url` once it is `ready`
    await new Promise((done) => setTimeout(done, 1000))
    answer = await fetch(`${orchestrator}/v1/sessions/${session.session_id}`, { headers })
  }
}
// #endregion

// #region turn
/** What an AI writes one file after the other, the preview shows at the end: all at once. */
export async function writeTurn(supabase: SupabaseClient, project: string, label: string, files: AsyncIterable<[string, string]>) {
  const { turn_id } = await call(supabase, 'begin_turn', { project_uuid: project, p_label: label })
  for await (const [path, content] of files) {
    await call(supabase, 'upsert_project_file', { project_uuid: project, p_file_path: path, p_content: content, p_turn_id: turn_id })
  }
  return await call(supabase, 'end_turn', { project_uuid: project, turn_id })
}
// #endregion
