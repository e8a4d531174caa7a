"""Tests of the compiled kernels in the emulator: FLASH_EXT_EMULATE=sm90 pytest tests/emulated (make test does it).

flash_ext reads the variable at import, so these tests run in a process of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from flash_ext import _emulator

# How warps interleave and how late asynchronous work lands; every schedule must give the same bits.
SCHEDULES = {
    "plain": {"checks": False, "schedule": "early", "seed": 0},
    "checks": {"checks": True, "schedule": "early", "seed": 0},
    "late": {"checks": True, "schedule": "late", "seed": 0},
    "adversarial1": {"checks": True, "schedule": "adversarial", "seed": 1},
    "adversarial2": {"checks": False, "schedule": "adversarial", "seed": 2},
    "adversarial3": {"checks": False, "schedule": "adversarial", "seed": 3},
}


@pytest.fixture
def schedule() -> Iterator[Callable[..., None]]:
    """schedule(name, **options) sets how the emulator runs from here to the end of the test."""
    before = _emulator.get_options()

    def use(name: str, **options: object) -> None:
        changed = _emulator.Options(before)
        for field, value in {**SCHEDULES[name], **options}.items():
            setattr(changed, field, value)
        _emulator.set_options(changed)

    yield use
    _emulator.set_options(before)
