"""Attention over a KV cache: the public function, its op, and the op's implementation without kernels.

flash_ext::kvcache changes the caches in place; its schema says so, so that torch.compile and functionalisation know.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import env, kvcache_fp8, ops, reference_kvcache
from .kvcache_arguments import check_arguments, check_values, require_values
from .reference_kvcache import Scoring, accumulation_dtype

_SCHEMA = (
    "kvcache(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? k, Tensor? v, Tensor cache_seqlens, "
    "Tensor? cache_batch_idx, Tensor? leftpad_k, Tensor? page_table, Tensor? rotary_cos, Tensor? rotary_sin, "
    "bool rotary_interleaved, Tensor? sinks, Tensor? alibi_slopes, float softmax_scale, bool causal, int window_left, "
    "int window_right, float softcap, int num_splits, bool validate, str? backend) -> (Tensor out, Tensor lse)"
)
_REFERENCE_SCHEMA = _SCHEMA.replace("kvcache(", "reference_kvcache(", 1).replace(
    "int num_splits, bool validate, str? backend", "bool validate, str reason"
)
# The kernels around attention, as ops for tests and profiles: flash_ext::kvcache calls their bodies.
_APPEND_SCHEMA = (
    "append_kv(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? k, Tensor? v, Tensor cache_seqlens, "
    "Tensor? cache_batch_idx, Tensor? leftpad_k, Tensor? page_table, Tensor? rotary_cos, Tensor? rotary_sin, "
    "bool rotary_interleaved, bool positions_move, int[] split) -> (Tensor q_rotated, Tensor lengths, Tensor part_begin)"
)
_COMBINE_SCHEMA = (
    "combine(Tensor out_partial, Tensor lse_partial, Tensor part_begin, Tensor? sinks, Tensor(a!) out, Tensor(b!) lse) -> ()"
)
_library = torch.library.Library("flash_ext", "FRAGMENT")
# What validate=True asks of the values; raises or does nothing.
_CHECK_SCHEMA = (
    "check_kvcache(Tensor q, Tensor k_cache, Tensor? k, Tensor cache_seqlens, Tensor? cache_batch_idx, Tensor? leftpad_k, "
    "Tensor? page_table, Tensor? rotary_cos, bool positions_move) -> ()"
)
for _schema in (_SCHEMA, _REFERENCE_SCHEMA, _CHECK_SCHEMA, _APPEND_SCHEMA, _COMBINE_SCHEMA):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cache_seqlens: int | Tensor,
    cache_batch_idx: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    page_table: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = True,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    softmax_scale: float | None = None,
    num_splits: int = 0,
    return_lse: bool = False,
    alibi_slopes: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    validate: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of new queries over cached keys and values, after appending new ones: a step of decoding, or of prefill.

    With k and v, the rows cache_seqlens[b] .. cache_seqlens[b] + seqlen_new - 1 of sequence b in k_cache and v_cache are
    overwritten first (in place; cache_seqlens itself is not changed), and attention sees cache_seqlens[b] + seqlen_new
    rows. Softmax, masks and their alignment are those of flash_ext.attention.

    Args:
        q: (batch, seqlen_q, num_heads, head_dim), bfloat16, float16, float32, float64 or float8_e4m3fn, head_dim at most 576.
        k_cache: (batch_cache, seqlen, num_heads_kv, head_dim), or with page_table (num_pages, page_size, num_heads_kv,
            head_dim); dtype and device of q. Any page size and any strides with a contiguous last dimension, such as a cache
            whose pages interleave layers. Kernels want strides that are multiples of 16 bytes.
        v_cache: the same with head_dim_v. For absorbed multi-head latent attention (DeepSeek-V2, arXiv 2405.04434; head_dim 576,
            head_dim_v 512) it is k_cache[..., :512], a view: rows are then read once. Kernels with head_dim above 256 want that.
        k: (batch, seqlen_new, num_heads_kv, head_dim), rows to append, or None.
        v: (batch, seqlen_new, num_heads_kv, head_dim_v), or None. Where v_cache is the first columns of k_cache, v may be None,
            and k's rows bring it along; if given it takes the place of their first columns.
        cache_seqlens: rows of each sequence in the cache before the call, (batch,) int32, or one int for all.
        cache_batch_idx: (batch,) int32, the sequence of the dense cache that each q belongs to; default 0, 1, 2, ...
        leftpad_k: (batch,) int32, rows at the start of each sequence that are no keys. Masks count from behind them, rotary
            positions do not: those are rows of the cache.
        page_table: (batch, pages) int32: row j of sequence b lies in page page_table[b, j // page_size], row j % page_size.
            Pages may come in any order, and be shared where they are only read; entries beyond a sequence are not read.
        rotary_cos, rotary_sin: (positions, rotary_dim / 2) of q's dtype or float32: k's rows are rotated by their position
            (row in the cache) before they are stored; q's row i by cache_seqlens + i where causal or a window is set, else
            every row by cache_seqlens (as flash-attn does). rotary_dim is at most head_dim; the other columns stay.
        rotary_interleaved: pairs are neighbouring columns (GPT-J) rather than columns i and i + rotary_dim / 2 (GPT-NeoX).
        causal: row i sees keys j <= i + keys - seqlen_q (bottom-right aligned). On by default, unlike flash_ext.attention.
        window_size: (left, right), inclusive, -1 unbounded, as flash_ext.attention.
        softcap: if positive, scores become softcap * tanh(score / softcap).
        sinks: (num_heads,) float32, a logit that joins each head's softmax without a value.
        softmax_scale: factor on q . k; 1 / sqrt(head_dim) by default.
        num_splits: CTAs that share the keys of a sequence; 0: chosen on the device from the lengths.
        return_lse: also return lse, the natural log of the softmax's denominator (sink included).
        alibi_slopes: (num_heads,) or (batch, num_heads) float32: -slope * |i + keys - seqlen_q - j| is added to the scores.
        q_descale, k_descale, v_descale: of float8_e4m3fn tensors, float32 scales that undo their rounding; None is 1. One for
            all: () or (1,). One for each sequence of the call and head: (batch, num_heads_kv), of q also (batch, num_heads).
            One for 64 rows: of k and v where these stand in the cache, (k_cache.shape[0], num_heads_kv, ceil(rows / 64)),
            pages then being multiples of 64 rows; of q (batch, num_heads, ceil(seqlen_q / 64)).
        out_dtype: of a float8_e4m3fn call, bfloat16 (the default) or float16.
        validate: on a GPU, check lengths, indices and page table there, which synchronises. On the CPU they are always
            checked. Otherwise they are clamped: nothing outside the caches is read or written.
        backend: as flash_ext.attention.

    Returns:
        out (batch, seqlen_q, num_heads, head_dim_v) in q's dtype (or out_dtype); with return_lse (out, lse), lse (batch, num_heads,
        seqlen_q) float32 (float64 for float64 inputs). A row that sees no key has out 0 and lse -inf (the sink with sinks).

    Nothing depends on values that only the device knows: lengths may change between replays of a CUDA graph. NaN in rows
    beyond a sequence, in its padding, or in unused pages never reaches a result. No gradients.

    Raises:
        TypeError, ValueError: as flash_ext.attention, and for values out of range where they are checked.
        NotImplementedError: gradients are enabled and an input requires one.
        RuntimeError: CUDA failed.
    """
    optional = {
        "cache_seqlens": cache_seqlens, "cache_batch_idx": cache_batch_idx, "leftpad_k": leftpad_k, "page_table": page_table,
        "rotary_cos": rotary_cos, "rotary_sin": rotary_sin, "sinks": sinks, "alibi_slopes": alibi_slopes,
    }  # fmt: skip
    options = {
        "rotary_interleaved": rotary_interleaved, "causal": causal, "window_size": window_size, "softcap": softcap,
        "softmax_scale": softmax_scale, "num_splits": num_splits, "return_lse": return_lse, "validate": validate,
        "backend": backend,
    }  # fmt: skip
    scales = {"q_descale": q_descale, "k_descale": k_descale, "v_descale": v_descale, "out_dtype": out_dtype}
    check_arguments(q, k_cache, v_cache, k, v, optional, options, scales)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, v, k_cache, v_cache, sinks)):
        raise NotImplementedError(
            "attention_with_kvcache: it has no gradient, and an input requires one; call it under torch.no_grad(), or train "
            "with flash_ext.attention"
        )
    if not isinstance(cache_seqlens, Tensor):
        cache_seqlens = torch.full((q.shape[0],), cache_seqlens, dtype=torch.int32, device=q.device)
    arguments = (
        q, k_cache, v_cache, k, v, cache_seqlens, cache_batch_idx, leftpad_k, page_table,
        rotary_cos, rotary_sin, rotary_interleaved, sinks, alibi_slopes,
        float(q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale), causal, window_size[0], window_size[1],
        float(softcap), num_splits,
    )  # fmt: skip
    validate = validate or q.device.type == "cpu"
    if q.dtype == kvcache_fp8.FP8:
        out, lse = kvcache_fp8.run(arguments, scales, validate, backend)
    else:
        out, lse = ops.call(torch.ops.flash_ext.kvcache, *arguments, validate, backend)
    return (out, lse) if return_lse else out


