"""Every PTX block of the Hopper backward's rows is executed by a case of the suite, or its absence explained."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import block_mask_checks
import cases
import pytest
import test_backward
import test_backward_frozen
import test_backward_pairs
import test_block_attention
import test_jagged
import torch
from cases import Case

import flash_ext
from flash_ext import _emulator, env

pytestmark = pytest.mark.skipif(env.EMULATE != "sm90", reason="the backward of Hopper")

CSRC = Path(__file__).resolve().parents[2] / "csrc"
# Blocks that no case reaches: the rows' kinds, what a source line of the block contains, and the reason.
SHOWN = "groups of short sequences know neither seqused nor leftpad"
UNREACHED = (
    ("_blocks", "params.cu_seqlens[index], 0, params.num_rows) / block", "lists of blocks are not for packed sequences"),
    ("_blocks", "const int inside = min_of(kRows, range.num_rows - row);", "the same: only their tensors are ragged"),
    ("_segments", "params.seqused[index]", SHOWN),
    ("_segments", "params.leftpad[index]", SHOWN),
)

# Rows that only other calls take: lists of blocks, short sequences in groups, pairs of CTAs.
KINDS = ("_blocks", "_segments", "_pair")
DTYPES = pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=("bf16", "fp16"))


def run(case: Case, dtype: torch.dtype, deterministic: bool, wanted: str = "qkv") -> None:
    tensors = cases.build(case, "cpu", dtype)
    leaves = {name: getattr(tensors, name).detach().requires_grad_(name in wanted) for name in "qkv"}
    learnt = {name: t.detach().requires_grad_(wanted == "qkv") for name, t in tensors.side.items() if name in ("sinks", "k_bias")}
    made = cases.Tensors(**leaves, dout=tensors.dout, dlse=tensors.dlse, side={**tensors.side, **learnt})
    out, lse, *_ = cases.call(case, made, backend="sm90", deterministic=deterministic)
    results = [(r, g) for r, g in ((out, tensors.dout), (lse, tensors.dlse)) if g is not None]
    inputs = [t for t in (*leaves.values(), *learnt.values()) if t.requires_grad]
    torch.autograd.grad([r for r, _ in results], inputs, [g for _, g in results], allow_unused=True)


class Executed:
    """Which blocks of the backward's rows have been executed, over calls that reset the emulator's reports."""

    def __init__(self) -> None:
        self.blocks: dict[str, Any] = {}
        self.lines: dict[str, set[int]] = {}
        _emulator.reset_reports()

    def note(self) -> None:
        for report in _emulator.reports():
            if report.kernel.startswith("bwd_sm90"):
                self.blocks[report.kernel] = report.blocks
                lines = self.lines.setdefault(report.kernel, set())
                lines.update(block.first_line for block in report.blocks if block.executions)

    def check(self, dtype: torch.dtype, kind: str) -> None:
        """Every block of every row of this dtype and kind ('' is none of KINDS) has been executed, or is in UNREACHED."""
        short = "bf16" if dtype == torch.bfloat16 else "fp16"

        def is_meant(name: str) -> bool:
            return f"_{short}_" in name and (kind in name if kind else not any(other in name for other in KINDS))

        rows = {row["name"] for row in flash_ext._host.variants() if row["op"] == "bwd" and row["arch"] == 90}
        assert {name for name in self.blocks if is_meant(name)} == {name for name in rows if is_meant(name)}
        missed, needed = [], set()
        for kernel in filter(is_meant, self.blocks):
            ptx = _emulator.kernel_ptx(kernel).splitlines()
            for block in self.blocks[kernel]:
                if block.first_line in self.lines[kernel]:
                    continue
                lines = ptx[block.first_line - 1 : block.last_line]
                because = {entry for entry in UNREACHED if entry[0] == kind and any(entry[1] in t for t in source_of(ptx, lines))}
                needed |= because
                if not because:
                    text = " ".join([line.strip() for line in lines if ".loc" not in line][:6])
                    missed.append(f"{kernel}, PTX lines {block.first_line} to {block.last_line}: {text}")
        assert not missed, "\n".join(missed)
        assert needed == {entry for entry in UNREACHED if entry[0] == kind}, "a reason that no block needs"


def source_of(ptx: list[str], lines: list[str]) -> set[str]:
    """The source lines of csrc/ that these lines of the PTX come from."""
    files = {number: Path(path).name for number, path in re.findall(r'\.file\s+(\d+)\s+"([^"]+)"', "\n".join(ptx))}
    places = {(files.get(file), int(line)) for file, line in re.findall(r"\.loc\s+(\d+)\s+(\d+)", "\n".join(lines))}
    return {path.read_text().splitlines()[line - 1] for name, line in places if name for path in CSRC.rglob(name)}


@DTYPES
def test_every_block_of_every_row_is_executed(dtype: torch.dtype, schedule) -> None:
    schedule("plain", sms=2)
    executed = Executed()
    for i, case in enumerate((*test_backward.ROWS, *test_backward.ODD, *test_backward.MORE)):
        run(case, dtype, deterministic=i % 2 == 0)
        run(case, dtype, deterministic=i % 2 == 1)
    for case in (*test_backward_frozen.CASES, *(c for c in test_backward.MORE if c.purpose in ("shown", "many") and not c.softcap)):
        for wanted in ("q", "kv"):
            run(case, dtype, deterministic=False, wanted=wanted)
            run(case, dtype, deterministic=True, wanted=wanted)
    executed.note()
    executed.check(dtype, "")


@DTYPES
def test_every_block_of_rows_on_pairs_is_executed(dtype: torch.dtype, schedule, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_EXT_BWD_PAIRS", "always")
    schedule("plain", sms=2)
    executed = Executed()
    for case in test_backward_pairs.CASES:
        run(case, dtype, deterministic=False)
        run(case, dtype, deterministic=True)
    executed.note()
    executed.check(dtype, "_pair")


@DTYPES
def test_every_block_of_rows_with_lists_is_executed(dtype: torch.dtype, schedule) -> None:
    schedule("plain", sms=2)
    executed = Executed()
    keep = block_mask_checks.random_mask("half")
    unseen = keep.clone()
    unseen[..., 128:256] = False  # tiles of keys without queries
    for row in test_block_attention.BWD_ROWS:
        if ("_fp16_" in row) != (dtype == torch.float16):
            continue
        scores = test_block_attention.SCORES if "scored" in row else {}
        calls = [(keep, scores), (unseen, scores | {"deterministic": True})]
        if scores:
            calls += (
                (keep, scores | {"softcap": 600.0, "softmax_scale": 3.0}),  # wants a precise tanh
                (keep, scores | {"softcap": 0.0}),
            )
        for mask, options in calls:
            test_block_attention.check_gradients(row, mask, options)
            executed.note()
    executed.check(dtype, "_blocks")


@DTYPES
def test_every_block_of_rows_with_segments_is_executed(dtype: torch.dtype, schedule) -> None:
    schedule("plain", sms=2)
    executed = Executed()
    for row in test_jagged.ROWS:
        if not row.startswith("bwd") or ("_fp16_" in row) != (dtype == torch.float16):
            continue
        for n, name in enumerate(("mixed", "unlike", "unseen")):
            for causal in (False, True):
                test_jagged.check(row, name, causal=causal, deterministic=causal == (n % 2 == 0))
                executed.note()
    executed.check(dtype, "_segments")
