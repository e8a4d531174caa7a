"""Finds what a build needs: nvcc, CUTLASS's headers, the architectures, the number of parallel jobs.

Used by setup.py and by the tools; standard library only. Every lookup says where it looked when it fails.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMPILER_WHEELS = "nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm nvidia-cuda-cccl nvidia-cuda-runtime"
CUTLASS_WHEEL = "nvidia-cutlass==4.2.0.0"
BYTES_PER_JOB = 1.5 * 2**30  # a kernel's translation unit peaks below 1 GB; the rest is headroom for the machine

# Of the host code, here and in the emulated build (tests/emulator/build.py).
HOST_FLAGS = [
    "-std=c++20",
    "-O2",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-missing-field-initializers",
]
# The oldest torch that the binary runs with: stable ABI, torch >= 2.10.
STABLE_ABI_DEFINES = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA"]

NAMED_ARCHITECTURES = {"Ampere": "8.0;8.6", "Ada": "8.9", "Hopper": "9.0a", "Blackwell": "10.0;12.0"}


class ToolchainError(RuntimeError):
    """The build cannot go on; the message says what to change."""


@dataclass(frozen=True)
class Cuda:
    """A CUDA compiler with its headers and runtime library."""

    nvcc: Path
    version: tuple[int, int]
    include: Path
    cudart: Path
    found_by: str


def _nvcc_version(nvcc: Path) -> tuple[int, int]:
    text = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    match = re.search(r"release (\d+)\.(\d+)", text)
    if match is None:
        raise ToolchainError(f"{nvcc} --version prints no release number: {text!r}")
    return int(match[1]), int(match[2])


def _home(nvcc: Path) -> Path:
    """The toolkit's folder, as nvcc itself says: the file found may be a script or a link elsewhere."""
    text = subprocess.run([str(nvcc), "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True, timeout=60)
    match = re.search(r"^#\$ TOP=(.+)$", text.stderr, re.MULTILINE)
    return Path(match[1]).resolve() if match else nvcc.parent.parent


def _candidates() -> list[tuple[Path, str]]:
    found = []
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            found.append((Path(os.environ[variable]) / "bin" / "nvcc", variable))
    on_path = shutil.which("nvcc")
    if on_path:
        found.append((Path(on_path).resolve(), "PATH"))
    site_folders = dict.fromkeys([sysconfig.get_path("purelib"), *sys.path])
    for site in filter(None, site_folders):
        found += [(nvcc, "compiler wheels") for nvcc in sorted(Path(site).glob("nvidia/cu[0-9]*/bin/nvcc"), reverse=True)]
    return found


def find_cuda() -> Cuda | None:
    """nvcc from CUDA_HOME, CUDA_PATH, PATH or the PyPI compiler wheels, in this order; None when there is none."""
    if os.environ.get("FLASH_EXT_BUILD_CUDA") == "0":
        return None
    for nvcc, found_by in _candidates():
        if not nvcc.is_file():
            if found_by in ("CUDA_HOME", "CUDA_PATH"):
                raise ToolchainError(f"{found_by}={os.environ[found_by]} holds no bin/nvcc; unset it or correct it")
            continue
        home = _home(nvcc)
        libraries = sorted(p for folder in ("lib64", "lib") for p in (home / folder).glob("libcudart.so.[0-9]*"))
        if not libraries:
            raise ToolchainError(
                f"{nvcc} ({found_by}) stands without lib64/libcudart.so.*; install the CUDA runtime beside it, or: "
                f"pip install {COMPILER_WHEELS}"
            )
        return Cuda(nvcc, _nvcc_version(nvcc), home / "include", libraries[0], found_by)
    return None


MISSING_NVCC = (
    "no CUDA compiler was found (CUDA_HOME, CUDA_PATH, PATH, PyPI compiler wheels), so flash_ext is built without kernels: "
    "every call runs on the reference. To get the kernels, install the CUDA toolkit, or the compiler from PyPI with the "
    "version pinned to your torch's CUDA, e.g. for CUDA 13.0:  pip install "
    + " ".join(f"'{name}==13.0.*'" for name in COMPILER_WHEELS.split())
    + "  and install flash_ext again with --no-build-isolation."
)


def find_cutlass() -> Path:
    """The include folder of a CUTLASS checkout in third_party/cutlass, or of the pinned wheel."""
    checkout = ROOT / "third_party" / "cutlass" / "include"
    if (checkout / "cutlass" / "cutlass.h").is_file():
        return checkout
    spec = importlib.util.find_spec("cutlass_library")
    for location in (spec.submodule_search_locations or []) if spec else []:
        include = Path(location) / "source" / "include"
        if (include / "cutlass" / "cutlass.h").is_file():
            return include
    raise ToolchainError(
        f"CUTLASS's headers were not found: pip install --no-deps {CUTLASS_WHEEL}, or put a checkout in third_party/cutlass"
    )


@dataclass(frozen=True)
class Architectures:
    """What to compile for. sm80 group: SASS of every listed 8.x or later architecture but 9.0, always with compute_80 PTX.
    sm89 group, built along with it: the same from 8.9 on, with compute_89 PTX (and sm_89 where nothing of that is listed)."""

    sm80: tuple[str, ...]  # SASS targets of the sm80 group, such as ("80", "86"); empty: the group is not built
    sm90: bool

    @property
    def groups(self) -> tuple[str, ...]:
        return (("sm80", "sm89") if self.sm80 else ()) + (("sm90",) if self.sm90 else ())

    @property
    def sm89(self) -> tuple[str, ...]:
        return tuple(arch for arch in self.sm80 if int(arch) >= 89) or (("89",) if self.sm80 else ())

    def flags(self, group: str) -> list[str]:
        if group == "sm90":
            return ["-gencode", "arch=compute_90a,code=[sm_90a,compute_90a]"]
        lowest = group.removeprefix("sm")
        targets = self.sm89 if group == "sm89" else self.sm80
        if targets == (lowest,):
            return ["-gencode", f"arch=compute_{lowest},code=[sm_{lowest},compute_{lowest}]"]
        flags = ["-gencode", f"arch=compute_{lowest},code=compute_{lowest}"]
        for arch in targets:
            flags += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
        return flags


def compression_flags(nvcc_version: tuple[int, int]) -> list[str]:
    """Machine code and PTX compressed with LZ4, a quarter of their size; nvcc 12.8 brought zstd as well, which the emulator of
    the tests does not read, and older ones know LZ4 alone."""
    return ["-Xfatbin=-compress-all"] + (["--compress-mode=speed"] if nvcc_version >= (12, 8) else [])


def parse_architectures(text: str | None) -> Architectures:
    """Read TORCH_CUDA_ARCH_LIST ("8.0+PTX;9.0a", "8.6 8.9", "Hopper"); None or empty means "8.0+PTX;9.0a"."""
    sm80: list[str] = []
    sm90 = False
    words = (text or "8.0+PTX;9.0a").replace(" ", ";").replace(",", ";").split(";")
    for word in [w for entry in words if entry for w in NAMED_ARCHITECTURES.get(entry.removesuffix("+PTX"), entry).split(";")]:
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", word)
        if match is None:
            raise ToolchainError(
                f"TORCH_CUDA_ARCH_LIST: cannot read {word!r}; write e.g. '8.0+PTX;9.0a', or one of {', '.join(NAMED_ARCHITECTURES)}"
            )
        arch = int(match[1]) * 10 + int(match[2])
        if arch < 80:
            raise ToolchainError(
                f"TORCH_CUDA_ARCH_LIST: compute capability {word} is below 8.0, the lowest that flash_ext supports"
            )
        if arch == 90:
            sm90 = True
        elif str(arch) not in sm80:
            sm80.append(str(arch))
    return Architectures(tuple(sm80), sm90)


def free_memory_bytes() -> int:
    try:
        match = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        match = None
    return int(match[1]) * 1024 if match else 4 * 2**30


def parallel_jobs() -> int:
    """MAX_JOBS, or the number of usable cores, capped by free memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    given = os.environ.get("MAX_JOBS") or str(cores)
    if not given.isdigit() or int(given) == 0:
        raise ToolchainError(f"MAX_JOBS must be a number above 0, got {given!r}")
    wanted = int(given)
    return max(1, min(wanted, int(free_memory_bytes() / BYTES_PER_JOB)))


def check_cuda_major(nvcc_version: tuple[int, int], torch_cuda: str | None) -> None:
    """Refuse a compiler whose CUDA major differs from torch's. A CPU-only torch (torch_cuda None) takes any."""
    if torch_cuda is not None and int(torch_cuda.split(".")[0]) != nvcc_version[0]:
        raise ToolchainError(
            f"nvcc is CUDA {nvcc_version[0]}.{nvcc_version[1]}, but torch was built for CUDA {torch_cuda}: the majors must be "
            "equal. Point CUDA_HOME at a matching toolkit, or install the matching torch. If torch here is the one of an "
            "isolated build, use: pip install --no-build-isolation . (FLASH_EXT_BUILD_CUDA=0 builds without kernels)"
        )


def main() -> None:
    """Print what to pip install before a build: the pinned compiler wheels where no nvcc is found, nothing otherwise."""
    if find_cuda() is None:
        print(" ".join(f"{name}==13.0.*" for name in COMPILER_WHEELS.split()))


if __name__ == "__main__":
    main()
