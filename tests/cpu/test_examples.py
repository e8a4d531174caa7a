"""The examples run, in small, and the checks they make can fail."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

import flash_ext

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--steps", "3", "--batch", "2", "--seqlen", "40", "--layers", "1", "--width", "32", "--device", "cpu"]


@pytest.fixture
def train_language_model():
    for package in ("matplotlib", "tqdm"):
        pytest.importorskip(package, reason="the extra 'demo' is not installed")
    path = ROOT / "examples" / "train_language_model.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_trains_and_draws(train_language_model, tmp_path, capsys):
    assert train_language_model.main([*SMALL, "--out", str(tmp_path / "new"), "--min-gain", "-10"]) == 0
    assert (tmp_path / "new" / "curves.png").read_bytes().startswith(b"\x89PNG")
    output = capsys.readouterr().out
    for word in ("backend    reference", "tokens/s", "validation", "no attention"):
        assert word in output


def test_plain_needs_no_packages_and_keeps_the_losses(train_language_model, tmp_path, capsys, monkeypatch):
    for package in ("matplotlib", "matplotlib.figure", "tqdm"):
        monkeypatch.setitem(sys.modules, package, None)
    assert train_language_model.main([*SMALL, "--plain", "--out", str(tmp_path), "--min-gain", "-10"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["losses.csv"]
    header, *rows = (line.split(",") for line in (tmp_path / "losses.csv").read_text().splitlines())
    assert header == ["step", "flash_ext", "torch", "no attention"] and [row[0] for row in rows] == ["1", "2", "3"]
    assert all(abs(float(row[1]) - float(row[2])) < 1e-4 for row in rows) and "curves" not in capsys.readouterr().out


def test_a_wrong_attention_is_found(train_language_model, tmp_path, capsys, monkeypatch):
    right = flash_ext.attention
    monkeypatch.setattr(flash_ext, "attention", lambda q, k, v, **options: right(q, k, v, causal=False))
    assert train_language_model.main([*SMALL, "--out", str(tmp_path), "--min-gain", "-10"]) == 1
    assert "FAILED: flash_ext and torch differ by" in capsys.readouterr().err


def test_nan_is_found(train_language_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(flash_ext, "attention", lambda q, k, v, **options: v * float("nan"))
    assert train_language_model.main([*SMALL, "--out", str(tmp_path), "--min-gain", "-10"]) == 1
    errors = capsys.readouterr().err
    assert "differ by nan at step 1" in errors
    assert "lowers the validation loss by nan" in errors


def test_attention_must_earn_its_place(train_language_model, tmp_path, capsys):
    assert train_language_model.main([*SMALL, "--out", str(tmp_path)]) == 1
    assert "nats; at least 0.3 is asked" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "must be at least 1"),
        (["--seed", "-1"], "must be at least 0"),
        (["--device", "gpu"], "torch knows no device 'gpu'"),
        (["--device", "cuda:99"], "torch finds"),
        (["--width", "100", "--heads", "3"], "must be a multiple of twice --heads"),
        (["--out", __file__], "--out"),
    ],
)
def test_bad_options_get_one_line(train_language_model, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        train_language_model.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seqlen", "100000000"], "holds too little text"),
        (["--width", "1024", "--heads", "2"], "q.head_dim must lie in [1, 256], got 512"),
    ],
)
def test_what_cannot_be_trained_is_said(train_language_model, tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=message.replace("[", r"\[")):
        train_language_model.main([*arguments, "--device", "cpu", "--out", str(tmp_path)])
