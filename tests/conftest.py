"""Fixtures that more than one directory of tests uses."""

from __future__ import annotations

from tests.profiles import examples

examples(100, 1_000).register_profile("project", examples(100, 1_000))
examples(100, 1_000).load_profile("project")
