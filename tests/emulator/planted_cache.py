"""Calls over KV caches that launch a given kernel, for planted.py: each ring wraps, parts and whole sequences, edges of pages.

As a GPU runs them: the op itself, whose values nobody has checked. Rows of gathers get page sizes that no tensor map takes, or
padding on the left; the others a dense cache through indices, pages smaller than a tile, and pages that hold several.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))


def _cases(gathers: bool) -> list[tuple[Any, dict[str, Any]]]:
    """(case, options): lengths that end a key before, at and behind a tile; none; one key; a part without a full tile.

    window: on the left, for rows of kernels that take one.
    """
    from kvcache_cases import Case

    heads = {"num_heads": 8, "num_heads_kv": 2}
    # Items of one tile, of two, and of as many as there are stages, each followed by one without keys.
    short = (50, 0, 100, 0, 300, 2, 200, 0, 610, 0)
    # Rows whose last keys lie in two tiles; the last item has just these two.
    crossing, ends = {"seqlen_q": 30, "num_heads": 2, "num_heads_kv": 1}, (402, 1, 140)
    whole, parts = {"num_splits": 1, "window": 700}, {"num_splits": 3, "window": 150}
    negative, narrow = {"num_splits": 1, "softmax_scale": -0.1, "window": 200}, {"num_splits": 1, "window": 0}
    if gathers:
        pages = ({"page_size": 1}, {"page_size": 6}, {"page_size": 16, "leftpad": (17, 129)}, {"page_size": 3})
    else:
        pages = ({"batch_idx": (2, 0, 3)}, {"page_size": 16}, {"page_size": 256}, {"page_size": 64})
    return [
        (Case("planted", (900, 0, 130), **pages[0], **heads), whole),
        (Case("planted", ends, **pages[1], **crossing), negative),
        (Case("planted", (400, 129), **pages[2], **heads), parts),
        (Case("planted", short, **pages[3], **heads), whole),
        (Case("planted", (300, 90), **pages[3], **{**crossing, "seqlen_q": 80}), narrow),  # three tiles of queries
    ]


def cache_call(kernel: str) -> Callable[[], list[Any]]:
    """A function that launches this kernel and returns out and lse of every case as integers."""
    from dataclasses import replace

    import kvcache_cases
    import torch

    _, rest = kernel.split("_sm", 1)
    _, dtype, dims, mask, *scored = rest.split("_")
    calls = []
    head_dim, head_dim_v = (int(dim) for dim in (dims[1:].split("x") * 2)[:2])
    fields = {"head_dim": head_dim, "head_dim_v": head_dim_v, "shared": "mla" in kernel}
    for case, more in _cases("gather" in kernel)[: None if mask == "local" else -1]:
        made = kvcache_cases.build(replace(case, **fields), "cpu", {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype])
        if scored:
            made["alibi_slopes"] = torch.linspace(0.1, 0.5, case.num_heads)
        scale = more.get("softmax_scale", case.head_dim**-0.5)
        scale = abs(scale) if "_sm80_" in kernel and not scored else scale  # others run on the row of modified scores
        window = more["window"] if mask == "local" else -1
        calls.append((made, scale, window, more["num_splits"]))

    def call() -> list[torch.Tensor]:
        results = []
        for made, scale, window, num_splits in calls:
            out, lse = torch.ops.flash_ext.kvcache(
                made["q"], made["k_cache"], made["v_cache"], None, None, made["cache_seqlens"], made["cache_batch_idx"],
                made.get("leftpad_k"), made["page_table"], None, None, True, None, made.get("alibi_slopes"), scale,
                True, window, -1, 5.0 if scored else 0.0, num_splits, False, None,
            )  # fmt: skip
            results += [out.view(torch.int16), lse.view(torch.int32)]
        return results

    return call
