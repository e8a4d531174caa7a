"""Real builds, in a copy of the sources: from an sdist, without nvcc, and with one kernel that is then changed.

Also that import, errors and explain are the same with libcudart hidden, without nvcc and without a GPU.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
SDIST_SOURCES = ("csrc", "tools", "flash_ext", "third_party", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
ROWS = "bwd_preprocess_sm80_bf16_d64,bwd_preprocess_sm80_fp16_d64"
BUILD_LIMIT_S = 240


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    result = subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=BUILD_LIMIT_S)
    assert result.returncode == 0, f"{command}\n{result.stdout[-4000:]}\n{result.stderr[-4000:]}"
    return result.stdout + result.stderr


def clean_environment(**changes: str) -> dict[str, str]:
    """This process's, without what would lead a build or an import elsewhere."""
    dropped = {
        "PYTHONPATH",
        "FLASH_EXT_VARIANTS",
        "FLASH_EXT_BUILD_CUDA",
        "TORCH_CUDA_ARCH_LIST",
        "FLASH_EXT_STRICT",
        "FLASH_EXT_EMULATE",
    }
    return {**{k: v for k, v in os.environ.items() if k not in dropped}, **changes}


def without_nvcc(folder: Path) -> dict[str, str]:
    """An environment in which everything on PATH is found but nvcc."""
    search = []
    for i, entry in enumerate(os.environ["PATH"].split(os.pathsep)):
        if not (Path(entry) / "nvcc").exists():
            search.append(entry)
            continue
        shadow = folder / f"path{i}"
        shadow.mkdir(parents=True)
        for tool in Path(entry).iterdir():
            if tool.name != "nvcc":
                (shadow / tool.name).symlink_to(tool)
        search.append(str(shadow))
    env = clean_environment(PATH=os.pathsep.join(search))
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        env.pop(variable, None)
    return env


def finds_nvcc(env: dict[str, str]) -> bool:
    code = "import sys; sys.path.insert(0, 'tools'); import toolchain; print(toolchain.find_cuda() is not None)"
    return run(sys.executable, "-c", code, cwd=ROOT, env=env).strip() == "True"


@pytest.fixture(scope="module")
def sdist_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The contents of the source distribution, unpacked: all that the builds below have."""
    work = tmp_path_factory.mktemp("sdist")
    copy = work / "copy"
    for name in SDIST_SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "cutlass"))
        else:
            shutil.copy(source, copy / name)
    code = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
    run(sys.executable, "-c", code, work, cwd=copy, env=clean_environment())
    (archive,) = work.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(work / "unpacked", filter="data")
    (tree,) = (work / "unpacked").iterdir()
    return tree


def test_the_sdist_holds_what_a_build_needs(sdist_tree: Path) -> None:
    for folder in ("csrc", "tools", "flash_ext"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix in {".py", ".h", ".cpp", ".cuh", ".typed"}:
                assert (sdist_tree / path.relative_to(ROOT)).is_file(), f"{path} is missing from the sdist"
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        assert (sdist_tree / name).is_file()
    assert not [p for p in sdist_tree.rglob("*") if p.suffix in {".so", ".pyc", ".o"}]


# What must be the same everywhere: errors, what explain says, and results on the CPU.
PROBE = """
import json, sys, warnings, torch
warnings.simplefilter("error")
import flash_ext
from flash_ext import ops
assert not torch.cuda.is_initialized()
q = torch.arange(2 * 5 * 2 * 8, dtype=torch.float32).view(2, 5, 2, 8).sin().requires_grad_()
def error(**options):
    try:
        flash_ext.attention(q, q, q[:, :, :1] if options.pop("heads", False) else q, **options)
    except Exception as e:
        return type(e).__name__ + ": " + str(e)
