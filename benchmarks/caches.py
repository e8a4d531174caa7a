"""Cases over KV caches: one new token for each sequence, its keys in a dense cache or in pages in no order.

The work is the bytes: each key and value once, shared ones (absorbed latent attention) once for both. Published protocols of
decoding sweep batch and context for grouped heads (FlashInfer, FlashAttention-3) and for latent attention (FlashMLA).
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .presets import DTYPES, Case, Tensors

PAGE_SIZES = (0, 1, 16, 64, 256)  # 0: a dense cache


@dataclass(frozen=True)
class CacheCase(Case):
    """One step of decoding. q (batch, seqlen_q, heads, head_dim); caches (batch, seqlen_k, heads_kv, dim), or with a page_size
    (pages, page_size, heads_kv, dim) and a page table.

    shares_values: the values are the first head_dim_v columns of the keys, as in absorbed multi-head latent attention.
    """

    page_size: int = 0
    shares_values: bool = False

    @property
    def mask(self) -> str:
        return f"page {self.page_size}" if self.page_size else "dense"

    @property
    def plain(self) -> bool:
        return True

    @property
    def pages(self) -> int:
        """Of a sequence."""
        return self.seqlen_k // self.page_size

    def shapes(self) -> tuple[tuple[int, int, int, int], ...]:
        q, k, v, out = super().shapes()
        if self.page_size:
            k, v = ((self.batch * self.pages, self.page_size, *shape[2:]) for shape in (k, v))
        return q, k, v, out

    def build(self, device: str) -> Tensors:
        generator = torch.Generator(device=device).manual_seed(random.Random(self.name).getrandbits(31))

        def normal(shape: tuple[int, ...]) -> Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=DTYPES[self.dtype])

        q, k, v, out = self.shapes()
        keys = normal(k)
        return Tensors(normal(q), keys, keys[..., : self.head_dim_v] if self.shares_values else normal(v), normal(out))

    def page_table(self, device: torch.device | str) -> Tensor | None:
        """(batch, pages) int32: every page of the cache once, in no order; None for a dense cache."""
        if not self.page_size:
            return None
        generator = torch.Generator(device=device).manual_seed(self.page_size)
        order = torch.randperm(self.batch * self.pages, generator=generator, device=device, dtype=torch.int32)
        return order.view(self.batch, self.pages)

    def lengths_of_cache(self, device: torch.device | str) -> Tensor:
        """(batch,) int32: rows of each sequence."""
        return torch.full((self.batch,), self.seqlen_k, dtype=torch.int32, device=device)

    def keys_of(self, tensor: Tensor, batch: int, head: int) -> Tensor:
        table = self.page_table(tensor.device)
        return tensor[batch, :, head] if table is None else tensor[table[batch].long(), :, head].flatten(0, 1)

    def bytes_moved(self) -> int:
        q, k, v, out = (math.prod(shape) for shape in self.shapes())
        element, table = DTYPES[self.dtype].itemsize, 4 * self.batch * self.pages if self.page_size else 0
        return element * (q + k + (0 if self.shares_values else v) + out) + 4 * self.batch * self.heads * self.seqlen_q + table


def _grouped(batch: int, seqlen: int, page_size: int = 0, heads: int = 64, heads_kv: int = 8, dim: int = 128) -> CacheCase:
    family = f"decode {heads}/{heads_kv} b{batch}"
    return CacheCase(family, batch, 1, seqlen, heads, heads_kv, dim, dim, page_size=page_size)


def _latent(batch: int, seqlen: int, page_size: int = 0, heads: int = 128, dims: tuple[int, int] = (576, 512)) -> CacheCase:
    return CacheCase(
        f"latent {heads}/1 b{batch}", batch, 1, seqlen, heads, 1, *dims, page_size=page_size, shares_values=True
    )  # fmt: skip


def decode(gpu: bool) -> list[Case]:
    """Dense caches: batch 1 to 128, 8k to 128k context."""
    if not gpu:
        tiny = [_grouped(b, s, heads=8, heads_kv=1, dim=64) for b in (1, 2) for s in (256, 512)]
        return [*tiny, _latent(2, 256, heads=4, dims=(40, 32))]
    seqlens = (8192, 32768, 131072)
    grouped = [_grouped(b, s) for b in (1, 4, 16, 64, 128) for s in seqlens]
    return [
        *grouped,
        *(_latent(b, s, heads=h) for h, batches in ((128, (1, 16, 128)), (16, (64,))) for b in batches for s in seqlens),
    ]


def paged(gpu: bool, page_sizes: Iterable[int] = PAGE_SIZES) -> list[Case]:
    """The page sizes of a shape stand together."""
    if not gpu:
        tiny = [_grouped(2, 256, p, heads=8, heads_kv=1, dim=64) for p in page_sizes]
        return [*tiny, *(_latent(2, 256, p, heads=4, dims=(40, 32)) for p in (0, 64))]
    grouped = [
        _grouped(b, s, p)
        for b, s in ((1, 32768), (1, 131072), (16, 8192), (16, 131072), (128, 8192), (128, 32768))
        for p in page_sizes
    ]
    return [*grouped, *(_latent(b, s, p) for b, s in ((16, 8192), (128, 8192), (128, 32768)) for p in page_sizes)]
