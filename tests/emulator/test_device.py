"""What a kernel prints, asserts and asks for; what a report of a launch says."""

from __future__ import annotations

import harness
import numpy as np
import pytest
from harness import In, Kernels, Out, aligned

device, memory, flow = Kernels("device.cu"), Kernels("memory.cu"), Kernels("flow.cu")


def test_printf(mode):
    values = aligned(32, np.float32, np.arange(32) + 0.125)
    report = device.launch("print", 1, 32, In(values), **mode)
    lines = [f"thread {i} of 32: {i + 0.125:5.2f} text z %|42    |00beef|123456789012345|1.500000e+10\n" for i in (0, 1)]
    assert report.printed == "".join(lines) + "no arguments\n"


def test_assert_names_file_line_and_text():
    values = aligned(32, np.int32, np.arange(32))
    with pytest.raises(harness.emulator().EmulatorError, match="value too large") as caught:
        device.launch("asserts", 1, 32, In(values))
    assert caught.value.kind == "assert" and "device.cu" in caught.value.message
    values[31] = 0
    device.launch("asserts", 1, 32, In(values))


def test_trap():
    with pytest.raises(harness.emulator().EmulatorError) as caught:
        device.launch("traps", 1, 32, Out(aligned(32, np.int32)))
    assert caught.value.kind == "trap" and caught.value.kernel == "traps"


def test_registers_move_between_warpgroups(mode):
    out = aligned(384, np.int32)
    device.launch("registers", 1, 384, Out(out), **mode)
    np.testing.assert_array_equal(out, np.arange(384) + np.repeat([1, 2, 2], 128))


def test_programmatic_launch_control(mode):
    out = aligned(32, np.int32)
    device.launch("dependent", 1, 32, Out(out), **mode)
    np.testing.assert_array_equal(out, np.arange(32))


def test_report_counts_instructions_by_source_line():
    out, source = aligned(512, np.uint64), aligned(512, np.uint64, 7)
    report = memory.launch("copy_u64", 1, 64, Out(out), In(source), 512, profile=True)
    assert report.kernel == "copy_u64" and report.seconds > 0
    assert report.warp_instructions == sum(i.executions for i in report.instructions)
    loads = [i for i in report.instructions if i.opcode.startswith("ld.global")]
    # 512 elements, 32 lanes: 16 requests of 256 bytes, which are 8 sectors each.
    assert sum(i.global_requests for i in loads) == 16
    assert sum(i.global_sectors for i in loads) == 128
    assert all(i.file.endswith("memory.cu") and i.line > 0 for i in loads)


def test_report_counts_bank_conflicts():
    source = aligned((32, 32), np.float32, 1)
    report = memory.launch("transpose", 1, (32, 8), Out(aligned((32, 32), np.float32)), In(source), shared=4096, profile=True)
    stores = [i for i in report.instructions if i.opcode.startswith("st.shared")]
    assert stores and all(i.shared_wavefronts == i.shared_requests for i in stores)  # the pitch of 33 does its work
    out, order = aligned(32, np.uint32), report.blocks
    conflicts = memory.launch("narrow_shared", 1, 32, Out(out), profile=True)
    narrow = [i for i in conflicts.instructions if i.opcode.startswith(("st.shared.u8", "st.shared.b8"))]
    assert narrow and all(i.shared_wavefronts >= i.shared_requests for i in narrow) and order


def test_report_tells_blocks_that_never_ran():
    def executed(values: object) -> set[int]:
        count = np.size(values)
        report = flow.launch("cases", 1, count, Out(aligned(count, np.int32)), In(aligned(count, np.int32, values)))
        assert all(b.first_line <= b.last_line for b in report.blocks)
        return {b.first_line for b in report.blocks if b.executions}

    one, all_of_them = executed([5] * 32), executed(np.arange(96) % 11)
    assert one < all_of_them and len(all_of_them) >= len(one) + 7


def test_the_same_seed_gives_the_same_run():
    def run(seed: int) -> list[int]:
        lock, counter = aligned(1, np.int32, 0), aligned(1, np.int32, 0)
        report = flow.launch("spin_lock", 3, 64, lock, counter, seed=seed, schedule="adversarial", checks=False)
        return [i.executions for i in report.instructions]

    assert run(1) == run(1)
    assert len({tuple(run(seed)) for seed in range(5)}) > 1
