"""What the machine itself can do, measured in the same run: copying memory, and matrix products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .presets import Case
from .timing import Stopwatch, time_interleaved


@dataclass(frozen=True)
class Ceilings:
    """copy_gb_s counts the bytes read and the bytes written; products in TFLOP/s by dtype, absent where not to be had."""

    copy_gb_s: float
    tflops: dict[str, float]
    matrix: int  # the products are of square matrices of this size

    def seconds(self, case: Case) -> float | None:
        """The least time that these ceilings allow a case; None where the dtype's product was not measured."""
        both = self._products_and_bytes(case)
        return None if both is None else max(both)

    def limit(self, case: Case) -> str | None:
        """What takes that time, 'products' or 'memory'."""
        both = self._products_and_bytes(case)
        return None if both is None else "products" if both[0] > both[1] else "memory"

    def _products_and_bytes(self, case: Case) -> tuple[float, float] | None:
        product = self.tflops.get("bf16" if case.dtype == "fp16" else case.dtype)
        if product is None:
            return None
        return case.flops() / (product * 1e12), case.bytes_moved() / (self.copy_gb_s * 1e9)

    def as_dict(self) -> dict[str, Any]:
        return {"copy_gb_s": self.copy_gb_s, "matrix": self.matrix, **{f"{name}_tflops": t for name, t in self.tflops.items()}}


def product_dtypes(gpu: bool, dtypes: list[str]) -> list[str]:
    """bf16 always, on a GPU fp8 too: every table of a GPU has both."""
    return list(dict.fromkeys(["bf16", *(["fp8"] if gpu else []), *("bf16" if d == "fp16" else d for d in dtypes)]))


def measure(device: str, dtypes: list[str], stopwatch: Stopwatch, seconds: float = 1.0) -> Ceilings:
    gpu = device == "cuda"
    copied, size = (2**30, 8192) if gpu else (2**25, 512)
    source = torch.ones(copied, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    calls: dict[str, Callable[[], Any]] = {"copy": lambda: target.copy_(source)}
    products = {name: product for name in product_dtypes(gpu, dtypes) if (product := _product(name, size, device)) is not None}
    times = time_interleaved({**calls, **products}, stopwatch, seconds=seconds, least=5, most=50)
    tflops = {name: 2 * size**3 / times[name].median / 1e12 for name in products}
    return Ceilings(2 * copied / times["copy"].median / 1e9, tflops, size)


def _product(dtype: str, size: int, device: str) -> Callable[[], Any] | None:
    # Random values: zeros draw less power and flatter the clock.
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    if dtype == "fp8":
        if device != "cuda":
            return None
        a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
        one = torch.ones((), device=device)

        def product() -> torch.Tensor:
            return torch._scaled_mm(a8, b8, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)

        try:
            product()
        except RuntimeError:  # a GPU without FP8
            return None
        return product
    if dtype == "fp32":
        a, b = a.float(), b.float()
    return lambda: a @ b
