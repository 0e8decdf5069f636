"""The directories called node_modules that one install makes: sealed, kept, put in place, and put back, as one set.

A workspace has one at its root and, with pnpm, one in each package. Everything here is a shell script, because it
is run as the project's user, on what that user owns. A *place* is the path of a node_modules relative to the root.

A stage is `tree`, where the package manager works; `for`, which says whose node_modules it will be; `old`, what
was in place, while a swap is under way, renamed to `done` by the last step of it. So whoever finds a stage with
an `old` puts that back: the swap did not come to its end.
"""

from __future__ import annotations

PLACES = ".preview-places"
"""In the root's node_modules: the other places of the set, one a line; not there when there are none."""

_FIND = "find . -name node_modules -prune -type d"
_START = """
exact=-T; [ "$(uname)" = Linux ] || exact=
"""
"""`mv -T` renames, where a plain `mv` moves *into* a directory that somebody put there in the meantime."""

STAGE_ALL = """
mkdir -p "$2/tree" && printf %s "$1" >"$2/for" && cd "$1" &&
tar --exclude=node_modules --exclude=.git -cf - . | tar -C "$2/tree" -xf -
"""
"""ROOT STAGE: the whole project but what is installed."""

STAGE_SOME = """
root=$1; stage=$2; shift 2
mkdir -p "$stage/tree" && printf %s "$root" >"$stage/for" && cp -p -- "$@" "$stage/tree"
"""
"""ROOT STAGE FILE...: those files."""

SEAL = f"""
cd "$1" && mkdir -p node_modules && [ ! -L node_modules ] && printf '{{"key": "%s"}}\\n' "$2" >"node_modules/$3" &&
{_FIND} ! -path ./node_modules >node_modules/{PLACES} &&
{{ [ -s node_modules/{PLACES} ] || rm node_modules/{PLACES}; }}
"""
"""TREE KEY RECORD: what it was installed for, and which places belong to it."""

LINK = f"""
cd "$1" && {_FIND} | while IFS= read -r place; do
  mkdir -p "$2/${{place%/*}}" || exit 1
  cp -al "$place" "$2/$place" 2>/dev/null || {{ rm -rf "$2/$place"; cp -Rp "$place" "$2/$place"; }} || exit 1
done
"""
"""FROM TO: the same set elsewhere, as hard links where possible."""

SWAP = f"""{_START}
root=$2; old=$3
aside() {{
  mkdir -p "$old/${{1%/*}}" || return 1
  if [ -e "$root/$1" ] || [ -L "$root/$1" ]; then mv $exact "$root/$1" "$old/$1"; fi
}}
cd "$1" || exit 1
{{ cat "$root/node_modules/{PLACES}" 2>/dev/null; {_FIND} ! -path ./node_modules; }} | sort -u |
while IFS= read -r place; do
  [ -d "$root/${{place%/*}}" ] || continue
  aside "$place" || exit 1
  if [ -d "$place" ]; then mv $exact "$place" "$root/$place" || exit 1; fi
done && aside ./node_modules && mv $exact ./node_modules "$root/node_modules" && mv $exact "$old" "${{old%/*}}/done"
"""
"""TREE ROOT OLD: the set into its places, the root's last, because it holds the record that says what is there."""

PUT_BACK = f"""{_START}
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
"""PROJECT_DIR STAGE...: undo what swaps of this project were interrupted, and remove the stages."""
