"""Runs planted bugs: every site of mutate.py in a kernel, each under checks, late work and hostile schedules.

    python tests/emulator/planted.py fwd_sm90_bf16_d128_causal [--kind KIND ...] [--json FILE]

A bug is caught by an error of the emulator, or by a result that differs from the unedited kernel's in any bit. What is
not caught must stand in SURVIVORS, with the reason why the edit changes nothing; an entry that nothing needs is an error
too. The kernels run through flash_ext.attention on CPU tensors, on shapes that make every ring of barriers wrap.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "emulator")]

import mutate  # noqa: E402
import planted_cache  # noqa: E402
import planted_fp8  # noqa: E402
import planted_sm80  # noqa: E402
from survivor import Survivor  # noqa: E402

# Checks find most bugs in the first run; the others are for bugs that only an unlucky order shows.
RUNS = (
    {"schedule": "early", "sms": 1},
    {"schedule": "late", "sms": 2},
    {"schedule": "adversarial", "seed": 1, "sms": 1},
    {"schedule": "adversarial", "seed": 2, "sms": 3},
)
# (num_heads, num_heads_kv, seqlen_q, seqlen_k, softmax_scale). The first ones wrap the rings of K and V within an item;
# items of one, two and four tiles wrap them, and that of Q, between items; tiles of keys end with 2 keys (514, 882), so
# that the first accumulator decides; a negative scale takes the path that rewrites Q; 200 keys make a two-tile item at
# 112 keys a tile; (450, 100) and 0 keys make tiles of queries that see none, causal and full, so that one store of rows
# follows another.
SHAPES = (
    (2, 1, 450, 900, None),
    (2, 1, 385, 514, None),
    (3, 1, 100, 882, None),
    (7, 1, 100, 100, None),
    (5, 1, 100, 250, None),
    (5, 1, 100, 500, None),
    (2, 1, 200, 300, -0.1),
    (2, 2, 5, 1, None),
    (5, 1, 100, 200, None),
    (2, 1, 450, 100, None),
    (3, 1, 300, 0, None),
)
# Rows with windows also see tiles that are masked on the left; packed sequences, one head a tile, then several.
WINDOW = (150, 60)
PACKED = (((100, 300), (0, 5), (230, 150), (3, 0)), ((3, 90), (1, 40), (0, 2), (5, 130)))
# A bug may turn a loop endless.
INSTRUCTION_LIMIT = 20_000_000


SURVIVORS = (
    Survivor(
        "drop_wgmma_fence",
        "issue_output();",
        "in a step, the fence of the scores comes just before: no instruction touches P or O between the two",
    ),
    Survivor(
        "drop_barrier",
        "if (kTakesTurns && warpgroup == 0) named_barrier_sync(my_turn",
        "takes a turn that is left over when the CTA ends: nothing comes after it",
    ),
    Survivor(
        "drop_warp_sync",
        "__syncwarp();",
        "after the last slab: the __syncwarp behind the proxy fences, or that of the next item's note, orders the same reads",
        after="lane % 8 * 8, words",
    ),
    Survivor(
        "drop_warp_sync",
        "__syncwarp();",
        "the producer's idle lanes may run ahead to the next item, whose look-up makes them converge",
        after="copy_item(queries, tiles)",
    ),
    Survivor(
        "drop_warp_sync",
        "__syncwarp();",
        "the emulator runs the lanes' proxy fences together; formally they need it before lane 0 releases Q",
        "d192_ d256_ mla",
        after="fence_async_proxy",
    ),
    Survivor(
        "drop_barrier",
        "named_barrier_sync(query_read_by",
        "the checks let a warp's wait for its wgmma order it after the reads of Q by all four warps of the warpgroup",
        "d192_ d256_",
    ),
    Survivor(
        "drop_wgmma_fence",
        "mine.issue_output(v_state.stage);",
        "in a step, the fence of the scores comes just before: no instruction touches O between the two",
        "mla",
        after="issue_scores();",
    ),
    Survivor(
        "drop_barrier",
        "mine.meet(LatentBarrier::kWeightsUsed);  // takes the last signal",
        "it is left over when the CTA ends: nothing comes after it",
        "mla",
    ),
    Survivor(
        "skip_wait",
        "shared.k_rings[kSecondHalf].wait_full(state);",
        "the first consumer has waited for the same bytes before it made the weights; formally the second must see them too",
        "mla",
    ),
    Survivor(
        "skip_wait",
        "load_group<kPosition>(queries, n_block);",
        "the consumers are done with the position's columns before the first half's, which were waited for",
        "mla",
    ),
    Survivor("drop_warp_sync", "__syncwarp();  // the tile may lie", "the one behind the proxy fence orders the same reads", "mla"),
    Survivor(
        "skip_wait flip_parity wrong_barrier",
        "loader.before_waiting_for(&shared.q_ring",
        "a tile has as many loads as the lag: that of the first tile has signalled all of the item before",
        "fwd_mla_gather",
        after="loader.load_k(queries, tiles.n_block(0));",
    ),
    Survivor(
        "skip_wait",
        "shared.q_ring.begin_fill",
        "with two stages of Q, the wait of load_k(0) just before implies that the item two back has used its Q",
        "d96_causal d128_causal d96_local d128_local",
    ),
    Survivor(
        "wrong_barrier",
        "load_k(i);",
        "two stages of K: stage 0 waits for the younger tile, which implies the older, and covers the fill of stage 1 after "
        "it; where an item starts with stage 1, the wait for the only stage of Q implies all K of the item before",
        "d96_full d128_full d192 d256",
    ),
    Survivor(
        "skip_wait flip_parity wrong_barrier drop_arrive expect_more expect_less drop_copy",
        "    if (first) load_v();",
        "V of a tile of keys that no query sees: under a causal mask packed sequences without queries alone have one",
        "causal",
        after="dout_state.advance();",
    ),
    Survivor("mask_edge", "return clamp(row + 1 + s.diagonal, 0, s.k.num_rows);", "the larger of two equal numbers", "bwd"),
    Survivor(
        "weaken_atomic drop_fence",
        "wait_for_turn(",
        "reductions are issued in program order here; formally the acquire and the proxy fence put them after the turn",
        "bwd",
    ),
    Survivor("weaken_atomic drop_fence", "pass_turn(", "the same, on the side that passes the turn on", "bwd"),
    Survivor("drop_wgmma_fence", "issue_dp();", "no instruction touches registers between the products of S and of dP", "bwd"),
    Survivor("drop_wgmma_fence", "issue_dq(warpgroup);", "the fence of dV comes before, and dQ begins a sum of its own", "bwd"),
    Survivor(
        "drop_wgmma_fence",
        "wgmma_fence();",
        "the fence of dQ comes just before: no instruction touches dK or dS between the two",
        "bwd",
        after="const auto issue_dk = [&] {",
    ),
    Survivor("drop_commit", "issue_dv();", "dV then belongs to the group of dQ, which is waited for at the same place", "bwd"),
    Survivor("drop_warp_sync", "hand_over_dq();", "the emulator runs the lanes' proxy fences together", "bwd"),
    Survivor(
        "drop_barrier",
        "BwdBarrier::kValuesUsed0) + warpgroup",
        "the checks let a warp's wait for its wgmma order it after the reads of V by all four warps of the warpgroup",
        "bwd",
    ),
    Survivor(
        "drop_warp_sync",
        "__syncwarp();",
        "the emulator runs the lanes' proxy fences together; formally they need it before lane 0 releases V",
        "bwd",
        after="the staged rows before the next tile of V",
    ),
    Survivor(
        "drop_fence",
        "fence_mbarrier_init();",
        "the emulator lets the barrier of the cluster, just behind, order the same; formally TMA's proxy needs the fence",
        "_pair",
    ),
    Survivor("drop_wgmma_fence", "issue_dq_of_pair(0);", "dQ begins a sum of its own, with operands in shared memory", "_pair"),
    Survivor(
        "drop_wgmma_wait raise_wgmma_wait",
        "wgmma_wait<1>();",
        "where CTAs take every other tile, a trip ends with a wait for all: only the product of S is in flight",
        "d128_full_pair d128_causal_pair",
        after="wgmma_commit();\n      };",
    ),
    Survivor(
        "drop_wgmma_wait raise_wgmma_wait",
        "wgmma_wait<0>();",
        "behind the last trip, which waited for all: nothing is in flight",
        "d128_full_pair d128_causal_pair",
        after="    });\n",
    ),
    Survivor(
        "drop_warp_sync",
        "__syncwarp();",
        "the emulator runs the lanes' proxy fences together; formally they come before lane 0's signal or copy",
        "_pair",
        after="fence_async_proxy();",
    ),
    Survivor(
        "skip_wait",
        "begin_fill<Config>(shared.dout_ring",
        "Q and dO have as many stages and are released together: the wait for Q's stage implies that for dO's",
        "bwd",
    ),
    Survivor(
        "skip_wait flip_parity wrong_barrier",
        "    before_waiting_for(&shared.",
        "with three stages and a lag of three loads, what the consumer needs for a stage of K or V has been signalled",
        "fwd_cache_gather",
    ),
    Survivor(
        "drop_warp_sync",
        "__syncwarp();",
        "the emulator's lanes converge behind a branch; on a GPU they might copy pages before the stage is free",
        "fwd_cache_sm90 fwd_mla_sm90",
        after="ring.begin_fill(state, bytes);",
    ),
    Survivor(
        "drop_warp_sync",
        "__syncwarp();",
        "lanes that run ahead converge behind the next begin_fill",
        "fwd_cache_sm90 fwd_mla_sm90",
        after="        }\n      }",
    ),
    Survivor(
        "drop_warp_sync",
        "__syncwarp();",
        "the same, and gathering lanes converge in the look-up of the next tile's places",
        "fwd_cache fwd_mla",
        after="CacheHint::kEvictFirst);\n    }",
    ),
    Survivor(
        "drop_warp_sync",
        "__syncwarp();",
        "the same, of an item without keys",
        "fwd_cache fwd_mla",
        after="shared.q_ring.begin_fill(q_state, 0);",
    ),
    Survivor(
        "mask_edge",
        "if ((hidden[half] & Word{1} << p) != 0)",
        "64 rows of queries hide, in the second of two tiles of 128 keys, only keys behind the 64th: never a first accumulator",
        "fwd_cache",
    ),
    Survivor(
        "drop_copy_wait raise_copy_wait weaken_copy_wait",
        "bulk_wait();",
        "at a CTA's end: each source has been read before, and the sums are complete when the grid is",
        "bwd",
        after="});",
    ),
)


@dataclass
class Result:
    id: str
    kind: str
    ptx_line: int
    source: str
    caught: str  # kind of the error, "wrong result", or "" for a survivor
    run: int
    message: str = ""
    because: str = ""


def options_of(mask: str, scored: bool, heads: int, bias_shape: tuple[int, ...]) -> dict[str, Any]:
    """The options for which the planner takes the row of this mask and score."""
    import torch

    options: dict[str, Any] = {"causal": mask == "causal"}
    if mask == "local":
        options["window_size"] = WINDOW
    if scored:
        generator = torch.Generator().manual_seed(2)
        options |= {
            "softcap": 5.0, "alibi_slopes": torch.linspace(0.1, 0.5, heads), "k_bias": torch.randn(bias_shape, generator=generator),
        }  # fmt: skip
    return options


# The same for the backward, deterministic: rings of Q and dO that wrap within an item and between items, for one and two
# query heads a KV head; several tiles of keys that add to one tile of queries; the last tile of keys and of queries partly
# empty; tiles of keys that no query sees.
BACKWARD_SHAPES = (
    (2, 1, 330, 258, None),
    (2, 2, 130, 400, None),
    (1, 1, 300, 70, -0.1),
    (3, 3, 70, 130, None),
    (1, 1, 0, 70, None),
    (2, 1, 330, 100, None),
    (1, 1, 100, 100, None),
)
# The last two also in any order, which for one tile of keys is a fixed one: with two stages of Q, the last tile of queries lies
# in either.


def backward_call(kernel: str) -> Callable[[], list[Any]]:
    """A forward and a backward that launch this backward kernel; returns the gradients."""
    import torch

    import flash_ext

    dtype, dims, mask, _ = _parts(kernel)
    os.environ["FLASH_EXT_BWD_PAIRS"] = "always" if kernel.endswith("_pair") else "never"
    generator = torch.Generator().manual_seed(1)
    calls = []
    for heads, heads_kv, seqlen_q, seqlen_k, scale in BACKWARD_SHAPES:
        shapes = (
            (seqlen_q, heads, dims[0]),
            (seqlen_k, heads_kv, dims[0]),
            (seqlen_k, heads_kv, dims[-1]),
            (seqlen_q, heads, dims[-1]),
        )
        q, k, v, dout = (torch.randn(1, *shape, generator=generator).to(dtype) for shape in shapes)
        options = {"causal": mask == "causal", "softmax_scale": scale}
        with torch.no_grad():  # the reference's results serve an edited backward kernel as well
            out, lse = flash_ext.attention(q, k, v, **options, return_lse=True, backend="reference")
        calls.append((dout, q, k, v, out, lse, options))
    runs = [*((True, c) for c in calls), *((False, c) for c in calls[-2:])]
    if "_sm80_" in kernel:
        runs.append((True, planted_sm80.cancelling_sums(dtype, dims, mask)))

    def call() -> list[torch.Tensor]:
        gradients = []
        for deterministic, (dout, q, k, v, out, lse, options) in runs:
            scale = q.shape[-1] ** -0.5 if options["softmax_scale"] is None else options["softmax_scale"]
            none = [None] * 9
            results = torch.ops.flash_ext.bwd(
                dout, None, q, k, v, out, lse, *none, scale, options["causal"], -1, -1, 0.0, [], deterministic, 7, None
            )
            gradients += [gradient.view(torch.int16) for gradient in results[:3]]
        return gradients

    return call


# (num_heads, num_heads_kv, seqlen_q, seqlen_k, softmax_scale) under block masks of each head: rings that wrap, blocks
# that are empty, partial, full and ragged.
LISTED_SHAPES = ((2, 1, 330, 1400, None), (3, 3, 130, 260, None), (1, 1, 300, 70, -0.1))


def block_mask_call(kernel: str) -> Callable[[], list[Any]]:
    """A call with lists that launches this forward or backward kernel; returns its results or gradients."""
    import torch

    import flash_ext

    dtype, dims, _, scored = _parts(kernel)
    generator = torch.Generator().manual_seed(1)
    calls = []
    for heads, heads_kv, seqlen_q, seqlen_k, scale in LISTED_SHAPES:
        shapes = (
            (seqlen_q, heads, dims[0]),
            (seqlen_k, heads_kv, dims[0]),
            (seqlen_k, heads_kv, dims[-1]),
            (seqlen_q, heads, dims[-1]),
        )
        q, k, v, dout = (torch.randn(1, *shape, generator=generator).to(dtype) for shape in shapes)
        keep = torch.rand(1, heads, seqlen_q, seqlen_k, generator=generator) < 0.4
        keep[..., :256, 128:512] = True  # full blocks in a row, between partial ones
        keep[:, -1, 128:256, :128] = False  # an empty one
        keep[..., 3, :] = False
        mask = flash_ext.create_block_mask(keep, *keep.shape)
        options = options_of("full", scored, heads, (1, heads_kv, seqlen_k)) | {"block_mask": mask, "softmax_scale": scale}
        with torch.no_grad():
            out, lse = flash_ext.attention(q, k, v, **options, return_lse=True, backend="reference")
        calls.append((dout, q, k, v, out, lse, mask, options))

    def forward() -> list[torch.Tensor]:
        results = [flash_ext.attention(q, k, v, **options, return_lse=True) for _, q, k, v, *_, options in calls]
        return [part for out, lse in results for part in (out.view(torch.int16), lse.view(torch.int32))]

    def backward() -> list[torch.Tensor]:
        gradients = []
        for deterministic, (dout, q, k, v, out, lse, mask, options) in [*((True, c) for c in calls), (False, calls[-1])]:
            scores = [options.get(name) for name in ("sinks", "alibi_slopes", "k_bias")]
            numbers = (options["softmax_scale"] or q.shape[-1] ** -0.5, options.get("softcap", 0.0), deterministic, 7, None)
            results = torch.ops.flash_ext.bwd_block_mask(dout, None, q, k, v, out, lse, *mask.tensors(), *scores, *numbers)
            gradients += [gradient.view(torch.int16) for gradient in results[:3]]
        return gradients

    return backward if kernel.startswith("bwd") else forward


def gpu_of(kernel: str) -> str:
    """The GPU, as FLASH_EXT_EMULATE names it, whose plans reach a kernel."""
    return "sm86" if kernel.endswith("_smem99") else re.search(r"_(sm\d+)_", kernel)[1]


def _parts(kernel: str) -> tuple[Any, list[int], str, bool]:
    """dtype, (head_dim,) or (head_dim, head_dim_v), mask, and whether scores are modified, by a kernel's name."""
    import torch

    _, _, dtype, head_dim, mask, *scored = re.sub(r"_smem\d+$", "", kernel).split("_")
    dims = [int(n) for n in head_dim[1:].split("x")]
    return {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype], dims, mask, bool(scored)


