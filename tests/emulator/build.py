"""Builds the emulator (libflash_ext_emulator.so, the Python module _emulator) and unit kernels.

    python tests/emulator/build.py [--extension] [--out DIR]

Everything is cached in DIR (build/emulator) by content: an object is rebuilt when its source, a header it includes,
the flags, the compiler or (with -march=native) the CPU differs. Several processes may share DIR.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent
REPOSITORY = ROOT.parents[1]
sys.path.insert(0, str(REPOSITORY / "tools"))

import toolchain  # noqa: E402

SOURCES = ROOT / "src"
LIBRARY = "libflash_ext_emulator.so"
BINDING = "_emulator" + sysconfig.get_config_var("EXT_SUFFIX")

# No contraction: a PTX mul and add must round twice. GCC 12 sees overlaps in std::string that are not there.
CXX_FLAGS = ["-std=c++20", "-Wall", "-Wextra", "-Werror", "-Wno-restrict", "-fPIC", "-g1", "-ffp-contract=off"]
NATIVE = ["-march=native", "-fno-math-errno", "-fno-trapping-math"]
# The interpreter and the tensor units are where the time goes; the rest only has to compile fast.
FAST = ["-O3", *NATIVE]
SMALL = ["-O1"]
SMALL_SOURCES = {"binding", "runtime", "fatbin", "device_model", "device_memory"}
SMALL_PREFIXES = ("api_",)

NVCC_PTX_FLAGS = ["-std=c++20", "-O3", "-lineinfo", "-ptx", "--expt-relaxed-constexpr", "-diag-suppress=177"]


class BuildError(RuntimeError):
    pass


def run(command: list[str | Path], timeout: float = 900) -> str:
    process = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=timeout)
    if process.returncode:
        raise BuildError(f"{' '.join(map(str, command))}\n{process.stdout}{process.stderr}")
    return process.stdout


@functools.cache
def cuda() -> toolchain.Cuda:
    found = toolchain.find_cuda()
    if found is None:
        raise BuildError(toolchain.MISSING_NVCC)
    return found


def cxx() -> str:
    return os.environ.get("CXX", "g++")


@functools.cache
def cxx_identity() -> str:
    """Compiler version, and what -march=native means here."""
    return run([cxx(), "--version"]) + run([cxx(), "-march=native", "-Q", "--help=target"])


@functools.cache
def nvcc_identity() -> str:
    return run([cuda().nvcc, "--version"])


def headers(source: Path, folders: tuple[Path, ...]) -> list[Path]:
    """The source and every file it includes by a quoted name, transitively."""
    found: dict[Path, None] = {}
    todo = [source.resolve()]
    while todo:
        path = todo.pop()
        if path in found:
            continue
        found[path] = None
        for name in re.findall(r'^\s*#\s*include\s*"([^"]+)"', path.read_text(), re.MULTILINE):
            for folder in (path.parent, *folders):
                if (candidate := folder / name).is_file():
                    todo.append(candidate.resolve())
                    break
    return sorted(found)


def digest(parts: list[str], files: list[Path]) -> str:
    state = hashlib.sha256("\0".join(parts).encode())
    for path in files:
        state.update(path.name.encode() + b"\0" + path.read_bytes())
    return state.hexdigest()[:16]


@contextlib.contextmanager
def locked(out: Path, what: str = "emulator"):
    (out / "locks").mkdir(parents=True, exist_ok=True)
    with open(out / "locks" / what, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def publish(command: list[str | Path], target: Path, timeout: float = 900) -> None:
    """Runs a command that writes to the path after -o, then moves the result into place."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{os.getpid()}.{target.name}")
    try:
        run([*command, "-o", partial], timeout)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def cxx_object(source: Path, out: Path, extra: tuple[str, ...] = ()) -> Path:
    small = source.stem in SMALL_SOURCES or source.stem.startswith(SMALL_PREFIXES)
    flags = [*CXX_FLAGS, *(SMALL if small else FAST), f"-I{SOURCES}", f"-I{cuda().include}", *extra]
    key = digest([cxx_identity(), *flags], headers(source, (SOURCES,)))
    target = out / "obj" / f"{source.stem}-{key}.o"
    if not target.is_file():
        publish([cxx(), *flags, "-c", source], target)
    return target


