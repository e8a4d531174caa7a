"""Kernels that this project did not write: CUTLASS's own, through their unmodified host code.

Each unit in cutlass/ includes an example's source or headers from the CUTLASS wheel and is compiled
once (35 to 45 s on an idle machine), then cached by hash.
"""

from __future__ import annotations

import ctypes
import functools
import math
from concurrent.futures import ThreadPoolExecutor

import harness
import numpy as np
import pytest
from harness import In, InOut, Out, aligned, pointer

import build

EXAMPLES = build.toolchain.find_cutlass().parent / "examples"
pytestmark = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="this CUTLASS has no examples folder")

SCHEDULES = [
    pytest.param({"checks": False}, id="plain"),
    pytest.param({"checks": True}, id="checks"),
    pytest.param({"checks": True, "schedule": "late"}, id="checks-late"),
    pytest.param({"checks": True, "schedule": "adversarial", "seed": 3}, id="checks-seed3"),
]


@functools.cache
def units() -> dict[str, ctypes.CDLL]:
    """All units, compiled side by side as memory allows: one takes up to 3.5 GB."""
    include = build.toolchain.find_cutlass()
    folders = [include, include.parent / "tools/util/include", EXAMPLES, EXAMPLES / "88_hopper_fmha"]
    flags = tuple(word for folder in folders for word in ("-isystem", str(folder)))
    harness.emulator()

    def load(name: str) -> ctypes.CDLL:
        source = build.ROOT / "cutlass" / f"{name}.cu"
        return harness.extension(source, flags=flags, depends=(include / "cutlass" / "version.h",))

    names = ["fmha_sm90", "wgmma_tma_sm90", "wgmma_sm90"]
    memory = build.toolchain.free_memory_bytes() / 2**30
    with ThreadPoolExecutor(max(1, min(build.default_jobs(), int(memory / 4)))) as pool:
        return dict(zip(names, pool.map(load, names), strict=True))


def unit(name: str) -> ctypes.CDLL:
    return units()[name]


def run_gemm(name: str, trans: str, m: int, n: int, k: int, rng: np.random.Generator, **options: object) -> None:
    """C = 2 A B^T + 0.5 C with small integers: half precision is exact, and so must be the result."""
    a = aligned((m, k), np.float16, rng.integers(-2, 3, (m, k)))
    b = aligned((n, k), np.float16, rng.integers(-2, 3, (n, k)))
    c = aligned((n, m), np.float16, rng.integers(-8, 9, (n, m)))  # column-major
    want = 2 * (a.astype(np.float64) @ b.astype(np.float64).T).T + 0.5 * c
    if trans == "NT":
        a, b = aligned((k, m), np.float16, a.T), aligned((k, n), np.float16, b.T)
    lda, ldb = (m, n) if trans == "NT" else (k, k)
    with harness.call(In(a, "A"), In(b, "B"), InOut(c, "C"), **options):
        code = unit(name).run_gemm(
            ctypes.c_char(trans[0].encode()), ctypes.c_char(trans[1].encode()), m, n, k, ctypes.c_float(2.0),
            pointer(a), lda, pointer(b), ldb, ctypes.c_float(0.5), pointer(c), m,
        )  # fmt: skip
        harness.check(code)
    np.testing.assert_array_equal(c, want)


@pytest.mark.parametrize("trans", ["NT", "TN"])
@pytest.mark.parametrize("name", ["wgmma_sm90", "wgmma_tma_sm90"])
def test_tutorial_gemm(name, trans, rng):
    run_gemm(name, trans, 256, 128, 320, rng, checks=False)


@pytest.mark.parametrize("name", ["wgmma_sm90", "wgmma_tma_sm90"])
def test_tutorial_gemm_of_several_tiles(name, rng):
    run_gemm(name, "TN", 512, 256, 64 * 7, rng, sms=2, checks=False)


def test_a_race_in_the_tutorial_is_found(rng):
    """After cp.async.wait_group its main loop has no barrier before wgmma reads what other warps copied."""
    with pytest.raises(harness.emulator().EmulatorError) as caught:
        run_gemm("wgmma_sm90", "TN", 256, 128, 320, rng, checks=True)
    assert caught.value.kind == "shared-race" and "wgmma" in str(caught.value)


@pytest.mark.parametrize(
    "options,kind",
    [({"checks": True}, "async-at-exit"), ({"checks": False, "schedule": "late"}, "cluster-exit")],
)
def test_loads_in_flight_at_the_end_of_the_tutorial_are_found(options, kind, rng):
    """Its main loop issues a ring of loads more than it waits for, and the CTA exits under them."""
    with pytest.raises(harness.emulator().EmulatorError) as caught:
        run_gemm("wgmma_tma_sm90", "TN", 256, 128, 320, rng, **options)
    assert caught.value.kind == kind


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Causal attention as example 88 means it: the mask starts at the top left corner."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])
    rows, columns = np.ogrid[: q.shape[2], : k.shape[2]]
    scores = np.where(columns <= rows, scores, -np.inf)
    top = scores.max(-1, keepdims=True)
    weights = np.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    return weights @ v / total, (np.log(total) + top)[..., 0]


@pytest.mark.parametrize("options", SCHEDULES)
@pytest.mark.parametrize("seqlen", [128, 256, 200])
def test_fmha_forward(seqlen, options, rng):
    heads, dim = 2, 64
    shape = (1, heads, seqlen, dim)
    q, k, v = (aligned(shape, np.float16, rng.normal(size=shape)) for _ in range(3))
    out, lse = aligned(shape, np.float16), aligned(shape[:3], np.float32)
    with harness.call(In(q, "Q"), In(k, "K"), In(v, "V"), Out(out, "O"), Out(lse, "LSE"), **options):
        code = unit("fmha_sm90").run_fmha(
            1, heads, seqlen, seqlen, pointer(q), pointer(k), pointer(v), pointer(out), pointer(lse), 4
        )
        harness.check(code)
    want, want_lse = attention(q, k, v)
    assert np.linalg.norm(out - want) / np.linalg.norm(want) < 1e-3
    np.testing.assert_allclose(lse, want_lse, atol=2e-5)
