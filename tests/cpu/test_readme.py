"""The README is true: its example runs, and its table says what the planner says."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch

import flash_ext

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
# A word of the table's first column -> devices that the planner knows.
GPUS = {
    "Hopper": ("sm90",),
    "Ampere": ("sm80", "sm86"),
    "Ada": ("sm89",),
    "Blackwell": ("sm100", "sm120"),
    "CPU": ("cpu",),
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
HEAD_DIMS = (8, 36, 64, 80, 100, 128, 200, 256)
EVERY_HEAD_DIM = "every head_dim that is a multiple of 8"
MASKS = {"full": {}, "causal": {"causal": True}, "window": {"window_size": (128, 0)}, "softcap": {"softcap": 30.0}}


def test_the_example_runs():
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    assert len([line for line in example.splitlines() if line.strip()]) <= 10
    names: dict = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(example, "README.md", "exec"), names)
    q, k, v = (names[name].detach().double().transpose(1, 2) for name in "qkv")
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(names["out"].detach().double().transpose(1, 2), expected, rtol=2**-8, atol=1e-6)
    assert names["q"].grad.abs().max() > 0
    assert "torch.Size([2, 1024, 8, 64])" in printed.getvalue()


def forward_of(gpu: str) -> str:
    rows = [line.split("|") for line in README.splitlines() if line.startswith(f"| {gpu}")]
    assert len(rows) == 1, f"the table has no single row for {gpu}"
    return rows[0][2].strip()


@pytest.mark.parametrize("gpu", GPUS)
def test_the_table_says_what_the_planner_says(gpu):
    """Every dtype, head_dim and mask is compiled for a GPU exactly if the row names it."""
    if not any(row["op"] == "fwd" for row in host_variants()):
        pytest.skip("this build has no kernels")
    cell = forward_of(gpu)
    for device in GPUS[gpu]:
        if device == "cpu":
            assert cell == "reference"
            continue
        for dtype in DTYPES:
            for head_dim in HEAD_DIMS:
                for mask, options in MASKS.items():
                    q = torch.empty(2, 512, 4, head_dim, dtype=dtype, device="meta")
                    explanation = flash_ext.explain(q, q[:, :, :2], q[:, :, :2], device_info=device, **options)
                    words = (str(dtype).removeprefix("torch."), mask)
                    covered = head_dim % 8 == 0 and EVERY_HEAD_DIM in cell
                    promised = covered and all(re.search(rf"\b{word}\b", cell) for word in words)
                    assert promised == (explanation.backend != "reference"), f"{device} {head_dim} {words}: {explanation}"


def host_variants() -> list[dict]:
    from flash_ext.dispatch import _host

    return _host().variants()


def test_files_that_the_readme_links_to_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_variables_that_the_readme_names_are_read_somewhere():
    sources = "".join(p.read_text() for folder in ("tools", "csrc", "flash_ext") for p in (ROOT / folder).glob("*.py"))
    sources += (ROOT / "setup.py").read_text()
    for name in set(re.findall(r"`((?:FLASH_EXT|TORCH_CUDA|MAX_JOBS|CUDA_)\w*)", README)):
        assert name in sources, name