def cxx_objects(sources: list[Path], out: Path, jobs: int, extra: tuple[str, ...] = ()) -> list[Path]:
    cxx_identity()
    with ThreadPoolExecutor(jobs) as pool:
        # Large files first: the last one to finish decides.
        ordered = sorted(sources, key=lambda path: -path.stat().st_size)
        return sorted(pool.map(lambda path: cxx_object(path, out, extra), ordered))


def link(objects: list[Path], target: Path, flags: list[str], depends: list[Path]) -> Path:
    stamp = target.with_name(target.name + ".key")
    key = digest([cxx_identity(), *flags, *(o.name for o in objects)], depends)
    if not (target.is_file() and stamp.is_file() and stamp.read_text() == key):
        publish([cxx(), "-shared", *objects, *flags], target)
        stamp.write_text(key)
    return target


def default_jobs() -> int:
    return toolchain.parallel_jobs()


def build_library(out: Path, jobs: int = 0) -> Path:
    """The emulator and its stand-in for libcudart.so.13."""
    with locked(out):
        sources = [path for path in SOURCES.glob("*.cpp") if path.stem != "binding"]
        exports = SOURCES / "exports.map"
        return link(
            cxx_objects(sources, out, jobs or default_jobs()),
            out / LIBRARY,
            [f"-Wl,-soname,{LIBRARY}", f"-Wl,--version-script={exports}", "-Wl,-Bsymbolic", "-Wl,-z,defs", "-pthread"],
            [exports],
        )


def pybind11_include() -> Path:
    """pybind11 as torch brings it along; setup.py uses the same."""
    from torch.utils import cpp_extension

    return next(Path(path) for path in cpp_extension.include_paths() if (Path(path) / "pybind11" / "pybind11.h").exists())


def build_binding(out: Path, jobs: int = 0) -> Path:
    library = build_library(out, jobs)
    with locked(out):
        python = ("-isystem", str(pybind11_include()), f"-I{sysconfig.get_path('include')}", "-fvisibility=hidden")
        return link(
            [cxx_object(SOURCES / "binding.cpp", out, python)],
            out / BINDING,
            [f"-L{out}", f"-l:{LIBRARY}", "-Wl,-rpath,$ORIGIN", "-pthread"],
            [library],
        )


def build_executable(source: Path, out: Path, flags: tuple[str, ...] = ()) -> Path:
    """A C++ test program, linked against the emulator."""
    library = build_library(out)
    with locked(out):
        objects = [cxx_object(source, out, flags)]
        key = digest([library.with_name(library.name + ".key").read_text(), objects[0].name], [])
        target = out / "bin" / f"{source.stem}-{key}"
        if not target.is_file():
            publish([cxx(), *objects, library, "-Wl,-rpath,$ORIGIN/..", "-pthread"], target)
        return target


def compile_ptx(source: Path, out: Path, arch: str = "sm_90a", flags: tuple[str, ...] = ()) -> Path:
    """A .cu file's PTX with line information."""
    command = [*NVCC_PTX_FLAGS, f"-arch={arch}", f"-I{ROOT / 'kernels'}", *flags]
    key = digest([nvcc_identity(), *command], headers(source, (ROOT / "kernels",)))
    target = out / "ptx" / f"{source.stem}-{arch}-{key}.ptx"
    if not target.is_file():
        publish([cuda().nvcc, *command, source], target)
    return target


def compile_extension(
    source: Path, out: Path, arch: str = "sm_90a", flags: tuple[str, ...] = (), depends: tuple[Path, ...] = ()
) -> Path:
    """A .cu file with host code, compiled to a shared library on the emulator's runtime.

    `depends`: files beyond the includes beside it whose change means another compile.
    """
    library = build_library(out)
    compute = "compute_" + arch.removeprefix("sm_")
    command = [
        "-std=c++20",
        "-O3",
        "-lineinfo",
        "--no-compress",
        f"-gencode=arch={compute},code={compute}",
        "-Xcompiler=-fPIC",
        "--expt-relaxed-constexpr",
        *flags,
    ]
    key = digest([nvcc_identity(), *command], [*headers(source, ()), *depends])
    target_object = out / "obj" / f"{source.stem}-{arch}-{key}.o"
    with locked(out, target_object.name):
        if not target_object.is_file():
            publish([cuda().nvcc, *command, "-c", source], target_object)
        return link(
            [target_object],
            out / "ext" / f"{source.stem}-{key}.so",
            [f"-L{out}", f"-l:{LIBRARY}", "-Wl,-rpath,$ORIGIN/..", "-Wl,-z,defs"],
            [library],
        )


