"""python -m flash_ext: what is installed, what it can run on, and the first thing to do when something is missing."""

from __future__ import annotations

import json
import platform

import torch

from . import __version__, env, ops
from .dispatch import _host


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return []
    names = []
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        names.append(f"cuda:{index} {p.name}, compute capability {p.major}.{p.minor}, {p.multi_processor_count} SMs")
    return names


def _first_thing_to_do(build: dict | None, variants: list[dict], gpus: list[str]) -> str:
    if build is None:
        return f"flash_ext is not built here; {ops.how_to_install()}"
    if build["cuda"] is None:
        return (
            "built without nvcc, so every call runs on the reference. Install a CUDA compiler (the toolkit, or the PyPI "
            "wheels of the extra 'compiler': pip install 'flash_ext[compiler]') and install flash_ext again from its "
            "checkout with --no-build-isolation"
        )
    if ops.library_error is not None:
        return f"the kernels cannot be loaded: {ops.library_error}. Is torch a CUDA build of CUDA {build['cuda'].split('.')[0]}?"
    if not gpus:
        return "no GPU is visible to torch: calls on CPU tensors run on the reference; 'explain' can imagine a GPU"
    if not any(row["op"] == "fwd" for row in variants):
        return "this version has no attention kernel yet: calls on a GPU run on the reference"
    return "nothing: ready"


def main() -> None:
    try:
        host = _host()
        build = json.loads(host.build_info_json)
        variants = host.variants() if build["cuda"] else []  # without nvcc the planner knows rows that were not compiled
    except RuntimeError:
        build, variants = None, []
    gpus = _gpus()
    code = ", ".join(build["sass"]) if build and build["sass"] else "none"
    if build and "sm80" in build["architectures"]:
        code += " and PTX of compute_80 and (FP8) compute_89"
    rows = [
        ("flash_ext", __version__),
        ("python", platform.python_version()),
        ("torch", f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})"),
        ("built with", f"CUDA {build['cuda'] or 'none'}, torch {build['torch']}, {build['compiler']}" if build else "not built"),
        ("code for", code),
        ("kernels", "loaded" if ops.library_error is None else ops.library_error),
        ("GPUs", "; ".join(gpus) or "none"),
    ]  # fmt: skip
    if env.EMULATE:
        rows.append(("emulating", f"{env.EMULATE} with {env.EMULATE_SMS} SMs: calls on CPU tensors run in the emulator"))
    for name, value in rows:
        print(f"{name:11} {value}")
    print(f"{'variants':11} {len(variants)}")
    for row in variants:
        tile = f"tile {row['tile'][0]} x {row['tile'][1]}" if row["tile"][1] else f"{row['tile'][0]} rows a CTA"
        print(f"            {row['name']}  ({tile})")
    print(f"{'to do':11} {_first_thing_to_do(build, variants, gpus)}")


if __name__ == "__main__":
    main()
