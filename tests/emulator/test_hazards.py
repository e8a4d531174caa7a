"""A TMA and wgmma pipeline that is right in every schedule, and twenty ways to get it wrong, each reported."""

from __future__ import annotations

import numpy as np
import pytest
from formats import random_matrix
from harness import In, Kernels, Out, aligned, emulator

kernels = Kernels("hazards.cu")
BF16, F32 = 9, 7
SHARED_BYTES = 4 * 64 * 128 + 64 * 64 * 4 + 32


class Problem:
    def __init__(self, tiles: int, rng: np.random.Generator):
        self.tiles = tiles
        self.a, self.b = aligned((64, 64 * tiles), np.uint16), aligned((64, 64 * tiles), np.uint16)
        self.d = aligned((64, 64), np.float32)
        a, b = (random_matrix("bf16", (64, 64 * tiles), rng) for _ in range(2))
        self.a[...], self.b[...] = a.codes, b.codes
        self.want = a.values @ b.values.T

    def launch(self, kernel: str, **options) -> bool:
        """Runs; whether the result is right."""
        encode = emulator().encode_tensor_map
        inputs = [
            encode(BF16, x.ctypes.data, [64 * self.tiles, 64], [128 * self.tiles], [64, 64], [1, 1], swizzle=3)
            for x in (self.a, self.b)
        ]
        output = encode(F32, self.d.ctypes.data, [64, 64], [256], [64, 64], [1, 1])
        kernels.launch(
            kernel, 1, 160, *inputs, output, self.tiles, shared=SHARED_BYTES,
            touches=(In(self.a, "a"), In(self.b, "b"), Out(self.d, "d")), **options,
        )  # fmt: skip
        return bool(np.array_equal(self.d, self.want))


@pytest.mark.parametrize("tiles", [1, 2, 5])
def test_correct(tiles, mode, rng):
    assert Problem(tiles, rng).launch("correct", **mode)


BUGS = {  # kernel: kinds of fault that name it, or "wrong" where only the numbers can tell
    "no_full_wait": {"shared-race", "uninitialised-shared"},
    "no_empty_wait": {"shared-race", "expect-tx", "mbarrier"},
    "early_release": {"shared-race"},
    "no_release": {"deadlock"},
    "wrong_parity": {"shared-race", "uninitialised-shared", "deadlock"},
    "wrong_stage": {"shared-race"},
    "expect_more": {"deadlock", "expect-tx"},
    "expect_less": {"deadlock", "expect-tx"},
    "no_init_sync": {"mbarrier", "shared-race"},
    "empty_count": {"deadlock"},
    "misaligned_box": {"misaligned"},
    "swapped_coords": {"wrong"},
    "no_wgmma_fence": {"missing-wgmma-fence"},
    "touched_accumulator": {"missing-wgmma-fence"},
    "no_wgmma_wait": {"wgmma-register-in-flight", "shared-race"},
    "wrong_swizzle": {"wrong"},
    "no_proxy_fence": {"missing-proxy-fence"},
    "no_epilogue_barrier": {"shared-race", "uninitialised-shared"},
    "no_store_wait": {"async-at-exit"},
    "source_reused": {"shared-race"},
}


@pytest.mark.parametrize("schedule", ["early", "late", "adversarial"])
@pytest.mark.parametrize("bug", BUGS)
def test_bug(bug, schedule, rng):
    try:
        right = Problem(5, rng).launch(bug, checks=True, schedule=schedule, seed=3)
    except emulator().EmulatorError as error:
        assert error.kind in BUGS[bug], str(error)
        assert error.kernel == bug and error.file.endswith((".cu", ".cuh")) and error.line > 0, str(error)
    else:
        assert not right and "wrong" in BUGS[bug], f"{bug} passes unnoticed"


@pytest.mark.parametrize("change", ["zeros", "one byte"])
def test_tensor_map_that_nobody_encoded(change, rng):
    problem = Problem(1, rng)
    good = emulator().encode_tensor_map(BF16, problem.a.ctypes.data, [64, 64], [128], [64, 64], [1, 1], swizzle=3)
    bad = bytes(128) if change == "zeros" else good[:20] + bytes([good[20] ^ 1]) + good[21:]
    with pytest.raises(emulator().EmulatorError, match="tensor map") as caught:
        kernels.launch("correct", 1, 160, bad, good, good, 1, shared=SHARED_BYTES, touches=(In(problem.a),))
    assert caught.value.kind in ("tensor-map", "operand")
