"""`python -m tests.fuzz DIRECTORY [libFuzzer options]`: see `tests.fuzz.unzip`."""

from __future__ import annotations

import sys
from pathlib import Path

import atheris  # type: ignore[import-not-found, unused-ignore]

with atheris.instrument_imports(include=["agent"]):
    from tests.fuzz.unzip import CORPUS, check, seeds


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        raise SystemExit(__doc__)
    work = Path(sys.argv[1])
    work.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(seeds().values()):
        (work / f"seed-{number:03}").write_bytes(data)
    options = ["-max_len=4096", "-timeout=10", "-rss_limit_mb=1024", *sys.argv[2:]]
    atheris.Setup([sys.argv[0], str(work), str(CORPUS), *options], check)
    atheris.Fuzz()


main()
