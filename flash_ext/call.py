"""One call as plain data: what the user asked for (Call), and the leading arguments of the ops (Inputs)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .block_mask import BlockMask


class Call(NamedTuple):
    """Every argument of attention, attention_varlen and attention_partials; function: which of them, for messages."""

    q: Tensor
    k: Tensor
    v: Tensor
    causal: bool = False
    softmax_scale: float | None = None
    window_size: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    sinks: Tensor | None = None
    alibi_slopes: Tensor | None = None
    k_bias: Tensor | None = None
    return_lse: bool = False
    return_max_logit: bool = False
    deterministic: bool | None = None
    backend: str | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    max_seqlen_q: int | Tensor | None = None
    max_seqlen_k: int | Tensor | None = None
    seqused_q: Tensor | None = None
    seqused_k: Tensor | None = None
    leftpad_q: Tensor | None = None
    leftpad_k: Tensor | None = None
    validate: bool = False
    split_boundaries: Sequence[int] | None = None
    block_mask: BlockMask | None = None
    # Of float8_e4m3fn calls alone (flash_ext/fp8.py).
    q_descale: Tensor | None = None
    k_descale: Tensor | None = None
    v_descale: Tensor | None = None
    out_dtype: torch.dtype | None = None
    flush_every: int | None = None
    function: str = "attention"

    def inputs(self) -> Inputs:
        """The ops' arguments, defaults filled in."""
        scale = self.softmax_scale
        return Inputs(
            self.q, self.k, self.v, self.cu_seqlens_q, self.cu_seqlens_k, self.seqused_q, self.seqused_k, self.leftpad_q,
            self.leftpad_k, self.sinks, self.alibi_slopes, self.k_bias,
            self.q.shape[-1] ** -0.5 if scale is None else float(scale), self.causal, self.window_size[0],
            self.window_size[1], float(self.softcap), self.split_boundaries or (),
        )  # fmt: skip

    def inputs_with_block_mask(self) -> BlockMaskInputs:
        """The arguments of the ops that take a BlockMask; causal and window_size become part of it."""
        scale = self.softmax_scale
        mask = self.block_mask.within_window(self.causal, self.window_size)
        return BlockMaskInputs(
            self.q, self.k, self.v, *mask.tensors(), self.sinks, self.alibi_slopes, self.k_bias,
            self.q.shape[-1] ** -0.5 if scale is None else float(scale), float(self.softcap),
        )  # fmt: skip


OPTIONS = tuple(name for name in Call._fields if name not in ("q", "k", "v", "function"))
VARLEN_OPTIONS = (
    "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "seqused_q", "seqused_k", "leftpad_q", "leftpad_k",
    "validate",
)  # fmt: skip


class Inputs(NamedTuple):
    """What determines out, lse and their gradients, in the order of the ops' schemas (shapes: attention, attention_varlen).

    cu_seqlens_q given: packed sequences. split_boundaries not empty: the results of each part of the keys by itself.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    seqused_q: Tensor | None
    seqused_k: Tensor | None
    leftpad_q: Tensor | None
    leftpad_k: Tensor | None
    sinks: Tensor | None
    alibi_slopes: Tensor | None
    k_bias: Tensor | None
    softmax_scale: float
    causal: bool
    window_left: int
    window_right: int
    softcap: float
    split_boundaries: Sequence[int]

    @property
    def packed(self) -> bool:
        return self.cu_seqlens_q is not None

    @property
    def out_shape(self) -> tuple[Any, ...]:
        """(batch, seqlen_q, num_heads, head_dim_v), packed (total_q, num_heads, head_dim_v), split with the parts in front."""
        return *self._parts, *self.q.shape[:-1], self.v.shape[-1]

    @property
    def lse_shape(self) -> tuple[Any, ...]:
        """(batch, num_heads, seqlen_q), packed (num_heads, total_q), split with the parts in front."""
        *batch, rows, heads, _ = self.q.shape
        return *self._parts, *batch, heads, rows

    @property
    def _parts(self) -> tuple[int, ...]:
        return (len(self.split_boundaries) - 1,) if self.split_boundaries else ()


TENSORS = 12  # the first fields of Inputs are tensors or None

# Bits of the backward's `wanted`: which gradients to compute.
WANT_DQ, WANT_DK, WANT_DV, WANT_DSINKS, WANT_DK_BIAS = 1, 2, 4, 8, 16


class BlockMaskInputs(NamedTuple):
    """What determines out, lse and their gradients under a BlockMask, in the order of the ops' schemas; shapes as in
    attention and BlockMask."""

    q: Tensor
    k: Tensor
    v: Tensor
    row_offsets: Tensor
    row_partial: Tensor
    row_entries: Tensor
    column_offsets: Tensor
    column_partial: Tensor
    column_entries: Tensor
    bits: Tensor
    turns: Tensor
    row_order: Tensor
    column_order: Tensor
    sinks: Tensor | None
    alibi_slopes: Tensor | None
    k_bias: Tensor | None
    softmax_scale: float
    softcap: float

    def row_lists(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.row_offsets, self.row_partial, self.row_entries, self.bits


BLOCK_MASK_TENSORS = 16  # the first fields of BlockMaskInputs are tensors or None
