"""Rows of the backward, sm90/bwd.cuh and sm80/bwd.cuh, and of the kernels before and after it."""

from __future__ import annotations

from itertools import product

from .model import ARCHITECTURES, CXX_ELEMENT, CXX_MASK, CXX_SCORE, DTYPES, Kernel, Variant

KERNELS = {
    ("bwd", "sm90"): Kernel("bwd", "sm90/bwd.cuh", "BwdParams", "sm90::flash_bwd_sm90", "sm90::launch_bwd"),
    ("bwd", "sm80"): Kernel("bwd", "sm80/bwd.cuh", "BwdParams", "sm80::flash_bwd_sm80", "sm80::launch_bwd"),
} | {
    (op, arch): Kernel(op, f"common/{op}.cuh", params, op, f"launch_{op}")
    for op, params in (
        ("bwd_preprocess", "BwdPreprocessParams"), ("bwd_postprocess", "BwdPostprocessParams"), ("bwd_sinks", "BwdSinksParams")
    )
    for arch in ARCHITECTURES
}  # fmt: skip

# The tile of each row; sm90/bwd_tiles.cuh (BwdTile) holds the same numbers and a static_assert compares them.
BWD_SM90_TILES = {
    (64, 64): (128, 128),
    (96, 96): (64, 128),
    (128, 128): (64, 128),
    (192, 128): (64, 128),
    (192, 192): (64, 64),
    (256, 256): (64, 64),
}


# Rows of two CTAs that exchange dS, beside those of one: (head_dim, mask), scores not modified.
BWD_SM90_PAIRED = ((128, "full"), (128, "causal"), (256, "full"), (256, "causal"))


def _bwd_sm90_paired() -> list[Variant]:
    return [
        Variant(
            op="bwd",
            arch="sm90",
            dtype=dtype,
            head_dim=head_dim,
            head_dim_v=head_dim,
            mask=mask,
            block_m=BWD_SM90_TILES[head_dim, head_dim][0],
            block_n=BWD_SM90_TILES[head_dim, head_dim][1],
            config=f"sm90::BwdConfig<{CXX_ELEMENT[dtype]}, {head_dim}, {head_dim}, flash_ext::{CXX_MASK[mask]}, "
            "flash_ext::PlainScore, flash_ext::sm90::CtaPair>",
            kind="pair",
        )
        for dtype in DTYPES
        for head_dim, mask in BWD_SM90_PAIRED
    ]


def _bwd_sm90() -> list[Variant]:
    return [
        Variant(
            op="bwd",
            arch="sm90",
            dtype=dtype,
            head_dim=head_dim,
            head_dim_v=head_dim_v,
            mask=mask,
            block_m=tile[0],
            block_n=tile[1],
            config=f"sm90::BwdConfig<{CXX_ELEMENT[dtype]}, {head_dim}, {head_dim_v}, flash_ext::{CXX_MASK[mask]}, "
            f"flash_ext::{CXX_SCORE[scored]}>",
            scored=scored,
        )
        for dtype in DTYPES
        for (head_dim, head_dim_v), tile in BWD_SM90_TILES.items()
        for mask, scored in (
            ("full", False), ("causal", False), ("local", False), ("local", True), ("blocks", False), ("blocks", True),
            ("segments", False),
        )
        if mask != "segments" or (head_dim, head_dim_v) in ((64, 64), (128, 128))
        # Modified scores of (192, 128) would spill in that tile; the row for (192, 192) takes them.
        if not (scored and (head_dim, head_dim_v) == (192, 128))
    ]  # fmt: skip


# Kernels for frozen k and v, and for a frozen q: a window takes the other masks too, where each tile is then masked.
def _bwd_sm90_frozen() -> list[Variant]:
    return [
        Variant(
            op="bwd",
            arch="sm90",
            dtype=dtype,
            head_dim=head_dim,
            head_dim_v=head_dim_v,
            mask="local",
            block_m=tile[0],
            block_n=tile[1],
            config=f"sm90::{wrapper}<flash_ext::sm90::BwdConfig<{CXX_ELEMENT[dtype]}, {head_dim}, {head_dim_v}, "
            "flash_ext::LocalMask, flash_ext::PlainScore>>",
            kind=kind,
        )
        for dtype in DTYPES
        for (head_dim, head_dim_v), tile in BWD_SM90_TILES.items()
        for kind, wrapper in (("dq", "DqAlone"), ("dkv", "DkvAlone"))
    ]


# And sm80/bwd.cuh (BwdTile), by shared memory as in FWD_SM80_TILES.
BWD_SM80_TILES = {
    (64, 64, 163): (128, 128),
    (64, 64, 99): (64, 128),
    (128, 128, 163): (64, 128),
    (128, 128, 99): (64, 64),
    (256, 256, 163): (64, 64),
    (256, 256, 99): (32, 64),
}


def _bwd_sm80() -> list[Variant]:
    return [
        Variant(
            op="bwd",
            arch="sm80",
            dtype=dtype,
            head_dim=head_dim,
            head_dim_v=head_dim_v,
            mask=mask,
            block_m=tile[0],
            block_n=tile[1],
            config=f"sm80::BwdConfig<{CXX_ELEMENT[dtype]}, {head_dim}, {head_dim_v}, flash_ext::{CXX_MASK[mask]}, "
            f"flash_ext::{CXX_SCORE[scored]}, flash_ext::sm80::SharedLimit::k{smem_kib}>",
            scored=scored,
            smem_kib=smem_kib,
        )
        for dtype in DTYPES
        for (head_dim, head_dim_v, smem_kib), tile in BWD_SM80_TILES.items()
        for mask, scored in (
            ("full", False), ("causal", False), ("local", False), ("local", True), ("blocks", False), ("blocks", True)
        )
    ]  # fmt: skip


def _bwd_postprocess() -> list[Variant]:
    return [
        Variant(
            op="bwd_postprocess", arch=arch, dtype=dtype, head_dim=0, head_dim_v=0, mask="", block_m=64, block_n=0,
            config=f"BwdPostprocessConfig<{CXX_ELEMENT[dtype]}, {'true' if arch == 'sm80' else 'false'}>",
        )
        for arch, dtype in product(ARCHITECTURES, DTYPES)
    ]  # fmt: skip


def _bwd_sinks() -> list[Variant]:
    return [
        Variant(
            op="bwd_sinks", arch=arch, dtype="f32", head_dim=0, head_dim_v=0, mask="", block_m=512, block_n=0,
            config="BwdSinksConfig",
        )
        for arch in ARCHITECTURES
    ]  # fmt: skip


def _bwd_preprocess() -> list[Variant]:
    return [
        Variant(
            op="bwd_preprocess",
            arch=arch,
            dtype=dtype,
            head_dim=head_dim_v,
            head_dim_v=head_dim_v,
            mask="",
            block_m=256 * 8 // head_dim_v,
            block_n=0,
            config=f"BwdPreprocessConfig<{CXX_ELEMENT[dtype]}, {head_dim_v}>",
        )
        for arch, dtype, head_dim_v in product(ARCHITECTURES, DTYPES, (64, 128, 256))
    ]


def rows() -> list[Variant]:
    return [
        *_bwd_sm90(), *_bwd_sm90_frozen(), *_bwd_sm90_paired(), *_bwd_sm80(), *_bwd_preprocess(), *_bwd_postprocess(), *_bwd_sinks()
    ]  # fmt: skip
