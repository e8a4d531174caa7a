"""FP8 (e4m3) copies of q, k and v with their scales: flash_ext.quantize_fp8, bit for bit the same on every device.

The steps, all in float32 (docs/numerics.md, "FP8", gives the reasons):

1. With hadamard, each row is multiplied by a rotation M (incoherent processing: QuIP, Chee et al. 2023; FlashAttention-3,
   Shah et al. 2024, section 3.3): columns change sign where sign_bits(head_dim) is set, then blocks of n columns, n the
   largest power of two that divides head_dim (96: 32, 192: 64), go through the Walsh-Hadamard butterflies (a, b) ->
   (a + b, a - b) at distances 1, 2, 4, ..., then every element is multiplied by float32(n ** -0.5). M is orthogonal and
   depends on head_dim alone, so that q and k rotated alike keep their products.
2. amax is the largest |element| that is finite, over 64 rows of a head ("block"), over a head ("head"), or over all.
3. a = max(amax, 2**-100); descale = a / 448 and factor = 448 / a, each rounded once.
4. x8 = element * factor, rounded once to float32, clamped to [-448, 448], rounded to e4m3, ties to even. NaN and the
   infinities become NaN.

x is about x8 * descale (rotated, with hadamard).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import ops as ops  # loads the compiled library, which has the kernels

BLOCK_ROWS = 64
E4M3_MAX = 448.0
SMALLEST_AMAX = 2.0**-100
SCALES = ("block", "head", "tensor")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_library = torch.library.Library("flash_ext", "FRAGMENT")
_SCHEMA = "(Tensor x, str scale, bool hadamard, Tensor? cu_seqlens) -> (Tensor x8, Tensor descale)"
for _name in ("quantize_fp8", "reference_quantize_fp8"):
    _library.define(_name + _SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))


def quantize_fp8(
    x: Tensor, scale: str = "block", hadamard: bool = False, *, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """An e4m3 copy of x and the scales that undo it, for the FP8 calls of flash_ext.attention.

    Args:
        x: (batch, seqlen, num_heads, head_dim), or packed (total, num_heads, head_dim) with cu_seqlens; bfloat16, float16 or
            float32. The last dimension must be contiguous and, on a GPU, a multiple of 8 (other calls run as torch ops).
        scale: 'block' (one scale for 64 rows of a head, counted from the first row of each sequence), 'head' (one for each
            sequence and head) or 'tensor' (one).
        hadamard: rotate each row first (for q and k, never for v: rotating both q and k leaves q . k unchanged, spreads
            outliers over the columns, and so makes the scales smaller).
        cu_seqlens: (batch + 1) int32, on x's device: the packed sequences. Required for a packed x unless scale='tensor'.

    Returns:
        x8: float8_e4m3fn, contiguous, the shape of x. Rows that belong to no sequence are 0.
        descale: float32. 'tensor': shape (). 'head': (batch, num_heads). 'block': (batch, num_heads, ceil(seqlen / 64));
            packed (1, num_heads, total // 64 + batch), where block r of sequence b stands at cu_seqlens[b] // 64 + b + r (the
            places between belong to no rows).

    The result has no gradient; flash_ext.attention_fp8_straight_through trains with an FP8 forward.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, dtype or value; every violated rule in one message.
    """
    _check(x, scale, hadamard, cu_seqlens)
    with torch.no_grad():
        return torch.ops.flash_ext.quantize_fp8(x, scale, hadamard, cu_seqlens)


def _check(x, scale, hadamard, cu_seqlens) -> None:
    wrong = [
        f"{name} must be {wanted}, got {type(value).__name__}"
        for name, value, kinds, wanted in (
            ("x", x, Tensor, "a torch.Tensor"),
            ("scale", scale, str, "a str"),
            ("hadamard", hadamard, bool, "a bool"),
            ("cu_seqlens", cu_seqlens, (Tensor, type(None)), "a torch.Tensor or None"),
        )
        if not isinstance(value, kinds)
    ]
    if wrong:
        raise TypeError("quantize_fp8: " + "; ".join(wrong))
    found = []
    if scale not in SCALES:
        found.append(f"scale must be one of {', '.join(SCALES)}, got {scale!r}")
    if x.dtype not in DTYPES:
        found.append(f"x.dtype must be bfloat16, float16 or float32, got {x.dtype}")
    if x.layout != torch.strided or x.is_nested:
        found.append("x must be a dense (strided) tensor")
    elif x.dim() not in (3, 4):
        found.append(
            "x must have 4 dimensions (batch, seqlen, num_heads, head_dim), or 3 (total, num_heads, head_dim) when packed, "
            f"got {x.dim()}"
        )
    else:
        if not 1 <= x.shape[-1] <= 256:
            found.append(f"x.head_dim must lie in [1, 256], got {x.shape[-1]}")
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            found.append(f"x's last dimension must be contiguous (stride 1), got stride {x.stride(-1)}")
        if x.dim() == 4 and cu_seqlens is not None:
            found.append("cu_seqlens belongs to a packed x of 3 dimensions, got 4")
        if x.dim() == 3 and cu_seqlens is None and scale != "tensor":
            found.append(f"cu_seqlens must be given for a packed x with scale={scale!r}")
    if cu_seqlens is not None:
        if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1 or not cu_seqlens.is_contiguous():
            found.append(
                f"cu_seqlens must be int32 of shape (batch + 1), contiguous, got {cu_seqlens.dtype} of {tuple(cu_seqlens.shape)}"
            )
        if cu_seqlens.device != x.device:
            found.append(f"cu_seqlens.device must equal x.device, got {cu_seqlens.device} and {x.device}")
    if found:
        raise ValueError("quantize_fp8: " + "; ".join(found))


# --- the rotation ---


def hadamard_block(head_dim: int) -> int:
    """Columns that are mixed with one another: the largest power of two that divides head_dim."""
    return head_dim & -head_dim


@functools.cache
def sign_bits(head_dim: int) -> tuple[bool, ...]:
    """Which columns change sign: the top bits of splitmix64 (Steele et al. 2014) of 1024 * head_dim + column."""

    def mixed(x: int) -> int:
        mask = 2**64 - 1
        x = (x + 0x9E3779B97F4A7C15) & mask
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
        return x ^ x >> 31

    return tuple(bool(mixed(1024 * head_dim + column) >> 63) for column in range(head_dim))


def rotate(x: Tensor) -> Tensor:
    """Rows (..., head_dim) in float32, times M of step 1."""
    x = x.float()
    head_dim, n = x.shape[-1], hadamard_block(x.shape[-1])
    signs = torch.tensor([-1.0 if flip else 1.0 for flip in sign_bits(head_dim)], device=x.device)
    x = x * signs
    distance = 1
    while distance < n:
        pairs = x.reshape(*x.shape[:-1], head_dim // (2 * distance), 2, distance)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack((a + b, a - b), dim=-2).reshape(*x.shape[:-1], head_dim)
        distance *= 2
    return x * torch.tensor(n**-0.5, dtype=torch.float32, device=x.device)


# --- the definition, in torch ops ---


def num_packed_blocks(total: int, batch: int) -> int:
    return total // BLOCK_ROWS + batch


def sequence_of_rows(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each row: its sequence, its number within it, and whether any sequence owns it. Broken cu_seqlens are clamped."""
    cu = torch.cummax(cu_seqlens.long().clamp(0, total), 0).values
    rows = torch.arange(total, device=cu.device)
    sequence = torch.searchsorted(cu, rows, right=True) - 1
    owned = (sequence >= 0) & (sequence < cu.numel() - 1)
    sequence = sequence.clamp(0, max(cu.numel() - 2, 0))
    return sequence, rows - cu[sequence], owned


