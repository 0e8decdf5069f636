// A turn with supabase-js: what is written in it appears at its end, all at once.

import { createClient } from '@supabase/supabase-js'

// Node has a WebSocket of its own from version 22 on.
const transport = globalThis.WebSocket ?? (await import('ws')).default

export function connect({ SUPABASE_URL, SUPABASE_ANON_KEY, ACCESS_TOKEN } = process.env) {
  return createClient(SUPABASE_URL, SUPABASE_ANON_KEY, { accessToken: async () => ACCESS_TOKEN, realtime: { transport } })
}

/** An RPC's answer, or its error thrown: `code` is PT409 and its like, `details` JSON. */
export async function rpc(supabase, name, args) {
  const { data, error } = await supabase.rpc(name, args)
  if (error) throw Object.assign(new Error(error.message), error)
  return data
}

export class Turn {
  /** Keep `id` somewhere that outlives this process: whoever has it can go on. */
  constructor(supabase, project, id) {
    Object.assign(this, { supabase, project, id })
  }

  static async begin(supabase, project, label) {
    const { turn_id } = await rpc(supabase, 'begin_turn', { project_uuid: project, p_label: label })
    return new Turn(supabase, project, turn_id)
  }

  call(name, args) {
    return rpc(this.supabase, name, { project_uuid: this.project, ...args })
  }

  /** Staged: nobody sees it yet. Each write renews the lease. */
  write(path, content, expected) {
    return this.call('upsert_project_file', {
      p_file_path: path,
      p_content: content,
      expected_version: expected ?? null,
      p_turn_id: this.id,
    })
  }

  remove(path, expected) {
    return this.call('delete_project_file', {
      p_file_path: path,
      expected_version: expected ?? null,
      p_turn_id: this.id,
    })
  }

  /** The project as it will be, to read from while writing: path → content. */
  async files() {
    const rows = await this.call('list_current_files', { p_turn_id: this.id })
    return new Map(rows.map((row) => [row.file_path, row.content]))
  }

  abandon() {
    return this.call('abandon_turn', { turn_id: this.id })
  }

  /**
   * All of it, in one revision. `merge(path, mine, theirs)` is asked for each file that somebody else wrote meanwhile, and answers
   * what to write; null deletes, and `mine` or `theirs` is null where that side deleted it. Calling it again after a lost answer
   * gives the first one.
   */
  async end(merge) {
    for (;;) {
      try {
        return await this.call('end_turn', { turn_id: this.id })
      } catch (error) {
        const conflicts = error.code === 'PT409' ? JSON.parse(error.details).conflicts : undefined
        if (!merge || !conflicts) throw error
        const [mine, rows] = await Promise.all([this.files(), this.call('list_current_files', {})])
        const theirs = new Map(rows.map((row) => [row.file_path, row]))
        for (const { file_path: path, version } of conflicts) {
          const row = theirs.get(path)
          const merged = await merge(path, mine.get(path) ?? null, row?.content ?? null)
          // The version that was merged into becomes the base; who wrote again in the meantime is the next round's conflict.
          const expected = row?.version ?? version
          await (merged === null ? this.remove(path, expected) : this.write(path, merged, expected))
        }
      }
    }
  }
}
