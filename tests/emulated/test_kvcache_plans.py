"""What explain_with_kvcache tells against what an emulated call launches, allocates and moves."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import kvcache_cases
import pytest
import torch
from kvcache_cases import CASES, Case

import flash_ext
from flash_ext import _emulator, env

sys.path.append(str(Path(__file__).resolve().parents[2]))
sys.path.append(str(Path(__file__).resolve().parents[1] / "emulator"))

import mutate

from benchmarks import caches, memory, registry, runner, timing
from benchmarks.ceilings import Ceilings

pytestmark = pytest.mark.skipif(
    flash_ext.explain_with_kvcache(**kvcache_cases.build(Case("any", (5,)), "cpu", torch.bfloat16)).backend == "reference",
    reason="this build has no kernel of the emulated GPU that reads a cache",
)


def attend(made: dict, **options) -> tuple[torch.Tensor, torch.Tensor]:
    return flash_ext.attention_with_kvcache(**made, return_lse=True, **options)


def without_checks(made: dict, num_splits: int) -> None:
    """The op as a GPU runs it: on the CPU attention_with_kvcache looks at the values first, which allocates."""
    rotary = (made.get("rotary_cos"), made.get("rotary_sin"), made.get("rotary_interleaved", True))
    torch.ops.flash_ext.kvcache(
        made["q"], made["k_cache"], made["v_cache"], made["k"], made["v"], made["cache_seqlens"], None, None,
        made["page_table"], *rotary, None, None, 0.125, True, -1, -1, 0.0, num_splits, False, None,
    )  # fmt: skip


@pytest.mark.parametrize(
    "name", [n for n in CASES if n.startswith(("decode", "paged", "chunk", "splits", "leftpad", "mqa", "full"))]
)
def test_the_kernels_are_those_that_are_launched(name: str, schedule) -> None:
    schedule("plain")
    made = kvcache_cases.build(CASES[name], "cpu", torch.bfloat16)
    told = flash_ext.explain_with_kvcache(**made)
    _emulator.reset_reports()
    attend(made)
    launched = _emulator.launches()
    assert tuple(each.kernel for each in launched) == told.kernels
    of_row = next(each for each in launched if each.kernel == told.variant)
    assert tuple(of_row.grid) == told.grid


GLOBAL_ACCESS = r"\b(?:ld|st|red|atom)\.[\w.:]*global|\bcp\.(?:reduce\.)?async|\bld\.(?:acquire|relaxed)"


@pytest.mark.skipif(env.EMULATE != "sm90", reason="dependent launches are for compute capability 9.0")
@pytest.mark.parametrize("page_size", (None, 3))
def test_dependent_kernels_wait_before_they_touch_memory(page_size: int | None) -> None:
    """The emulator runs kernels one by one, and would not see a kernel that begins too early: this reads the code."""
    case = Case("dependent", (900, 40), num_heads=8, head_dim=128, page_size=page_size)
    first, *dependent = flash_ext.explain_with_kvcache(**kvcache_cases.build(case, "cpu", torch.bfloat16)).kernels
    assert first.startswith("append_kv") and len(dependent) == 2

    def body(kernel: str) -> str:
        text = _emulator.kernel_ptx(kernel)
        (found,) = [text[begin:end] for name, begin, end in mutate._kernels(text) if name == kernel]
        return found

    assert "griddepcontrol.launch_dependents" in body(first)
    for kernel in dependent:
        text = body(kernel)
        access = re.search(GLOBAL_ACCESS, text)
        assert access and 0 <= text.find("griddepcontrol.wait") < access.start(), kernel


@pytest.mark.parametrize("layout", ("as they are", "odd strides"))
@pytest.mark.parametrize("rotary", ("none", "halves"))
@pytest.mark.parametrize("splits", (0, 1, 3))
def test_the_workspace_is_what_is_allocated(splits: int, rotary: str, layout: str, schedule) -> None:
    """At the peak; allocations are counted by torch's profiler."""
    schedule("plain")
    case = Case("memory", (900, 40, 0), num_heads=8, head_dim=128, seqlen_q=2, seqlen_new=2, page_size=16, rotary=rotary)
    made = kvcache_cases.build(case, "cpu", torch.bfloat16)
    if layout == "odd strides":
        for name in ("q", "k"):
            made[name] = torch.nn.functional.pad(made[name], (0, 1))[..., :-1]
    told = flash_ext.explain_with_kvcache(**made, num_splits=splits)
    results = made["q"].numel() * 2 + 3 * 8 * 2 * 4  # out and lse
    found = memory.peak_extra_bytes(lambda: without_checks(made, splits), "cpu")
    assert found == told.workspace_bytes + results and (len(told.copies) == 2) == (layout == "odd strides")


@pytest.mark.parametrize("page_size", (0, 1, 16))
def test_the_benchmark_checks_and_times_the_kernels(page_size: int, schedule, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule("plain")
    monkeypatch.setenv("FLASH_EXT_STRICT", "1")
    case = caches.CacheCase("grouped", 2, 1, 256, 8, 2, 64, 64, page_size=page_size)
    session = runner.Session(
        "cpu", timing.CpuStopwatch(), Ceilings(1.0, {}, 0), None, seconds=0.001, least=1, most=1, pause_s=0.0
    )  # fmt: skip
    found = runner.measure_case(case, {"flash_ext": registry.FlashExt()}, session)["implementations"]["flash_ext"]
    assert found["status"] == "timed" and found["gb_s"] > 0, found
