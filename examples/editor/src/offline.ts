/** Keeps what the page shows in the browser, so that it can be read when nobody answers. `public/worker.js` keeps the page itself. */
import type { Config } from './config.ts'
import type { FileEntry } from './project.ts'

/** What was shown last, as of `since`. Of the configuration all but the password. */
export type Kept = {
  config: Omit<Config, 'password'>
  files: FileEntry[]
  docs: { path: string; base: string; version: number }[]
  active: string | null
  since: string
}

const PLACE = '/kept.json' // a key of the cache; no server is asked for it
const ASKED_EVERY = 3000 // milliseconds, whether the stack is there again

export async function keep({ config: { ...config }, ...rest }: Kept): Promise<void> {
  delete (config as Partial<Config>).password
  try {
    const cache = await caches.open('editor')
    await cache.put(PLACE, new Response(JSON.stringify({ config, ...rest })))
  } catch (error) {
    console.warn('the page is not kept for a start without the stack:', error)
  }
}

export async function kept(): Promise<Kept | null> {
  try {
    return (await (await caches.match(PLACE))?.json()) ?? null
  } catch {
    return null
  }
}

/** Returns once the stack answers again. */
export async function again(): Promise<void> {
  for (;;) {
    await new Promise((done) => setTimeout(done, ASKED_EVERY))
    const answer = await fetch('editor.json', { cache: 'no-store' }).catch(() => null)
    if (answer?.ok) return
  }
}
