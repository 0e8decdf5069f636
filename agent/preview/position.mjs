// Where an error is: a file, a line (from 1) and a column (from 1) of the project's own source.
import fs from "node:fs";
import { SourceMap } from "node:module";
import path from "node:path";

/**
 * The lines around a position.
 * @param {string} source @param {number} line
 */
const around = (source, line) =>
  source
    .split("\n")
    .slice(Math.max(0, line - 3), line + 2)
    .map((each) => each.slice(0, 160))
    .join("\n"); // prettier-ignore

/** @param {string | undefined} file */
const read = (file) => {
  try {
    return file ? fs.readFileSync(file, "utf8").slice(0, 1_000_000) : "";
  } catch {
    return "";
  }
};

/**
 * The position of an error of Vite's: its own, or parsed out of what oxc and PostCSS print.
 * @param {any} error @param {string} [module] the file that was being transformed
 */
export function locate(error, module) {
  const message = String(error?.message ?? error).replace(/\x1b\[[\d;]*m/g, "");
  const frame = String(error?.frame ?? "").replace(/\x1b\[[\d;]*m/g, "");
  // oxc: ╭─[ src/Leaf.tsx:2:30 ]   PostCSS: /app/src/index.css:2:4: Unclosed block   esbuild, babel: file: … (2:30)
  const printed =
    /[╭┌]─+\[\s*([^\]]+?):(\d+):(\d+)\s*\]/.exec(`${message}\n${frame}`) ??
    /(?:^|\s)(\/[^\s:]+):(\d+):(\d+)/.exec(message) ??
    /()\((\d+):(\d+)\)/.exec(message);
  const files = [error?.loc?.file, error?.id, module, printed?.[1]].filter((each) => typeof each === "string" && each);
  const file = (files.find((each) => path.isAbsolute(each)) ?? files[0])?.split("?")[0];
  const line = error?.loc?.line ?? (printed ? Number(printed[2]) : undefined);
  const column = error?.loc?.column ?? (printed ? Number(printed[3]) : undefined);
  return {
    message: message.split("\n").slice(0, 12).join("\n"),
    file,
    line,
    column: typeof column === "number" ? Math.max(1, column) : undefined,
    frame: frame || (line ? around(read(file), line) : undefined),
    stack: String(error?.stack ?? "").slice(0, 4000),
  };
}

/**
 * What a page says, with the position in the source in place of that in what it was served.
 * @param {any} server Vite's @param {any} said
 */
export async function original(server, said) {
  const graph = server.environments?.client?.moduleGraph ?? server.moduleGraph;
  /** @param {unknown} url */
  const moduleAt = async (url) => (typeof url === "string" ? graph.getModuleByUrl(served(server, url)) : undefined);
  const missing = /module '([^']+)' does not provide an export named '([^']+)'/.exec(String(said.message));
  if (missing) {
    // The engine gives no position, or that of the import in what was served: it stands where the name is imported.
    const name = new RegExp(`\\b${missing[2].replace(/\W/g, "\\$&")}\\b[^;]*?\\bfrom\\b`);
    for (const importer of (await moduleAt(missing[1]))?.importers ?? []) {
      const source = read(importer.file);
      const at = name.exec(source);
      if (at) return { ...said, ...point(source, at.index), file: importer.file };
    }
  }
  const module = await moduleAt(said.file);
  if (!module) return { ...said, file: (await moduleAt(said.module))?.file ?? said.file };
  const map = module.transformResult?.map;
  const source = read(module.file);
  let { line, column } = said;
  if (map?.mappings && Number.isInteger(line)) {
    const found = /** @type {any} */ (new SourceMap(map).findEntry(line - 1, (column || 1) - 1));
    if (found.originalLine !== undefined) [line, column] = [found.originalLine + 1, found.originalColumn + 1];
  }
  return { ...said, file: module.file, line, column, frame: around(source, line) };
}

/** @param {string} source @param {number} index */
function point(source, index) {
  const before = source.slice(0, index).split("\n");
  return { line: before.length, column: (before.at(-1)?.length ?? 0) + 1, frame: around(source, before.length) };
}

/** The URL by which Vite knows a module: a path below its base, without the time of an update.  @param {any} server @param {string} url */
function served(server, url) {
  const at = new URL(url, "http://localhost");
  const base = server.config.base ?? "/";
  const below = at.pathname.startsWith(base) ? `/${at.pathname.slice(base.length)}` : at.pathname;
  return below + at.search.replace(/([?&])t=\d+&?/, "$1").replace(/[?&]$/, "");
}
