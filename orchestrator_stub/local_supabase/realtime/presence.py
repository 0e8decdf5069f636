"""PURE: tracks who is present on a topic, as Phoenix does for one node."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

Metas = dict[str, dict[str, list[dict[str, Any]]]]
"""`{key: {"metas": [{"phx_ref": …, …}]}}`, as clients read it."""


@dataclass(slots=True)
class Presence:
    """The tracked members of one topic: at most one meta for an owner under a key."""

    _metas: dict[tuple[str, Hashable], dict[str, Any]] = field(default_factory=dict)
    _count: int = 0

    def __bool__(self) -> bool:
        return bool(self._metas)

    def state(self) -> Metas:
        whole: Metas = {}
        for (key, _), meta in self._metas.items():
            whole.setdefault(key, {"metas": []})["metas"].append(meta)
        return whole

    def track(self, owner: Hashable, key: str, payload: dict[str, Any]) -> dict[str, Metas] | None:
        """The diff that tells everybody, or None when nothing changed."""
        before = self._metas.get((key, owner))
        if before is not None and {k: v for k, v in before.items() if not k.startswith("phx_ref")} == payload:
            return None
        self._count += 1
        meta = {**payload, "phx_ref": f"local-{self._count}"}
        leaves: Metas = {}
        if before is not None:
            meta["phx_ref_prev"] = before["phx_ref"]
            leaves = {key: {"metas": [before]}}
        self._metas[(key, owner)] = meta
        return {"joins": {key: {"metas": [meta]}}, "leaves": leaves}

    def untrack(self, owner: Hashable) -> dict[str, Metas] | None:
        """The diff of everything `owner` had tracked, or None when that was nothing."""
        gone = [at for at in self._metas if at[1] is owner]
        if not gone:
            return None
        leaves: Metas = {}
        for at in gone:
            leaves.setdefault(at[0], {"metas": []})["metas"].append(self._metas.pop(at))
        return {"joins": {}, "leaves": leaves}
