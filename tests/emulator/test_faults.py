"""Wrong kernels and wrong input: a clear exception with the place, never a crash, never silence."""

from __future__ import annotations

import re

import harness
import numpy as np
import pytest
from harness import In, Kernels, Out, Workspace, aligned

faults, memory, flow = Kernels("faults.cu"), Kernels("memory.cu"), Kernels("flow.cu")
LINES = {
    tag: number for number, text in enumerate(faults.path.read_text().splitlines(), 1) for tag in re.findall(r"// @(\w+)", text)
}


def ints(count: int, fill: object = None) -> np.ndarray:
    return aligned(count, np.int32, fill)


def fault(kernel: str, grid, block, *args, **options):
    """Launches and returns the exception, whose place is checked where the source has a tag."""
    with pytest.raises(harness.emulator().EmulatorError) as caught:
        faults.launch(kernel, grid, block, *args, **options)
    error = caught.value
    assert error.kernel == kernel and error.message in str(error)
    if kernel in LINES:
        # An asm statement of several lines may count as the one before its last.
        assert error.file.endswith("faults.cu") and LINES[kernel] - error.line in (0, 1), str(error)
    return error


@pytest.mark.parametrize("checks", [False, True])
class TestAddresses:
    def test_store_beyond_the_end(self, checks):
        out = ints(70)
        error = fault("store_beyond_end", 3, 32, Out(out), checks=checks)
        assert error.kind == "out-of-bounds" and error.address == out.ctypes.data + 70 * 4
        assert error.cta == (2, 0, 0) and error.warp == 0
        assert "out" in error.message

    def test_load_before_the_start(self, checks):
        source = ints(32, 0)
        error = fault("load_before_start", 1, 32, Out(ints(32)), In(source), checks=checks)
        assert error.kind == "out-of-bounds" and error.address == source.ctypes.data - 4

    def test_null_pointer(self, checks):
        error = fault("null_pointer", 1, 32, Out(ints(32)), 0, checks=checks)
        assert error.kind == "out-of-bounds" and error.address == 16

    def test_write_to_an_input(self, checks):
        source = ints(32, 5)
        error = fault("write_to_input", 1, 32, Out(ints(32)), In(source, "q"), checks=checks)
        assert error.kind == "read-only-write" and "q" in error.message
        assert (source == 5).all()

    @pytest.mark.parametrize("by", [1, 2, 3])
    def test_misaligned_load(self, checks, by):
        source = ints(33, 0)
        error = fault("misaligned", 1, 32, Out(ints(32)), In(source), by, checks=checks)
        assert error.kind == "misaligned" and error.address == source.ctypes.data + by

    def test_misaligned_vector(self, checks):
        source = aligned(64, np.float32, 0)
        error = fault("misaligned_vector", 1, 32, Out(aligned((32, 4), np.float32)), In(source), 2, checks=checks)
        assert error.kind == "misaligned"

    @pytest.mark.parametrize("index", [1, 1 << 16, -2000])
    def test_shared_memory_overrun(self, checks, index):
        error = fault("shared_overrun", 1, 32, Out(ints(32)), index, shared=128, checks=checks)
        assert error.kind == "out-of-bounds"


@pytest.mark.parametrize("checks", [False, True])
class TestWaits:
    def test_barriers_that_nobody_completes(self, checks):
        error = fault("barrier_deadlock", 1, 64, Out(ints(64)), checks=checks)
        assert error.kind == "deadlock"
        assert "barrier 1" in error.message and "barrier 2" in error.message  # who waits where

    def test_mbarrier_that_lacks_an_arrival(self, checks):
        error = fault("mbarrier_deadlock", 1, 64, Out(ints(64)), checks=checks)
        assert error.kind == "deadlock" and "mbarrier" in error.message

    def test_transaction_bytes_that_never_come(self, checks):
        error = fault("missing_transaction", 1, 32, Out(ints(32)), In(ints(32, 0)), checks=checks)
        assert error.kind in ("deadlock", "expect-tx") and "16" in error.message

    def test_endless_loop(self, checks):
        error = fault("spin_forever", 1, 32, ints(1, 0), checks=checks, max_instructions=100_000)
        assert error.kind == "watchdog"


class TestRaces:
    def test_shared_memory(self):
        error = fault("shared_race", 1, 64, Out(ints(64)))
        assert error.kind == "shared-race" and error.line in (LINES["race_writes"], LINES["race_reads"])
        # The report names both parties, whichever came second.
        for tag in ("race_writes", "race_reads"):
            assert f"faults.cu:{LINES[tag]}" in str(error)

    def test_global_memory(self):
        assert fault("global_race", 2, 32, Out(ints(1))).kind == "global-race"

    def test_bulk_copy_not_waited_for(self):
        assert fault("no_wait_for_copy", 1, 32, Out(ints(32)), In(ints(32, 0))).kind == "shared-race"

    def test_bulk_store_source_overwritten(self):
        assert fault("source_overwritten", 1, 32, Out(ints(32))).kind == "shared-race"

    def test_missing_proxy_fence(self):
        assert fault("no_proxy_fence", 1, 32, Out(ints(32))).kind == "missing-proxy-fence"

    def test_uninitialised_shared_memory(self):
        assert fault("uninitialised_shared", 1, 64, Out(ints(64))).kind == "uninitialised-shared"

    def test_uninitialised_workspace(self):
        error = fault("uninitialised_workspace", 1, 32, Out(ints(32)), Workspace(ints(32)))
        assert error.kind == "uninitialised-global"

    def test_peer_that_left_its_cluster(self):
        assert fault("peer_exits", 2, 32, Out(ints(64)), cluster=2).kind == "cluster-exit"

    def test_more_registers_than_there_are(self):
        assert fault("register_pool", 1, 384, Out(ints(384))).kind in ("register-pool", "deadlock")


