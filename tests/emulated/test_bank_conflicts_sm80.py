"""Shared memory of the kernels for GPUs without wgmma: no request takes more wavefronts than its bytes need."""

from __future__ import annotations

import sys
from pathlib import Path

import kvcache_cases
import pytest
import torch

import flash_ext
from flash_ext import _emulator, _host, env

sys.path.append(str(Path(__file__).resolve().parents[1] / "emulator"))

import report

pytestmark = pytest.mark.skipif(
    env.EMULATE != "sm80" or not any(row["op"] == "fwd" and row["arch"] == 80 for row in _host.variants()),
    reason="the rows of GPUs without wgmma",
)


def conflicts(prefix: str) -> dict[str, int]:
    """Lost wavefronts by opcode, of the kernels whose name begins so; at least one has run."""
    reports = [r for r in _emulator.reports() if r.kernel.startswith(prefix)]
    assert reports and all(sum(s.shared_requests for s in r.instructions) for r in reports)
    lost: dict[str, int] = {}
    for each in reports:
        for stats in each.instructions:
            if wavefronts := report.lost_wavefronts([stats]):
                key = f"{each.kernel} {stats.opcode} at line {stats.line}"
                lost[key] = lost.get(key, 0) + wavefronts
    return lost


@pytest.mark.parametrize("device", (80, 86))
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("head_dim", (64, 128, 256))
def test_forward_and_backward(head_dim: int, causal: bool, device: int, schedule) -> None:
    schedule("plain", profile=True, sm=device)
    q, k, v = (torch.randn(1, rows, 2, head_dim).bfloat16().requires_grad_() for rows in (150, 300, 300))
    _emulator.reset_reports()
    flash_ext.attention(q, k, v, causal=causal, backend="sm80").sum().backward()
    assert conflicts("fwd_sm80") == {}
    assert conflicts("bwd_sm80") == {}


@pytest.mark.parametrize("page_size", (None, 1, 16))
@pytest.mark.parametrize("head_dim", (64, 128, 256))
def test_caches(head_dim: int, page_size: int | None, schedule) -> None:
    schedule("plain", profile=True)
    case = kvcache_cases.Case("banks", (300, 77), seqlen_q=3, num_heads=8, head_dim=head_dim, page_size=page_size)
    _emulator.reset_reports()
    flash_ext.attention_with_kvcache(**kvcache_cases.build(case, "cpu", torch.bfloat16), num_splits=1)
    assert conflicts("fwd_cache_sm80") == {}
