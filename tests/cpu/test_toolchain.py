"""How the build finds what it needs, and what it generates: tools/toolchain.py and csrc/variants.py, without compiling."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

FLAGS_80 = ["-gencode", "arch=compute_80,code=[sm_80,compute_80]"]
FLAGS_89 = ["-gencode", "arch=compute_89,code=[sm_89,compute_89]"]
FLAGS_90 = ["-gencode", "arch=compute_90a,code=[sm_90a,compute_90a]"]


# --- architectures ---


@pytest.mark.parametrize("text", (None, "", "8.0+PTX;9.0a", "8.0;9.0", "9.0a 8.0", "8.0,9.0a", "8.0+PTX 9.0+PTX", "8.0;8.0;9.0a"))
def test_the_default_and_its_spellings(toolchain: ModuleType, text: str | None) -> None:
    found = toolchain.parse_architectures(text)
    assert (found.sm80, found.sm90, found.groups) == (("80",), True, ("sm80", "sm89", "sm90"))
    assert [found.flags(group) for group in found.groups] == [FLAGS_80, FLAGS_89, FLAGS_90]


@pytest.mark.parametrize(
    ("text", "sm80", "sm90"),
    [
        ("9.0a", (), True), ("Hopper", (), True), ("8.6", ("86",), False), ("8.6 8.9", ("86", "89"), False),
        ("Ampere", ("80", "86"), False),
        ("Ampere+PTX;Ada", ("80", "86", "89"), False), ("10.0;12.0", ("100", "120"), False),
        ("Blackwell;Hopper", ("100", "120"), True),
        ("12.0a", ("120",), False), ("10.0f", ("100",), False),
    ],
)  # fmt: skip
def test_other_architectures(toolchain: ModuleType, text: str, sm80: tuple, sm90: bool) -> None:
    found = toolchain.parse_architectures(text)
    assert (found.sm80, found.sm90) == (sm80, sm90)
    assert found.groups == ("sm80", "sm89") * bool(sm80) + ("sm90",) * sm90
    if sm80 and sm80 != ("80",):
        flags = " ".join(found.flags("sm80"))
        assert "code=compute_80" in flags, "the sm80 group always carries PTX that later GPUs can run"
        assert all(f"arch=compute_{arch},code=sm_{arch}" in flags for arch in sm80)


@pytest.mark.parametrize("text", (None, "8.0", "8.6", "8.6 8.9", "Ada", "12.0", "10.0;12.0;9.0a"))
def test_every_gpu_finds_an_image_of_the_groups_it_runs(toolchain: ModuleType, text: str | None) -> None:
    """With anything but 9.0 listed, 16-bit kernels run from 8.0 on and FP8 from 8.9 on, by machine code or PTX."""
    found = toolchain.parse_architectures(text)
    for group, lowest in (("sm80", 80), ("sm89", 89)):
        flags = " ".join(found.flags(group))
        ptx = {int(n) for n in re.findall(r"code=\[?(?:sm_\d+,)?compute_(\d+)\b", flags)}
        sass = {int(n) for n in re.findall(r"code=\[?sm_(\d+)\b", flags)}
        assert ptx == {lowest} and sass and min(sass) >= lowest
        assert {int(arch) for arch in found.sm80 if int(arch) >= lowest} <= sass


@pytest.mark.parametrize("text", ("7.5", "8.0;7.0", "6.1+PTX"))
def test_too_old_architectures(toolchain: ModuleType, text: str) -> None:
    with pytest.raises(toolchain.ToolchainError, match=r"is below 8\.0, the lowest that flash_ext supports"):
        toolchain.parse_architectures(text)


@pytest.mark.parametrize("text", ("sm_90", "90", "9.0b", "Volta?", "8.0-PTX", "hopper"))
def test_unreadable_architectures(toolchain: ModuleType, text: str) -> None:
    with pytest.raises(toolchain.ToolchainError, match="TORCH_CUDA_ARCH_LIST: cannot read") as info:
        toolchain.parse_architectures(text)
    assert repr(text) in str(info.value) and "8.0+PTX;9.0a" in str(info.value)


# --- nvcc ---


def fake_toolkit(home: Path, version: str = "13.0", runtime: str | None = "lib64") -> Path:
    """A folder that looks like a CUDA toolkit to the build; returns its nvcc."""
    (home / "bin").mkdir(parents=True)
    (home / "include").mkdir()
    if runtime:
        (home / runtime).mkdir()
        (home / runtime / f"libcudart.so.{version.split('.')[0]}").touch()
    nvcc = home / "bin" / "nvcc"
    release = f"Cuda compilation tools, release {version}, V{version}.88"
    nvcc.write_text(f'#!/bin/sh\nif [ "$1" = --version ]; then echo "{release}"; else echo "#\\$ TOP={home}" >&2; fi\n')
    nvcc.chmod(0o755)
    return nvcc


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch, toolchain: ModuleType, tmp_path: Path) -> pytest.MonkeyPatch:
    """An environment in which no compiler can be found."""
    for variable in ("CUDA_HOME", "CUDA_PATH", "FLASH_EXT_BUILD_CUDA"):
        monkeypatch.delenv(variable, raising=False)
    tools = tmp_path / "tools_without_nvcc"
    tools.mkdir()
    monkeypatch.setenv("PATH", f"{tools}:/bin" if not Path("/bin/nvcc").exists() else str(tools))
    monkeypatch.setattr(toolchain.sys, "path", [])
    monkeypatch.setattr(toolchain.sysconfig, "get_path", lambda _: str(tmp_path / "site"))
    return monkeypatch


def test_no_compiler(no_cuda: pytest.MonkeyPatch, toolchain: ModuleType) -> None:
    assert toolchain.find_cuda() is None
    for words in ("without kernels", "CUDA_HOME", "pip install", "nvidia-cuda-nvcc==13.0.*", "--no-build-isolation"):
        assert words in toolchain.MISSING_NVCC


def test_the_order_of_places(no_cuda: pytest.MonkeyPatch, toolchain: ModuleType, tmp_path: Path) -> None:
    """CUDA_HOME, then CUDA_PATH, then PATH, then the compiler wheels: each found once those before it are gone."""
    homes = {}
    for name in ("CUDA_HOME", "CUDA_PATH", "PATH"):
        homes[name] = tmp_path / name
        fake_toolkit(homes[name], "12.9" if name == "CUDA_PATH" else "13.0")
    homes["compiler wheels"] = tmp_path / "site" / "nvidia" / "cu13"
    fake_toolkit(homes["compiler wheels"], runtime="lib")
    no_cuda.setenv("CUDA_HOME", str(homes["CUDA_HOME"]))
    no_cuda.setenv("CUDA_PATH", str(homes["CUDA_PATH"]))
    old_path = os.environ["PATH"]
    no_cuda.setenv("PATH", f"{homes['PATH'] / 'bin'}:{old_path}")
    for name, home in homes.items():
        found = toolchain.find_cuda()
        assert (found.found_by, found.nvcc) == (name, home / "bin" / "nvcc")
        assert found.version == ((12, 9) if name == "CUDA_PATH" else (13, 0))
        assert found.include == home / "include" and found.cudart.parent.parent == home
        no_cuda.setenv("PATH", old_path) if name == "PATH" else no_cuda.delenv(name, raising=False)


@pytest.mark.parametrize("variable", ("CUDA_HOME", "CUDA_PATH"))
def test_a_wrong_variable_is_an_error(no_cuda: pytest.MonkeyPatch, toolchain: ModuleType, tmp_path: Path, variable: str) -> None:
    no_cuda.setenv(variable, str(tmp_path / "nowhere"))
    with pytest.raises(toolchain.ToolchainError, match=f"{variable}={tmp_path}/nowhere holds no bin/nvcc; unset it or correct it"):
        toolchain.find_cuda()


def test_a_compiler_without_its_runtime_is_an_error(no_cuda: pytest.MonkeyPatch, toolchain: ModuleType, tmp_path: Path) -> None:
    fake_toolkit(tmp_path / "half", runtime=None)
    no_cuda.setenv("CUDA_HOME", str(tmp_path / "half"))
    with pytest.raises(toolchain.ToolchainError, match=r"stands without lib64/libcudart\.so.*pip install nvidia-cuda-nvcc"):
        toolchain.find_cuda()


def test_kernels_can_be_left_out(no_cuda: pytest.MonkeyPatch, toolchain: ModuleType, tmp_path: Path) -> None:
    fake_toolkit(tmp_path / "home")
    no_cuda.setenv("CUDA_HOME", str(tmp_path / "home"))
    no_cuda.setenv("FLASH_EXT_BUILD_CUDA", "0")
    assert toolchain.find_cuda() is None


def test_cuda_majors_must_be_equal(toolchain: ModuleType) -> None:
    toolchain.check_cuda_major((13, 0), None)
    toolchain.check_cuda_major((13, 0), "13.2")
    with pytest.raises(toolchain.ToolchainError) as info:
        toolchain.check_cuda_major((13, 0), "12.8")
    for words in ("nvcc is CUDA 13.0", "torch was built for CUDA 12.8", "CUDA_HOME", "--no-build-isolation"):
        assert words in str(info.value)


def test_cutlass_from_third_party_or_the_wheel(toolchain: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(toolchain, "ROOT", tmp_path)
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(
        toolchain.ToolchainError, match=r"pip install --no-deps nvidia-cutlass==4\.2\.0\.0, or put a checkout in third_party"
    ):
        toolchain.find_cutlass()
    include = tmp_path / "third_party" / "cutlass" / "include"
    (include / "cutlass").mkdir(parents=True)
    (include / "cutlass" / "cutlass.h").touch()
    assert toolchain.find_cutlass() == include


# --- parallel jobs ---


@pytest.mark.parametrize(
    ("max_jobs", "free_gib", "expected"),
    [("8", 64, 8), ("8", 6, 4), ("8", 0.2, 1), ("1", 64, 1), (None, 1000, len(os.sched_getaffinity(0))), (None, 1.6, 1)],
)
def test_parallel_jobs(
    toolchain: ModuleType, monkeypatch: pytest.MonkeyPatch, max_jobs: str | None, free_gib: float, expected: int
) -> None:
    monkeypatch.setattr(toolchain, "free_memory_bytes", lambda: int(free_gib * 2**30))
    monkeypatch.delenv("MAX_JOBS", raising=False)
    if max_jobs:
        monkeypatch.setenv("MAX_JOBS", max_jobs)
    assert toolchain.parallel_jobs() == expected


def test_free_memory_is_plausible(toolchain: ModuleType) -> None:
    assert 2**26 < toolchain.free_memory_bytes() < 2**46


# --- the table and its generated files ---


def names(rows: list) -> list[str]:
    return [row.name for row in rows]


def test_selection_by_patterns(variants_module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    select = variants_module.select
    everything = names(variants_module.VARIANTS)
    assert names(select(pattern="")) == names(select(pattern=" , ")) == everything
    assert names(select(pattern="fwd_sm90_bf16_d128_[fc]*")) == ["fwd_sm90_bf16_d128_full", "fwd_sm90_bf16_d128_causal"]
    assert names(select(pattern="bwd_preprocess_sm80_bf16_d64, bwd_preprocess_*_fp16_d256")) == [
        "bwd_preprocess_sm80_bf16_d64", "bwd_preprocess_sm80_fp16_d256", "bwd_preprocess_sm90_fp16_d256",
    ]  # fmt: skip
    assert {row.arch for row in select(("sm80",), "")} == {"sm80"}
    assert select((), "") == []
    monkeypatch.setenv("FLASH_EXT_VARIANTS", "*_sm80_*")
    assert {row.arch for row in select()} == {"sm80"}
    monkeypatch.delenv("FLASH_EXT_VARIANTS")
    assert names(select()) == everything


def test_a_pattern_that_matches_nothing_lists_what_there_is(variants_module: ModuleType) -> None:
    with pytest.raises(ValueError, match="FLASH_EXT_VARIANTS='fwd_sm75' matches none of: ") as info:
        variants_module.select(pattern="fwd_sm75")
    assert "bwd_preprocess_sm80_bf16_d64" in str(info.value)


def test_generated_files_hold_the_rows(variants_module: ModuleType, tmp_path: Path) -> None:
    rows = variants_module.select(pattern="")
    written = variants_module.generate(tmp_path, rows)
    sources = {unit: path.read_text() for unit, (_, path) in written.items()}
    table, launchers = ((tmp_path / name).read_text() for name in ("variant_table.cpp", "launchers.cpp"))
    for row in rows:
        assert written[row.unit][0] == row.arch
        assert sources[row.unit].count(f" {row.name}(const __grid_constant__ ") == 1
        assert table.count(f'"{row.name}"') == 1 and launchers.count(f'"{row.name}"') == 1
    assert sum(text.count("__global__") for text in sources.values()) == len(rows)
    assert {p.stem for p in tmp_path.glob("*.cu")} == set(written)


def test_unchanged_files_keep_their_time_stamps(variants_module: ModuleType, tmp_path: Path) -> None:
    """Or every build would compile every kernel again. Units that lost their rows go."""
    rows = variants_module.select(pattern="")
    variants_module.generate(tmp_path, rows)
    for path in tmp_path.iterdir():
        os.utime(path, (1, 1))
    variants_module.generate(tmp_path, rows)
    assert {path.stat().st_mtime for path in tmp_path.iterdir()} == {1.0}
    kept = [row for row in rows if row.name != "bwd_preprocess_sm80_bf16_d64" and row.dtype != "fp16"]
    variants_module.generate(tmp_path, kept)
    changed = {path.name for path in tmp_path.iterdir() if path.stat().st_mtime != 1.0}
    assert changed == {"small_sm80_bf16.cu", "variant_table.cpp", "launchers.cpp"}
    assert not [p for p in tmp_path.glob("*.cu") if "fp16" in p.name]


def test_nothing_selected_is_a_build_without_kernels(variants_module: ModuleType, tmp_path: Path) -> None:
    assert variants_module.generate(tmp_path, []) == {}
    assert "std::array<Variant, 0>" in (tmp_path / "variant_table.cpp").read_text()


def test_the_table_from_the_command_line(variants_module: ModuleType, root: Path) -> None:
    env = {**os.environ, "FLASH_EXT_VARIANTS": "*_sm80_bf16_*"}
    result = subprocess.run(
        [sys.executable, "-I", "csrc/variants.py", "--list"],
        cwd=root,
        env=env,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert result.stdout.split() == names(variants_module.select(pattern="*_sm80_bf16_*"))
