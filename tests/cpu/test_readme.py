"""The README is true: its example runs, and its table says what the planner says."""

from __future__ import annotations

import contextlib
import inspect
import io
import itertools
import re
import types
from pathlib import Path
from unittest import mock

import pytest
import torch

import flash_ext
from flash_ext import dispatch

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
# A word of the table's first column -> devices that the planner knows.
GPUS = {
    "Hopper": ("sm90",),
    "Ampere A100": ("sm80", "sm100"),
    "Ampere RTX": ("sm86", "sm89", "sm120"),
    "CPU": ("cpu",),
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
HEAD_DIMS = (8, 36, 64, 80, 100, 128, 200, 256)
WIDE = {"dtype": torch.float32, "device": "meta"}
LENGTHS = torch.empty(4, dtype=torch.int32, device="meta")
CALLS = {
    "full": {}, "causal": {"causal": True}, "window": {"window_size": (128, 0)}, "softcap": {"softcap": 30.0},
    "sinks": {"sinks": torch.empty(4, **WIDE)}, "alibi": {"alibi_slopes": torch.empty(4, **WIDE)},
    "bias": {"k_bias": torch.empty(2, 512, **WIDE)}, "max": {"return_max_logit": True},
    "together": {
        "causal": True, "softcap": 9.0, "sinks": torch.empty(4, **WIDE), "k_bias": torch.empty(2, 512, **WIDE),
        "alibi_slopes": torch.empty(4, **WIDE), "window_size": (9, 9),
    },
}  # fmt: skip


def run_example(number: int) -> tuple[dict, str]:
    """The names that the README's example defines, and what it prints."""
    example = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[number]
    assert len([line for line in example.splitlines() if line.strip()]) <= 10
    names: dict = {"torch": torch, "flash_ext": flash_ext}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(example, "README.md", "exec"), names)
    return names, printed.getvalue()


def test_the_example_runs():
    names, printed = run_example(0)
    q, k, v = (names[name].detach().double().transpose(1, 2) for name in "qkv")
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(names["out"].detach().double().transpose(1, 2), expected, rtol=2**-8, atol=1e-6)
    assert names["q"].grad.abs().max() > 0
    assert "torch.Size([2, 1024, 8, 64])" in printed


def test_the_packed_example_runs():
    names, _ = run_example(1)
    assert names["ends"].tolist() == [0, 5, 5, 305] and names["lse"].shape == (8, 305)
    for rows in (slice(0, 5), slice(5, 305)):
        alone = flash_ext.attention(*(names[name][None, rows] for name in "qkv"), causal=True, sinks=names["sinks"])
        assert torch.equal(names["out"][rows], alone[0])


def test_the_tables_name_every_function_and_option():
    functions = set(re.findall(r"^\| .*", README, re.MULTILINE))
    for name in (n for n in flash_ext.__all__ if inspect.isfunction(getattr(flash_ext, n))):
        assert any(re.search(rf"`{name}\(", row) for row in functions), name
    for option in inspect.signature(flash_ext.attention).parameters:
        assert any(re.search(rf"`{option}\b", row) for row in functions) or option in "qkv", option


def cells_of(gpu: str) -> list[str]:
    """[forward, backward] of a row of the table."""
    rows = [line.split("|") for line in README.splitlines() if line.startswith(f"| {gpu}")]
    assert len(rows) == 1, f"the table has no single row for {gpu}"
    return [cell.strip() for cell in rows[0][2:4]]


def backend_of(cell: str, head_dim: int) -> str:
    """What a cell promises: 'reference', 'kernel NAME' or 'kernel NAME up to head_dim N'."""
    if cell == "reference":
        return cell
    name, largest = re.fullmatch(r"kernel (\w+)(?: up to head_dim (\d+))?", cell).groups()
    return name if head_dim <= int(largest or 256) else "reference"


def planned(device: str, dtype: torch.dtype, head_dim: int, kind: str, options: dict) -> list[str]:
    """[forward, backward]: the backend that the planner takes."""
    front = (512,) if kind == "packed" else (1, 512)
    q = torch.empty(*front, 4, head_dim, dtype=dtype, device="meta")
    extra = {
        "dense": {}, "packed": {"cu_seqlens_q": LENGTHS, "cu_seqlens_k": LENGTHS}, "split": {"split_boundaries": (0, 100, 512)}
    }[kind]  # fmt: skip
    if kind != "packed" and "k_bias" in options:
        options = {**options, "k_bias": options["k_bias"][None]}
    call = dispatch._checked(q, q[..., :2, :], q[..., :2, :], {**options, **extra})
    host, planned = dispatch._host(), []
    for plan in (host.plan_fwd, host.plan_bwd):
        with mock.patch.object(dispatch, "_host", lambda plan=plan: types.SimpleNamespace(plan_fwd=plan)):
            planned.append(dispatch._plan(device, call, None)["backend"])
    return planned


@pytest.mark.parametrize("gpu", GPUS)
def test_the_table_says_what_the_planner_says(gpu):
    """What has a kernel for a GPU is what the row and the paragraph below it promise, forward and backward."""
    if not any(row["op"] == "bwd" for row in host_variants()):
        pytest.skip("this build has no kernels")
    cells = cells_of(gpu)
    for device in GPUS[gpu]:
        for dtype, head_dim, kind in itertools.product(DTYPES, HEAD_DIMS, ("dense", "packed", "split")):
            promised = dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0
            expected = [backend_of(cell, head_dim) if promised else "reference" for cell in cells]
            for name, options in CALLS.items():
                if kind == "split" and ("sinks" in options or name == "max"):
                    continue
                assert planned(device, dtype, head_dim, kind, options) == expected, (device, dtype, head_dim, kind, name)


def host_variants() -> list[dict]:
    return dispatch._host().variants()


def test_files_that_the_readme_links_to_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_variables_that_the_readme_names_are_read_somewhere():
    sources = "".join(p.read_text() for folder in ("tools", "csrc", "flash_ext") for p in (ROOT / folder).glob("*.py"))
    sources += (ROOT / "setup.py").read_text()
    for name in set(re.findall(r"`((?:FLASH_EXT|TORCH_CUDA|MAX_JOBS|CUDA_)\w*)", README)):
        assert name in sources, name
