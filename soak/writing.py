"""PURE: what people and AI turns do to a project's files, drawn from dice.

A `Step` is one commit: paths with their new file, or None for a removal. An action is one or more steps that follow
each other at once: two saves of one file, a removal and its undoing. The number of files and of bytes stays where it
began, so that memory that grows is not simply memory for more files.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

FOLDERS, PARTS = 14, 9
"""The pool of names: folders that code lies in, files of one folder."""

PICTURES, TABLES, SCRIPTS = 8, 3, 2
"""Binary files; texts too large to travel in an event; files whose executable bit is turned."""

TURN = 40
"""Files of one AI turn."""

MARKER = "src/marker.js"
"""The file of a last save: what the preview is asked for in the end."""


@dataclass(frozen=True, slots=True)
class File:
    """One file's bytes, and whether it may be run."""

    content: bytes
    executable: bool = False


Step = Mapping[str, File | None]


class Action(StrEnum):
    """What somebody does."""

    SAVE = "save"
    CREATE = "create"
    DELETE = "delete"
    RENAME = "rename"
    RENAME_FOLDER = "rename folder"
    UNDO = "undo"
    DOUBLE_SAVE = "double save"
    DELETE_AND_UNDO = "delete and undo"
    PICTURE = "picture"
    TABLE = "table"
    EXECUTABLE = "executable bit"
    AI_TURN = "AI turn"


PERSON: Mapping[Action, int] = {
    Action.SAVE: 40,
    Action.CREATE: 8,
    Action.DELETE: 6,
    Action.RENAME: 8,
    Action.RENAME_FOLDER: 1,
    Action.UNDO: 8,
    Action.DOUBLE_SAVE: 8,
    Action.DELETE_AND_UNDO: 3,
    Action.PICTURE: 4,
    Action.TABLE: 2,
    Action.EXECUTABLE: 2,
    Action.AI_TURN: 0,
}

ASSISTED: Mapping[Action, int] = {**PERSON, Action.AI_TURN: 14}
"""A person with an assistant: every eighth action or so is a turn of forty files."""


