"""Rules about the sources that no compiler checks: who includes what, sizes, nothing generated, docstrings."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
from pathlib import Path

import pytest

import flash_ext

ROOT = Path(__file__).resolve().parent.parent
SKIPPED = {".git", ".venv", "build", "dist", "output", "__pycache__", "third_party"}
MAX_LINES = 700
CXX = {".h", ".cpp", ".cuh", ".cu"}


def files(folder: str = ".") -> list[Path]:
    """The checkout's own files: what git tracks or would track; in an exported tree, everything but build products."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", folder], cwd=ROOT, capture_output=True, text=True
    )
    names = listed.stdout.splitlines() if listed.returncode == 0 else [str(p.relative_to(ROOT)) for p in (ROOT / folder).rglob("*")]
    paths = [ROOT / name for name in names if not SKIPPED & set(Path(name).parts)]
    return [path for path in paths if path.is_file()]


def cxx_sources(folder: str) -> dict[str, str]:
    return {str(p.relative_to(ROOT)): p.read_text() for p in files(folder) if p.suffix in CXX}


def includes(text: str) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', text, re.MULTILINE)


def who_includes(pattern: str) -> set[str]:
    matches = re.compile(pattern)
    everything = {**cxx_sources("csrc"), **cxx_sources("tests")}
    return {name for name, text in everything.items() if any(matches.match(i) for i in includes(text))}


def test_the_rules_see_the_sources() -> None:
    """A rule over no files holds always."""
    assert {"csrc/ops.cpp", "csrc/host/plan.cpp", "csrc/common/params.h"} <= set(cxx_sources("csrc"))
    assert who_includes(r"torch/") and who_includes(r"pybind11/")


def test_torch_headers_stay_in_the_host_code() -> None:
    allowed = re.compile(r"csrc/(host/.*|ops\.cpp)$")
    assert [name for name in who_includes(r"(torch|ATen|c10)/") if not allowed.match(name)] == []


def test_only_the_stable_headers_of_torch_are_used() -> None:
    stable = re.compile(r"torch/(csrc/stable|csrc/inductor/aoti_torch/c|headeronly)/")
    used = {i for text in cxx_sources("csrc").values() for i in includes(text) if re.match(r"(torch|ATen|c10)/", i)}
    assert [i for i in used if not stable.match(i)] == []


def test_pybind11_stays_in_the_host_module() -> None:
    bindings = re.compile(r"csrc/host_module\.cpp$|tests/emulator/")
    assert [name for name in who_includes(r"pybind11/") if not bindings.match(name)] == []


def test_cutlass_stays_in_the_hopper_primitives() -> None:
    """tests/layouts compares our index maps with CuTe's; the emulator's tests compare its instructions with theirs."""
    allowed = re.compile(r"csrc/sm90/primitives\.cuh$|tests/(layouts|emulator)/")
    assert [name for name in who_includes(r"(cutlass|cute)/") if not allowed.match(name)] == []


def test_device_code_knows_nothing_of_the_host_code() -> None:
    """Each layer knows only the structs of the one above it: kernels see params, never tensors or plans. The launcher at
    the end of a kernel's file may encode tensor maps."""
    device = {n: t for n, t in cxx_sources("csrc").items() if n.startswith(("csrc/common/", "csrc/sm"))}
    assert {i for t in device.values() for i in includes(t) if i.startswith("host/")} <= {"host/tma.h"}
    planner = {n: cxx_sources("csrc")[n] for n in ("csrc/host/plan.cpp", "csrc/host/plan.h", "csrc/host/problem.h")}
    assert {n: i for n, t in planner.items() for i in includes(t) if re.match(r"(torch|cuda)", i)} == {}


def test_no_template_has_two_bool_parameters() -> None:
    found = []
    for name, text in cxx_sources("csrc").items():
        for head in re.findall(
            r"template\s*<([^{};]*?)>\s*(?:class|struct|using|inline|constexpr|__|FX_|void|auto|[A-Za-z_])",
            text.replace("\\\n", "\n"),  # in macros too
        ):
            if len(re.findall(r"\bbool\b", head)) > 1:
                found.append(f"{name}: template <{head}>")
    assert found == []


