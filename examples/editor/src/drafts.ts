/** Keeps text that is not saved yet over a crash of the tab: in localStorage, at each key, and what that has no room for in the browser's cache. */
export type Draft = { text: string; base: string; version: number }

const CACHE = 'drafts'

export class Drafts {
  private readonly prefix: string
  private large: Promise<Set<string>> // paths of what is in the cache; each step of the cache waits for the one before

  constructor(project: string) {
    this.prefix = `draft:${project}:`
    this.large = this.listLarge().catch(() => new Set())
  }

  /** Ends once it is kept. Throws where the browser has no room for it. */
  async keep(path: string, draft: Draft): Promise<void> {
    const text = JSON.stringify(draft)
    try {
      localStorage.setItem(this.prefix + path, text)
    } catch {
      localStorage.removeItem(this.prefix + path)
      await this.step(async (known) => {
        await (await caches.open(CACHE)).put(this.place(path), new Response(text))
        known.add(path)
      })
      return
    }
    await this.dropLarge(path)
  }

  async drop(path: string): Promise<void> {
    localStorage.removeItem(this.prefix + path)
    await this.dropLarge(path)
  }

  async read(path: string): Promise<Draft | null> {
    try {
      const text = localStorage.getItem(this.prefix + path)
      if (text !== null) return JSON.parse(text)
      if (!(await this.large).has(path)) return null
      return (await (await (await caches.open(CACHE)).match(this.place(path)))?.json()) ?? null
    } catch {
      return null
    }
  }

  async paths(): Promise<string[]> {
    const kept = Object.keys(localStorage)
      .filter((key) => key.startsWith(this.prefix))
      .map((key) => key.slice(this.prefix.length))
    return [...new Set([...kept, ...(await this.large)])]
  }

  private place(path: string): string {
    return `/${this.prefix}${encodeURIComponent(path)}` // a key of the cache; no server is asked for it
  }

  private async listLarge(): Promise<Set<string>> {
    const keys = await (await caches.open(CACHE)).keys()
    const names = keys.map((key) => new URL(key.url).pathname.slice(1)).filter((name) => name.startsWith(this.prefix))
    return new Set(names.map((name) => decodeURIComponent(name.slice(this.prefix.length))))
  }

  private async dropLarge(path: string): Promise<void> {
    await this.step(async (known) => {
      if (known.delete(path)) await (await caches.open(CACHE)).delete(this.place(path))
    }).catch(() => undefined)
  }

  private step(work: (known: Set<string>) => Promise<void>): Promise<void> {
    const before = this.large
    const done = before.then(work)
    this.large = done.then(
      () => before,
      () => before,
    )
    return done
  }
}
