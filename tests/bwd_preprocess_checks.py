"""Cases of flash_ext::bwd_preprocess and their check, for the CPU, a GPU and the emulator."""

from __future__ import annotations

from dataclasses import dataclass

import cases
import torch
from torch import Tensor

ALIGNMENT = 128


@dataclass(frozen=True)
class Case:
    batch: int
    seqlen_q: int
    num_heads: int
    head_dim_v: int
    layout: str = "contiguous"  # of out and dout: tests/cases.py
    dlse: str = "transposed"  # or 'contiguous', 'expanded' (one value: strides 0), 'none'
    hidden_rows: int = 0  # rows at the start whose lse is -inf


CASES = {
    "one": Case(1, 1, 1, 8),
    **{f"rows_{n}": Case(2, n, 3, 64) for n in (127, 128, 129, 300)},
    **{f"dim_{d}": Case(2, 37, 2, d) for d in (8, 16, 56, 64, 72, 128, 136, 192, 256)},
    "no_dlse": Case(2, 50, 4, 128, dlse="none"),
    "contiguous_dlse": Case(2, 50, 4, 128, dlse="contiguous"),
    "expanded_dlse": Case(2, 50, 4, 128, dlse="expanded"),
    "hidden": Case(2, 140, 2, 64, hidden_rows=17),
    "all_hidden": Case(1, 9, 2, 64, hidden_rows=9),
    "no_rows": Case(2, 0, 3, 64),
    "no_batch": Case(0, 9, 3, 64),
    **{layout: Case(2, 70, 4, 64, layout=layout) for layout in cases.LAYOUTS[1:]},
}


def build(case: Case, device: str | torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(out, dout, lse, dlse); the rows that are hidden hold what the forward gives them: out = 0, lse = -inf."""
    generator = torch.Generator().manual_seed(case.seqlen_q * 1000 + case.head_dim_v)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    shape = (case.batch, case.seqlen_q, case.num_heads, case.head_dim_v)
    out, dout, lse = normal(*shape), normal(*shape), 5 * normal(case.batch, case.num_heads, case.seqlen_q)
    out[:, : case.hidden_rows], lse[..., : case.hidden_rows] = 0.0, -torch.inf
    out, dout = (cases.lay_out(t.to(dtype).to(device), case.layout) for t in (out, dout))
    dlse = {
        "none": None,
        "contiguous": normal(*lse.shape).to(device),
        "transposed": normal(case.batch, case.seqlen_q, case.num_heads).to(device).transpose(1, 2),
        "expanded": torch.full((), 0.75, device=device).expand(lse.shape),
    }[case.dlse]
    if case.dlse == "transposed":
        dlse[..., : case.hidden_rows] = torch.nan  # the gradient of -inf means nothing and must not show
    return out, dout, lse.to(device), dlse


def compare(delta: Tensor, lse_log2: Tensor, out: Tensor, dout: Tensor, lse: Tensor, dlse: Tensor | None) -> None:
    """Against float64: float32 rounding of the sum's terms. Hidden rows exactly (0, 0), padding exactly (0, inf)."""
    seqlen_q = lse.shape[-1]
    padded = -(-seqlen_q // ALIGNMENT) * ALIGNMENT
    for result in (delta, lse_log2):
        assert result.shape == (*lse.shape[:2], padded) and result.dtype == torch.float32 and result.is_contiguous()
    out, dout, lse = (t.double().cpu() for t in (out, dout, lse))
    products = (out * dout).transpose(1, 2)
    hidden = lse == -torch.inf
    gradient = torch.zeros_like(lse) if dlse is None else dlse.double().cpu().masked_fill(hidden, 0.0)
    expected = (products.sum(-1) - gradient).masked_fill(hidden, 0.0)
    allowed = 2e-6 * (products.abs().sum(-1) + gradient.abs() + 1e-30)
    delta, lse_log2 = delta.double().cpu(), lse_log2.double().cpu()
    assert not delta.isnan().any() and not lse_log2.isnan().any()
    assert ((delta[..., :seqlen_q] - expected).abs() <= allowed).all()
    assert (delta[..., :seqlen_q][hidden] == 0).all() and (lse_log2[..., :seqlen_q][hidden] == 0).all()
    base_2 = (lse / torch.log(torch.tensor(2.0, dtype=torch.float64))).masked_fill(hidden, 0.0)
    torch.testing.assert_close(lse_log2[..., :seqlen_q], base_2, rtol=2e-7, atol=1e-6)
    assert (delta[..., seqlen_q:] == 0).all() and (lse_log2[..., seqlen_q:] == torch.inf).all()


def check(case: Case, device: str | torch.device, dtype: torch.dtype) -> None:
    made = build(case, device, dtype)
    with cases.poisoned_memory():
        delta, lse_log2 = torch.ops.flash_ext.bwd_preprocess(*made)
    compare(delta, lse_log2, *made)
