"""Attention over a KV cache of float8_e4m3fn: what flash_ext.attention_with_kvcache does with e4m3 tensors.

| op | implemented by |
|---|---|
| flash_ext::kvcache_fp8 | CUDA: _C (launches, or calls the reference op with the reasons); elsewhere the reference |
| flash_ext::reference_kvcache_fp8 | here: the cache's rows times their scales, block by block, in float32 |

New rows are stored as they come: whoever quantises them takes the scales of the places that they go to. Nothing is rotated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from . import env, kvcache_arguments, ops, reference_kvcache
from .fp8 import FP8, OUT_DTYPES, dequantise
from .quantize import BLOCK_ROWS
from .reference_kvcache import Scoring

NAMES = ("q_descale", "k_descale", "v_descale", "out_dtype")
_SCALES = "Tensor? q_descale, Tensor? k_descale, Tensor? v_descale, ScalarType out_dtype"


def define(library: torch.library.Library, schema: str, reference_schema: str) -> None:
    """Define the two ops: the schemas of flash_ext::kvcache and reference_kvcache with the scales before `bool validate`."""
    for name, of_16_bits in (("kvcache_fp8", schema), ("reference_kvcache_fp8", reference_schema)):
        arguments = of_16_bits.split("(", 1)[1].replace("bool validate", f"{_SCALES}, bool validate", 1)
        library.define(f"{name}({arguments}", tags=(torch.Tag.pt2_compliant_tag,))
    for name, implementation in (("kvcache_fp8", _kvcache_fp8), ("reference_kvcache_fp8", ops._kept(_reference))):
        library.impl(name, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"flash_ext::{name}", _fake, lib=library)


def out_dtype(q: Tensor, asked: torch.dtype | None) -> torch.dtype:
    """The dtype of a call's out."""
    return (asked or torch.bfloat16) if q.dtype == FP8 else q.dtype


