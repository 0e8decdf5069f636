"""The steps of an install, as shell scripts that run as the project's user: stage, seal, link, swap, put back.

Beside them is what their failure is called, and which directories they leave behind.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from agent.project.managers import BESIDE, LOCK_AT_FAULT
from agent.project.reading import PLACES, Dependencies

_FIND_PLACES = "find . -name node_modules -prune -type d"
_EXACT = """
exact=-T; [ "$(uname)" = Linux ] || exact=
"""
"""`mv -T` fails where another process made a directory in the meantime; a plain `mv` moves *into* it."""

STAGE_ALL = """
mkdir -p "$2/tree" && printf %s "$1" >"$2/for" && cd "$1" &&
tar --exclude=node_modules --exclude=.git -cf - . | tar -C "$2/tree" -xf -
"""
"""ROOT STAGE: copy the whole project without its node_modules."""

STAGE_SOME = """
root=$1; stage=$2; shift 2
mkdir -p "$stage/tree" && printf %s "$root" >"$stage/for" && cp -p -- "$@" "$stage/tree"
"""
"""ROOT STAGE FILE...: copy those files of the project."""

SEAL = f"""
cd "$1" && mkdir -p node_modules && [ ! -L node_modules ] && printf '{{"key": "%s"}}\\n' "$2" >"node_modules/$3" &&
{_FIND_PLACES} ! -path ./node_modules >node_modules/{PLACES} &&
{{ [ -s node_modules/{PLACES} ] || rm node_modules/{PLACES}; }}
"""
"""TREE KEY RECORD: write into node_modules what it was installed for, and which places belong to the set."""

STAMP = ".preview-sealed"
"""The file beside a cached node_modules that is as old as it; what is newer in there was written by the project."""

LINK = f"""
cd "$1" && {_FIND_PLACES} | while IFS= read -r place; do
  mkdir -p "$2/${{place%/*}}" || exit 1
  cp -al "$place" "$2/$place" 2>/dev/null || {{ rm -rf "$2/$place"; cp -Rp "$place" "$2/$place"; }} || exit 1
done
"""
"""FROM TO: copy the set, as hard links where possible."""

SWAP = f"""{_EXACT}
root=$2; old=$3
aside() {{
  mkdir -p "$old/${{1%/*}}" || return 1
  if [ -e "$root/$1" ] || [ -L "$root/$1" ]; then mv $exact "$root/$1" "$old/$1"; fi
}}
cd "$1" || exit 1
{{ cat "$root/node_modules/{PLACES}" 2>/dev/null; {_FIND_PLACES} ! -path ./node_modules; }} | sort -u |
while IFS= read -r place; do
  [ -d "$root/${{place%/*}}" ] || continue
  aside "$place" || exit 1
  if [ -d "$place" ]; then mv $exact "$place" "$root/$place" || exit 1; fi
done && aside ./node_modules && mv $exact ./node_modules "$root/node_modules" && mv $exact "$old" "${{old%/*}}/done"
"""
"""TREE ROOT OLD: rename the set into its places. The root's comes last, since it holds the record of what is there."""

PUT_BACK = f"""{_EXACT}
within=$1; shift
for stage; do
  [ -d "$stage/old" ] || continue
  root=$(cat "$stage/for")
  case "$root/" in "$within"/*) ;; *) continue ;; esac
  (
    cd "$stage/old" && find . -name node_modules -prune | while IFS= read -r place; do
      if [ -d "$root/${{place%/*}}" ]; then rm -rf "$root/$place"; mv $exact "$place" "$root/$place"; fi
    done
  )
done
rm -rf -- "$@"
"""
"""PROJECT_DIR STAGE...: undo interrupted swaps of this project, and remove the staging directories."""

BUNDLE = f"""{_EXACT}
from=$1/$3; to=$2/$3
[ -d "$from" ] && [ ! -L "$from" ] && [ ! -e "$to" ] && [ -d "$2/node_modules" ] && [ ! -L "$2/node_modules" ] &&
mkdir -p "${{to%/*}}" && mv $exact "$from" "$to"
"""
"""FROM TO PLACE: move one directory below node_modules to where there is none."""

FETCH = f"""{_EXACT}
npm install --prefix "$2" --no-save --no-audit --no-fund --prefer-offline --ignore-scripts "$1" &&
{{ [ "$4" != bun ] || (cd "$2/node_modules/bun" && node install.js); }} &&
mkdir -p "${{3%/*}}" && {{ mv $exact "$2" "$3" || [ -d "$3" ]; }}
"""
"""PACKAGE STAGE DIRECTORY NAME: have npm fetch a package manager. Bun's package has its program from a script."""

_STAGE = re.compile(r"stage-([1-9][0-9]{0,9})-[0-9]+")
"""A staging directory's name: the pid of the agent that made it, and a number. Other names are left alone."""


def manifests(wanted: Dependencies) -> list[str]:
    """Return the files that an install needs where it does not need the whole project."""
    names = [n for n in ("package.json", wanted.manager.lock, *BESIDE) if n]
    return [str(wanted.root / n) for n in names if os.path.lexists(wanted.root / n)]


def is_left_over(name: str) -> bool:
    """Return whether this is a staging directory of an agent that has ended."""
    stage = _STAGE.fullmatch(name)
    if stage is None:
        return False
    pid = int(stage[1])
    if pid == os.getpid():
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        pass
    return False


PROBLEM_LINES = 15
"""Lines of the package manager's output, the last ones, that a problem shows."""


class StepFailed(Exception):
    """A step failed; `rule` names it, the message is for people."""

    def __init__(self, rule: str, detail: str) -> None:
        self.rule = rule
        super().__init__(detail)


def failure(
    command: Sequence[str], code: int, tail: Sequence[str], timeout: float, timed_out: bool
) -> StepFailed:
    """Return what the failure of a package manager is, which was given `timeout` seconds."""
    said = "\n".join(tail[-PROBLEM_LINES:])
    if timed_out:
        return StepFailed("timeout", f"{command[0]} did not end within {timeout:g} s\n{said}".rstrip())
    if code == 126 and f"cannot run {command[0]}" in said:
        return StepFailed(
            "missing", f"{command[0]} is not installed here; add it to the image, or set INSTALL_COMMAND"
        )
    return StepFailed("exit", f"{' '.join(command[:2])} ended with {code}\n{said}".rstrip())


def lock_line(tail: Sequence[str], last: str) -> str:
    """Return the line in which a package manager says what is wrong with its lock file; else `last`."""
    return next((line for line in reversed(tail) if LOCK_AT_FAULT.search(line)), last)
