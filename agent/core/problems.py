"""The kinds of problem there are, and what a person can do about each. Pure data.

A kind is the label of the metric `problems`, and what `/status` and the heartbeat say. `ProblemKind` is closed, so that
the type checker refuses a problem nobody has written a remedy for; `preview-agent status` and docs/operations.md show
the same sentences.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

ProblemKind = Literal[
    "dev_server_backoff",
    "dev_server_failed",
    "disk_full",
    "drift",
    "hash_mismatch",
    "hmr_unreachable",
    "install_failed",
    "io_error",
    "live_unreadable",
    "mass_delete",
    "path_refused",
    "path_unusable",
    "permission_denied",
    "port_taken",
    "read_only",
    "session_api_unreachable",
    "shadow_difference",
    "snapshot_expired",
    "snapshot_rejected",
    "token_refused",
    "too_many_open_files",
    "undo_failed",
]

REMEDIES: Final[Mapping[ProblemKind, str]] = {
    "dev_server_backoff": "it is started again by itself; its last output, in /status, says why it ended",
    "dev_server_failed": "read its last output in /status and mend the file it names; saving that starts it again",
    "disk_full": "free space or inodes where PROJECT_DIR and STATE_DIR are; the batch is retried by itself",
    "drift": "something in the container changed a file; DRIFT_POLICY=restore puts it back",
    "hash_mismatch": "fetched again by itself; if it goes on, see whether a proxy changes what passes through it",
    "hmr_unreachable": "the page is served and its HMR socket is not; look at server.hmr in the Vite config",
    "install_failed": "mend package.json or its lock file, see the log's tail; the old preview stays until then",
    "io_error": "look at the disk and the kernel's log (dmesg); the batch is retried by itself",
    "live_unreadable": "let the agent's user read PROJECT_DIR; nothing is compared until then",
    "mass_delete": "a snapshot would delete most files; look at the project in the database, a second one decides",
    "path_refused": "rename the file in the project; its path is never written, the others are",
    "path_unusable": "rename the file, or remove what stands in its way in the container; the others are written",
    "permission_denied": "let the agent's user write in PROJECT_DIR and STAGING_DIR",
    "port_taken": "stop what listens on the dev server's port, or set DEV_PORT",
    "read_only": "mount the project's file system writable; the batch is retried by itself",
    "session_api_unreachable": "see whether SESSION_API_URL and the orchestrator answer; live events go on meanwhile",
    "shadow_difference": "the two flows disagree about a file; see which is right before SYNC_MODE=live",
    "snapshot_expired": "a fresh URL is asked for by itself; without SESSION_API_URL start with a new SNAPSHOT_URL",
    "snapshot_rejected": "it is built anew by itself; if it goes on, look at the orchestrator's log for the rule",
    "token_refused": "the session is over or its key was rotated away; start a new session",
    "too_many_open_files": "raise the limit of open files (ulimit -n); the batch is retried by itself",
    "undo_failed": "the file may be of another moment than the rest; it is asked for again, see the disk's health",
}
"""One line for a person at the machine, for every kind."""
