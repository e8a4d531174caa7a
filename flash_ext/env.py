"""Environment variables that change how flash_ext behaves, and the warning that one of them hardens.

| variable | read | meaning |
|---|---|---|
| FLASH_EXT_STRICT | at each fallback | 1: a GPU call that no compiled kernel covers raises FallbackWarning as an error |
| FLASH_EXT_BWD_PAIRS | at each backward | auto, never, always: whether pairs of CTAs run it where both kinds of kernels cover it |
| FLASH_EXT_EMULATE | at import | sm80, sm86, sm89, sm90, sm120: run calls on CPU tensors in the emulator of such a GPU |
| FLASH_EXT_EMULATE_SMS | at import | the emulated GPU's number of SMs, default 4 |

The emulator reads more variables (seed, schedule, checks, FP8 sums): docs/debugging.md.

Build-time variables stand in setup.py.
"""

from __future__ import annotations

import os
import warnings


class FallbackWarning(UserWarning):
    """A call on a GPU runs on the reference because no compiled kernel covers it; raised once for each reason."""


EMULATE = os.environ.get("FLASH_EXT_EMULATE", "")
EMULATE_SMS = os.environ.get("FLASH_EXT_EMULATE_SMS", "4")


def bwd_pairs() -> str:
    """FLASH_EXT_BWD_PAIRS as it stands now, unchecked: the planner does that."""
    return os.environ.get("FLASH_EXT_BWD_PAIRS", "auto")


def _check_emulator_variables() -> None:
    """The emulator reads its variables in C++ and could only stop the process: say it here, as an exception."""
    if not EMULATE:
        return
    choices = {
        "FLASH_EXT_EMULATE": ("sm80", "sm86", "sm89", "sm90", "sm120"),
        "FLASH_EXT_EMULATE_SCHEDULE": ("early", "late", "random", "adversarial"),
        "FLASH_EXT_EMULATE_CHECKS": ("0", "1"),
    }
    for name, allowed in choices.items():
        value = os.environ.get(name, allowed[0])
        if value not in allowed:
            raise ValueError(f"{name} must be {', '.join(allowed[:-1])} or {allowed[-1]}, got {value!r}")
    numbers = {
        "FLASH_EXT_EMULATE_SMS": (1, 65535),
        "FLASH_EXT_EMULATE_THREADS": (1, 1024),
        "FLASH_EXT_EMULATE_SEED": (0, 2**63 - 1),
        "FLASH_EXT_EMULATE_FP8_BITS": (0, 13),
    }
    for name, (smallest, largest) in numbers.items():
        value = os.environ.get(name, str(smallest))
        if not (value.isascii() and value.isdecimal() and smallest <= int(value) <= largest):
            raise ValueError(f"{name} must be a number from {smallest} to {largest}, got {value!r}")


_check_emulator_variables()

_reasons_already_given: set[str] = set()


def warn_of_fallback(op: str, reason: str) -> None:
    """Say once for each reason why a GPU call is slow; with FLASH_EXT_STRICT=1 raise it every time."""
    message = f"{op} runs on the reference backend: {reason}"
    if os.environ.get("FLASH_EXT_STRICT") == "1":
        raise FallbackWarning(f"{message} (an error because FLASH_EXT_STRICT=1)")
    if message not in _reasons_already_given:
        _reasons_already_given.add(message)
        warnings.warn(message, FallbackWarning, stacklevel=2)
