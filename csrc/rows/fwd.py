"""Rows of the forward, sm90/fwd.cuh and sm80/fwd.cuh."""

from __future__ import annotations

from .model import CXX_ELEMENT, CXX_MASK, CXX_SCORE, DTYPES, Kernel, Variant

KERNELS = {
    ("fwd", "sm90"): Kernel("fwd", "sm90/fwd.cuh", "FwdParams", "sm90::flash_fwd_sm90", "sm90::launch_fwd"),
    ("fwd", "sm80"): Kernel("fwd", "sm80/fwd.cuh", "FwdParams", "sm80::flash_fwd_sm80", "sm80::launch_fwd"),
}

# The tile of each forward row; sm90/fwd.cuh (FwdTile) holds the same numbers and a static_assert compares them.
FWD_SM90_TILES = {
    (64, 64, "full"): (192, 128),
    (64, 64, "causal"): (192, 128),
    (64, 64, "local"): (192, 128),
    (64, 64, "local_scored"): (128, 128),
    (96, 96, "full"): (128, 176),
    (96, 96, "causal"): (128, 128),
    (96, 96, "local"): (128, 128),
    (96, 96, "local_scored"): (128, 128),
    (128, 128, "full"): (128, 176),
    (128, 128, "causal"): (128, 128),
    (128, 128, "local"): (128, 128),
    (128, 128, "local_scored"): (128, 128),
    (192, 128, "full"): (128, 128),
    (192, 128, "causal"): (128, 128),
    (192, 128, "local"): (128, 128),
    (192, 128, "local_scored"): (128, 128),
    (192, 192, "full"): (128, 112),
    (192, 192, "causal"): (128, 112),
    (192, 192, "local"): (128, 112),
    (192, 192, "local_scored"): (128, 96),
    (256, 256, "full"): (128, 80),
    (256, 256, "causal"): (128, 80),
    (256, 256, "local"): (128, 64),
    (256, 256, "local_scored"): (128, 64),
}
FWD_SM90_TILES |= {
    (64, 64, "blocks"): (128, 128),
    (64, 64, "blocks_scored"): (128, 128),
    (96, 96, "blocks"): (128, 128),
    (96, 96, "blocks_scored"): (128, 128),
    (128, 128, "blocks"): (128, 128),
    (128, 128, "blocks_scored"): (128, 128),
    (192, 128, "blocks"): (128, 128),
    (192, 128, "blocks_scored"): (128, 64),
    (192, 192, "blocks"): (128, 64),
    (192, 192, "blocks_scored"): (128, 64),
    (256, 256, "blocks"): (128, 64),
    (256, 256, "blocks_scored"): (128, 64),
    # Groups of short sequences, of head_dims that such have.
    (64, 64, "segments"): (128, 128),
    (128, 128, "segments"): (128, 128),
}


def _fwd_sm90() -> list[Variant]:
    return [
        Variant(
            op="fwd",
            arch="sm90",
            dtype=dtype,
            head_dim=head_dim,
            head_dim_v=head_dim_v,
            mask=mask,
            block_m=tile[0],
            block_n=tile[1],
            config=f"sm90::FwdConfig<{CXX_ELEMENT[dtype]}, {head_dim}, {head_dim_v}, flash_ext::{CXX_MASK[mask]}, "
            f"flash_ext::{CXX_SCORE[scored]}>",
            scored=scored,
        )
        for dtype in DTYPES
        for (head_dim, head_dim_v, policies), tile in FWD_SM90_TILES.items()
        for mask, scored in [(policies.removesuffix("_scored"), policies.endswith("_scored"))]
    ]


# As FWD_SM90_TILES, for sm80/fwd.cuh, by shared memory of a CTA in KiB: 163 is what 8.0 has (9.0 and 10.0 more), 99 what 8.6,
# 8.9 and 12.0 have. With a modified score, the tiles of head_dim 64 and 128 are those of 99 everywhere.
FWD_SM80_TILES = {
    (64, 64, 163): (128, 128),
    (64, 64, 99): (128, 64),
    (128, 128, 163): (128, 64),
    (128, 128, 99): (128, 64),
    (192, 192, 163): (128, 64),
    (192, 192, 99): (64, 64),
    (256, 256, 163): (128, 64),
    (256, 256, 99): (64, 64),
    (96, 96, 163): (128, 64),
    (96, 96, 99): (128, 64),
    (192, 128, 163): (128, 64),
    (192, 128, 99): (64, 64),
}
# With these policies alone, to spare compile time; calls with others take the next larger row.
FWD_SM80_PLAIN = {(96, 96), (192, 128)}


def _fwd_sm80() -> list[Variant]:
    return [
        Variant(
            op="fwd",
            arch="sm80",
            dtype=dtype,
            head_dim=head_dim,
            head_dim_v=head_dim_v,
            mask=mask,
            block_m=tile[0],
            block_n=tile[1],
            config=f"sm80::FwdConfig<{CXX_ELEMENT[dtype]}, {head_dim}, {head_dim_v}, flash_ext::{CXX_MASK[mask]}, "
            f"flash_ext::{CXX_SCORE[scored]}, flash_ext::sm80::SharedLimit::k{smem_kib}>",
            scored=scored,
            smem_kib=smem_kib,
        )
        for dtype in DTYPES
        for (head_dim, head_dim_v, smem_kib), tile in FWD_SM80_TILES.items()
        for mask, scored in (
            ("full", False), ("causal", False), ("local", False), ("local", True), ("blocks", False), ("blocks", True)
        )
        if not (scored and smem_kib == 163 and head_dim <= 128)
        if mask in ("full", "causal") or (head_dim, head_dim_v) not in FWD_SM80_PLAIN
    ]  # fmt: skip


def rows() -> list[Variant]:
    return [*_fwd_sm90(), *_fwd_sm80()]
