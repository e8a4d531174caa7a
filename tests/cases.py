"""The named cases that every backend must pass: on the CPU, on a GPU and in the emulator.

A case is shapes, options and memory layouts; build() makes its tensors for a device and dtype, check_case() runs one
through flash_ext.attention and compares out, lse and every gradient with the oracle. Memory that belongs to no tensor
(gaps of strided layouts, margins, fresh allocations) holds NaN, so that a stray read shows itself.
"""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
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
    """One call of attention. name: purpose, then what differs from the plainest call."""

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
        parts += [self.layout] * (self.layout != "contiguous") + [f"grad_{self.gradients}"] * (self.gradients != "both")
        return "_".join(parts)

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of attention that matter to the result."""
        return {
            "causal": self.causal, "softmax_scale": self.softmax_scale, "window_size": self.window_size, "softcap": self.softcap,
        }  # fmt: skip

    @property
    def shapes(self) -> dict[str, tuple[int, int, int, int]]:
        head_dim_v = self.head_dim if self.head_dim_v is None else self.head_dim_v
        return {
            "q": (self.batch, self.seqlen_q, self.num_heads, self.head_dim),
            "k": (self.batch, self.seqlen_k, self.num_heads_kv, self.head_dim),
            "v": (self.batch, self.seqlen_k, self.num_heads_kv, head_dim_v),
            "out": (self.batch, self.seqlen_q, self.num_heads, head_dim_v),
        }


@dataclass(frozen=True)
class Tensors:
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor | None
    dlse: Tensor | None


def lay_out(values: Tensor, layout: str) -> Tensor:
    """The same values in memory of the given layout; everything around them is NaN."""
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

    def placed(name: str) -> Tensor:
        return lay_out(normal(*case.shapes[name]).to(dtype).to(device), case.layout)

    q, k, v = placed("q"), placed("k"), placed("v")
    dout = placed("out") if case.gradients in ("both", "out") else None
    if case.gradients == "sum":
        dout = torch.ones((), dtype=dtype, device=device).expand(case.shapes["out"])
    dlse = None
    if case.gradients in ("both", "lse"):
        wide = oracle.accumulation_dtype(dtype)
        dlse = normal(case.batch, case.seqlen_q, case.num_heads).to(wide).to(device).transpose(1, 2)
    return Tensors(q, k, v, dout, dlse)


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


def run(case: Case, tensors: Tensors, attend: Callable[..., Any], **options: Any) -> oracle.Results:
    """out, lse and the gradients that `attend`, called as flash_ext.attention is, gives for a case."""
    leaves = [t.detach().requires_grad_() for t in (tensors.q, tensors.k, tensors.v)]
    out, lse = attend(*leaves, **case.options, return_lse=True, **options)
    results = [(r, g) for r, g in ((out, tensors.dout), (lse, tensors.dlse)) if g is not None]
    gradients = torch.autograd.grad([r for r, _ in results], leaves, [g for _, g in results])
    return oracle.Results(out.detach(), lse.detach(), *gradients)


def check_case(
    case: Case,
    device: str | torch.device,
    dtype: torch.dtype,
    backend: str | None = None,
    attend: Callable[..., Any] | None = None,
    deterministic: bool = False,
) -> oracle.Results:
    """Run a case, poisoned, and hold out, lse and every gradient to the oracle's rule; a fallback is no failure here."""
    tensors = build(case, device, dtype)
    before = [t.clone() for t in (tensors.q, tensors.k, tensors.v)]
    with poisoned_memory(), warnings.catch_warnings():
        warnings.simplefilter("ignore", flash_ext.FallbackWarning)
        got = run(case, tensors, attend or flash_ext.attention, backend=backend, deterministic=deterministic)
    for name, tensor, copy in zip("qkv", (tensors.q, tensors.k, tensors.v), before, strict=True):
        assert torch.equal(tensor, copy), f"{name} was written to"
    oracle.check_results(got, (tensors.q, tensors.k, tensors.v), tensors.dout, tensors.dlse, case.options)
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
    return cases


def random_case(seed: int) -> Case:
    """A case drawn from everything that attention allows, small."""
    draw = random.Random(seed)
    num_heads_kv = draw.choice((1, 1, 2, 3))
    window = draw.choice(((-1, -1), (-1, -1), (draw.randint(-1, 40), draw.randint(-1, 40))))
    return Case(
        f"random{seed}",
        draw.choice((1, 2, draw.randint(1, 40), draw.randint(40, 300))),
        draw.choice((1, 2, draw.randint(1, 40), draw.randint(40, 600))),
        batch=draw.randint(1, 3),
        num_heads=num_heads_kv * draw.choice((1, 2, 4)),
        num_heads_kv=num_heads_kv,
        head_dim=draw.choice((16, 32, 64, 128, draw.randint(1, 100))),
        head_dim_v=draw.choice((None, None, draw.randint(1, 100))),
        causal=draw.random() < 0.5,
        softmax_scale=draw.choice((None, None, round(draw.uniform(-0.5, 0.5), 3))),
        window_size=window,
        softcap=draw.choice((0.0, 0.0, round(draw.uniform(0.5, 20), 2))),
        layout=draw.choice(LAYOUTS),
        gradients=draw.choice(("both", "both", "out", "lse", "sum")),
    )


NAMED_CASES: tuple[Case, ...] = tuple(_named_cases())
RANDOM_CASES: tuple[Case, ...] = tuple(random_case(seed) for seed in range(24))
CASES: dict[str, Case] = {case.name: case for case in (*NAMED_CASES, *RANDOM_CASES)}
assert len(CASES) == len(NAMED_CASES) + len(RANDOM_CASES), "two cases have one name"


def find(name: str, **changes: Any) -> Case:
    """A named case, with fields changed."""
    return replace(CASES[name], **changes) if changes else CASES[name]
