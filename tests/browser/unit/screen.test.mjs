import assert from "node:assert/strict";
import { test } from "node:test";
import { Screen } from "../../../agent/preview/screen.mjs";

const opened = (revision = 1) => {
  const screen = new Screen();
  screen.applied = revision;
  screen.rendered({ load: "a", hidden: false, revision, how: "load" }, 1000);
  return screen;
};

test("what is shown is what the newest visible page has painted", () => {
  const screen = opened(3);
  screen.rendered({ load: "b", hidden: true, revision: 3, how: "load" }, 1100);
  screen.applied = 4;
  const { shown } = screen.report();
  assert.deepEqual(shown, {
    revision: 3,
    at: 1,
    how: "load",
    pages: { visible: 1, hidden: 1, behind: 1 },
    blank: false,
  });
});

test("nobody makes believe in a revision that was not committed, nor goes back", () => {
  const screen = opened(3);
  assert.equal(screen.rendered({ load: "a", revision: 99, how: "update" }, 1), undefined);
  assert.equal(screen.rendered({ load: "a", revision: 2, how: "update" }, 1), undefined);
  for (const revision of [-1, 1.5, "3", null, Number.NaN]) {
    assert.equal(screen.rendered({ load: "a", revision }, 1), undefined);
  }
  assert.equal(screen.failed({ kind: "runtime", message: "x", revision: 99 }, "a", 1)?.revision, 3);
});

test("an error is open until a later revision is shown without it", () => {
  const screen = opened(1);
  screen.applied = 2;
  screen.failed({ kind: "runtime", message: "boom", file: "src/A.tsx", line: 2, column: 3, revision: 2 }, "a", 1500);
  screen.rendered({ load: "a", revision: 2, how: "update" }, 1600);
  assert.deepEqual(
    screen
      .report()
      .errors.map(({ kind, file, line, column, revision, pages }) => [kind, file, line, column, revision, pages]),
    [["runtime", "src/A.tsx", 2, 3, 2, 1]],
  );
  screen.applied = 3;
  screen.rendered({ load: "a", revision: 3, how: "update", blank: true }, 1700);
  assert.equal(screen.errors.size, 1, "a blank page has mended nothing");
  screen.rendered({ load: "a", revision: 3, how: "reload" }, 1800);
  assert.equal(screen.errors.size, 0);
});

test("errors of a page go with it, ten seconds after it was closed", () => {
  const screen = opened(1);
  screen.failed({ kind: "rejection", message: "x" }, "a", 1000);
  screen.failed({ kind: "build", message: "y" }, null, 1000);
  screen.bye({ load: "a" }, 2000);
  screen.forget(11_000, 10_000);
  assert.equal(screen.pages.size, 1);
  screen.forget(12_001, 10_000);
  assert.deepEqual(
    screen.report().errors.map((each) => each.kind),
    ["build"],
  );
  assert.equal(screen.report().shown, null);
});

test("a page that was loaded anew stands once", () => {
  const screen = opened(1);
  screen.bye({ load: "a" }, 2000);
  screen.rendered({ load: "b", hidden: false, revision: 1, how: "reload" }, 2100);
  assert.equal(screen.pages.size, 1);
});

test("pages, errors and texts are bounded", () => {
  const screen = opened(1);
  for (let n = 0; n < 500; n++) {
    screen.hear({ load: `page ${n}` }, 1000);
    screen.failed({ kind: "runtime", message: `${n}`.repeat(5000), stack: "s".repeat(1e6), line: 1e300 }, "a", 1000);
  }
  assert.ok(screen.pages.size <= 50);
  assert.ok(screen.errors.size <= 100);
  assert.ok(JSON.stringify(screen.report()).length < 400_000);
});

test("a page that floods hides no error of another, and cannot speak of what is built", () => {
  const screen = opened();
  screen.failed({ kind: "runtime", message: "real" }, "b", 1);
  for (let n = 0; n < 1000; n++) screen.failed({ kind: "runtime", message: `forged ${n}` }, "a", 2 + n);
  assert.deepEqual([screen.errors.size, screen.report().errors.at(-1)?.message], [11, "real"]);
  assert.equal(screen.failed({ kind: "build", message: "forged" }, "a", 1), undefined);
});

test("what is not of the form is not heard", () => {
  const screen = opened(1);
  for (const said of [null, undefined, 7, "x", {}, { load: 7 }, { load: "" }]) {
    assert.equal(screen.hear(said, 1), undefined);
    assert.equal(screen.failed(said, "a", 1), undefined);
    screen.bye(said, 1);
  }
  assert.equal(screen.failed({ kind: "nonsense", message: "x" }, "a", 1), undefined);
});
