"""The named cases that every backend must pass: on the CPU, on a GPU and in the emulator.

A case is shapes, options and memory layouts; build() makes its tensors for a device and dtype, check_case() runs one
through flash_ext.attention (attention_varlen where it has sequences, attention_partials where it has splits) and compares
out, lse, max_logit and every gradient with the oracle. Memory that belongs to no tensor (gaps of strided layouts, margins,
fresh allocations) holds NaN, and so do the rows that no sequence shows, of inputs and of gradients: a stray read shows
itself.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import oracle
import torch
from torch import Tensor

import flash_ext

# How a (batch, seqlen, num_heads, head_dim) tensor lies in memory.
LAYOUTS = (
    "contiguous",
    "heads_first",  # a transposed (batch, num_heads, seqlen, head_dim)
    "packed",  # one of three neighbours in (batch, seqlen, 3 * num_heads, head_dim), as one projection gives them
    "padded",  # rows of head_dim + 8
    "odd_stride",  # rows of head_dim + 1: no 16-byte access reads it
    "odd_offset",  # the first element lies one element beyond a 16-byte boundary
    "expanded_batch",  # batch stride 0
    "expanded_heads",  # head stride 0
)


@dataclass(frozen=True)
class Case:
    """One call of attention. name: purpose, then what differs from the plainest call.

    sequences: the (seqlen_q, seqlen_k) of packed sequences; then seqlen_q and seqlen_k are the rows of the packed tensors
    and `batch` does not count. splits: the boundaries of a call of attention_partials.
    """

    purpose: str
    seqlen_q: int
    seqlen_k: int
    batch: int = 2
    num_heads: int = 2
    num_heads_kv: int = 2
    head_dim: int = 64
    head_dim_v: int | None = None  # None: head_dim
    causal: bool = False
    softmax_scale: float | None = None
    window_size: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    sinks: bool = False
    alibi: str = ""  # heads: slopes (num_heads); batch: (batch, num_heads)
    k_bias: str = ""  # normal; hidden: a quarter of the keys at -inf; nothing: all of them
    max_logit: bool = False
    sequences: tuple[tuple[int, int], ...] | None = None
    seqused_q: tuple[int, ...] | None = None
    seqused_k: tuple[int, ...] | None = None
    leftpad_q: tuple[int, ...] | None = None
    leftpad_k: tuple[int, ...] | None = None
    splits: tuple[int, ...] | None = None
    layout: str = "contiguous"
    gradients: str = "both"  # which results a gradient flows into: both, out, lse, or 'sum' (out.sum(): stride 0)

    @property
    def name(self) -> str:
        parts = [self.purpose, f"{self.seqlen_q}x{self.seqlen_k}", f"d{self.head_dim}"]
        if self.head_dim_v is not None:
            parts[-1] += f"v{self.head_dim_v}"
        if self.batch != 2 or (self.num_heads, self.num_heads_kv) != (2, 2):
            parts.append(f"b{self.batch}h{self.num_heads}kv{self.num_heads_kv}")
        parts += ["causal"] * self.causal
        if self.window_size != (-1, -1):
            parts.append(f"w{self.window_size[0]}_{self.window_size[1]}".replace("-1", "inf"))
        if self.softcap:
            parts.append(f"cap{self.softcap:g}")
        if self.softmax_scale is not None:
            parts.append(f"scale{self.softmax_scale:g}")
        parts += ["sinks"] * self.sinks + [f"alibi_{self.alibi}"] * bool(self.alibi) + [f"bias_{self.k_bias}"] * bool(self.k_bias)
        parts += ["max"] * self.max_logit
        if self.sequences is not None:
            parts.append(f"n{len(self.sequences)}")
        for name in ("seqused_q", "seqused_k", "leftpad_q", "leftpad_k"):
            parts += [name.replace("_", "")] * (getattr(self, name) is not None)
        if self.splits is not None:
            parts.append("parts" + "_".join(map(str, self.splits)) if len(self.splits) < 8 else f"parts{len(self.splits) - 1}")
        parts += [self.layout] * (self.layout != "contiguous") + [f"grad_{self.gradients}"] * (self.gradients != "both")
        return "_".join(parts)

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of attention that are no tensors and matter to the result."""
        options = {
            "causal": self.causal, "softmax_scale": self.softmax_scale, "window_size": self.window_size, "softcap": self.softcap,
        }  # fmt: skip
        return options if self.splits is None else {**options, "split_boundaries": self.splits}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of q, k, v and out."""
        head_dim_v = self.head_dim if self.head_dim_v is None else self.head_dim_v
        front_q, front_k = ((self.batch, n) if self.sequences is None else (n,) for n in (self.seqlen_q, self.seqlen_k))
        parts = () if self.splits is None else (len(self.splits) - 1,)
        return {
            "q": (*front_q, self.num_heads, self.head_dim),
            "k": (*front_k, self.num_heads_kv, self.head_dim),
            "v": (*front_k, self.num_heads_kv, head_dim_v),
            "out": (*parts, *front_q, self.num_heads, head_dim_v),
        }

    @property
    def side_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the tensors that the call has beside q, k and v."""
        batch = self.batch if self.sequences is None else len(self.sequences)
        shapes: dict[str, tuple[int, ...]] = {}
        if self.sinks:
            shapes["sinks"] = (self.num_heads,)
        if self.alibi:
            shapes["alibi_slopes"] = (self.num_heads,) if self.alibi == "heads" else (batch, self.num_heads)
        if self.k_bias:
            shapes["k_bias"] = (*(self.batch,) * (self.sequences is None), self.num_heads_kv, self.seqlen_k)
        if self.sequences is not None:
            shapes |= {"cu_seqlens_q": (batch + 1,), "cu_seqlens_k": (batch + 1,)}
            for name in ("seqused_q", "seqused_k", "leftpad_q", "leftpad_k"):
                if getattr(self, name) is not None:
                    shapes[name] = (batch,)
        return shapes

    @property
    def function(self) -> Callable[..., Any]:
        """The public function that takes the case."""
        if self.splits is not None:
            return flash_ext.attention_partials
        return flash_ext.attention if self.sequences is None else flash_ext.attention_varlen

    def shown(self, side: str) -> list[slice]:
        """The rows of q (side q) or of k and v (side k) that each sequence shows."""
        ends = list(itertools.accumulate((pair["qk".index(side)] for pair in self.sequences), initial=0))
        used, pad = getattr(self, f"seqused_{side}"), getattr(self, f"leftpad_{side}")
        return [oracle.shown_rows(ends, used, pad, b) for b in range(len(self.sequences))]


