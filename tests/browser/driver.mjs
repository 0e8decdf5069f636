// One Chromium for the tests in Python: a line of JSON in, a line of JSON out. Pages are named by the tests.
import readline from "node:readline";
import { chromium } from "playwright-core";

const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: ["--no-sandbox", "--disable-gpu"],
});
/** @type {Map<string, any>} */
const pages = new Map();

const commands = {
  /** Opens a page and keeps every state that its body goes through, and every answer that is no success. */
  async open({ page: name, url, script }) {
    const page = await browser.newPage();
    const seen = { states: [], refused: [], failed: [], loads: 0 };
    pages.set(name, { page, seen });
    page.on("response", (answer) => answer.status() >= 400 && seen.refused.push(`${answer.status()} ${answer.url()}`));
    page.on("pageerror", (error) => seen.failed.push(error.message));
    page.on("domcontentloaded", () => seen.loads++);
    await page.exposeFunction("__state", (state) => seen.states.at(-1) === state || seen.states.push(state));
    if (script) await page.addInitScript(script);
    await page.goto(url, { timeout: 60_000 });
    return {};
  },
  async run({ page, code }) {
    return { value: await pages.get(page).page.evaluate(code) };
  },
  async wait({ page, code }) {
    await pages.get(page).page.waitForFunction(code, null, { timeout: 30_000, polling: 20 });
    return {};
  },
  async seen({ page }) {
    return pages.get(page).seen;
  },
  async close({ page }) {
    await pages.get(page)?.page.close();
    pages.delete(page);
    return {};
  },
};

for await (const line of readline.createInterface({ input: process.stdin })) {
  const { command, ...given } = JSON.parse(line);
  try {
    console.log(JSON.stringify(await commands[command](given)));
  } catch (error) {
    console.log(JSON.stringify({ error: String(error) }));
  }
}
await browser.close();
