"""examples/generate.py: the same tokens with a cache and without, and a broken cache is found."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

import flash_ext

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SMALL = ["--device", "cpu", "--steps", "8", "--batch", "4", "--seqlen", "48", "--layers", "2", "--width", "32", "--tokens", "20"]


@pytest.fixture
def generate(monkeypatch):
    for package in ("matplotlib", "tqdm"):
        pytest.importorskip(package, reason="the extra 'demo' is not installed")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    spec = importlib.util.spec_from_file_location("generate", EXAMPLES / "generate.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "generate", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page_size", (1, 7, 16, 64))
def test_it_writes_the_same_with_a_cache(generate, capsys, page_size):
    assert generate.main([*SMALL, "--page-size", str(page_size), "--prompts", "3"]) == 0
    output = capsys.readouterr().out
    assert "3 of 3 sequences have the same tokens with and without a cache" in output
    assert output.count("tokens/s") == 2


def test_a_broken_cache_is_found(generate, capsys, monkeypatch):
    right = flash_ext.attention_with_kvcache

    def forgetful(q, k_cache, v_cache, k, v, **options):
        return right(q, k_cache, v_cache, k, v, **options, window_size=(0, 0))

    monkeypatch.setattr(flash_ext, "attention_with_kvcache", forgetful)
    assert generate.main([*SMALL, "--steps", "60"]) == 1
    assert "FAILED: logits differ by" in capsys.readouterr().err


def test_another_token_is_found(generate, capsys, monkeypatch):
    right = generate.write_with_cache

    def other(*arguments):
        written = right(*arguments)
        written.tokens[0, -1] ^= 1
        return written

    monkeypatch.setattr(generate, "write_with_cache", other)
    assert generate.main([*SMALL, "--prompts", "1"]) == 1
    assert "FAILED: sequence 0 has another token at 47" in capsys.readouterr().err


def test_bad_options_get_one_line(generate, capsys):
    for arguments, message in (
        (["--tokens", "48"], "--tokens must be below --seqlen, got 48 and 48"),
        (["--width", "30", "--heads", "4"], "--width must be a multiple of twice --heads"),
        (["--page-size", "0"], "must be at least 1"),
    ):
        with pytest.raises(SystemExit) as stop:
            generate.main([*SMALL, *arguments])
        assert stop.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]
