// One Chromium for the tests in Python: a line of JSON in, a line of JSON out. Pages are named by the tests.
import readline from "node:readline";
import { chromium } from "playwright-core";

const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  // Names of tests are on this machine, with certificates of their own making.
  args: ["--no-sandbox", "--disable-gpu", "--ignore-certificate-errors", "--host-resolver-rules=MAP *.test 127.0.0.1"],
});
/** @type {Map<string, any>} */
const pages = new Map();

const devtools = await browser.newBrowserCDPSession();

/**
 * Fails when there is no answer in time: of a page that is loaded anew Chromium may keep one for ever.
 * @param {number} ms @param {Promise<any>} answer
 */
function within(ms, answer) {
  const late = new Promise((_, fail) => setTimeout(fail, ms, new Error(`no answer within ${ms} ms`)).unref());
  return Promise.race([answer, late]);
}

/** @param {string} name @param {string} expression */
async function evaluate(name, expression) {
  const given = { expression, awaitPromise: true, returnByValue: true };
  const { result, exceptionDetails } = await pages.get(name).protocol.send("Runtime.evaluate", given);
  if (exceptionDetails) throw new Error(exceptionDetails.exception?.description ?? exceptionDetails.text);
  return result.value;
}

/** In the frame inside a page, where there is one. @param {string} name @param {string} expression */
async function evaluateInside(name, expression) {
  const page = pages.get(name).page;
  return (page.frames()[1] ?? page.mainFrame()).evaluate(expression);
}

const commands = {
  /** Opens a tab that Playwright knows nothing of: it would keep each page visible. */
  async tab({ url }) {
    return { target: (await devtools.send("Target.createTarget", { url })).targetId };
  },
  /** Brings a tab to the front, so the others are hidden. */
  async activate({ target }) {
    await devtools.send("Target.activateTarget", { targetId: target });
    return {};
  },
  async leave({ target }) {
    await devtools.send("Target.closeTarget", { targetId: target });
    return {};
  },
  /** Opens a page and keeps every state that its body goes through, and every answer that is no success. */
  async open({ page: name, url, script }) {
    const page = await browser.newPage();
    const seen = { states: [], refused: [], failed: [], loads: 0 };
    // Playwright's own way to evaluate needs a CSP that allows it.
    const protocol = await page.context().newCDPSession(page);
    pages.set(name, { page, seen, protocol });
    page.on("response", (answer) => answer.status() >= 400 && seen.refused.push(`${answer.status()} ${answer.url()}`));
    page.on("pageerror", (error) => seen.failed.push(error.message));
    page.on("domcontentloaded", () => seen.loads++);
    await page.exposeFunction("__state", (state) => seen.states.at(-1) === state || seen.states.push(state));
    if (script) await page.addInitScript(script);
    await page.goto(url, { timeout: 60_000 });
    return {};
  },
  async run({ page, code, inner }) {
    return { value: await within(60_000, (inner ? evaluateInside : evaluate)(page, code)) };
  },
  async wait({ page, code, inner, seconds = 30 }) {
    const ask = inner ? evaluateInside : evaluate;
    for (
      const end = Date.now() + seconds * 1000;
      Date.now() < end;
      await new Promise((resolve) => setTimeout(resolve, 20))
    )
      if (await within(5000, ask(page, `Promise.resolve(${code}).then(Boolean)`)).catch(() => false)) return {};
    throw new Error(`not within ${seconds} s: ${code}`);
  },
  /** Waits until it has loaded all that it asks for. */
  async idle({ page }) {
    await pages.get(page).page.waitForLoadState("networkidle", { timeout: 60_000 });
    return {};
  },
  async seen({ page }) {
    return pages.get(page).seen;
  },
  async forget({ page }) {
    const { seen } = pages.get(page);
    Object.assign(seen, { states: [], refused: [], failed: [] });
    return {};
  },
  async close({ page }) {
    const open = pages.get(page)?.page;
    // One that is just being loaded anew may never be closed.
    await open?.goto("about:blank", { timeout: 5000 }).catch(() => {});
    if (open) await within(30_000, open.close());
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
