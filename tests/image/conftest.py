"""The engine and the image, built once for all of these tests."""

from __future__ import annotations

import os

import pytest

from tests.image.engine import TAG, Engine, NoEngine, find


@pytest.fixture(scope="session")
def engine() -> Engine:
    """This machine's engine, with the image built. Skips, saying why, where there is none."""
    if os.environ.get("PREVIEW_TEST_IMAGE") != "build":
        pytest.skip("`make test-image` builds and runs the image")
    try:
        found = find()
    except NoEngine as error:
        pytest.skip(str(error))
    found.build(TAG)
    return found
