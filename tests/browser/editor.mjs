// What a person does with the editor page, one scenario a run: `node editor.mjs NAME`, with the stack's dev.json in STACK.
import assert from "node:assert/strict";
import {
  axe,
  browser,
  context,
  current,
  equal,
  frame,
  open,
  other,
  replace,
  run,
  show,
  stack,
  typed,
  write,
} from "./person.mjs";

/** @type {Record<string, () => Promise<void>>} */
const scenarios = {
  /** A save is on the screen, and the timeline says when. */
  async save() {
    const page = await open();
    const before = await current("src/App.tsx");
    await show(page, "src/App.tsx");
    await replace(page, before.replace("Somebody left the light on", "Somebody turned it off"));
    await page.keyboard.press("Control+s");
    await frame(page).getByText("Somebody turned it off").waitFor();
    const row = page.locator(".timeline tbody tr").first();
    await page.waitForFunction(() =>
      /\d+ (ms|s)$/.test(document.querySelector(".timeline tbody tr td:last-child")?.textContent ?? ""),
    );
    assert.match((await row.textContent()) ?? "", /src\/App\.tsx/);
    assert.equal(await row.getByText("by another").count(), 0);
    assert.deepEqual(page.failed, []);
    await write("src/App.tsx", before);
  },

  /** An error is named with file and line, and leads there; the timeline marks the save that made it, and no other. */
  async error() {
    const page = await open();
    const before = await current("src/Coast.tsx");
    await frame(page).locator("main").waitFor();
    const fine = (await write("src/Coast.tsx", `${before}\n// fine\n`)).revision;
    await page.getByText(`revision ${fine} is on the screen`).waitFor();
    await write("src/Coast.tsx", `${before}\nexport const broken = (\n`);
    await page
      .locator(".errors button", { hasText: /^src\/Coast\.tsx:\d+:\d+$/ })
      .first()
      .click();
    await page.locator('.cm-content[aria-label="src/Coast.tsx"]:focus').waitFor();
    assert.deepEqual(await page.locator("tr.failed td:first-child").allTextContents(), [`${fine + 1}`]);
    await write("src/Coast.tsx", before);
    await page.locator(".errors").waitFor({ state: "detached" });
    assert.deepEqual(await page.locator("tr.failed td:first-child").allTextContents(), [`${fine + 1}`]);
    assert.deepEqual(page.failed, []);
  },

  /** Other lines are merged by themselves; the same lines are shown, and nothing is lost. */
  async conflict() {
    const page = await open();
    await write("notes.md", "one\ntwo\nthree\nfour\nfive\n");
    await page.getByRole("treeitem", { name: "notes.md" }).waitFor();
    await show(page, "notes.md");
    await replace(page, "one, mine\ntwo\nthree\nfour\nfive\n");
    await write("notes.md", "one\ntwo\nthree\nfour\nfive, theirs\n");
    await page.getByText("five, theirs").waitFor();
    await page.getByRole("button", { name: /^Save/ }).click();
    await page.waitForFunction(() => !document.querySelector(".tab.active")?.textContent?.includes("●"));
    assert.equal(await current("notes.md"), "one, mine\ntwo\nthree\nfour\nfive, theirs\n");

    await replace(page, "one, mine again\ntwo\nthree\nfour\nfive, theirs\n");
    await write("notes.md", "one, theirs now\ntwo\nthree\nfour\nfive, theirs\n");
    await page.getByText("revision", { exact: false }).first().waitFor();
    await page.getByRole("button", { name: /^Save/ }).click();
    const dialog = page.getByRole("dialog");
    await dialog.waitFor();
    const said = (await dialog.textContent()) ?? "";
    assert.ok(said.includes("one, mine again") && said.includes("one, theirs now"), said);
    await dialog.getByRole("button", { name: "Keep mine" }).click();
    await dialog.waitFor({ state: "detached" });
    await page.waitForFunction(() => !/[●…]/.test(document.querySelector(".tab.active")?.textContent ?? ""));
    assert.equal(await current("notes.md"), "one, mine again\ntwo\nthree\nfour\nfive, theirs\n");
    const versions = await other("list_current_files", {});
    assert.ok(versions.some((/** @type {any} */ file) => file.file_path === "notes.md" && file.version >= 5));
    assert.deepEqual(page.failed, []);
  },

  /** What was typed and not saved is there again after the tab crashed. */
  async crash() {
    // Playwright waits for the page's worker, whose process the crash ends too; Chromium by itself starts it anew.
    const place = await browser.newContext({ serviceWorkers: "block" });
    const page = await open(place);
    await show(page, "src/hours.ts");
    const before = await current("src/hours.ts");
    await replace(page, `// not saved yet\n${before}`);
    const crashed = page.goto("chrome://crash").catch(() => undefined);
    await Promise.race([crashed, page.waitForEvent("crash")]);
    const again = await open(place);
    await again.getByText("// not saved yet").waitFor();
    assert.equal(await current("src/hours.ts"), before);
    await again.keyboard.press("Control+s");
    await again.waitForFunction(() => !/[●…]/.test(document.querySelector(".tab.active")?.textContent ?? ""));
    assert.equal(await current("src/hours.ts"), `// not saved yet\n${before}`);
    await write("src/hours.ts", before);
  },

  /** A file is made, renamed, restored from its history, and deleted; another is dropped on the tree. */
  async files() {
    const page = await open();
    /** @type {string[]} */
    const answers = ["src/new.ts", "src/newer.ts"];
    page.on("dialog", (dialog) => dialog.accept(dialog.type() === "prompt" ? answers.shift() : undefined));
    /** @type {(done?: unknown) => void} */
    let typed = () => {};
    const held = new Promise((done) => (typed = done));
    const hold = async (/** @type {any} */ route) => route.continue(await held);
    await page.route("**/rpc/upsert_project_file", hold, { times: 1 });
    await page.getByRole("button", { name: "New" }).click();
    await page.locator('.cm-content[aria-label="src/new.ts"]').waitFor();
    for (const text of ["export const first = 1\n", "export const second = 2\n"]) {
      await replace(page, text);
      await page.keyboard.press("Control+s"); // the first of them while the file is still being made
      typed();
      await page.waitForFunction(() => !/[●…(]/.test(document.querySelector(".tab.active")?.textContent ?? ""));
    }
    await page.getByRole("treeitem", { name: "new.ts" }).click();
    await page.getByRole("button", { name: "Rename" }).click();
    await page.locator('.cm-content[aria-label="src/newer.ts"]').waitFor();
    assert.equal(await current("src/newer.ts"), "export const second = 2\n");
    await replace(page, "export const third = 3\n");
    await page.keyboard.press("Control+s");
    await page.waitForFunction(() => !/[●…(]/.test(document.querySelector(".tab.active")?.textContent ?? ""));
    await page.getByRole("button", { name: "History" }).click();
    await page.getByText("export const second = 2").first().waitFor();
    await page.getByRole("button", { name: "Restore it" }).click();
    await page.waitForFunction(() => document.querySelector("select")?.options.length === 3);
    assert.equal(await current("src/newer.ts"), "export const second = 2\n");
    await page.getByRole("treeitem", { name: "newer.ts" }).click();
    await page.getByRole("button", { name: "Delete" }).click();
    await page.getByRole("treeitem", { name: "newer.ts" }).waitFor({ state: "detached" });
    await equal(() => current("src/newer.ts"), null);

    const drop = await page.evaluateHandle(() => {
      const data = new DataTransfer();
      data.items.add(new File([new Uint8Array([0, 1, 2, 255])], "four.bin"));
      return data;
    });
    await page.dispatchEvent('[role="tree"]', "drop", { dataTransfer: drop });
    await page.getByRole("treeitem", { name: "four.bin" }).waitFor();
    assert.deepEqual(page.failed, []);
  },

  /** A revision is kept by name, compared with now, and brought back. */
  async checkpoints() {
    const page = await open();
    page.on("dialog", (dialog) => dialog.accept());
    const before = await current("src/hours.ts");
    await page.getByRole("button", { name: "Checkpoints" }).click();
    await page.getByRole("textbox", { name: /^Keep the project/ }).fill("before");
    await page.getByRole("button", { name: "Keep", exact: true }).click();
    const row = page.locator(".panel tbody tr", { hasText: "before" });
    await row.waitFor();
    await write("src/hours.ts", `${before}// an AI broke it\n`);
    await row.getByRole("button", { name: "Compare with now" }).click();
    await page.getByText("+// an AI broke it").waitFor();
    await row.getByRole("button", { name: "Go back to it" }).click();
    await page.getByText(/^back at revision \d+$/).waitFor();
    assert.equal(await current("src/hours.ts"), before);
    await row.getByRole("button", { name: "Go back to it" }).click();
    await page.getByText(/^Nothing has changed since revision \d+\./).waitFor();
    assert.deepEqual(page.failed, []);
  },

  /** How the start went, and how agent and dev server are. */
  async session() {
    const page = await open();
    await page.getByRole("button", { name: "Session" }).click();
    const panel = page.getByRole("region", { name: "Session" });
    await panel
      .getByText("The session is ready, its agent serving, the agent's link live, the dev server ready.")
      .waitFor();
    for (const part of ["files on the disk", "node_modules in place", "dev server started", "first page"])
      assert.match((await panel.getByRole("row", { name: part }).textContent()) ?? "", /\d+\.\d\d s$/);
    assert.deepEqual(page.failed, []);
  },

  /** Without the stack the page opens with what was open; what is typed is saved when the stack is there again. */
  async offline() {
    const page = await open();
    const before = await current("src/hours.ts");
    await show(page, "src/hours.ts");
    const keeps = () =>
      page.evaluate(async () => {
        const cached = await (await caches.match("/kept.json"))?.json();
        const page = await caches.match("/");
        return cached?.active === "src/hours.ts" && !("password" in cached.config) && page !== undefined;
      });
    while (!(await keeps())) await page.waitForTimeout(100);
    await context.setOffline(true);
    await page.reload();
    await page.getByText(/^nobody answers: this is what was open here/).waitFor();
    await page.locator('.cm-content[aria-label="src/hours.ts"]').waitFor();
    assert.equal(await page.getByRole("treeitem", { name: "App.tsx" }).count(), 1);
    await page.locator(".cm-content").click();
    await page.keyboard.press("Control+Home");
    await page.keyboard.insertText("// typed offline\n");
    await page.keyboard.press("Control+s");
    await page.getByText(/^src\/hours.ts was not saved, and is kept here/).waitFor();
    await context.setOffline(false);
    await page.getByText("connected", { exact: true }).waitFor();
    await page.getByText("// typed offline").waitFor();
    await page.keyboard.press("Control+s");
    await page.waitForFunction(() => !/[●…]/.test(document.querySelector(".tab.active")?.textContent ?? ""));
    assert.equal(await current("src/hours.ts"), `// typed offline\n${before}`);
    await write("src/hours.ts", before);
  },

  /** Five thousand files and one of 5 MB: the tree shows what is in sight, and the file is typed in and saved. */
  async large() {
    for (let from = 0; from < 5000; from += 500) {
      const changes = Array.from({ length: 500 }, (_, index) => ({
        file_path: `many/${String(from + index).padStart(4, "0")}.ts`,
        content: `export const n = ${from + index}\n`,
      }));
      await other("apply_project_files", { changes });
    }
    const line = `${"x".repeat(79)}\n`;
    await write("large.txt", line.repeat(65536));
    const page = await open();
    await page.getByRole("treeitem", { name: "0000.ts" }).waitFor();
    const drawn = await page.getByRole("treeitem").count();
    assert.ok(drawn < 200, `${drawn} rows are in the page`);
    await page.getByRole("tree").focus();
    await page.keyboard.press("End");
    await page.getByRole("treeitem", { name: "vite.config.ts" }).waitFor();
    await show(page, "large.txt");
    await page.locator(".cm-content").click();
    await page.keyboard.press("Control+Home");
    await page.keyboard.type("typed at its top: ", { delay: 100 });
    await page.keyboard.press("Control+s");
    await page.waitForFunction(() => !/[●…]/.test(document.querySelector(".tab.active")?.textContent ?? ""));
    assert.equal(await current("large.txt"), `typed at its top: ${line.repeat(65536)}`);
    assert.deepEqual(page.failed, []);
  },

  /** How long what a person waits for takes, as JSON: milliseconds. */
  async speed() {
    const page = await open();
    const paint = await page.evaluate(
      () => performance.getEntriesByName("first-contentful-paint")[0]?.startTime ?? null,
    );
    const code = Array.from({ length: 640 }, (_, n) => `export const value${n} = "text"; //`).join("\n");
    await write("src/typed.ts", code);
    await page.getByRole("treeitem", { name: "typed.ts" }).waitFor();
    await show(page, "src/typed.ts");
    await page.evaluate(() => {
      const tasks = /** @type {any} */ (window);
      tasks.long = [];
      new PerformanceObserver((list) => tasks.long.push(...list.getEntries().map((each) => each.duration))).observe({
        type: "longtask",
      });
    });
    await page.locator(".cm-content").click();
    await page.keyboard.press("Control+End");
    await page.keyboard.type(" ten keys a second for ten seconds, and none is late ".repeat(2), { delay: 100 });
    const long = await page.evaluate(() => /** @type {any} */ (window).long);
    const before = await current("src/hours.ts");
    await show(page, "src/hours.ts");
    const shown = [];
    for (let round = 0; round < 20; round += 1) {
      await page.locator(".cm-content").click();
      await page.keyboard.press("Control+Home");
      await page.keyboard.insertText(`// ${round}\n`);
      await page.keyboard.press("Control+s");
      await page.waitForFunction(
        (round) =>
          document.querySelectorAll(".timeline tbody tr").length > round &&
          /\d (ms|s)$/.test(document.querySelector(".timeline tbody tr td:last-child")?.textContent ?? ""),
        round,
      );
      const said = await page.locator(".timeline tbody tr td:last-child").first().textContent();
      shown.push(Number.parseFloat(said ?? "") * (said?.endsWith(" ms") ? 1 : 1000));
    }
    await write("src/hours.ts", before);
    const sent = await page.evaluate(() =>
      performance.getEntriesByType("resource").reduce((sum, each) => {
        const one = /** @type {PerformanceResourceTiming} */ (each);
        return /assets/.test(one.name) ? sum + one.encodedBodySize : sum;
      }, 0),
    );
    console.log(JSON.stringify({ paint, long, shown, sent }));
  },

  /** Two people type into one file while an AI saves it: all of it is kept, and all are equal. */
  async room() {
    const path = "src/shared.txt";
    const keys = Number(process.env.KEYS ?? 60);
    const writes = Number(process.env.WRITES ?? 4);
    await write(path, "ann:\nbob:\nai:\n");
    /** @type {any} */
    const a = await open();
    const loaded = () =>
      a.evaluate(() => performance.getEntriesByType("resource").some((one) => /assets\/room-/.test(one.name)));
    // Alone, nothing of rooms is loaded.
    assert.ok(!(await loaded()));
    /** @type {any} */
    const b = await open(await browser.newContext({ viewport: { width: 1000, height: 700 } }));
    const pages = [a, b];
    await b.locator(".tab.active").getByLabel("Close").click();
    await a.getByText("+1").waitFor({ state: "detached" });
    await show(a, path);
    await show(b, path);
    await Promise.all(pages.map((page) => page.locator(".tab.active .others").waitFor()));
    assert.ok(await loaded());
    // Each sees the other's cursor.
    for (const page of pages) await page.locator(".cm-line").first().click();
    for (const page of pages) await page.locator(".cm-ySelectionCaret").first().waitFor({ state: "attached" });
    /** @param {any} page @param {number} line */
    const type = async (page, line) => {
      await page.locator(".cm-line").nth(line).click();
      await page.keyboard.press("End");
      await page.keyboard.type(typed(keys), { delay: 15 });
    };
    let over = false;
    const ai = async () => {
      for (let number = 0; number < writes && !over; number++) {
        for (;;) {
          const files = await other("list_current_files", {});
          const file = files.find((/** @type {any} */ each) => each.file_path === path);
          const done = await fetch(`${stack.orchestrator_url}/rest/v1/rpc/upsert_project_file`, {
            method: "POST",
            headers: {
              apikey: stack.service_key,
              authorization: `Bearer ${stack.service_key}`,
              "content-type": "application/json",
            },
            body: JSON.stringify({
              project_uuid: stack.project_id,
              p_file_path: path,
              expected_version: file.version,
              p_content: file.content.replace(/ai:.*/, (/** @type {string} */ line) => `${line} ${number};`),
            }),
          });
          if (done.ok) break;
          assert.equal(done.status, 409, await done.text());
        }
        await new Promise((after) => setTimeout(after, (keys * 30) / writes));
      }
    };
    await Promise.all([type(a, 0), type(b, 1), ai()]);
    over = true;
    const wanted = `ann:${typed(keys)}\nbob:${typed(keys)}\nai:${Array.from({ length: writes }, (_, n) => ` ${n};`).join("")}\n`;
    /** @param {any} page */
    const text = (page) =>
      page.locator(".cm-line").evaluateAll((/** @type {Element[]} */ lines) =>
        lines
          .map((line) => {
            const copy = /** @type {Element} */ (line.cloneNode(true));
            for (const cursor of copy.querySelectorAll(".cm-ySelectionCaret")) cursor.remove();
            return copy.textContent;
          })
          .join("\n"),
      );
    await equal(async () => [await text(a), await text(b), await current(path)], [wanted, wanted, wanted]);
    // Saved by itself: no tab has anything unsaved, and who goes on alone has all of it.
    for (const page of pages)
      await page.waitForFunction(() => !/[●…]/.test(document.querySelector(".tab.active")?.textContent ?? ""));
    await b.close();
    await a.locator(".tab.active .others").waitFor({ state: "detached" });
    await a.keyboard.type("!");
    await equal(async () => [await current(path)], [wanted.replace("\nbob", "!\nbob")]);
    assert.deepEqual(a.failed, []);
    assert.deepEqual(b.failed, []);
  },

  /** A turn of forty files appears at once, and is taken back. */
  async turn() {
    const page = await open();
    const before = await current("src/App.tsx");
    await frame(page).getByText("Somebody left the light on").waitFor();
    await page.getByRole("button", { name: "as one turn" }).click();
    await frame(page).getByText("part 39").waitFor();
    await page.getByText("forty files, one turn (40 files)").waitFor();
    assert.equal(await page.locator(".errors").count(), 0);
    await page.getByRole("button", { name: "Take it back" }).click();
    await frame(page).getByText("Somebody left the light on").waitFor();
    assert.equal(await current("src/App.tsx"), before);
    assert.deepEqual(page.failed, []);
  },

  /** Axe finds nothing, in light and in dark, with an error and a conflict on the page; and the tree goes by the keyboard. */
  async accessible() {
    const page = await open();
    for (const scheme of /** @type {const} */ (["light", "dark"])) {
      await page.emulateMedia({ colorScheme: scheme });
      assert.deepEqual(await axe(page), [], scheme);
    }
    await page.getByRole("tree").focus();
    await page.keyboard.press("Home");
    await page.keyboard.press("ArrowLeft");
    assert.equal(await page.getByRole("treeitem", { name: "public" }).getAttribute("aria-expanded"), "false");
    await page.keyboard.press("ArrowDown");
    await page.keyboard.press("ArrowDown");
    await page.keyboard.press("Enter");
    await page.locator('.cm-content[aria-label^="src/"]').waitFor();
  },
};

await run(scenarios);
