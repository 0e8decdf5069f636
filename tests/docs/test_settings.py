"""docs/settings.md is the code's settings, all of them, and no document names one that does not exist.

After a change of a setting: `python -m tests.docs.test_settings` writes the tables again.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest
from pydantic import BaseModel, HttpUrl
from pydantic_core import PydanticUndefined

from agent.config import Settings as AgentSettings
from agent.config import SnapshotLimits
from orchestrator_stub.config import Settings as OrchestratorSettings
from orchestrator_stub.config import StandInSettings
from tests.docs.reading import DOCUMENTS, ROOT, blocks, spans

DOC = ROOT / "docs" / "settings.md"
END = "<!-- end of table -->"
ELSEWHERE = frozenset(
    {
        "DEV_ENV_", "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_SERVICE_NAME", "OTEL_EXPORTER_OTLP_TIMEOUT",
        "OTEL_EXPORTER_OTLP_HEADERS", "OTEL_EXPORTER_OTLP_TRACES_HEADERS", "NO_COLOR",
        "MALLOC_ARENA_MAX", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_",
    }
)  # fmt: skip
"""Read by the agent from its environment, and no field of its settings; documented below the table."""
NOT_OURS = frozenset(
    {
        # of the tests and the image
        "PREVIEW_TEST_DATABASE_URL", "IMAGE_BASE", "IMAGE_ENGINE", "IMAGE_PLATFORM", "TEMPLATE",
        # of a document's own example
        "SERVICE_KEY", "DEV_ENV_NAME", "NAME",
        "API", "AUTH", "PROJECT", "SESSION", "PREVIEW", "DOOR", "PROMETHEUS", "ENGINE",
        # of the configurations in docs/scale/nats
        "NATS_NAME", "NATS_STORE", "NATS_HUB", "NATS_ROUTES",
        # the system's
        "CAP_SYS_PTRACE", "CAP_PERFMON", "CAP_SYS_RESOURCE", "PR_SET_DUMPABLE", "TCP_NODELAY", "IPPROTO_TCP",
        "LD_PRELOAD", "NODE_OPTIONS", "SSL_CERT_FILE", "GCONV_PATH", "GLIBC_TUNABLES", "DAC_OVERRIDE",
    }
)  # fmt: skip
"""Words in capitals that a document may use, and that are no setting."""


def described(*sources: tuple[Path, str]) -> Iterator[tuple[str, str, str]]:
    """Each field as (section, name, docstring), from class bodies in source order; Python keeps none of the three."""
    for path, name in sources:
        text = path.read_text()
        sections = [
            (n, line.strip(" #-"))
            for n, line in enumerate(text.splitlines(), 1)
            if line.startswith("    # ---")
        ]
        [body] = [n.body for n in ast.parse(text).body if isinstance(n, ast.ClassDef) and n.name == name]
        for at, node in enumerate(body):
            if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
                continue
            after = body[at + 1] if at + 1 < len(body) else None
            doc = (
                after.value.value
                if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                else ""
            )
            section = [title for line, title in sections if line < node.lineno]
            yield (
                section[-1] if section else "the bounds of a snapshot",
                node.target.id,
                " ".join(str(doc).split()),
            )


def own(fields: Iterable[tuple[str, str, str]]) -> Iterator[tuple[str, str, str]]:
    """The fields of a class and what it is made from, by section; of one that it says anew, what it says itself."""
    said = {name: (section, name, doc) for section, name, doc in fields}.values()
    sections = list(dict.fromkeys(section for section, _, _ in said))
    return iter(sorted(said, key=lambda field: sections.index(field[0])))


def defaults(settings: type[BaseModel]) -> Mapping[str, object]:
    return {name: field.default for name, field in settings.model_fields.items()}


def shown(default: object) -> str:
    """A default, as one would write it into the environment."""
    if default is PydanticUndefined:
        return "required"
    if default is None or default == ():
        return "unset"
    if isinstance(default, Path) and default.is_absolute() and default.is_relative_to(ROOT):
        return "the example"
    if isinstance(default, tuple):
        return f"`{' '.join(map(str, default))}`"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    if isinstance(default, float):
        return f"`{default:g}`"
    return f"`{str(default).rstrip('/') if isinstance(default, HttpUrl) else default}`"


AGENT = ROOT / "agent" / "config.py"
ORCHESTRATOR = ROOT / "orchestrator_stub" / "config.py"
TABLES = {
    "agent": lambda: table(
        described((AGENT, "Settings"), (AGENT, "SnapshotLimits")), defaults(AgentSettings)
    ),
    "orchestrator": lambda: table(
        described(*((ORCHESTRATOR, f"{part}Settings") for part in ("Process", "Relay", "Door", ""))),
        defaults(OrchestratorSettings),
    ),
    "stand-in": lambda: table(
        own(described(*((ORCHESTRATOR, f"{part}Settings") for part in ("Process", "StandIn")))),
        defaults(StandInSettings),
    ),
}


def table(fields: Iterator[tuple[str, str, str]], default_of: Mapping[str, object]) -> str:
    """One table, a row in bold for each section. Fails for a field without a reason."""
    lines = ["| variable | default | meaning, reason |", "|---|---|---|"]
    before = None
    for section, name, doc in fields:
        assert doc, f"{name} has no docstring: say what it is and why the default is that"
        if section != before:
            lines.append(f"| **{section}** | | |")
            before = section
        meaning = doc.replace("|", "\\|")
        lines.append(f"| `{name.upper()}` | {shown(default_of[name])} | {meaning} |")
    return "\n".join(lines) + "\n"


def with_tables(text: str) -> str:
    for name, make in TABLES.items():
        begin = f"<!-- the {name}'s: made by tests/docs/test_settings.py -->\n"
        head, rest = text.split(begin)
        text = head + begin + make() + END + rest.split(END, 1)[1]
    return text


def test_the_tables_are_the_codes() -> None:
    assert with_tables(DOC.read_text()) == DOC.read_text(), "python -m tests.docs.test_settings"


def test_the_tables_have_every_setting() -> None:
    names = {code.text for code in spans(DOC)}
    assert {name.upper() for name in SnapshotLimits.model_fields} <= names
    assert {name.upper() for name in AgentSettings.model_fields} <= names
    assert {name.upper() for name in OrchestratorSettings.model_fields} <= names
    assert {name.upper() for name in StandInSettings.model_fields} <= names
    assert {name.rstrip("_") for name in ELSEWHERE} <= {name.rstrip("_*") for name in names}


MAKE = frozenset(re.findall(r"\$\(([A-Z_]+)\)", (ROOT / "Makefile").read_text()))
COMPOSE = frozenset(re.findall(r"(?m)^([A-Z_]+)=", (ROOT / "deploy" / ".env.example").read_text()))
FIELDS = (*AgentSettings.model_fields, *OrchestratorSettings.model_fields, *StandInSettings.model_fields)
KNOWN = {name.upper() for name in FIELDS} | COMPOSE | ELSEWHERE | MAKE
VARIABLE = re.compile(r"(?<![\w./-])([A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+_?)(?![\w.])|(?<![\w$./-])([A-Z_]{3,})=")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_variable_that_is_named_exists(path: Path) -> None:
    lost = []
    for code in [*spans(path), *blocks(path)]:
        if code.lang in ("sql", "text", ""):
            continue
        for found in VARIABLE.findall(code.text):
            name = found[0] or found[1]
            if name not in KNOWN and name not in NOT_OURS:
                lost.append(f"{code.place}: {name}")
    assert lost == []


def test_no_excuse_is_left_over() -> None:
    text = "".join(path.read_text() for path in DOCUMENTS)
    assert [name for name in NOT_OURS if name not in text] == []


if __name__ == "__main__":
    DOC.write_text(with_tables(DOC.read_text()))
