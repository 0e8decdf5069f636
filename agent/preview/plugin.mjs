// The plugin that `hook.mjs` puts into Vite: hands it the files of one revision at once, tells each page which revision it
// has got, and tells the agent what is shown. The agent is reached by a socket on loopback that visitors of the preview
// cannot reach; without it, and for every failure here, Vite goes on as if there were no plugin.
import fs from "node:fs";
import net from "node:net";
import path from "node:path";
import { observe } from "./client.mjs";
import { locate, original } from "./position.mjs";
import { GONE, Screen } from "./screen.mjs";

/** @typedef {import("vite").ViteDevServer} Server */
/** @typedef {"add" | "change" | "unlink"} What */
/** @typedef {{ held: Map<string, What>, out: any[], before: Map<string, string>, timer: NodeJS.Timeout }} Gate */

const GATE_MOST = 3000; // ms: an agent that was killed between begin and commit must not leave Vite deaf
const HANDLED_MOST = 2000; // ms for Vite to handle the changes of one commit, after which it is announced anyway
const SWALLOW = 5000; // ms for which a watcher may be late; later, an update is sent twice
const CHECKED_MOST = 2000; // modules of one commit that are transformed to see whether they can be
const PAGE_A_SECOND = 20; // messages of each kind that are read of a page
const REPORT_EVERY = 50; // ms between two reports to the agent
const EVENTS = new Set(["add", "change", "unlink"]);
/** Vite reads them once, at its start. */
const CONFIG = /^((tailwind|postcss)\.config\.[cm]?[jt]s|\.postcssrc(\..+)?)$/;
const RELOAD = { type: "full-reload", path: "*" };
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
  /** Changes whose modules were not checked yet.  @type {{ file: string, what: What }[]} */
  let unchecked = [];
  let checks = 0;
  /** Grows with each message that changes a page, from start to start of Vite too: who has heard it all knows its value. */
  let sent = 0;
  /** Whose each socket is, and how much it said this second.  @type {WeakMap<object, { load: unknown, second: number, heard: Record<string, number> }>} */
  const sockets = new WeakMap();
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
    const state = screen.report();
    if (JSON.stringify(state) === reported) return;
    reported = JSON.stringify(state);
    tell({ state });
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
    socket.on("connect", () => tell({ hello: process.env.PREVIEW_SYNC_SECRET }));
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
    const gone = (/** @type {string} */ url) => {
      const file = path.join(server.config.root, url);
      return before.has(file) && !fs.existsSync(file);
    };
    for (const payload of merge(out, gone)) feed(payload);
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
    const before = sent;
    screen.applied = Math.max(screen.applied, revision);
    feed({ type: "custom", event: "preview:coming", data: { revision: screen.applied } });
    const files = Object.entries(changes).map(([each, what]) => ({ file: path.join(root, each), what }));
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
    if (mine === gate) release();
    // Vite has nothing to tell of what the server renders and no page has asked for yet: one that is loading stays torn.
    const { client, ssr } = server.environments ?? {};
    const has = (/** @type {any} */ each, /** @type {string} */ file) =>
      each?.moduleGraph?.getModulesByFile(file)?.size;
    if (sent === before && files.some(({ file }) => has(ssr, file) && !has(client, file))) feed(RELOAD);
    if (files.length) committedAt = performance.now();
    feed({ type: "custom", event: "preview:revision", data: { revision: screen.applied, sent } });
    tell({ gate: { seconds: (performance.now() - started) / 1000 } });
    unchecked.push(...files);
    check(++checks).catch(() => {});
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

  /**
   * Transforms anew what could not be, what imports a file that is gone, and with no page open all that changed and
   * whatever was never asked for: so what keeps it from being built is known.
   * @param {number} mine  A later one takes over what is left of it.
   */
  async function check(mine) {
    const revision = screen.applied;
    const changed = unchecked;
    const client = server.environments?.client ?? server;
    const graph = client.moduleGraph;
    const alone = !screen.visible.length;
    const broken = new Set(screen.builds.map((each) => path.resolve(root, each.file ?? "")));
    const named = new Set([...broken, ...(alone ? changed.map(({ file }) => file) : [])]);
    const orphaned = changed
      .filter(({ file, what }) => what === "unlink" && !fs.existsSync(file))
      .flatMap(({ file }) => [...(graph.getModulesByFile(file) ?? [])])
      .flatMap((each) => [.../** @type {Set<any>} */ (each.importers)]);
    for (const each of orphaned) {
      graph.invalidateModule(each); // else it is served as it was, since its own text is the same
      named.add(each.file);
    }
    const failed = new Set();
    let checked = 0;
    // The map grows with what they import.
    for (const each of graph.idToModuleMap.values()) {
      const unasked = alone && !each.transformResult && each.importers.size && each.file?.startsWith(`${root}/`);
      if (!(named.has(each.file ?? "") || unasked) || !isSource(each.file)) continue;
      if (++checked > CHECKED_MOST) break;
      try {
        await Promise.race([client.transformRequest(each.url), pause(HANDLED_MOST)]);
        if (checks !== mine) return;
      } catch (/** @type {any} */ error) {
        if (error.code === "ERR_CLOSED_SERVER") return; // Vite starts anew
        const found = failedToBuild(error, each.file ?? undefined);
        failed.add(each.file).add(path.resolve(root, found?.file ?? ""));
      }
    }
    for (const each of screen.builds) {
      const file = path.resolve(root, each.file ?? "");
      // What only the server builds is told again by the page that is loaded anew.
      const built = graph.getModulesByFile(file)?.size || !fs.existsSync(file);
      if (broken.has(file) && !failed.has(file) && (built || !alone || changed.some((other) => other.file === file)))
        screen.mended(each);
    }
    unchecked = [];
    screen.checked = revision;
    report();
  }

  /** @param {string | null} file */
  const isSource = (file) => file && !file.includes("/node_modules/") && fs.existsSync(file);

  /** @param {any} error @param {string} [file] */
  function failedToBuild(error, file) {
    const at = locate(error, file);
    return screen.failed({ ...at, kind: "build", file: relative(at.file), revision: screen.applied }, null, Date.now());
  }

  /** @param {string | undefined} file */
  const relative = (file) => (file && path.isAbsolute(file) && root ? path.relative(root, file) : file);

  // --- the pages

  /**
   * Whether a message is read: a socket speaks for one page, and a flood takes no room from what others say, nor its
   * errors from what it shows.
   * @param {string} event @param {any} said @param {object} client
   */
  function admitted(event, said, client) {
    const second = Math.floor(Date.now() / 1000);
    const { load, ...known } = sockets.get(client) ?? { load: said?.load, second: 0, heard: {} };
    const heard = known.second === second ? known.heard : {};
    heard[event] = (heard[event] ?? 0) + 1;
    sockets.set(client, { load, second, heard });
    return load === said?.load && heard[event] <= PAGE_A_SECOND;
  }

  /** @param {any} said */
  function rendered(said) {
    const page = screen.rendered(said, Date.now());
    if (!page) return;
    const revision = screen.applied;
    // What is blank or failed a second after the newest revision is loaded anew, once a revision. What cannot be built
    // cannot be loaded either.
    const wrong = () => page.failed || (page.blank && page.how === "update");
    const heal = () => {
      if (!wrong() || healed === revision || revision !== screen.applied || screen.builds.length) return;
      healed = revision;
      feed({ type: "custom", event: "preview:heal", data: {} });
    };
    if (wrong()) setTimeout(heal, 1000).unref();
  }

  /** @param {any} said @param {any} client */
  function hello(said, client) {
    const page = screen.hear(said, Date.now());
    if (!page) return;
    const again = said.sent !== undefined; // its socket was cut
    client.send("preview:revision", { revision: screen.applied, sent, load: !again });
    // Files that changed while the page was loading may be in it in two versions.
    const torn = Number(said.age) > performance.now() - committedAt && healed !== screen.applied;
    if (torn) healed = screen.applied;
    if (again ? said.sent !== sent : torn) client.send(RELOAD);
  }

  /** @param {Server} given */
  function configure(given) {
    release();
    pending.clear();
    for (const each of screen.builds) screen.mended(each); // all is built anew
    [server, closed, sent] = [given, false, Date.now()];
    const hot = /** @type {any} */ (given.environments?.client?.hot ?? given.hot);
    const send = hot.send.bind(hot);
    // A page needs to know what may stand in it as the server rendered it.
    const onServer = (/** @type {string} */ url) => {
      const { client, ...others } = given.environments ?? {};
      const file = client?.moduleGraph?.urlToModuleMap.get(url)?.file ?? "";
      return Object.values(others).some((each) => each.moduleGraph?.getModulesByFile(file)?.size);
    };
    feed = (payload) => {
      if (payload.type !== "custom") sent++;
      for (const each of payload.updates ?? []) each.rendered = onServer(each.acceptedPath);
      send(payload);
    };
    hot.send = (/** @type {any} */ first, /** @type {any} */ data) => {
      const payload = typeof first === "string" ? { type: "custom", event: first, data } : first;
      if (payload.type === "error") {
        failedToBuild(payload.err);
        report();
      }
      if (gate && payload.type !== "custom") gate.out.push(payload);
      else feed(payload);
    };
    // From Vite 6 on `given.hot` has a copy of the channel's send, which Astro uses.
    if (given.environments && given.hot) /** @type {any} */ (given.hot).send = hot.send;
    given.watcher.on("all", (_, file) => {
      const { publicDir } = given.config;
      if (publicDir && file.startsWith(`${publicDir}/`)) hot.send(RELOAD);
      if (!CONFIG.test(path.basename(file)) || file.includes("/node_modules/")) return;
      if (given.config.server.middlewareMode)
        hot.send(RELOAD); // whose restart is not Vite's alone
      else given.restart().catch(() => {});
    });
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
        if (!admitted(event, said, client)) return;
        await new Promise((heard) => heard(take(said, client))).catch(() => {}); // nonsense is not heard
        report();
      });
    on("hello", hello);
    on("rendered", rendered);
    on("bye", (said) => screen.bye(said, Date.now()));
    on("ping", (said, client) => {
      if (said?.how) rendered(said);
      else screen.hear(said, Date.now());
      client.send("preview:pong", { sent });
    });
    on("error", async (said) => {
      if (!screen.hear(said, Date.now())) return;
      const found = await original(server, said);
      screen.failed({ ...found, file: relative(found.file) }, said.load, Date.now());
    });
    connect();
  }

  setInterval(() => {
    screen.forget(Date.now(), GONE);
    report();
  }, 2000).unref();
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
      // Of Vite 5's client there is no way to connect again.
      const connect = /transport\.connect\(createHMRHandler\(handleMessage\)\)/.exec(code)?.[0];
      const again = connect && `{ reachable: waitForSuccessfulPing, connect: () => ${connect} }`;
      return { code: `${code}\n;(${observe})(createHotContext("/@preview-sync"), ${hmr}, ${again});\n`, map: null };
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
