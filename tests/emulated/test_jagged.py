"""Short sequences grouped into tiles: every row of it against attention by its definition, sequence by sequence, in float64."""

from __future__ import annotations

import itertools
from typing import Any

import block_mask_checks as checks
import pytest
import torch
from torch import Tensor

import flash_ext
from flash_ext import _emulator, _host, env, jagged_groups

ROWS = [v["name"] for v in _host.variants() if "segments" in v["name"] and v["name"].startswith(("fwd_sm90", "bwd_sm90"))]
pytestmark = pytest.mark.skipif(env.EMULATE != "sm90" or not ROWS, reason="no kernel for groups for this GPU in this build")

# Queries and keys of each sequence: short ones, empty ones on either side, ones that fill a tile alone or do not fit one.
LENGTHS: dict[str, list[tuple[int, int]]] = {
    "short": [(n * 37 % 61, n * 37 % 61) for n in range(1, 17)],
    "mixed": [(3, 3), (0, 0), (130, 130), (7, 7), (128, 128), (1, 1), (127, 127), (64, 64), (64, 64), (65, 65), (300, 300), (5, 5)],
    "unlike": [(5, 40), (0, 9), (30, 0), (60, 3), (20, 90), (1, 1), (200, 64), (3, 129), (9, 2)],
    "one": [(40, 40)],
    "unseen": [(3, 5), (0, 300), (4, 4)],  # tiles of keys that no query sees
}


def offsets(lengths: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    return tuple(torch.tensor([0, *side]).cumsum(0) for side in zip(*lengths, strict=True))


def definition(q: Tensor, k: Tensor, v: Tensor, lengths: list[tuple[int, int]], causal: bool, **options: Any) -> tuple[Tensor, ...]:
    """(out, lse) of each sequence by itself, put together."""
    outs, lses = [], []
    for (a, b), (c, d) in zip(*(itertools.pairwise(t.tolist()) for t in offsets(lengths)), strict=True):
        keep = torch.ones(b - a, d - c, dtype=torch.bool)
        keep = keep.tril(d - c - (b - a)) if causal else keep
        if b == a:
            continue
        if d == c:
            outs.append(q.new_zeros(b - a, q.shape[1], v.shape[2]))
            lse = q.new_full((q.shape[1], b - a), -torch.inf)
            lses.append(lse if "sinks" not in options else options["sinks"][:, None].expand(-1, b - a))
            continue
        out, lse, _ = checks.dense_attention(q[None, a:b], k[None, c:d], v[None, c:d], keep[None, None], **options)
        outs.append(out[0])
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, 1)


def check(row: str, name: str, *, causal: bool, dims: tuple[int, int] | None = None, **options: Any) -> dict[str, Tensor]:
    """out, lse and gradients by the rows of forward and backward that `row` names; returns them."""
    parts = row.split("_")
    dim = int(parts[3].removeprefix("d"))
    dims = (dim, dim) if dims is None else dims
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[parts[2]]
    lengths = LENGTHS[name]
    edges_q, edges_k = offsets(lengths)
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    total_q, total_k = int(edges_q[-1]), int(edges_k[-1])
    leaves = {"q": normal(total_q, 4, dims[0]), "k": normal(total_k, 2, dims[0]), "v": normal(total_k, 2, dims[1])}
    if options.pop("sinks", False):
        leaves["sinks"] = torch.randn(4, generator=generator)
    dout, dlse = normal(total_q, 4, dims[1]), torch.randn(4, total_q, generator=generator, dtype=torch.float64)
    groups = jagged_groups(edges_q, edges_k, total_q=total_q, total_k=total_k, causal=causal)

    def attend(**t: Tensor) -> tuple[Tensor, ...]:
        return flash_ext.attention_jagged(
            t.pop("q"), t.pop("k"), t.pop("v"), edges_q, edges_k, groups=groups, causal=causal, return_lse=True,
            return_max_logit=True, **t, **options,
        )  # fmt: skip

    _emulator.reset_reports()
    found = checks.results(attend, leaves, dout, dlse)
    launched = {report.kernel for report in _emulator.reports()}
    assert {row.replace("bwd", "fwd", 1), row.replace("fwd", "bwd", 1)} <= launched
    exact = {key: t.double() for key, t in leaves.items()}
    scale = {key: options[key] for key in ("softmax_scale",) if key in options}

    def by_definition(**t: Tensor) -> tuple[Tensor, ...]:
        out, lse = definition(t.pop("q"), t.pop("k"), t.pop("v"), lengths, causal, **t, **scale)
        return out, lse, out.new_zeros(0)

    wanted = checks.results(by_definition, exact, dout.double(), dlse)
    assert torch.equal(found["lse"].isinf(), wanted["lse"].isinf())
    for key in (key for key in wanted if key != "max_logit"):
        got, true = (t[key].double() for t in (found, wanted))
        got, true = got.where(true.isfinite(), 0.0), true.where(true.isfinite(), 0.0)
        allowed = 1e-5 if key == "lse" else {torch.bfloat16: 1.2e-2, torch.float16: 2e-3}[dtype]
        assert (got - true).norm() <= allowed * true.norm().clamp(min=1e-30), key
    return found


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("row", [row for row in ROWS if row.startswith("fwd")])
def test_every_row(row: str, name: str, causal: bool, schedule) -> None:
    schedule("adversarial1" if causal else "checks", sms=3)
    check(row, name, causal=causal)


