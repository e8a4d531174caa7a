"""Attention on jagged tensors: rows of features of different lengths, one behind the other, as recommendation models have them
(Jagged Flash Attention, Xu et al. 2024). Plain softmax attention within each row, over flash_ext.attention_varlen."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import run
from .arguments import MAX_HEAD_DIM, check_arguments
from .call import Call
from .jagged_groups import JaggedGroups
from .varlen import attention_varlen


class _Jagged(NamedTuple):
    """values (total, heads, dim), offsets (batch + 1), lengths (batch) or None: rows fill what their offsets own."""

    values: Tensor
    offsets: Tensor
    lengths: Tensor | None


def _jagged(function: str, name: str, tensor: Any, offsets: Any) -> _Jagged:
    """A jagged nested tensor, or values with offsets, checked."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{function}: {name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.is_nested:
        if tensor.layout != torch.jagged:
            raise ValueError(f"{function}: {name} must have layout torch.jagged, got a nested tensor of layout {tensor.layout}")
        if tensor.dim() != 4 or tensor._ragged_idx != 1:
            raise ValueError(
                f"{function}: {name} must be a nested tensor (batch, jagged, heads, head_dim), got one of {tensor.dim()} "
                f"dimensions whose dimension {tensor._ragged_idx} is jagged"
            )
        return _Jagged(tensor.values(), tensor.offsets(), tensor.lengths())
    if offsets is None:
        raise ValueError(f"{function}: {name} is no nested tensor, so its offsets are needed")
    if not isinstance(offsets, Tensor):
        raise TypeError(f"{function}: offsets must be a torch.Tensor, got {type(offsets).__name__}")
    if offsets.dtype not in (torch.int32, torch.int64) or offsets.dim() != 1:
        raise ValueError(
            f"{function}: offsets must be int32 or int64 of shape (batch + 1), got {offsets.dtype} {tuple(offsets.shape)}"
        )
    return _Jagged(tensor, offsets, None)


def attention_jagged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets_q: Tensor | None = None,
    offsets_k: Tensor | None = None,
    *,
    groups: JaggedGroups | None = None,
    **options: Any,
) -> Tensor | tuple[Tensor, ...]:
    """Attention within each row of jagged tensors; no padding is stored or computed.

    Args:
        q: nested tensor of layout torch.jagged, (batch, jagged, num_heads, head_dim); or its values (total_q, num_heads, head_dim).
            head_dim may be small (16, 32).
        k, v: likewise, with num_heads_kv heads, num_heads_kv dividing num_heads. k and v are jagged alike.
        offsets_q: (batch + 1) int32 or int64, where q is values: 0 and the running sum of the lengths. Lengths of 0 are legal.
        offsets_k: the same of k and v; offsets_q by default.
        groups: of flash_ext.jagged_groups for these offsets: many rows shorter than 64 then share the kernels' tiles. Not with
            window_size, nor with nested tensors that do not fill what their offsets own.
        options: those of flash_ext.attention_varlen without sequences: causal, softmax_scale (1 / sqrt(head_dim) by default),
            window_size, softcap, sinks, alibi_slopes, k_bias ((num_heads_kv, total_k) float32), return_lse, return_max_logit,
            deterministic, validate, backend.

    Returns:
        As flash_ext.attention_varlen; out is a nested tensor where q is one. lse: (num_heads, total_q).

    Raises:
        What flash_ext.attention_varlen raises; TypeError, ValueError for tensors that are not jagged in this way. Values of offsets
        are checked on a CPU, and with validate=True.
    """
    name = "attention_jagged"
    if offsets_k is None:
        offsets_k = offsets_q
    rows_q, rows_k = _jagged(name, "q", q, offsets_q), _jagged(name, "k", k, offsets_k)
    rows_v = _jagged(name, "v", v, offsets_k)
    if rows_v.offsets is not rows_k.offsets and rows_v.offsets.shape != rows_k.offsets.shape:
        raise ValueError(f"{name}: k and v must be jagged alike, got {len(rows_k.offsets) - 1} and {len(rows_v.offsets) - 1} rows")
    packed = {
        "cu_seqlens_q": rows_q.offsets.int(), "cu_seqlens_k": rows_k.offsets.int(),
        "seqused_q": _used(rows_q), "seqused_k": _used(rows_k),
    }  # fmt: skip
    if groups is None:
        results = attention_varlen(rows_q.values, rows_k.values, rows_v.values, **packed, **options)
    else:
        call = Call(rows_q.values, rows_k.values, rows_v.values, **packed, **options, function="attention_varlen")
        results = _grouped(call, groups)
    if not q.is_nested:
        return results

    def nested(out: Tensor) -> Tensor:
        return torch.nested.nested_tensor_from_jagged(out, rows_q.offsets, rows_q.lengths)

    return nested(results) if isinstance(results, Tensor) else (nested(results[0]), *results[1:])