def attention_call(kernel: str) -> Callable[[], list[Any]]:
    """A call of flash_ext.attention that launches this forward kernel; returns its results."""
    import torch

    import flash_ext

    dtype, dims, mask, scored = _parts(kernel)
    generator = torch.Generator().manual_seed(1)

    def tensor(seqlen: int, heads: int, dim: int) -> torch.Tensor:
        return torch.randn(1, seqlen, heads, dim, generator=generator).to(dtype)

    calls = []
    for heads, heads_kv, seqlen_q, seqlen_k, scale in SHAPES:
        q, k = tensor(seqlen_q, heads, dims[0]), tensor(seqlen_k, heads_kv, dims[0])
        tensors = q, k, tensor(seqlen_k, heads_kv, dims[-1])
        calls.append((tensors, {"softmax_scale": scale, **options_of(mask, scored, heads, (1, heads_kv, seqlen_k))}))
    if mask == "local":  # windows of 0, which are bounded
        q, k, v = (tensor(200, heads, dim) for heads, dim in ((2, dims[0]), (1, dims[0]), (1, dims[-1])))
        calls.append(((q, k, v), {**options_of(mask, bool(scored), 2, (1, 1, 200)), "window_size": (0, 0)}))
    for lengths in PACKED:
        boundaries = [torch.tensor([0, *side]).cumsum(0).int() for side in zip(*lengths, strict=True)]
        total_q, total_k = (int(ends[-1]) for ends in boundaries)
        shapes = (total_q, 2, dims[0]), (total_k, 1, dims[0]), (total_k, 1, dims[-1])
        q, k, v = (tensor(*shape)[0] for shape in shapes)
        options = options_of(mask, scored, 2, (1, total_k))
        calls.append(((q, k, v), {"cu_seqlens_q": boundaries[0], "cu_seqlens_k": boundaries[1], "sinks": torch.ones(2), **options}))

    def call() -> list[torch.Tensor]:
        results = []
        for tensors, options in calls:
            attend = flash_ext.attention_varlen if "cu_seqlens_q" in options else flash_ext.attention
            results.append(attend(*tensors, **options, return_lse=True))
        return [part for out, lse in results for part in (out.view(torch.int16), lse.view(torch.int32))]

    return call


