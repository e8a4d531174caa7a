"""Packed sequences on the kernels: lengths that make no sense stay inside the tensors, and no sequence touches another.

The emulator knows every tensor of a call and refuses any access beyond them, so a call that returns was in bounds.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import flash_ext
from flash_ext import env

ARCH = env.EMULATE
BACKEND = "sm90" if ARCH == "sm90" else "sm80"
OPS = torch.ops.flash_ext
LENGTHS = ((70, 90), (0, 5), (33, 0), (129, 130), (1, 64))
OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (20, 5)},
    "scores": {"causal": True, "softcap": 3.0, "sinks": True, "alibi_slopes": True, "k_bias": True},
}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ends(side: int) -> Tensor:
    return torch.tensor([0, *(pair[side] for pair in LENGTHS)]).cumsum(0).int()


def packed(head_dim: int, beyond: int = 7) -> list[Tensor]:
    rows = [sum(pair[side] for pair in LENGTHS) + beyond for side in (0, 1)]
    return [normal(rows[0], 4, head_dim), normal(rows[1], 2, head_dim, seed=1), normal(rows[1], 2, head_dim, seed=2)]


def with_scores(options: dict[str, Any], total_k: int) -> dict[str, Any]:
    wide = torch.float32
    made = {
        "sinks": normal(4, seed=3, dtype=wide), "alibi_slopes": normal(len(LENGTHS), 4, seed=4, dtype=wide).abs() / 9,
        "k_bias": normal(2, total_k, seed=5, dtype=wide),
    }  # fmt: skip
    return {name: made[name] if value is True and name in made else value for name, value in options.items()}


@pytest.fixture(scope="module", autouse=True)
def _covered() -> None:
    inputs = [t.to("meta") for t in packed(64)]
    lengths = {f"cu_seqlens_{side}": torch.empty(6, dtype=torch.int32, device="meta") for side in "qk"}
    if flash_ext.explain(*inputs, **lengths, device_info=f"{ARCH}:{env.EMULATE_SMS}").backend != BACKEND:
        pytest.skip(f"no forward kernel for packed sequences on {ARCH} in this build")


@pytest.mark.parametrize("head_dim", (64, 128))
@pytest.mark.parametrize("name", OPTIONS)
def test_equals_dense_calls(name: str, head_dim: int, schedule) -> None:
    schedule("checks")
    q, k, v = packed(head_dim)
    options = with_scores(OPTIONS[name], len(k))
    lengths = {"cu_seqlens_q": ends(0), "cu_seqlens_k": ends(1)}
    out, lse = flash_ext.attention_varlen(q, k, v, **lengths, **options, return_lse=True, backend=BACKEND)
    for b in range(len(LENGTHS)):
        rows, keys = (slice(*lengths[f"cu_seqlens_{side}"][b : b + 2].tolist()) for side in "qk")
        own = dict(options)
        if "k_bias" in own:
            own |= {"k_bias": own["k_bias"][None, :, keys], "alibi_slopes": own["alibi_slopes"][b : b + 1]}
        alone = flash_ext.attention(q[None, rows], k[None, keys], v[None, keys], **own, return_lse=True, backend=BACKEND)
        torch.testing.assert_close(out[rows], alone[0][0], rtol=2**-7, atol=2**-9)
        torch.testing.assert_close(lse[:, rows], alone[1][0], rtol=1e-5, atol=1e-5)
    beyond = slice(int(lengths["cu_seqlens_q"][-1]), None)
    assert not out[beyond].any() and (lse[:, beyond] == -torch.inf).all()


@pytest.mark.parametrize("poison", (torch.nan, torch.inf, "other"), ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_a_sequence_never_changes_another(name: str, poison: Any, schedule) -> None:
    """Bitwise, whatever stands in one of them and in the rows behind the last."""
    schedule("plain")
    lengths = {"cu_seqlens_q": ends(0), "cu_seqlens_k": ends(1)}

    def run(inputs: list[Tensor], options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        out, lse = flash_ext.attention_varlen(*inputs, **lengths, **options, return_lse=True, backend=BACKEND)
        return out, lse.T

    options = with_scores(OPTIONS[name], len(packed(64)[1]))
    expected = run(packed(64), options)
    for b in range(len(LENGTHS)):
        inputs, changed = packed(64), {**options, **({"k_bias": options["k_bias"].clone()} if "k_bias" in options else {})}
        rows, keys = (slice(*lengths[f"cu_seqlens_{side}"][b : b + 2].tolist()) for side in "qk")
        everything = [(inputs[0], rows), (inputs[1], keys), (inputs[2], keys)]
        everything += [(t, slice(-7, None)) for t in inputs]
        if "k_bias" in changed:
            everything += [(changed["k_bias"].T, keys), (changed["k_bias"].T, slice(-7, None))]
        for tensor, part in everything:
            tensor[part] = normal(*tensor[part].shape, seed=11, dtype=tensor.dtype) if poison == "other" else poison
        others = torch.ones(len(inputs[0]), dtype=torch.bool)
        others[rows] = False
        for got, want in zip(run(inputs, changed), expected, strict=True):
            assert torch.equal(got[others], want[others])


GARBAGE = (
    [0, 300, 5, 90], [-7, 30, 100, 12], [200, 100, 50, 0], [0, 2**31 - 1, -(2**31), 4], [50, 50, 50, 50],
    [-(2**31), -1, 0, 2**31 - 1], [2**31 - 1] * 4, [0, 1, 2**30, 2**31 - 1],
)  # fmt: skip


@pytest.mark.parametrize("numbers", GARBAGE, ids=str)
@pytest.mark.parametrize("window", ((-1, -1), (10, -1)), ids=("whole", "window"))
def test_garbage_stays_inside_the_tensors(numbers: list[int], window: tuple[int, int], schedule) -> None:
    """attention_varlen refuses such values here; a GPU would not see them, so the op is called as it is there. What comes out
    of overlapping sequences means nothing; where each row has one sequence, it is attention."""
    ordered = numbers == sorted(numbers)
    schedule("checks" if ordered else "plain")  # sequences that overlap race for their rows; bounds are always checked
    q, k, v = packed(64)
    lengths = torch.tensor(numbers, dtype=torch.int32)
    extra = torch.tensor([-5, 2**31 - 1, 3], dtype=torch.int32)
    k_bias = normal(2, len(k), seed=5, dtype=torch.float32)
    for used, pad in ((None, None), (extra, None), (None, extra), (extra, extra.flip(0)), (-extra, -extra)):
        for bias in (None, k_bias):
            arguments = (lengths, lengths.flip(0), used, used, pad, pad, None, None, bias, 0.125, True, *window, 0.0, ())
            out, lse, _ = OPS.fwd(q, k, v, *arguments, True, False, BACKEND)
            if ordered:
                inside = [t.clamp(0, len(owner)) for t, owner in zip(arguments[:2], (q, k), strict=True)]
                expected = OPS.fwd(q, k, v, *inside, *arguments[2:], True, False, BACKEND)
                assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
