"""What the kernels compute with indices, on the host by plain g++: index maps against CuTe's layouts (layouts.cpp),
tile lists, schedule and folded scale against brute force (policies.cpp). Planted mistakes show that each can fail."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import toolchain  # noqa: E402


def run(folder: Path, program: str, includes: list[Path], replace: dict[str, tuple[str, str]]) -> tuple[int, str]:
    """Builds a program against a copy of csrc/common with some text replaced; returns exit status and output."""
    shutil.copytree(ROOT / "csrc" / "common", folder / "common")
    for name, (old, new) in replace.items():
        path = folder / "common" / name
        text = path.read_text()
        assert text.count(old) == 1, f"{name}: {old!r}"
        path.write_text(text.replace(old, new))
    command = ["g++", "-std=c++20", "-O0", "-Wall", "-Werror", f"-I{folder}"]
    command += [flag for path in includes for flag in ("-isystem", str(path))]
    command += [str(Path(__file__).with_name(program)), "-o", str(folder / "program")]
    subprocess.run(command, check=True, timeout=240)
    result = subprocess.run([str(folder / "program")], capture_output=True, text=True, timeout=60)
    return result.returncode, result.stdout


@pytest.fixture
def cuda_includes() -> list[Path]:
    cuda = toolchain.find_cuda()
    if cuda is None or shutil.which("g++") is None:
        pytest.skip("needs g++ and CUDA's headers")
    return [cuda.include, cuda.include / "cccl"]


@pytest.fixture
def cute_includes(cuda_includes: list[Path]) -> list[Path]:
    try:
        return [toolchain.find_cutlass(), *cuda_includes]
    except toolchain.ToolchainError as error:
        pytest.skip(str(error))


def test_every_map_equals_cute(tmp_path: Path, cute_includes: list[Path]) -> None:
    status, output = run(tmp_path, "layouts.cpp", cute_includes, {})
    assert status == 0, output
    assert output.count(" 0 mismatches") >= 20, output


def test_a_wrong_map_is_noticed(tmp_path: Path, cute_includes: list[Path]) -> None:
    mistakes = {
        "fragment.cuh": ("return (i >> 1) & 1;", "return (~i >> 1) & 1;"),
        "swizzle.cuh": ("(address >> 3) & 0x70", "(address >> 4) & 0x70"),
        "outputs.cuh": ("8 * (lane / 8 % 2)", "8 * (lane / 16 % 2)"),
    }
    _, output = run(tmp_path, "layouts.cpp", cute_includes, mistakes)
    for name in ("accumulator 64x128", "K-major tile 128x128", "MN-major tile 128x128", "output staging"):
        lines = [line for line in output.splitlines() if line.startswith(name) and "places" in line]
        assert lines and " 0 mismatches" not in lines[0], output


def test_policies(tmp_path: Path, cuda_includes: list[Path]) -> None:
    status, output = run(tmp_path, "policies.cpp", cuda_includes, {})
    assert status == 0, output


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("tiles.cuh", "num_tiles - every_row_ends / kBlockN}", "num_tiles - ceil_div(every_row_ends, kBlockN)}"),
        ("tiles.cuh", "(some_row_ends - 1) / kBlockN + 1", "some_row_ends / kBlockN + 1"),
        ("masks.cuh", "row + 1 + (seqlen_k - seqlen_q)", "row + (seqlen_k - seqlen_q)"),
        ("scheduler.cuh", "num_ctas - 1 - cta", "num_ctas - cta"),
        ("scheduler.cuh", "num_m_blocks - 1 - rank", "rank"),
        ("scheduler.cuh", "group < full_groups", "group <= full_groups"),
        ("math.cuh", "ceil_div<uint64_t>(uint64_t(1) << (31 + bits), divisor)", "(2ull << (30 + bits)) / divisor"),
        ("scores.cuh", "return {1.f, 0, 0};", "return {1.f, 0xffffffffu, 0};"),
    ],
)
def test_a_wrong_policy_is_noticed(tmp_path: Path, cuda_includes: list[Path], name: str, old: str, new: str) -> None:
    status, _ = run(tmp_path, "policies.cpp", cuda_includes, {name: (old, new)})
    assert status != 0
