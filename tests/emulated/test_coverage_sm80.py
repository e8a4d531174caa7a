"""Every PTX block of the forward and backward rows for GPUs without wgmma runs in some case.

Rows made for 163 KB of shared memory and for 99 KB run in one process: the emulator changes its GPU from call to call. The
cases' results are held to the oracle in test_forward.py. Rows with lists of blocks are not looked at: their code for packed
sequences, parts of the keys and heads that share a tile is never used (the planner gives them none of these).
"""

from __future__ import annotations

from dataclasses import replace

import cases
import forward_cases
import pytest
import torch

import flash_ext
from flash_ext import _emulator, _host, env

pytestmark = pytest.mark.skipif(env.EMULATE != "sm80", reason="the rows of GPUs without wgmma")
TWO_BYTES = (torch.bfloat16, torch.float16)
DEVICES = (80, 86)  # 163 KB of shared memory a CTA, and 99 KB
DIMS = ((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))
WITH_BACKWARD = (64, 128, 256)  # the other backwards run on these rows
DENSE = tuple(
    case
    for case in (*forward_cases.LONG, *forward_cases.ROWS, *forward_cases.BEYOND_CAUSAL)
    if (case.head_dim, case.head_dim_v or case.head_dim) in DIMS
)
BUDGET = 12 << 20  # bytes: two heads of this size fit the L2 budget of common/scheduler.cuh (32 MB), the third stands alone


def last_group(head_dim: int, head_dim_v: int, kind: dict, dtype: torch.dtype, of: str) -> list[torch.Tensor]:
    """The results of one packed sequence at the beginning of tensors too large for the L2: heads go in groups of two and one.

    of: 'out' or 'gradients', whose groups depend on the rows of k, or of q. Heads share memory; every score is below zero.
    """
    heads, heads_kv, rows = 6, 3, {"q": 17, "k": 40}
    total = (
        {"q": rows["q"], "k": BUDGET // (2 * (head_dim + head_dim_v))} if of == "out" else {"q": BUDGET // (16 * head_dim), "k": 40}
    )
    generator = torch.Generator().manual_seed(head_dim)

    def made(side: str, sign: int, num_heads: int, dim: int = head_dim) -> torch.Tensor:
        values = torch.full((total[side], 1, dim), torch.nan, dtype=dtype)
        values[: rows[side]] = sign * torch.rand(rows[side], 1, dim, generator=generator).to(dtype)
        values = values.expand(-1, num_heads, -1)
        if of == "out" and side == "q":
            values = values.contiguous()  # expanded heads would not share a tile
        return values.requires_grad_(of == "gradients")

    q, k, v = made("q", -1, heads), made("k", 1, heads_kv), made("k", 1, heads_kv, head_dim_v)
    options = {name: value for name, value in kind.items() if name in ("causal", "window_size", "softcap")}
    if "alibi" in kind:
        options |= {"alibi_slopes": torch.rand(heads, generator=generator), "k_bias": -torch.rand(heads_kv, total["k"])}
    ends = [torch.tensor([0, n], dtype=torch.int32) for n in rows.values()]
    out, lse, top = flash_ext.attention_varlen(
        q, k, v, cu_seqlens_q=ends[0], cu_seqlens_k=ends[1], **options, return_lse=True, return_max_logit=True, backend="sm80"
    )
    if of == "out":
        assert (top < 0).all()
        return [out, lse, top]
    return list(torch.autograd.grad(out, (q, k, v), torch.ones_like(out)))


def test_heads_beyond_the_cache_budget(schedule) -> None:
    """The bits of the same sequence in tensors of its own."""
    schedule("plain")
    beyond = BUDGET // (8 * 64), BUDGET // (4 * 64)
    case = cases.packed("last_group", ((9, 40),), beyond, num_heads=3, num_heads_kv=3, head_dim=64, causal=True)
    large = cases.build(case, "cpu", torch.bfloat16)
    small = replace(large, q=large.q[:9], k=large.k[:40], v=large.v[:40], dout=large.dout[:9], dlse=large.dlse[:, :9])
    got, wanted = (cases.run(case, tensors, backend="sm80", deterministic=True) for tensors in (large, small))
    for a, b in ((got.out[:9], wanted.out), (got.lse[:, :9], wanted.lse), (got.dq[:9], wanted.dq)):
        assert torch.equal(a, b)
    assert torch.equal(got.dk[:40], wanted.dk) and torch.equal(got.dv[:40], wanted.dv)
    assert not any(rest.any() for rest in (got.out[9:], got.dq[9:], got.dk[40:], got.dv[40:]))


def run_dense(dtype: torch.dtype) -> None:
    for n, case in enumerate(DENSE):
        tensors = cases.build(case, "cpu", dtype)
        if case.head_dim in WITH_BACKWARD:
            cases.run(case, tensors, backend="sm80", deterministic=n % 2 == 0)
        else:
            cases.call(case, tensors, backend="sm80")


def run_last_groups(dtype: torch.dtype) -> None:
    for head_dim, head_dim_v in DIMS:
        for kind in forward_cases.KINDS:
            last_group(head_dim, head_dim_v, kind, dtype, "out")
            if head_dim in WITH_BACKWARD:
                last_group(head_dim, head_dim_v, kind, dtype, "gradients")


@pytest.mark.timeout(1500)
def test_every_block_of_every_row_is_executed(schedule) -> None:
    _emulator.reset_reports()
    for device in DEVICES:
        schedule("plain", sm=device)
        for dtype in TWO_BYTES:
            run_dense(dtype)
            run_last_groups(dtype)
    reports = [report for report in _emulator.reports() if report.kernel.startswith(("fwd_sm80", "bwd_sm80"))]
    missed = []
    for report in reports:
        ptx = _emulator.kernel_ptx(report.kernel).splitlines()
        for block in report.blocks:
            if not block.executions:
                text = [line.strip() for line in ptx[block.first_line - 1 : block.last_line] if ".loc" not in line]
                missed.append(f"{report.kernel}, PTX lines {block.first_line} to {block.last_line}: {' '.join(text[:4])}")
    assert not missed, "\n".join(missed)
    rows = {row["name"] for row in _host.variants() if row["arch"] == 80 and row["op"] in ("fwd", "bwd")}
    assert {name for name in rows if "_blocks" not in name} == {report.kernel for report in reports}