class TestPtx:
    """PTX text that is cut short or changed: LoadError with the line, or a fault when it runs."""

    def test_cut_short_anywhere(self, rng):
        text = flow.ptx
        cuts = sorted([*rng.integers(0, len(text), 150).tolist(), 0, 1, len(text) - 2])
        errors = 0
        for cut in cuts:
            try:
                harness.emulator().Module(text[:cut], "cut")
            except harness.emulator().LoadError as error:
                errors += 1
                assert error.kind == "load" and str(error)
        assert errors > 0.9 * len(cuts)

    def test_bytes_changed_anywhere(self, rng):
        text = Kernels("barriers.cu").ptx
        for _ in range(150):
            at = int(rng.integers(0, len(text)))
            changed = text[:at] + chr(int(rng.integers(32, 127))) + text[at + 1 :]
            try:
                module = harness.emulator().Module(changed, "changed")
                if "rotate" in module.kernel_names():
                    harness.launch(module, "rotate", 1, 64, Out(ints(64)), 2, shared=256, max_instructions=200_000)
            except (harness.emulator().EmulatorError, TypeError):
                pass

    @pytest.mark.parametrize(
        "text", ["", "hello", "\0\0\0", ".version 8.0", ".version 8.0\n.target sm_90\n.entry k( {", "}" * 1000]
    )
    def test_text_that_is_not_ptx(self, text):
        with pytest.raises(harness.emulator().LoadError):
            harness.emulator().Module(text, "bad")

    def test_an_unknown_instruction_names_itself_and_its_line(self):
        text = ".version 8.0\n.target sm_90\n.address_size 64\n.entry k()\n{\n.reg .b32 %r<2>;\nfrobnicate.u32 %r1, 3;\nret;\n}\n"
        with pytest.raises(harness.emulator().EmulatorError, match="frobnicate") as caught:
            harness.launch(harness.emulator().Module(text, "bad"), "k", 1, 32)
        assert "7" in str(caught.value)


class TestLaunches:
    def refused(self, match: str, kernel: str, grid, block, *args, **more) -> None:
        with pytest.raises(harness.emulator().LaunchError, match=match):
            memory.launch(kernel, grid, block, *args, **more)

    def test_unknown_kernel(self):
        self.refused("no kernel 'nonsense'", "nonsense", 1, 32)

    @pytest.mark.parametrize("grid,block", [((0, 1, 1), 32), (1, 0), (1, 1025), (1, (32, 33)), (1, (1, 1, 65)), ((1, 65536), 32)])
    def test_sizes_outside_the_limits(self, grid, block):
        self.refused("outside", "indices", grid, block, Out(ints(4)))

    @pytest.mark.parametrize("sm,limit", [(80, 163), (86, 99), (89, 99), (90, 227), (120, 99)])
    def test_shared_memory_beyond_the_architecture(self, sm, limit):
        kernels = Kernels("memory.cu", arch="sm_80")
        source, out = aligned((32, 32), np.float32, 0), aligned((32, 32), np.float32)
        static = 32 * 33 * 4
        kernels.launch("transpose", 1, (32, 8), Out(out), In(source), shared=limit * 1024 - static, sm=sm)
        with pytest.raises(harness.emulator().LaunchError, match="shared memory"):
            kernels.launch("transpose", 1, (32, 8), Out(out), In(source), shared=limit * 1024 - static + 4, sm=sm)

    def test_clusters_need_hopper(self):
        self.refused("sm90", "indices", 2, 32, Out(ints(256)), cluster=2, sm=80)

    def test_cluster_must_divide_the_grid(self):
        self.refused("multiple", "indices", 3, 32, Out(ints(512)), cluster=2)

    def test_cluster_too_large(self):
        self.refused("limit is 16", "indices", 32, 32, Out(ints(4096)), cluster=32)

    def test_parameters_of_the_wrong_size(self):
        with pytest.raises(harness.emulator().LaunchError, match="bytes of parameters"):
            harness.emulator().launch(memory.module, "indices", (1, 1, 1), (32, 1, 1), b"1234", [])

    def test_an_architecture_that_is_not_modelled(self):
        with pytest.raises(ValueError, match="known: sm80"):
            harness.make_options(sm=75)
