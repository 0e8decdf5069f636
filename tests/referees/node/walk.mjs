// What the documentation of supabase-js and storage-js shows, method by method, against one server. Each line that goes out is one
// method: `{"method", "error"}`.
//
//   node walk.mjs URL ANON_KEY SERVICE_KEY EMAIL PASSWORD PROJECT

import assert from 'node:assert/strict'
import { StorageClient } from '@supabase/storage-js'
import { createClient } from '@supabase/supabase-js'
import ws from 'ws'

const [url, anonKey, serviceKey, email, password, project] = process.argv.slice(2)
const storage = new StorageClient(`${url}/storage/v1`, { apikey: serviceKey, Authorization: `Bearer ${serviceKey}` })
const supabase = createClient(url, anonKey, { realtime: { transport: ws } })
const blob = (text, type = 'text/plain') => new Blob([text], { type })
const bucket = 'walk'
const at = storage.from(bucket)

/** `data`, or the error thrown. */
async function data(asked) {
  const { data, error } = await asked
  if (error) throw error
  return data
}
/** The error that is expected. */
async function error(asked, code) {
  const { error } = await asked
  assert.ok(error, 'no error')
  assert.equal(error.statusCode ?? error.code ?? String(error.status), code)
}

const methods = {
  'storage createBucket': async () => {
    const options = { public: false, allowedMimeTypes: ['image/*', 'text/plain'], fileSizeLimit: '1MB' }
    assert.deepEqual(await data(storage.createBucket(bucket, options)), { name: bucket })
    await error(storage.createBucket(bucket), '409')
  },
  'storage getBucket': async () => assert.equal((await data(storage.getBucket(bucket))).file_size_limit, 1_000_000),
  'storage listBuckets': async () => {
    const found = await data(storage.listBuckets({ search: 'wal', limit: 10, sortColumn: 'name' }))
    assert.deepEqual(found.map((each) => each.id), [bucket])
  },
  'storage updateBucket': async () => {
    await data(storage.updateBucket(bucket, { public: true, fileSizeLimit: 2000 }))
    assert.equal((await data(storage.getBucket(bucket))).public, true)
  },
  'storage upload': async () => {
    const metadata = { by: 'walk' }
    await data(at.upload('a b/ü.txt', blob('one'), { metadata, cacheControl: '60' }))
    await data(at.upload('folder/raw.txt', Buffer.from('raw'), { contentType: 'text/plain' }))
    const form = new FormData()
    form.append('file', blob('form'), 'form.txt')
    await data(at.upload('form.txt', form))
    await error(at.upload('form.txt', blob('again')), '409')
    await error(at.upload('page.html', blob('x', 'text/html')), '415')
    await error(at.upload('big.txt', blob('x'.repeat(2001))), '413')
  },
  'storage update': async () => data(at.update('form.txt', blob('newer'))),
  'storage download': async () => {
    assert.equal(await (await data(at.download('a b/ü.txt'))).text(), 'one')
    assert.ok((await at.download('nothing')).error)
  },
  'storage info': async () => {
    const info = await data(at.info('a b/ü.txt'))
    assert.deepEqual([info.size, info.contentType, info.metadata], [3, 'text/plain', { by: 'walk' }])
  },
  'storage exists': async () => {
    assert.equal((await at.exists('form.txt')).data, true)
    assert.equal((await at.exists('nothing')).data, false)
  },
  'storage list': async () => {
    const names = (await data(at.list('', { limit: 2, sortBy: { column: 'name', order: 'desc' } }))).map((e) => e.name)
    assert.deepEqual(names, ['form.txt', 'folder'])
    assert.equal((await data(at.list('folder', { search: 'ra' })))[0].name, 'raw.txt')
  },
  'storage listV2': async () => {
    const first = await data(at.listV2({ limit: 2, with_delimiter: true }))
    assert.deepEqual([first.hasNext, first.folders.map((e) => e.name)], [true, ['a b/', 'folder/']])
    const next = await data(at.listV2({ limit: 2, with_delimiter: true, cursor: first.nextCursor }))
    assert.deepEqual([next.hasNext, next.objects.map((e) => e.name)], [false, ['form.txt']])
  },
  'storage createSignedUrl': async () => {
    const { signedUrl } = await data(at.createSignedUrl('a b/ü.txt', 60, { download: 'as.txt' }))
    const got = await fetch(signedUrl)
    assert.equal(await got.text(), 'one')
    assert.match(got.headers.get('content-disposition'), /as\.txt/)
  },
  'storage createSignedUrls': async () => {
    const [there, missing] = await data(at.createSignedUrls(['a b/ü.txt', 'nothing'], 60))
    assert.equal(await (await fetch(there.signedUrl)).text(), 'one')
    assert.ok(missing.error)
  },
  'storage getPublicUrl': async () => {
    const { publicUrl } = at.getPublicUrl('a b/ü.txt').data
    assert.equal(await (await fetch(publicUrl)).text(), 'one')
  },
  'storage createSignedUploadUrl': async () => {
    assert.ok((await data(at.createSignedUploadUrl('signed.txt'))).token)
    await error(at.createSignedUploadUrl('form.txt'), '409')
  },
  'storage uploadToSignedUrl': async () => {
    const { path, token } = await data(at.createSignedUploadUrl('signed.txt'))
    await data(at.uploadToSignedUrl(path, token, blob('signed')))
    assert.equal(await (await data(at.download(path))).text(), 'signed')
  },
  'storage move': async () => {
    await data(at.move('signed.txt', 'moved/signed.txt'))
    await error(at.move('nothing', 'moved/nothing'), '404')
  },
  'storage copy': async () => assert.equal((await data(at.copy('form.txt', 'copy.txt'))).path, `${bucket}/copy.txt`),
  'storage remove': async () => {
    assert.deepEqual((await data(at.remove(['copy.txt', 'nothing']))).map((e) => e.name), ['copy.txt'])
  },
  'storage emptyBucket': async () => data(storage.emptyBucket(bucket)),
  'storage deleteBucket': async () => {
    await data(storage.deleteBucket(bucket))
    await error(storage.deleteBucket(bucket), '404')
  },
  'storage transform': async () => error(at.createSignedUrl('x', 60, { transform: { width: 100 } }), '501'),
  'storage purgeCache': async () => error(at.purgeCache('x'), '501'),
  'storage getBucketLifecycle': async () => error(storage.getBucketLifecycle(bucket), '501'),
  'auth signInWithPassword': async () => {
    assert.equal((await data(supabase.auth.signInWithPassword({ email, password }))).user.email, email)
    await error(supabase.auth.signInWithPassword({ email, password: 'wrong' }), 'invalid_credentials')
  },
  'auth getUser': async () => assert.equal((await data(supabase.auth.getUser())).user.email, email),
  'auth getSession': async () => assert.ok((await data(supabase.auth.getSession())).session.access_token),
  'auth refreshSession': async () => {
    const before = (await data(supabase.auth.getSession())).session.refresh_token
    assert.notEqual((await data(supabase.auth.refreshSession())).session.refresh_token, before)
  },
  'auth signUp': async () => error(supabase.auth.signUp({ email: 'a@example.com', password: 'secret' }), '501'),
  'auth signInWithOtp': async () => error(supabase.auth.signInWithOtp({ email }), '501'),
  'auth updateUser': async () => error(supabase.auth.updateUser({ data: {} }), '501'),
  'rest rpc': async () => {
    const saved = { project_uuid: project, p_file_path: 'a.ts', p_content: 'a' }
    assert.equal((await data(supabase.rpc('upsert_project_file', saved))).version, 1)
    await data(supabase.rpc('upsert_project_file', { ...saved, p_file_path: 'b.ts' }))
    const listed = await data(supabase.rpc('list_current_files', { project_uuid: project })
      .select('file_path').gte('file_path', 'a').order('file_path', { ascending: false }).limit(1))
    assert.deepEqual(listed, [{ file_path: 'b.ts' }])
    const { count } = await supabase.rpc('list_current_files', { project_uuid: project }, { count: 'exact', head: true, get: true })
    assert.equal(count, 2)
    await error(supabase.rpc('upsert_project_file', saved).limit(1), 'PGRST100')
    await error(supabase.rpc('nothing'), 'PGRST202')
  },
  'rest select': async () => {
    const table = () => supabase.from('project_files_current').select('file_path, version', { count: 'exact' })
    const { data: rows, count } = await table().eq('project_id', project).in('file_path', ['a.ts', 'c.ts'])
    assert.deepEqual([rows, count], [[{ file_path: 'a.ts', version: 1 }], 1])
    assert.equal(await data(table().eq('file_path', 'none').maybeSingle()), null)
    await error(table().or('version.eq.1,version.eq.2'), 'PGRST100')
  },
  'rest insert': async () => error(supabase.from('projects').insert({ name: 'x' }), 'PGRST000'),
  'rest update': async () => error(supabase.from('projects').update({ name: 'x' }).eq('id', project), 'PGRST000'),
  'rest delete': async () => error(supabase.from('projects').delete().eq('id', project), 'PGRST000'),
  'functions invoke': async () => assert.equal((await supabase.functions.invoke('x')).error.context.status, 501),
  'auth signOut': async () => {
    const { error: refused } = await supabase.auth.signOut()
    assert.equal(refused, null)
    assert.equal((await data(supabase.auth.getSession())).session, null)
  },
}

for (const [method, walk] of Object.entries(methods)) {
  let failure = null
  try {
    await walk()
  } catch (error) {
    failure = `${error.message ?? JSON.stringify(error)} ${error.stack ?? ''}`
  }
  process.stdout.write(JSON.stringify({ method, failure }) + '\n')
}
process.exit(0)