def test_no_file_is_long() -> None:
    text_suffixes = CXX | {".py", ".md", ".toml"}
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in files() if p.suffix in text_suffixes}
    assert len(lengths) > 20
    assert {name: n for name, n in lengths.items() if n > MAX_LINES} == {}


def test_headers_are_included_once() -> None:
    assert [n for n, t in cxx_sources("csrc").items() if n.endswith((".h", ".cuh")) and "#pragma once" not in t] == []


def test_nothing_generated_is_committed() -> None:
    """No .cu (every translation unit with kernels is generated), no object, no library."""
    assert [str(p.relative_to(ROOT)) for p in files("csrc") if p.suffix == ".cu"] == []
    assert [
        str(p.relative_to(ROOT)) for p in files() if p.suffix in {".so", ".o", ".a", ".cubin", ".ptx", ".pyc", ".egg-info"}
    ] == []


def test_every_variable_read_is_documented() -> None:
    """Environment variables of flash_ext stand in the table of env.py, in setup.py, or in the document of what reads them."""
    python = {str(p.relative_to(ROOT)): p.read_text() for p in files() if p.suffix == ".py" and "tests" not in p.parts}
    read = {m for text in python.values() for m in re.findall(r"environ(?:\.get\(|\[)[\"'](FLASH_EXT_\w+)", text)}
    documented = "".join(text for name, text in python.items() if name in ("flash_ext/env.py", "setup.py"))
    documented += "".join(p.read_text() for p in files() if p.suffix == ".md")
    assert read and {name for name in read if documented.count(name) < 1} == set()


@pytest.mark.parametrize("name", flash_ext.__all__)
def test_public_names_have_docstrings(name: str) -> None:
    thing = getattr(flash_ext, name)
    assert thing.__doc__ and len(thing.__doc__) > 60
    if inspect.isfunction(thing):
        signature = inspect.signature(thing)
        named = [p.name for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        assert all(re.search(rf"\b{parameter}\b", thing.__doc__) for parameter in named)
        assert signature.return_annotation is not inspect.Signature.empty


def test_the_signatures_are_the_promised_ones() -> None:
    scores = "sinks: 'Tensor | None' = None, alibi_slopes: 'Tensor | None' = None, k_bias: 'Tensor | None' = None, "
    options = (
        "causal: 'bool' = False, softmax_scale: 'float | None' = None, window_size: 'tuple[int, int]' = (-1, -1), "
        f"softcap: 'float' = 0.0, {scores}return_lse: 'bool' = False, return_max_logit: 'bool' = False, "
        "deterministic: 'bool | None' = None, backend: 'str | None' = None"
    )
    qkv = "(q: 'Tensor', k: 'Tensor', v: 'Tensor', *, "
    sequences = "cu_seqlens_q: 'Tensor', cu_seqlens_k: 'Tensor', " + "".join(
        f"max_seqlen_{side}: 'int | Tensor | None' = None, " for side in "qk"
    )
    sequences += "".join(f"{name}_{side}: 'Tensor | None' = None, " for name in ("seqused", "leftpad") for side in "qk")
    assert str(inspect.signature(flash_ext.attention)).startswith(qkv + options)
    assert str(inspect.signature(flash_ext.attention_varlen)).startswith(f"{qkv}{sequences}validate: 'bool' = False, {options}")
    assert str(inspect.signature(flash_ext.merge_attention)).startswith(
        "(outs: 'Tensor | Sequence[Tensor]', lses: 'Tensor | Sequence[Tensor]', sinks: 'Tensor | None' = None)"
    )


def test_python_modules_open_with_a_docstring() -> None:
    for folder in ("flash_ext", "tools", "examples", "tests/cpu", "tests/gpu"):
        for path in files(folder):
            if path.suffix == ".py" and path.read_text().strip():
                assert ast.get_docstring(ast.parse(path.read_text())), path


def test_headers_open_with_their_purpose() -> None:
    assert [
        n
        for n, t in cxx_sources("csrc").items()
        if not t.startswith("// ") and n != "csrc/host_module.cpp" and n.endswith(("h", "cuh"))
    ] == []


def test_no_leftovers() -> None:
    marks = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X", "HA" + "CK")) + r")\b")
    mine = [p for p in files() if p.suffix in CXX | {".py"}]
    assert [str(p.relative_to(ROOT)) for p in mine if marks.search(p.read_text())] == []
