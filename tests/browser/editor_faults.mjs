// What breaks around the editor page, and what it says and keeps then: `node editor_faults.mjs NAME`.
import assert from "node:assert/strict";
import { browser, current, equal, frame, open, other, replace, run, show, write } from "./person.mjs";

const ONCE = Date.now(); // so that it can be done again in the same project

/** A place whose requests can be changed: those of the page's worker cannot. */
const place = () => browser.newContext({ viewport: { width: 1400, height: 860 }, serviceWorkers: "block" });

/** @param {any} page */
const saved = (page) =>
  page.waitForFunction(() => !/[●…]/.test(document.querySelector(".tab.active")?.textContent ?? ""));

/** The file is open with a line typed at its top, and not saved. @param {any} page @param {string} path @param {string} line */
async function typeOnTop(page, path, line) {
  await show(page, path);
  await page.locator(".cm-content").click();
  await page.keyboard.press("Control+Home");
  await page.keyboard.insertText(line);
}

/** Says a word to who runs this, and waits until it is done. @param {string} word */
async function ask(word) {
  console.log(word);
  process.stdin.resume();
  await new Promise((done) => process.stdin.once("data", done));
  process.stdin.pause(); // or it would keep the process for ever
}

/** @type {Record<string, () => Promise<void>>} */
const scenarios = {
  /** The server takes the page's token no more: it signs in again, and nobody notices. */
  async token() {
    const page = await open(await place());
    const before = await current("src/hours.ts");
    await typeOnTop(page, "src/hours.ts", `// ${ONCE}\n`);
    const old = /** @type {string[]} */ ([]);
    await page.route(/\/(rest|v1\/sessions)\//, async (route) => {
      const headers = await route.request().allHeaders();
      const token = headers.authorization ?? "";
      if (old.length === 0) old.push(token);
      const expired = { ...headers, authorization: `Bearer ${process.env.EXPIRED}` };
      await route.continue(token === old[0] ? { headers: expired } : {});
    });
    await page.keyboard.press("Control+s");
    await saved(page);
    assert.equal(await current("src/hours.ts"), `// ${ONCE}\n${before}`);
    await page.waitForFunction(() =>
      /\d (ms|s)$/.test(document.querySelector(".timeline tbody tr td:last-child")?.textContent ?? ""),
    );
    assert.equal(await page.locator(".notice.error").count(), 0);
    assert.deepEqual(page.failed, []);
    await write("src/hours.ts", before);
  },

  /** Realtime is cut: it says so, saves go on, and what others did meanwhile is there once it is back. */
  async realtime() {
    const where = await place();
    let cut = false;
    const sockets = /** @type {any[]} */ ([]);
    await where.routeWebSocket(/\/realtime\//, (socket) => {
      if (cut) return void socket.close();
      socket.connectToServer();
      sockets.push(socket);
    });
    const page = await open(where);
    const before = await current("src/hours.ts");
    await typeOnTop(page, "src/hours.ts", `// mine ${ONCE}\n`);
    cut = true;
    for (const socket of sockets) await socket.close();
    await page.getByText("not connected: you can read and type").waitFor();
    await write("src/hours.ts", `${before}// theirs ${ONCE}\n`);
    await write(`cut/${ONCE}.txt`, "made meanwhile\n");
    await page.keyboard.press("Control+s");
    await page.getByText("src/hours.ts was merged with what somebody else saved").waitFor();
    await saved(page);
    assert.equal(await current("src/hours.ts"), `// mine ${ONCE}\n${before}// theirs ${ONCE}\n`);
    await page.keyboard.insertText("// not saved\n");
    cut = false;
    await page.getByText("connected", { exact: true }).waitFor();
    await page.getByRole("treeitem", { name: `${ONCE}.txt` }).waitFor();
    await page.getByText("// not saved").waitFor();
    assert.deepEqual(page.failed, []);
    await write("src/hours.ts", before);
  },

  /** A deletion, and a rename, are seen at once, and taken back where the database refuses them. */
  async refused() {
    const page = await open(await place());
    page.on("dialog", (dialog) => dialog.accept());
    const name = `refused-${ONCE}.txt`;
    await write(name, "one\n");
    const entry = page.getByRole("treeitem", { name });
    await entry.waitFor();
    /** @type {() => void} */
    let release = () => undefined;
    const held = new Promise((done) => {
      release = () => done(undefined);
    });
    await page.route("**/rpc/delete_project_file", async (route) => {
      await held; // on its way, while somebody else saves
      await route.continue();
    });
    await entry.click();
    await page.getByRole("button", { name: "Delete", exact: true }).click();
    await entry.waitFor({ state: "detached" });
    await page.locator(".timeline").getByText("saving …").waitFor();
    const { version } = await write(name, "two\n");
    assert.equal(version, 2);
    release();
    await page.getByText(`${name} was not deleted`).waitFor();
    await entry.waitFor();
    await page.locator(".timeline").getByText("saving …").waitFor({ state: "detached" });
    assert.equal(await current(name), "two\n");
    assert.deepEqual(page.failed, []);
  },

  /** The stack is stopped and started again: what is typed meanwhile stays, is saved, and is seen in the new session's preview. */
  async restart() {
    const page = await open(await place());
    const before = await current("src/App.tsx");
    await show(page, "src/App.tsx");
    await replace(page, before.replace("Somebody left the light on", `Kept ${ONCE}`));
    await ask("stop");
    await page.getByText("not connected: you can read and type").waitFor();
    await page.keyboard.press("Control+s");
    await page.getByText("src/App.tsx was not saved, and is kept here: nobody answers").waitFor();
    await page.locator(".cm-content").click();
    await page.keyboard.press("Control+Home");
    await page.keyboard.insertText(`// typed while nobody answered\n`);
    await ask("start");
    await page.getByText("connected", { exact: true }).waitFor({ timeout: 90_000 });
    await page.getByText("// typed while nobody answered").waitFor();
    await page.keyboard.press("Control+s");
    await saved(page);
    await frame(page).getByText(`Kept ${ONCE}`).waitFor({ timeout: 90_000 });
    await page.waitForFunction(() =>
      /\d (ms|s)$/.test(document.querySelector(".timeline tbody tr td:last-child")?.textContent ?? ""),
    );
    assert.match(await current("src/App.tsx"), new RegExp(`^// typed while nobody answered\n[^]*Kept ${ONCE}`));
    assert.deepEqual(page.failed, []);
  },

  /** A project that does not start: the page is there all the same, says why, and a save of what is wrong starts it. */
  async broken() {
    const page = await open();
    await page.getByText(/^the project does not start: .*this configuration is wrong/).waitFor({ timeout: 90_000 });
    await page.getByRole("button", { name: "Session" }).click();
    await page.getByRole("region", { name: "Session" }).getByText("this configuration is wrong").waitFor();
    await show(page, "vite.config.ts");
    await replace(page, process.env.GOOD ?? "");
    await page.keyboard.press("Control+s");
    await saved(page);
    await frame(page).getByText("Somebody left the light on").waitFor({ timeout: 90_000 });
    await page.getByText(/^revision \d+ is on the screen$/).waitFor();
    assert.deepEqual(page.failed, []);
  },

  /** What was typed into a file of 5 MB and not saved is there again after the tab crashed. */
  async heavy() {
    const line = `${"x".repeat(79)}\n`;
    const path = `heavy-${ONCE}.txt`;
    await write(path, line.repeat(65536));
    const where = await place();
    const page = await open(where);
    await page.getByRole("treeitem", { name: path }).waitFor();
    await typeOnTop(page, path, "typed at its top: ");
    const kept = (/** @type {any} */ page) =>
      page.evaluate(async () => (await (await caches.open("drafts")).keys()).length);
    await equal(() => kept(page), 1);
    const crashed = page.goto("chrome://crash").catch(() => undefined);
    await Promise.race([crashed, page.waitForEvent("crash")]);
    const again = await open(where);
    await again.locator(`.cm-content[aria-label="${path}"]`).waitFor();
    await again.getByText("typed at its top: ").waitFor();
    await again.keyboard.press("Control+s");
    await saved(again);
    assert.equal(await current(path), `typed at its top: ${line.repeat(65536)}`);
    await equal(() => kept(again), 0);
    await other("delete_project_file", { p_file_path: path });
    assert.deepEqual(again.failed, []);
  },
};

await run(scenarios);
