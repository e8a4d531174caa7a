"""Cases of flash_ext.attention_with_kvcache and their oracle, for the CPU, the emulator and a GPU.

The oracle follows the definition row by row in Python and shares no code with flash_ext. Everything in the caches that no
sequence owns is NaN: unused pages, rows beyond a length, padding on the left, gaps between pages.
"""

from __future__ import annotations

import math
import random
import warnings
from dataclasses import dataclass, field
from typing import Any

import cases
import oracle
import torch
from torch import Tensor

import flash_ext


@dataclass(frozen=True)
class Case:
    """One call. lengths: rows of each sequence before it; seqlen_new: rows appended, None: no k and v."""

    purpose: str
    lengths: tuple[int, ...]
    seqlen_q: int = 1
    seqlen_new: int | None = None
    num_heads: int = 4
    num_heads_kv: int = 2
    head_dim: int = 64
    head_dim_v: int | None = None
    capacity: int = 0  # 0: as much as is needed; rounded up to whole pages
    page_size: int | None = None  # None: a dense cache
    page_gap: int = 0  # elements between pages, times 8
    leftpad: tuple[int, ...] | None = None
    batch_idx: tuple[int, ...] | None = None  # sequences of a dense cache with one more than needed
    rotary: str = "none"  # or 'interleaved', 'halves'
    rotary_dim: int | None = None  # None: head_dim
    options: dict[str, Any] = field(default_factory=dict)  # causal, window_size, softcap, softmax_scale, num_splits
    sinks: bool = False
    alibi: bool = False
    shared: bool = False  # v_cache is k_cache[..., :head_dim_v], and new rows come as k alone

    @property
    def name(self) -> str:
        parts = [self.purpose, "x".join(map(str, self.lengths)), f"q{self.seqlen_q}", f"h{self.num_heads}kv{self.num_heads_kv}"]
        parts.append(f"d{self.head_dim}" + (f"v{self.head_dim_v}" if self.head_dim_v else ""))
        parts += [f"new{self.seqlen_new}"] * (self.seqlen_new is not None) + [f"page{self.page_size}"] * (
            self.page_size is not None
        )
        parts += [self.rotary + (str(self.rotary_dim) if self.rotary_dim else "")] * (self.rotary != "none")
        parts += [f"{key}{value}".replace(" ", "") for key, value in self.options.items()]
        parts += ["leftpad"] * (self.leftpad is not None) + ["batch_idx"] * (self.batch_idx is not None)
        return "_".join(parts + ["sinks"] * self.sinks + ["alibi"] * self.alibi + ["shared"] * self.shared)

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def rows(self) -> int:
        """Rows that a sequence can have in the cache."""
        needed = max((*self.lengths, 0)) + (self.seqlen_new or 0)
        wanted = max(self.capacity, needed)
        return wanted if self.page_size is None else -(-wanted // self.page_size) * self.page_size


def build(case: Case, device: Any, dtype: torch.dtype) -> dict[str, Any]:
    """The arguments of the call by name; the caches hold NaN where no sequence has a row."""
    draw = random.Random(case.name)
    generator = torch.Generator().manual_seed(draw.getrandbits(31))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    head_dim_v = case.head_dim_v or case.head_dim
    made: dict[str, Any] = {"q": normal(case.batch, case.seqlen_q, case.num_heads, case.head_dim).to(dtype)}
    page_table = None
    if case.page_size is None:
        sequences = case.batch + (1 if case.batch_idx is not None else 0)
        shape = [sequences, case.rows, case.num_heads_kv]
    else:
        per_sequence = case.rows // case.page_size
        num_pages = case.batch * per_sequence + 3  # some that nobody uses
        order = list(range(num_pages))
        draw.shuffle(order)
        page_table = torch.tensor(order[: case.batch * per_sequence], dtype=torch.int32).view(case.batch, per_sequence)
        shape = [num_pages, case.page_size, case.num_heads_kv]
    caches = []
    for dim in (case.head_dim, head_dim_v):
        rows = shape[1] * shape[2] * dim + 8 * case.page_gap
        memory = torch.full((shape[0], rows), torch.nan, dtype=dtype)
        caches.append(memory[:, : shape[1] * shape[2] * dim].unflatten(1, (shape[1], shape[2], dim)))
    batch_idx = torch.tensor(case.batch_idx, dtype=torch.int32) if case.batch_idx is not None else None
    for b, length in enumerate(case.lengths):
        for cache in caches:
            values = normal(length, case.num_heads_kv, cache.shape[3]).to(dtype)
            for j in range(0 if case.leftpad is None else case.leftpad[b], length):
                block, row = slot(case, page_table, batch_idx, b, j)
                cache[block, row] = values[j]
    made["k_cache"], made["v_cache"] = caches
    if case.seqlen_new is not None:
        made["k"] = normal(case.batch, case.seqlen_new, case.num_heads_kv, case.head_dim).to(dtype)
        made["v"] = None if case.shared else normal(case.batch, case.seqlen_new, case.num_heads_kv, head_dim_v).to(dtype)
    made["cache_seqlens"] = torch.tensor(case.lengths, dtype=torch.int32)
    made["page_table"], made["cache_batch_idx"] = page_table, batch_idx
    if case.leftpad is not None:
        made["leftpad_k"] = torch.tensor(case.leftpad, dtype=torch.int32)
    if case.rotary != "none":
        half = (case.rotary_dim or case.head_dim) // 2
        angles = torch.outer(
            torch.arange(case.rows + case.seqlen_q + 2.0, dtype=torch.float64), 100.0 ** (-torch.arange(half) / half)
        )
        wide = dtype if half % 3 == 0 else torch.promote_types(dtype, torch.float32)  # both kinds of table
        made["rotary_cos"], made["rotary_sin"] = angles.cos().to(wide), angles.sin().to(wide)
        made["rotary_interleaved"] = case.rotary == "interleaved"
    if case.sinks:
        made["sinks"] = normal(case.num_heads).float()
    if case.alibi:
        made["alibi_slopes"] = normal(case.num_heads).float().abs() / 8
    made.update(case.options)
    made = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in made.items()}
    return {**made, "v_cache": made["k_cache"][..., :head_dim_v]} if case.shared else made