@pytest.mark.parametrize("dim", (16, 32))
def test_small_head_dims(dim: int, schedule) -> None:
    """TMA fills the columns that are not there: no padded copies."""
    schedule("late", sms=2)
    check("fwd_sm90_bf16_d64_segments", "short", causal=True, dims=(dim, dim), sinks=True, softmax_scale=0.3)


def test_gradients_repeat(schedule) -> None:
    schedule("late", sms=2)
    first = check("bwd_sm90_bf16_d64_segments", "mixed", causal=True, deterministic=True)
    schedule("adversarial1", sms=7)
    again = check("bwd_sm90_bf16_d64_segments", "mixed", causal=True, deterministic=True)
    assert all(torch.equal(again[key], value) for key, value in first.items() if value.numel())


def test_fewer_tiles(schedule) -> None:
    """Sixteen sequences of mean 30 in four or five tiles, not sixteen: warp instructions of the forward."""
    schedule("plain", sms=1)
    edges, _ = offsets(LENGTHS["short"])
    q, k, v = (torch.randn(int(edges[-1]), 1, 64).bfloat16() for _ in range(3))
    groups = jagged_groups(edges, total_q=len(q))
    counted = []
    for given in (None, groups):
        _emulator.reset_reports()
        out = flash_ext.attention_jagged(q, k, v, edges, groups=given)
        counted.append(sum(r.warp_instructions for r in _emulator.reports() if r.kernel.startswith("fwd_sm90")))
    assert counted[1] < 0.5 * counted[0], counted
    assert out.isfinite().all()


def test_tables_that_cannot_be_right_stay_within_the_tensors(schedule) -> None:
    """Device memory is not trusted: the emulator would stop at an address of no tensor."""
    schedule("plain", sms=2)  # groups that overlap write the same rows
    edges, _ = offsets(LENGTHS["short"])
    q, k, v = (torch.randn(int(edges[-1]), 1, 64).bfloat16() for _ in range(3))
    groups = jagged_groups(edges, total_q=len(q))
    inputs = groups.inputs(flash_ext.jagged.Call(q, k, v))
    for field in ("groups_q", "groups_k", "keys_of", "queries_of"):
        for value in (2**31 - 1, -(2**31), 1000, -7):
            wrong = getattr(inputs, field).clone()
            wrong.view(-1)[1::2] = value
            changed = inputs._replace(**{field: wrong})
            out, lse, _ = torch.ops.flash_ext.fwd_jagged(*changed, False, False, None)
            torch.ops.flash_ext.bwd_jagged(out, None, q, k, v, out, lse, *changed[3:], False, 7, None)
