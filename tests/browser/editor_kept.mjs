// What a person decides about what tools in the preview made, and what the page says of who made what: `node editor_kept.mjs NAME`.
import assert from "node:assert/strict";
import { mkdirSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { axe, browser, current, equal, open, other, run, stack, write } from "./person.mjs";

const ONCE = Date.now(); // so that it can be done again in the same project
const PATH = `src/components/New${ONCE}.tsx`;
const MADE = `gen/${ONCE}.txt`;
const RULES = [
  { glob: "gen/**", mode: "generated" },
  { glob: "src/components/**", mode: "authored" },
];

/**
 * What a tool in the preview does: it writes a file into the preview's directory.
 * @param {string} path
 * @param {string} content
 */
function tool(path, content) {
  const file = join(stack.project_dir, path);
  mkdirSync(dirname(file), { recursive: true });
  writeFileSync(file, content);
}

const status = async () => await (await fetch(`${stack.health_url}/status`)).json();

/** Which revision the preview's directory has. @param {number} revision */
const applied = (revision) => equal(async () => (await status()).revision >= revision, true);

/** The agent hears of rules with its next heartbeat, and the page that changes has it say something. */
async function rules() {
  await other("set_write_back", { p_rules: RULES });
  if ((await status()).write_back !== null) return;
  const before = await current("src/hours.ts");
  await write("src/hours.ts", `${before}// so that the agent speaks\n`);
  await equal(async () => (await status()).write_back !== null, true);
  await write("src/hours.ts", before);
}

/** @type {Record<string, () => Promise<void>>} */
const scenarios = {
  /** A proposal comes by itself, is compared, accepted, refused since its file changed, forced, and rejected; a conflict is taken. */
  async proposals() {
    const page = await open();
    const button = page.getByRole("button", { name: /^Proposals/ });
    const panel = page.getByRole("region", { name: "Proposals and conflicts" });
    await button.click();
    await panel.getByText("Nothing waits for you.").waitFor();
    await rules();

    tool(PATH, "export const New = 1;\n");
    await page.getByRole("button", { name: "Proposals 1" }).waitFor();
    const row = panel.getByRole("row", { name: PATH });
    assert.match((await row.textContent()) ?? "", /^proposal.*is new.*(just now|1 min ago)this session/);
    await row.getByRole("button", { name: PATH, exact: true }).press("Enter");
    await panel.getByText("export const New = 1;").waitFor();
    assert.deepEqual(await axe(page), []);
    await row.getByRole("button", { name: "Accept" }).press("Enter");
    await panel.getByText("Nothing waits for you.").waitFor();
    assert.equal(await current(PATH), "export const New = 1;\n");
    await page.locator(".timeline tbody tr").first().getByText("by you").waitFor();

    // Somebody saves the file after the tool read it: that is told, and nothing is overwritten before it is asked for.
    tool(PATH, "export const New = 2;\n");
    await row.waitFor();
    await write(PATH, "export const New = 'by a person';\n");
    await panel.getByText("made from version 1, the project has 2").waitFor();
    await row.getByRole("button", { name: "Accept" }).click();
    await panel.getByText("The file has changed since").waitFor();
    assert.equal(await current(PATH), "export const New = 'by a person';\n");
    await row.getByRole("button", { name: PATH, exact: true }).click();
    await panel.getByText("export const New = 'by a person';").waitFor();
    await page.emulateMedia({ colorScheme: "dark" });
    assert.deepEqual(await axe(page), []);
    await row.getByRole("button", { name: "Take it all the same" }).click();
    await panel.getByText("Nothing waits for you.").waitFor();
    assert.equal(await current(PATH), "export const New = 2;\n");

    // Another tab hears of the same, and of the decision.
    const second = await open(await browser.newContext());
    await equal(async () => (await status()).revision === (await status()).head_revision, true);
    tool(PATH, "export const New = 3;\n");
    await second.getByRole("button", { name: "Proposals 1" }).waitFor();
    await row.getByRole("button", { name: "Reject" }).click();
    await panel.getByText("Nothing waits for you.").waitFor();
    await second.getByRole("button", { name: "Proposals", exact: true }).waitFor();
    assert.equal(await current(PATH), "export const New = 2;\n");
    assert.deepEqual(second.failed, []);

    // A person saves before the tool's file was quiet for long enough to be offered: the tool's comes too late, and is kept.
    await applied((await write(MADE, "1\n")).revision);
    for (let round = 0; (await other("list_conflicts", {})).length === 0; round++) {
      tool(MADE, `by a tool ${round}\n`);
      const { revision } = await write(MADE, `by a person ${round}\n`);
      await applied(revision);
      await equal(async () => (await status()).write_back.offers_waiting, 0);
    }
    const conflict = panel.getByRole("row", { name: MADE });
    await conflict.getByRole("button", { name: MADE, exact: true }).click();
    await panel.getByText("by a person").waitFor();
    await panel.getByText("by a tool").waitFor();
    assert.match(await current(MADE), /^by a person \d+\n$/);
    await conflict.getByRole("button", { name: "Take the tool's" }).click();
    await panel.getByText("Nothing waits for you.").waitFor();
    assert.match(await current(MADE), /^by a tool \d+\n$/);
    assert.deepEqual(page.failed, []);
  },

  /** The timeline says who made each revision: a person, a program, a tool, and somebody who went back. */
  async who() {
    const page = await open();
    await rules();
    await other("upsert_project_file", { p_file_path: "notes.txt", p_content: `by a program ${ONCE}\n` });
    const rowOf = (/** @type {string} */ text) => page.locator(".timeline tbody tr", { hasText: text }).first();
    await rowOf("notes.txt").getByText("by a program").waitFor();
    tool(MADE, "made\n");
    await rowOf(MADE).getByText("by a tool in the preview").waitFor();
    const { turn_id } = await other("begin_turn", { p_label: "three files" });
    for (const n of [1, 2, 3])
      await other("upsert_project_file", { p_file_path: `turn/${n}.txt`, p_content: `${ONCE}\n`, p_turn_id: turn_id });
    await other("end_turn", { turn_id });
    const turn = rowOf("three files, one turn (3 files)");
    await turn.getByText("by a program").waitFor();
    assert.equal(await turn.getByRole("button", { name: "turn/2.txt" }).isVisible(), false, "it is folded");
    await turn.getByText("three files").click();
    await turn.getByRole("button", { name: "turn/2.txt" }).waitFor();
    assert.deepEqual(page.failed, []);
  },
};

await run(scenarios);
