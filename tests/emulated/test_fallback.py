"""A call that no kernel covers, on what takes itself for a GPU: the warning, strict mode, and errors that keep their type."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch

import flash_ext

WORDS = "attention (forward) runs on the reference backend: "


@pytest.fixture
def inputs() -> list[torch.Tensor]:
    """float32: no kernel takes it."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 33, 2, 64, generator=generator).requires_grad_() for _ in range(3)]


def test_it_warns_once_with_every_reason(inputs: list[torch.Tensor]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            flash_ext.attention(*inputs).sum().backward()
    texts = [str(w.message) for w in caught if w.category is flash_ext.FallbackWarning]
    assert len(texts) == 2 and texts[0].startswith(WORDS) and texts[1].startswith(WORDS.replace("forward", "backward"))
    for backend, reasons in flash_ext.supported(*inputs).items():
        assert all(reason in texts[0] for reason in reasons), backend


def test_a_warning_made_an_error_stays_a_warning(inputs: list[torch.Tensor]) -> None:
    """pytest's own filter (pyproject.toml) turns a FallbackWarning into an exception, which crosses the compiled op."""
    with pytest.raises(flash_ext.FallbackWarning, match=r"no compiled kernel takes float32|has no forward kernel"):
        flash_ext.attention(*inputs)


def test_strict_mode(inputs: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_EXT_STRICT", "1")
    for _ in range(2):
        with pytest.raises(flash_ext.FallbackWarning, match="FLASH_EXT_STRICT=1") as info:
            flash_ext.attention(*inputs)
        assert str(info.value).startswith(WORDS)
    with torch.no_grad(), pytest.raises(flash_ext.FallbackWarning, match="FLASH_EXT_STRICT=1"):
        flash_ext.attention(*inputs)
    assert flash_ext.attention(*inputs, backend="reference").requires_grad


def test_strict_mode_in_the_backward(inputs: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = flash_ext.attention(*inputs)
    monkeypatch.setenv("FLASH_EXT_STRICT", "1")
    with pytest.raises(flash_ext.FallbackWarning, match=r"attention \(backward\).*FLASH_EXT_STRICT=1"):
        out.sum().backward()


def test_strict_mode_compiled(inputs: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    monkeypatch.setenv("FLASH_EXT_STRICT", "1")
    compiled = torch.compile(flash_ext.attention, backend="aot_eager", fullgraph=True)
    with pytest.raises((flash_ext.FallbackWarning, RuntimeError), match=r"takes float32|no forward kernel"):
        compiled(*(t.detach() for t in inputs))


def test_an_unavailable_backend_says_why(inputs: list[torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="backend 'sm90' cannot run this call; these can: reference"):
        flash_ext.attention(*inputs, backend="sm90")
    with pytest.raises(RuntimeError, match="backend 'sm90' cannot run this call; sm90: "):
        torch.ops.flash_ext.fwd(*(t.detach() for t in inputs), *(None,) * 9, 1.0, False, -1, -1, 0.0, (), False, False, "sm90")


@pytest.mark.parametrize(
    "variable, value, words",
    [
        ("FLASH_EXT_EMULATE", "sm75", "sm80, sm86, sm89, sm90 or sm120, got 'sm75'"),
        ("FLASH_EXT_EMULATE_SMS", "0", "got '0'"),
        ("FLASH_EXT_EMULATE_SEED", "-1", "got '-1'"),
        ("FLASH_EXT_EMULATE_SCHEDULE", "fast", "late, random or adversarial, got 'fast'"),
        ("FLASH_EXT_EMULATE_CHECKS", "yes", "0 or 1, got 'yes'"),
        ("FLASH_EXT_EMULATE_THREADS", "0", "from 1 to 1024, got '0'"),
    ],
)
def test_a_gpu_that_cannot_be_emulated_is_one_clear_error(variable: str, value: str, words: str) -> None:
    process = subprocess.run(
        [sys.executable, "-c", "import flash_ext"], env={**os.environ, variable: value}, capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 1
    assert process.stderr.splitlines()[-1].startswith(f"ValueError: {variable} must be") and words in process.stderr
