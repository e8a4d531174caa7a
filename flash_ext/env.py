"""Environment variables that change how flash_ext behaves, and the warning that one of them hardens.

| variable | read | meaning |
|---|---|---|
| FLASH_EXT_STRICT | at each fallback | 1: a GPU call that no compiled kernel covers raises FallbackWarning as an error |
| FLASH_EXT_EMULATE | at import | sm80, sm86, sm89, sm90, sm120: run calls on CPU tensors in the emulator of such a GPU |
| FLASH_EXT_EMULATE_SMS | at import | the emulated GPU's number of SMs, default 4 |

The emulator reads more variables (seed, schedule, checks): docs/debugging.md.

Build-time variables stand in setup.py.
"""

from __future__ import annotations

import os
import warnings


class FallbackWarning(UserWarning):
    """A call on a GPU runs on the reference because no compiled kernel covers it; raised once for each reason."""


EMULATE = os.environ.get("FLASH_EXT_EMULATE", "")
EMULATE_SMS = os.environ.get("FLASH_EXT_EMULATE_SMS", "4")

if EMULATE and EMULATE not in ("sm80", "sm86", "sm89", "sm90", "sm120"):
    raise ValueError(f"FLASH_EXT_EMULATE must be sm80, sm86, sm89, sm90 or sm120, got {EMULATE!r}")
if not EMULATE_SMS.isdigit() or int(EMULATE_SMS) == 0:
    raise ValueError(f"FLASH_EXT_EMULATE_SMS must be a number of SMs above 0, got {EMULATE_SMS!r}")

_reasons_already_given: set[str] = set()


def warn_of_fallback(op: str, reason: str) -> None:
    """Say once for each reason why a GPU call is slow; with FLASH_EXT_STRICT=1 raise it every time."""
    message = f"{op} runs on the reference backend: {reason}"
    if os.environ.get("FLASH_EXT_STRICT") == "1":
        raise FallbackWarning(f"{message} (an error because FLASH_EXT_STRICT=1)")
    if message not in _reasons_already_given:
        _reasons_already_given.add(message)
        warnings.warn(message, FallbackWarning, stacklevel=2)
