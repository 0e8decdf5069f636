/** Keeps text that is not saved yet over a crash of the tab, in localStorage. */
export type Draft = { text: string; base: string; version: number }

export class Drafts {
  private readonly prefix: string

  constructor(project: string) {
    this.prefix = `draft:${project}:`
  }

  /** Returns whether it could be kept: a browser's storage has an end. */
  keep(path: string, draft: Draft): boolean {
    try {
      localStorage.setItem(this.prefix + path, JSON.stringify(draft))
      return true
    } catch {
      return false
    }
  }

  drop(path: string): void {
    localStorage.removeItem(this.prefix + path)
  }

  read(path: string): Draft | null {
    try {
      return JSON.parse(localStorage.getItem(this.prefix + path) ?? 'null')
    } catch {
      return null
    }
  }

  paths(): string[] {
    return Object.keys(localStorage)
      .filter((key) => key.startsWith(this.prefix))
      .map((key) => key.slice(this.prefix.length))
  }
}
