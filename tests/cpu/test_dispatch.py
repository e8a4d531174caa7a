"""No GPU from compute capability 8.0 up meets a binary without an image for it: what the planner picks for a GPU is in the built
library, as machine code that the GPU runs or as PTX that its driver compiles."""

from __future__ import annotations

import re
import struct
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch

import flash_ext
from flash_ext import _host

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "emulator"))

import harness

FATBIN_HEADER = struct.pack("<IHH", 0xBA55ED50, 1, 16)  # magic number, version, bytes of the header
LIBRARY = Path(flash_ext.__file__).parent / "_C.abi3.so"
# Compute capability -> shared memory that a CTA may have, KiB (CUDA programming guide, table of technical specifications).
CAPABILITIES = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
DIMS = ((64, 64), (40, 40), (96, 96), (128, 128), (192, 128), (256, 256), (8, 256))


@pytest.fixture(scope="module")
def ptx_targets() -> dict[str, set[str]]:
    """Kernel -> the targets of the PTX that the library holds of it."""
    if not LIBRARY.is_file():
        pytest.skip("built without kernels")
    found: dict[str, set[str]] = defaultdict(set)
    binary = LIBRARY.read_bytes()
    for image in re.finditer(re.escape(FATBIN_HEADER), binary):
        (size,) = struct.unpack_from("<Q", binary, image.start() + 8)
        fatbin = binary[image.start() : image.start() + 16 + size]
        for kind, target, text in harness.emulator().parse_fatbin(fatbin):
            for name in re.findall(r"^\.visible \.entry (\w+)\(", text if kind == "ptx" else "", re.MULTILINE):
                found[name].add(target)
    return found


def runs(targets: set[str], capability: int) -> bool:
    """Whether a driver can compile one of these for the GPU: 'a' targets are for that architecture alone."""
    return any(int(target[3:-1]) == capability if target.endswith("a") else int(target[3:]) <= capability for target in targets)


def test_every_row_is_in_the_library_as_ptx_of_its_group(ptx_targets: dict[str, set[str]]) -> None:
    for row in _host.variants():
        assert ptx_targets[row["name"]] == {{80: "sm_80", 89: "sm_89", 90: "sm_90a"}[row["arch"]]}, row["name"]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("options", ({}, {"causal": True}, {"window_size": (40, 3)}, {"softcap": 2.0}), ids=str)
def test_what_is_planned_runs(capability: int, options: dict, ptx_targets: dict[str, set[str]]) -> None:
    device = f"sm{capability}:100:{CAPABILITIES[capability] * 1024}"
    for dtype in (torch.bfloat16, torch.float16):
        for head_dim, head_dim_v in DIMS:
            q = torch.empty(2, 300, 4, head_dim, dtype=dtype, device="meta")
            k, v = (torch.empty(2, 400, 2, d, dtype=dtype, device="meta") for d in (head_dim, head_dim_v))
            check_plan(flash_ext.explain(q, k, v, device_info=device, **options), capability, ptx_targets)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("options", ({}, {"causal": True, "flush_every": 0}, {"window_size": (40, 3)}, {"softcap": 2.0}), ids=str)
def test_what_is_planned_of_fp8_runs(capability: int, options: dict, ptx_targets: dict[str, set[str]]) -> None:
    device = f"sm{capability}:100:{CAPABILITIES[capability] * 1024}"
    for head_dim in (16, 64, 96, 128, 192, 256):
        q, k = (torch.empty(2, 300, heads, head_dim, dtype=torch.float8_e4m3fn, device="meta") for heads in (4, 2))
        for scale in (None, torch.empty(2, 2, 5, device="meta")):
            plan = flash_ext.explain(q, k, k, k_descale=scale, device_info=device, **options)
            check_plan(plan, capability, ptx_targets)
            if plan.backend == "reference":
                assert capability < 89 or "TORCH_CUDA_ARCH_LIST" in str(plan.rejected)


def check_plan(plan: flash_ext.Explanation, capability: int, ptx_targets: dict[str, set[str]]) -> None:
    """What is planned has an image; what is not says why, and where the build is the reason, its options."""
    if plan.backend == "reference":
        rejected = " ".join(reason for reasons in plan.rejected.values() for reason in reasons)
        assert "compiled" in rejected or "TORCH_CUDA_ARCH_LIST" in rejected or "compute capability" in rejected, rejected
    else:
        assert runs(ptx_targets[plan.variant], capability), f"{plan.variant} on a GPU of {capability}"


def test_tiles_fit_the_shared_memory_of_the_device() -> None:
    """A row made for more shared memory than the device has is never planned."""
    q = torch.empty(1, 300, 2, 128, dtype=torch.bfloat16, device="meta")
    for capability, kib in CAPABILITIES.items():
        plan = flash_ext.explain(q, q, q, device_info=f"sm{capability}:100:{kib * 1024}")
        if found := re.search(r"_smem(\d+)$", plan.variant):
            assert int(found[1]) <= kib
