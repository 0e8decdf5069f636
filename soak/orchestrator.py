"""`python -m soak.orchestrator`: `preview-orchestrator serve`, but its machines run `soak/agent.py`: their clocks jump.

SOAK_CLOCKS says where the clocks are; the other settings are the orchestrator's.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from unittest.mock import patch

from orchestrator_stub.__main__ import main
from orchestrator_stub.machines.local import LocalMachines
from orchestrator_stub.server import control_plane

AGENT = (sys.executable, "-P", str(Path(__file__).with_name("agent.py")))

if __name__ == "__main__":
    machines = partial(LocalMachines, command=(*AGENT, os.environ["SOAK_CLOCKS"], "run"))
    with patch.object(control_plane, "LocalMachines", machines):
        main(["serve"])
