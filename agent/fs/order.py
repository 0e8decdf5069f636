"""In which order the operations of a batch are done. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from agent.core.model import Operation, RelPath, Write, parents

MANY = 1_000
"""Operations from which on they are done directory by directory, so that each directory is opened once: half the
processor time for 20,000 files in 1,261 directories that stand there already. Smaller batches keep their order, in
which an author may have meant the imported file to be there before the importing one."""


def in_order(operations: Sequence[Operation]) -> Sequence[Operation]:
    """The order in which a batch is done: what stands in the way goes first, what is merely gone goes last.

    Compared without case, so that a change of case on a case-blind file system is a removal and then a write.
    """
    if len(operations) == 1:
        return operations
    if len(operations) >= MANY:
        operations = sorted(operations, key=lambda operation: operation.path.rpartition("/")[0])
    if all(isinstance(operation, Write) for operation in operations):
        return operations
    written = {o.path.casefold() for o in operations if isinstance(o, Write)}
    if not written:
        return operations
    above = {parent for path in written for parent in parents(RelPath(path))}
    first: list[Operation] = []
    writes: list[Operation] = []
    last: list[Operation] = []
    for operation in operations:
        key = RelPath(operation.path.casefold())
        if isinstance(operation, Write):
            writes.append(operation)
        elif key in written or key in above or any(parent in written for parent in parents(key)):
            first.append(operation)
        else:
            last.append(operation)
    return first + writes + last
