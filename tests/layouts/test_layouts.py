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
        (
            "tiles.cuh",
            "clamp(end - mask.visible_end(first_row, sequence) / kBlockN,",
            "clamp(end - ceil_div(mask.visible_end(first_row, sequence), kBlockN),",
        ),
        ("tiles.cuh", "end = ceil_div(keys_end, kBlockN)", "end = keys_end / kBlockN + 1"),
        (
            "tiles.cuh",
            "ceil_div(mask.visible_begin(last_row, sequence), kBlockN) - begin",
            "mask.visible_begin(last_row, sequence) / kBlockN - begin",
        ),
        ("tiles.cuh", "if (first_key >= keys_end) return {0, 0, 0, 0};", ""),
        ("tiles.cuh", "ceil_div(mask.rows_begin(last_key, sequence), kBlockM)", "mask.rows_begin(last_key, sequence) / kBlockM"),
        ("tiles.cuh", "full_rows_end == sequence.q.num_rows ? end : full_rows_end / kBlockM", "ceil_div(full_rows_end, kBlockM)"),
        ("masks.cuh", "clamp(row + 1 + s.diagonal, 0, s.k.num_rows)", "clamp(row + s.diagonal, 0, s.k.num_rows)"),
        ("masks.cuh", "clamp(key - s.diagonal - right, 0, s.q.num_rows)", "clamp(key - s.diagonal, 0, s.q.num_rows)"),
        (
            "seqlens.cuh",
            "first = clamp(params.cu_seqlens[index], 0, params.num_rows)",
            "first = params.cu_seqlens[index]",
        ),
        ("seqlens.cuh", "clamp(params.seqused[index], 0, owned)", "params.seqused[index]"),
        ("seqlens.cuh", "/ block + index", "/ block"),
        ("seqlens.cuh", "sequence.diagonal - first}", "sequence.diagonal}"),
        ("masks.cuh", "2 * (column / 8) + min_of(column % 8, 2)", "2 * (column / 8) + min_of(column % 8, 1)"),
        ("masks.cuh", "from(end) | ~from(begin)", "from(end) & ~from(begin)"),
        ("work.cuh", "row >> log2_heads); }\n  FX", "row / 2); }\n  FX"),
        ("work.cuh", "head_in_group(row) < group;", "head_in_group(row) <= group;"),
        ("work.cuh", "first_position >= 0 && first_position", "first_position"),
        ("work.cuh", "block.block * (block_m >> log2_heads)", "block.block * block_m"),
        ("work.cuh", "min_of(head_in_group(row), group - 1)", "head_in_group(row)"),
        ("fill_unused.cuh", "params.cu_seqlens[middle] <= row", "params.cu_seqlens[middle] < row"),
        ("fill_unused.cuh", "if (low == batch) return false;", ""),
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


FP8_MISTAKES = {
    "fp8_layout.cuh": (
        ("8 * (x >> 1) + 2 * q + (x & 1)", "4 * q + x"),
        ("2 * (n % 8) + n % 16 / 8", "n % 16"),
        ("8 * (matrix & 1) + lane % 8", "8 * (matrix >> 1) + lane % 8"),
        ("4 * (column & 1) + 2 * half + (column >> 1)", "4 * (column >> 1) + 2 * half + (column & 1)"),
    ),
    "quantize_params.h": (("x >> 27", "x >> 28"),),
}


def test_the_maps_of_the_fp8_forward(tmp_path: Path, cuda_includes: list[Path]) -> None:
    status, output = run(tmp_path, "fp8_layout.cpp", cuda_includes, {})
    assert status == 0, output[:4000]


@pytest.mark.parametrize("name,old,new", [(n, *edit) for n, edits in FP8_MISTAKES.items() for edit in edits])
def test_a_wrong_map_of_the_fp8_forward_is_noticed(
    name: str, old: str, new: str, tmp_path: Path, cuda_includes: list[Path]
) -> None:
    status, _ = run(tmp_path, "fp8_layout.cpp", cuda_includes, {name: (old, new)})
    assert status != 0
