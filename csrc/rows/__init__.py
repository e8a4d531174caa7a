"""The table of compiled variants: one module for each family of kernels, put together here."""

from . import bwd, fp8, fwd, kvcache, steps
from .model import Kernel, Variant

_FAMILIES = (fwd, bwd, steps, kvcache, fp8)
KERNELS: dict[tuple[str, str], Kernel] = {key: kernel for family in _FAMILIES for key, kernel in family.KERNELS.items()}
VARIANTS: tuple[Variant, ...] = tuple(row for family in _FAMILIES for row in family.rows())