def run(
    arguments: tuple[Any, ...], scales: dict[str, Any], validate: bool, backend: str | None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, lse) of a checked call. arguments: of flash_ext::kvcache up to num_splits. scales: NAMES."""
    *descales, asked = (scales[name] for name in NAMES)
    return ops.call(torch.ops.flash_ext.kvcache_fp8, *arguments, *descales, out_dtype(arguments[0], asked), validate, backend)


# --- argument checks (flash_ext/kvcache_arguments.py calls them) ---


def type_violations(scales: dict[str, Any]) -> list[str]:
    """Wrong Python types among NAMES."""
    found = [
        f"{name} must be a torch.Tensor or None, got {type(scales[name]).__name__}"
        for name in NAMES[:3]
        if scales[name] is not None and not isinstance(scales[name], Tensor)
    ]
    if scales["out_dtype"] is not None and not isinstance(scales["out_dtype"], torch.dtype):
        found.append(f"out_dtype must be a torch.dtype or None, got {type(scales['out_dtype']).__name__}")
    return found


def violations(
    q: Tensor, k_cache: Tensor, rotary: Tensor | None, paged: bool, scales: dict[str, Any], validate: bool, sized: bool
) -> list[str]:
    """What is wrong with the scales. rotary: rotary_cos. sized: the shapes of q and the caches are right."""
    given = [name for name in NAMES if scales[name] is not None]
    if q.dtype != FP8:
        return [f"{', '.join(given)}: only for a float8_e4m3fn q and caches, got {q.dtype}"] * (len(given) > 0)
    found = []
    if rotary is not None:
        found.append("rotary_cos and rotary_sin must be None with float8_e4m3fn: rotate q and k before they are quantised")
    if scales["out_dtype"] is not None and scales["out_dtype"] not in OUT_DTYPES:
        found.append(f"out_dtype must be bfloat16 or float16, got {scales['out_dtype']}")
    for name in NAMES[:3]:
        if scales[name] is not None:
            found += _scale_violations(name, scales[name], q, k_cache, paged, validate, sized)
    return found


def _scale_violations(
    name: str, descale: Tensor, q: Tensor, k_cache: Tensor, paged: bool, validate: bool, sized: bool
) -> list[str]:  # fmt: skip
    found = []
    if descale.dtype != torch.float32:
        found.append(f"{name}.dtype must be float32, got {descale.dtype}")
    if descale.device != q.device:
        found.append(f"{name}.device must equal q.device, got {descale.device} and {q.device}")
    if sized:
        batch, heads, heads_kv = q.shape[0], q.shape[2], k_cache.shape[2]
        of_q = name == "q_descale"
        entries, rows = (batch, q.shape[1]) if of_q else k_cache.shape[:2]
        allowed = [(), (1,), (batch, heads if of_q else heads_kv)]
        if of_q and heads != heads_kv:
            allowed.append((batch, heads_kv))
        if of_q or not paged or rows % BLOCK_ROWS == 0:
            allowed.append((entries, heads if of_q else heads_kv, (rows + BLOCK_ROWS - 1) // BLOCK_ROWS))
        if all(len(shape) != descale.dim() or any(a != b for a, b in zip(shape, descale.shape, strict=True)) for shape in allowed):
            shapes = " or ".join(str(tuple(shape)) for shape in allowed)
            pages = "; blocks of 64 rows need pages of a multiple of 64" if not of_q and len(allowed) == 3 else ""
            found.append(
                f"{name} must have shape {shapes} (tensor, head of a sequence, or block of 64 rows of the "
                f"{'queries' if of_q else 'cache'}{pages}), got {tuple(descale.shape)}"
            )
        elif descale.dim() == 3 and descale.shape[2] > 1 and descale.stride(2) != 1:
            found.append(f"{name}'s last dimension must be contiguous (stride 1), got stride {descale.stride(2)}")
    readable = descale.device.type == "cpu" or (validate and descale.device.type != "meta")
    readable = readable and not torch.compiler.is_compiling() and not isinstance(descale, FakeTensor)
    if not found and readable and not bool((torch.isfinite(descale) & (descale > 0)).all()):
        found.append(f"{name} must be positive and finite")
    return found


# --- the op where no kernel serves it ---


def _reference(
    q, k_cache, v_cache, k, v, cache_seqlens, cache_batch_idx, leftpad_k, page_table, rotary_cos, rotary_sin,
    _interleaved, sinks, alibi_slopes, softmax_scale, causal, window_left, window_right, softcap,
    q_descale, k_descale, v_descale, out_dtype, validate, reason,
):  # fmt: skip
    if rotary_cos is not None or rotary_sin is not None:
        raise ValueError("attention_with_kvcache: e4m3 rows are not rotated: rotate before they are quantised")
    if validate:
        kvcache_arguments.check_values(q, k_cache, k, cache_seqlens, cache_batch_idx, leftpad_k, page_table, None, False)
    if reason:
        env.warn_of_fallback("attention_with_kvcache (FP8)", reason)
    with torch.autocast(q.device.type, enabled=False):
        cache = reference_kvcache.Cache.of(k_cache, cache_seqlens, page_table, cache_batch_idx)
        if k is not None:
            kvcache_arguments.require_values(k_cache, v_cache, v)
            pairs = ((k, k_cache),) if v is None else ((k, k_cache), (v, v_cache))
            reference_kvcache.append(cache, tuple((rows.view(torch.uint8), target.view(torch.uint8)) for rows, target in pairs))
            cache = reference_kvcache.Cache.of(k_cache, cache.length + k.shape[1], page_table, cache_batch_idx)
        scoring = Scoring(softmax_scale, window_left, 0 if causal else window_right, softcap)
        out, lse = reference_kvcache.attend(
            dequantise(q, q_descale, None), k_cache, v_cache, cache, leftpad_k, scoring, sinks, alibi_slopes, (k_descale, v_descale)
        )
    return out.to(out_dtype), lse


def _kvcache_fp8(*arguments):
    *inputs, _num_splits, q_descale, k_descale, v_descale, out_dtype, validate, backend = arguments
    if backend not in (None, "reference"):
        raise ValueError(f"attention_with_kvcache: backend '{backend}' cannot run this FP8 call; FP8 kernels are Hopper's (sm90)")
    reason = ops._reason_without_kernels(inputs[0], backend)
    return _reference(*inputs, q_descale, k_descale, v_descale, out_dtype, validate, reason)


def _fake(q, k_cache, v_cache, *arguments):
    out_dtype = next(a for a in reversed(arguments) if isinstance(a, torch.dtype))
    out = q.new_empty(q.shape[0], q.shape[1], q.shape[2], v_cache.shape[3], dtype=out_dtype)
    return out, q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
