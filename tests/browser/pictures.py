"""Takes the pictures of README and docs from the real page: `make pictures`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import httpx

from tests.browser.conftest import HERE, missing
from tests.system.stack import Stack, copy_example, until

PICTURES = HERE.parents[1] / "docs" / "pictures"


def main() -> int:
    """Run a stack of its own, and take the pictures of it. Returns the exit code."""
    if (why := missing()) is not None:
        print(f"pictures: {why}", file=sys.stderr)
        return 1
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        stack = Stack(
            copy_example(Path(place) / "my-app"), Path(place) / "state", options=("--no-watch",), editor=True
        )
        try:
            stack.start()
            page = stack.info["orchestrator_url"]
            until("the page is built", lambda: 'id="root"' in httpx.get(f"{page}/").text, 180)
            return subprocess.run(
                ["node", str(HERE / "pictures.mjs"), str(PICTURES)],
                env=os.environ | {"STACK": json.dumps(stack.info)},
                check=False,
            ).returncode
        finally:
            stack.kill()


if __name__ == "__main__":
    sys.exit(main())
