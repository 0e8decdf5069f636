// Runs in every page that Vite serves: the plugin appends the text of `observe` to Vite's own client, so no project file,
// no tag and no inline script is needed, and a strict CSP has nothing to refuse. It reports what is painted, and what fails.

/**
 * @param {any} hot  Vite's hot context of this client.
 * @param {any} hmr  Vite's HMR client.
 * @param {{ reachable: (url: string) => Promise<void>, connect: () => Promise<void> }} [again]  waits for a server, and
 *   connects to it, as Vite does.
 */
export function observe(hot, hmr, again) {
  const MOST = 50; // errors reported between two revisions
  const SETTLED = 10_000; // ms after a page was loaded within which what the server rendered is hydrated
  const load = Math.random().toString(36).slice(2);
  let revision = 0;
  let sent = 0; // how much of what changes a page was heard
  let coming = 0; // whose updates are being applied
  let left = false; // the page is being left
  let busy = 0; // updates that are being applied
  let leaving = false; // a reload is on its way
  let last = {}; // what was painted last, told again with each ping: a message may be lost in a flood
  let heard = performance.now();
  /** @type {Set<string>} modules whose update failed */
  const failed = new Set();
  /** @type {Set<string>} those that threw: they have left Vite's callbacks, and their next update would change nothing */
  const thrown = new Set();
  let stale = false; // an update came that changed nothing
  /** @type {Map<string, number>} what was reported since the last revision */
  const reported = new Map();

  /** @param {string} event @param {object} data */
  const say = (event, data = {}) =>
    left || hot.send(`preview:${event}`, { load, revision, hidden: document.hidden, ...data });
  /** How the page was loaded.  @returns {Partial<PerformanceNavigationTiming>} */
  const navigation = () => performance.getEntriesByType("navigation")[0] ?? {};
  /** @param {number} ms */
  const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
  /** Resolves when the next frame is painted; at once where none is.  @returns {Promise<unknown>} */
  const frame = () =>
    document.hidden
      ? Promise.resolve()
      : Promise.race([
          pause(500), // a page in an iframe that is not in view gets no frames
          new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve))),
        ]);

  /** The position of an error: its first frame in the project's own code.  @param {any} error */
  const position = (error) => {
    const frames = [...String(error?.stack ?? "").matchAll(/(https?:\/\/(?![^\s()]*\/@vite\/)[^\s()]+?):(\d+):(\d+)/g)];
    const own = frames.find(([, url]) => !url.includes("/node_modules/")) ?? frames[0];
    return own ? { file: own[1], line: +own[2], column: +own[3] } : {};
  };
  /** @param {string} kind @param {any} error @param {object} more */
  const fail = (kind, error, more = {}) => {
    const said = String(error?.message ?? error).replace(/\?t=\d+/g, "");
    const [message, stack] = [said.slice(0, 2000), String(error?.stack ?? "").slice(0, 4000)];
    const found = { ...more, ...position(error) };
    const key = JSON.stringify([kind, message, found]);
    const times = (reported.get(key) ?? 0) + 1;
    if (times === 1 && reported.size >= MOST) return;
    reported.set(key, times);
    if (times > 1 && times % 100) return; // a loop that fails is counted in hundreds
    say("error", { kind, message, revision: coming, stack, count: times, ...found });
  };

  /** @param {ErrorEvent} event  Of a script, or of what could not be loaded. */
  const onError = ({ message, error, filename: file, lineno: line, colno: column, target: of }) => {
    const target = /** @type {any} */ (of);
    if (message) fail("runtime", error ?? message, { file, line, column });
    else if (target?.localName) {
      fail("resource", `cannot load ${target.src || target.href || target.localName}`);
      if (target.localName === "script") failed.add(target.src); // or something that it imports
      say("ping", looks());
    }
  };
  addEventListener("error", onError, true);
  addEventListener("unhandledrejection", (event) => fail("rejection", event.reason));
  for (const level of /** @type {const} */ (["error", "warn"])) {
    const write = console[level];
    console[level] = (...given) => {
      write.apply(console, given);
      const texts = given.map((each) => each?.message ?? (typeof each === "object" ? "…" : String(each)));
      const text = [texts.shift()?.replace(/%[sdifoOc]/g, () => texts.shift() ?? ""), ...texts].join(" ");
      if (!/^\[(vite|hmr)\]/.test(text)) fail("console", { message: text, stack: new Error().stack }, { level });
    };
  }
  const warn = hmr?.warnFailedUpdate?.bind(hmr);
  if (warn)
    hmr.warnFailedUpdate = (/** @type {any} */ error, /** @type {string | string[]} */ path) => {
      const module = [path].flat().join();
      failed.add(module);
      if (!(error instanceof SyntaxError) && !/^(failed to fetch|error loading|importing a) /i.test(error?.message))
        thrown.add(module);
      fail("module", error, { module });
      warn(error, path);
    };

  hot.on("vite:beforeUpdate", (/** @type {any} */ payload) => {
    busy++;
    const { loadEventEnd } = navigation();
    const young = !loadEventEnd || performance.now() - loadEventEnd < SETTLED;
    for (const { type, path, acceptedPath, rendered } of payload.updates) {
      for (const each of [path, acceptedPath]) {
        failed.delete(each);
        stale ||= thrown.has(each);
      }
      // What was rendered on the server, or is on its way, is older than the update, and what should take it is not there.
      const absent = type === "js-update" && hmr?.hotModulesMap?.has(path) === false;
      stale ||= absent && (rendered ? young : !loadEventEnd);
    }
  });
  hot.on("vite:afterUpdate", () => busy--);
  hot.on("vite:beforeFullReload", () => {
    leaving = true;
    setTimeout(() => (leaving = false), 2000); // it may have been for another page
  });

  /** How the page looks now. */
  const looks = () => {
    const root = document.querySelector("#root,#app,#__nuxt,[data-reactroot]") ?? document.body;
    const content = [...(root?.children ?? [])].some((each) => !/^(script|style|link|template)$/i.test(each.localName));
    const overlay = !!document.querySelector("vite-error-overlay");
    return { ...last, blank: !content && !root?.textContent?.trim(), overlay, failed: failed.size };
  };
  /** @param {string} how */
  const shown = async (how) => {
    const current = revision;
    // An update whose callback throws is never told to be over.
    for (const end = performance.now() + 5000; (busy > 0 || leaving) && performance.now() < end; ) await pause(2);
    if (current === revision) busy = 0;
    if (stale) return document.readyState === "complete" && location.reload();
    if (how === "update") await pause(17); // React's own wait before it renders an update
    await frame();
    await frame();
    if (leaving || current !== revision) return;
    last = { revision: current, how };
    say("rendered", looks());
    reported.clear();
  };
  hot.on("preview:coming", (/** @type {{ revision: number }} */ next) => (coming = next.revision));
  hot.on("preview:revision", (/** @type {{ revision: number, sent: number, load?: boolean }} */ now) => {
    coming = revision = now.revision;
    sent = now.sent;
    if (!now.load) void shown("update");
    else {
      const how = navigation().type === "reload" ? "reload" : "load";
      if (document.readyState === "complete") void shown(how);
      else addEventListener("load", () => void shown(how));
    }
  });
  hot.on("preview:heal", () => {
    const { blank, failed } = looks();
    if (blank || failed) location.reload();
  });
  hot.on("preview:pong", (/** @type {{ sent: number }} */ pong) => {
    heard = performance.now();
    sent = pong.sent;
  });
  // Vite loads a page anew whose socket was cut, once we return: not when it has missed nothing.
  hot.on("vite:ws:disconnect", async (/** @type {{ webSocket: WebSocket }} */ { webSocket }) => {
    const had = sent;
    if (!again) return;
    await again.reachable(webSocket.url.split("?")[0]);
    const probe = new WebSocket(webSocket.url, "vite-hmr");
    const same = await new Promise((resolve) => {
      probe.onopen = () => resolve(true);
      probe.onerror = () => resolve(false); // a server that was started since, which knows another token
    });
    probe.close();
    if (!same) return;
    await again.connect();
    say("hello", { age: 0, sent: had });
    await new Promise(() => {});
  });
  document.addEventListener("visibilitychange", () => say("ping", looks()));
  addEventListener("pagehide", () => {
    say("bye");
    left = true;
  });
  addEventListener("pageshow", () => (left = false));
  // A socket that went mute (a proxy forgot it) is noticed by two pings without an answer; one that was
  // closed Vite's own client notices.
  setInterval(() => {
    if (document.hidden) heard = performance.now();
    else if (performance.now() - heard > 12500) {
      // Not into a server that is gone. The proxy may have forgotten the browser's other connections too: all six are tried.
      const asked = Array(6).fill({ method: "HEAD", signal: AbortSignal.timeout(4000) });
      Promise.any(asked.map((each) => fetch(location.href, each)))
        .then(() => location.reload())
        .catch(() => {});
    }
    say("ping", looks());
  }, 5000);
  say("hello", { age: performance.now() });
}
