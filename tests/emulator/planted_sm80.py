"""Planted bugs in the kernels for GPUs without wgmma: a backward that shows its order, and the edits that change nothing."""

from __future__ import annotations

from typing import Any

from survivor import Survivor

# Turns of a deterministic dQ: an addition out of turn shows only where tiles of keys run at once, in an unlucky order.
BACKWARD_RUNS = tuple({"schedule": "adversarial", "seed": seed, "sms": 8} for seed in range(3, 8))


def cancelling_sums(dtype: Any, dims: list[int], mask: str) -> tuple[Any, ...]:
    """dout, q, k, v, out, lse and options of a backward whose sums of dQ show their order.

    Tiles of keys come in pairs whose parts of dQ cancel exactly; what the last keys add is 2^-14 of them, and drowns in the
    rounding of any other order.
    """
    import torch

    import flash_ext

    generator = torch.Generator().manual_seed(3)
    rows, tile = 200, 128

    def pairs(dim: int, sign: int, last: float) -> torch.Tensor:
        tiles = [torch.randn(tile, dim, generator=generator) for _ in range(3)]
        return torch.cat([x for t in tiles for x in (t, sign * t)] + [last * torch.randn(rows, dim, generator=generator)])

    k, v = (x[None, :, None].to(dtype) for x in (pairs(dims[0], -1, 2.0**-14), pairs(dims[-1], 1, 1.0)))
    q, dout = torch.zeros(1, rows, 1, dims[0], dtype=dtype), torch.randn(1, rows, 1, dims[-1], generator=generator).to(dtype)
    options = {"causal": mask == "causal", "softmax_scale": None}
    with torch.no_grad():
        out, lse = flash_ext.attention(q, k, v, **options, return_lse=True, backend="reference")
    return dout, q, k, v, out, lse, options


SURVIVORS = (
    Survivor(
        "drop_warp_sync",
        "__syncwarp();",
        "with one stage of V the barrier before P V comes after the last reads of Q; with two stages there is none",
        after="// Staged in the warp's own rows",
    ),
    Survivor(
        "drop_warp_sync",
        "__syncwarp();",
        "after the last slab: what is staged next are other rows, or lies behind a barrier",
        after="lane % 8 * 8, words",
    ),
    Survivor(
        "drop_warp_sync",
        "the tile may lie in shared memory",
        "the next item begins with a barrier",
    ),
    Survivor(
        "mask_edge",
        "return clamp(row + 1 + s.diagonal, 0, s.k.num_rows);",
        "the larger of two equal numbers",
    ),
    Survivor(
        "drop_fence",
        "__threadfence();",
        "the barrier behind it and the release of the turn order every thread's additions before it: causality is transitive",
    ),
    Survivor(
        "weaken_atomic",
        "wait_for_turn(",
        "the emulator has one order of memory; on a GPU the additions might overtake the look at the turn",
    ),
    Survivor(
        "weaken_atomic",
        "pass_turn(",
        "the same, on the side that passes the turn on",
    ),
)
