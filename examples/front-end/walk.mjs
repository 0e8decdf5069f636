// Does all of it once, in order, and says what came of it. `editor.js` is editor.ts, compiled.

import * as editor from './editor.js'

const { SUPABASE_URL: url, SUPABASE_ANON_KEY: key, EMAIL, PASSWORD, PROJECT_ID: project } = process.env
// Node has a WebSocket of its own from version 22 on.
const transport = globalThis.WebSocket ?? (await import('ws')).default
const supabase = await editor.connect(url, key, EMAIL, PASSWORD, { realtime: { transport } })
const told = {}

let seen
const shown = (path) =>
  new Promise((done) => (seen = (files) => files.some((file) => file.file_path === path) && done()))
const first = shown('src/a.ts')
editor.follow(supabase, project, (files) => seen(files))

told.saved = await editor.save(supabase, project, 'src/a.ts', 'one\n', 0)
await first
const asked = []
told.merged = await editor.saveMerged(supabase, project, 'src/a.ts', 'mine\n', 0, (mine, theirs) => {
  asked.push(theirs)
  return theirs + mine
})
told.asked = asked
const renamed = shown('src/b.ts')
await editor.rename(supabase, project, 'src/a.ts', 'src/b.ts', told.merged)
await renamed
told.many = await editor.writeMany(supabase, project, [
  { file_path: 'src/c.ts', content: 'c\n', expected_version: 0 },
  { file_path: 'src/d.ts', content: 'd\n', expected_version: 0 },
])
await editor.remove(supabase, project, 'src/d.ts', 1)
const logo = new Blob([new Uint8Array([137, 80, 78, 71])], { type: 'image/png' })
told.binary = await editor.uploadBinary(supabase, project, 'logo.png', logo)
await editor.uploadBinary(supabase, project, 'icon.png', logo)
await editor.save(supabase, project, 'src/c.ts', 'spoilt\n', 1)
told.restored = await editor.restore(supabase, project, 'src/c.ts')
async function* files() {
  yield ['src/Page.tsx', 'page\n']
  yield ['src/Part.tsx', 'part\n']
}
told.turn = (await editor.writeTurn(supabase, project, 'a page', files())).changed
told.session = (await editor.openSession(supabase, url, project, 'walk')).project_id
await supabase.auth.signOut()
process.stdout.write(JSON.stringify(told) + '\n')
process.exit(0)
