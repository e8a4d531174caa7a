"""Bad sinks, biases, sequences and boundaries get one clear error too, in eager mode, on fake tensors and compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import flash_ext


def dense(**options: Any) -> tuple[Callable, tuple, dict[str, Any]]:
    q, k = torch.zeros(2, 5, 4, 16), torch.zeros(2, 7, 2, 16)
    return flash_ext.attention, (q, k, k), options


def int32(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def varlen(shape_q: tuple = (12, 4, 16), shape_k: tuple = (15, 2, 16), **options: Any) -> tuple[Callable, tuple, dict[str, Any]]:
    q, k = torch.zeros(shape_q), torch.zeros(shape_k)
    lengths = {"cu_seqlens_q": int32(0, 5, 12), "cu_seqlens_k": int32(0, 8, 15)}
    return flash_ext.attention_varlen, (q, k, k), {**lengths, **options}


def partials(boundaries: Any, **options: Any) -> tuple[Callable, tuple, dict[str, Any]]:
    return flash_ext.attention_partials, dense()[1], {"split_boundaries": boundaries, **options}


zeros = torch.zeros

# id -> (the call, exception, every violated rule in its own words)
BAD: dict[str, tuple[Callable[[], tuple], type[Exception], list[str]]] = {
    # scores
    "sinks_type": (lambda: dense(sinks=[0.0] * 4), TypeError, ["sinks must be a torch.Tensor or None, got list"]),
    "scores_types": (
        lambda: dense(sinks=1, alibi_slopes=2.0, k_bias="x", return_max_logit=1),
        TypeError,
        [
            "sinks must be a torch.Tensor or None, got int", "alibi_slopes must be a torch.Tensor or None, got float",
            "k_bias must be a torch.Tensor or None, got str", "return_max_logit must be a bool, got int",
        ],
    ),
    "sinks_shape": (lambda: dense(sinks=zeros(2)), ValueError, ["sinks must have shape (num_heads) = (4,), got (2,)"]),
    "sinks_dtype": (lambda: dense(sinks=zeros(4).bfloat16()), ValueError, ["sinks.dtype must be float32, got torch.bfloat16"]),
    "sinks_device": (
        lambda: dense(sinks=zeros(4, device="meta")),
        ValueError,
        ["sinks.device must equal q.device, got meta and cpu"],
    ),
    "sinks_stride": (
        lambda: dense(sinks=zeros(8)[::2]),
        ValueError,
        ["sinks's last dimension must be contiguous (stride 1), got stride 2"],
    ),
    "slopes_shape": (
        lambda: dense(alibi_slopes=zeros(3, 4)),
        ValueError,
        ["alibi_slopes must have shape (num_heads) = (4,) or (batch, num_heads) = (2, 4), got (3, 4)"],
    ),
    "slopes_gradient": (
        lambda: dense(alibi_slopes=zeros(4).requires_grad_()),
        ValueError,
        ["alibi_slopes must not require a gradient (there is none for it): pass alibi_slopes.detach()"],
    ),
    "bias_shape": (
        lambda: dense(k_bias=zeros(2, 7)),
        ValueError,
        ["k_bias must have shape (batch, num_heads_kv, seqlen_k) = (2, 2, 7), got (2, 7)"],
    ),
    "bias_stride": (
        lambda: dense(k_bias=zeros(2, 7, 2).mT),
        ValueError,
        ["k_bias's last dimension must be contiguous (stride 1), got stride 2"],
    ),
    "bias_sparse": (
        lambda: dense(k_bias=zeros(2, 2, 7).to_sparse()),
        ValueError,
        ["k_bias must be a dense (strided) tensor, got layout torch.sparse_coo"],
    ),
    "scores_many": (
        lambda: dense(sinks=zeros(4).double(), k_bias=zeros(2, 2, 8), alibi_slopes=zeros(4).int(), softcap=-1.0),
        ValueError,
        [
            "sinks.dtype must be float32, got torch.float64", "alibi_slopes.dtype must be float32, got torch.int32",
            "k_bias must have shape (batch, num_heads_kv, seqlen_k) = (2, 2, 7), got (2, 2, 8)",
            "softcap must be finite and at least 0 (0: off), got -1.0",
        ],
    ),
    # sequences
    "cu_none": (lambda: varlen(cu_seqlens_k=None), TypeError, ["cu_seqlens_k must be a torch.Tensor, got NoneType"]),
    "sequence_types": (
        lambda: varlen(cu_seqlens_q=[0, 5, 12], seqused_k=3, leftpad_q=(1, 1), max_seqlen_q=7.0, validate=1),
        TypeError,
        [
            "cu_seqlens_q must be a torch.Tensor, got list", "seqused_k must be a torch.Tensor or None, got int",
            "leftpad_q must be a torch.Tensor or None, got tuple", "max_seqlen_q must be an int, a torch.Tensor or None, got float",
            "validate must be a bool, got int",
        ],
    ),
    "packed_rank": (
        lambda: varlen(shape_q=(1, 12, 4, 16)),
        ValueError,
        ["q must have 3 dimensions (total_q, num_heads, head_dim), got 4"],
    ),
    "packed_sizes": (
        lambda: (flash_ext.attention_varlen, (zeros(12, 3, 16), zeros(15, 2, 8), zeros(14, 2, 16)), varlen()[2]),
        ValueError,
        [
            "v.total_k must equal k.total_k, got 14 and 15", "k.head_dim must equal q.head_dim, got 8 and 16",
            "q.num_heads must be a multiple of k.num_heads, got 3 and 2",
        ],
    ),
    "cu_dtype": (
        lambda: varlen(cu_seqlens_q=int32(0, 5, 12).long()),
        ValueError,
        ["cu_seqlens_q.dtype must be int32, got torch.int64"],
    ),
    "cu_rank": (
        lambda: varlen(cu_seqlens_q=int32(0, 5, 12)[None]),
        ValueError,
        ["cu_seqlens_q must have 1 dimension (batch + 1), got 2"],
    ),
    "cu_empty": (
        lambda: varlen(cu_seqlens_q=int32(), cu_seqlens_k=int32()),
        ValueError,
        ["cu_seqlens_q must have at least 1 element, got 0", "cu_seqlens_k must have at least 1 element, got 0"],
    ),
    "cu_stride": (
        lambda: varlen(cu_seqlens_k=int32(0, 9, 8, 9, 15, 9)[::2]),
        ValueError,
        ["cu_seqlens_k's last dimension must be contiguous (stride 1), got stride 2"],
    ),
    "cu_lengths": (
        lambda: varlen(cu_seqlens_k=int32(0, 8, 9, 15)),
        ValueError,
        ["cu_seqlens_k must be as long as cu_seqlens_q, got 4 and 3 elements"],
    ),
    "cu_device": (
        lambda: varlen(cu_seqlens_k=zeros(3, dtype=torch.int32, device="meta")),
        ValueError,
        ["cu_seqlens_k.device must equal q.device, got meta and cpu"],
    ),
    "used_shape": (
        lambda: varlen(seqused_q=int32(1, 2, 3), leftpad_k=int32(1)),
        ValueError,
        ["seqused_q must have shape (batch) = (2,), got (3,)", "leftpad_k must have shape (batch) = (2,), got (1,)"],
    ),
    "max_negative": (lambda: varlen(max_seqlen_k=-1), ValueError, ["max_seqlen_k must be at least 0, got -1"]),
    "max_tensor": (
        lambda: varlen(max_seqlen_k=zeros(2)),
        ValueError,
        ["max_seqlen_k must hold one integer, got shape (2,) and dtype torch.float32"],
    ),
    "packed_bias": (
        lambda: varlen(k_bias=zeros(2, 2, 15), alibi_slopes=zeros(3, 4)),
        ValueError,
        [
            "alibi_slopes must have shape (num_heads) = (4,) or (batch, num_heads) = (2, 4), got (3, 4)",
            "k_bias must have shape (num_heads_kv, total_k) = (2, 15), got (2, 2, 15)",
        ],
    ),
    # parts
    "boundaries_type": (lambda: partials(7), TypeError, ["split_boundaries must be a sequence of ints, got int"]),
    "boundaries_text": (lambda: partials("07"), TypeError, ["split_boundaries must be a sequence of ints, got str"]),
    "boundaries_float": (lambda: partials((0, 3.5, 7)), TypeError, ["split_boundaries must be a sequence of ints, got float"]),
    "boundaries_one": (lambda: partials((0,)), ValueError, ["split_boundaries must hold 2 to 65 numbers, got 1"]),
    "boundaries_many": (lambda: partials([0] * 65 + [7]), ValueError, ["split_boundaries must hold 2 to 65 numbers, got 66"]),
    "boundaries_ends": (
        lambda: partials([1, 5, 3, 8], softcap=-1),
        ValueError,
        [
            "split_boundaries must start at 0, got 1", "split_boundaries must end at k.seqlen, got 8 and 7",
            "split_boundaries must not decrease, got 5 before 3", "softcap must be finite and at least 0 (0: off), got -1",
        ],
    ),
}  # fmt: skip

# Wrong values, which only a tensor on the host shows, or validate=True.
BAD_VALUES: dict[str, tuple[Callable[[], tuple], list[str]]] = {
    "start": (lambda: varlen(cu_seqlens_q=int32(1, 5, 12)), ["cu_seqlens_q must start at 0, got 1"]),
    "end": (lambda: varlen(cu_seqlens_k=int32(0, 8, 16)), ["cu_seqlens_k must end at k.total_k or before, got 16 and 15"]),
    "order": (lambda: varlen(cu_seqlens_q=int32(0, 13, 12)), ["cu_seqlens_q must not decrease, got 13 and 12 at 1 and 2"]),
    "max": (
        lambda: varlen(max_seqlen_q=6, max_seqlen_k=torch.tensor(5)),
        [
            "max_seqlen_q must be at least the longest sequence, got 6 and 7 at 1",
            "max_seqlen_k must be at least the longest sequence, got 5 and 8 at 0",
        ],
    ),
    "used": (
        lambda: varlen(seqused_k=int32(8, 8)),
        ["seqused_k must lie between 0 and the sequence's length, got 8 and 7 at 1"],
    ),
    "pad": (
        lambda: varlen(leftpad_q=int32(-1, 0)),
        ["leftpad_q must lie between 0 and the sequence's length, got -1 and 5 at 0"],
    ),
    "both_sides": (
        lambda: varlen(cu_seqlens_q=int32(-2, 5, 12), cu_seqlens_k=int32(3, 8, 20), window_size=(-3, 0)),
        [
            "cu_seqlens_q must start at 0, got -2", "cu_seqlens_k must start at 0, got 3",
            "cu_seqlens_k must end at k.total_k or before, got 20 and 15",
            "window_size left must be -1 (unbounded) or at least 0, got -3",
        ],
    ),
}  # fmt: skip


def expect(call: Callable[[], Any], exception: type[Exception], function: str, rules: list[str]) -> None:
    with pytest.raises(exception) as info:
        call()
    assert type(info.value) is exception
    assert str(info.value) == f"{function}: " + "; ".join(rules)


@pytest.mark.parametrize("name", BAD)
def test_eager(name: str) -> None:
    make, exception, rules = BAD[name]
    function, tensors, options = make()
    expect(lambda: function(*tensors, **options), exception, function.__name__, rules)


@pytest.mark.parametrize("ask", (flash_ext.supported, flash_ext.explain))
@pytest.mark.parametrize("name", BAD)
def test_questions(name: str, ask: Callable) -> None:
    make, exception, rules = BAD[name]
    function, tensors, options = make()
    expect(lambda: ask(*tensors, **options), exception, function.__name__, rules)


@pytest.mark.parametrize("name", BAD)
def test_fake_tensors(name: str) -> None:
    make, exception, rules = BAD[name]
    with FakeTensorMode():
        function, tensors, options = make()
        expect(lambda: function(*tensors, **options), exception, function.__name__, rules)


@pytest.mark.parametrize(
    "name", ("scores_types", "sinks_shape", "scores_many", "cu_dtype", "packed_sizes", "used_shape", "boundaries_ends")
)
def test_compiled(name: str) -> None:
    """One graph: torch wraps what the trace raised, with the words in it."""
    make, _, rules = BAD[name]
    function, tensors, options = make()
    torch.compiler.reset()
    compiled = torch.compile(lambda *qkv: function(*qkv, **options), backend="eager", fullgraph=True)
    with pytest.raises(Exception) as info:
        compiled(*tensors)
    text = str(info.value).replace("\\'", "'")
    assert all(rule in text for rule in rules), text


@pytest.mark.parametrize("name", BAD_VALUES)
@pytest.mark.parametrize("validate", (False, True))
def test_values_on_the_host(name: str, validate: bool) -> None:
    make, rules = BAD_VALUES[name]
    function, tensors, options = make()
    expect(lambda: function(*tensors, **options, validate=validate), ValueError, "attention_varlen", rules)


def test_values_that_are_allowed() -> None:
    for options in (
        {"cu_seqlens_q": int32(0, 0, 3)},  # rows beyond the last sequence
        {"seqused_k": int32(0, 7), "leftpad_k": int32(8, 7)},  # nothing left to see
        {"seqused_q": int32(3, 4), "max_seqlen_q": 4},  # a maximum of what is shown
        {"max_seqlen_q": 10**9},
    ):
        function, tensors, options = varlen(**options)
        assert function(*tensors, **options, validate=True).shape == (12, 4, 16)


def test_many_sequences_give_one_error_each_kind() -> None:
    """A wrong tensor of a million lengths must not print a million lines."""
    function, tensors, options = varlen(cu_seqlens_q=int32(*range(1000, 0, -1)), cu_seqlens_k=int32(*[0] * 1000))
    with pytest.raises(ValueError) as info:
        function(*tensors, **options)
    assert len(str(info.value)) < 300


def test_an_unavailable_backend_is_named_by_every_function() -> None:
    for function, tensors, options in (dense(sinks=zeros(4)), varlen(), partials((0, 7))):
        with pytest.raises(ValueError, match=rf"^{function.__name__}: backend 'sm90' cannot run this call; these can: reference"):
            function(*tensors, **options, backend="sm90")


def test_float64_calls_take_float64_beside_them() -> None:
    q, k, v = (t.double() for t in dense()[1])
    for dtype in (torch.float32, torch.float64):
        made = {"sinks": zeros(4, dtype=dtype), "alibi_slopes": zeros(2, 4, dtype=dtype), "k_bias": zeros(2, 2, 7, dtype=dtype)}
        out, lse, max_logit = flash_ext.attention(q, k, v, **made, return_lse=True, return_max_logit=True)
        assert (out.dtype, lse.dtype, max_logit.dtype) == (torch.float64,) * 3


def test_sizes_that_are_symbols() -> None:
    """Rules about shapes beside q, k, v hold under dynamic shapes too."""
    torch.compiler.reset()
    compiled = torch.compile(flash_ext.attention, backend="eager", dynamic=True)
    for seqlen in (7, 9, 11):
        q, k = zeros(2, 5, 4, 16), zeros(2, seqlen, 2, 16)
        assert compiled(q, k, k, k_bias=zeros(2, 2, seqlen), sinks=zeros(4)).shape == q.shape
    rule = "k_bias must have shape (batch, num_heads_kv, seqlen_k) = (2, 2, 11), got (2, 2, 12)"
    expect(lambda: compiled(q, k, k, k_bias=zeros(2, 2, 12)), ValueError, "attention", [rule])


# --- supported, explain ---


@pytest.mark.parametrize("make", (lambda: dense(sinks=zeros(4), return_max_logit=True), varlen, lambda: partials((0, 3, 7))))
def test_questions_take_every_call(make: Callable) -> None:
    _, tensors, options = make()
    assert flash_ext.supported(*tensors, **options)["reference"] == []
    explanation = flash_ext.explain(*tensors, **options)
    assert (
        explanation.backend == "reference"
        and explanation.variant == "reference_fwd"
        and set(explanation.rejected) == {"sm90", "sm80"}
    )
    meta = [t.to("meta") for t in tensors]
    on_meta = {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in options.items()}
    assert flash_ext.explain(*meta, **on_meta).grid == explanation.grid
