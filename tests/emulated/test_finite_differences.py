"""The kernels' gradients against differences of the kernels' forward."""

from __future__ import annotations

import finite_differences
import pytest
import torch
from finite_differences import Setting

from flash_ext import _emulator, env

SETTINGS = {
    "d64": Setting(torch.float16),
    "d128_causal": Setting(torch.float16, causal=True, head_dim=128),
    "d128_softcap": Setting(torch.float16, softcap=3.0, head_dim=128),
    "d256_softcap_causal": Setting(torch.float16, softcap=3.0, causal=True, head_dim=256),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(("of", "name"), finite_differences.DERIVATIVES)
def test_kernels(of: str, name: str, setting: str, schedule) -> None:
    """float16, whose results are rounded to one part in 2048: differences of them are right to a part in a hundred."""
    schedule("plain")
    _emulator.reset_reports()
    finite_differences.check(SETTINGS[setting], of, name, step=1 / 16, tolerance=0.01)
    ran = {report.kernel for report in _emulator.reports()}
    group = "sm90" if env.EMULATE == "sm90" else "sm80"
    for prefix in (f"fwd_{group}", f"bwd_sinks_{group}" if name == "sinks" else f"bwd_{group}"):
        assert any(kernel.startswith(prefix) for kernel in ran), (prefix, ran)