out, lse = flash_ext.attention(q, q, q, causal=True, return_lse=True)
(out.sum() + lse.sum()).backward()
half = torch.empty(2, 500, 8, 128, dtype=torch.bfloat16, device="meta")
print(json.dumps({
    "errors": [error(softcap=-1.0, causal=True), error(backend="sm90"),
        error(backend="sm80"), error(heads=True), error(window_size=3)],
    "explain": str(flash_ext.explain(q, q, q)),
    "supported": flash_ext.supported(q, q, q),
    "imagined": {d: str(flash_ext.explain(half, half, half, causal=True, device_info=d)) for d in ("sm80", "sm90", "sm120")},
    "results": [out.double().sum().item(), lse.double().sum().item(), q.grad.double().abs().sum().item()],
    "library_error": ops.library_error,
    "file": flash_ext.__file__,
}))
"""


def probe(package_parent: Path, **environment: str) -> dict:
    env = clean_environment(PYTHONPATH=str(package_parent), **environment)
    return json.loads(run(sys.executable, "-c", PROBE, cwd=package_parent, env=env).splitlines()[-1])


def same(a: dict, b: dict, *keys: str) -> None:
    for key in keys:
        assert a[key] == b[key], key


PORTABLE = ("errors", "explain", "supported", "results")


@pytest.fixture(scope="module")
def installed() -> dict:
    """What the package under test answers."""
    import flash_ext

    return probe(Path(flash_ext.__file__).resolve().parents[1])


def doctor(package_parent: Path) -> str:
    return run(sys.executable, "-m", "flash_ext", cwd=package_parent, env=clean_environment(PYTHONPATH=str(package_parent)))


def test_libcudart_hidden(tmp_path: Path, installed: dict) -> None:
    """A copy of the package whose library asks for a CUDA runtime that is not there, as on a machine without one."""
    import flash_ext

    package = tmp_path / "flash_ext"
    shutil.copytree(Path(flash_ext.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__", "*emulat*"))
    library = package / "_C.abi3.so"
    if not library.exists():
        pytest.skip("this install has no compiled library")
    needed = b"libcudart.so."
    binary = library.read_bytes()
    assert needed in binary
    library.write_bytes(binary.replace(needed, b"libnowhere.so"[: len(needed)]))
    hidden = probe(tmp_path)
    assert hidden["file"].startswith(str(tmp_path))
    assert "could not be loaded" in hidden["library_error"] and "libnowhere" in hidden["library_error"]
    same(hidden, installed, *PORTABLE, "imagined")
    assert "could not be loaded" in doctor(tmp_path)


def test_no_gpu(installed: dict) -> None:
    import flash_ext

    blind = probe(Path(flash_ext.__file__).resolve().parents[1], CUDA_VISIBLE_DEVICES="")
    same(blind, installed, *PORTABLE, "imagined", "library_error")


@pytest.mark.slow
def test_install_without_nvcc(sdist_tree: Path, tmp_path: Path, installed: dict) -> None:
    """pip installs the sdist, says what is missing and how to get it, and the package answers as any other does."""
    env = without_nvcc(tmp_path / "search")
    if finds_nvcc(env):
        env["FLASH_EXT_BUILD_CUDA"] = "0"  # compiler wheels lie in this very environment
    target = tmp_path / "site"
    log = run(
        sys.executable, "-m", "pip", "install", "-v", "--no-build-isolation", "--no-deps", "--no-index",
        "--target", target, sdist_tree,
        cwd=tmp_path, env=env,
    )  # fmt: skip
    if "FLASH_EXT_BUILD_CUDA" not in env:
        assert "no CUDA compiler was found" in log and "pip install 'nvidia-cuda-nvcc==13.0.*'" in log
    assert not list((target / "flash_ext").glob("_C*")) and list((target / "flash_ext").glob("_host*"))
    answers = probe(target)
    assert answers["file"].startswith(str(target))
    assert answers["library_error"].startswith("flash_ext was installed without an nvcc")
    same(answers, installed, *PORTABLE, "imagined")
    assert "nvcc" in doctor(target)


def compiled(log: str) -> set[str]:
    """The files that ninja made, by name."""
    steps = [line.split("] ", 1)[1].split() for line in log.splitlines() if line.startswith("[") and "] " in line]
    return {Path(words[1]).name for words in steps if len(words) == 2 and words[0] in ("nvcc", "cxx", "link")}


@pytest.mark.slow
def test_build_and_rebuild(sdist_tree: Path, toolchain: ModuleType) -> None:
    """One changed header compiles the units that include it, and nothing else; an unchanged tree compiles nothing."""
    if toolchain.find_cuda() is None:
        pytest.skip("no nvcc here")
    env = clean_environment(FLASH_EXT_VARIANTS=ROWS, TORCH_CUDA_ARCH_LIST="8.0+PTX;9.0a", MAX_JOBS="2")
    build = (sys.executable, "setup.py", "build_ext", "--inplace")
    log = run(*build, cwd=sdist_tree, env=env)
    kernels = {"small_sm80_bf16.o", "small_sm80_fp16.o"}
    assert kernels < compiled(log) and "ops.o" in compiled(log)
    assert "parallel jobs" in log and "2 variants in 2 units" in log and "found by" in log
    assert [p.name for p in (sdist_tree / "flash_ext").glob("_C*")] == ["_C.abi3.so"]

    assert compiled(run(*build, cwd=sdist_tree, env=env)) == set()
    header = sdist_tree / "csrc/common/bwd_preprocess.cuh"
    header.write_text(header.read_text() + "// changed\n")
    assert compiled(run(*build, cwd=sdist_tree, env=env)) == kernels | {"_C.abi3.so"}

    answers = probe(sdist_tree)
    assert answers["file"].startswith(str(sdist_tree)) and answers["library_error"] is None
    names = run(
        sys.executable,
        "-c",
        "from flash_ext import _host; print(*[v['name'] for v in _host.variants()])",
        cwd=sdist_tree,
        env=clean_environment(),
    )
    assert names.split() == ROWS.split(",")
    architectures = elf_architectures(sdist_tree / "flash_ext/_C.abi3.so", toolchain)
    assert architectures is None or architectures == {"sm_80"}

    # One row less: its unit goes, the other is not compiled again.
    env["FLASH_EXT_VARIANTS"] = ROWS.split(",")[0]
    rebuilt = compiled(run(*build, cwd=sdist_tree, env=env))
    assert not rebuilt & kernels and {"variant_table.o", "launchers.o", "_C.abi3.so"} <= rebuilt


def elf_architectures(library: Path, toolchain: ModuleType) -> set[str] | None:
    """Architectures of the machine code in a library; None where there is no cuobjdump."""
    tool = shutil.which("cuobjdump") or str(toolchain.find_cuda().nvcc.parent / "cuobjdump")
    if not Path(tool).exists():
        return None
    listing = run(tool, "--list-elf", library, cwd=library.parent)
    return {word.split(".")[-2] for word in listing.split() if word.endswith(".cubin")}


def test_a_compiler_of_another_major_is_refused(sdist_tree: Path, toolchain: ModuleType, tmp_path: Path) -> None:
    """torch.version.cuda is what torch was built for; pretend that it is another."""
    if toolchain.find_cuda() is None:
        pytest.skip("no nvcc here")
    code = (
        "import sys, runpy, torch; torch.version.cuda = '11.8'; folder = sys.argv[1]; "
        "sys.argv = ['setup.py', 'build_ext', '-b', folder, '-t', folder]; runpy.run_path('setup.py', run_name='__main__')"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=sdist_tree,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode != 0
    assert "but torch was built for CUDA 11.8: the majors must be equal" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("TORCH_CUDA_ARCH_LIST", "7.5", "compute capability 7.5 is below 8.0"),
        ("TORCH_CUDA_ARCH_LIST", "hopper", "cannot read 'hopper'"),
        ("FLASH_EXT_VARIANTS", "nothing*", "matches none of"),
        ("CUDA_HOME", "/nowhere", "CUDA_HOME=/nowhere holds no bin/nvcc"),
    ],
)
def test_a_wrong_setting_stops_the_build_with_one_sentence(
    sdist_tree: Path, tmp_path: Path, variable: str, value: str, words: str
) -> None:
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "-b", str(tmp_path), "-t", str(tmp_path)], cwd=sdist_tree,
        env=clean_environment(**{variable: value}), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode != 0 and words in result.stderr
    assert "Traceback" not in result.stderr, result.stderr[-2000:]