class Writing:
    """One project as its editor sees it. `files` is what it holds; the caller saves each step that `act` gives."""

    def __init__(self, files: Mapping[str, File], dice: random.Random) -> None:
        self.files: dict[str, File] = dict(files)
        self._dice = dice
        self._before: deque[dict[str, File | None]] = deque(maxlen=30)
        self._count = 0

    def begin(self) -> Step:
        """The tree that everything after starts from: about half of the pool."""
        step: dict[str, File | None] = {}
        for folder in range(FOLDERS // 2 + 1):
            for part in range(PARTS):
                step[_part(folder, part)] = self._text()
        step.update({_picture(n): self._bytes() for n in range(PICTURES)})
        step.update({_table(n): self._table() for n in range(TABLES)})
        step.update({_script(n): self._text() for n in range(SCRIPTS)})
        step[MARKER] = self.marker("begin")
        return self._done(step, remember=False)

    def marker(self, text: str) -> File:
        """A module that says `text`."""
        return File(f'export const marker = "{text}"\n'.encode())

    def last_word(self, text: str) -> Step:
        """A save that says `text`."""
        return self._done({MARKER: self.marker(text)})

    def touch(self, paths: list[str]) -> Step:
        """New content for those of `paths` that are still there."""
        return self._done({path: self._text() for path in paths if path in self.files})

    def act(self, kinds: Mapping[Action, int]) -> tuple[Action, list[Step]]:
        """Something that somebody does now. What is not possible (nothing to delete) becomes a plain save."""
        action = self._dice.choices(list(kinds), list(kinds.values()))[0]
        steps = [step for step in self._steps(action) if step]
        return (action, steps) if steps else (Action.SAVE, [self._save()])

    def _steps(self, action: Action) -> list[Step]:
        match action:
            case Action.SAVE:
                return [self._save()]
            case Action.CREATE:
                path = self._free()
                return [self._done({path: self._text()})] if path else []
            case Action.DELETE:
                # Never below half of what it began with, so that there is always something to work on.
                parts = self._parts()
                if len(parts) < FOLDERS * PARTS // 4:
                    return []
                return [self._done({self._dice.choice(parts): None})]
            case Action.RENAME:
                return [self._rename()]
            case Action.RENAME_FOLDER:
                return [self._rename_folder()]
            case Action.UNDO:
                return [self._undo()]
            case Action.DOUBLE_SAVE:
                path = self._dice.choice(self._parts())
                return [self._done({path: self._text()}) for _ in range(self._dice.choice((2, 2, 3)))]
            case Action.DELETE_AND_UNDO:
                return [self._done({self._dice.choice(self._parts()): None}), self._undo()]
            case Action.PICTURE:
                return [self._done({_picture(self._dice.randrange(PICTURES)): self._bytes()})]
            case Action.TABLE:
                return [self._done({_table(self._dice.randrange(TABLES)): self._table()})]
            case Action.EXECUTABLE:
                path = _script(self._dice.randrange(SCRIPTS))
                old = self.files.get(path) or self._text()
                return [self._done({path: File(old.content, not old.executable)})]
            case Action.AI_TURN:
                return [self._turn()]

    def _save(self) -> Step:
        return self._done({self._dice.choice(self._parts()): self._text()})

    def _rename(self) -> Step:
        old, new = self._dice.choice(self._parts()), self._free()
        return self._done({old: None, new: self.files[old]}) if new else {}

    def _rename_folder(self) -> Step:
        used = sorted({path.split("/")[2] for path in self._parts()})
        # A free name of the pool, or one more: renaming does not add files.
        free = [f"f{n}" for n in range(FOLDERS + 1) if f"f{n}" not in used]
        if not free:
            return {}
        old, new = f"src/features/{self._dice.choice(used)}/", f"src/features/{self._dice.choice(free)}/"
        step: dict[str, File | None] = {}
        for path in self._parts():
            if path.startswith(old):
                step[path] = None
                step[new + path.removeprefix(old)] = self.files[path]
        return self._done(step)

    def _undo(self) -> Step:
        return self._done(self._before.pop(), remember=False) if self._before else {}

    def _turn(self) -> Step:
        """Forty files at once: most written, some removed, a picture, and now and then a text too large to travel."""
        pool = [_part(folder, part) for folder in range(FOLDERS) for part in range(PARTS)]
        chosen = self._dice.sample(pool, TURN - 3)
        there = len(self._parts())
        step: dict[str, File | None] = {}
        for path in chosen:
            # Towards the middle of the pool, from either side.
            remove = path in self.files and self._dice.random() < there / len(pool)
            step[path] = None if remove else self._text(6000)
        step.update({_picture(n): self._bytes() for n in self._dice.sample(range(PICTURES), 2)})
        step[_table(self._dice.randrange(TABLES))] = (
            self._table() if self._dice.random() < 0.5 else self._text()
        )
        return self._done(step)

    def _done(self, step: Mapping[str, File | None], *, remember: bool = True) -> Step:
        """`step` without what changes nothing, taken into `files`."""
        real = {path: file for path, file in step.items() if self.files.get(path) != file}
        if remember and real:
            self._before.append({path: self.files.get(path) for path in real})
        for path, file in real.items():
            if file is None:
                del self.files[path]
            else:
                self.files[path] = file
        return real

    def _parts(self) -> list[str]:
        return sorted(path for path in self.files if path.startswith("src/features/"))

    def _free(self) -> str | None:
        pool = (_part(folder, part) for folder in range(FOLDERS) for part in range(PARTS))
        free = [path for path in pool if path not in self.files]
        return self._dice.choice(free) if free else None

    def _text(self, most: int = 3000) -> File:
        self._count += 1
        line = f"export const value{self._count} = {self._dice.random()} // ünïcödé\n"
        return File((line * self._dice.randint(1, most // len(line))).encode())

    def _table(self) -> File:
        rows = self._dice.randint(4000, 8000)
        return File("".join(f'  ["row {n}", {self._dice.random()}],\n' for n in range(rows)).encode())

    def _bytes(self) -> File:
        return File(b"\x89PNG\r\n\x1a\n\0" + self._dice.randbytes(self._dice.randint(2_000, 60_000)))


def _part(folder: int, part: int) -> str:
    return f"src/features/f{folder}/Part{part}.js"


def _picture(number: int) -> str:
    return f"assets/picture{number}.png"


def _table(number: int) -> str:
    return f"src/tables/table{number}.js"


def _script(number: int) -> str:
    return f"bin/script{number}.sh"
