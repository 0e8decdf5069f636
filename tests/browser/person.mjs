// What the scenarios of a person at the editor page share: the browser, the page, and the project as others see it.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { chromium } from "playwright-core";

export const stack = JSON.parse(process.env.STACK ?? "{}");
export const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: ["--no-sandbox", "--disable-gpu"],
});
export const context = await browser.newContext({ viewport: { width: 1400, height: 860 } });

/** Opens the page, and fails at whatever the page reports as an error. */
export async function open(place = context) {
  const page = await place.newPage();
  page.setDefaultTimeout(30_000);
  /** @type {string[]} */
  const failed = [];
  page.on("pageerror", (error) => {
    failed.push(error.message);
    console.error(error);
  });
  await page.goto(`${stack.orchestrator_url}/`);
  await page.getByText("connected", { exact: true }).waitFor();
  await page.locator(".tab.active").waitFor();
  return Object.assign(page, { failed });
}

/**
 * Calls an RPC as somebody else.
 * @param {string} rpc
 * @param {object} given
 */
export async function other(rpc, given) {
  const answer = await fetch(`${stack.orchestrator_url}/rest/v1/rpc/${rpc}`, {
    method: "POST",
    headers: {
      apikey: stack.service_key,
      authorization: `Bearer ${stack.service_key}`,
      "content-type": "application/json",
    },
    body: JSON.stringify({ project_uuid: stack.project_id, ...given }),
  });
  assert.ok(answer.ok, await answer.clone().text());
  return await answer.json();
}

/** @param {string} path */
export async function current(path) {
  const files = await other("list_current_files", {});
  return files.find((/** @type {any} */ file) => file.file_path === path)?.content ?? null;
}

/** @param {string} path @param {string} content */
export const write = (path, content) => other("upsert_project_file", { p_file_path: path, p_content: content });

/** @param {any} page @param {string} path */
export async function show(page, path) {
  await page
    .getByRole("treeitem", { name: path.split("/").at(-1), exact: false })
    .first()
    .click();
  await page.locator(`.cm-content[aria-label="${path}"]`).waitFor();
}

/**
 * Replaces what stands in the open editor.
 * @param {any} page
 * @param {string} text
 */
export async function replace(page, text) {
  await page.locator(".cm-content").click();
  await page.keyboard.press("Control+a");
  await page.keyboard.insertText(text);
}

/** @param {number} keys */
export const typed = (keys) => Array.from({ length: keys }, (_, n) => "abcdefghijklmnopqrstuvwxyz"[n % 26]).join("");

/**
 * Waits until it is so.
 * @param {() => Promise<unknown>} found
 * @param {unknown} wanted
 */
export async function equal(found, wanted) {
  for (let tries = 0; ; tries++) {
    try {
      return assert.deepEqual(await found(), wanted);
    } catch (error) {
      if (tries > 100) throw error;
      await new Promise((after) => setTimeout(after, 100));
    }
  }
}

/** @param {any} page */
export const frame = (page) => page.frameLocator("iframe");

/**
 * What axe finds wrong with the page.
 * @param {any} page
 */
export async function axe(page) {
  await page.evaluate(readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8"));
  return await page.evaluate(async () => {
    // The preview is the project's own page. CodeMirror's text takes the focus, and scrolls what is around it.
    const { violations } = await /** @type {any} */ (window).axe.run(
      { exclude: [["iframe"]] },
      { rules: { "scrollable-region-focusable": { enabled: false } } },
    );
    return violations.map((/** @type {any} */ each) => [
      each.id,
      each.nodes.map((/** @type {any} */ node) => node.html),
    ]);
  });
}

/**
 * Runs the one that the command line names.
 * @param {Record<string, () => Promise<void>>} scenarios
 */
export async function run(scenarios) {
  try {
    const scenario = scenarios[process.argv[2] ?? ""];
    assert.ok(scenario, `no such scenario; there are ${Object.keys(scenarios).join(", ")}`);
    await scenario();
  } catch (error) {
    const [page] = browser.contexts().flatMap((each) => each.pages());
    if (page && process.env.PICTURE) await page.screenshot({ path: process.env.PICTURE }).catch(() => undefined);
    throw error;
  } finally {
    await browser.close();
  }
}
