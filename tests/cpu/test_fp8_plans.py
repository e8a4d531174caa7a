"""Whatever the 16-bit forward of Hopper has a row for, the FP8 forward has one too, or one reason why not."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import flash_ext

host = pytest.importorskip("flash_ext._host")
NAMES = {row["name"] for row in host.variants()}
HEAD_DIMS = (64, 96, 128, 192, 256)
ROWS = {f"fwd_fp8_sm90_e4m3_d{d}_{row}" for d in HEAD_DIMS for row in (
    "full_head", "causal_head", "full_block", "causal_block", "local_scored_block", "full_head_unflushed", "causal_head_unflushed",
)} | {
    f"fwd_fp8_cache{gather}_sm90_e4m3_d{d}_{row}"
    for gather in ("", "_gather")
    for d in (64, 128, 256)
    for row in ("causal", "local_scored")
}  # fmt: skip
whole_build = pytest.mark.skipif(not ROWS | {"fwd_sm90_bf16_d128_causal"} <= NAMES, reason="this build holds a subset of the rows")
BATCH, SEQLEN = 2, 300
SCALES = ("none", "head", "block")
MASKS = ({}, {"causal": True}, {"window_size": (50, 10)}, {"window_size": (50, 0), "causal": True})


def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def f32(*shape: int) -> torch.Tensor:
    return meta(*shape, dtype=torch.float32)


def i32(*shape: int) -> torch.Tensor:
    return meta(*shape, dtype=torch.int32)


HEADS, HEADS_KV = 6, 2
SCORES: tuple[dict[str, Any], ...] = (
    {}, {"softcap": 5.0}, {"sinks": f32(HEADS)}, {"alibi_slopes": f32(HEADS)}, {"softmax_scale": -0.3}, {"softmax_scale": 0.0},
)  # fmt: skip
LAYOUTS = ("dense", "few queries", "varlen", "used", "leftpad", "splits", "odd splits")


def call_of(dtype: torch.dtype, head_dim: int, head_dim_v: int, layout: str) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
    seqlen_q = 3 if layout == "few queries" else SEQLEN
    packed = layout in ("varlen", "used", "leftpad")
    shapes = ((seqlen_q, HEADS, head_dim), (SEQLEN, HEADS_KV, head_dim), (SEQLEN, HEADS_KV, head_dim_v))
    tensors = tuple(meta(*(() if packed else (BATCH,)), *shape, dtype=dtype) for shape in shapes)
    options: dict[str, Any] = {"cu_seqlens_q": i32(BATCH + 1), "cu_seqlens_k": i32(BATCH + 1)} if packed else {}
    if layout == "used":
        options |= {"seqused_q": i32(BATCH), "seqused_k": i32(BATCH)}
    if layout == "leftpad":
        options |= {"leftpad_q": i32(BATCH), "leftpad_k": i32(BATCH)}
    if "splits" in layout:
        options |= {"split_boundaries": (0, 128, 300) if layout == "splits" else (0, 100, 300)}
    return tensors, options


def scales_of(kind: str, tensors: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    if kind == "none":
        return {}
    names = ("q_descale", "k_descale", "v_descale")
    if kind == "head":
        return {name: f32(BATCH, t.shape[-2]) for name, t in zip(names, tensors, strict=True)}
    return {
        name: f32(1, t.shape[-2], t.shape[0] // 64 + BATCH) if t.dim() == 3 else f32(BATCH, t.shape[2], -(-t.shape[1] // 64))
        for name, t in zip(names, tensors, strict=True)
    }


@whole_build
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dims", (*((d, d) for d in HEAD_DIMS), (16, 16), (80, 48), (192, 128), (64, 256)), ids=str)
def test_every_call_of_16_bits_has_an_fp8_row(dims: tuple[int, int], layout: str) -> None:
    for mask, score in itertools.product(MASKS, SCORES):
        if "splits" in layout and "sinks" in score:
            continue  # sinks belong to the merge
        wide, options = call_of(torch.bfloat16, *dims, layout)
        options |= {**mask, **score}
        assert flash_ext.explain(*wide, device_info="sm90", **options).backend == "sm90"
        tensors, _ = call_of(torch.float8_e4m3fn, *dims, layout)
        for kind, flush, out_dtype in itertools.product(SCALES, (None, 0, 1), (None, torch.float16)):
            more = {**options, **scales_of(kind, tensors), "flush_every": flush, "out_dtype": out_dtype}
            plan = flash_ext.explain(*tensors, device_info="sm90", **more)
            assert plan.backend == "sm90" and plan.variant in ROWS
            # Never rows that do less than was asked for.
            assert kind != "block" or "_block" in plan.variant
            assert flush == 0 or "unflushed" not in plan.variant


@whole_build
def test_what_has_no_row_has_one_reason() -> None:
    q = meta(1, 100, 2, 72, dtype=torch.float8_e4m3fn)
    assert flash_ext.supported(q, q, q)["reference"] == []
    plan = flash_ext.explain(q, q, q, device_info="sm90")
    assert plan.backend == "reference"
    reason = "no FP8 kernel has {} 72: it must be a multiple of 16"
    assert plan.rejected["sm90"] == (reason.format("head_dim"), reason.format("head_dim_v"))
    q = meta(1, 100, 2, 64, dtype=torch.float8_e4m3fn)
    reason = flash_ext.explain(q, q, q, device_info="sm86").rejected["sm80"][0]
    assert reason.startswith("FP8 needs compute capability 8.9 or later")
    mask = flash_ext.create_block_mask(lambda b, h, i, j: i >= j, 1, 2, 128, 128)
    q8 = torch.zeros(1, 128, 2, 64).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"block_mask is not supported with float8_e4m3fn q, k and v: .* 16 bits"):
        flash_ext.attention(q8, q8, q8, block_mask=mask)


@whole_build
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("page_size", (None, 5, 64, 256))
@pytest.mark.parametrize("head_dim", (16, 64, 96, 128, 192, 256))
def test_every_cache_of_16_bits_has_an_fp8_row(head_dim: int, page_size: int | None, scale: str) -> None:
    if scale == "block" and page_size == 5:
        return  # such scales do not exist
    for seqlen_q, mask, leftpad in itertools.product((1, 70), MASKS, (False, True)):
        for dtype in (torch.bfloat16, torch.float8_e4m3fn):
            fp8 = dtype == torch.float8_e4m3fn
            shape = (3, 512, HEADS_KV, head_dim) if page_size is None else (30, page_size, HEADS_KV, head_dim)
            cache, q = meta(*shape, dtype=dtype), meta(3, seqlen_q, HEADS, head_dim, dtype=dtype)
            new = meta(3, 2, HEADS_KV, head_dim, dtype=dtype)
            options: dict[str, Any] = {"causal": False, **mask, "cache_seqlens": i32(3), "device_info": "sm90"}
            if page_size is not None:
                options["page_table"] = i32(3, -(-512 // page_size))
            if leftpad:
                options["leftpad_k"] = i32(3)
            if fp8 and scale == "head":
                options |= {"q_descale": f32(3, HEADS), "k_descale": f32(3, HEADS_KV), "v_descale": f32(3, HEADS_KV)}
            if fp8 and scale == "block":
                blocks = f32(*shape[:1], HEADS_KV, -(-shape[1] // 64))
                options |= {"q_descale": f32(3, HEADS, -(-seqlen_q // 64)), "k_descale": blocks, "v_descale": blocks}
            plan = flash_ext.explain_with_kvcache(q, cache, cache, new, new, **options)
            if fp8 and scale == "block" and leftpad:
                assert plan.backend == "reference"
                assert plan.rejected["sm90"] == ("no kernel has scales of 64 rows of a cache with leftpad_k",)
            else:
                assert plan.backend == "sm90" and (plan.variant in ROWS) == fp8
                assert plan.keys_by == ("gather" if page_size == 5 or (page_size and leftpad) else "tma")
