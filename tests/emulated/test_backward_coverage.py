"""Every PTX block of the Hopper backward's rows is executed by a case of the suite, or its absence explained."""

from __future__ import annotations

import cases
import pytest
import test_backward
import test_backward_frozen
import test_backward_pairs
import torch
from cases import Case

import flash_ext
from flash_ext import _emulator, env

pytestmark = pytest.mark.skipif(env.EMULATE != "sm90", reason="the backward of Hopper")

# PTX blocks (by kernel and first line's label) that no case reaches, each with its reason.
UNREACHED: dict[tuple[str, str], str] = {}


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


def check_executed(dtype: torch.dtype, kind: str) -> None:
    """Every block of every row of this dtype and kind ('' is none of KINDS) has been executed since the last reset_reports."""
    short = "bf16" if dtype == torch.bfloat16 else "fp16"

    def is_meant(name: str) -> bool:
        return f"_{short}_" in name and (kind in name if kind else not any(other in name for other in KINDS))

    missed, seen = [], set()
    for report in _emulator.reports():
        if not report.kernel.startswith("bwd_sm90") or not is_meant(report.kernel):
            continue
        seen.add(report.kernel)
        ptx = _emulator.kernel_ptx(report.kernel).splitlines()
        for block in report.blocks:
            if not block.executions and (report.kernel, block.label) not in UNREACHED:
                text = [line.strip() for line in ptx[block.first_line - 1 : block.last_line] if ".loc" not in line]
                missed.append(
                    f"{report.kernel} {block.label}, PTX lines {block.first_line} to {block.last_line}: {' '.join(text[:6])}"
                )
    rows = {row["name"] for row in flash_ext._host.variants() if row["op"] == "bwd" and row["arch"] == 90}
    assert seen == {name for name in rows if is_meant(name)} and seen
    assert not missed, "\n".join(missed)


@DTYPES
def test_every_block_of_every_row_is_executed(dtype: torch.dtype, schedule) -> None:
    schedule("plain", sms=2)
    _emulator.reset_reports()
    for i, case in enumerate((*test_backward.ROWS, *test_backward.ODD, *test_backward.MORE)):
        run(case, dtype, deterministic=i % 2 == 0)
        run(case, dtype, deterministic=i % 2 == 1)
    for case in (*test_backward_frozen.CASES, *(c for c in test_backward.MORE if c.purpose in ("shown", "many") and not c.softcap)):
        for wanted in ("q", "kv"):
            run(case, dtype, deterministic=False, wanted=wanted)
            run(case, dtype, deterministic=True, wanted=wanted)
    check_executed(dtype, "")


@DTYPES
def test_every_block_of_rows_on_pairs_is_executed(dtype: torch.dtype, schedule, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_EXT_BWD_PAIRS", "always")
    schedule("plain", sms=2)
    _emulator.reset_reports()
    for case in test_backward_pairs.CASES:
        run(case, dtype, deterministic=False)
        run(case, dtype, deterministic=True)
    check_executed(dtype, "_pair")