class Bench:
    """One kernel with its call, ready to run edited PTX."""

    def __init__(self, emulator: Any, kernel: str, call: Callable[[], list[Any]]) -> None:
        self.emulator, self.kernel, self.call = emulator, kernel, call
        self.ptx = emulator.kernel_ptx(kernel)
        self.runs = (*RUNS, *(planted_sm80.BACKWARD_RUNS if kernel.startswith("bwd_sm80") else ()))
        self.good = [self.run(run) for run in self.runs]
        if any(caught for caught, _, _ in self.good):
            raise RuntimeError(f"{kernel} fails without any planted bug: {self.good}")
        launched = {record.kernel for record in emulator.launches()}
        if kernel not in launched:
            raise RuntimeError(f"the call does not launch {kernel}, but {sorted(launched)}")

    def run(self, run: dict[str, Any]) -> tuple[str, str, list[Any]]:
        """What was caught, its message, and the results."""
        options = self.emulator.Options()
        options.checks = True
        options.max_instructions = INSTRUCTION_LIMIT
        for name, value in run.items():
            setattr(options, name, value)
        self.emulator.set_options(options)
        try:
            return "", "", self.call()
        except RuntimeError as error:
            fault = self.emulator.take_diagnostic()
            return (fault.kind, fault.message, []) if fault else (type(error).__name__, str(error), [])

    def try_site(self, site: mutate.Site) -> Result:
        result = Result(site.id, site.kind, site.ptx_line, " < ".join(site.source), "", -1)
        self.emulator.replace_ptx(self.kernel, mutate.apply(self.ptx, site))
        try:
            for i, run in enumerate(self.runs):
                result.caught, result.message, values = self.run(run)
                if not result.caught and any((a != b).any() for a, b in zip(values, self.good[i][2], strict=True)):
                    result.caught = "wrong result"
                if result.caught:
                    result.run = i
                    break
        finally:
            self.emulator.replace_ptx(self.kernel, None)
        return result


