"""How long the property tests run: `HYPOTHESIS_PROFILE=nightly` (make test-nightly) runs many more examples."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"


def examples(normal: int, nightly: int) -> settings:
    """Settings with that many examples; a failure prints the blob that reproduces it."""
    return settings(
        max_examples=nightly if NIGHTLY else normal,
        deadline=None,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
