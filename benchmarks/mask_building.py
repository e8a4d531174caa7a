"""How long BlockMasks take to build, beside one forward that uses them.

    python benchmarks/mask_building.py --seqlen 16384 --json out.json

Building happens once and a mask serves every layer, so it is no part of the other figures. The goal: at most a fifth of one
forward of 4 x 32 heads of 64.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import flash_ext
from benchmarks import patterns

ALLOWED_SHARE = 0.2  # of one forward


def builders(seqlen: int, device: str) -> dict[str, Callable[[], flash_ext.BlockMask]]:
    """What a user would call, by name."""
    tree = "tree 8x3" if seqlen >= 9840 else "tree 4x3"
    owner = torch.arange(seqlen, device=device) // max(1, seqlen // 8)
    dense = patterns.visible(tree, torch.arange(seqlen, device=device), seqlen)

    def causal_document(b: torch.Tensor, h: torch.Tensor, row: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (row >= key) & (owner[row] == owner[key])

    return {
        f"{tree}, dense mask": lambda: flash_ext.create_block_mask(dense, None, None, seqlen, seqlen),
        "8 causal documents, function": lambda: flash_ext.create_block_mask(
            causal_document, None, None, seqlen, seqlen, device=device
        ),
        "8 causal documents, document_mask": lambda: flash_ext.document_mask(owner, causal=True),
        f"{tree}, tree_mask": lambda: patterns.block_mask(tree, seqlen, device),
        "window 512 + 16": lambda: patterns.block_mask("window 512 + 16", seqlen, device),
    }


def seconds(call: Callable[[], Any], device: str, repeats: int) -> float:
    """The median of a few runs, the host's part included: building ends with a synchronisation."""
    times = []
    for _ in range(repeats + 1):
        if device == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return sorted(times[1:])[repeats // 2]


def measure(seqlen: int, batch: int, heads: int, device: str, repeats: int) -> list[dict[str, Any]]:
    dtype = torch.bfloat16
    q, k, v = (torch.randn(batch, seqlen, heads, 64, device=device, dtype=dtype) for _ in range(3))
    rows = []
    for name, build in builders(seqlen, device).items():
        mask = build()
        forward = seconds(lambda mask=mask: flash_ext.attention(q, k, v, block_mask=mask), device, repeats)
        built = seconds(build, device, repeats)
        rows.append(
            {
                "mask": name, "density": mask.density, "build_s": built, "forward_s": forward, "share": built / forward,
                "verdict": ("pass" if built <= ALLOWED_SHARE * forward else "fail") if device == "cuda" else "",
            }
        )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="times how long block masks take to build")
    parser.add_argument("--seqlen", type=int, help="default 16384 on a GPU, 512 without")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where the figures go")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch, heads = (4, 32) if device == "cuda" else (1, 2)
    seqlen = arguments.seqlen or (16384 if device == "cuda" else 512)
    rows = measure(seqlen, batch, heads, device, arguments.repeats)
    print(f"| mask | kept blocks | build | one forward | share, at most {ALLOWED_SHARE} | verdict |\n|---|---|---|---|---|---|")
    for row in rows:
        times = " | ".join(f"{row[key] * 1e3:.2f} ms" for key in ("build_s", "forward_s"))
        print(f"| {row['mask']} | {row['density']:.3f} | {times} | {row['share']:.2f} | {row['verdict']} |")
    if arguments.json:
        name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
        arguments.json.write_text(
            json.dumps({"device": name, "seqlen": seqlen, "batch": batch, "heads": heads, "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
