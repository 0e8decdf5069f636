// The plugin that `hook.mjs` puts into Vite: hands it the files of one revision at once, tells each page which revision it
// has got, and tells the agent what is shown. The agent is reached by a socket on loopback that visitors of the preview
// cannot reach; without it, and for every failure here, Vite goes on as if there were no plugin.
import fs from "node:fs";
import net from "node:net";
import path from "node:path";
import { observe } from "./client.mjs";
import { locate, original } from "./position.mjs";
import { Screen } from "./screen.mjs";

/** @typedef {import("vite").ViteDevServer} Server */
/** @typedef {"add" | "change" | "unlink"} What */
/** @typedef {{ held: Map<string, What>, out: any[], before: Map<string, string>, timer: NodeJS.Timeout }} Gate */

const GATE_MOST = 3000; // ms: an agent that was killed between begin and commit must not leave Vite deaf
const HANDLED_MOST = 2000; // ms for Vite to handle the changes of one commit, after which it is announced anyway
const SWALLOW = 5000; // ms for which a watcher may be late; later, an update is sent twice
const PAGE_A_SECOND = 50; // messages of each kind that are read, of all pages together
const REPORT_EVERY = 50; // ms between two reports to the agent
const EVENTS = new Set(["add", "change", "unlink"]);
const NAME = "preview-sync";

/** @param {number} ms */
const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

/** What stands at a path, so that the same state is not told twice.  @param {string} file */
const state = (file) => {
  const stat = fs.statSync(file, { bigint: true, throwIfNoEntry: false });
  return stat ? `${stat.ino} ${stat.mtimeNs} ${stat.size}` : "gone";
};

/**
 * Wraps Vite's createServer.
 * @param {(config?: any) => Promise<any>} make
 */
export const observed =
  (make) =>
  (/** @type {any} */ config = {}) => {
    const plugins = [config.plugins ?? []].flat(9);
    return make(plugins.some((each) => each?.name === NAME) ? config : { ...config, plugins: [...plugins, preview()] });
  };

