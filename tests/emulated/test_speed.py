"""The emulator is fast enough to be used: warp instructions a second, and one call, on one core."""

from __future__ import annotations

import time

import pytest
import torch

import flash_ext
from flash_ext import _emulator, env

pytestmark = pytest.mark.skipif(env.EMULATE != "sm90", reason="measured with the Hopper forward")

# Goals of the project; a busy machine may take this many times longer before the test fails.
SLACK = 3.0


@pytest.mark.parametrize("name,seconds,million_instructions", (("plain", 0.2, 8.0), ("checks", 2.0, 1.0)))
def test_one_call(name: str, seconds: float, million_instructions: float, schedule, capsys) -> None:
    schedule(name, threads=1)
    q, k, v = (torch.randn(1, 1024, 2, 128).bfloat16() for _ in range(3))
    flash_ext.attention(q, k, v, causal=True)  # loads the kernel
    times = []
    for _ in range(3):
        _emulator.reset_reports()
        start = time.process_time()
        flash_ext.attention(q, k, v, causal=True)
        times.append(time.process_time() - start)
    (report,) = _emulator.reports()
    rate = report.warp_instructions / min(times) / 1e6
    with capsys.disabled():
        print(f"\n{name}: {min(times):.3f} s of CPU, {rate:.1f} million warp instructions a second", end=" ")
    assert min(times) < SLACK * seconds
    assert rate > million_instructions / SLACK
