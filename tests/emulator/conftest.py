"""Emulator tests: `mode` runs a test under every kind of schedule, with and without checks."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

MODES = {
    "plain": {"checks": False},
    "checks": {"checks": True},
    "late": {"checks": True, "schedule": "late"},
    "seed1": {"checks": True, "schedule": "adversarial", "seed": 1},
    "seed2": {"checks": False, "schedule": "adversarial", "seed": 2},
}


@pytest.fixture(scope="session", autouse=True)
def built():
    """Builds once; a failure ends the session, not every test by itself."""
    import harness

    import build

    try:
        harness.emulator()
    except build.BuildError as error:
        pytest.exit(f"the emulator does not build:\n{error}", returncode=1)


@pytest.fixture(params=MODES.values(), ids=MODES.keys())
def mode(request):
    return dict(request.param)


@pytest.fixture
def rng():
    import numpy as np

    return np.random.default_rng(0)
