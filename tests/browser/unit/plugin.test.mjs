import assert from "node:assert/strict";
import fs from "node:fs";
import os from "node:os";
import path from "node:path";
import { test } from "node:test";
import { patched } from "../../../agent/preview/hook.mjs";
import { merge, observed } from "../../../agent/preview/plugin.mjs";
import { locate } from "../../../agent/preview/position.mjs";

test("Vite's command line and its createServer are wrapped, and nothing else", () => {
  const cli = "file:///app/node_modules/vite/dist/node/cli.js";
  const wrapped = patched(cli, "const server = await createServer({ root });");
  assert.match(wrapped, /\.observed\(createServer\)\(\{ root \}\)/);
  assert.equal(patched(cli, "something else"), "something else", "an unknown Vite stays as it is");
  assert.match(patched("file:///app/node_modules/vite/dist/node/index.js", ""), /export const createServer/);
  for (const url of ["file:///app/vite.config.ts", "file:///app/node_modules/vite/dist/node/index.js?real"]) {
    assert.equal(patched(url, "x"), undefined);
  }
});

test("the plugin comes after the project's own, once", () => {
  const make = observed((config) => config);
  const own = { name: "own" };
  assert.deepEqual(
    make({ plugins: [[own]] }).plugins.map((each) => each.name),
    ["own", "preview-sync"],
  );
  const first = make({});
  assert.equal(make(first), first);
});

test("everything that one revision would have sent is one message", () => {
  const update = (acceptedPath, timestamp) => ({ path: acceptedPath, acceptedPath, timestamp });
  const sent = [
    { type: "update", updates: [update("/a.tsx", 1), update("/b.tsx", 1)] },
    { type: "update", updates: [update("/a.tsx", 2), update("/gone.tsx", 2)] },
  ];
  assert.deepEqual(
    merge(sent, (url) => url === "/gone.tsx"),
    [{ type: "update", updates: [update("/b.tsx", 1), update("/a.tsx", 2)] }],
  );
  const reload = { type: "full-reload", path: "*" };
  assert.deepEqual(
    merge([...sent, reload, reload], () => false),
    [reload],
  );
  assert.deepEqual(
    merge([], () => false),
    [],
  );
});

test("positions are read out of what compilers print", () => {
  const directory = fs.mkdtempSync(path.join(os.tmpdir(), "position-"));
  const css = path.join(directory, "index.css");
  fs.writeFileSync(css, "a {}\nb {\n");
  const found = locate({ message: `[postcss] ${css}:2:1: Unclosed block` }, css);
  assert.deepEqual([found.file, found.line, found.column, found.frame], [css, 2, 1, "a {}\nb {\n"]);
  const oxc = locate({ message: "Transform failed\n ╭─[ src/Leaf.tsx:2:30 ]\n │", id: "/app/src/Leaf.tsx?t=1" });
  assert.deepEqual([oxc.file, oxc.line, oxc.column], ["/app/src/Leaf.tsx", 2, 30]);
  const svelte = locate({ message: "Expected }", id: "/app/src/+page.svelte", loc: { file: "+page.svelte", line: 1 } });
  assert.deepEqual([svelte.file, svelte.line], ["/app/src/+page.svelte", 1]);
  for (const nonsense of [null, undefined, 7, {}, { loc: {} }, { message: 7, id: {} }])
    assert.ok(locate(nonsense).message);
  fs.rmSync(directory, { recursive: true });
});
