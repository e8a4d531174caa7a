"""The public functions for batches of equally long sequences."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .block_mask import BlockMask
from .call import Call
from .run import results, run


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    k_bias: Tensor | None = None,
    return_lse: bool = False,
    return_max_logit: bool = False,
    deterministic: bool | None = None,
    backend: str | None = None,
    block_mask: BlockMask | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    flush_every: int | None = None,
    validate: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Exact softmax attention, differentiable, in memory linear in the sequence length.

    out = softmax(softmax_scale * q @ k^T, masked) @ v for each head, by the tiled online softmax of FlashAttention (Dao
    et al. 2022, algorithms 1 and 4; FlashAttention-2, Dao 2023; FlashAttention-3, Shah et al. 2024). No retraining, no
    approximation: results agree with torch.nn.functional.scaled_dot_product_attention up to rounding.

    Args:
        q: (batch, seqlen_q, num_heads, head_dim), bfloat16, float16, float32 or float64, head_dim at most 256.
        k: (batch, seqlen_k, num_heads_kv, head_dim), dtype and device of q. num_heads must be a multiple of
            num_heads_kv (grouped-query and multi-query attention): query head h reads key head
            h // (num_heads // num_heads_kv).
        v: (batch, seqlen_k, num_heads_kv, head_dim_v), head_dim_v at most 256.
        causal: row i sees keys j <= i + seqlen_k - seqlen_q (aligned to the bottom right).
        softmax_scale: factor on q . k, any finite number; 1 / sqrt(head_dim) by default.
        window_size: (left, right), inclusive: row i also sees only keys from i + seqlen_k - seqlen_q - left to
            i + seqlen_k - seqlen_q + right. -1 is unbounded. causal sets the right side to 0.
        softcap: if positive, scores become softcap * tanh(score / softcap) before anything is added to them (Gemma 2).
            0 is off.
        sinks: (num_heads) float32, a logit for each query head that takes part in the softmax without a value, so that a
            row can attend to nothing (gpt-oss; Xiao et al. 2024). In natural-log units, not multiplied by softmax_scale.
            lse includes it. Has a gradient.
        alibi_slopes: (num_heads) or (batch, num_heads) float32: score -= slope * |i + seqlen_k - seqlen_q - j| (ALiBi,
            Press et al. 2022). Has no gradient.
        k_bias: (batch, num_heads_kv, seqlen_k) float32, added to every score of its key, in natural-log units, after
            softcap. -inf hides the key, as a mask of padding does. Has a gradient.
        block_mask: which keys each query sees, besides causal and window_size; made by flash_ext.create_block_mask or one
            of the functions beside it, for these lengths. Only the blocks that it keeps are computed. The first call with
            causal or window_size builds their joint mask, which it keeps.
        return_lse: also return lse, the natural log of the softmax's denominator. It has a gradient.
        return_max_logit: also return max_logit, the largest score that each query head saw in this call (after softcap,
            ALiBi, k_bias and the mask, without the sink), as QK-clipping optimisers watch it. Has no gradient.
        deterministic: gradients bitwise equal from run to run. None follows torch.use_deterministic_algorithms.
        backend: 'sm90', 'sm80' or 'reference' to insist on one; None lets flash_ext choose (see flash_ext.explain).
        q_descale, k_descale, v_descale: for q, k and v of float8_e4m3fn (forward only) the float32 scales that undo their
            rounding, as flash_ext.quantize_fp8 returns them; None is 1. q_descale may also be (batch, num_heads_kv).
        out_dtype: of an FP8 call, bfloat16 (the default) or float16.
        flush_every: of an FP8 call, after how many tiles of keys the tensor cores' sums, which hold 14 bits, are added up in
            float32 (docs/numerics.md); 0 is never, None the kernel's default.
        validate: check the scales' values on a GPU too, which waits for it. On a CPU they are always checked.

    Returns:
        out, (out, lse), (out, max_logit) or (out, lse, max_logit).
        out: (batch, seqlen_q, num_heads, head_dim_v), dtype of q. lse: (batch, num_heads, seqlen_q), float32 (float64 for
        float64 inputs). max_logit: (num_heads), dtype of lse; -inf for a head that sees nothing. A row that sees no key
        has out = 0, lse = -inf (its sink, where there are sinks) and zero gradients, but for d lse / d sink = 1. An
        empty batch or sequence is not an error.

    In the forward a hidden key's k never matters, whatever it holds. NaN or infinity in a hidden v can reach rows of the
    same tile (0 * NaN is NaN), as in every tiled implementation.

    The last dimension must be contiguous; other strides are free. float64 inputs may have sinks, alibi_slopes and k_bias in
    float64. Under autocast, q, k and v are cast to the autocast dtype. Calls that no compiled kernel covers run on the
    reference, on a GPU with a FallbackWarning.

    Raises:
        TypeError: an argument has a wrong Python type.
        ValueError: a wrong shape, dtype, stride, layout, device or value; every violated rule in one message.
        NotImplementedError: inside torch.func transforms, in forward-mode differentiation, and for a second derivative.
        RuntimeError: CUDA failed.
    """
    return results(
        Call(
            q, k, v, causal, softmax_scale, window_size, softcap, sinks, alibi_slopes, k_bias, return_lse, return_max_logit,
            deterministic, backend, block_mask=block_mask, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale,
            out_dtype=out_dtype, flush_every=flush_every, validate=validate,
        )
    )  # fmt: skip


def attention_partials(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    split_boundaries: Sequence[int],
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    k_bias: Tensor | None = None,
    deterministic: bool | None = None,
    backend: str | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    flush_every: int | None = None,
) -> tuple[Tensor, Tensor]:
    """attention over each part of the keys by itself: what flash_ext.merge_attention puts together again.

    Part p attends to keys split_boundaries[p] up to (not including) split_boundaries[p + 1]. Masks, windows and ALiBi
    count positions in the whole sequence, so that merge_attention(*attention_partials(q, k, v, ...)) is
    attention(q, k, v, ..., return_lse=True) up to rounding.

    Args:
        split_boundaries: 2 to 65 ints, not decreasing, from 0 to seqlen_k. Equal neighbours make an empty part.
        q, k, v, causal, softmax_scale, window_size, softcap, alibi_slopes, k_bias, deterministic, backend, q_descale,
            k_descale, v_descale, out_dtype, flush_every, validate: as flash_ext.attention. Sinks belong to the merge.

    Returns:
        (outs, lses), both differentiable. outs: (parts, batch, seqlen_q, num_heads, head_dim_v), dtype of q. lses: (parts,
        batch, num_heads, seqlen_q), float32 (float64 for float64 inputs). Where a part shows a row no key: 0 and -inf.

    Raises: as flash_ext.attention.
    """
    outs, lses, _ = run(
        Call(
            q, k, v, causal, softmax_scale, window_size, softcap, None, alibi_slopes, k_bias, deterministic=deterministic,
            backend=backend, split_boundaries=split_boundaries, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale,
            out_dtype=out_dtype, flush_every=flush_every, function="attention_partials",
        )
    )  # fmt: skip
    return outs, lses
