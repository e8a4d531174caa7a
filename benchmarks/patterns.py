"""Masks that are no range of keys: trees of candidate tokens, windows with global tokens, random blocks.

A pattern is a short text, so that a case stays plain data:

    tree HxC         MEDUSA's candidates: H next tokens with C choices each; every node sees its ancestors
    parents HxC      the same nodes, which see only their parents: the mask of the published Binary Block Masking runs
    window W + G     |row - key| <= W / 2, and the first G tokens see and are seen by everything (Longformer)
    blocks P%        P percent of the blocks of 128 x 128, drawn at random

Rows of a tree beyond its nodes see themselves. Each pattern is written twice, on purpose: `visible` by definition, for the
check and for peers that take a dense mask, and `block_mask` by flash_ext's builders.
"""

from __future__ import annotations

import functools
import re

import torch
from torch import Tensor

import flash_ext
from flash_ext.block_mask import BLOCK, unpack_bits


def _numbers(pattern: str, form: str) -> tuple[int, ...] | None:
    match = re.fullmatch(form, pattern)
    return tuple(int(n) for n in match.groups()) if match else None


def parents(heads: int, choices: int, seqlen: int) -> Tensor:
    """(seqlen) int64: breadth first; -1 for nodes of the first level and for rows beyond the tree."""
    nodes = sum(choices**depth for depth in range(1, heads + 1))
    if nodes > seqlen:
        raise ValueError(f"a tree of {heads} levels and {choices} choices has {nodes} nodes, more than {seqlen}")
    of = torch.arange(seqlen) // choices - 1
    of[nodes:] = -1
    return of


def _coarse(percent: int, seqlen: int) -> Tensor:
    blocks = -(-seqlen // BLOCK)
    generator = torch.Generator().manual_seed(percent)
    order = torch.rand(blocks, blocks, generator=generator).argsort(1)
    return order < max(1, round(blocks * percent / 100))  # the same number in every row: the sweep measures density alone


def visible(pattern: str, rows: Tensor, seqlen: int) -> Tensor:
    """(rows, seqlen) bool, on rows' device."""
    keys = torch.arange(seqlen, device=rows.device)
    if tree := _numbers(pattern, r"(?:tree|parents) (\d+)x(\d+)"):
        parent, node = parents(*tree, seqlen).to(rows.device), rows
        keep = keys == rows[:, None]
        for _ in range(tree[0] if pattern.startswith("tree") else 1):
            node = torch.where(node >= 0, parent[node.clamp(min=0)], -1)
            keep |= keys == node[:, None]
        return keep
    if window := _numbers(pattern, r"window (\d+) \+ (\d+)"):
        near = (keys - rows[:, None]).abs() <= window[0] // 2
        return near | (keys < window[1]) | (rows < window[1])[:, None]
    if share := _numbers(pattern, r"blocks (\d+)%"):
        return _coarse(*share, seqlen).to(rows.device)[rows // BLOCK][:, keys // BLOCK]
    raise ValueError(f"no such pattern: {pattern}")


def block_mask(pattern: str, seqlen: int, device: torch.device | str) -> flash_ext.BlockMask:
    if tree := _numbers(pattern, r"(?:tree|parents) (\d+)x(\d+)"):
        return flash_ext.tree_mask(parents(*tree, seqlen), ancestors=pattern.startswith("tree"), device=device)
    if window := _numbers(pattern, r"window (\d+) \+ (\d+)"):
        tokens = torch.arange(seqlen, device=device) < window[1]
        return flash_ext.sliding_window_mask(seqlen, seqlen, (window[0] // 2, window[0] // 2), global_tokens=tokens)
    if share := _numbers(pattern, r"blocks (\d+)%"):
        return flash_ext.masks.coarse_block_mask(_coarse(*share, seqlen).to(device), seqlen, seqlen)
    raise ValueError(f"no such pattern: {pattern}")


@functools.lru_cache(maxsize=32)
def pairs(pattern: str, seqlen: int) -> int:
    """Visible (row, key) pairs of one head."""
    made = block_mask(pattern, seqlen, "cpu")
    where = made.coordinates()
    full = where[where[:, 4] < 0]
    rows = (seqlen - full[:, 2] * BLOCK).clamp(max=BLOCK)
    partial = sum(int(unpack_bits(part).sum()) for part in made.bits.split(256)) if made.num_partial else 0
    return int(rows.sum()) * BLOCK + partial
