"""Rows of FP8: quantisation, and the forward of sm90/fwd_fp8.cuh and sm80/fwd_fp8.cuh (from 8.9 on)."""

from __future__ import annotations

from itertools import product

from .model import CXX_ELEMENT, CXX_MASK, CXX_SCORE, DTYPES, Kernel, Variant

FP8_ARCHITECTURES = ("sm89", "sm90")  # 8.0 and 8.6 have no 8-bit floats
KERNELS = {
    **{
        ("quantize_fp8", arch): Kernel(
            "quantize_fp8", "common/quantize_fp8.cuh", "QuantizeFp8Params", "quantize_fp8", "launch_quantize_fp8"
        )
        for arch in FP8_ARCHITECTURES
    },
    ("fwd_fp8", "sm89"): Kernel(
        "fwd_fp8", "sm80/fwd_fp8.cuh", "FwdFp8Params", "sm80::fp8::flash_fwd_fp8_sm80", "sm80::fp8::launch_fwd_fp8"
    ),
    ("fwd_fp8", "sm90"): Kernel(
        "fwd_fp8", "sm90/fwd_fp8.cuh", "FwdFp8Params", "sm90::fp8::flash_fwd_fp8_sm90", "sm90::fp8::launch_fwd_fp8"
    ),
} | {
    (op, "sm90"): Kernel(
        op, "sm90/fwd_fp8_cache.cuh", "FwdFp8CacheParams", "sm90::fp8::flash_fwd_fp8_cache", "sm90::fp8::launch_fwd_fp8_cache"
    )
    for op in ("fwd_fp8_cache", "fwd_fp8_cache_gather")
}


def _quantize_fp8() -> list[Variant]:
    return [
        Variant(
            op="quantize_fp8",
            arch=arch,
            dtype=dtype,
            head_dim=head_dim,
            head_dim_v=head_dim,
            mask="",
            block_m=64,
            block_n=0,
            config=f"QuantizeFp8Config<{CXX_ELEMENT[dtype]}, {head_dim}>",
        )
        for arch, dtype, head_dim in product(FP8_ARCHITECTURES, DTYPES, (64, 128, 256))
    ]


def _policies(space: str, mask: str, scored: bool, kind: str) -> str:
    scales = "BlockScales" if kind.startswith("block") else "HeadScales"
    return f"flash_ext::{CXX_MASK[mask]}, flash_ext::{CXX_SCORE[scored]}, {space}::{scales}"


# Keys of a tile: by head_dim, with sums flushed to float32 after each tile, not flushed, and with modified scores
# (sm90/fwd_fp8.cuh: Tile).
FWD_FP8_BLOCK_N = {64: (192, 224, 192), 96: (128, 224, 128), 128: (128, 224, 128), 192: (128, 128, 64), 256: (128, 128, 64)}
FWD_FP8_KINDS = (
    ("full", False, "head"),
    ("causal", False, "head"),
    ("full", False, "block"),
    ("causal", False, "block"),
    ("local", True, "block"),
    ("full", False, "head_unflushed"),
    ("causal", False, "head_unflushed"),
)


def _fwd_fp8_sm90() -> list[Variant]:
    rows = []
    for (head_dim, tiles), (mask, scored, kind) in product(FWD_FP8_BLOCK_N.items(), FWD_FP8_KINDS):
        flushed = not kind.endswith("_unflushed")
        space = "flash_ext::sm90::fp8"
        policies = f"{_policies(space, mask, scored, kind)}, {space}::{'Flushed' if flushed else 'Unflushed'}"
        rows.append(
            Variant(
                op="fwd_fp8",
                arch="sm90",
                dtype="e4m3",
                head_dim=head_dim,
                head_dim_v=head_dim,
                mask=mask,
                block_m=128,
                block_n=tiles[2 if scored else 0 if flushed else 1],
                config=f"sm90::fp8::FwdFp8Config<{head_dim}, {policies}>",
                scored=scored,
                kind=kind,
            )
        )
    return rows


def _fwd_fp8_sm89() -> list[Variant]:
    """The same, flushed: with mma.sync that costs nothing."""
    return [
        Variant(
            op="fwd_fp8",
            arch="sm89",
            dtype="e4m3",
            head_dim=head_dim,
            head_dim_v=head_dim,
            mask=mask,
            block_m=128,
            block_n=64,
            config=f"sm80::fp8::FwdFp8Config<{head_dim}, {_policies('flash_ext::sm80::fp8', mask, scored, kind)}>",
            scored=scored,
            kind=kind,
        )
        for head_dim, (mask, scored, kind) in product((64, 128, 256), FWD_FP8_KINDS)
        if not kind.endswith("_unflushed")
    ]


# Over a cache: head_dim -> keys of a tile, and with modified scores.
FWD_FP8_CACHE_BLOCK_N = {64: (128, 128), 128: (128, 128), 256: (128, 64)}


def _fwd_fp8_cache() -> list[Variant]:
    """The forward over a cache, as rows.kvcache has it: keys by TMA or gathered, causal or everything; all kinds of scales."""
    rows = []
    for op, producer in (("fwd_fp8_cache", "Tma"), ("fwd_fp8_cache_gather", "Gather")):
        for (dim, tiles), (mask, score) in product(
            FWD_FP8_CACHE_BLOCK_N.items(), (("causal", "PlainScore"), ("local", "ModifiedScore"))
        ):
            policies = f"flash_ext::{CXX_MASK[mask]}, flash_ext::{score}, flash_ext::sm90::fp8::Fp8Cache{producer}Producer"
            config = f"sm90::fp8::FwdFp8CacheConfig<{dim}, {policies}>"
            scored = score == "ModifiedScore"
            rows.append(Variant(op, "sm90", "e4m3", dim, dim, mask, 64, tiles[scored], config, scored=scored))
    return rows


def rows() -> list[Variant]:
    return [*_quantize_fp8(), *_fwd_fp8_sm90(), *_fwd_fp8_sm89(), *_fwd_fp8_cache()]
