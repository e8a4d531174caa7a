"""Rows of the small kernels around attention: fill_unused and mask_blocks."""

from __future__ import annotations

from .model import ARCHITECTURES, Kernel, Variant

KERNELS = {
    (op, arch): Kernel(op, f"common/{op}.cuh", params, op, f"launch_{op}")
    for op, params in (("fill_unused", "FillUnusedParams"), ("mask_blocks", "MaskBlocksParams"))
    for arch in ARCHITECTURES
}


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


def rows() -> list[Variant]:
    return [*_fill_unused(), *_mask_blocks()]
