// What is shown, from what the pages report. Pure: time is passed in, in milliseconds. What pages say are claims: every
// field is checked, cut and counted here, and a page can make nobody believe in a revision that was not committed.

const MOST_PAGES = 50;
const MOST_ERRORS = 500;
/** Of one page, the newest, and of its console: one that floods leaves room for what others have. */
const MOST_OF_A_PAGE = 10;
const MOST_LINES = 50;
/** A page that said goodbye, or nothing for so long, is gone; timers of hidden pages run once a minute. */
export const GONE = 10_000;
const SILENT = { visible: 15_000, hidden: 150_000 };
const KINDS = new Set(["build", "runtime", "rejection", "module", "resource", "console"]);
const HOW = new Set(["update", "reload", "load"]);

/**
 * @typedef {{ hidden: boolean, heard: number, gone: number | null, revision: number, at: number, how: string,
 *             blank: boolean, failed: number }} Page
 * @typedef {{ kind: string, message: string, file: string | null, line: number | null, column: number | null,
 *             frame: string | null, stack: string | null, level?: string, revision: number, first_at: number,
 *             count: number, pages: Set<string>, last: number, key: string }} Found
 */

/** @param {unknown} value @param {number} most */
const text = (value, most) => (typeof value === "string" && value ? value.slice(0, most) : null);
/** @param {unknown} value @param {number} most */
const whole = (value, most = 1e9) =>
  Number.isInteger(value) && Number(value) >= 0 ? Math.min(Number(value), most) : null;

export class Screen {
  applied = 0;
  /** The revision whose modules were checked without a page. */
  checked = 0;
  /** @type {Map<string, Page>} */
  pages = new Map();
  /** @type {Map<string, Found>} by fingerprint */
  errors = new Map();

  /**
   * Takes what a page says of itself; returns it, or undefined for one too many.
   * @param {any} said @param {number} now @returns {Page | undefined}
   */
  hear(said, now) {
    const load = text(said?.load, 32);
    if (!load) return undefined;
    let page = this.pages.get(load);
    if (!page) {
      if (this.pages.size >= MOST_PAGES) this.forget(now);
      if (this.pages.size >= MOST_PAGES) return undefined;
      page = { hidden: true, heard: now, gone: null, revision: -1, at: 0, how: "load", blank: false, failed: 0 };
      this.pages.set(load, page);
    }
    return Object.assign(page, { heard: now, gone: null, hidden: said.hidden === true });
  }

  /** @param {any} said @param {number} now */
  bye(said, now) {
    const page = this.pages.get(text(said?.load, 32) ?? "");
    if (page) page.gone = now;
  }

  /** A page has painted a revision.  @param {any} said @param {number} now @returns {Page | undefined} */
  rendered(said, now) {
    const page = this.hear(said, now);
    const revision = whole(said?.revision);
    if (!page || revision === null || revision > this.applied || revision < page.revision) return undefined;
    if (page.revision < 0) this.forget(now); // one of them was loaded anew
    const later = revision > page.revision || said.how !== page.how;
    if (later) page.at = now;
    const how = HOW.has(said.how) ? said.how : "load";
    Object.assign(page, { revision, how, blank: said.blank === true, failed: whole(said.failed, 1000) ?? 0 });
    // An error is open until a later revision is shown without it; a page that shows nothing has mended nothing.
    if (later && !page.blank && !page.failed && !said.overlay)
      for (const each of this.errors.values())
        if (each.pages.has(said.load) && each.last < revision) this.leave(each, said.load);
    return page;
  }

  /**
   * Notes an error; `said` is a page's claim, or Vite's own word when `page` is null.
   * @param {any} said @param {string | null} page @param {number} now @returns {Found | undefined}
   */
  failed(said, page, now) {
    const kind = said?.kind;
    const message = text(said?.message, 2000);
    if (!KINDS.has(kind) || !message || (page !== null && kind === "build")) return undefined;
    const revision = Math.min(whole(said.revision) || this.applied, this.applied);
    const at = { kind, message, file: text(said.file, 1024), line: whole(said.line), column: whole(said.column) };
    const key = JSON.stringify([kind, message, at.file, at.line]);
    let found = this.errors.get(key);
    if (!found) {
      const [sort, most] = kind === "console" ? [true, MOST_LINES] : [false, MOST_OF_A_PAGE];
      const its = [...this.errors.values()].filter(
        (each) => page !== null && each.pages.has(page) && (each.kind === "console") === sort,
      );
      if (page !== null && its.length >= most) this.leave(its[0], page);
      if (this.errors.size >= MOST_ERRORS) return undefined;
      const more = { frame: text(said.frame, 1000), stack: text(said.stack, 4000) };
      found = { ...at, ...more, revision, first_at: now, count: 0, pages: new Set(), last: revision, key };
      if (sort) found.level = said.level === "warn" ? "warn" : "error";
      this.errors.set(key, found);
    }
    found.count = Math.max(found.count + 1, whole(said.count) ?? 0);
    found.last = Math.max(found.last, revision);
    if (page !== null && found.pages.size < MOST_PAGES) found.pages.add(page);
    return found;
  }

  /** The build errors that are open.  @returns {Found[]} */
  get builds() {
    return [...this.errors.values()].filter((each) => each.kind === "build");
  }

  /** @param {Found} found */
  mended(found) {
    this.errors.delete(found.key);
  }

  /**
   * Forgets pages that were left or are silent, with the errors that only they had.
   * @param {number} now @param {number} [left]  For how long a page that was left is kept, ms.
   */
  forget(now, left = -1) {
    for (const [key, page] of this.pages) {
      const silent = now - page.heard > (page.hidden ? SILENT.hidden : SILENT.visible);
      if (silent || (page.gone !== null && now - page.gone > left)) this.drop(key);
    }
  }

  /** @param {string} load */
  drop(load) {
    this.pages.delete(load);
    for (const each of this.errors.values()) if (each.pages.has(load)) this.leave(each, load);
  }

  /** One page less has the error.  @param {Found} found @param {string} load */
  leave(found, load) {
    found.pages.delete(load);
    if (!found.pages.size) this.mended(found);
  }

  get visible() {
    return [...this.pages.values()].filter((page) => !page.hidden && page.revision >= 0);
  }

  /** What goes to the agent. Times are Unix seconds. */
  report() {
    const visible = this.visible.sort((a, b) => b.revision - a.revision || b.at - a.at);
    const [newest] = visible;
    const hidden = [...this.pages.values()].filter((page) => page.hidden).length;
    const behind = visible.filter((page) => page.revision < this.applied).length;
    const pages = { visible: visible.length, hidden, behind };
    const errors = [...this.errors.values()].sort(
      (a, b) => Number(a.kind === "console") - Number(b.kind === "console") || b.first_at - a.first_at,
    );
    return {
      checked: this.checked,
      shown: newest
        ? { revision: newest.revision, at: newest.at / 1000, how: newest.how, pages, blank: newest.blank }
        : null,
      errors: errors.slice(0, 50).map(({ pages: its, last, key, ...each }) => {
        return { ...each, first_at: each.first_at / 1000, pages: its.size };
      }),
    };
  }
}
