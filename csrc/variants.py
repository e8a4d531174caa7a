"""The table of compiled variants, and the generator of the files that instantiate it.

This is the only list of what is compiled. A variant's name is also the name of its kernel's entry point, so the same
word stands in file names, profiler rows, ptxas reports and error messages. Nothing generated is committed.

    python csrc/variants.py --list                     the names, one a line
    python csrc/variants.py --out DIR                  write the generated files
    FLASH_EXT_VARIANTS="bwd_preprocess_sm80_*"         build a subset: shell patterns, separated by commas

Standard library only: setup.py imports it before anything is installed.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
from dataclasses import dataclass
from itertools import product
from pathlib import Path

CXX_ELEMENT = {"bf16": "__nv_bfloat16", "fp16": "__half"}
CXX_SCALAR_TYPE = {
    "bf16": "ScalarType::kBFloat16", "fp16": "ScalarType::kFloat16", "f32": "ScalarType::kFloat32", "": "ScalarType::kBool",
    "e4m3": "ScalarType::kFloat8E4m3",
}  # fmt: skip
ARCHITECTURES = ("sm80", "sm90")


@dataclass(frozen=True)
class Kernel:
    """A kernel source: its header and the C++ names that the generated code puts together (in namespace flash_ext)."""

    op: str
    header: str
    params: str
    body: str
    launch: str


KERNELS = {
    ("fwd", "sm90"): Kernel("fwd", "sm90/fwd.cuh", "FwdParams", "sm90::flash_fwd_sm90", "sm90::launch_fwd"),
    ("fwd", "sm80"): Kernel("fwd", "sm80/fwd.cuh", "FwdParams", "sm80::flash_fwd_sm80", "sm80::launch_fwd"),
    ("bwd", "sm80"): Kernel("bwd", "sm80/bwd.cuh", "BwdParams", "sm80::flash_bwd_sm80", "sm80::launch_bwd"),
    ("bwd", "sm90"): Kernel("bwd", "sm90/bwd.cuh", "BwdParams", "sm90::flash_bwd_sm90", "sm90::launch_bwd"),
    **{
        ("bwd_preprocess", arch): Kernel(
            "bwd_preprocess",
            "common/bwd_preprocess.cuh",
            "BwdPreprocessParams",
            "bwd_preprocess",
            "launch_bwd_preprocess",
        )
        for arch in ARCHITECTURES
    },
    **{
        ("bwd_postprocess", arch): Kernel(
            "bwd_postprocess", "common/bwd_postprocess.cuh", "BwdPostprocessParams", "bwd_postprocess", "launch_bwd_postprocess"
        )
        for arch in ARCHITECTURES
    },
    **{
        ("bwd_sinks", arch): Kernel("bwd_sinks", "common/bwd_sinks.cuh", "BwdSinksParams", "bwd_sinks", "launch_bwd_sinks")
        for arch in ARCHITECTURES
    },
    **{
        ("fill_unused", arch): Kernel(
            "fill_unused", "common/fill_unused.cuh", "FillUnusedParams", "fill_unused", "launch_fill_unused"
        )
        for arch in ARCHITECTURES
    },
    **{
        ("mask_blocks", arch): Kernel(
            "mask_blocks", "common/mask_blocks.cuh", "MaskBlocksParams", "mask_blocks", "launch_mask_blocks"
        )
        for arch in ARCHITECTURES
    },
    **{
        (op, "sm90"): Kernel(op, "sm90/fwd_cache.cuh", "FwdCacheParams", "sm90::flash_fwd_cache", "sm90::launch_fwd_cache")
        for op in ("fwd_cache", "fwd_cache_gather")
    },
    **{
        (op, arch): Kernel(op, f"common/{op}.cuh", params, op, f"launch_{op}")
        for op, params in (("append_kv", "AppendKvParams"), ("combine", "CombineParams"))
        for arch in ARCHITECTURES
    },
    ("quantize_fp8", "sm90"): Kernel(
        "quantize_fp8", "common/quantize_fp8.cuh", "QuantizeFp8Params", "quantize_fp8", "launch_quantize_fp8"
    ),
    ("fwd_fp8", "sm90"): Kernel(
        "fwd_fp8", "sm90/fwd_fp8.cuh", "FwdFp8Params", "sm90::fp8::flash_fwd_fp8_sm90", "sm90::fp8::launch_fwd_fp8"
    ),
}

# One look-up function for each op in host/launchers.h: op -> (type of the launcher, params).
LAUNCHERS = {
    "fwd": ("FwdLauncher", "FwdParams"),
    "bwd": ("BwdLauncher", "BwdParams"),
    "bwd_postprocess": ("BwdPostprocessLauncher", "BwdPostprocessParams"),
    "bwd_sinks": ("BwdSinksLauncher", "BwdSinksParams"),
    "bwd_preprocess": ("BwdPreprocessLauncher", "BwdPreprocessParams"),
    "fill_unused": ("FillUnusedLauncher", "FillUnusedParams"),
    "mask_blocks": ("MaskBlocksLauncher", "MaskBlocksParams"),
    "append_kv": ("AppendKvLauncher", "AppendKvParams"),
    "combine": ("CombineLauncher", "CombineParams"),
    "fwd_cache": ("FwdCacheLauncher", "FwdCacheParams"),
    "fwd_cache_gather": ("FwdCacheLauncher", "FwdCacheParams"),
    "quantize_fp8": ("QuantizeFp8Launcher", "QuantizeFp8Params"),
    "fwd_fp8": ("FwdFp8Launcher", "FwdFp8Params"),
}


@dataclass(frozen=True)
class Variant:
    """One row: one kernel entry.

    arch is the group whose compiler flags the row is built with, and the lowest architecture that runs it: sm80 (SASS of
    the chosen 8.x and later architectures, and compute_80 PTX for all others) or sm90 (sm_90a only). dtype is '' where there is
    none. head_dim and head_dim_v are the largest that the row covers (0 where there are none); smaller multiples of 8 run on it
    too. mask is the policy, '' where there is none; scored: with the modified score (softcap, ALiBi, key bias). block_m and
    block_n are the tile (rows of queries, rows of keys; 0 where there is none). config is the C++ type that the kernel template
    is instantiated with. smem_kib: rows that differ in it alone are tiles for devices whose CTAs may have that much shared
    memory (in KiB); the planner takes the largest that fits. 0: one tile for every device.
    """

    op: str
    arch: str
    dtype: str
    head_dim: int
    head_dim_v: int
    mask: str
    block_m: int
    block_n: int
    config: str
    scored: bool = False
    smem_kib: int = 0
    # FP8 forward: one scale for a 'head' or for each 'block' of 64 rows; '_unflushed': sums stay in the tensor cores.
    kind: str = ""

    @property
    def name(self) -> str:
        dims = f"d{self.head_dim}" if self.head_dim == self.head_dim_v else f"d{self.head_dim}x{self.head_dim_v}"
        parts = (self.op, self.arch, self.dtype, dims if self.head_dim else "", self.mask, "scored" if self.scored else "")
        parts += (f"smem{self.smem_kib}",) if self.smem_kib else ()
        parts += (self.kind,)
        return "_".join(filter(None, parts))

    @property
    def unit(self) -> str:
        """The translation unit that holds this row: rows of one kernel source, dtype, architecture and size together."""
        if self.op.startswith("fwd_cache"):
            return f"{self.op}_{self.arch}_{self.dtype}"
        if self.op == "fwd_fp8":
            return f"{self.op}_{self.arch}_{self.kind}" + "_large" * (self.head_dim > 128) + "_scored" * self.scored
        if self.op not in ("fwd", "bwd"):
            return f"small_{self.arch}_{self.dtype if self.dtype in CXX_ELEMENT else 'bf16'}"
        return f"{self.op}_{self.arch}_{self.dtype}" + "_large" * (self.head_dim > 128) + "_scored" * self.scored

    @property
    def kernel(self) -> Kernel:
        return KERNELS[self.op, self.arch]


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
}
CXX_MASK = {"full": "FullMask", "causal": "CausalMask", "local": "LocalMask", "blocks": "BlockMask"}
CXX_SCORE = {False: "PlainScore", True: "ModifiedScore"}


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
        for dtype in ("bf16", "fp16")
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
}


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
        for dtype in ("bf16", "fp16")
        for (head_dim, head_dim_v, smem_kib), tile in FWD_SM80_TILES.items()
        for mask, scored in (
            ("full", False), ("causal", False), ("local", False), ("local", True), ("blocks", False), ("blocks", True)
        )
        if not (scored and smem_kib == 163 and head_dim <= 128)
    ]  # fmt: skip


# The same for the backward: sm90/bwd_tiles.cuh (BwdTile).
BWD_SM90_TILES = {
    (64, 64): (128, 128),
    (96, 96): (64, 128),
    (128, 128): (64, 128),
    (192, 128): (64, 128),
    (192, 192): (64, 64),
    (256, 256): (64, 64),
}


# Rows with lists of blocks, by (head_dim, scored): the others would spill registers.
BWD_SM90_LISTED = {(64, False), (64, True), (96, False), (128, False)}


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
        for dtype in ("bf16", "fp16")
        for (head_dim, head_dim_v), tile in BWD_SM90_TILES.items()
        for mask, scored in (
            ("full", False), ("causal", False), ("local", False), ("local", True), ("blocks", False), ("blocks", True)
        )
        if mask != "blocks" or (head_dim, scored) in BWD_SM90_LISTED
        # Modified scores of (192, 128) would spill in that tile; the row for (192, 192) takes them.
        if not (scored and (head_dim, head_dim_v) == (192, 128))
    ]  # fmt: skip


# And sm80/bwd.cuh (BwdTile), by shared memory as in FWD_SM80_TILES. Beyond head_dim 128, no tile fits 99 KiB well.
BWD_SM80_TILES = {
    (64, 64, 163): (128, 128),
    (64, 64, 99): (64, 128),
    (128, 128, 163): (64, 128),
    (128, 128, 99): (64, 64),
    (256, 256, 163): (64, 64),
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
        for dtype in ("bf16", "fp16")
        for (head_dim, head_dim_v, smem_kib), tile in BWD_SM80_TILES.items()
        for mask, scored in (("full", False), ("causal", False), ("local", False), ("local", True))
    ]


def _bwd_postprocess() -> list[Variant]:
    return [
        Variant(
            op="bwd_postprocess", arch=arch, dtype=dtype, head_dim=0, head_dim_v=0, mask="", block_m=64, block_n=0,
            config=f"BwdPostprocessConfig<{CXX_ELEMENT[dtype]}, {'true' if arch == 'sm80' else 'false'}>",
        )
        for arch, dtype in product(ARCHITECTURES, ("bf16", "fp16"))
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
        for arch, dtype, head_dim_v in product(ARCHITECTURES, ("bf16", "fp16"), (64, 128, 256))
    ]


def _fill_unused() -> list[Variant]:
    return [
        Variant(
            op="fill_unused", arch=arch, dtype="f32", head_dim=0, head_dim_v=0, mask="", block_m=128, block_n=0,
            config="FillUnusedConfig",
        )
        for arch in ARCHITECTURES
    ]  # fmt: skip


def _mask_blocks() -> list[Variant]:
    return [
        Variant(
            op="mask_blocks", arch=arch, dtype="", head_dim=0, head_dim_v=0, mask="", block_m=128, block_n=128,
            config="MaskBlocksConfig",
        )
        for arch in ARCHITECTURES
    ]  # fmt: skip


# Keys of a tile of the forward over a cache; sm90/fwd_cache.cuh (CacheTile) holds the same numbers.
CACHE_BLOCK_N = {64: 128, 128: 128, 256: 64}


def _fwd_cache() -> list[Variant]:
    """The forward over a cache: keys by TMA, or gathered; the causal mask, which one row of queries takes for every other,
    and the most general row."""
    rows = []
    for (op, producer), dtype in product((("fwd_cache", "Tma"), ("fwd_cache_gather", "Gather")), ("bf16", "fp16")):
        for dim, block_n in CACHE_BLOCK_N.items():
            for mask, score in (("causal", "PlainScore"), ("local", "ModifiedScore")):
                policies = f"flash_ext::{CXX_MASK[mask]}, flash_ext::{score}, flash_ext::sm90::Cache{producer}Producer"
                config = f"sm90::CacheConfig<{CXX_ELEMENT[dtype]}, {dim}, {policies}>"
                rows.append(Variant(op, "sm90", dtype, dim, dim, mask, 64, block_n, config, scored=score == "ModifiedScore"))
    return rows


def _kvcache() -> list[Variant]:
    """The steps around attention over a KV cache: appending rows, and combining the results of parts of the keys."""
    rows = _fwd_cache()
    for arch, dtype in product(ARCHITECTURES, ("bf16", "fp16")):
        element = CXX_ELEMENT[dtype]
        rows.append(Variant("append_kv", arch, dtype, 0, 0, "", 256, 0, f"AppendKvConfig<{element}>"))
        rows += [
            Variant("combine", arch, dtype, dim, dim, "", 128 // min(32, dim // 4), 0, f"CombineConfig<{element}, {dim}>")
            for dim in (64, 128, 256, 512)
        ]
    return rows


def _quantize_fp8() -> list[Variant]:
    return [
        Variant(
            op="quantize_fp8",
            arch="sm90",
            dtype=dtype,
            head_dim=head_dim,
            head_dim_v=head_dim,
            mask="",
            block_m=64,
            block_n=0,
            config=f"QuantizeFp8Config<{CXX_ELEMENT[dtype]}, {head_dim}>",
        )
        for dtype, head_dim in product(("bf16", "fp16"), (64, 128, 256))
    ]


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


def _fwd_fp8() -> list[Variant]:
    rows = []
    for (head_dim, tiles), (mask, scored, kind) in product(FWD_FP8_BLOCK_N.items(), FWD_FP8_KINDS):
        flushed = not kind.endswith("_unflushed")
        space = "flash_ext::sm90::fp8"
        scales = "BlockScales" if kind.startswith("block") else "HeadScales"
        policies = f"flash_ext::{CXX_MASK[mask]}, flash_ext::{CXX_SCORE[scored]}, {space}::{scales}, "
        policies += f"{space}::{'Flushed' if flushed else 'Unflushed'}"
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


VARIANTS: tuple[Variant, ...] = (
    *_fwd_sm90(), *_fwd_sm80(), *_bwd_sm90(), *_bwd_sm80(), *_bwd_preprocess(), *_bwd_postprocess(), *_bwd_sinks(), *_fill_unused(),
    *_mask_blocks(), *_kvcache(), *_quantize_fp8(), *_fwd_fp8(),
)  # fmt: skip


def select(architectures: tuple[str, ...] = ARCHITECTURES, pattern: str | None = None) -> list[Variant]:
    """The rows of these architectures that match FLASH_EXT_VARIANTS (or the pattern given)."""
    pattern = os.environ.get("FLASH_EXT_VARIANTS", "") if pattern is None else pattern
    patterns = [p.strip() for p in pattern.split(",") if p.strip()] or ["*"]
    rows = [v for v in VARIANTS if any(fnmatch.fnmatch(v.name, p) for p in patterns)]
    if not rows:
        raise ValueError(f"FLASH_EXT_VARIANTS={pattern!r} matches none of: " + ", ".join(v.name for v in VARIANTS))
    return [v for v in rows if v.arch in architectures]


def units(rows: list[Variant]) -> dict[str, list[Variant]]:
    grouped: dict[str, list[Variant]] = {}
    for row in rows:
        grouped.setdefault(row.unit, []).append(row)
    return grouped


def unit_source(rows: list[Variant]) -> str:
    """A translation unit: the entry point and the launcher of each row."""
    lines = [f'#include "{header}"' for header in sorted({row.kernel.header for row in rows})]
    for row in rows:
        kernel, config = row.kernel, f"{row.name}_config"
        tile = f"{config}::kBlockM == {row.block_m}" + (f" && {config}::kBlockN == {row.block_n}" if row.block_n else "")
        lines += [
            "",
            f"using {config} = flash_ext::{row.config};",
            f'static_assert({tile}, "csrc/variants.py and {kernel.header} disagree");',
            f'extern "C" __global__ void __launch_bounds__({config}::kNumThreads, {config}::kMinBlocksPerSm)',
            f"    {row.name}(const __grid_constant__ flash_ext::{kernel.params} params) {{",
            f"  flash_ext::{kernel.body}<{config}>(params);",
            "}",
            "namespace flash_ext {",
            f"cudaError_t launch_{row.name}(const {kernel.params}& params, cudaStream_t stream) {{",
            f"  return {kernel.launch}<{config}>(&{row.name}, params, stream);",
            "}",
            "}  // namespace flash_ext",
        ]
    return "\n".join(lines) + "\n"


def table_source(rows: list[Variant]) -> str:
    """The rows as data, for the planner: no CUDA, so that it compiles anywhere."""
    entries = [
        f'    {{"{r.name}", Op::k_{r.op}, {r.arch[2:]}, {CXX_SCALAR_TYPE[r.dtype]}, {r.head_dim}, {r.head_dim_v}, '
        f"Mask::k_{r.mask or 'none'}, Score::k_{'modified' if r.scored else 'plain'}, {r.block_m}, {r.block_n}, "
        f'{r.smem_kib * 1024}, "{r.kind}"}},'
        for r in rows
    ]
    return (
        "\n".join(
            [
                '#include "host/registry.h"',
                "namespace flash_ext {",
                f"static const std::array<Variant, {len(rows)}> kVariants{{{{",
                *entries,
                "}};",
                "std::span<const Variant> variants() { return kVariants; }",
                "}  // namespace flash_ext",
            ]
        )
        + "\n"
    )


def launchers_source(rows: list[Variant]) -> str:
    """Name to launcher, one function for each op."""
    lines = ['#include "host/launchers.h"', "namespace flash_ext {"]
    for op, (launcher_type, params) in LAUNCHERS.items():
        mine = [r for r in rows if r.op == op]
        lines += [f"cudaError_t launch_{r.name}(const {params}&, cudaStream_t);" for r in mine]
        lines += [f"{launcher_type} find_{op}([[maybe_unused]] std::string_view variant) {{"]
        lines += [f'  if (variant == "{r.name}") return launch_{r.name};' for r in mine]
        lines += ["  return nullptr;", "}"]
    return "\n".join([*lines, "}  // namespace flash_ext"]) + "\n"


def write_if_changed(path: Path, text: str) -> None:
    """Leave the time stamp of an unchanged file alone, so that the build does not compile it again."""
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def generate(out: Path, rows: list[Variant], known: list[Variant] | None = None) -> dict[str, tuple[str, Path]]:
    """Write every generated file below out; returns unit name -> (architecture, path of the unit).

    rows are compiled; known (by default the same) are those that the planner has in its table.
    """
    written = {}
    for unit, members in units(rows).items():
        path = out / f"{unit}.cu"
        write_if_changed(path, unit_source(members))
        written[unit] = (members[0].arch, path)
    write_if_changed(out / "variant_table.cpp", table_source(rows if known is None else known))
    write_if_changed(out / "launchers.cpp", launchers_source(rows))
    keep = {path for _, path in written.values()}
    for stale in set(out.glob("*.cu")) - keep:
        stale.unlink()
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description="list the compiled variants, or write the files that instantiate them")
    parser.add_argument("--list", action="store_true", help="print the names of the selected rows")
    parser.add_argument("--out", type=Path, help="folder for the generated files")
    arguments = parser.parse_args()
    rows = select()
    if arguments.list or arguments.out is None:
        print("\n".join(row.name for row in rows))
    if arguments.out is not None:
        generate(arguments.out, rows)


if __name__ == "__main__":
    main()
