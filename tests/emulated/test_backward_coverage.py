"""Every PTX block of the Hopper backward's rows is executed by a case of the suite, or its absence explained."""

from __future__ import annotations

import cases
import pytest
import test_backward
import test_backward_frozen
import torch
from cases import Case

import flash_ext
from flash_ext import _emulator, env

pytestmark = pytest.mark.skipif(env.EMULATE != "sm90", reason="the backward of Hopper")

# PTX blocks (by kernel and first line's label) that no case reaches, each with its reason.
UNREACHED: dict[tuple[str, str], str] = {}


# Rows of lists, segments and pairs of CTAs have tests of their own: test_block_attention, test_jagged, test_backward_pairs.
ELSEWHERE = ("_blocks", "_segments", "_pair")


def run(case: Case, dtype: torch.dtype, deterministic: bool, wanted: str = "qkv") -> None:
    tensors = cases.build(case, "cpu", dtype)
    leaves = {name: getattr(tensors, name).detach().requires_grad_(name in wanted) for name in "qkv"}
    learnt = {name: t.detach().requires_grad_(wanted == "qkv") for name, t in tensors.side.items() if name in ("sinks", "k_bias")}
    made = cases.Tensors(**leaves, dout=tensors.dout, dlse=tensors.dlse, side={**tensors.side, **learnt})
    out, lse, *_ = cases.call(case, made, backend="sm90", deterministic=deterministic)
    results = [(r, g) for r, g in ((out, tensors.dout), (lse, tensors.dlse)) if g is not None]
    inputs = [t for t in (*leaves.values(), *learnt.values()) if t.requires_grad]
    torch.autograd.grad([r for r, _ in results], inputs, [g for _, g in results], allow_unused=True)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=("bf16", "fp16"))
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
    missed, seen = [], set()
    for report in _emulator.reports():
        if not report.kernel.startswith("bwd_sm90") or any(kind in report.kernel for kind in ELSEWHERE):
            continue
        seen.add(report.kernel)
        ptx = _emulator.kernel_ptx(report.kernel).splitlines()
        for block in report.blocks:
            if not block.executions and (report.kernel, block.label) not in UNREACHED:
                text = [line.strip() for line in ptx[block.first_line - 1 : block.last_line] if ".loc" not in line]
                missed.append(
                    f"{report.kernel} {block.label}, PTX lines {block.first_line} to {block.last_line}: {' '.join(text[:6])}"
                )
    short = "bf16" if dtype == torch.bfloat16 else "fp16"
    rows = {row["name"] for row in flash_ext._host.variants() if row["op"] == "bwd" and row["arch"] == 90}
    assert seen >= {name for name in rows if f"_{short}_" in name and not any(kind in name for kind in ELSEWHERE)}
    assert not missed, "\n".join(missed)
