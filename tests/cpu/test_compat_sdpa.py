"""flash_ext.compat.scaled_dot_product_attention against torch's own."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flash_ext.compat import scaled_dot_product_attention


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def agrees(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, **options) -> None:
    """Result and every gradient are torch's, in float64 (k_bias has float32)."""
    tensors, shape = [query, key, value], None
    if mask is not None and mask.is_floating_point():
        shape = mask.shape
        tensors.append(mask if mask.stride(-2) else mask[:, :1, :1].clone())  # what was expanded has the gradient
    results = []
    for function in (scaled_dot_product_attention, F.scaled_dot_product_attention):
        for tensor in tensors:
            tensor.requires_grad_()
        out = function(*tensors[:3], mask if shape is None else tensors[3].expand(shape), **options)
        weights = random(*out.shape, seed=9, dtype=out.dtype)
        results.append((out, torch.autograd.grad((out * weights).sum(), tensors)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-10 if mask is None else 1e-6)


def test_the_signature_is_torchs():
    parameters = inspect.signature(scaled_dot_product_attention).parameters
    schema = torch.ops.aten.scaled_dot_product_attention.default._schema
    assert [p.name for p in schema.arguments] == list(parameters)
    for argument in schema.arguments:
        parameter = parameters[argument.name]
        assert (parameter.kind is inspect.Parameter.KEYWORD_ONLY) == argument.kwarg_only
        if argument.has_default_value():
            assert parameter.default == argument.default_value, argument.name


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("lengths", [(6, 6), (3, 7), (7, 3), (1, 5), (5, 1)], ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=str)
def test_heads_lengths_and_causality(heads, lengths, is_causal):
    query = random(2, heads[0], lengths[0], 8)
    key, value = random(2, heads[1], lengths[1], 8, seed=1), random(2, heads[1], lengths[1], 16, seed=2)
    agrees(query, key, value, is_causal=is_causal, enable_gqa=heads[0] != heads[1], scale=0.3)


SHAPES = {
    "two": ((5, 8), (7, 8), (7, 8)),
    "three": ((4, 5, 8), (4, 7, 8), (4, 7, 8)),
    "five": ((2, 3, 4, 5, 8), (2, 3, 4, 7, 8), (2, 3, 4, 7, 8)),
    "batch_of_one": ((3, 4, 5, 8), (1, 4, 7, 8), (1, 4, 7, 8)),
    "batch_missing": ((3, 4, 5, 8), (4, 7, 8), (7, 8)),
    "heads_of_one": ((3, 1, 5, 8), (3, 4, 7, 8), (3, 1, 7, 8)),
    "one_head_of_keys": ((3, 4, 5, 8), (3, 1, 7, 8), (3, 1, 7, 8)),
    "broadcast_in_five": ((2, 1, 4, 5, 8), (1, 3, 4, 7, 8), (3, 4, 7, 8)),
}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("is_causal", [False, True])
def test_leading_dimensions(shapes, is_causal):
    agrees(*(random(*shape, seed=i) for i, shape in enumerate(shapes)), is_causal=is_causal)


def key_mask(*shape: int) -> Tensor:
    mask = random(*shape, seed=5) > -0.3
    mask[..., -1] = True  # torch's float64 gradient of a query without keys is NaN on some versions
    return mask


MASKS = {
    "batch": lambda: key_mask(2, 1, 1, 7),
    "heads": lambda: key_mask(1, 4, 1, 7),
    "both": lambda: key_mask(2, 4, 1, 7),
    "expanded": lambda: key_mask(2, 1, 1, 7).expand(2, 4, 5, 7),
    "row": lambda: key_mask(1, 7),
    "one_key": lambda: torch.ones(2, 1, 1, 1, dtype=torch.bool),
}


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_masks_of_keys(mask, additive):
    mask = mask()
    if additive:
        rows = mask[..., :1, :]
        mask = torch.where(rows, random(*rows.shape, seed=6), -torch.inf).expand(mask.shape)
    agrees(random(2, 4, 5, 8), random(2, 4, 7, 8, seed=1), random(2, 4, 7, 8, seed=2), mask)


def test_a_mask_of_one_dimension():
    """torch says that it broadcasts, and has an IndexError for it."""
    query, mask = random(2, 4, 5, 8), key_mask(5)
    torch.testing.assert_close(
        scaled_dot_product_attention(query, query, query, mask), F.scaled_dot_product_attention(query, query, query, mask[None])
    )


def test_any_mask_will_do_for_one_query():
    agrees(random(2, 4, 1, 8), random(2, 4, 7, 8, seed=1), random(2, 4, 7, 8, seed=2), key_mask(2, 4, 1, 7))


@pytest.mark.parametrize("mask", [MASKS["batch"], MASKS["expanded"]])
def test_masks_with_grouped_heads(mask):
    agrees(random(2, 4, 5, 8), random(2, 2, 7, 8, seed=1), random(2, 2, 7, 8, seed=2), mask(), enable_gqa=True)


def test_a_query_that_sees_no_key_gives_zero():
    query, key, value = (random(2, 4, 5, 8, seed=i).requires_grad_() for i in range(3))
    mask = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    mask[1] = False
    out = scaled_dot_product_attention(query, key, value, mask)
    assert out[1].eq(0).all() and out[0].ne(0).all()
    for grad in torch.autograd.grad(out.sum(), (query, key, value)):
        assert grad[1].eq(0).all() and grad.isfinite().all()
    torch.testing.assert_close(out, F.scaled_dot_product_attention(query, key, value, mask))


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_dtypes(dtype, bound):
    query, key, value = (random(2, 4, 33, 16, seed=i, dtype=dtype) for i in range(3))
    out = scaled_dot_product_attention(query, key, value, is_causal=True)
    expected = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), is_causal=True)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=bound, atol=bound)


@pytest.mark.parametrize("seqlen_q, seqlen_k", [(0, 4), (4, 0), (0, 0)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_empty(seqlen_q, seqlen_k, is_causal):
    query, key = random(2, 3, seqlen_q, 8), random(2, 3, seqlen_k, 8)
    out = scaled_dot_product_attention(query, key, key, is_causal=is_causal)
    assert out.shape == query.shape and out.eq(0).all()
    assert scaled_dot_product_attention(query[:0], key[:0], key[:0]).shape == (0, 3, seqlen_q, 8)


def test_strides_do_not_matter():
    query = random(2, 5, 4, 8).transpose(1, 2)
    key = random(2, 4, 8, 7, seed=1).mT
    assert key.stride(-1) != 1
    agrees(query, key, key)


def test_autocast():
    query, key, value = (random(2, 4, 5, 8, seed=i, dtype=torch.float32) for i in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        assert scaled_dot_product_attention(query, key, value).dtype == torch.bfloat16


def test_compiled():
    def function(query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
        return scaled_dot_product_attention(query, key, key, mask) + scaled_dot_product_attention(query, key, key, is_causal=True)

    query, key, mask = random(2, 4, 5, 8), random(2, 4, 7, 8, seed=1), key_mask(2, 1, 1, 7)
    torch.testing.assert_close(
        torch.compile(function, fullgraph=True, backend="eager")(query, key, mask), function(query, key, mask)
    )


def test_no_value_of_a_mask_is_read():
    """A mask on the meta device has none."""
    query, key = torch.empty(2, 4, 5, 8, device="meta"), torch.empty(2, 2, 7, 8, device="meta")
    mask = torch.empty(2, 1, 1, 7, dtype=torch.bool, device="meta")
    assert scaled_dot_product_attention(query, key, key, mask, enable_gqa=True).shape == query.shape


Q = random(2, 4, 5, 8)
ERRORS = {
    "dropout": (NotImplementedError, r"dropout_p=0\.1", (Q, Q, Q, None, 0.1), {}),
    "full_mask": (NotImplementedError, r"attn_mask=bool tensor of shape \(5, 5\)", (Q, Q, Q, torch.ones(5, 5).bool().tril()), {}),
    "bias": (NotImplementedError, r"attn_mask=float64 tensor of shape \(2, 4, 5, 5\)", (Q, Q, Q, random(2, 4, 5, 5)), {}),
    "heads": (
        NotImplementedError, r"4 heads of query for 2 of key",
        (Q, Q[:, :2], Q[:, :2], torch.ones(2, 4, 1, 5).bool()), {"enable_gqa": True},
    ),
    "nested": (NotImplementedError, "nested", (torch.nested.nested_tensor([Q[0]], layout=torch.jagged), Q, Q), {}),
    "both": (ValueError, "attn_mask must be None", (Q, Q, Q, torch.ones(1, 5).bool(), 0.0, True), {}),
    "mask_shape": (ValueError, r"broadcast to \(2, 4, 5, 5\), got \(3, 1, 1, 5\)", (Q, Q, Q, torch.ones(3, 1, 1, 5).bool()), {}),
    "mask_dimensions": (ValueError, "must broadcast", (Q, Q, Q, torch.ones(1, 1, 1, 1, 5).bool()), {}),
    "mask_dtype": (ValueError, "bool or floating", (Q, Q, Q, torch.ones(5, dtype=torch.int64)), {}),
    "mask_type": (TypeError, "attn_mask", (Q, Q, Q, [True] * 5), {}),
    "expanded_leaf": (
        NotImplementedError, "expanded leaf", (Q, Q, Q, torch.zeros(5, dtype=torch.float64).expand(5, 5).requires_grad_()), {},
    ),
    "type": (TypeError, "key must be a torch.Tensor, got list", (Q, [1.0], Q), {}),
    "one_dimension": (ValueError, "at least 2 dimensions", (Q, Q[0, 0, 0], Q), {}),
    "batch": (ValueError, "broadcast", (Q, random(3, 4, 5, 8), Q), {}),
    "grouped": (ValueError, "broadcast", (Q, Q[:, :2], Q[:, :2]), {}),
    "head_dim": (ValueError, "head_dim", (Q, Q[..., :4], Q), {}),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_argument(case):
    error, message, arguments, options = ERRORS[case]
    with pytest.raises(error, match=message):
        scaled_dot_product_attention(*arguments, **options)