def source_lines(source: tuple[str, ...]) -> list[tuple[str, str]]:
    """The lines of a chain that lie in csrc/: the two lines before, and the line."""
    texts = []
    for place in source:
        name, line = place.rsplit(":", 1)
        for path in (ROOT / "csrc").rglob(name):
            lines = ["", "", *path.read_text().splitlines()]
            here = int(line) + 1
            if here < len(lines):
                texts.append(("\n".join(lines[here - 2 : here]), lines[here]))
    return texts


def runs_in(kernels: str, kernel: str) -> bool:
    return not kernels or any(part in kernel for part in kernels.split())


def survivors_of(kernel: str) -> tuple[Survivor, ...]:
    """All of the GPU's kernels."""
    gpu = re.search(r"_(sm\d+)_", kernel)[1]
    return {"sm80": planted_sm80.SURVIVORS, "sm89": (), "sm90": (*SURVIVORS, *planted_fp8.SURVIVORS)}[gpu]


def explain(site: mutate.Site, survivors: tuple[Survivor, ...] | None = None) -> Survivor | None:
    lines = source_lines(site.source)
    for entry in survivors_of(site.kernel) if survivors is None else survivors:
        if site.kind not in entry.kinds.split() or not runs_in(entry.kernels, site.kernel):
            continue
        if any(entry.at in line and entry.after in before for before, line in lines):
            return entry
    return None