def packed(purpose: str, sequences: Sequence[tuple[int, int]], beyond: tuple[int, int] = (0, 0), **fields: Any) -> Case:
    """A case of packed sequences, with so many more rows of q and k that no sequence owns."""
    totals = [sum(pair[side] for pair in sequences) + beyond[side] for side in (0, 1)]
    return Case(purpose, *totals, sequences=tuple(sequences), **fields)


@dataclass(frozen=True)
class Tensors:
    """side: what the call takes beside q, k and v and is a tensor."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor | None
    dlse: Tensor | None
    side: dict[str, Tensor] = field(default_factory=dict)


def lay_out(values: Tensor, layout: str) -> Tensor:
    """The same values, (batch, seqlen, heads, dim) or (total, heads, dim), in memory of the given layout; everything around
    them is NaN."""
    if values.dim() == 3:
        return lay_out(values[None], layout)[0]
    if values.dim() == 5:  # the parts of a split call
        return lay_out(values.flatten(0, 1), layout).unflatten(0, values.shape[:2])
    batch, seqlen, heads, dim = values.shape

    def in_buffer(*shape: int) -> Tensor:
        return values.new_full(shape, torch.nan)

    if layout == "contiguous":
        margin = 64  # elements, a multiple of 16 bytes
        view = in_buffer(values.numel() + 2 * margin)[margin : margin + values.numel()].view(values.shape)
    elif layout == "heads_first":
        view = in_buffer(batch, heads, seqlen, dim).transpose(1, 2)
    elif layout == "packed":
        view = in_buffer(batch, seqlen, 3 * heads, dim)[:, :, heads : 2 * heads]
    elif layout in ("padded", "odd_stride"):
        view = in_buffer(batch, seqlen, heads, dim + (8 if layout == "padded" else 1))[..., :dim]
    elif layout == "odd_offset":
        view = in_buffer(values.numel() + 1)[1:].view(values.shape)
    elif layout == "expanded_batch":
        return values[:1].expand(values.shape)
    elif layout == "expanded_heads":
        return values[:, :, :1].expand(values.shape)
    else:
        raise ValueError(f"unknown layout {layout!r}")
    return view.copy_(values)


def build(case: Case, device: str | torch.device, dtype: torch.dtype) -> Tensors:
    """The case's tensors: normal values from a seed that is the case's name, the same on every device."""
    generator = torch.Generator().manual_seed(random.Random(case.name).getrandbits(31))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    wide = oracle.accumulation_dtype(dtype)
    unseen = {}  # rows that no sequence shows
    for side, total in (("q", case.seqlen_q), ("k", case.seqlen_k)):
        unseen[side] = torch.zeros(total, dtype=torch.bool, device=device)
        if case.sequences is not None:
            unseen[side][:] = True
            for rows in case.shown(side):
                unseen[side][rows] = False

    def placed(name: str) -> Tensor:
        values = normal(*case.shapes[name]).to(dtype).to(device)
        if case.sequences is not None:
            values[unseen["q" if name in ("q", "out") else "k"]] = torch.nan
        return lay_out(values, case.layout)

    q, k, v = placed("q"), placed("k"), placed("v")
    dout = placed("out") if case.gradients in ("both", "out") else None
    if case.gradients == "sum":
        dout = torch.ones((), dtype=dtype, device=device).expand(case.shapes["out"])
    dlse = None
    if case.gradients in ("both", "lse"):
        dlse = normal(*case.shapes["out"][:-1]).to(wide).to(device)
        if case.sequences is not None:
            dlse[unseen["q"]] = torch.nan
        dlse = dlse.mT
    return Tensors(q, k, v, dout, dlse, _side_tensors(case, normal, unseen["k"], wide, device))


def _side_tensors(case: Case, normal: Callable[..., Tensor], unseen: Tensor, wide: torch.dtype, device: Any) -> dict[str, Tensor]:
    side: dict[str, Tensor] = {}
    for name, shape in case.side_shapes.items():
        if name in ("sinks", "alibi_slopes"):
            values = normal(*shape) if name == "sinks" else normal(*shape).sigmoid() / 2
            side[name] = _in_row(values.to(wide).to(device), 0)
        elif name == "k_bias":
            values = 2 * normal(*shape)
            below = {"normal": -math.inf, "hidden": -0.67, "nothing": math.inf}[case.k_bias]  # Phi(-0.67) = 0.25
            values = values.masked_fill(normal(*shape) < below, -math.inf).to(wide).to(device)
            side[name] = _in_row(values.masked_fill(unseen, torch.nan), 3 if case.layout == "odd_stride" else 0)
        elif name.startswith("cu_seqlens"):
            lengths = (pair["qk".index(name[-1])] for pair in case.sequences)
            side[name] = torch.tensor(list(itertools.accumulate(lengths, initial=0)), dtype=torch.int32, device=device)
        else:
            side[name] = torch.tensor(getattr(case, name), dtype=torch.int32, device=device)
    return side


def _in_row(values: Tensor, gap: int) -> Tensor:
    """The same values between NaN, with a gap between the rows of the last dimension."""
    margin = 16
    buffer = values.new_full((math.prod(values.shape[:-1]) * (values.shape[-1] + gap) + 2 * margin,), torch.nan)
    rows = buffer[margin : buffer.numel() - margin].view(*values.shape[:-1], values.shape[-1] + gap)
    return rows[..., : values.shape[-1]].copy_(values)


def meta(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    """The case's call, q, k and v included, as keyword arguments for explain and supported: tensors without data."""
    tensors = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in case.shapes.items() if name != "out"}
    wide = oracle.accumulation_dtype(dtype)
    for name, shape in case.side_shapes.items():
        kind = wide if name in ("sinks", "alibi_slopes", "k_bias") else torch.int32
        tensors[name] = torch.empty(shape, dtype=kind, device="meta")
    options = {**case.options, "return_max_logit": True} if case.max_logit else case.options
    return {**tensors, **options}


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh allocations (results, workspaces) hold NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill


