"""Cases of flash_ext.attention_with_kvcache on e4m3 tensors: those of kvcache_cases without rotation, with every kind of scales."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import kvcache_cases
import torch
from kvcache_cases import CASES, Case
from torch import Tensor

FP8 = torch.float8_e4m3fn
SCALES = ("none", "tensor", "head", "block")


def takes(case: Case, scale: str) -> bool:
    """Whether the call exists: scales of blocks need pages of whole blocks."""
    return scale != "block" or case.page_size is None or case.page_size % 64 == 0


def kernels_take(case: Case, scale: str) -> bool:
    dims = (case.head_dim, case.head_dim_v or case.head_dim)
    return max(dims) <= 256 and all(d % 16 == 0 for d in dims) and not (scale == "block" and case.leftpad)


# 64 queries have more than one block; pages of 64 rows and more have whole blocks.
CASES_FP8 = {
    case.name: case
    for case in (
        *(replace(case, rotary="none", rotary_dim=None) for case in CASES.values() if not case.shared),
        *(Case("blocks", (200, 1, 77), seqlen_new=2, seqlen_q=2, page_size=p, num_heads=6) for p in (64, 128, 192, 320)),
        Case("blocks", (330, 0, 129), seqlen_q=70, head_dim=128, num_heads=4, num_heads_kv=1),
        Case("blocks", (330, 0, 129), seqlen_q=3, head_dim=256, batch_idx=(2, 0, 3), options={"softcap": 3.0}),
        Case("blocks", (700,), 2, page_size=64, options={"window_size": (200, 0), "num_splits": 3}, sinks=True, alibi=True),
    )
}


def build(case: Case, scale: str, device: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(arguments of the call, its scales); the caches hold NaN where no sequence has a row."""
    made = kvcache_cases.build(case, device, torch.float32)
    made = {n: t.to(FP8) if n in ("q", "k_cache", "v_cache", "k", "v") else t for n, t in made.items()}
    generator = torch.Generator().manual_seed(len(case.name))

    def positive(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * 0.5).exp().to(device)

    entries, rows, heads_kv = made["k_cache"].shape[:3]
    shapes = {"tensor": [()] * 3, "head": [(case.batch, case.num_heads)] + [(case.batch, heads_kv)] * 2}
    shapes["block"] = [(case.batch, case.num_heads, -(-case.seqlen_q // 64))] + [(entries, heads_kv, -(-rows // 64))] * 2
    if scale == "none":
        return made, {}
    names = ("q_descale", "k_descale", "v_descale")
    return made, {name: positive(*shape) for name, shape in zip(names, shapes[scale], strict=True)}


def _wide(x: Tensor, descale: Tensor | None) -> Tensor:
    """x (entries, rows, heads, dim) times its scales, float64: of the tensor, or of blocks of 64 rows."""
    wide = x.double()
    if descale is None:
        return wide
    if descale.dim() < 2:
        return wide * descale.double()
    return wide * descale.double().repeat_interleave(64, 2)[:, :, : x.shape[1]].transpose(1, 2)[..., None]


def expected(case: Case, after: dict[str, Any], scales: dict[str, Any]) -> kvcache_cases.Truth:
    """The oracle's results over the caches as the call left them."""
    q_descale, k_descale, v_descale = (scales.get(name) for name in ("q_descale", "k_descale", "v_descale"))
    whole = replace(case, lengths=tuple(n + (case.seqlen_new or 0) for n in case.lengths), seqlen_new=None)
    of_heads = k_descale is not None and k_descale.dim() == 2
    q = after["q"].double() * q_descale.double()[:, None, :, None] if of_heads else _wide(after["q"], q_descale)
    made = {**after, "q": q}
    if not of_heads:
        caches = {"k_cache": _wide(after["k_cache"], k_descale), "v_cache": _wide(after["v_cache"], v_descale)}
        return kvcache_cases.expected(whole, {**made, **caches}, torch.float64)
    # One of a sequence and head: sequences may share entries and pages, so each is computed by itself.
    truths = []
    for b in range(case.batch):
        one = replace(
            whole, lengths=whole.lengths[b : b + 1], leftpad=whole.leftpad and whole.leftpad[b : b + 1],
            batch_idx=whole.batch_idx and whole.batch_idx[b : b + 1],
        )  # fmt: skip
        mine = {**made, "q": q[b : b + 1]}
        for name, descale in (("k_cache", k_descale), ("v_cache", v_descale)):
            mine[name] = after[name].double() * descale[b].double()[:, None]
        if case.page_size is None and case.batch_idx is None:
            mine["k_cache"], mine["v_cache"] = mine["k_cache"][b : b + 1], mine["v_cache"][b : b + 1]
        for name in ("page_table", "cache_batch_idx"):
            mine[name] = made[name] if made[name] is None else made[name][b : b + 1]
        truths.append(kvcache_cases.expected(one, mine, torch.float64))
    if not truths:
        return kvcache_cases.expected(whole, made | {n: after[n].double() for n in ("k_cache", "v_cache")}, torch.float64)
    out, lse = (torch.cat([getattr(t, name) for t in truths]) for name in ("out", "lse"))
    return kvcache_cases.Truth(out, lse, after["k_cache"], after["v_cache"])


def check_caches(case: Case, made: dict[str, Any], before: dict[str, Any]) -> None:
    """New rows bit for bit, and every other byte untouched."""
    for name in ("k", "v"):
        wanted = before[f"{name}_cache"].cpu().clone().view(torch.uint8)
        for b, length in enumerate(case.lengths):
            for j in range(case.seqlen_new or 0):
                place = kvcache_cases.slot(case, before["page_table"], before["cache_batch_idx"], b, length + j)
                wanted[place] = before[name][b, j].cpu().view(torch.uint8)
        assert torch.equal(made[f"{name}_cache"].cpu().view(torch.uint8), wanted), f"{name}_cache"