def _call_of(kernel: str) -> Callable[[], list[Any]]:
    if kernel.startswith(("fwd_fp8_sm90", "fwd_fp8_sm89")):
        return planted_fp8.fp8_call(kernel)
    if kernel.startswith(("fwd_cache", "fwd_mla")):
        return planted_cache.cache_call(kernel)
    if "_blocks" in kernel:
        return block_mask_call(kernel)
    return (backward_call if kernel.startswith("bwd") else attention_call)(kernel)


def run_kernel(kernel: str, kinds: list[str] | None = None, log: Callable[[str], None] = print) -> list[Result]:
    from flash_ext import _emulator

    bench = Bench(_emulator, kernel, _call_of(kernel))
    results: list[Result] = []
    begin = time.monotonic()
    for site in mutate.sites(bench.ptx, kernel, kinds):
        result = bench.try_site(site)
        if not result.caught and (entry := explain(site)):
            result.because = entry.because
        results.append(result)
        verdict = result.caught or ("explained: " + result.because if result.because else "NOT CAUGHT")
        log(f"{result.id}  {result.source.split(' < ')[0]} PTX {result.ptx_line}: {verdict} (run {result.run})")
    log(summary(results) + f", {time.monotonic() - begin:.0f} s")
    return results


def summary(results: list[Result]) -> str:
    caught = sum(bool(r.caught) for r in results)
    explained = sum(bool(r.because) for r in results)
    how = Counter(r.caught for r in results if r.caught)
    return (
        f"planted bugs: {caught} of {len(results)} caught, {explained} explained survivors, "
        f"{len(results) - caught - explained} unexplained; by {dict(how.most_common())}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernel")
    parser.add_argument("--kind", action="append", choices=sorted(mutate.KINDS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ["FLASH_EXT_EMULATE"] = gpu_of(options.kernel)  # flash_ext is not imported yet
    results = run_kernel(options.kernel, options.kind, lambda line: print(line, flush=True))
    if options.json:
        options.json.write_text(json.dumps([asdict(r) for r in results], indent=1))
    return int(any(not r.caught and not r.because for r in results))


if __name__ == "__main__":
    sys.exit(main())
