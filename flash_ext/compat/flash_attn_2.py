"""The functions of flash-attn 2.8 (flash_attn/flash_attn_interface.py), with its signatures.

Tensors: q (batch, seqlen_q, nheads, headdim), k and v (batch, seqlen_k, nheads_k, headdim), any floating dtype that
flash_ext.attention takes; qkv (batch, seqlen, 3, nheads, headdim), kv (batch, seqlen_k, 2, nheads_k, headdim); packed
("varlen") tensors have (total) in place of (batch, seqlen), and cu_seqlens (batch + 1) int32. causal and window_size are
aligned to the bottom right. alibi_slopes: (nheads) or (batch, nheads) float32, score -= slope * |i + seqlen_k - seqlen_q - j|.

return_attn_probs: (out, softmax_lse, S_dmask). softmax_lse is float32, (batch, nheads, seqlen_q) or packed (nheads, total_q);
unlike flash-attn's it has a gradient, and it is -inf (there +inf) for a row that sees no key. S_dmask is flash-attn's pattern
of dropout: without dropout, as there, an empty tensor of shape (0,).

deterministic=False leaves the choice to torch.use_deterministic_algorithms.

Errors: NotImplementedError for dropout_p > 0, block_table and 8-bit floats; otherwise those of flash_ext.attention.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..attention import attention
from ..varlen import attention_varlen
from .common import refuse, refuse_fp8, rows, split, window

Result = Tensor | tuple[Tensor, Tensor, Tensor]


def _options(softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs) -> dict[str, Any]:
    return {
        "softmax_scale": softmax_scale,
        "causal": bool(causal),
        "window_size": window(window_size),
        "softcap": softcap if softcap > 0 else 0.0,  # flash-attn: a negative number is off, too
        "alibi_slopes": alibi_slopes,
        "deterministic": True if deterministic else None,
        "return_lse": bool(return_attn_probs),
    }


def _dense(function: str, q: Tensor, k: Tensor, v: Tensor, dropout_p: float, *options: Any) -> Result:
    refuse(function, dropout_p=dropout_p or None)
    refuse_fp8(function, q=q, k=k, v=v)
    result = attention(rows(q), rows(k), rows(v), **_options(*options))
    return (*result, q.new_empty(0)) if isinstance(result, tuple) else result


def _packed(
    function: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: dict[str, Any],
    dropout_p: float,
    block_table: Tensor | None,
    *options: Any,
) -> Result:
    refuse(function, dropout_p=dropout_p or None, block_table=block_table)
    refuse_fp8(function, q=q, k=k, v=v)
    result = attention_varlen(rows(q), rows(k), rows(v), **lengths, **_options(*options))
    return (*result, q.new_empty(0)) if isinstance(result, tuple) else result


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """flash_attn.flash_attn_qkvpacked_func: qkv (batch, seqlen, 3, nheads, headdim) -> out (batch, seqlen, nheads, headdim)."""
    return _dense(
        "flash_attn_qkvpacked_func", *split("flash_attn_qkvpacked_func", "qkv", qkv, 2, 3), dropout_p,
        softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """flash_attn.flash_attn_kvpacked_func: q (batch, seqlen_q, nheads, headdim), kv (batch, seqlen_k, 2, nheads_k, headdim)."""
    return _dense(
        "flash_attn_kvpacked_func", q, *split("flash_attn_kvpacked_func", "kv", kv, 2, 2), dropout_p,
        softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """flash_attn.flash_attn_func: q (batch, seqlen_q, nheads, headdim), k and v (batch, seqlen_k, nheads_k, headdim)."""
    return _dense(
        "flash_attn_func", q, k, v, dropout_p,
        softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """flash_attn.flash_attn_varlen_qkvpacked_func: qkv (total, 3, nheads, headdim) -> out (total, nheads, headdim)."""
    lengths = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens, "max_seqlen_q": max_seqlen, "max_seqlen_k": max_seqlen}
    return _packed(
        "flash_attn_varlen_qkvpacked_func", *split("flash_attn_varlen_qkvpacked_func", "qkv", qkv, 1, 3), lengths, dropout_p, None,
        softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """flash_attn.flash_attn_varlen_kvpacked_func: q (total_q, nheads, headdim), kv (total_k, 2, nheads_k, headdim)."""
    lengths = {
        "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k,
    }  # fmt: skip
    return _packed(
        "flash_attn_varlen_kvpacked_func", q, *split("flash_attn_varlen_kvpacked_func", "kv", kv, 1, 2), lengths, dropout_p, None,
        softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Result:
    """flash_attn.flash_attn_varlen_func: q (total_q, nheads, headdim), k and v (total_k, nheads_k, headdim)."""
    lengths = {
        "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k,
    }  # fmt: skip
    return _packed(
        "flash_attn_varlen_func", q, k, v, lengths, dropout_p, block_table,
        softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip
