"""The public function."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import ops
from .arguments import autocast, check_arguments


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    return_lse: bool = False,
    deterministic: bool | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact softmax attention, differentiable, in memory linear in the sequence length.

    out = softmax(softmax_scale * q @ k^T, masked) @ v for each head, by the tiled online softmax of FlashAttention (Dao
    et al. 2022, algorithms 1 and 4; FlashAttention-2, Dao 2023; FlashAttention-3, Shah et al. 2024). No retraining, no
    approximation: results agree with torch.nn.functional.scaled_dot_product_attention up to rounding.

    Args:
        q: (batch, seqlen_q, num_heads, head_dim), bfloat16, float16, float32 or float64, head_dim at most 256.
        k: (batch, seqlen_k, num_heads_kv, head_dim), dtype and device of q. num_heads must be a multiple of
            num_heads_kv (grouped-query and multi-query attention): query head h reads key head
            h // (num_heads // num_heads_kv).
        v: (batch, seqlen_k, num_heads_kv, head_dim_v), head_dim_v at most 256.
        causal: row i sees keys j <= i + seqlen_k - seqlen_q (aligned to the bottom right).
        softmax_scale: factor on q . k, any finite number; 1 / sqrt(head_dim) by default.
        window_size: (left, right), inclusive: row i also sees only keys from i + seqlen_k - seqlen_q - left to
            i + seqlen_k - seqlen_q + right. -1 is unbounded. causal sets the right side to 0.
        softcap: if positive, scores become softcap * tanh(score / softcap) before the mask (Gemma 2). 0 is off.
        return_lse: also return lse, the natural log of the softmax's denominator. It has a gradient.
        deterministic: gradients bitwise equal from run to run. None follows torch.use_deterministic_algorithms.
        backend: 'sm90', 'sm80' or 'reference' to insist on one; None lets flash_ext choose (see flash_ext.explain).

    Returns:
        out: (batch, seqlen_q, num_heads, head_dim_v), dtype of q. With return_lse, the pair (out, lse): lse
        (batch, num_heads, seqlen_q), float32 (float64 for float64 inputs). A row that sees no key has out = 0,
        lse = -inf and zero gradients. An empty batch or sequence is not an error.

    A hidden key's k never matters, whatever it holds. NaN or infinity in a hidden v can reach rows of the same tile
    (0 * NaN is NaN), as in every tiled implementation.

    The last dimension must be contiguous; other strides are free. Under autocast, q, k and v are cast to the autocast
    dtype. Calls that no compiled kernel covers run on the reference, on a GPU with a FallbackWarning.

    Raises:
        TypeError: an argument has a wrong Python type.
        ValueError: a wrong shape, dtype, stride, layout, device or value; every violated rule in one message.
        NotImplementedError: inside torch.func transforms, in forward-mode differentiation, and for a second derivative.
        RuntimeError: CUDA failed.
    """
    q, k, v = autocast(q, k, v)
    check_arguments(
        q, k, v, causal=causal, softmax_scale=softmax_scale, window_size=window_size, softcap=softcap,
        return_lse=return_lse, deterministic=deterministic, backend=backend,
    )  # fmt: skip
    tracing = torch.compiler.is_compiling()
    if not tracing:
        _check_eager(q, k, v, causal, softmax_scale, window_size, softcap, backend)
    if softmax_scale is None:
        softmax_scale = q.shape[-1] ** -0.5
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    arguments = (
        q, k, v, float(softmax_scale), causal, window_size[0], window_size[1], float(softcap), deterministic, backend,
    )  # fmt: skip
    fwd = torch.ops.flash_ext.fwd
    if tracing:
        out, lse = fwd(*arguments)
    elif torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        out, lse = ops.call(fwd, *arguments)
    else:
        # Nothing to differentiate: the Python layer of the op's autograd registration costs a third of a call.
        with torch._C._AutoDispatchBelowAutograd():
            out, lse = ops.call(fwd, *arguments)
    return (out, lse) if return_lse else out


def _check_eager(q, k, v, causal, softmax_scale, window_size, softcap, backend) -> None:
    """What a trace cannot ask: the active torch.func transforms, and the planner about a backend asked for by name."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise NotImplementedError(
            "attention: torch.func transforms (grad, vmap, jvp, ...) are not supported; use torch.autograd, or batch "
            "through the batch dimension"
        )
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in (q, k, v)):
        raise NotImplementedError("attention: forward-mode differentiation is not supported; use torch.autograd")
    if backend is not None and backend != "reference":
        from .dispatch import require_backend

        require_backend(backend, q, k, v, causal=causal, softmax_scale=softmax_scale, window_size=window_size, softcap=softcap)
