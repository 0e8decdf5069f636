// Takes the pictures of the editor page for README and docs: `node pictures.mjs DIRECTORY`, with the stack's dev.json in STACK.
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { chromium } from "playwright-core";

const directory = process.argv[2] ?? ".";
const stack = JSON.parse(process.env.STACK ?? "{}");
const FRAMES = 5;
const EVERY = 400; // milliseconds between two frames of a strip
const picture = /** @type {const} */ ({ type: "jpeg", quality: 80 });

const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: ["--no-sandbox", "--disable-gpu"],
});
const page = await browser.newPage({ viewport: { width: 1360, height: 800 }, colorScheme: "light" });
await page.goto(`${stack.orchestrator_url}/`);
await page.getByText("connected", { exact: true }).waitFor();
const preview = page.frameLocator("iframe");
const before = "Somebody left the light on";
await preview.getByText(before).waitFor();

/**
 * What the preview shows from a click on `button` on, until the forty files are there.
 * @param {string} button
 */
async function strip(button) {
  const frames = [];
  const began = Date.now();
  await page.getByRole("button", { name: button }).click();
  for (let frame = 0; frame < FRAMES - 1; frame += 1) {
    await page.waitForTimeout(Math.max(0, began + frame * EVERY - Date.now()));
    frames.push({ after: Date.now() - began, bytes: await page.locator("iframe").screenshot(picture) });
  }
  await preview.getByText("part 39", { exact: true }).waitFor();
  frames.push({ after: Date.now() - began, bytes: await page.locator("iframe").screenshot(picture) });
  await page.getByRole("button", { name: "Take it back" }).click();
  await preview.getByText(before).waitFor();
  return frames;
}

await page.getByRole("treeitem", { name: "App.tsx" }).click();
await strip("as one turn");
await page.locator('.cm-content[aria-label="src/App.tsx"]').click();
await page.keyboard.press("Control+Home");
await page.keyboard.type("// a person at work\n");
const rows = await page.locator(".timeline tbody tr").count();
await page.keyboard.press("Control+s");
await page.waitForFunction((rows) => {
  const all = document.querySelectorAll(".timeline tbody tr");
  return all.length > rows && /\d (ms|s)$/.test(all[0]?.lastElementChild?.textContent ?? "");
}, rows);
await page.screenshot({ ...picture, path: join(directory, "editor.jpg") });

const strips = [
  { title: "Forty files saved one by one", frames: await strip("save by save") },
  { title: "The same files as one turn", frames: await strip("as one turn") },
];
const film = await browser.newPage({ viewport: { width: 1360, height: 560 } });
await film.setContent(
  `<body style="margin:0;padding:12px;font:14px system-ui;background:#fff">${strips
    .map(
      ({ title, frames }) =>
        `<h2 style="font-size:15px;margin:4px 0">${title}</h2><div style="display:grid;grid-template-columns:repeat(${FRAMES},1fr);gap:8px">${frames
          .map(
            ({ after, bytes }) =>
              `<figure style="margin:0"><img style="width:100%;border:1px solid #bbb" src="data:image/jpeg;base64,${bytes.toString("base64")}"><figcaption>${after} ms</figcaption></figure>`,
          )
          .join("")}</div>`,
    )
    .join("")}</body>`,
);
writeFileSync(join(directory, "turn.jpg"), await film.locator("body").screenshot(picture));

await browser.close();
for (const name of ["editor.jpg", "turn.jpg"])
  console.log(`${join(directory, name)}: ${Math.round(readFileSync(join(directory, name)).length / 1024)} KB`);