def _grouped(call: Call, groups: JaggedGroups) -> Tensor | tuple[Tensor, ...]:
    if not isinstance(groups, JaggedGroups):
        raise TypeError(f"attention_jagged: groups must be made by flash_ext.jagged_groups, got {type(groups).__name__}")
    check_arguments(call)
    if found := groups.violations(call):
        raise ValueError("attention_jagged: " + "; ".join(found))
    return run.results(call, groups)


def _used(rows: _Jagged) -> Tensor | None:
    return None if rows.lengths is None else rows.lengths.int()


def attention_dense_jagged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    softmax_scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """The same number of queries in every row against jagged keys, with a bias for each pair, differentiable.

    out[b, t] = sum over the keys n of row b of softmax_n(softmax_scale * q[b, t] . k[n] + bias[n, t]) v[n]

    Args:
        q: (batch, queries, num_heads, head_dim).
        k, v: nested tensors of layout torch.jagged (batch, jagged, num_heads_kv, head_dim), or values (total, num_heads_kv,
            head_dim).
        offsets: (batch + 1) int32 or int64, where k and v are values.
        bias: (total, num_heads or 1, queries) float, in the units of the scores, or None. It has a gradient.
        softmax_scale: 1 / sqrt(head_dim) by default.
        backend: as flash_ext.attention.

    Returns:
        (batch, queries, num_heads, head_dim_v), dtype of q; zeros for a row without keys.

    The bias rides on head dimensions of its own: query t has a 1 in dimension t, the key its bias over softmax_scale (in 16-bit
    dtypes in two parts, so that 16 bits of it count). head_dim may be 256 with them, so many queries take several calls.

    Raises:
        What flash_ext.attention_varlen raises; TypeError, ValueError for a bias of another shape.
    """
    name = "attention_dense_jagged"
    rows_k = _jagged(name, "k", k, offsets)
    rows_v = _jagged(name, "v", v, offsets)
    if not isinstance(q, Tensor):
        raise TypeError(f"{name}: q must be a torch.Tensor, got {type(q).__name__}")
    if q.is_nested or q.dim() != 4:
        raise ValueError(f"{name}: q must be (batch, queries, num_heads, head_dim)")
    batch, queries, heads, head_dim = q.shape
    if batch != len(rows_k.offsets) - 1:
        raise ValueError(f"{name}: k must have q.batch rows, got {len(rows_k.offsets) - 1} and {batch}")
    cu_k = rows_k.offsets.int()
    scale = head_dim**-0.5 if softmax_scale is None else float(softmax_scale)

    def attend(part: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        cu_q = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * part.shape[1]
        out = attention_varlen(
            part.flatten(0, 1), keys, values, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, seqused_k=_used(rows_k), softmax_scale=scale,
            backend=backend,
        )  # fmt: skip
        return out.unflatten(0, part.shape[:2])

    keys, values = rows_k.values, rows_v.values
    if bias is None:
        return attend(q, keys, values)
    if not isinstance(bias, Tensor):
        raise TypeError(f"{name}: bias must be a torch.Tensor or None, got {type(bias).__name__}")
    total = keys.shape[0]
    if bias.dim() != 3 or bias.shape[0] != total or bias.shape[1] not in (1, heads) or bias.shape[2] != queries:
        raise ValueError(
            f"{name}: bias must be (total, num_heads or 1, queries) = ({total}, {heads} or 1, {queries}), got {tuple(bias.shape)}"
        )
    if scale == 0:
        raise ValueError(f"{name}: softmax_scale must not be 0 with a bias")
    parts = 1 if q.dtype in (torch.float32, torch.float64) else 2
    step = (MAX_HEAD_DIM - head_dim) // parts // 8 * 8
    if step < 1:
        raise ValueError(f"{name}: head_dim must be at most {MAX_HEAD_DIM - 8 * parts} with a bias, got {head_dim}")
    if bias.shape[1] > 1:  # a bias for each query head: each needs keys of its own
        group = heads // keys.shape[1]
        keys, values = (t.repeat_interleave(group, 1) for t in (keys, values))
    scaled = bias.expand(-1, keys.shape[1], -1) / scale
    outs = []
    for begin in range(0, queries, step):
        some = scaled[..., begin : begin + step]
        high = some.to(q.dtype)
        columns = [high]
        if parts == 2:  # what rounding took away; the gradient is the first part's
            columns.append((some - high).detach().to(q.dtype))
        count = some.shape[-1]
        ones = torch.eye(count, dtype=q.dtype, device=q.device).repeat(1, parts)
        ones = ones[None, :, None].expand(batch, count, heads, parts * count)
        wide_q = torch.cat([q[:, begin : begin + step], ones], -1)
        wide_k = torch.cat([keys, *columns], -1)
        padding = -wide_q.shape[-1] % 8
        wide_q, wide_k = (torch.nn.functional.pad(t, (0, padding)) for t in (wide_q, wide_k))
        outs.append(attend(wide_q, wide_k, values))
    return torch.cat(outs, 1) if outs else q.new_empty(batch, 0, heads, values.shape[-1])
