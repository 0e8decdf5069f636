// Puts one plugin into Vite, whoever starts it: `node --import=…/hook.mjs`. Everything here fails open: a Vite that is
// not recognized, or a plugin that cannot be loaded, is a dev server as it was without us.
import module from "node:module";
import { isMainThread } from "node:worker_threads";

const PLUGIN = JSON.stringify(new URL("./plugin.mjs", import.meta.url).href);
const OURS = `(await import(${PLUGIN}).catch(() => ({ observed: (make) => make })))`;
const CALL = "await createServer({";
const VITE = /\/vite\/dist\/node\/(cli|index)\.js$/;
/** Loaders of Node 20 run in a thread of their own, which takes 10 ms: only for programs that may start a Vite. */
const PROGRAMS =
  /[\\/](vite|astro|svelte-kit|react-router|remix|nuxi?|vinxi|qwik|solid|server|dev)[^\\/]*$|[\\/](vite|astro|nuxi?|nuxt)[\\/]/;

/**
 * Returns the source that stands in for a module of Vite; undefined: it stays as it is.
 * @param {string} url
 * @param {string} source
 */
export function patched(url, source) {
  const which = VITE.exec(url)?.[1];
  if (which === "cli") return source.replace(CALL, `await ${OURS}.observed(createServer)({`);
  if (which !== "index") return undefined;
  const real = JSON.stringify(`${url}?real`);
  return `export * from ${real};\nimport { createServer as make } from ${real};\nexport const createServer = ${OURS}.observed(make);\n`;
}

/** @param {string} url @param {any} loaded  What Node would run. */
const standIn = (url, loaded) => {
  const source = loaded.source && patched(url, String(loaded.source));
  return source ? { ...loaded, source } : loaded;
};
/** @type {import("node:module").LoadHook} */
export const load = async (url, context, next) => standIn(url, await next(url, context));
/** @type {import("node:module").LoadHookSync} */
const loadSync = (url, context, next) => standIn(url, next(url, context));

if (isMainThread && process.env.PREVIEW_SYNC_AGENT) {
  try {
    const hooks = /** @type {Partial<typeof module>} */ (module).registerHooks;
    if (hooks) hooks({ load: loadSync });
    else if (PROGRAMS.test(process.argv[1] ?? "")) module.register(import.meta.url);
  } catch {
    // An old Node: nothing is observed, and the agent says so.
  }
}
