"""Padding and unpadding of batches, with the functions and return values of flash_attn.bert_padding (flash-attn 2.8).

All are differentiable. Those that find out how many tokens there are (unpad_input...) synchronise with the device.
"""

from __future__ import annotations

import torch
from torch import Tensor


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """Rows of a tensor.

    Args:
        input: (rows, ...), at least two dimensions.
        indices: (n) int64.

    Returns:
        (n, ...), dtype of input.
    """
    return input.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """The inverse of index_first_axis: rows put into zeros.

    Args:
        values: (n, ...).
        indices: (n) int64, distinct.
        first_axis_dim: rows of the result.

    Returns:
        (first_axis_dim, ...), dtype of values; rows that no index names are zero.
    """
    return values.new_zeros((first_axis_dim, *values.shape[1:])).index_copy(0, indices, values)


def index_first_axis_residual(input: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """index_first_axis together with the input itself, for a residual connection."""
    return index_first_axis(input, indices), input.view_as(input)


def _cu_seqlens(lengths: Tensor) -> Tensor:
    """(n) lengths -> (n + 1) int32 offsets."""
    return torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Drop the padding of a batch.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask: (batch, seqlen), bool or int, 1 for a token.
        unused_mask: (batch, seqlen), 1 for a place that is kept, but is not a token (flash-attn's "allocated but unused").

    Returns:
        hidden_states (total, ...), the kept places of all sequences one after another; indices (total) int64, their rows in
        the flattened batch; cu_seqlens (batch + 1) int32; the longest sequence (int); seqused (batch) int32, the tokens of
        each sequence without the unused places.
    """
    kept = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = kept.sum(dim=-1, dtype=torch.int32)
    used = attention_mask.sum(dim=-1, dtype=torch.int32)
    indices = kept.flatten().nonzero().flatten()
    longest = int(lengths.max()) if lengths.numel() else 0
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, _cu_seqlens(lengths), longest, used


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Drop the padding of a batch whose rows each hold several short sequences.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask_in_length: (batch, seqlen), int: row b starts with the lengths of its sequences, then zeros
            ([2, 3, 0, 0, 0, 0]: two sequences of 2 and 3 tokens, and one place of padding).

    Returns:
        hidden_states (total, ...), indices (total) int64, cu_seqlens (sequences + 1) int32, the longest sequence (int).
    """
    tokens = attention_mask_in_length.sum(dim=-1, keepdim=True)
    places = torch.arange(attention_mask_in_length.shape[-1], device=tokens.device, dtype=tokens.dtype)
    indices = (places < tokens).flatten().nonzero().flatten()
    lengths = attention_mask_in_length[attention_mask_in_length != 0]
    longest = int(lengths.max()) if lengths.numel() else 0
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, _cu_seqlens(lengths), longest


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """The inverse of unpad_input.

    Args:
        hidden_states: (total, ...).
        indices: (total) int64, as unpad_input returned them.
        batch, seqlen: of the padded batch.

    Returns:
        (batch, seqlen, ...), zero where there is padding.
    """
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))
