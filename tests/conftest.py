"""Shared by every test: few threads, the gpu marker, and modules of this folder importable by name."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

# flash_ext reads FLASH_EXT_EMULATE at import: emulated tests and all others need a process each.
_EMULATED = "emulated"
collect_ignore = (
    [entry.name for entry in Path(__file__).parent.iterdir() if entry.name not in (_EMULATED, "conftest.py")]
    if os.environ.get("FLASH_EXT_EMULATE")
    else [_EMULATED]
)

torch.set_num_threads(1)  # the tensors of most tests are too small for more


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU, and torch sees none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _fallbacks_not_yet_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test sees the first FallbackWarning of a reason, whatever ran before it."""
    from flash_ext import env

    monkeypatch.setattr(env, "_reasons_already_given", set())
    monkeypatch.delenv("FLASH_EXT_STRICT", raising=False)


def _module(path: Path) -> ModuleType:
    """A module of the build, which is not installed, under a name of its own."""
    spec = importlib.util.spec_from_file_location(f"flash_ext_build_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def variants_module() -> ModuleType:
    """csrc/variants.py."""
    return _module(ROOT / "csrc" / "variants.py")


@pytest.fixture(scope="session")
def toolchain() -> ModuleType:
    """tools/toolchain.py."""
    return _module(ROOT / "tools" / "toolchain.py")
