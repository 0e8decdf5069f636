"""The other flow, as a process: polls the database's files and writes them into a directory in place, as it always did.

    python -m tests.system.legacy_writer DIRECTORY URL SERVICE_KEY PROJECT_ID SECONDS

Every SECONDS it asks for the current files and writes those that differ, a half at a time and never by rename, and
removes what it wrote once it is gone. A file named `.broken` beside DIRECTORY holds the paths that it forgets to write:
the bug that shadow mode is there to find. `.rounds` beside it gets the monotonic clock at the end of each round:
how long a save may have been in flight.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import httpx


def main() -> None:
    directory, url, key, project, seconds = sys.argv[1:]
    root = Path(directory)
    broken = root.parent / ".broken"
    headers = {"apikey": key, "authorization": f"Bearer {key}"}
    written: set[str] = set()
    with httpx.Client(base_url=url, headers=headers, trust_env=False) as http:
        while True:
            answer = http.post("/rest/v1/rpc/list_current_files", json={"project_uuid": project})
            files = {row["file_path"]: row["content"].encode() for row in answer.raise_for_status().json()}
            # Read after the question: who names a path here before saving it is heeded.
            skipped = set(broken.read_text().split()) if broken.exists() else set()
            write(root, {path: content for path, content in files.items() if path not in skipped})
            for path in written - files.keys() - skipped:
                (root / path).unlink(missing_ok=True)
            written = (written | files.keys()) & (files.keys() | skipped)
            with (root.parent / ".rounds").open("a") as rounds:
                rounds.write(f"{time.monotonic()}\n")
            time.sleep(float(seconds))


def write(root: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        path = root / name
        if path.exists() and path.read_bytes() == content:
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb", buffering=0) as file:
            file.write(content[: len(content) // 2])
            time.sleep(0.05)
            file.write(content[len(content) // 2 :])


if __name__ == "__main__":
    main()
