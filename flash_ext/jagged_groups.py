"""Short sequences grouped, so that one tile of a kernel holds several: for attention_jagged(..., groups=...).

A kernel takes tiles of 128 queries and 128 keys, each of one sequence: a sequence of 20 tokens fills a sixth of both. Grouped,
neighbouring sequences share a tile, and each row sees the keys of its own sequence by tables. Grouping is greedy (first fit in
the order given, as Krell et al. 2021 pack training examples), made on the device without a synchronisation, once for
all layers of a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import op_gradients, ops, sequences
from .call import Call, Inputs

CAPACITY = 128  # rows of a group, and of the tiles of the kernels that take groups


class GroupedInputs(NamedTuple):
    """The leading arguments of flash_ext::fwd_jagged: those of a packed call, and what groups add."""

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    groups_q: Tensor
    groups_k: Tensor
    keys_of: Tensor
    queries_of: Tensor
    sinks: Tensor | None
    alibi_slopes: Tensor | None
    k_bias: Tensor | None
    softmax_scale: float
    causal: bool
    softcap: float

    def packed(self) -> Inputs:
        """The same call without groups."""
        return Inputs(
            self.q, self.k, self.v, self.cu_seqlens_q, self.cu_seqlens_k, None, None, None, None, self.sinks,
            self.alibi_slopes, self.k_bias, self.softmax_scale, self.causal, -1, -1, self.softcap, (),
        )  # fmt: skip


GROUPED_TENSORS = 12  # the first fields of GroupedInputs are tensors or None


@dataclass(frozen=True, eq=False)
class JaggedGroups:
    """Which neighbouring sequences share tiles, for attention_jagged on tensors of these offsets, in any layer.

    Args:
        offsets_q, offsets_k: (batch + 1) int32: where the sequences begin.
        groups_q, groups_k: (groups + 1) int32: where the groups do; behind the last one, its end again.
        keys_of: (total_q, 2) int32: rows [begin, end) of k that each query sees.
        queries_of: (total_k, 2) int32: rows of q that see each key.
        causal: whether these tables are of the causal mask.
    """

    offsets_q: Tensor
    offsets_k: Tensor
    groups_q: Tensor
    groups_k: Tensor
    keys_of: Tensor
    queries_of: Tensor
    causal: bool

    def inputs(self, call: Call) -> GroupedInputs:
        """The ops' arguments of a call of attention_jagged, which has been checked."""
        scale = call.q.shape[-1] ** -0.5 if call.softmax_scale is None else float(call.softmax_scale)
        return GroupedInputs(
            call.q, call.k, call.v, self.offsets_q, self.offsets_k, self.groups_q, self.groups_k, self.keys_of, self.queries_of,
            call.sinks, call.alibi_slopes, call.k_bias, scale, call.causal, float(call.softcap),
        )  # fmt: skip

    def violations(self, call: Call) -> list[str]:
        """Why the groups cannot serve a call, in words."""
        found = []
        for name, table, tensor, offsets, own in (
            ("q", self.keys_of, call.q, call.cu_seqlens_q, self.offsets_q),
            ("k", self.queries_of, call.k, call.cu_seqlens_k, self.offsets_k),
        ):
            if tensor.shape[0] != table.shape[0] or offsets.shape != own.shape:
                found.append(
                    f"groups were made for {table.shape[0]} rows of {name} in {len(own) - 1} sequences, got {tensor.shape[0]} in "
                    f"{len(offsets) - 1}"
                )
            elif sequences.readable(call) and offsets.device == own.device and not torch.equal(offsets, own):
                at = int((offsets != own).nonzero()[0])
                values = f"got {int(offsets[at])} and {int(own[at])} at {at}"
                found.append(f"offsets_{name} must be those that groups were made for, {values}")
        if self.keys_of.device != call.q.device:
            found.append(f"groups.device must equal q.device, got {self.keys_of.device} and {call.q.device}")
        if self.causal != call.causal:
            found.append(f"causal must be what groups were made for, got {call.causal} and {self.causal}")
        if tuple(call.window_size) != (-1, -1):
            found.append(f"window_size must be (-1, -1) with groups, got {tuple(call.window_size)}")
        if call.seqused_q is not None or call.seqused_k is not None:
            found.append("groups are of sequences that fill what their offsets own")
        return found