def build_extension(out: Path) -> Path:
    """flash_ext/_C_emulated: the object files of flash_ext/_C, linked against the emulator's runtime.

    Only the file that binds the ops is compiled again, for CPU tensors. The emulator is put beside it.
    """
    from torch.utils import cpp_extension

    library, binding = build_library(out), build_binding(out)
    objects = compiled_objects()
    package = REPOSITORY / "flash_ext"
    includes = [part for path in cpp_extension.include_paths() for part in ("-isystem", path)]
    flags = [*toolchain.HOST_FLAGS, *toolchain.STABLE_ABI_DEFINES, "-DFLASH_EXT_DISPATCH_KEY=CPU",
             f"-I{REPOSITORY / 'csrc'}", *includes, "-isystem", str(cuda().include)]  # fmt: skip
    with locked(out):
        for path in (library, binding):
            copy_if_changed(path, package / path.name)
        source = REPOSITORY / "csrc" / "ops.cpp"
        key = digest([cxx_identity(), *flags], headers(source, (REPOSITORY / "csrc",)))
        ops = out / "obj" / f"ops-{key}.o"
        if not ops.is_file():
            publish([cxx(), *flags, "-c", source], ops)
        torch_libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
        # The emulator comes first: whatever brings the real runtime must not answer for it.
        linked = link(
            [ops, *objects],
            out / "_C_emulated.abi3.so",
            [f"-L{out}", f"-l:{LIBRARY}", "-Wl,-rpath,$ORIGIN", *torch_libraries, "-ltorch_cpu", "-lc10"],
            objects,
        )
        return copy_if_changed(linked, package / linked.name)


def compiled_objects() -> list[Path]:
    """The objects of flash_ext/_C from the latest build, without the one that binds the ops."""
    folders = sorted(REPOSITORY.glob("build/temp.*"), key=lambda path: path.stat().st_mtime)
    objects = [] if not folders else sorted(folders[-1].glob("kernels/*.o")) + sorted(folders[-1].glob("ops/*.o"))
    objects = [path for path in objects if path.name != "ops.o"]
    if not objects:
        raise BuildError("flash_ext is not built here: run `pip install --no-build-isolation -e .` first")
    return objects


def copy_if_changed(source: Path, target: Path) -> Path:
    """A running process may have the old file mapped: it is replaced, never written into."""
    if not target.is_file() or target.read_bytes() != source.read_bytes():
        partial = target.with_name(f".{os.getpid()}.{target.name}")
        shutil.copy(source, partial)
        partial.replace(target)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=REPOSITORY / "build" / "emulator", help="folder for everything that is built")
    parser.add_argument("--jobs", type=int, default=0, help="parallel compilers (default: all cores)")
    parser.add_argument("--extension", action="store_true", help="link flash_ext/_C_emulated too, for this checkout")
    parser.add_argument("--kernels", action="store_true", help="compile the unit kernels to PTX too")
    arguments = parser.parse_args()
    start = time.monotonic()
    out = arguments.out.resolve()
    try:
        print(build_library(out, arguments.jobs))
        print(build_binding(out, arguments.jobs))
        if arguments.extension:
            print(build_extension(out))
        if arguments.kernels:
            for source in sorted((ROOT / "kernels").glob("*.cu")):
                print(compile_ptx(source, out, arch_of(source)))
    except (BuildError, subprocess.TimeoutExpired) as error:
        sys.exit(f"build failed: {error}")
    print(f"built in {time.monotonic() - start:.1f} s", file=sys.stderr)


def arch_of(source: Path) -> str:
    """The architecture a unit kernel asks for in a line `// arch: sm_80`; sm_90a without one."""
    match = re.search(r"^// arch: (\S+)$", source.read_text(), re.MULTILINE)
    return match[1] if match else "sm_90a"


if __name__ == "__main__":
    main()
