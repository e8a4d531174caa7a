"""Gradients on a GPU against differences of the forward there."""

from __future__ import annotations

import finite_differences
import pytest
import torch
from finite_differences import Setting

pytestmark = pytest.mark.gpu
TOLERANCES = {torch.float16: 0.01, torch.bfloat16: 0.05}


@pytest.mark.parametrize("head_dim", (64, 96, 128, 192, 256))
@pytest.mark.parametrize("kind", ({}, {"causal": True}, {"softcap": 3.0}), ids=str)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("of", "name"), finite_differences.DERIVATIVES)
def test_kernels(of: str, name: str, dtype: torch.dtype, kind: dict, head_dim: int) -> None:
    setting = Setting(dtype, head_dim=head_dim, device="cuda", **kind)
    finite_differences.check(setting, of, name, step=1 / 16, tolerance=TOLERANCES[dtype])
