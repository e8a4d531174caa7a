"""What is measured: cases with their arithmetic, and the presets that hold the published protocols.

Work is counted the same for every implementation, by the pairs (query, key) that the mask lets see each other: with d and
dv the head dims, the forward is 2 * (d + dv) floating-point operations a pair (two matrix products), the backward
2 * (3 * d + 2 * dv) (five). Causal counts half the square, as FlashAttention's published figures do; the exact number of
pairs is larger by 1 / seqlen. Softmax is not counted.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import patterns

PASSES = ("fwd", "bwd", "fwd+bwd")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.float8_e4m3fn, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    """One call. family: the cases that share a table and a line of a plot.

    lengths: sequences packed one after another into batch 1; attention stays inside each (causal or not). prefix: that
    many leading keys are seen by every query, the rest is causal. window: (left, right), -1 unbounded. softcap: 0 is off.
    sinks: a logit for each query head joins the softmax's denominator. pattern: a mask of patterns.py.
    """

    family: str
    batch: int
    seqlen_q: int
    seqlen_k: int
    heads: int
    heads_kv: int
    head_dim: int
    head_dim_v: int
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    lengths: tuple[int, ...] = ()
    prefix: int = 0
    softcap: float = 0.0
    sinks: bool = False
    pattern: str = ""
    dtype: str = "bf16"
    direction: str = "fwd"

    @property
    def mask(self) -> str:
        changes = f", softcap {self.softcap:g}" * (self.softcap > 0) + ", sinks" * self.sinks
        return self._mask + changes

    @property
    def _mask(self) -> str:
        if self.pattern:
            return self.pattern
        if self.prefix:
            return "prefix"
        if self.lengths:
            return "packed causal" if self.causal else "packed"
        if self.window != (-1, -1):
            return f"window {self.window[0]}"
        return "causal" if self.causal else "full"

    @property
    def dims(self) -> str:
        return f"{self.head_dim}" if self.head_dim == self.head_dim_v else f"{self.head_dim}/{self.head_dim_v}"

    @property
    def name(self) -> str:
        heads = f"h{self.heads}" if self.heads == self.heads_kv else f"h{self.heads}/{self.heads_kv}"
        seqlen = f"s{self.seqlen_k}" if self.seqlen_q == self.seqlen_k else f"s{self.seqlen_q}x{self.seqlen_k}"
        packed = f"n{len(self.lengths)}" if self.lengths else f"b{self.batch}"
        parts = (self.family, self.direction, self.dtype, f"d{self.dims}", packed, seqlen, heads, self.mask)
        return " ".join(parts)

    @property
    def plain(self) -> bool:
        """Whether the mask is full or causal over whole sequences and scores are only scaled: what all implementations take."""
        return not self.lengths and not self.prefix and not self.pattern and self.window == (-1, -1) and not self.changes_scores

    @property
    def changes_scores(self) -> bool:
        return self.softcap > 0 or self.sinks

    def pairs(self) -> float:
        """(query, key) pairs of all heads and sequences that are worked on."""
        if self.pattern:
            one = patterns.pairs(self.pattern, self.seqlen_q)
        elif self.prefix:
            rest = self.seqlen_k - self.prefix
            one = self.seqlen_q * self.prefix + rest * rest / 2
        elif self.lengths:
            one = sum(n * n for n in self.lengths) / (2 if self.causal else 1)
        elif self.window != (-1, -1):
            one = _window_pairs(self)
        elif self.causal:
            one = self.seqlen_q * (max(0, self.seqlen_k - self.seqlen_q) + self.seqlen_k) / 2
        else:
            one = self.seqlen_q * self.seqlen_k
        return one * self.heads * self.batch

    def flops(self) -> float:
        d, dv, pairs = self.head_dim, self.head_dim_v, self.pairs()
        forward, backward = 2 * (d + dv) * pairs, 2 * (3 * d + 2 * dv) * pairs
        return {"fwd": forward, "bwd": backward, "fwd+bwd": forward + backward}[self.direction]

    def bytes_moved(self) -> int:
        """Bytes of device memory that a call must read or write at least: each tensor once."""
        element = DTYPES[self.dtype].itemsize
        result = max(2, element)
        q, k, v, out = (math.prod(shape) for shape in self.shapes())
        statistics = 4 * self.batch * self.heads * self.seqlen_q
        forward = element * (q + k + v) + result * out + statistics
        backward = element * (q + k + v) + result * (2 * out + q + k + v) + statistics
        return {"fwd": forward, "bwd": backward, "fwd+bwd": forward + backward}[self.direction]

    def shapes(self) -> tuple[tuple[int, int, int, int], ...]:
        """Of q, k, v and out: (batch, seqlen, heads, head_dim)."""
        return (
            (self.batch, self.seqlen_q, self.heads, self.head_dim),
            (self.batch, self.seqlen_k, self.heads_kv, self.head_dim),
            (self.batch, self.seqlen_k, self.heads_kv, self.head_dim_v),
            (self.batch, self.seqlen_q, self.heads, self.head_dim_v),
        )

    def build(self, device: str) -> Tensors:
        """Normal values from a seed that is the case's name. fp8: rounded to e4m3; the gradient of the result is bfloat16."""
        generator = torch.Generator(device=device).manual_seed(random.Random(self.name).getrandbits(31))
        dtype = DTYPES[self.dtype]
        wide = torch.bfloat16 if dtype.itemsize == 1 else dtype
        q, k, v, dout = (torch.randn(shape, generator=generator, device=device, dtype=wide) for shape in self.shapes())
        return Tensors(q.to(dtype), k.to(dtype), v.to(dtype), dout)

    def keys_of(self, tensor: Tensor, batch: int, head: int) -> Tensor:
        """(seqlen_k, dim): the rows of k or v that one head of one sequence sees."""
        return tensor[batch, :, head]

    def visible(self, rows: Tensor) -> Tensor:
        """(rows, seqlen_k) bool: the keys that these rows of the queries see (bottom-right aligned)."""
        if self.pattern:
            return patterns.visible(self.pattern, rows, self.seqlen_k)
        keys = torch.arange(self.seqlen_k, device=rows.device)[None]
        distance = keys - rows[:, None] - (self.seqlen_k - self.seqlen_q)
        left, right = self.window
        keep = torch.ones_like(distance, dtype=torch.bool)
        if self.causal:
            keep &= distance <= 0
        if left >= 0:
            keep &= distance >= -left
        if right >= 0:
            keep &= distance <= right
        if self.prefix:
            keep |= keys < self.prefix
        if self.lengths:
            owner = self.owners(rows.device)
            keep &= owner[rows][:, None] == owner[None]
        return keep

    def sink_logits(self, device: torch.device | str) -> Tensor | None:
        """(heads,) float32, about as large as a row's log-sum-exp, so that they matter; None without sinks."""
        if not self.sinks:
            return None
        generator = torch.Generator().manual_seed(random.Random(self.name).getrandbits(31))
        return (torch.randn(self.heads, generator=generator) + math.log(self.seqlen_k)).to(device)

    def owners(self, device: torch.device | str) -> Tensor:
        """(seqlen_k,) which of the packed sequences a position belongs to."""
        lengths = torch.tensor(self.lengths, device=device)
        return torch.repeat_interleave(torch.arange(len(self.lengths), device=device), lengths)


