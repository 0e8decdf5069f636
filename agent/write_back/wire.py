"""The offer and its answer as they travel (`POST …/changes`). Pure: objects in, objects out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from agent.core.errors import MalformedMessage
from agent.write_back.states import Answered, Output

OUTCOMES: Final = frozenset({"applied", "same", "proposed", "conflict", "refused"})
LONGEST_RULE: Final = 40


def offer(
    offer_id: str, generation: int, outputs: Sequence[Output], contents: Mapping[int, str | None]
) -> dict[str, object]:
    """Write an offer. `contents`: each output's text by its number; all outputs are of one epoch."""
    return {
        "offer_id": offer_id,
        "epoch": outputs[0].epoch or "",
        "generation": generation,
        "changes": [
            {
                "action": "delete" if each.digest is None else "upsert",
                "file_path": each.path,
                "content": contents[each.number],
                "executable": each.executable,
                "base_version": each.base,
            }
            for each in outputs
        ],
    }


def read_answer(obj: object, outputs: Sequence[Output]) -> list[tuple[Answered, str | None]]:
    """Read the answer to an offer: of each output what became of it, and the conflict's name.

    Raises `MalformedMessage` when it does not speak of these outputs in their order.
    """
    results = obj.get("results") if isinstance(obj, dict) else None
    if not isinstance(results, list) or len(results) != len(outputs):
        raise MalformedMessage("changes answer", "results are not as many as were offered")
    return [_result(result, output) for result, output in zip(results, outputs, strict=True)]


def _result(result: object, output: Output) -> tuple[Answered, str | None]:
    if not isinstance(result, dict) or result.get("file_path") != output.path:
        raise MalformedMessage("changes answer", "a result is of another path")
    outcome, rule, kept = result.get("outcome"), result.get("rule"), result.get("kept_id")
    if outcome not in OUTCOMES:
        raise MalformedMessage("changes answer", "an outcome is none that is known")
    version = _number(result.get("version"))
    if outcome in ("applied", "same") and version is None:
        raise MalformedMessage("changes answer", "what was taken has no version")
    wait = result.get("retry_after")
    answer = Answered(
        outcome,
        version,
        _number(result.get("revision")),
        rule[:LONGEST_RULE] if isinstance(rule, str) else None,
        float(wait) if isinstance(wait, int | float) and 0 <= wait < 86_400 else None,
    )
    return answer, kept[:100] if isinstance(kept, str) else None


def _number(value: object) -> int | None:
    return value if type(value) is int and 0 <= value < 2**63 else None