/** @returns {import("vite").Plugin} */
export function preview() {
  const screen = new Screen();
  /** @type {Server} */
  let server;
  /** @type {net.Socket | null} */
  let agent = null;
  let closed = false;
  let root = "";
  /** @type {Gate | null} */
  let gate = null;
  /** @type {(payload: any) => void} the channel's own send */
  let feed = () => {};
  /** Which state of a file Vite was told of last, and when.  @type {Map<string, { state: string, at: number }>} */
  const told = new Map();
  /** Files whose change Vite has not handled yet.  @type {Set<string>} */
  const pending = new Set();
  /** Commits are handled one after the other. */
  let commits = Promise.resolve();
  let committedAt = 0;
  let second = 0;
  /** @type {Map<string, number>} */
  const heardIn = new Map();
  let healed = -1;
  let reported = "";
  /** @type {NodeJS.Timeout | null} */
  let reporting = null;

  // --- the agent

  /** @param {object} message */
  const tell = (message) => agent?.writable && agent.write(`${JSON.stringify(message)}\n`);

  /** Tells what is shown: at once, then at most every REPORT_EVERY, the last state always. */
  function report() {
    if (reporting) return;
    const now = JSON.stringify(screen.report());
    if (now === reported) return;
    reported = now;
    tell({ state: screen.report() });
    reporting = setTimeout(() => {
      reporting = null;
      report();
    }, REPORT_EVERY).unref();
  }

  function connect() {
    const [host, port] = (process.env.PREVIEW_SYNC_AGENT ?? "").split(" ");
    if (closed || agent || !port) return;
    let rest = "";
    const socket = net.connect(Number(port), host);
    agent = socket;
    socket.unref();
    socket.setNoDelay(true);
    socket.setEncoding("utf8");
    socket.on("connect", () => tell({ hello: process.env.PREVIEW_SYNC_SECRET, server: "vite" }));
    socket.on("data", (data) => {
      const lines = (rest + data).split("\n");
      rest = lines.pop() ?? "";
      for (const line of lines) order(JSON.parse(line));
    });
    socket.on("error", () => {});
    socket.on("close", () => {
      if (agent === socket) agent = null;
      release();
      setTimeout(connect, 1000).unref();
    });
  }

  /** @param {any} said */
  function order(said) {
    if (said.root) root = fs.realpathSync(said.root);
    if (said.begin) begin(said.begin);
    if (said.undo) release(true);
    if (typeof said.commit === "number") {
      const { commit: revision, changes = {} } = said;
      commits = commits.then(() => commit(revision, changes)).catch(() => {});
      if (said.root) reported = "";
    }
  }

  // --- the gate

  /** @param {string[]} paths */
  function begin(paths) {
    release();
    const before = new Map(paths.map((each) => path.join(root, each)).map((file) => [file, state(file)]));
    gate = { held: new Map(), out: [], before, timer: setTimeout(() => release(), GATE_MOST).unref() };
  }

  /** Opens the gate: what was held is told now. After an undo, what stands as before is not told at all. */
  function release(undone = false) {
    if (!gate) return;
    const { held, out, before, timer } = gate;
    gate = null;
    clearTimeout(timer);
    if (undone) for (const [file, was] of before) told.set(file, { state: was, at: Date.now() });
    replay(held);
    for (const payload of out) feed(payload);
  }

  /** Lets the watcher say again what it was not heard with.  @param {Map<string, What>} held */
  function replay(held) {
    for (const [file, what] of held) {
      server.watcher.emit(what, file);
      server.watcher.emit("all", what, file);
    }
  }

  /** Whether Vite knows the state that the file is in.  @param {string} file */
  function known(file) {
    const last = told.get(file);
    return last !== undefined && Date.now() - last.at < SWALLOW && last.state === state(file);
  }

  /** @param {string} file */
  function note(file) {
    if (told.size > 20_000) for (const each of [told, pending]) each.clear();
    told.set(file, { state: state(file), at: Date.now() });
    pending.add(file);
  }

  /** All files of a revision are on the disk.  @param {number} revision @param {Record<string, What>} changes */
  async function commit(revision, changes) {
    const started = performance.now();
    const mine = gate;
    screen.applied = Math.max(screen.applied, revision);
    feed({ type: "custom", event: "preview:coming", data: { revision: screen.applied } });
    const files = Object.entries(changes).map(([each, what]) => ({
      file: path.join(root, each),
      what,
      url: `/${each}`,
    }));
    const done = [];
    for (const { file, what } of files) {
      if (known(file) || ignored(file)) continue; // the watcher was faster, or does not watch it
      note(file);
      for (const listener of server.watcher.listeners(what)) done.push(listener(file));
      for (const listener of server.watcher.listeners("all")) done.push(listener(what, file));
    }
    // Vite 5 to 7 give a promise for each; Vite 8 does not, and says by its hook that it has handled a file.
    await Promise.race([Promise.allSettled(done), pause(HANDLED_MOST)]);
    if (server.environments)
      while (files.some(({ file }) => pending.has(file)) && performance.now() - started < HANDLED_MOST) await pause(1);
    await new Promise(setImmediate);
    await new Promise(setImmediate);
    for (const { file } of files) pending.delete(file);
    let [merged, sent] = [0, 0];
    if (mine && mine === gate) {
      gate = null;
      clearTimeout(mine.timer);
      const gone = new Set(files.filter(({ what }) => what === "unlink").map(({ file }) => file));
      const payloads = merge(mine.out, (url) => gone.has(path.join(server.config.root, url)));
      [merged, sent] = [mine.out.length, payloads.length];
      for (const payload of payloads) feed(payload);
      replay(mine.held);
    }
    if (files.length) committedAt = performance.now();
    feed({ type: "custom", event: "preview:revision", data: { revision: screen.applied } });
    tell({ gate: { seconds: (performance.now() - started) / 1000, merged, sent } });
    await check(files.map(({ file }) => file));
    report();
  }

  /** Whether the project told Vite not to watch the file.  @param {string} file */
  const ignored = (file) => {
    const watcher = /** @type {any} */ (server.watcher);
    try {
      return server.config.server.watch === null || Boolean(watcher._isIgnored?.(file));
    } catch {
      return false;
    }
  };

  /** Transforms modules anew that could not be, and with no page open those that changed: so their errors are known.  @param {string[]} files */
  async function check(files) {
    const graph = server.environments?.client?.moduleGraph ?? server.moduleGraph;
    const watched = screen.visible.length > 0;
    const again = screen.builds.map((each) => ({ found: each, file: path.resolve(root, each.file ?? "") }));
    const named = new Set([...again.map(({ file }) => file), ...(watched ? [] : files)]);
    for (const file of [...named].slice(0, 200)) {
      const modules = [...(graph.getModulesByFile(file) ?? [])];
      const importers = watched ? [] : modules.flatMap((each) => [...each.importers]);
      let fine = modules.length > 0 || !fs.existsSync(file);
      for (const each of [...modules, ...importers].slice(0, 50)) {
        try {
          const transform = server.environments?.client ?? server;
          await Promise.race([transform.transformRequest(each.url), pause(HANDLED_MOST)]);
        } catch (error) {
          if (each.file === file) fine = false;
          failedToBuild(error, each.file ?? file);
        }
      }
      if (fine) for (const { found } of again.filter((each) => each.file === file)) screen.mended(found);
    }
    screen.checked = screen.applied;
  }

  /** @param {any} error @param {string} [file] */
  function failedToBuild(error, file) {
    const at = locate(error, file);
    screen.failed({ ...at, kind: "build", file: relative(at.file), revision: screen.applied }, null, Date.now());
  }

  /** @param {string | undefined} file */
  const relative = (file) => (file && path.isAbsolute(file) && root ? path.relative(root, file) : file);

  // --- the pages

  /** Whether there is room for one more message of a kind: a flood of errors takes no room from what is shown.  @param {string} event */
  function admitted(event) {
    const now = Math.floor(Date.now() / 1000);
    if (now !== second) {
      second = now;
      heardIn.clear();
    }
    heardIn.set(event, (heardIn.get(event) ?? 0) + 1);
    return Number(heardIn.get(event)) <= PAGE_A_SECOND;
  }

  /** @param {any} said  The position in the source of what a page says with one in what it was served. */
  async function sourced(said) {
    const found = await original(server, said);
    return { ...found, file: relative(found.file) };
  }

  /** @param {any} said */
  function rendered(said) {
    const page = screen.rendered(said, Date.now());
    if (!page) return;
    // What is blank or failed a second after the newest revision is loaded anew, once a revision.
    if ((page.blank || page.failed) && page.how === "update" && healed !== screen.applied) {
      const revision = screen.applied;
      setTimeout(() => {
        // What cannot be built cannot be loaded either.
        if (
          revision === screen.applied &&
          healed !== revision &&
          !screen.builds.length &&
          (page.blank || page.failed)
        ) {
          healed = revision;
          feed({ type: "full-reload", path: "*" });
        }
      }, 1000).unref();
    }
  }

  /** @param {any} said @param {any} client */
  function hello(said, client) {
    const page = screen.hear(said, Date.now());
    if (!page) return;
    client.send("preview:revision", { revision: screen.applied, load: true });
    // Files that changed while the page was loading may be in it in two versions.
    if (Number(said.age) > performance.now() - committedAt && healed !== screen.applied) {
      healed = screen.applied;
      client.send({ type: "full-reload", path: "*" });
    }
  }

  /** @param {Server} given */
  function configure(given) {
    release();
    pending.clear();
    [server, closed] = [given, false];
    const hot = /** @type {any} */ (given.environments?.client?.hot ?? given.hot);
    const send = hot.send.bind(hot);
    feed = (payload) => send(payload);
    hot.send = (/** @type {any} */ first, /** @type {any} */ data) => {
      const payload = typeof first === "string" ? { type: "custom", event: first, data } : first;
      if (payload.type === "error") {
        failedToBuild(payload.err);
        report();
      }
      if (gate && payload.type !== "custom") gate.out.push(payload);
      else send(payload);
    };
    const pass = given.watcher.emit;
    let passed = true; // "all" follows each event, and shares its fate
    given.watcher.emit = function (/** @type {any} */ event, /** @type {any[]} */ ...rest) {
      if (EVENTS.has(event) && typeof rest[0] === "string") {
        passed = !known(rest[0]) && !gate;
        if (passed) note(rest[0]);
        else if (gate) gate.held.set(rest[0], event);
      }
      if (!passed && (EVENTS.has(event) || event === "all")) return true;
      return pass.call(this, event, .../** @type {any} */ (rest));
    };
    const close = given.close;
    given.close = () => {
      if (server === given) closed = true;
      if (closed) agent?.destroy();
      return close.call(given);
    };
    /** @param {string} event @param {(said: any, client: any) => unknown} take */
    const on = (event, take) =>
      given.ws.on(`preview:${event}`, async (/** @type {any} */ said, /** @type {any} */ client) => {
        if (!admitted(event)) return;
        try {
          await take(said, client);
        } catch {
          // A page that says nonsense is not heard.
        }
        report();
      });
    on("hello", hello);
    on("rendered", rendered);
    on("bye", (said) => screen.bye(said, Date.now()));
    on("ping", (said, client) => {
      if (said?.how) rendered(said);
      else screen.hear(said, Date.now());
      client.send("preview:pong", {});
    });
    on("error", async (said) => {
      const page = screen.hear(said, Date.now());
      if (page) screen.failed(await sourced(said), said.load, Date.now());
    });
    connect();
  }

  setInterval(() => screen.tick(Date.now()) && report(), 2000).unref();
  return {
    name: NAME,
    apply: "serve",
    enforce: "post",
    config({ server }) {
      const hosts = (process.env.PREVIEW_SYNC_HOSTS ?? "").split(" ").filter(Boolean);
      return server?.allowedHosts === true || !hosts.length ? undefined : { server: { allowedHosts: hosts } };
    },
    configureServer(given) {
      if (given.config.server.hmr !== false && /** @type {any} */ (given.config.server).ws !== false) configure(given);
    },
    hotUpdate({ file }) {
      if (this.environment.name === "client") pending.delete(file);
    },
    transform(code, id) {
      if (!/\/vite\/dist\/client\/client\.mjs/.test(id)) return undefined;
      const hmr = "typeof hmrClient === 'undefined' ? undefined : hmrClient";
      return { code: `${code}\n;(${observe})(createHotContext("/@preview-sync"), ${hmr});\n`, map: null };
    },
  };
}

/**
 * Makes of everything that Vite would have sent for one revision what a page needs: one reload, or the last update of each
 * path, none of a file that is gone.
 * @param {any[]} payloads @param {(url: string) => boolean} gone @returns {any[]}
 */
export function merge(payloads, gone) {
  const reload = payloads.find((each) => each.type === "full-reload");
  const rest = payloads.filter((each) => each.type !== "update" && each.type !== "full-reload");
  if (reload) return [reload, ...rest];
  const updates = new Map();
  for (const update of payloads.flatMap((each) => each.updates ?? [])) {
    const key = `${update.path}\0${update.acceptedPath}`;
    updates.delete(key);
    if (!gone(update.acceptedPath.split("?")[0])) updates.set(key, update);
  }
  return updates.size ? [{ type: "update", updates: [...updates.values()] }, ...rest] : rest;
}