def call(case: Case, tensors: Tensors, attend: Callable[..., Any] | None = None, **options: Any) -> tuple[Tensor, ...]:
    """(out, lse), or (out, lse, max_logit), that `attend`, called as case.function is, gives for a case."""
    if case.splits is None:
        options = {"return_lse": True, **({"return_max_logit": True} if case.max_logit else {}), **options}
    return (attend or case.function)(tensors.q, tensors.k, tensors.v, **case.options, **tensors.side, **options)


def run(case: Case, tensors: Tensors, attend: Callable[..., Any] | None = None, **options: Any) -> oracle.Results:
    """call, and the gradients of everything that has one."""
    leaves = {name: getattr(tensors, name).detach().requires_grad_() for name in "qkv"}
    learnt = {name: t.detach().requires_grad_() for name, t in tensors.side.items() if name in ("sinks", "k_bias")}
    out, lse, *max_logit = call(case, replace(tensors, **leaves, side={**tensors.side, **learnt}), attend, **options)
    leaves |= learnt
    results = [(r, g) for r, g in ((out, tensors.dout), (lse, tensors.dlse)) if g is not None]
    gradients = torch.autograd.grad([r for r, _ in results], list(leaves.values()), [g for _, g in results])
    named = {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return oracle.Results(out.detach(), lse.detach(), max_logit=max_logit[0] if max_logit else None, **named)


def check(case: Case, tensors: Tensors, got: oracle.Results) -> None:
    """Hold results to the oracle's rule."""
    options = {**case.options, **tensors.side}
    oracle.check_results(got, (tensors.q, tensors.k, tensors.v), tensors.dout, tensors.dlse, options)
    assert (got.max_logit is not None) == case.max_logit


def check_case(
    case: Case,
    device: str | torch.device,
    dtype: torch.dtype,
    backend: str | None = None,
    attend: Callable[..., Any] | None = None,
    deterministic: bool = False,
) -> oracle.Results:
    """Run a case, poisoned, and hold every result and gradient to the oracle's rule; a fallback is no failure here."""
    tensors = build(case, device, dtype)
    inputs = {"q": tensors.q, "k": tensors.k, "v": tensors.v, **tensors.side}
    before = {name: t.clone() for name, t in inputs.items()}
    with poisoned_memory(), warnings.catch_warnings():
        warnings.simplefilter("ignore", flash_ext.FallbackWarning)
        got = run(case, tensors, attend, backend=backend, deterministic=deterministic)
    for name, tensor in inputs.items():
        same = (tensor == before[name]) | (tensor.isnan() & before[name].isnan())
        assert same.all(), f"{name} was written to"
    check(case, tensors, got)
    return got


HEAD_DIMS = (1, 2, 3, 8, 15, 16, 24, 32, 40, 72, 80, 96, 127, 192, 255, 256)
WINDOWS = ((0, 0), (0, -1), (-1, 0), (5, 3), (64, 0), (-1, 7), (170, 150))


def _named_cases() -> list[Case]:
    small = {"batch": 1, "num_heads": 1, "num_heads_kv": 1}
    cases = [
        # Sizes: one element, around every tile edge (64, 128, 256 rows; 128, 512 keys), longer queries than keys.
        Case("one", 1, 1, **small),
        Case("one", 1, 1, **small, causal=True, head_dim=1),
        Case("one_key", 5, 1, causal=True),
        Case("decode", 1, 513),
        Case("decode", 1, 130, num_heads=8, num_heads_kv=2, causal=True, head_dim=128),
        *(Case("rows", n, 33, **small, causal=causal) for n in (63, 64, 65, 127, 128, 129, 255, 257) for causal in (False, True)),
        *(Case("keys", 17, n, **small) for n in (63, 64, 65, 127, 129, 175, 177, 511, 513)),
        *(Case("many_keys", 20, n, **small, causal=True) for n in (1100, 1700)),  # the running maximum grows over several tiles
        *(Case("square", n, n, **small, causal=True, head_dim=128) for n in (127, 128, 129, 191)),
        Case("long_query", 203, 113, causal=True),
        Case("long_query", 130, 1, causal=True, head_dim=128),
        Case("long_key", 3, 300, causal=True),
        # Empty, and rows that see nothing.
        Case("no_batch", 7, 5, batch=0),
        Case("no_query", 0, 5),
        Case("no_key", 7, 0),
        Case("no_key", 7, 0, causal=True, num_heads=4),
        Case("no_query_no_key", 0, 0, causal=True),
        Case("hidden_rows", 140, 12, causal=True),
        Case("hidden_rows", 9, 4, window_size=(0, 0)),
        Case("hidden_rows", 260, 20, window_size=(3, 2), num_heads=4),
        # Heads, grouped and with head dims of their own.
        Case("gqa", 113, 203, num_heads=6, num_heads_kv=2, head_dim=128, causal=True),
        Case("gqa", 70, 70, num_heads=8, num_heads_kv=4, head_dim_v=32),
        Case("mqa", 64, 129, num_heads=7, num_heads_kv=1, causal=True),
        Case("mqa", 2, 40, batch=3, num_heads=300, num_heads_kv=1, head_dim=8),  # more query heads a key head than tile rows
        *(Case("head_dim", 33, 49, head_dim=d, causal=True) for d in HEAD_DIMS),
        Case("head_dim_v", 65, 40, head_dim=192, head_dim_v=128, causal=True),
        Case("head_dim_v", 20, 30, head_dim=24, head_dim_v=256),
        Case("head_dim_v", 20, 30, head_dim=7, head_dim_v=1),
        # Masks.
        *(Case("window", 150, 170, window_size=w, batch=1) for w in WINDOWS),
        Case("window", 150, 170, window_size=(16, 40), causal=True, batch=1),
        Case("window", 600, 700, window_size=(33, 1), **small, head_dim=16),  # skips tiles on both sides
        Case("window", 100, 20, window_size=(4, 9), num_heads=4),
        Case("window", 64, 64, window_size=(10**9, 10**9)),
        *(Case("window", n, 50, window_size=w, batch=1) for n in (2, 3) for w in ((5, -1), (5, 3), (-1, 0))),
        # Scores.
        Case("scale", 40, 50, softmax_scale=0.0),
        Case("scale", 40, 50, softmax_scale=-0.3, causal=True),
        Case("scale", 40, 50, softmax_scale=3.0),
        Case("softcap", 65, 80, softcap=1.5, causal=True),
        Case("softcap", 65, 80, softcap=50.0, num_heads=4),
        Case("softcap", 33, 47, softcap=1e4, softmax_scale=-1.0),
        Case("softcap", 90, 70, softcap=2.0, window_size=(20, 20), num_heads=4, head_dim=96),
        # Gradients that do not flow, or flow from a scalar.
        Case("partial", 66, 77, gradients="out", causal=True),
        Case("partial", 66, 77, gradients="lse"),
        Case("partial", 66, 77, gradients="sum", num_heads=4),
        # Memory.
        *(Case("layout", 66, 77, num_heads=4, layout=layout, causal=True) for layout in LAYOUTS[1:]),
        Case("layout", 1, 1, **small, layout="odd_offset", head_dim=1),
        Case("layout", 30, 40, layout="odd_stride", head_dim=128, num_heads=4, num_heads_kv=1, window_size=(8, 0)),
        # The reference works on several sequences and heads in one step: all of them, and with a remainder.
        Case("many_heads", 9, 300, batch=3, num_heads=24, num_heads_kv=12, head_dim=16, causal=True),
        Case("many_heads", 260, 520, batch=1, num_heads=5, num_heads_kv=5, head_dim=8),
        Case("many_sequences", 5, 7, batch=67, num_heads=3, num_heads_kv=3, head_dim=8),
        Case("many_sequences", 130, 520, batch=5, head_dim=8, causal=True),
    ]  # fmt: skip
    return [*cases, *_score_cases(), *_packed_cases(), *_split_cases()]


def _score_cases() -> list[Case]:
    """Sinks, ALiBi, the keys' bias, the largest logit: each alone, at tile edges and where rows see nothing; and together."""
    return [
        Case("sink", 65, 80, sinks=True, num_heads=4),
        Case("sink", 140, 129, sinks=True, causal=True, batch=1, head_dim=128),
        Case("sink", 7, 0, sinks=True, causal=True),
        Case("sink_hidden_rows", 140, 12, sinks=True, causal=True),
        Case("sink_hidden_rows", 260, 20, sinks=True, window_size=(3, 2), num_heads=4, head_dim=192, batch=1),
        Case("sink", 66, 77, sinks=True, gradients="lse"),
        Case("sink", 66, 77, sinks=True, causal=True, gradients="out"),
        Case("alibi", 65, 150, alibi="heads", num_heads=4, causal=True),
        Case("alibi", 130, 70, alibi="batch", head_dim=128),
        Case("alibi", 33, 47, alibi="batch", num_heads=6, head_dim=96, window_size=(20, 4)),
        Case("bias", 65, 150, k_bias="normal", num_heads=4, causal=True),
        Case("bias", 40, 129, k_bias="hidden", head_dim=128, layout="odd_stride"),
        Case("bias", 129, 33, k_bias="hidden", causal=True, num_heads=4, head_dim=256, batch=1),
        Case("bias", 20, 70, k_bias="nothing", num_heads=4),
        Case("bias", 70, 600, k_bias="hidden", batch=1, window_size=(100, -1), gradients="lse"),
        Case("max", 65, 150, max_logit=True, causal=True, num_heads=4),
        Case("max_hidden", 9, 4, max_logit=True, window_size=(0, 0)),
        Case("max_hidden", 20, 70, max_logit=True, k_bias="nothing"),
        Case("max_empty", 7, 0, max_logit=True),
        Case("max_empty", 0, 7, max_logit=True, sinks=True),
        # Together, in every kind of row.
        Case("scores", 130, 140, sinks=True, alibi="heads", k_bias="hidden", causal=True, num_heads=4, max_logit=True),
        Case("scores", 40, 150, sinks=True, alibi="batch", k_bias="normal", softcap=3.0, head_dim=128, max_logit=True, num_heads=6),
        Case("scores", 100, 70, sinks=True, k_bias="hidden", softcap=2.0, window_size=(30, 10), head_dim=96, batch=1),
        Case("scores", 60, 65, sinks=True, k_bias="nothing", causal=True),
        Case("scores", 33, 40, sinks=True, alibi="heads", window_size=(9, -1), head_dim=192, head_dim_v=128, batch=1),
        Case("scores", 50, 60, alibi="heads", softcap=5.0, softmax_scale=-0.2, head_dim=72),
        Case("scores", 50, 60, k_bias="normal", softmax_scale=0.0, sinks=True, max_logit=True),
        Case("gqa_scores", 30, 45, sinks=True, alibi="batch", k_bias="hidden", num_heads=8, num_heads_kv=2, causal=True, batch=3),
    ]  # fmt: skip


def _packed_cases() -> list[Case]:
    """Packed sequences: lengths around tiles, empty ones anywhere, rows that nobody owns, every mask and score."""
    mixed = ((70, 90), (0, 5), (1, 1), (65, 64), (33, 0), (0, 0), (20, 130))
    lengths = ((40, 50), (17, 60), (64, 64))
    used = {"seqused_q": (33, 17, 0), "seqused_k": (50, 1, 20)}
    pad = {"leftpad_q": (0, 3, 60), "leftpad_k": (7, 0, 64)}
    return [
        packed("seqs", ((5, 7), (9, 4))),
        packed("seqs_one", ((150, 170),), causal=True, head_dim=128),
        packed("seqs_none", (), beyond=(5, 6)),
        packed("seqs_empty", ((0, 0), (0, 0))),
        packed("seqs_empty", ((0, 4), (3, 0), (0, 0)), sinks=True, max_logit=True),
        *(packed("seqs_mixed", mixed, causal=causal, head_dim=d, num_heads=4) for causal, d in ((False, 64), (True, 128))),
        packed("seqs_mixed", mixed, beyond=(9, 70), causal=True, head_dim=96, sinks=True),
        packed("seqs_mixed", mixed, window_size=(20, 5), head_dim=64, beyond=(1, 1)),
        packed("seqs_edges", ((127, 128), (129, 127), (1, 129), (64, 1)), causal=True, head_dim=128, num_heads_kv=1),
        packed("seqs_edges", ((63, 65), (65, 63)), head_dim=192, head_dim_v=128, beyond=(3, 0)),
        packed("seqs_edges", ((30, 70), (70, 30)), head_dim=256, causal=True, num_heads=4),
        packed("seqs_many", tuple((n % 7, (3 * n) % 11) for n in range(40)), causal=True, num_heads=4),
        packed("seqs_decode", ((1, 130), (1, 7), (1, 260), (1, 0)), num_heads=8, causal=True, head_dim=128),
        packed("seqs_shown", lengths, **used, num_heads=4),
        packed("seqs_shown", lengths, **pad, causal=True, head_dim=128),
        packed("seqs_shown", lengths, **used, **pad, causal=True, beyond=(2, 3), sinks=True, max_logit=True),
        packed("seqs_shown", lengths, seqused_k=(0, 60, 30), leftpad_k=(0, 8, 30), window_size=(16, 16), head_dim=96),
        packed("seqs_scores", mixed, sinks=True, alibi="batch", k_bias="hidden", causal=True, num_heads=4, max_logit=True),
        packed("seqs_scores", lengths, **pad, alibi="heads", softcap=4.0, head_dim=128, beyond=(5, 5)),
        packed("seqs_scores", lengths, **used, k_bias="normal", softmax_scale=-0.3, head_dim=72, num_heads=6),
        packed("seqs_scores", lengths, k_bias="nothing", sinks=True, softcap=2.0, window_size=(-1, 12)),
        *(packed("seqs_layout", lengths, layout=layout, causal=True, beyond=(4, 2), num_heads=4)
          for layout in ("heads_first", "packed", "padded", "odd_stride", "odd_offset", "expanded_heads")),
        *(packed("seqs_partial", lengths, gradients=g, causal=True, seqused_q=(40, 10, 64), sinks=g == "lse")
          for g in ("out", "lse", "sum")),
        packed("seqs_dims", ((9, 12), (33, 40)), head_dim=7, head_dim_v=40, causal=True),
    ]  # fmt: skip


def _split_cases() -> list[Case]:
    """Parts of the keys by themselves: cut at tiles and between, empty, hidden by the mask."""
    return [
        Case("split", 40, 150, splits=(0, 64, 150), num_heads=4),
        Case("split", 129, 130, splits=(0, 1, 129, 130), causal=True, head_dim=128),
        Case("split_empty", 33, 70, splits=(0, 0, 30, 30, 70, 70), causal=True),
        Case("split_empty", 7, 0, splits=(0, 0)),
        Case("split_empty", 7, 0, splits=(0, 0, 0), causal=True),
        Case("split_hidden", 140, 60, splits=(0, 20, 60), causal=True, head_dim=96, batch=1),
        Case("split_one", 20, 30, splits=(0, 30), softcap=3.0),
        Case("split_scores", 65, 140, splits=(0, 70, 100, 140), alibi="batch", k_bias="hidden", causal=True, num_heads=4),
        Case("split_window", 100, 150, splits=(0, 50, 100, 150), window_size=(30, 10), head_dim=128, batch=1, gradients="lse"),
        Case("split_many", 9, 66, splits=(*range(0, 64), 66), batch=1, head_dim=64),
        Case("split_layout", 30, 80, splits=(0, 33, 80), layout="odd_stride", num_heads=4, gradients="out"),
        Case("split_layout", 30, 80, splits=(0, 33, 80), layout="heads_first", head_dim=192, head_dim_v=128, gradients="sum"),
    ]  # fmt: skip


def random_case(seed: int) -> Case:
    """A case drawn from everything that attention allows, small."""
    draw = random.Random(seed)
    num_heads_kv = draw.choice((1, 1, 2, 3))
    window = draw.choice(((-1, -1), (-1, -1), (draw.randint(-1, 40), draw.randint(-1, 40))))
    head_dims = {"head_dim": draw.choice((16, 32, 64, 128, draw.randint(1, 100)))}
    head_dims["head_dim_v"] = draw.choice((None, None, draw.randint(1, 100)))
    fields = {
        **head_dims, "num_heads": num_heads_kv * draw.choice((1, 2, 4)), "num_heads_kv": num_heads_kv,
        "causal": draw.random() < 0.5, "softmax_scale": draw.choice((None, None, round(draw.uniform(-0.5, 0.5), 3))),
        "window_size": window, "softcap": draw.choice((0.0, 0.0, round(draw.uniform(0.5, 20), 2))),
        "layout": draw.choice(LAYOUTS), "gradients": draw.choice(("both", "both", "out", "lse", "sum")),
        "sinks": draw.random() < 0.4, "alibi": draw.choice(("", "", "heads", "batch")),
        "k_bias": draw.choice(("", "", "normal", "hidden")), "max_logit": draw.random() < 0.3,
    }  # fmt: skip
    kind = draw.choice(("dense", "dense", "packed", "packed", "split"))
    if kind == "packed":
        return _random_packed(f"random{seed}", draw, fields)
    seqlen_q = draw.choice((1, 2, draw.randint(1, 40), draw.randint(40, 300)))
    seqlen_k = draw.choice((1, 2, draw.randint(1, 40), draw.randint(40, 600)))
    if kind == "split":
        cuts = sorted(draw.randint(0, seqlen_k) for _ in range(draw.randint(0, 3)))
        fields |= {"splits": (0, *cuts, seqlen_k), "sinks": False, "max_logit": False}
    return Case(f"random{seed}", seqlen_q, seqlen_k, batch=draw.randint(1, 3), **fields)


def _random_packed(name: str, draw: random.Random, fields: dict[str, Any]) -> Case:
    lengths = [
        tuple(draw.choice((0, 1, draw.randint(1, 40), draw.randint(40, 150))) for _ in "qk") for _ in range(draw.randint(1, 5))
    ]
    for side in (0, 1):
        of_side = [pair[side] for pair in lengths]
        if draw.random() < 0.4:
            fields[("seqused_q", "seqused_k")[side]] = tuple(draw.randint(0, n) for n in of_side)
        if draw.random() < 0.4:
            fields[("leftpad_q", "leftpad_k")[side]] = tuple(draw.randint(0, n) for n in of_side)
    return packed(name, lengths, beyond=(draw.randint(0, 9), draw.randint(0, 9)), **fields)


NAMED_CASES: tuple[Case, ...] = tuple(_named_cases())
RANDOM_CASES: tuple[Case, ...] = tuple(random_case(seed) for seed in range(40))
CASES: dict[str, Case] = {case.name: case for case in (*NAMED_CASES, *RANDOM_CASES)}
assert len(CASES) == len(NAMED_CASES) + len(RANDOM_CASES), "two cases have one name"


def find(name: str, **changes: Any) -> Case:
    """A named case, with fields changed."""
    return replace(CASES[name], **changes) if changes else CASES[name]
