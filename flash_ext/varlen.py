"""The public function for packed sequences of different lengths."""

from __future__ import annotations

import torch
from torch import Tensor

from .call import Call
from .run import results


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor | None = None,
    max_seqlen_k: int | Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    leftpad_q: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    validate: bool = False,
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
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    flush_every: int | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """flash_ext.attention for sequences of different lengths, packed one behind the other: no padding is computed.

    Sequence b owns rows cu_seqlens_q[b] up to cu_seqlens_q[b + 1] of q, and those of cu_seqlens_k of k and v. Of its rows
    it shows all, or, with seqused and leftpad, those from leftpad[b] up to seqused[b], counted from its first. Positions
    (causal, window_size, ALiBi) count within the shown rows and are aligned to the bottom right in each sequence. A
    sequence may be empty, on either side. Rows of q that no sequence shows give out = 0, lse = -inf and dq = 0; rows of k
    and v that none shows are not read, whatever they hold, and get zero gradients.

    Args:
        q: (total_q, num_heads, head_dim). k: (total_k, num_heads_kv, head_dim). v: (total_k, num_heads_kv, head_dim_v).
            Dtypes, heads and strides as in flash_ext.attention.
        cu_seqlens_q, cu_seqlens_k: (batch + 1) int32 on q's device, contiguous: 0 and the running sum of the lengths.
        max_seqlen_q, max_seqlen_k: the largest length, as an int or a tensor of one integer. Not needed; checked where the
            values lie on the host, or with validate.
        seqused_q, seqused_k: (batch) int32 on q's device: a sequence shows no rows from this one on (left padding
            included in the count). All of them by default.
        leftpad_q, leftpad_k: (batch) int32 on q's device: a sequence shows no rows before this one. 0 by default.
        validate: check the values of these tensors on a GPU too, which waits for it. On a CPU they are always checked.
            Unchecked wrong values are clamped: they never read or write outside the tensors.
        k_bias: (num_heads_kv, total_k) float32. alibi_slopes: (num_heads) or (batch, num_heads) float32.
        q_descale, k_descale, v_descale, out_dtype, flush_every: for e4m3 tensors, as flash_ext.quantize_fp8 returns the scales
            of packed ones.
        causal, softmax_scale, window_size, softcap, sinks, return_lse, return_max_logit, deterministic, backend: as
            flash_ext.attention.

    Returns:
        As flash_ext.attention, with out (total_q, num_heads, head_dim_v) and lse (num_heads, total_q).

    Nothing is read from the device by the host, but on the reference, which works on the sequences one by one.

    Raises: as flash_ext.attention.
    """
    return results(
        Call(
            q, k, v, causal, softmax_scale, window_size, softcap, sinks, alibi_slopes, k_bias, return_lse, return_max_logit,
            deterministic, backend, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k, leftpad_q,
            leftpad_k, validate, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale, out_dtype=out_dtype,
            flush_every=flush_every, function="attention_varlen",
        )
    )  # fmt: skip
