"""Build of flash_ext: csrc/variants.py -> generated units -> flash_ext/_C.abi3.so, and flash_ext/_host.

One ninja file compiles both, because torch's own CUDA support needs a CUDA build of torch and gives every source the
same architectures; here each architecture group has its own flags, and a CPU-only torch builds everything. See
docs/architecture.md, "The build". Environment: TORCH_CUDA_ARCH_LIST, FLASH_EXT_VARIANTS, FLASH_EXT_BUILD_CUDA=0,
CUDA_HOME, MAX_JOBS.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch
from setuptools import Extension, setup
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT / "csrc"), str(ROOT / "tools")]

import toolchain  # noqa: E402
import variants  # noqa: E402

NVCC_FLAGS = [
    "-std=c++20", "-O3", "-DNDEBUG", "-lineinfo", "--expt-relaxed-constexpr",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wno-psabi", "-Xptxas=-v,-warn-spills,-warn-lmem-usage",
]  # fmt: skip
OP_SOURCES = [
    "ops.cpp",
    "host/tensor.cpp",
    "host/problem.cpp",
    "host/plan.cpp",
    "host/device.cpp",
    "host/tma.cpp",
    "host/fwd.cpp",
    "host/bwd.cpp",
    "host/block_mask.cpp",
    "host/jagged.cpp",
    "host/mask_blocks.cpp",
    "host/plan_kvcache.cpp",
    "host/append_kv.cpp",
    "host/combine.cpp",
    "host/kvcache.cpp",
    "host/kvcache_fp8.cpp",
    "host/fwd_fp8.cpp",
    "host/plan_fp8.cpp",
    "host/quantize.cpp",
]
HOST_MODULE_SOURCES = [
    "host_module.cpp", "host/plan.cpp", "host/plan_fp8.cpp", "host/plan_kvcache.cpp", "host/explain_kvcache.cpp",
    "host/problem.cpp",
]  # fmt: skip


def say(message: str) -> None:
    print(f"flash_ext: {message}", flush=True)


def quote(arguments: list[str]) -> str:
    return shlex.join(arguments).replace("$", "$$")


class NinjaFile:
    """The rules and edges of one build; every compile writes its dependencies, so that an edit rebuilds what uses it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines = ["ninja_required_version = 1.5", ""]

    def rule(self, name: str, command: str, *, depfile: bool = False) -> None:
        self.lines += [f"rule {name}", f"  command = {command}", f"  description = {name} $out"]
        self.lines += ["  depfile = $out.d", "  deps = gcc", ""] if depfile else [""]

    def edge(self, rule: str, output: Path, inputs: list[Path], flags: str = "") -> Path:
        escaped = [str(path).replace(" ", "$ ").replace(":", "$:") for path in (output, *inputs)]
        self.lines += [f"build {escaped[0]}: {rule} {' '.join(escaped[1:])}", f"  flags = {flags}", ""]
        return output

    def run(self, jobs: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        variants.write_if_changed(self.folder / "build.ninja", "\n".join(self.lines))
        # A virtual environment's ninja is found without activating the environment.
        ninja = shutil.which("ninja") or str(Path(sys.executable).with_name("ninja"))
        if subprocess.run([ninja, "-C", str(self.folder), f"-j{jobs}"]).returncode:
            raise toolchain.ToolchainError("the compilation failed; the first error stands above")


class BuildExtension(cpp_extension.BuildExtension):
    """Builds every extension with one ninja file; the extensions only carry names."""

    def build_extensions(self) -> None:
        try:
            self._build()
        except toolchain.ToolchainError as error:
            raise SystemExit(f"flash_ext: {error}") from None

    def _build(self) -> None:
        # Always build/temp.*: an editable install would compile everything again in a temporary folder each time.
        folder = ROOT / "build" / f"temp.{self.plat_name}-{sys.implementation.cache_tag}"
        cuda = toolchain.find_cuda()
        if cuda is not None:
            toolchain.check_cuda_major(cuda.version, torch.version.cuda)
        architectures = toolchain.parse_architectures(os.environ.get("TORCH_CUDA_ARCH_LIST"))
        try:
            table = variants.select(architectures.groups)
        except ValueError as error:  # FLASH_EXT_VARIANTS matches nothing
            raise toolchain.ToolchainError(str(error)) from None
        rows = table if cuda else []
        generated = folder / "generated"
        # The planner knows every row, so that explain imagines a GPU alike with and without nvcc.
        kernel_units = variants.generate(generated, rows, known=table)
        ninja = NinjaFile(folder)
        cxx = os.environ.get("CXX", "c++")
        ninja.rule("cxx", f"{cxx} -MMD -MF $out.d $flags -c $in -o $out", depfile=True)
        ninja.rule("link", f"{cxx} -shared $in -o $out $flags")
        self._host_edges(ninja, cxx, generated, cuda, architectures, rows)
        if cuda is None:
            say(toolchain.MISSING_NVCC if os.environ.get("FLASH_EXT_BUILD_CUDA") != "0" else "FLASH_EXT_BUILD_CUDA=0: no kernels")
        else:
            self._cuda_edges(ninja, generated, cuda, architectures, kernel_units)
            say(f"nvcc {cuda.version[0]}.{cuda.version[1]} at {cuda.nvcc} (found by {cuda.found_by}), torch {torch.__version__}")
            say(f"{len(rows)} variants in {len(kernel_units)} units for {', '.join(architectures.groups)}")
        jobs = toolchain.parallel_jobs()
        say(f"{jobs} parallel jobs ({toolchain.free_memory_bytes() / 2**30:.0f} GiB free; MAX_JOBS overrides the number of cores)")
        ninja.run(jobs)

    def _output(self, name: str) -> Path:
        path = Path(self.get_ext_fullpath(name)).resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _host_edges(self, ninja, cxx, generated, cuda, architectures, rows) -> None:
        info = {
            "version": self.distribution.get_version(),
            "cuda": f"{cuda.version[0]}.{cuda.version[1]}" if cuda else None,
            "architectures": list(architectures.groups) if cuda else [],
            "sass": [f"sm_{a}" for a in architectures.sm80] + (["sm_90a"] if architectures.sm90 else []) if cuda else [],
            "torch": torch.__version__,
            "compiler": subprocess.run(
                [*shlex.split(cxx), "--version"], capture_output=True, text=True, check=True
            ).stdout.splitlines()[0],
            "num_variants": len(rows),
        }
        # As a file, not a -D flag: a quoted JSON object does not survive every shell on the way.
        variants.write_if_changed(generated / "build_info.h", f"#define FLASH_EXT_BUILD_INFO {json.dumps(json.dumps(info))}\n")
        pybind = next(p for p in cpp_extension.include_paths() if (Path(p) / "pybind11" / "pybind11.h").exists())
        includes = [f"-I{ROOT / 'csrc'}", f"-I{generated}", "-isystem", pybind, "-isystem", sysconfig.get_path("include")]
        flags = quote([*toolchain.HOST_FLAGS, *includes, "-include", str(generated / "build_info.h")])
        sources = [ROOT / "csrc" / s for s in HOST_MODULE_SOURCES] + [generated / "variant_table.cpp"]
        objects = [ninja.edge("cxx", ninja.folder / "host_module" / f"{s.stem}.o", [s], flags) for s in sources]
        ninja.edge("link", self._output("flash_ext._host"), objects)

    def _cuda_edges(self, ninja, generated, cuda, architectures, kernel_units) -> None:
        includes = [f"-I{ROOT / 'csrc'}", "-isystem", str(toolchain.find_cutlass())]
        # ptxas's report goes beside the object, for tools/resources.py; it is shown when the compile fails.
        nvcc = f"{cuda.nvcc} -MMD -MF $out.d $flags -c $in -o $out > $out.ptxas 2>&1 || (cat $out.ptxas; exit 1)"
        ninja.rule("nvcc", nvcc, depfile=True)
        objects = [
            ninja.edge(
                "nvcc",
                ninja.folder / "kernels" / f"{unit}.o",
                [path],
                quote([*NVCC_FLAGS, *toolchain.compression_flags(cuda.version), *architectures.flags(arch), *includes]),
            )
            for unit, (arch, path) in kernel_units.items()
        ]
        defines = [*toolchain.STABLE_ABI_DEFINES, "-DFLASH_EXT_DISPATCH_KEY=CUDA"]
        system = [part for path in (*cpp_extension.include_paths(), str(cuda.include)) for part in ("-isystem", path)]
        flags = quote([*toolchain.HOST_FLAGS, *defines, f"-I{ROOT / 'csrc'}", *system])
        sources = [ROOT / "csrc" / s for s in OP_SOURCES] + [generated / n for n in ("variant_table.cpp", "launchers.cpp")]
        objects += [ninja.edge("cxx", ninja.folder / "ops" / f"{s.stem}.o", [s], flags) for s in sources]
        # Those of renamed or deleted sources: the emulated library and tools/resources.py take what lies in these folders.
        for stale in {*ninja.folder.glob("kernels/*.o"), *ninja.folder.glob("ops/*.o")} - set(objects):
            stale.unlink()
            stale.with_suffix(".o.ptxas").unlink(missing_ok=True)
        libraries = [f"-L{path}" for path in cpp_extension.library_paths()] + ["-ltorch_cpu", "-lc10", str(cuda.cudart)]
        ninja.edge("link", self._output("flash_ext._C"), objects, quote(libraries))


cuda_extension = [Extension("flash_ext._C", sources=[], py_limited_api=True)]
try:
    has_cuda = toolchain.find_cuda() is not None
except toolchain.ToolchainError as error:
    raise SystemExit(f"flash_ext: {error}") from None

setup(
    ext_modules=[Extension("flash_ext._host", sources=[]), *(cuda_extension if has_cuda else [])],
    cmdclass={"build_ext": BuildExtension},
)