def _checked_offsets(name: str, offsets: Tensor) -> None:
    if not isinstance(offsets, Tensor):
        raise TypeError(f"jagged_groups: {name} must be a torch.Tensor, got {type(offsets).__name__}")
    if offsets.dtype not in (torch.int32, torch.int64) or offsets.dim() != 1 or len(offsets) == 0:
        raise ValueError(
            f"jagged_groups: {name} must be int32 or int64 of shape (batch + 1), got {offsets.dtype} {tuple(offsets.shape)}"
        )


def jagged_groups(
    offsets_q: Tensor, offsets_k: Tensor | None = None, *, total_q: int, total_k: int | None = None, causal: bool = False
) -> JaggedGroups:
    """Groups of neighbouring sequences with at most 128 queries and at most 128 keys together; a longer one stays alone.

    Args:
        offsets_q: (batch + 1) int32 or int64: 0 and the running sum of the lengths of the queries' sequences.
        offsets_k: the same of the keys; offsets_q by default.
        total_q, total_k: rows of q, and of k and v (total_q by default). Ints, so that nothing need be read from the device.
        causal: for causal calls, aligned to the last key of each sequence.

    Returns:
        JaggedGroups on the offsets' device, for attention_jagged(..., groups=...). Worth it where many sequences are shorter
        than 64; it takes about 2 log2(2 total / 128) small operations, so make it once for all layers.

    Raises:
        TypeError, ValueError: arguments of another kind or shape. Values of offsets are checked by attention_jagged.
    """
    if offsets_k is None:
        offsets_k, total_k = offsets_q, total_q if total_k is None else total_k
    for name, offsets in (("offsets_q", offsets_q), ("offsets_k", offsets_k)):
        _checked_offsets(name, offsets)
    if offsets_q.shape != offsets_k.shape or offsets_q.device != offsets_k.device:
        raise ValueError(
            f"jagged_groups: offsets_q and offsets_k must have one shape and device, got {tuple(offsets_q.shape)} on "
            f"{offsets_q.device} and {tuple(offsets_k.shape)} on {offsets_k.device}"
        )
    for name, total in (("total_q", total_q), ("total_k", total_k)):
        if not isinstance(total, int) or isinstance(total, bool):
            raise TypeError(f"jagged_groups: {name} must be an int, got {type(total).__name__}")
        if total < 0:
            raise ValueError(f"jagged_groups: {name} must be at least 0, got {total}")
    # Offsets that cannot be right name nothing outside the tensors.
    of_q, of_k = (t.long().clamp(0, most).cummax(0)[0] for t, most in ((offsets_q, total_q), (offsets_k, total_k)))
    batch, device = len(of_q) - 1, of_q.device
    # Of two neighbouring groups, the queries or the keys are more than one group may have.
    most_groups = min(batch, 2 * (total_q // CAPACITY + total_k // CAPACITY) + 2)
    # The group that begins with sequence i ends before sequence following[i].
    ends = (torch.searchsorted(t, t + CAPACITY, right=True) - 1 for t in (of_q, of_k))
    following = torch.minimum(*ends).maximum(torch.arange(1, batch + 2, device=device)).clamp(max=batch)
    begins = torch.zeros(batch + 1, dtype=torch.int32, device=device)
    begins[0] = 1
    for _ in range(max(1, most_groups).bit_length()):  # those that 1, 2, 4, ... groups lie before are known
        begins = torch.zeros_like(begins).index_add_(0, following, begins).add_(begins).clamp_(max=1)
        following = following[following]
    number = begins[:-1].cumsum(0) - 1
    place = number.where(begins[:-1] > 0, most_groups + 1).clamp(max=most_groups + 1)
    groups = []
    for offsets in (of_q, of_k):
        padded = offsets[-1:].expand(most_groups + 2).int().clone()
        groups.append(padded.scatter_(0, place, offsets[:-1].int())[:-1])
    rows = []
    for own, other, total in ((of_q, of_k, total_q), (of_k, of_q, total_k)):
        row = torch.arange(total, device=device)
        sequence = (torch.searchsorted(own, row, right=True) - 1).clamp(0, max(0, batch - 1))
        if batch == 0:
            rows.append(torch.zeros(total, 2, dtype=torch.int32, device=device))
            continue
        begin, end = other[sequence], other[sequence + 1]
        if causal:
            # Where the row meets the diagonal, which ends in the last row of both.
            diagonal = row - own[sequence + 1] + end
            if not rows:  # of queries
                end = (diagonal + 1).maximum(begin)
            else:
                begin = diagonal.maximum(begin)
        rows.append(torch.stack([begin, end], 1).int())
    return JaggedGroups(offsets_q.int(), offsets_k.int(), *groups, *rows, causal)


# --- the ops ---

_QKV = "Tensor q, Tensor k, Tensor v"
_REST = (
    "Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor groups_q, Tensor groups_k, Tensor keys_of, Tensor queries_of, "
    "Tensor? sinks, Tensor? alibi_slopes, Tensor? k_bias, float softmax_scale, bool causal, float softcap"
)
_RESULTS = "(Tensor out, Tensor lse, Tensor max_logit)"
_SAVED = f"Tensor? dout, Tensor? dlse, {_QKV}, Tensor out, Tensor lse"
_GRADIENTS = "(Tensor dq, Tensor dk, Tensor dv, Tensor dsinks, Tensor dk_bias)"
for _schema in (
    f"fwd_jagged({_QKV}, {_REST}, bool return_max_logit, bool deterministic, str? backend) -> {_RESULTS}",
    f"bwd_jagged({_SAVED}, {_REST}, bool deterministic, int wanted, str? backend) -> {_GRADIENTS}",
    f"reference_fwd_jagged({_QKV}, {_REST}, bool return_max_logit, str reason) -> {_RESULTS}",
    f"reference_bwd_jagged({_SAVED}, {_REST}, bool deterministic, int wanted, str reason) -> {_GRADIENTS}",
):
    ops._library.define(_schema, tags=ops._tags)


def _forward(op: str):
    """Without kernels for groups: the packed call that it is."""
    count = len(GroupedInputs._fields)

    def forward(*arguments):
        return getattr(torch.ops.flash_ext, op)(*GroupedInputs(*arguments[:count]).packed(), *arguments[count:])

    return forward


def _backward(op: str):
    count = len(GroupedInputs._fields) - 3

    def backward(dout, dlse, q, k, v, out, lse, *arguments):
        packed = GroupedInputs(q, k, v, *arguments[:count]).packed()
        return getattr(torch.ops.flash_ext, op)(dout, dlse, q, k, v, out, lse, *packed[3:], *arguments[count:])

    return backward


for _name, _make in (("fwd", _forward), ("bwd", _backward), ("reference_fwd", _forward), ("reference_bwd", _backward)):
    ops._library.impl(f"{_name}_jagged", _make(_name), "CompositeExplicitAutograd")


def _fake_fwd(*arguments):
    count = len(GroupedInputs._fields)
    return ops._fake_fwd(*GroupedInputs(*arguments[:count]).packed(), *arguments[count:])


def _fake_bwd(dout, dlse, q, k, v, out, lse, *arguments):
    count = len(GroupedInputs._fields) - 3
    packed = GroupedInputs(q, k, v, *arguments[:count]).packed()
    return ops._fake_bwd(dout, dlse, q, k, v, out, lse, *packed[3:], *arguments[count:])


for _name, _fake in (
    ("fwd_jagged", _fake_fwd), ("reference_fwd_jagged", _fake_fwd), ("bwd_jagged", _fake_bwd), ("reference_bwd_jagged", _fake_bwd),
):  # fmt: skip
    torch.library.register_fake(f"flash_ext::{_name}", _fake, lib=ops._library)

op_gradients.register(GroupedInputs, GROUPED_TENSORS, "_jagged")
