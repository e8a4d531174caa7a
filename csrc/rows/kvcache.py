"""Rows of the forward over a KV cache and of the steps around it: appending rows, combining parts."""

from __future__ import annotations

from itertools import product

from .model import ARCHITECTURES, CXX_ELEMENT, CXX_MASK, DTYPES, Kernel, Variant

KERNELS = (
    {
        (op, "sm90"): Kernel(op, "sm90/fwd_cache.cuh", "FwdCacheParams", "sm90::flash_fwd_cache", "sm90::launch_fwd_cache")
        for op in ("fwd_cache", "fwd_cache_gather")
    }
    | {
        (op, "sm90"): Kernel(op, "sm90/fwd_mla.cuh", "FwdCacheParams", "sm90::flash_fwd_mla", "sm90::launch_fwd_mla")
        for op in ("fwd_mla", "fwd_mla_gather")
    }
    | {
        ("fwd_cache", "sm80"): Kernel(
            "fwd_cache", "sm80/fwd_cache.cuh", "FwdCacheParams", "sm80::flash_fwd_cache", "sm80::launch_fwd_cache"
        )
    }
    | {
        (op, arch): Kernel(op, f"common/{op}.cuh", params, op, f"launch_{op}")
        for op, params in (("append_kv", "AppendKvParams"), ("combine", "CombineParams"))
        for arch in ARCHITECTURES
    }
)

# Keys of a tile of the forward over a cache; sm90/fwd_cache.cuh (CacheTile) holds the same numbers.
CACHE_BLOCK_N = {64: 128, 128: 128, 256: 64}
# The same of sm80/fwd_cache.cuh, whose rows gather from pages of any size.
CACHE_SM80_BLOCK_N = {64: 128, 128: 64, 256: 64}
CACHE_POLICIES = (("causal", "PlainScore"), ("local", "ModifiedScore"))


def _fwd_cache() -> list[Variant]:
    """The forward over a cache: keys by TMA, or gathered; the causal mask, which one row of queries takes for every other,
    and the most general row."""
    rows = []
    for (op, producer), dtype in product((("fwd_cache", "Tma"), ("fwd_cache_gather", "Gather")), DTYPES):
        for dim, block_n in CACHE_BLOCK_N.items():
            for mask, score in CACHE_POLICIES:
                policies = f"flash_ext::{CXX_MASK[mask]}, flash_ext::{score}, flash_ext::sm90::Cache{producer}Producer"
                config = f"sm90::CacheConfig<{CXX_ELEMENT[dtype]}, {dim}, {policies}>"
                rows.append(Variant(op, "sm90", dtype, dim, dim, mask, 64, block_n, config, scored=score == "ModifiedScore"))
    return rows


def _fwd_cache_sm80() -> list[Variant]:
    rows = []
    for dtype, (dim, block_n), (mask, score) in product(DTYPES, CACHE_SM80_BLOCK_N.items(), CACHE_POLICIES):
        config = f"sm80::CacheConfig<{CXX_ELEMENT[dtype]}, {dim}, flash_ext::{CXX_MASK[mask]}, flash_ext::{score}>"
        scored = score == "ModifiedScore"
        rows.append(Variant("fwd_cache", "sm80", dtype, dim, dim, mask, 64, block_n, config, scored=scored))
    return rows


def _fwd_mla() -> list[Variant]:
    """The forward over latent vectors, whose first columns are the values: one mask, the most general without a modified score."""
    return [
        Variant(
            op, "sm90", dtype, 576, 512, "local", 64, 64,
            f"sm90::MlaConfig<{CXX_ELEMENT[dtype]}, 576, 512, flash_ext::LocalMask, flash_ext::sm90::Mla{producer}Producer>",
        )
        for (op, producer), dtype in product((("fwd_mla", "Tma"), ("fwd_mla_gather", "Gather")), DTYPES)
    ]  # fmt: skip


def _steps() -> list[Variant]:
    rows = []
    for arch, dtype in product(ARCHITECTURES, DTYPES):
        element = CXX_ELEMENT[dtype]
        rows.append(Variant("append_kv", arch, dtype, 0, 0, "", 256, 0, f"AppendKvConfig<{element}>"))
        rows += [
            Variant("combine", arch, dtype, dim, dim, "", 128 // min(32, dim // 4), 0, f"CombineConfig<{element}, {dim}>")
            for dim in (64, 128, 256, 512)
        ]
    return rows


def rows() -> list[Variant]:
    return [*_fwd_cache(), *_fwd_cache_sm80(), *_fwd_mla(), *_steps()]
