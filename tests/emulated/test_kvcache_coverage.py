"""Every basic block of the kernels over KV caches runs, or stands here with the reason why none of their calls can reach it."""

from __future__ import annotations

import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import kvcache_cases
import pytest
import torch
from kvcache_cases import Case

import flash_ext
from flash_ext import _emulator, _host, env

sys.path.append(str(Path(__file__).resolve().parents[1] / "emulator"))

import mutate
import planted
import planted_cache

GROUP = "sm90" if env.EMULATE == "sm90" else "sm80"
KERNELS = [
    row["name"]
    for row in _host.variants()
    if row["op"] in ("fwd_cache", "fwd_cache_gather") and f"{row['op']}_{GROUP}_bf16_" in row["name"]
]
pytestmark = pytest.mark.skipif(not KERNELS, reason="this build has no kernel of the emulated GPU that reads a cache")

# Source text at a place of a block (anywhere in the chain of inlined calls) -> why it cannot run.
UNREACHED = {
    "store_max_logit(params.max_logit": "calls over a cache return no largest logit",
    "if (numbers.has_bias())": "calls over a cache take no bias of keys",
    "if (params.k_bias == nullptr)": "the same",
    "tile.load(bias": "the same",
    "tile.of_column(": "the same",
    "if (tiles.num_tiles == 0)": "an item without keys is not left out, and this is the jump over it",
}
UNREACHED_BY_GATHERS = {
    "places.batch_index": "a dense cache is copied by TMA: gathers are for pages",
}


def variety(kernel: str) -> list[tuple[Case, dict[str, Any]]]:
    """Calls beside those that planted bugs need: many short sequences, sinks, heads and dims that fill nothing, large caps."""
    _, rest = kernel.split("_sm", 1)
    _, _, dims, mask, *scored = rest.split("_")
    dim = int(dims[1:])
    base = Case("coverage", (), head_dim=dim, alibi=bool(scored), page_size=3 if "gather" in kernel else None)
    if mask == "local":
        base = replace(base, options={"window_size": (90, 3), "causal": False})
    cases = (
        replace(base, lengths=(40,) * 40, sinks=True, num_heads=3, num_heads_kv=1),
        replace(base, lengths=(0, 1000, 130), sinks=True, seqlen_q=3, num_heads=6),
        replace(base, lengths=(130, 0), head_dim=dim - 8, head_dim_v=dim - 24, seqlen_q=70, num_heads=6),
        replace(base, lengths=(130, 7), seqlen_q=70, num_heads=2),
        replace(base, lengths=(130, 7), leftpad=(3, 7), num_heads=2),
        replace(base, lengths=(130, 7), capacity=0, page_size=64 if GROUP == "sm90" and "gather" not in kernel else base.page_size),
    )
    calls = [(case, {"num_splits": num_splits}) for case in cases for num_splits in (1, 0, 3)]
    calls += [(cases[1], {"softmax_scale": scale}) for scale in (-0.1, 0.0, 3.0)]
    if scored:
        calls += [(cases[3], {"softcap": cap, "softmax_scale": scale}) for cap, scale in ((3.0, 0.1), (600.0, 0.1), (600.0, 30.0))]
        wide = replace(cases[3], lengths=(700, 7), options={"window_size": (600, 3), "causal": False})
        calls += [
            (wide, {"softcap": cap, "softmax_scale": scale}) for cap, scale in ((0.0, 0.1), (3.0, 0.1), (600.0, 0.1), (600.0, 30.0))
        ]
    return calls


def explained(kernel: str, block: Any, line_offsets: list[int], places: Any) -> str | None:
    """The reason for a block that did not run: by the places of its instructions and of the branch before it."""
    reasons = UNREACHED | (UNREACHED_BY_GATHERS if "gather" in kernel else {})
    for line in range(max(1, block.first_line - 4), block.last_line + 1):
        for _, source in planted.source_lines(places(line_offsets[line - 1])):
            for at, because in reasons.items():
                if at in source:
                    return because
    return None


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_block_runs_or_is_explained(kernel: str, schedule) -> None:
    _emulator.reset_reports()
    for name, num_sms in (("late", 1), ("adversarial2", 1), ("plain", 1), ("plain", 3)):
        schedule(name, profile=True, sms=num_sms, checks=False)
        planted_cache.cache_call(kernel)()
    for seed in range(8 if "gather" in kernel else 0):  # which copies wait for their signal is a matter of luck
        schedule("adversarial1", profile=True, sms=1, checks=False, seed=seed)
        planted_cache.cache_call(kernel)()
    schedule("plain", profile=True, sms=3)
    for case, options in variety(kernel):
        made = kvcache_cases.build(case, "cpu", torch.bfloat16)
        flash_ext.attention_with_kvcache(**{**made, **options}, backend=GROUP)
    (report,) = [report for report in _emulator.reports() if report.kernel == kernel]
    text = _emulator.kernel_ptx(kernel)
    places, offsets = mutate._Source(text, text, 0, len(text)), [0, *(m.end() for m in re.finditer("\n", text))]
    missed = [block for block in report.blocks if not block.executions]
    reasons = Counter(explained(kernel, block, offsets, places) for block in missed)
    unexplained = [
        f"PTX lines {b.first_line} to {b.last_line}: {places(offsets[b.first_line - 1])}"
        for b in missed
        if explained(kernel, b, offsets, places) is None
    ]
    assert not unexplained, "\n".join([str(reasons), *unexplained[:20]])
