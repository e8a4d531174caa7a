"""Masks of Hugging Face's transformers: from its description of a mask to arguments of flash_ext.attention.

transformers calls a mask function once a forward pass, and hands what it returns to the attention function of every layer,
by way of the model and sometimes of another device, a compiled graph, or the mask function again (which leaves tensors of four
dimensions alone). So a mask made here is a tensor that says everything by its dtype and shape, and nothing is ever as
large as (queries, keys):

    int32 (batch, 2 + code, 3, keys): code bit 0: causal; bit 1: the sliding window counts. The words are the bits of float32
        numbers, 0 for a visible key and -inf for a hidden one, equal in all of the two middle dimensions (stride 0). keys = 0:
        every key is visible; otherwise keys beyond are cut off (a static cache is longer than what it holds). The last query
        stands at the last key.
    int32 (1, 2 + code, sequences + 1): cu_seqlens of several sequences in the flattened batch.

It is never None, and its middle dimensions fit nothing, because models with an attention of their own, which asks no interface,
get their masks here too: they would go without a mask, and stop at a shape instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .common import describe

_NAME = "transformers attention mask"
_HIDDEN = torch.tensor(-torch.inf).view(torch.int32).item()
_MODULE = "transformers.masking_utils"


@dataclass(frozen=True)
class Structure:
    """What an attention function needs to know of a mask."""

    causal: bool
    window_size: tuple[int, int] = (-1, -1)
    key_bias: Tensor | None = None  # (batch, keys) float32
    seqlen_k: int | None = None  # keys to keep; None: all
    cu_seqlens: Tensor | None = None  # (sequences + 1) int32


@dataclass
class _Pattern:
    """A mask function of transformers, taken apart."""

    causal: bool = False
    window: int | None = None  # keys to the left that a row sees besides itself; two-sided if not causal
    chunk: int | None = None
    starts: Tensor | None = None  # (batch, seqlen) bool: a sequence starts here


def _take_apart(function: Callable, pattern: _Pattern) -> bool:
    """Add what a mask function asks for to pattern; False if it is none of transformers' own.

    transformers combines closures; their names and cells are all there is to tell a sliding window from another function.
    """
    if getattr(function, "__module__", None) != _MODULE:
        return False
    name = function.__qualname__.split(".")[0]
    cells = {n: c.cell_contents for n, c in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)}
    if name == "and_masks":
        return all(_take_apart(part, pattern) for part in cells["mask_functions"])
    if name == "causal_mask_function":
        pattern.causal = True
    elif name == "sliding_window_overlay":
        pattern.window = cells["sliding_window"] - 1
    elif name == "sliding_window_bidirectional_overlay":
        pattern.window = cells["sliding_window"]
    elif name == "chunked_overlay":
        pattern.chunk = cells["chunk_size"]
    elif name == "packed_sequence_mask_function":
        numbers = cells["packed_sequence_mask"]
        pattern.starts = torch.ones_like(numbers, dtype=torch.bool)
        pattern.starts[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    elif name == "remap_positions_for_packed_sequence":
        return _take_apart(cells["mask_function"], pattern)
    else:
        return name == "bidirectional_mask_function"
    return True


def _take_apart_traced(masks: Any, function: Callable, call: dict[str, Any], pattern: _Pattern) -> bool:
    """_take_apart by the other arguments of the call, because torch.compile does not let a closure be looked into.

    Args:
        masks: transformers.masking_utils.
        call: may_skip, bidirectional, use_vmap, local_size, config, attention_mask, batch, q_length, kv_length, device.
    """
    pattern.causal = not call["bidirectional"]
    if function is masks.causal_mask_function or function is masks.bidirectional_mask_function:
        return True
    if call["use_vmap"] or function.__code__ != masks.and_masks(masks.causal_mask_function).__code__:
        return False
    size, config = call["local_size"], call["config"]
    if size is not None:
        window, chunk = (getattr(config, name, None) == size for name in ("sliding_window", "attention_chunk_size"))
        if window == chunk:
            return False
        if chunk:
            pattern.chunk = size
        else:
            pattern.window = size - 1 if pattern.causal else size
    packed = not call["may_skip"] and call["attention_mask"] is None and call["q_length"] == call["kv_length"]
    if packed:
        # A row sees the key before it if both belong to the same sequence (or if its window is no larger than itself).
        rows = torch.arange(1, call["q_length"], device=call["device"])[None, None, :, None]
        batches = torch.arange(call["batch"], device=call["device"])[:, None, None, None]
        together = function(batches, torch.zeros_like(batches[:1]), rows, rows - 1)[:, 0, :, 0]
        pattern.starts = torch.nn.functional.pad(~together.expand(call["batch"], -1), (1, 0), value=True)
    return packed or size is not None


def _readable(device: torch.device) -> bool:
    """Whether values on the device may be read by the host: not while compiling, exporting or capturing a CUDA graph."""
    if torch.compiler.is_compiling():
        return False
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def make_mask(
    masks: Any,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    **kwargs: Any,
) -> Tensor:
    """The mask function; arguments as transformers passes them to those of AttentionMaskInterface.

    Args:
        masks: transformers.masking_utils.
        q_length, kv_length: queries and keys of this pass; q_offset, kv_offset: positions of the first of each.
        mask_function: (batch, head, query, key) -> bool; None: causal.
        attention_mask: (batch, positions) bool, False at padding.
        local_size: the sliding window, or the chunk.
        allow_is_causal_skip, allow_is_bidirectional_skip: False: the caller wants the mask itself.
        use_vmap: mask_function is not made of transformers' functions alone.

    Returns:
        As the module says.

    Raises:
        NotImplementedError: the mask differs from query to query in a way of the model's own.
    """
    device = torch.device(device)
    mask_function = masks.causal_mask_function if mask_function is None else mask_function

    def draw() -> Tensor:
        return masks.sdpa_mask(
            batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
            mask_function=mask_function, attention_mask=attention_mask, allow_is_causal_skip=False,
            allow_is_bidirectional_skip=False, use_vmap=use_vmap, device=device,
        )  # fmt: skip

    bidirectional = allow_is_bidirectional_skip is not None
    may_skip = allow_is_bidirectional_skip if bidirectional else allow_is_causal_skip
    pattern = _Pattern()
    if torch.compiler.is_compiling():
        call = {
            "may_skip": may_skip, "bidirectional": bidirectional, "use_vmap": use_vmap, "local_size": local_size, "config": config,
            "attention_mask": attention_mask, "batch": batch_size, "q_length": q_length, "kv_length": kv_length, "device": device,
        }  # fmt: skip
        known = _take_apart_traced(masks, mask_function, call, pattern)
    else:
        known = _take_apart(mask_function, pattern)

    if isinstance(q_offset, Tensor) and q_length > 1 and _readable(q_offset.device):
        q_offset = int(q_offset)
    ends_together = not isinstance(q_offset, Tensor) and q_offset + q_length <= kv_offset + kv_length
    needs_the_end = pattern.causal or pattern.window is not None
    keys = q_offset + q_length - kv_offset if needs_the_end and ends_together else kv_length
    if pattern.chunk is not None and keys + kv_offset > pattern.chunk:
        known = False
    if not known or (needs_the_end and not ends_together):
        if q_length == 1:
            return _coded(draw()[:, 0, 0].expand(batch_size, kv_length), batch_size, False, False, device)
        raise NotImplementedError(
            f"{_NAME}: not supported by flash_ext: {_what(mask_function, pattern, q_offset)}, with {q_length} queries and "
            f"{kv_length} keys; 'sdpa' and 'flex_attention' draw such masks"
        )
    windowed = pattern.window is not None and keys > pattern.window + 1
    if pattern.starts is not None:
        return _sequences(pattern.starts, pattern.causal, windowed)
    if not may_skip and q_length > 1:
        # Whoever asks for a whole mask computes with it, and in a form (bool, float) that depends on the implementation.
        raise NotImplementedError(
            f"{_NAME}: not supported by flash_ext: a model that computes with its mask (allow_is_..._skip=False)"
        )

    visible = None
    if attention_mask is not None:
        visible = attention_mask[:, kv_offset : kv_offset + keys]
        missing = keys - visible.shape[1]
        if missing > 0:
            visible = torch.nn.functional.pad(visible, (0, missing))
        elif _readable(visible.device) and bool(visible.all()):
            visible = None
    if visible is None and keys < kv_length:
        visible = torch.ones((1, keys), dtype=torch.bool, device=device)
    return _coded(visible, batch_size, pattern.causal, windowed, device)


def _what(mask_function: Callable | None, pattern: _Pattern, q_offset: Any) -> str:
    if pattern.chunk is not None:
        return f"chunked attention (attention_chunk_size={pattern.chunk})"
    if isinstance(q_offset, Tensor):
        return "several queries on a static cache while compiling"
    return f"mask_function={getattr(mask_function, '__qualname__', repr(mask_function))}"


def _coded(visible: Tensor | None, batch: int, causal: bool, windowed: bool, device: torch.device) -> Tensor:
    """(batch or 1, keys) bool, or None (all visible) -> (batch, 2 + code, 3, keys or 0) int32."""
    code = int(causal) + 2 * int(windowed)
    if visible is None:
        return torch.zeros((batch, 2 + code, 3, 0), dtype=torch.int32, device=device)
    words = torch.zeros(visible.shape, dtype=torch.int32, device=device).masked_fill(~visible, _HIDDEN)
    return words[:, None, None].expand(batch, 2 + code, 3, visible.shape[1])


def _sequences(starts: Tensor, causal: bool, windowed: bool) -> Tensor:
    """Where sequences start (batch, seqlen) bool -> (1, 2 + code, sequences + 1) int32."""
    starts = starts.flatten()
    total = starts.shape[0]
    if _readable(starts.device):
        offsets = starts.nonzero().flatten()
    else:
        # How many there are is not known then: as many as tokens, all but the first ones empty.
        offsets = torch.where(starts, torch.arange(total, device=starts.device), total).sort().values
    offsets = torch.nn.functional.pad(offsets, (0, 1), value=total).to(torch.int32)
    return offsets.expand(1, 2 + int(causal) + 2 * int(windowed), -1)


def read_mask(
    mask: Tensor | None, query: Tensor, key: Tensor, causal: bool, sliding_window: int | None, config: Any = None
) -> Structure:
    """What a mask says.

    Args:
        mask: as flash_ext.compat.transformers.attention_forward takes it.
        query, key: (batch, heads, seqlen, head_dim).
        causal, sliding_window: what the layer says; a mask made here knows better.
        config: the layer's, whose sliding_window the mask was made with; for layers that do not say theirs.

    Raises:
        NotImplementedError: a mask that differs from query to query, or a window that the layer does not tell.
    """

    def window(causal: bool) -> tuple[int, int]:
        if sliding_window is None:
            return (-1, -1)
        return (sliding_window - 1, -1 if causal else sliding_window - 1)

    if mask is None:
        return Structure(causal, window(causal))
    if mask.dtype == torch.int32 and (mask.dim() == 3 or (mask.dim() == 4 and mask.shape[2] == 3)) and 2 <= mask.shape[1] <= 5:
        code = mask.shape[1] - 2
        causal, windowed = bool(code & 1), bool(code & 2)
        if windowed and sliding_window is None:
            sliding_window = getattr(config, "sliding_window", None)
            if sliding_window is None:
                raise NotImplementedError(
                    f"{_NAME}: not supported by flash_ext: a sliding window in the mask, shorter than the keys, that neither the "
                    "layer (sliding_window) nor its config tells"
                )
            sliding_window += 0 if causal else 1  # as layers with two-sided windows say it: itself and those on one side
        window_size = window(causal) if windowed else (-1, -1)
        if mask.dim() == 3:
            return Structure(causal, window_size, cu_seqlens=mask[0, 0])
        if mask.shape[3] == 0:
            return Structure(causal, window_size)
        return Structure(causal, window_size, mask[:, 0, 0].view(torch.float32), mask.shape[3])
    if mask.dim() == 2 and mask.shape[1] == key.shape[2]:
        return Structure(causal, window(causal), _bias(mask.bool()))
    if mask.dim() == 4 and mask.shape[1] == 1 and (mask.shape[2] == 1 or query.shape[2] == 1 or mask.stride(2) == 0):
        # Drawn by the model itself, with all that hides a key.
        return Structure(False, (-1, -1), _bias(mask[:, 0, 0]), mask.shape[3])
    raise NotImplementedError(
        f"{_NAME}: not supported by flash_ext: attention_mask={describe(mask)} for {query.shape[2]} queries and {key.shape[2]} "
        "keys: only a padding mask (batch, keys), and a mask of keys (batch, 1, 1, keys)"
    )


def _bias(keys: Tensor) -> Tensor:
    """(batch, keys), bool or floating -> float32 that is added to the scores."""
    if keys.is_floating_point():
        return keys.float()
    return torch.zeros(keys.shape, device=keys.device).masked_fill(~keys.bool(), -torch.inf)