def _scales(amax: Tensor) -> tuple[Tensor, Tensor]:
    a = amax.clamp_min(SMALLEST_AMAX)
    limit = torch.tensor(E4M3_MAX, dtype=torch.float32, device=amax.device)
    return a / limit, limit / a


def to_e4m3(x: Tensor) -> Tensor:
    """Step 4 after the factor: float32 to float8_e4m3fn, saturating what is finite."""
    finite = torch.isfinite(x)
    return torch.where(finite, x.clamp(-E4M3_MAX, E4M3_MAX), torch.full_like(x, torch.nan)).to(torch.float8_e4m3fn)


def _reference(x: Tensor, scale: str, hadamard: bool, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    y = rotate(x) if hadamard else x.float()
    size = torch.where(torch.isfinite(y), y.abs(), torch.zeros_like(y))
    if scale == "tensor":
        amax = size.amax() if size.numel() else size.new_zeros(())
        descale, factor = _scales(amax)
    elif x.dim() == 4:
        batch, seqlen, num_heads, _ = x.shape
        blocks = 1 if scale == "head" else -(-seqlen // BLOCK_ROWS)
        rows = seqlen if scale == "head" else BLOCK_ROWS
        padded = torch.nn.functional.pad(
            size.amax(-1) if x.numel() else size.new_zeros(x.shape[:3]), (0, 0, 0, blocks * rows - seqlen)
        )
        padded = padded.reshape(batch, blocks, rows, num_heads)
        amax = padded.amax(2) if rows else padded.new_zeros(batch, blocks, num_heads)
        descale, factor = _scales(amax)  # (batch, blocks, heads)
        factor = factor.repeat_interleave(rows, 1)[:, :seqlen, :, None]
        descale = descale.transpose(1, 2).contiguous()
        if scale == "head":
            descale = descale[:, :, 0]
    else:
        total, num_heads, _ = x.shape
        batch = cu_seqlens.numel() - 1
        sequence, row, owned = sequence_of_rows(cu_seqlens, total)
        place = sequence
        if scale == "block":
            first = torch.cummax(cu_seqlens.long().clamp(0, total), 0).values // BLOCK_ROWS
            place = first[sequence] + sequence + row // BLOCK_ROWS
        places = batch if scale == "head" else num_packed_blocks(total, batch)
        place = place.clamp(0, max(places - 1, 0))
        y = torch.where(owned[:, None, None], y, torch.zeros_like(y))
        size = torch.where(owned[:, None, None], size, torch.zeros_like(size)).amax(-1)
        amax = size.new_zeros(places, num_heads)
        if places:
            amax = amax.scatter_reduce(0, place[:, None].expand(-1, num_heads), size, "amax")
        descale, factor = _scales(amax)
        factor = factor[place][:, :, None] if places else torch.ones_like(y)
        descale = descale if scale == "head" else descale.transpose(0, 1)[None]
    return to_e4m3(y * factor).contiguous(), descale.contiguous()


def _fake(x, scale, hadamard, cu_seqlens):
    if scale == "tensor":
        shape = ()
    elif x.dim() == 4:
        shape = (x.shape[0], x.shape[2])
        if scale == "block":
            shape = (*shape, (x.shape[1] + BLOCK_ROWS - 1) // BLOCK_ROWS)
    else:
        batch = cu_seqlens.shape[0] - 1
        shape = (batch, x.shape[1]) if scale == "head" else (1, x.shape[1], num_packed_blocks(x.shape[0], batch))
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(shape, dtype=torch.float32)


def _no_gradient(ctx, *_):
    raise NotImplementedError("quantize_fp8 has no gradient; flash_ext.attention_fp8_straight_through trains with an FP8 forward")


for _name in ("quantize_fp8", "reference_quantize_fp8"):
    _library.impl(_name, _reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"flash_ext::{_name}", _fake, lib=_library)
    torch.library.register_autograd(f"flash_ext::{_name}", _no_gradient, lib=_library)
