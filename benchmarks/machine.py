"""Where and with what a run was made: card, driver, clocks, versions, commit."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import flash_ext

from .nvml import NvmlProvider, Provider, Unavailable

ROOT = Path(__file__).resolve().parent.parent
COMMIT_VARIABLE = "FLASH_EXT_COMMIT"  # for a copy of the tree without its history


def provider_of(device: str) -> tuple[Provider | None, str]:
    """NVML's view of cuda:0, or None and why."""
    if device != "cuda":
        return None, "no GPU"
    properties = torch.cuda.get_device_properties(0)
    bus = None
    if hasattr(properties, "pci_bus_id"):
        bus = f"{properties.pci_domain_id:08x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
    try:
        return NvmlProvider(bus), ""
    except Unavailable as error:
        return None, str(error)


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=30)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def commit() -> str:
    """The commit, with '+changes' where tracked files differ from it; 'unknown' without history."""
    named = os.environ.get(COMMIT_VARIABLE) or _git("rev-parse", "--short=12", "HEAD")
    if not named:
        return "unknown"
    changed = not os.environ.get(COMMIT_VARIABLE) and _git("status", "--porcelain", "--untracked-files=no")
    return named + ("+changes" if changed else "")


def _cpu_model() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def describe(device: str, provider: Provider | None) -> dict[str, Any]:
    found: dict[str, Any] = {
        "device": device,
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "flash_ext": flash_ext.__version__,
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "sms": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found | (provider.describe() if provider else {})


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
