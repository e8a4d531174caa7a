"""The stand-in runtime: fat binaries, registration, launches, attributes, memory, errors."""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
import subprocess
import sys
import textwrap

import harness
import numpy as np
import pytest
from harness import In, Out, aligned, pointer

import build

HOST = build.ROOT / "kernels" / "host" / "runtime.cu"
INVALID_VALUE, INVALID_CONFIGURATION, NO_KERNEL_IMAGE, LAUNCH_FAILURE = 1, 9, 209, 719


@pytest.fixture(scope="module")
def host() -> ctypes.CDLL:
    return harness.extension(HOST)


def ask(host: ctypes.CDLL, name: str, *args: object) -> list[int]:
    """Calls a function that fills an array of ints."""
    out = (ctypes.c_int * 64)()
    code = getattr(host, name)(out, *args)
    assert code == 0, f"{name}: error {code}: {harness.emulator().last_message()}"
    return list(out)


class TestDevices:
    @pytest.mark.parametrize(
        "sm,optin,per_sm,threads,blocks,clusters",
        [(80, 163, 164, 2048, 32, 0), (86, 99, 100, 1536, 16, 0), (89, 99, 100, 1536, 24, 0),
         (90, 227, 228, 2048, 32, 1), (100, 227, 228, 2048, 32, 1), (120, 99, 100, 1536, 24, 1)],
    )  # fmt: skip
    def test_properties(self, host, sm, optin, per_sm, threads, blocks, clusters):
        with harness.call(sm=sm, sms=7):
            got = ask(host, "device")
        assert got[:8] == [sm // 10, sm % 10, 7, optin * 1024, per_sm * 1024, threads, blocks, clusters]
        assert got[8:12] == [1, 0, 32, 65536]

    def test_there_is_one_device(self, host):
        assert host.other_device() == 101
        assert "there is one" in harness.emulator().last_message()


class TestLaunches:
    def test_results_through_cuda_malloc(self, host):
        with harness.call():
            assert ask(host, "round_trip", 1000)[:3] == [0, 2, 4]

    def test_both_ways_to_launch(self, host):
        with harness.call():
            assert ask(host, "launch_ways")[:4] == [64, 64, 64, 64]

    def test_variables(self, host):
        with harness.call():
            assert ask(host, "variables")[:4] == [5, 6, 16, 70]

    def test_clusters_and_occupancy(self, host):
        with harness.call(sms=8):
            # CTAs per SM at 256 threads: by threads, by shared memory, by launch bounds; clusters of 2
            assert ask(host, "occupancy")[:4] == [8, 2, 2, 8]

    def test_function_attributes(self, host):
        with harness.call():
            got = ask(host, "function_attributes")
        assert got[:5] == [256, 1024, 48 * 1024 - 1024, 200 * 1024, 128]

    def test_events_and_streams(self, host):
        with harness.call():
            assert ask(host, "streams")[:2] == [1, 1]

    def test_graphics_of_launches_are_recorded(self, host):
        harness.emulator().reset_reports()
        with harness.call():
            ask(host, "round_trip", 64)
        (record,) = harness.emulator().launches()
        assert record.kernel == "twice" and record.grid == (1, 1, 1) and record.block == (64, 1, 1)
        (report,) = harness.emulator().reports()
        assert report.kernel == "twice" and report.warp_instructions == record.warp_instructions > 0

    def test_reports_add_up(self, host):
        harness.emulator().reset_reports()
        with harness.call():
            ask(host, "round_trip", 64)
            (once,) = harness.emulator().reports()
            ask(host, "round_trip", 64)
            (twice,) = harness.emulator().reports()
        assert twice.warp_instructions == 2 * once.warp_instructions
        assert [i.executions for i in twice.instructions] == [2 * i.executions for i in once.instructions]


class TestRefusals:
    @pytest.mark.parametrize(
        "grid,block,shared,cluster,code,words",
        [
            (0, 32, 0, 1, INVALID_CONFIGURATION, "grid"),
            (1, 2000, 0, 1, INVALID_CONFIGURATION, "1024 threads"),
            (1, 512, 0, 1, 701, "launch bounds allow 256"),
            (1, 32, 50_000, 1, INVALID_VALUE, "without cudaFuncAttributeMaxDynamicSharedMemorySize"),
            (2, 32, 0, 16, 912, "without cudaFuncAttributeNonPortable"),
            (3, 32, 0, 2, INVALID_VALUE, "not a multiple"),
        ],
    )
    def test_launches_beyond_the_limits(self, host, grid, block, shared, cluster, code, words):
        with harness.call():
            assert host.launch_config(grid, block, shared, cluster) == code
        assert words in harness.emulator().last_message()

    def test_attribute_beyond_the_device(self, host):
        with harness.call(sm=90):
            assert host.set_shared_limit(227 * 1024) == 0
            assert host.set_shared_limit(227 * 1024 + 1) == INVALID_VALUE
        assert "allows" in harness.emulator().last_message()

    def test_a_function_that_is_no_kernel(self, host):
        with harness.call():
            assert host.not_a_kernel() == 98

    def test_no_image_for_the_device(self):
        library = harness.extension(HOST, arch="sm_120")
        with harness.call(sm=90):
            assert library.launch_config(1, 32, 0, 1) == NO_KERNEL_IMAGE
        assert "no image for sm_90 among PTX sm_120" in harness.emulator().last_message()

    def test_memory_that_is_not_registered(self, host):
        values = aligned(64, np.int32, 0)
        with harness.call():
            code = host.on_pointer(pointer(values), 64)
        assert code == LAUNCH_FAILURE
        with pytest.raises(harness.emulator().EmulatorError) as caught:
            harness.check(code)
        assert caught.value.kind == "out-of-bounds" and caught.value.address == values.ctypes.data
        assert harness.emulator().take_diagnostic() is None  # taken once

    def test_roles_of_registered_memory(self, host):
        values = aligned(64, np.int32, 3)
        with harness.call(Out(values)), pytest.raises(harness.emulator().EmulatorError) as caught:
            harness.check(host.on_pointer(pointer(values), 64))  # reads what was never written
        assert caught.value.kind == "uninitialised-global"
        with harness.call(In(values, "x")), pytest.raises(harness.emulator().EmulatorError) as caught:
            harness.check(host.on_pointer(pointer(values), 64))
        assert caught.value.kind == "read-only-write" and "x" in caught.value.message
        with harness.call(harness.InOut(values)):
            harness.check(host.on_pointer(pointer(values), 64))
        assert (values == 6).all()

    def test_views_of_one_storage_are_united(self, host):
        values = aligned(64, np.int32, 1)
        with harness.call(harness.InOut(values[:40]), harness.InOut(values[20:])):
            harness.check(host.on_pointer(pointer(values), 64))
        assert (values == 2).all()

    def test_use_after_free(self, host):
        with harness.call():
            assert host.use_after_free() == LAUNCH_FAILURE
            assert host.free_twice() == INVALID_VALUE

    def test_error_strings_carry_the_diagnostic(self, host):
        host.error_text.restype = ctypes.c_char_p
        values = aligned(4, np.int32, 0)
        with harness.call():
            host.on_pointer(pointer(values), 4)
            text = host.error_text(LAUNCH_FAILURE).decode()
        harness.emulator().take_diagnostic()
        assert text.startswith("unspecified launch failure: out-of-bounds") and "twice" in text
        assert host.error_text(35).decode() == "unrecognized error code"


class TestReplacedPtx:
    def test_other_ptx_runs_until_it_is_undone(self, host):
        emulator = harness.emulator()
        text = emulator.kernel_ptx("twice")
        assert "shl.b32" in text
        with harness.call():
            emulator.replace_ptx("twice", text.replace("shl.b32", "shr.u32", 1))
            try:
                assert ask(host, "round_trip", 64)[:4] == [0, 0, 1, 1]
            finally:
                emulator.replace_ptx("twice", None)
            assert ask(host, "round_trip", 64)[:4] == [0, 2, 4, 6]

    def test_broken_ptx_is_an_error_of_the_launch(self, host):
        emulator = harness.emulator()
        with harness.call():
            emulator.replace_ptx("twice", emulator.kernel_ptx("twice")[:-40])
            try:
                assert host.round_trip((ctypes.c_int * 64)(), 64) == 218
            finally:
                emulator.replace_ptx("twice", None)
        with pytest.raises(emulator.LaunchError, match="no kernel named"):
            emulator.replace_ptx("nonsense", "")


@pytest.fixture(scope="module")
def fatbins(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("fatbin")
    source = folder / "k.cu"
    source.write_text('extern "C" __global__ void k(int* p) { for (int i = 0; i < 9; ++i) p[i] = i * p[9 - i]; }\n')
    targets = ["-gencode=arch=compute_90a,code=[sm_90a,compute_90a]", "-gencode=arch=compute_80,code=[sm_80,compute_80]"]
    modes = {"plain": ["--no-compress"], "lz4": ["--compress-mode=speed"], "zstd": ["--compress-mode=size"]}
    for name, flags in modes.items():
        build.run([build.cuda().nvcc, "-fatbin", *targets, *flags, "-o", folder / name, source])
    return {name: (folder / name).read_bytes() for name in modes}


class TestFatBinaries:
    """parse_fatbin on what nvcc writes, whole and damaged."""

    def test_images_and_their_architectures(self, fatbins):
        images = harness.emulator().parse_fatbin(fatbins["plain"])
        assert sorted((kind, arch) for kind, arch, _ in images) == [
            ("ptx", "sm_80"),
            ("ptx", "sm_90a"),
            ("sass", "sm_80"),
            ("sass", "sm_90a"),
        ]
        for kind, arch, text in images:
            assert (kind == "ptx") == (text is not None)
            if text:
                assert f".target {arch}" in text
                harness.emulator().Module(text, "k").kernel("k")

    def test_lz4_is_undone(self, fatbins):
        plain, packed = (harness.emulator().parse_fatbin(fatbins[mode]) for mode in ("plain", "lz4"))
        assert len(fatbins["lz4"]) < len(fatbins["plain"])
        texts = [sorted(t.strip() for _, _, t in images if t) for images in (plain, packed)]
        assert texts[0] == texts[1]

    def test_zstd_is_refused_with_the_remedy(self, fatbins):
        with pytest.raises(harness.emulator().LoadError, match="--no-compress"):
            harness.emulator().parse_fatbin(fatbins["zstd"])

    def test_cut_short_or_changed(self, fatbins, rng):
        parse, error = harness.emulator().parse_fatbin, harness.emulator().LoadError
        for data in (fatbins["plain"], fatbins["lz4"]):
            for cut in rng.integers(0, len(data) - 1, 200):
                with pytest.raises(error):
                    parse(data[:cut])
            for _ in range(300):
                changed = bytearray(data)
                changed[int(rng.integers(0, 400))] = int(rng.integers(0, 256))
                with contextlib.suppress(error, UnicodeDecodeError):
                    parse(bytes(changed))
        with pytest.raises(error, match="magic"):
            parse(struct.pack("<QQ", 1, 2))


def run_python(script: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(build.ROOT), **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_symbols_bind_to_the_emulator_though_the_real_runtime_is_loaded(host):
    """The symbol version decides, whatever the process loaded globally before."""
    library = build.compile_extension(HOST, harness.out_dir())
    output = run_python(f"""
        import ctypes
        real = ctypes.CDLL({str(build.cuda().cudart)!r}, mode=ctypes.RTLD_GLOBAL)
        out = (ctypes.c_int * 64)()
        assert ctypes.CDLL(None).cudaGetDeviceCount  # the real one answers for the process
        host = ctypes.CDLL({str(library)!r})
        print(host.device(out), list(out)[:3])
        print(host.round_trip(out, 64), list(out)[:4])
        """, FLASH_EXT_EMULATE="sm90", FLASH_EXT_EMULATE_SMS="5")  # fmt: skip
    assert output.splitlines() == ["0 [9, 0, 5]", "0 [0, 2, 4, 6]"]


def test_options_come_from_the_environment():
    script = "import harness; o = harness.emulator().get_options(); print(o.sm, o.sms, o.seed, o.schedule, o.checks)"
    output = run_python(script, FLASH_EXT_EMULATE="sm_80", FLASH_EXT_EMULATE_SMS="9", FLASH_EXT_EMULATE_SEED="12",
                        FLASH_EXT_EMULATE_SCHEDULE="adversarial", FLASH_EXT_EMULATE_CHECKS="0")  # fmt: skip
    assert output.split() == ["80", "9", "12", "adversarial", "False"]


@pytest.mark.parametrize("name,value", [("", "sm75"), ("_SMS", "many"), ("_SCHEDULE", "sometimes")])
def test_a_wrong_environment_is_said_at_once(name, value):
    done = subprocess.run(
        [sys.executable, "-c", "import harness; harness.emulator().get_options()"], capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(build.ROOT), f"FLASH_EXT_EMULATE{name}": value},
    )  # fmt: skip
    assert done.returncode != 0 and value in done.stderr
