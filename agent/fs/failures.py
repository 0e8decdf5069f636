"""What a system error says: that one path is unusable here, or that the environment fails.

The first is a problem of that path, and the rest of a batch lands; the second undoes the batch.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from contextlib import suppress

from agent.core.model import Problem, RelPath
from agent.core.problems import ProblemKind

UNUSABLE = {
    errno.ENAMETOOLONG: "name_too_long",
    errno.EINVAL: "name_invalid",
    errno.EILSEQ: "name_invalid",
    errno.ENOTDIR: "not_a_directory",
    errno.ELOOP: "symlink",
    errno.EISDIR: "directory_in_the_way",
    errno.ENOTEMPTY: "directory_in_the_way",
    errno.EEXIST: "directory_in_the_way",
    errno.EBUSY: "mount_point",
    errno.EXDEV: "other_file_system",
}
"""What a system error says about this path alone. Every other error is the environment's."""

ENVIRONMENT: Mapping[int, ProblemKind] = {
    errno.ENOSPC: "disk_full",
    errno.EDQUOT: "disk_full",
    errno.EACCES: "permission_denied",
    errno.EPERM: "permission_denied",
    errno.EROFS: "read_only",
    errno.EMFILE: "too_many_open_files",
    errno.ENFILE: "too_many_open_files",
}


def environment_problem(error: OSError, path: RelPath | None, staging: int) -> Problem:
    """A failure that is not this path's own, typed: what an operator has to look at."""
    kind = ENVIRONMENT.get(error.errno or 0, "io_error")
    rule = errno.errorcode.get(error.errno or 0, "unknown")
    if error.errno == errno.ENOSPC:
        with suppress(OSError):
            space = os.fstatvfs(staging)
            rule = "inodes" if space.f_files and not space.f_ffree else "space"
    where = f" {path}" if path else ""
    return Problem(kind, f"cannot change{where}: {error.strerror or error}", path, rule)
