/** Where everything is, and who is editing. `preview-orchestrator dev` serves it beside this page, to this page alone. */
export type Config = {
  supabase_url: string
  anon_key: string
  email: string
  password: string
  project_id: string
  project_name: string
  session_id: string
  preview_url: string
}

export async function readConfig(): Promise<Config> {
  const answer = await fetch('editor.json', { cache: 'no-store' })
  if (!answer.ok) throw new Error(`The stack does not say where it is (${answer.status}). Is preview-orchestrator dev running?`)
  return { ...(await answer.json()), supabase_url: location.origin }
}