def _window_pairs(case: Case) -> int:
    left, right = case.window
    right = 0 if case.causal else right
    offset, total = case.seqlen_k - case.seqlen_q, 0
    for row in range(case.seqlen_q):
        first = max(0, row + offset - left) if left >= 0 else 0
        last = min(case.seqlen_k - 1, row + offset + right) if right >= 0 else case.seqlen_k - 1
        total += max(0, last - first + 1)
    return total


@dataclass(frozen=True)
class Tensors:
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor


# --- the presets: sizes for a GPU, and small ones for a machine without ---


def packed_lengths(tokens: int, shortest: int, longest: int, seed: int = 0) -> tuple[int, ...]:
    """Sequence lengths drawn log-uniformly from [shortest, longest] until they fill `tokens`; the last one is cut."""
    draw, lengths = random.Random(seed), []
    while (left := tokens - sum(lengths)) > 0:
        lengths.append(min(left, round(math.exp(draw.uniform(math.log(shortest), math.log(longest))))))
    return tuple(lengths)


def _square(family: str, batch: int, seqlen: int, heads: int, heads_kv: int, dim: int, dim_v: int = 0, **options) -> Case:
    return Case(family, batch, seqlen, seqlen, heads, heads_kv, dim, dim_v or dim, **options)


def _same_tokens(tokens: int, hidden: int, dims: Iterable[int], seqlens: Iterable[int]) -> list[Case]:
    """FlashAttention's protocol: batch * seqlen and heads * head_dim are constant."""
    family = f"{tokens // 1024}k tokens" if tokens >= 1024 else f"{tokens} tokens"
    return [
        _square(family, tokens // s, s, hidden // d, hidden // d, d, causal=causal)
        for d in dims
        for causal in (False, True)
        for s in seqlens
    ]


def _gqa(seqlens: Iterable[int], heads: int, heads_kv: int, dim: int) -> list[Case]:
    return [_square(f"GQA {heads}/{heads_kv}", 1, s, heads, heads_kv, dim, causal=c) for c in (False, True) for s in seqlens]


def _quick(gpu: bool) -> list[Case]:
    if not gpu:
        return _same_tokens(256, 128, (64, 128), (64, 256))
    return [*_same_tokens(16384, 2048, (64, 128), (2048, 8192)), *_gqa((8192,), 64, 8, 128)]


def _paper(gpu: bool) -> list[Case]:
    if not gpu:
        unequal = [_square("192/128", 1, s, 2, 2, 48, 32, causal=True) for s in (128, 256)]
        return [*_same_tokens(256, 128, (64, 128), (64, 256)), *_gqa((64, 128), 4, 2, 64), *unequal]
    unequal = [_square("192/128", 1, s, 128, 128, 192, 128, causal=True) for s in (2048, 4096, 8192, 16384)]
    seqlens = (512, 1024, 2048, 4096, 8192, 16384)
    return [*_same_tokens(16384, 2048, (64, 128, 256), seqlens), *_gqa((2048, 4096, 8192, 16384, 32768), 64, 8, 128), *unequal]


def _decode(gpu: bool) -> list[Case]:
    from . import caches  # which builds on Case

    return caches.decode(gpu)


def _paged(gpu: bool) -> list[Case]:
    from . import caches

    return caches.paged(gpu)


def _varlen(gpu: bool) -> list[Case]:
    tokens, shortest, longest, heads, dims = (32768, 64, 8192, 16, (64, 128)) if gpu else (384, 8, 128, 2, (64,))
    lengths = packed_lengths(tokens, shortest, longest)
    family = f"lengths log-uniform {shortest} to {longest}"
    return [_square(family, 1, tokens, heads, heads, d, causal=c, lengths=lengths) for d in dims for c in (False, True)]


def _mask(gpu: bool) -> list[Case]:
    if gpu:
        seqlens, heads, dim, left, batch, longest = (4096, 16384), 16, 128, 1024, 2, 4096
    else:
        seqlens, heads, dim, left, batch, longest = (128, 256), 2, 64, 32, 2, 64
    cases = []
    for s in seqlens:
        cases += [
            _square("window", batch, s, heads, heads, dim, causal=True, window=(left, 0)),
            _square("documents", 1, s, heads, heads, dim, causal=True, lengths=packed_lengths(s, longest // 8, longest)),
            _square("prefix", 1, s, heads, heads, dim, causal=True, prefix=s // 4),
        ]
    return cases + _patterns(gpu) + _jagged(gpu)


def _patterns(gpu: bool) -> list[Case]:
    """The shapes of the Binary Block Masking paper (4 x 32 heads of 64, 16384 tokens) beside causal; a sweep of densities."""
    batch, s, heads, tree, window, tokens = (4, 16384, 32, "8x3", 512, 16) if gpu else (1, 256, 2, "4x3", 64, 8)
    shapes = ("", f"tree {tree}", f"parents {tree}", f"window 8 + {tokens}", f"window {window} + {tokens}")
    cases = [_square("masks", batch, s, heads, heads, 64, causal=not pattern, pattern=pattern) for pattern in shapes]
    shares = (2, 5, 10, 20, 40, 60, 80, 100)
    sweep = ("", *(f"blocks {p}%" for p in shares))  # the whole square, to which the others are compared, and its parts
    return cases + [_square("density", 1, s, heads // 2, heads // 2, 128 if gpu else 64, pattern=pattern) for pattern in sweep]


def _jagged(gpu: bool) -> list[Case]:
    """Features of recommendation models: lengths uniform in [0, longest], 4 heads of 64 (and of 32), beside the padded batch."""
    cases = []
    for sequences, longest, dim in ((1024, 512, 64), (8192, 64, 64), (8192, 64, 32)) if gpu else ((8, 32, 64), (8, 32, 32)):
        draw = random.Random(0)
        lengths = tuple(draw.randint(0, longest) for _ in range(sequences))
        family = f"jagged U(0, {longest}) d{dim}"
        cases += [_square(family, 1, sum(lengths), 4, 4, dim, lengths=lengths), _square(family, sequences, longest, 4, 4, dim)]
    return cases


def _sm80(gpu: bool) -> list[Case]:
    """What kernels without wgmma must reach beside FlashAttention-2, 512 to 16k."""
    if not gpu:
        return _same_tokens(256, 128, (64, 128), (64, 256))
    return _same_tokens(16384, 2048, (64, 128), (512, 1024, 2048, 4096, 8192, 16384))


def _features(gpu: bool) -> list[Case]:
    """Layers of published models: gpt-oss (sinks, window 128), Gemma 2 (softcap 50, window 4096), Mistral (window 4096)."""
    gpt_oss = ((64, 8, 64, 128, 0.0, True), (64, 8, 64, 0, 0.0, True)) if gpu else ((4, 2, 64, 32, 0.0, True),)
    gemma = ((32, 16, 128, 4096, 50.0, False), (16, 8, 256, 0, 50.0, False)) if gpu else ((2, 1, 64, 0, 50.0, False),)
    mistral = ((32, 8, 128, 4096, 0.0, False),) if gpu else ((2, 1, 64, 64, 0.0, False),)
    return [
        _square(family, 1, s, heads, heads_kv, dim, causal=True, window=(left, 0) if left else (-1, -1), softcap=cap, sinks=sinks)
        for family, layers in (("gpt-oss", gpt_oss), ("Gemma 2", gemma), ("Mistral", mistral))
        for heads, heads_kv, dim, left, cap, sinks in layers
        for s in ((2048, 8192, 32768) if gpu else (128, 256))
    ]


def _memory(gpu: bool) -> list[Case]:
    seqlens, heads, dim = ((1024, 2048, 4096, 8192, 16384, 32768), 16, 128) if gpu else ((256, 512, 1024), 1, 64)
    return [_square("memory", 1, s, heads, heads, dim, causal=True) for s in seqlens]


def _fp8(gpu: bool) -> list[Case]:
    """What docs/fp8.md must reach: each case in e4m3, and in bf16 to compare with."""
    if not gpu:
        return _same_tokens(256, 256, (128,), (64, 256))
    return _same_tokens(16384, 2048, (128, 256), (2048, 4096, 8192, 16384))


PRESETS: dict[str, tuple[str, Callable[[bool], list[Case]]]] = {
    "quick": ("head_dim 64 and 128, two sequence lengths, causal and full, and grouped heads", _quick),
    "paper": ("16k tokens and hidden size 2048 as FlashAttention-3 publishes; GQA 64/8; head dims 192/128", _paper),
    "decode": ("one new token for each sequence over a dense KV cache, grouped heads and latent attention: bytes count", _decode),
    "paged": ("the same over pages of 1, 16, 64 and 256 rows beside the dense cache", _paged),
    "varlen": ("sequences of log-uniformly drawn lengths packed one after another", _varlen),
    "mask": ("windows, packed documents, prefix, trees, block-sparse masks of growing density, jagged rows", _mask),
    "features": ("attention layers of gpt-oss, Gemma 2 and Mistral: sinks, softcap, windows", _features),
    "fp8": ("head_dim 128 and 256, full and causal, 2k to 16k, in e4m3 and in bf16", _fp8),
    "sm80": ("our kernels for GPUs without wgmma, on any GPU, beside FlashAttention-2; head_dim 64 and 128", _sm80),
    "memory": ("one sequence of growing length: peak extra bytes", _memory),
}
FORWARD_ONLY = {"decode", "paged", "fp8"}


def default_passes(preset: str) -> list[str]:
    # What a forward saves for its backward counts as memory, so the two are taken together there.
    return {"decode": ["fwd"], "paged": ["fwd"], "fp8": ["fwd"], "memory": ["fwd", "fwd+bwd"]}.get(preset, ["fwd", "bwd"])


def default_dtypes(preset: str) -> list[str]:
    return {"fp8": ["fp8", "bf16"]}.get(preset, ["bf16"])


def cases_of(preset: str, gpu: bool, directions: Iterable[str], dtypes: Iterable[str], head_dims: Iterable[int] = ()) -> list[Case]:
    """The preset's cases in every dtype and direction asked for; head_dims keeps only those."""
    wanted, chosen = set(head_dims), PRESETS[preset][1](gpu)
    return [
        replace(case, dtype=dtype, direction=direction)
        for direction in directions
        if direction == "fwd" or preset not in FORWARD_ONLY
        for dtype in dtypes
        for case in chosen
        if not wanted or case.head_dim in wanted
    ]