# --- the op where no kernel serves it ---


def _positions_move(causal: bool, window_left: int, window_right: int) -> bool:
    return causal or window_left >= 0 or window_right >= 0


def _reference(
    q, k_cache, v_cache, k, v, cache_seqlens, cache_batch_idx, leftpad_k, page_table, rotary_cos, rotary_sin,
    rotary_interleaved, sinks, alibi_slopes, softmax_scale, causal, window_left, window_right, softcap, validate, reason,
):  # fmt: skip
    moves = _positions_move(causal, window_left, window_right)
    if validate:
        check_values(q, k_cache, k, cache_seqlens, cache_batch_idx, leftpad_k, page_table, rotary_cos, moves)
    if reason:
        env.warn_of_fallback("attention_with_kvcache", reason)
    with torch.autocast(q.device.type, enabled=False):
        before = reference_kvcache.Cache.of(k_cache, cache_seqlens, page_table, cache_batch_idx)
        after = before
        if k is not None:
            if rotary_cos is not None:
                start = before.length[:, None]
                rows = torch.arange(q.shape[1], device=q.device) * (1 if moves else 0)
                q = reference_kvcache.rotate(q, start + rows, rotary_cos, rotary_sin, rotary_interleaved)
                rows = torch.arange(k.shape[1], device=q.device)
                k = reference_kvcache.rotate(k, start + rows, rotary_cos, rotary_sin, rotary_interleaved)
            require_values(k_cache, v_cache, v)
            # Where v_cache is columns of k_cache, v's replace k's.
            reference_kvcache.append(before, ((k, k_cache),) if v is None else ((k, k_cache), (v, v_cache)))
            # From the clamped length: a negative one counts as 0.
            after = reference_kvcache.Cache.of(k_cache, before.length + k.shape[1], page_table, cache_batch_idx)
        scoring = Scoring(softmax_scale, window_left, 0 if causal else window_right, softcap)
        return reference_kvcache.attend(q, k_cache, v_cache, after, leftpad_k, scoring, sinks, alibi_slopes)


def _kvcache(*arguments):
    *inputs, _, validate, backend = arguments
    if backend not in (None, "reference"):
        raise ValueError(f"attention_with_kvcache: backend '{backend}' cannot run this call: no compiled kernel covers it")
    return _reference(*inputs, validate, ops._reason_without_kernels(inputs[0], backend))


def _fake(q, k_cache, v_cache, *_):
    out = q.new_empty(q.shape[0], q.shape[1], q.shape[2], v_cache.shape[3])
    return out, q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=accumulation_dtype(q.dtype))


for _name, _implementation in (("kvcache", _kvcache), ("reference_kvcache", ops._kept(_reference))):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"flash_ext::{_name}", _fake, lib=_library)
kvcache_fp8.define(_library, _SCHEMA, _REFERENCE_SCHEMA)
_library.impl("check_kvcache", ops._kept(check_values), "CompositeExplicitAutograd")
