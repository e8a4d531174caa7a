"""Packing: training on examples laid one behind the other, without padding and without one example seeing another.

Krell et al. 2021 ("Efficient sequence packing without cross-contamination"); Kundu et al. 2024 ("Enhancing training efficiency
using packing with flash attention") for position ids that restart at 0 as the only sign of an example's start.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .varlen import attention_varlen


def cu_seqlens_from_position_ids(position_ids: Tensor, *, max_sequences: int | None = None, validate: bool = False) -> Tensor:
    """Where the examples of a packed row begin, from positions that restart, without a synchronisation.

    An example starts at the first token of a row and wherever a position is not the one before plus 1.

    Args:
        position_ids: (total) or (batch, seqlen) int32 or int64; rows are taken one behind the other, as reshape does it.
        max_sequences: at least the number of examples; total by default. The result's length depends on it alone, because the
            true number is known to the device only.
        validate: check max_sequences on a GPU too, which waits for it. On a CPU it is always checked. Where it is too small and
            not checked, tokens beyond the last example counted are in no sequence: attention gives them out = 0.

    Returns:
        (max_sequences + 1) int32 on position_ids' device: cu_seqlens for attention_varlen. Behind the last example, its end
        again: empty sequences.

    Raises:
        TypeError, ValueError: arguments of another kind; positions with more dimensions (as M-RoPE's) do not tell where
            examples begin; more examples than max_sequences.
    """
    if not isinstance(position_ids, Tensor):
        raise TypeError(f"cu_seqlens_from_position_ids: position_ids must be a torch.Tensor, got {type(position_ids).__name__}")
    if max_sequences is not None and (not isinstance(max_sequences, int) or isinstance(max_sequences, bool)):
        raise TypeError(f"cu_seqlens_from_position_ids: max_sequences must be an int or None, got {type(max_sequences).__name__}")
    if position_ids.dim() not in (1, 2) or position_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            "cu_seqlens_from_position_ids: position_ids must be int32 or int64 of shape (total) or (batch, seqlen), got "
            f"{position_ids.dtype} {tuple(position_ids.shape)}; with positions of another kind, pass cu_seqlens yourself"
        )
    total = position_ids.numel()
    most = total if max_sequences is None else max_sequences
    if most < 0:
        raise ValueError(f"cu_seqlens_from_position_ids: max_sequences must be at least 0, got {most}")
    rows = torch.atleast_2d(position_ids)
    starts = torch.ones_like(rows, dtype=torch.bool)
    starts[:, 1:] = rows[:, 1:] != rows[:, :-1] + 1
    number = starts.flatten().cumsum(0) - 1
    if max_sequences is not None and (validate or position_ids.device.type == "cpu") and not torch.compiler.is_compiling():
        found = int(number[-1]) + 1 if total else 0
        if found > most:
            raise ValueError(f"cu_seqlens_from_position_ids: max_sequences must be at least the {found} examples, got {most}")
    # Starts go to their example's place, the first one too many to the end, everything else to a place that is dropped.
    place = number.clamp(max=most).where(starts.flatten() & (number <= most), most + 1)
    cu_seqlens = torch.full((most + 2,), total, dtype=torch.int32, device=position_ids.device)
    return cu_seqlens.scatter_(0, place, torch.arange(total, dtype=torch.int32, device=position_ids.device))[:-1]


def attention_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position_ids: Tensor,
    *,
    causal: bool = True,
    max_sequences: int | None = None,
    **options: Any,
) -> Tensor | tuple[Tensor, ...]:
    """Attention within each of the examples that are packed into the rows of a batch.

    Args:
        q: (batch, seqlen, num_heads, head_dim). k, v: (batch, seqlen, num_heads_kv, head_dim), the same tokens. Or packed,
            (total, heads, head_dim).
        position_ids: (batch, seqlen), (1, total) or (total) int32 or int64: positions that restart at each example, as
            transformers' padding-free collators make them.
        causal: tokens see no later token (the default, unlike attention's: packing is for language models).
        max_sequences: see cu_seqlens_from_position_ids; a number close to the truth saves work.
        options: the other options of flash_ext.attention_varlen (softmax_scale, window_size, softcap, return_lse, ...).

    Returns:
        As flash_ext.attention: out of q's shape; lse (batch, num_heads, seqlen), packed (num_heads, total).

    Raises:
        What flash_ext.attention_varlen and cu_seqlens_from_position_ids raise; ValueError where position_ids do not fit q.
    """
    cu_seqlens = cu_seqlens_from_position_ids(position_ids, max_sequences=max_sequences)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"attention_packed: {name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dim() not in (3, 4) or tensor.dim() != q.dim():
            raise ValueError(
                f"attention_packed: {name} must be (batch, seqlen, heads, head_dim) or (total, heads, head_dim), "
                f"as q, got {tuple(tensor.shape)}"
            )
        if tensor.shape[:-2].numel() != position_ids.numel() or tensor.shape[:-2] != q.shape[:-2]:
            raise ValueError(
                f"attention_packed: position_ids must have a number for each token of {name}, got {tuple(position_ids.shape)} and "
                f"{tuple(tensor.shape)}"
            )
    flat = [t.flatten(0, 1) if t.dim() == 4 else t for t in (q, k, v)]
    results = attention_varlen(*flat, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, causal=causal, **options)
    if q.dim() == 3:
        return results
    if isinstance(results, Tensor):
        return results.unflatten(0, q.shape[:2])
    # (total, heads, dim), (heads, total), (heads): out, lse, max_logit, of which the last two may be missing.
    shaped = {
        3: lambda t: t.unflatten(0, q.shape[:2]),
        2: lambda t: t.unflatten(1, q.shape[:2]).transpose(0, 1),
        1: lambda t: t,
    }
    return tuple(shaped[t.dim()](t) for t in results)


class PackingCollator:
    """Collates tokenised examples into packed rows, for a Hugging Face dataset and a model that attends by position ids.

    collator([{"input_ids": [...], "labels": [...]}, ...]) returns a dict of int64 tensors (rows, length): input_ids, labels
    (input_ids if an example has none), position_ids, and every other value that is a sequence as long as its example's
    input_ids; attention_mask is left out, since position_ids say what it would.

    Args:
        max_tokens: length of every row. Examples go to the first row with room, in as many rows as they need; rows are filled up
            with padding. None: one row of everything, without padding.
        return_cu_seqlens: also return cu_seq_lens_q, cu_seq_lens_k ((examples + 1) int32, over the rows one behind the other) and
            max_length_q, max_length_k (ints), the names that transformers' models pass on. Padding at the end of a row counts as an
            example.
        separator_label: label of an example's first token, which no token of the example predicts, and of padding.
        sort: "none" packs in the given order, "ffd" longest first (first-fit decreasing), which leaves less padding.
        pad_token_id: input_ids of padding.

    Raises:
        ValueError: an option out of range; an example longer than max_tokens, without input_ids, or with labels of another length.
    """

    def __init__(
        self,
        max_tokens: int | None = None,
        return_cu_seqlens: bool = True,
        separator_label: int = -100,
        sort: str = "none",
        pad_token_id: int = 0,
    ) -> None:
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"PackingCollator: max_tokens must be at least 1 or None, got {max_tokens}")
        if sort not in ("none", "ffd"):
            raise ValueError(f"PackingCollator: sort must be 'none' or 'ffd', got {sort!r}")
        self.max_tokens, self.return_cu_seqlens, self.separator_label = max_tokens, return_cu_seqlens, separator_label
        self.sort, self.pad_token_id = sort, pad_token_id

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        columns = [self._columns(i, example) for i, example in enumerate(examples)]
        lengths = [len(column["input_ids"]) for column in columns]
        if self.max_tokens is not None and max(lengths, default=0) > self.max_tokens:
            longest = lengths.index(max(lengths))
            raise ValueError(
                f"PackingCollator: an example must have at most max_tokens = {self.max_tokens} tokens, got {lengths[longest]} in "
                f"example {longest}"
            )
        rows = self._rows(lengths)
        names = set(columns[0]) if columns else {"input_ids", "labels", "position_ids"}
        for column in columns:
            names &= set(column)
        fill = {"input_ids": self.pad_token_id, "labels": self.separator_label}
        packed: dict[str, list[list[int]]] = {name: [] for name in sorted(names)}
        bounds = [0]
        for row in rows:
            used = sum(lengths[i] for i in row)
            padding = 0 if self.max_tokens is None else self.max_tokens - used
            for name, of_rows in packed.items():
                tail = list(range(padding)) if name == "position_ids" else [fill.get(name, 0)] * padding
                of_rows.append([value for i in row for value in columns[i][name]] + tail)
            for length in (*(lengths[i] for i in row), padding):
                if length:
                    bounds.append(bounds[-1] + length)
        result: dict[str, Any] = {name: torch.tensor(of_rows, dtype=torch.int64) for name, of_rows in packed.items()}
        if self.return_cu_seqlens:
            cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
            longest = max((b - a for a, b in itertools.pairwise(bounds)), default=0)
            result |= {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens, "max_length_q": longest, "max_length_k": longest}
        return result

    def _columns(self, number: int, example: Mapping[str, Any]) -> dict[str, list[int]]:
        """What is said of each token of one example."""
        if "input_ids" not in example:
            raise ValueError(f"PackingCollator: example {number} has no input_ids, but {', '.join(sorted(example))}")
        values = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in example.items()}
        tokens = values["input_ids"]
        columns = {
            name: list(value)
            for name, value in values.items()
            if name != "attention_mask" and isinstance(value, Sequence) and not isinstance(value, str) and len(value) == len(tokens)
        }
        labels = values.get("labels", tokens)
        if len(labels) != len(tokens):
            raise ValueError(f"PackingCollator: example {number} has {len(tokens)} input_ids and {len(labels)} labels")
        columns["labels"] = [self.separator_label, *labels[1:]] if len(tokens) else []
        columns["position_ids"] = list(range(len(tokens)))
        return columns

    def _rows(self, lengths: list[int]) -> list[list[int]]:
        """The examples of each row: first fit, in the order of `sort`; examples of one row keep that order."""
        order = list(range(len(lengths)))
        if self.sort == "ffd":
            order.sort(key=lambda i: -lengths[i])
        if self.max_tokens is None:
            return [order]
        rows: list[list[int]] = []
        room: list[int] = []
        for i in order:
            row = next((r for r, left in enumerate(room) if left >= lengths[i]), None)
            if row is None:
                row = len(rows)
                rows.append([])
                room.append(self.max_tokens)
            rows[row].append(i)
            room[row] -= lengths[i]
        return rows
