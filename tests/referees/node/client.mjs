// An official JavaScript client on a string: commands come in as JSON lines, what happens goes out as JSON lines.
//
//   node client.mjs realtime-js|supabase-js URL ANON_KEY
//
// Both libraries give the same channel object; supabase-js makes it through its own front door.

import { createInterface } from 'node:readline'
import { RealtimeClient } from '@supabase/realtime-js'
import { createClient } from '@supabase/supabase-js'
import ws from 'ws'

const [library, url, key] = process.argv.slice(2)
const say = (message) => process.stdout.write(JSON.stringify(message) + '\n')
console.warn = console.error = (...words) => process.stderr.write(words.join(' ') + '\n')

const quick = { transport: ws, reconnectAfterMs: () => 50, timeout: 5000 }
// An application tells supabase-js its token by a callback; a token only set by hand is forgotten at a reconnect.
let token = null
let supabase
let realtime
if (library === 'supabase-js') {
  supabase = createClient(url, key, {
    realtime: quick,
    accessToken: async () => token ?? key,
  })
  realtime = supabase.realtime
} else {
  realtime = new RealtimeClient(url.replace(/^http/, 'ws') + '/realtime/v1', { ...quick, params: { apikey: key } })
}

const statuses = { SUBSCRIBED: 'joined', CHANNEL_ERROR: 'error', CLOSED: 'closed', TIMED_OUT: 'timeout' }
let channel

const commands = {
  async join({ topic, config }) {
    const presence = config.presence?.enabled
    channel = (supabase ?? realtime).channel(topic, { config })
    channel.on('broadcast', { event: '*' }, (message) => say({ broadcast: message }))
    channel.on('system', {}, (message) => say({ system: message }))
    if (presence) channel.on('presence', { event: 'sync' }, () => say({ presence: channel.presenceState() }))
    channel.subscribe((status, error) => say({ status: statuses[status] ?? status, error: error?.message ?? null }))
  },
  async send({ event, payload, timeout }) {
    return channel.send({ type: 'broadcast', event, payload }, { timeout })
  },
  async track({ payload }) {
    return channel.track(payload)
  },
  async auth(given) {
    token = given.token
    await (supabase ? realtime.setAuth() : realtime.setAuth(token))
  },
  async leave() {
    return (supabase ?? realtime).removeChannel(channel)
  },
  async rpc({ name, args }) {
    const { data, error, status } = await supabase.rpc(name, args)
    return { data, error, status }
  },
  async select({ from, columns, filter }) {
    const { data, error } = await supabase.from(from).select(columns).match(filter)
    return { data, error }
  },
  async upload({ bucket, path, text, upsert }) {
    const { data, error } = await supabase.storage.from(bucket).upload(path, Buffer.from(text), { upsert })
    return { data, error: error && { message: error.message, statusCode: error.statusCode } }
  },
  async sign({ bucket, path, seconds }) {
    const { data, error } = await supabase.storage.from(bucket).createSignedUrl(path, seconds)
    return { data, error: error && { message: error.message, statusCode: error.statusCode } }
  },
  async download({ bucket, path }) {
    const { data, error } = await supabase.storage.from(bucket).download(path)
    return { text: data && (await data.text()), error: error && { name: error.name } }
  },
  async list({ bucket, path }) {
    const { data, error } = await supabase.storage.from(bucket).list(path)
    return { data: data?.map((entry) => entry.name), error }
  },
  async remove({ bucket, paths }) {
    const { data, error } = await supabase.storage.from(bucket).remove(paths)
    return { data: data?.map((entry) => entry.name), error }
  },
}

say({ answer: 'ready' })
for await (const line of createInterface({ input: process.stdin })) {
  const { command, ...parameters } = JSON.parse(line)
  commands[command](parameters).then(
    (answer) => say({ answer: answer ?? null }),
    (error) => say({ answer: null, failure: String(error) })
  )
}
process.exit(0)
