"""The backward's first step: delta = rowsum(dout * out) - dlse and a safe lse in base 2. The kernels' promise, on the CPU."""

from __future__ import annotations

import math
from pathlib import Path

import bwd_preprocess_checks as checks
import pytest
import torch

import flash_ext  # noqa: F401  registers the op


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=str)
@pytest.mark.parametrize("name", checks.CASES)
def test_case(name: str, dtype: torch.dtype) -> None:
    checks.check(checks.CASES[name], "cpu", dtype)


def test_the_check_sees_an_error() -> None:
    made = checks.build(checks.CASES["rows_129"], "cpu", torch.float32)
    delta, lse_log2 = torch.ops.flash_ext.bwd_preprocess(*made)
    checks.compare(delta, lse_log2, *made)
    for wrong in (
        (delta + 1e-3, lse_log2),
        (delta.roll(1, 2), lse_log2),
        (delta, lse_log2 * math.log(2)),
        (delta, lse_log2.nan_to_num()),
    ):
        with pytest.raises(AssertionError):
            checks.compare(*wrong, *made)


def test_alignment_matches_the_kernels(root: Path) -> None:
    from flash_ext.ops import STATS_ROW_ALIGNMENT

    assert f"kStatsRowAlignment = {STATS_ROW_ALIGNMENT};" in (root / "csrc/common/params.h").read_text()
