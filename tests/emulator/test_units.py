"""The emulator's C++ unit tests: each unit/test_*.cpp is a program that fails by its exit status."""

import subprocess

import harness
import pytest

build = harness.build
PROGRAMS = sorted((build.ROOT / "unit").glob("test_*.cpp"))


def flags(source) -> tuple[str, ...]:
    """Programs that include CuTe need CUTLASS's headers, and CCCL's for the host compiler."""
    if "<cute/" not in source.read_text():
        return ()
    include = build.cuda().include
    return ("-isystem", str(build.toolchain.find_cutlass()), "-isystem", str(include), "-isystem", str(include / "cccl"))


@pytest.mark.parametrize("source", PROGRAMS, ids=lambda path: path.stem)
def test_unit(source):
    program = build.build_executable(source, harness.out_dir(), flags(source))
    result = subprocess.run([program], capture_output=True, text=True, timeout=300)
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
