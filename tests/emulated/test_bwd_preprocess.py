"""The backward's first step, emulated, against its definition."""

from __future__ import annotations

import pytest
import torch

import flash_ext
from flash_ext import _emulator, env

KERNEL_ARCH = "sm90" if env.EMULATE == "sm90" else "sm80"


@pytest.mark.parametrize("with_dlse,name,num_sms", ((False, "checks", 4), (True, "late", 1), (True, "adversarial1", 3)))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=("bf16", "fp16"))
@pytest.mark.parametrize("seqlen_q,head_dim_v", ((1, 8), (127, 64), (128, 72), (129, 128), (300, 136), (40, 256)))
def test_statistics(seqlen_q: int, head_dim_v: int, dtype: torch.dtype, with_dlse: bool, name: str, num_sms: int, schedule) -> None:
    schedule(name, sms=num_sms)
    generator = torch.Generator().manual_seed(seqlen_q)
    batch, num_heads = 2, 3
    out = torch.randn(batch, seqlen_q, num_heads, head_dim_v, generator=generator).to(dtype)
    dout = torch.randn(batch, num_heads, seqlen_q, head_dim_v, generator=generator).to(dtype).transpose(1, 2)
    lse = torch.randn(batch, num_heads, seqlen_q, generator=generator)
    lse[1, 2, 0] = -torch.inf
    dlse = torch.randn(batch, seqlen_q, num_heads, generator=generator).transpose(1, 2) if with_dlse else None
    if dlse is not None:
        dlse[1, 2, 0] = torch.nan  # the gradient of -inf means nothing and must not show

    _emulator.reset_reports()
    delta, lse_log2 = torch.ops.flash_ext.bwd_preprocess(out, dout, lse, dlse)
    (report,) = _emulator.reports()
    covered = next(d for d in (64, 128, 256) if d >= head_dim_v)
    assert report.kernel == f"bwd_preprocess_{KERNEL_ARCH}_{'bf16' if dtype == torch.bfloat16 else 'fp16'}_d{covered}"

    expected = (out.double() * dout.double()).sum(-1).transpose(1, 2) - (0 if dlse is None else dlse.double())
    expected = expected.masked_fill(lse.isinf(), 0.0)
    rows = -(-seqlen_q // 128) * 128
    assert delta.shape == lse_log2.shape == (batch, num_heads, rows)
    torch.testing.assert_close(delta[..., :seqlen_q].double(), expected, rtol=1e-5, atol=1e-5)
    assert (delta[..., seqlen_q:] == 0).all() and (lse_log2[..., seqlen_q:] == torch.inf).all()
    expected_lse = (lse.double() / torch.log(torch.tensor(2.0, dtype=torch.float64))).masked_fill(lse.isinf(), 0.0)
    torch.testing.assert_close(lse_log2[..., :seqlen_q].double(), expected_lse, rtol=1e-6, atol=1e-6)


def test_unaligned_rows_are_copied(schedule) -> None:
    schedule("checks")
    generator = torch.Generator().manual_seed(0)
    out, dout = (torch.randn(1, 30, 2, 64, generator=generator).bfloat16() for _ in range(2))
    lse = torch.randn(1, 2, 30, generator=generator)
    odd = torch.empty(1, 30, 2, 65, dtype=torch.bfloat16)[..., :64].copy_(out)
    for a, b in zip(
        torch.ops.flash_ext.bwd_preprocess(odd, dout, lse, None),
        torch.ops.flash_ext.bwd_preprocess(out, dout, lse, None),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_every_block_of_every_row_is_executed(schedule) -> None:
    schedule("plain")
    _emulator.reset_reports()
    for dtype in (torch.bfloat16, torch.float16):
        for head_dim_v in (64, 128, 256):
            out = torch.ones(1, 3, 1, head_dim_v, dtype=dtype)
            lse = torch.tensor([[[0.0, -torch.inf, 1.0]]])
            for dlse in (None, torch.zeros(1, 1, 3)):
                torch.ops.flash_ext.bwd_preprocess(out, out, lse, dlse)
            # Packed, as the backward calls it: an empty sequence, rows that are not used, rows that are skipped; one alone.
            ends, rows = torch.tensor([0, 3, 3, 150], dtype=torch.int32), torch.tensor([2, 0, 140], dtype=torch.int32)
            q, k, v = (torch.ones(150, 1, head_dim_v, dtype=dtype, requires_grad=True) for _ in range(3))
            unseen = {"seqused_q": rows, "leftpad_q": torch.tensor([1, 0, 5], dtype=torch.int32)}
            for boundaries, options in ((ends, {}), (ends, unseen), (ends[::3].contiguous(), {})):
                packed = flash_ext.attention_varlen(
                    q, k, v, cu_seqlens_q=boundaries, cu_seqlens_k=boundaries, causal=True, **options
                )
                packed.sum().backward()
    reports = [r for r in _emulator.reports() if r.kernel.startswith("bwd_preprocess")]
    assert len(reports) == 6
    assert [(r.kernel, b.first_line) for r in reports for b in r.blocks if not b.executions] == []