def slot(case: Case, page_table: Tensor | None, batch_idx: Tensor | None, b: int, j: int) -> tuple[int, int]:
    """(page or sequence of the cache, row in it) of row j of sequence b."""
    if page_table is not None:
        return int(page_table[b, j // case.page_size]), j % case.page_size
    return (b if batch_idx is None else int(batch_idx[b])), j


def _rotated(rows: Tensor, first: int, step: int, made: dict[str, Any]) -> Tensor:
    """rows (n, heads, dim): row i turned by the angles of position first + i * step."""
    if "rotary_cos" not in made:
        return rows
    result = rows.clone()
    half = made["rotary_cos"].shape[1]
    for i in range(rows.shape[0]):
        c, s = (made[name][first + i * step].to(rows.dtype) for name in ("rotary_cos", "rotary_sin"))
        for p in range(half):
            a, b = (2 * p, 2 * p + 1) if made["rotary_interleaved"] else (p, p + half)
            x, y = rows[i, :, a], rows[i, :, b]
            result[i, :, a], result[i, :, b] = x * c[p] - y * s[p], x * s[p] + y * c[p]
    return result


@dataclass(frozen=True)
class Truth:
    out: Tensor
    lse: Tensor
    k_cache: Tensor
    v_cache: Tensor


def expected(case: Case, made: dict[str, Any], dtype: torch.dtype) -> Truth:
    """By the definition, computed in dtype; rotated rows rounded to the inputs' dtype, as the caches are."""
    stored = made["q"].dtype
    k_cache, v_cache = made["k_cache"].clone(), made["v_cache"].clone()
    options = {"causal": True, "window_size": (-1, -1), "softcap": 0.0, "softmax_scale": case.head_dim**-0.5, **case.options}
    moves = options["causal"] or options["window_size"] != (-1, -1)
    window = (options["window_size"][0], 0 if options["causal"] else options["window_size"][1])
    out = torch.zeros(case.batch, case.seqlen_q, case.num_heads, v_cache.shape[3], dtype=dtype)
    lse = torch.zeros(case.batch, case.num_heads, case.seqlen_q, dtype=dtype)
    new = case.seqlen_new or 0
    for b, length in enumerate(case.lengths):
        if new:
            rotated = _rotated(made["k"][b].to(dtype), length, 1, made).to(stored)
            for i in range(new):
                block, row = slot(case, made["page_table"], made["cache_batch_idx"], b, length + i)
                k_cache[block, row] = rotated[i]
                v_cache[block, row] = rotated[i, :, : v_cache.shape[3]] if made["v"] is None else made["v"][b, i]
                if case.shared:
                    k_cache[block, row, :, : v_cache.shape[3]] = v_cache[block, row]
    for b, length in enumerate(case.lengths):
        start, total = (case.leftpad[b] if case.leftpad else 0), length + new
        places = [slot(case, made["page_table"], made["cache_batch_idx"], b, j) for j in range(start, total)]
        n = len(places)
        rows = [torch.stack([c[place] for place in places]) if n else c.new_zeros(0, *c.shape[2:]) for c in (k_cache, v_cache)]
        keys, values = (r.to(dtype).transpose(0, 1).repeat_interleave(case.num_heads // case.num_heads_kv, 0) for r in rows)
        q = _rotated(made["q"][b].to(dtype), length, int(moves), made).to(stored).to(dtype).transpose(0, 1)
        scores = q @ keys.mT * options["softmax_scale"]
        if options["softcap"] > 0:
            scores = options["softcap"] * torch.tanh(scores / options["softcap"])
        if case.alibi:
            distance = torch.arange(n)[None] - torch.arange(case.seqlen_q)[:, None] - (n - case.seqlen_q)
            scores = scores - made["alibi_slopes"].to(dtype)[:, None, None] * distance.abs()
        keep = oracle.visible_keys(case.seqlen_q, n, False, window)
        scores = scores.masked_fill(~keep, -math.inf)
        if case.sinks:
            column = made["sinks"].to(dtype)[:, None, None].expand(-1, case.seqlen_q, 1)
            scores = torch.cat((scores, column), -1)
            values = torch.cat((values, values.new_zeros(case.num_heads, 1, values.shape[2])), 1)
        sees = (scores != -math.inf).any(-1) if scores.shape[-1] else torch.zeros(case.num_heads, case.seqlen_q, dtype=torch.bool)
        weights = torch.softmax(scores.masked_fill(~sees[..., None], 0.0), -1)
        out[b] = torch.where(sees[..., None], weights @ values, 0.0).transpose(0, 1)
        lse[b] = torch.logsumexp(scores, -1) if scores.shape[-1] else -math.inf
    return Truth(out, lse, k_cache, v_cache)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def check_caches(case: Case, made: dict[str, Any], truth: Truth, before: dict[str, Tensor]) -> None:
    """v's rows exactly, rotated rows within a rounding, and every other element untouched, NaN included."""
    new = case.seqlen_new or 0
    written = torch.zeros(made["k_cache"].shape[:2], dtype=torch.bool)
    for b, length in enumerate(case.lengths):
        for j in range(length, length + new):
            written[slot(case, made["page_table"], made["cache_batch_idx"], b, j)] = True
    for name in ("k_cache", "v_cache"):
        got, old, wanted = made[name].cpu(), before[name].cpu(), getattr(truth, name).cpu()
        assert torch.equal(_bits(got[~written]), _bits(old[~written])), f"{name}: rows that are not new changed"
        if name == "v_cache" or case.rotary == "none":
            assert torch.equal(_bits(got[written]), _bits(wanted[written])), f"{name}: new rows"
        else:
            eps = torch.finfo(got.dtype).eps
            torch.testing.assert_close(got[written].double(), wanted[written].double(), rtol=2 * eps, atol=2 * eps)


def check_case(case: Case, device: Any, dtype: torch.dtype, **options: Any) -> tuple[Tensor, Tensor]:
    """Run a case, poisoned; hold out, lse and the caches to the oracle. Returns (out, lse)."""
    made = build(case, device, dtype)
    before = {name: value.clone() if isinstance(value, Tensor) else value for name, value in made.items()}
    with cases.poisoned_memory(), warnings.catch_warnings():
        warnings.simplefilter("ignore", flash_ext.FallbackWarning)
        out, lse = flash_ext.attention_with_kvcache(**made, return_lse=True, **options)
    for name, value in before.items():
        if isinstance(value, Tensor) and name not in ("k_cache", "v_cache"):
            assert torch.equal(made[name], value), f"{name} was written to"
    on_cpu = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in before.items()}
    truth, wide = expected(case, on_cpu, torch.float64), oracle.accumulation_dtype(dtype)
    plain, plain_lse = expected(case, on_cpu, dtype), expected(case, on_cpu, wide)
    check_caches(case, made, truth, before)
    score = abs(case.options.get("softmax_scale", case.head_dim**-0.5)) * 16 * case.head_dim**0.5
    problems = [
        oracle.compare("out", out, truth.out, dtype, plain.out, truth.out, 4.0 * (1 + score if dtype == torch.float64 else 1)),
        oracle.compare("lse", lse, truth.lse, wide, plain_lse.lse, truth.lse, 1.0 + score),
    ]
    assert out.dtype == dtype and lse.dtype == wide and out.shape == truth.out.shape and lse.shape == truth.lse.shape
    problems = [problem for problem in problems if problem]
    assert not problems, "\n".join(problems)
    return out, lse


def _latent_cases() -> list[Case]:
    """Latent vectors: the values are the first columns of the keys. Rows of queries fill a tile of 64 by heads and positions."""

    def latent(lengths: tuple[int, ...], num_heads: int, **fields: Any) -> Case:
        return Case(
            "latent", lengths, **{"head_dim": 576, "head_dim_v": 512, "num_heads_kv": 1, **fields}, num_heads=num_heads, shared=True
        )

    paged = ((128, 1, 64), (64, 1, 16), (3, 3, 1), (16, 4, 24), (24, 5, 128), (1, 1, 40))
    return [
        *(latent((70, 0, 133), heads) for heads in (16, 20)),
        *(latent((70, 0, 133), n, seqlen_q=rows, seqlen_new=rows, page_size=page, page_gap=1) for n, rows, page in paged),
        latent((70, 9), 6, num_heads_kv=2, head_dim=320, head_dim_v=256, seqlen_q=2, seqlen_new=2),
        latent((70, 9), 4, seqlen_q=2, sinks=True, leftpad=(3, 9), page_size=16),
        latent((70, 9), 4, batch_idx=(2, 0), leftpad=(66, 0), options={"softmax_scale": -0.1}),
        latent((270, 9), 4, seqlen_q=3, page_size=64, options={"causal": False, "window_size": (100, 1)}),
        latent((270, 300), 8, seqlen_q=70, seqlen_new=70, options={"causal": False}),
        latent((0, 0), 4, capacity=32, sinks=True),
        latent((0,), 4, options={"softmax_scale": 0.0}),
        latent((70, 9), 6, num_heads_kv=2, head_dim=64, head_dim_v=48, seqlen_q=2, seqlen_new=2),
        latent((70, 9), 4, options={"softcap": 2.0}),
    ]


def _named_cases() -> list[Case]:
    pages = (1, 3, 16, 64, 256)
    return [
        Case("one", (1,), num_heads=1, num_heads_kv=1, head_dim=8),
        Case("decode", (200, 1, 77), head_dim=128, num_heads=8),
        Case("decode", (200, 1, 77), seqlen_new=1),
        Case("decode", (130, 300), seqlen_new=1, num_heads=16, num_heads_kv=2, head_dim=128, rotary="interleaved"),
        *(Case("paged", (200, 1, 77), seqlen_new=1, page_size=p, rotary="halves") for p in pages),
        *(Case("paged_gap", (33, 129), seqlen_new=2, seqlen_q=2, page_size=p, page_gap=3, head_dim=128) for p in (1, 64)),
        Case("prefill", (0, 0), seqlen_q=140, seqlen_new=140, page_size=16, rotary="halves"),
        Case("prefill", (5, 90), seqlen_q=70, seqlen_new=70, rotary="interleaved", rotary_dim=32),
        Case("chunk", (40, 3), seqlen_q=9, seqlen_new=9, head_dim=96, page_size=7, rotary="halves", rotary_dim=16),
        Case("verify", (60, 61), seqlen_q=5, seqlen_new=5, page_size=32, num_heads=6),
        Case("more_queries", (3, 0), seqlen_q=9, seqlen_new=4, rotary="interleaved"),
        Case("more_keys", (3, 9), seqlen_q=2, seqlen_new=6, rotary="halves", page_size=4),
        # Empty caches, batches, and calls that append nothing.
        Case("empty_cache", (0, 0, 4), seqlen_q=2),
        Case("empty_cache", (0, 0), seqlen_q=3, page_size=16, capacity=32),
        Case("first_token", (0, 0, 0), seqlen_new=1, page_size=8),
        Case("no_capacity", (0,), capacity=0),
        Case("no_batch", ()),
        Case("no_query", (4, 5), seqlen_q=0, seqlen_new=2),
        Case("no_new", (4, 5), seqlen_new=0),
        # Masks and scores.
        Case("full", (50, 20), seqlen_q=4, options={"causal": False}),
        Case("full", (50, 20), seqlen_q=4, seqlen_new=3, rotary="halves", options={"causal": False}, page_size=16),
        Case("window", (300, 20), seqlen_q=3, seqlen_new=3, page_size=16, options={"window_size": (40, 0)}, rotary="interleaved"),
        Case("window", (300, 20), seqlen_q=3, options={"window_size": (10, 1), "causal": False}),
        Case("softcap", (90, 31), seqlen_new=1, options={"softcap": 2.0}, page_size=64),
        Case("scale", (90, 31), options={"softmax_scale": -0.2}),
        Case("sinks", (90, 0, 31), sinks=True, page_size=32),
        Case("sinks", (0, 2), seqlen_q=4, sinks=True),
        Case("alibi", (40, 9), seqlen_q=3, alibi=True, page_size=16),
        # Rows that are no keys.
        Case("leftpad", (50, 20, 9), leftpad=(3, 20, 0), seqlen_q=2),
        Case("leftpad", (50, 20, 9), leftpad=(17, 1, 9), seqlen_q=2, seqlen_new=2, page_size=16, rotary="halves", sinks=True),
        # Sequences in any order.
        Case("batch_idx", (50, 20, 9), batch_idx=(2, 0, 3), seqlen_new=1),
        Case("batch_idx", (50, 20), batch_idx=(1, 2), leftpad=(4, 0)),
        # Heads and head dims.
        Case("mqa", (70, 33), num_heads=7, num_heads_kv=1, seqlen_new=1, page_size=16),
        Case("mha", (70, 33), num_heads=3, num_heads_kv=3, seqlen_new=1),
        Case(
            "unequal",
            (70, 33),
            head_dim=192,
            head_dim_v=128,
            seqlen_new=2,
            seqlen_q=2,
            page_size=16,
            rotary="halves",
            rotary_dim=64,
        ),
        *(Case("head_dim", (20, 33), head_dim=d, seqlen_new=1, page_size=5) for d in (8, 24, 80, 256)),
        Case("head_dim", (20, 33), head_dim=20, head_dim_v=7, seqlen_new=1, rotary="interleaved", rotary_dim=6),
        *(
            Case("splits", (260, 5, 129), seqlen_new=1, page_size=16, options={"num_splits": n}, num_heads=8)
            for n in (1, 2, 3, 7, 64)
        ),
        Case("mla", (70, 0, 33), num_heads=16, num_heads_kv=1, head_dim=576, head_dim_v=512, page_size=64),
        Case("mla_prefill", (0, 9), seqlen_q=20, seqlen_new=20, num_heads=4, num_heads_kv=4, head_dim=192, head_dim_v=128),
        *_latent_cases(),
        Case("long", (1500, 700), seqlen_q=2, seqlen_new=2, num_heads=2, num_heads_kv=1, head_dim=32, page_size=64),
    ]


CASES: dict[str, Case] = {case.name: case for case in _named_cases()}
assert len(CASES) == len(_named_cases()), "two cases have one name"
