"""The reference's gradients in float64, against differences of its forward."""

from __future__ import annotations

import finite_differences
import pytest
import torch
from finite_differences import Setting

KINDS = {"full": {}, "causal": {"causal": True}, "softcap": {"softcap": 3.0}}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("of", "name"), finite_differences.DERIVATIVES)
def test_reference(of: str, name: str, kind: str) -> None:
    finite_differences.check(Setting(torch.float64, **KINDS[kind]), of, name, step=1e-5, tolerance=1e-6)
