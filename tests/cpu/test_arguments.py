"""Bad input gets one clear error, the same words in eager mode, on fake and meta tensors, and under torch.compile."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import flash_ext
from flash_ext.arguments import BACKENDS


def tensors(
    q: tuple = (2, 5, 4, 16), k: tuple = (2, 7, 2, 16), v: tuple | None = None, dtype: torch.dtype = torch.float32
) -> tuple:
    return tuple(torch.zeros(shape, dtype=dtype) for shape in (q, k, k if v is None else v))


def with_last_stride(index: int) -> tuple:
    made = list(tensors())
    made[index] = torch.zeros(*made[index].shape[:3], 32)[..., ::2]
    return tuple(made)


def sparse(index: int) -> tuple:
    made = list(tensors())
    made[index] = made[index].to_sparse()
    return tuple(made)


def replaced(index: int, value: Any) -> tuple:
    made = list(tensors())
    made[index] = value(made[index]) if callable(value) else value
    return tuple(made)


# The op's arguments between q, k, v and backend.
PLAIN = (*(None,) * 9, 1.0, False, -1, -1, 0.0, (), False, False)

# id -> (tensors, options, exception, every violated rule in its own words)
BAD: dict[str, tuple[Callable[[], tuple], dict[str, Any], type[Exception], list[str]]] = {
    # Python types
    "q_list": (lambda: replaced(0, [1.0]), {}, TypeError, ["q must be a torch.Tensor, got list"]),
    "v_none": (lambda: replaced(2, None), {}, TypeError, ["v must be a torch.Tensor, got NoneType"]),
    "causal": (tensors, {"causal": 1}, TypeError, ["causal must be a bool, got int"]),
    "return_lse": (tensors, {"return_lse": "yes"}, TypeError, ["return_lse must be a bool, got str"]),
    "scale_type": (tensors, {"softmax_scale": "1"}, TypeError, ["softmax_scale must be a number or None, got str"]),
    "scale_bool": (tensors, {"softmax_scale": True}, TypeError, ["softmax_scale must be a number or None, got bool"]),
    "softcap_type": (tensors, {"softcap": None}, TypeError, ["softcap must be a number, got NoneType"]),
    "window_type": (tensors, {"window_size": 3}, TypeError, ["window_size must be a pair (left, right) of ints, got int"]),
    "window_element": (
        tensors,
        {"window_size": (3, 1.5)},
        TypeError,
        ["window_size must be a pair (left, right) of ints, got float"],
    ),
    "deterministic": (tensors, {"deterministic": 0}, TypeError, ["deterministic must be a bool or None, got int"]),
    "backend_type": (tensors, {"backend": 90}, TypeError, ["backend must be a str or None, got int"]),
    "two_types": (
        lambda: replaced(1, 3),
        {"causal": None},
        TypeError,
        ["k must be a torch.Tensor, got int", "causal must be a bool, got NoneType"],
    ),
    # tensors
    "rank": (
        lambda: replaced(0, lambda t: t[0]),
        {},
        ValueError,
        ["q must have 4 dimensions (batch, seqlen, num_heads, head_dim), got 3"],
    ),
    "rank_5": (
        lambda: replaced(2, lambda t: t[None]),
        {},
        ValueError,
        ["v must have 4 dimensions (batch, seqlen, num_heads, head_dim), got 5"],
    ),
    "sparse": (lambda: sparse(1), {}, ValueError, ["k must be a dense (strided) tensor, got layout torch.sparse_coo"]),
    "dtype": (
        lambda: tensors(dtype=torch.int32),
        {},
        ValueError,
        ["q.dtype must be bfloat16, float16, float32 or float64 (or float8_e4m3fn, forward only), got torch.int32"],
    ),
    "complex": (
        lambda: tensors(dtype=torch.complex64),
        {},
        ValueError,
        ["q.dtype must be bfloat16, float16, float32 or float64 (or float8_e4m3fn, forward only), got torch.complex64"],
    ),
    "mixed_dtypes": (
        lambda: replaced(1, lambda t: t.bfloat16()),
        {},
        ValueError,
        ["k.dtype must equal q.dtype, got torch.bfloat16 and torch.float32"],
    ),
    "mixed_devices": (
        lambda: replaced(2, lambda t: t.to("meta")),
        {},
        ValueError,
        ["v.device must equal q.device, got meta and cpu"],
    ),
    "batch": (
        lambda: tensors(k=(3, 7, 2, 16)),
        {},
        ValueError,
        ["k.batch must equal q.batch, got 3 and 2", "v.batch must equal q.batch, got 3 and 2"],
    ),
    "seqlen_v": (lambda: tensors(v=(2, 8, 2, 16)), {}, ValueError, ["v.seqlen must equal k.seqlen, got 8 and 7"]),
    "heads_v": (lambda: tensors(v=(2, 7, 1, 16)), {}, ValueError, ["v.num_heads must equal k.num_heads, got 1 and 2"]),
    "head_dim_k": (
        lambda: tensors(k=(2, 7, 2, 8), v=(2, 7, 2, 16)),
        {},
        ValueError,
        ["k.head_dim must equal q.head_dim, got 8 and 16"],
    ),
    "heads_multiple": (
        lambda: tensors(k=(2, 7, 3, 16)),
        {},
        ValueError,
        ["q.num_heads must be a multiple of k.num_heads, got 4 and 3"],
    ),
    "fewer_heads": (
        lambda: tensors(q=(2, 5, 1, 16)),
        {},
        ValueError,
        ["q.num_heads must be a multiple of k.num_heads, got 1 and 2"],
    ),
    "no_heads": (lambda: tensors(q=(2, 5, 0, 16)), {}, ValueError, ["q.num_heads must be at least 1, got 0"]),
    "no_heads_kv": (
        lambda: tensors(k=(2, 7, 0, 16)),
        {},
        ValueError,
        ["k.num_heads must be at least 1, got 0", "v.num_heads must be at least 1, got 0"],
    ),
    "head_dim": (
        lambda: tensors((2, 5, 4, 257), (2, 7, 2, 257), (2, 7, 2, 16)),
        {},
        ValueError,
        ["q.head_dim must lie in [1, 256], got 257"],
    ),
    "head_dim_v": (lambda: tensors(v=(2, 7, 2, 300)), {}, ValueError, ["v.head_dim must lie in [1, 256], got 300"]),
    "head_dim_0": (
        lambda: tensors((2, 5, 4, 0), (2, 7, 2, 0), (2, 7, 2, 16)),
        {},
        ValueError,
        ["q.head_dim must lie in [1, 256], got 0"],
    ),
    "last_stride_q": (
        lambda: with_last_stride(0),
        {},
        ValueError,
        ["q's last dimension must be contiguous (stride 1), got stride 2"],
    ),
    "last_stride_v": (
        lambda: with_last_stride(2),
        {},
        ValueError,
        ["v's last dimension must be contiguous (stride 1), got stride 2"],
    ),
    # options
    "scale_nan": (tensors, {"softmax_scale": float("nan")}, ValueError, ["softmax_scale must be finite, got nan"]),
    "scale_inf": (tensors, {"softmax_scale": float("-inf")}, ValueError, ["softmax_scale must be finite, got -inf"]),
    "window_below": (
        tensors,
        {"window_size": (-2, 0)},
        ValueError,
        ["window_size left must be -1 (unbounded) or at least 0, got -2"],
    ),
    "window_right": (
        tensors,
        {"window_size": (4, -7)},
        ValueError,
        ["window_size right must be -1 (unbounded) or at least 0, got -7"],
    ),
    "window_triple": (tensors, {"window_size": (1, 2, 3)}, ValueError, ["window_size must be a pair (left, right), got 3 values"]),
    "softcap_negative": (tensors, {"softcap": -1.0}, ValueError, ["softcap must be finite and at least 0 (0: off), got -1.0"]),
    "softcap_inf": (tensors, {"softcap": float("inf")}, ValueError, ["softcap must be finite and at least 0 (0: off), got inf"]),
    "softcap_nan": (tensors, {"softcap": float("nan")}, ValueError, ["softcap must be finite and at least 0 (0: off), got nan"]),
    "backend": (
        tensors,
        {"backend": "sm75"},
        ValueError,
        [
            "backend must be one of sm90, sm80, reference or None, got 'sm75' "
            "(flash_ext.supported(q, k, v) says why each cannot run)"
        ],
    ),
    # several at once
    "many": (
        lambda: tensors(q=(2, 5, 4, 16), k=(1, 7, 3, 8), v=(1, 9, 3, 16)),
        {"softcap": -2, "window_size": (-5, 1), "softmax_scale": float("inf"), "backend": "cuda"},
        ValueError,
        [
            "k.batch must equal q.batch, got 1 and 2",
            "v.batch must equal q.batch, got 1 and 2",
            "v.seqlen must equal k.seqlen, got 9 and 7",
            "k.head_dim must equal q.head_dim, got 8 and 16",
            "q.num_heads must be a multiple of k.num_heads, got 4 and 3",
            "softmax_scale must be finite, got inf",
            "window_size left must be -1 (unbounded) or at least 0, got -5",
            "softcap must be finite and at least 0 (0: off), got -2",
            "backend must be one of sm90, sm80, reference or None, got 'cuda' "
            "(flash_ext.supported(q, k, v) says why each cannot run)",
        ],
    ),
}
MIXED_DEVICES = "mixed_devices"


def message(exception: type[Exception], rules: list[str]) -> str:
    return "attention: " + "; ".join(rules)


def expect(call: Callable[[], Any], exception: type[Exception], rules: list[str]) -> None:
    with pytest.raises(exception) as info:
        call()
    assert type(info.value) is exception
    assert str(info.value) == message(exception, rules)


@pytest.fixture(params=BAD, ids=str)
def bad(request: pytest.FixtureRequest) -> tuple:
    return BAD[request.param]


def test_eager(bad: tuple) -> None:
    make, options, exception, rules = bad
    expect(lambda: flash_ext.attention(*make(), **options), exception, rules)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend(bad: tuple, backend: str) -> None:
    make, options, exception, rules = bad
    expect(lambda: flash_ext.attention(*make(), **{"backend": backend, **options}), exception, rules)


@pytest.mark.parametrize("ask", (flash_ext.supported, flash_ext.explain))
def test_questions(bad: tuple, ask: Callable) -> None:
    make, options, exception, rules = bad
    expect(lambda: ask(*make(), **options), exception, rules)


def test_fake_tensors(bad: tuple) -> None:
    make, options, exception, rules = bad
    with FakeTensorMode():
        expect(lambda: flash_ext.attention(*make(), **options), exception, rules)


@pytest.mark.parametrize("name", [n for n in BAD if n not in (MIXED_DEVICES, "sparse")])
def test_meta_tensors(name: str) -> None:
    make, options, exception, rules = BAD[name]

    def on_meta() -> tuple:
        strided = (
            torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") if isinstance(t, Tensor) else t for t in make()
        )
        return tuple(strided)

    expect(lambda: flash_ext.attention(*on_meta(), **options), exception, rules)


COMPILED = [
    "q_list", "causal", "rank", "dtype", "mixed_dtypes", "batch", "heads_multiple", "head_dim", "last_stride_q", "scale_nan",
    "window_below", "softcap_negative", "backend", "many",
]  # fmt: skip


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_with_graph_breaks_allowed(name: str) -> None:
    make, options, exception, rules = BAD[name]
    torch.compiler.reset()
    compiled = torch.compile(lambda *qkv: flash_ext.attention(*qkv, **options) * 2, backend="eager")
    expect(lambda: compiled(*make()), exception, rules)


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_as_one_graph(name: str) -> None:
    """Here torch wraps what the trace raised in its own error; the words are in it."""
    make, options, _, rules = BAD[name]
    torch.compiler.reset()
    compiled = torch.compile(lambda *qkv: flash_ext.attention(*qkv, **options), backend="eager", fullgraph=True)
    with pytest.raises(Exception) as info:
        compiled(*make())
    text = str(info.value).replace("\\'", "'")
    assert all(rule in text for rule in rules), text


def test_unavailable_backend_says_why_each_cannot_run() -> None:
    for backend in ("sm90", "sm80"):
        with pytest.raises(ValueError) as info:
            flash_ext.attention(*tensors(), backend=backend)
        text = str(info.value)
        assert text.startswith(f"attention: backend '{backend}' cannot run this call; these can: reference; ")
        assert "sm90: the tensors are not on a CUDA device" in text and "sm80: the tensors are not on a CUDA device" in text


def test_unknown_options_name_the_known_ones() -> None:
    with pytest.raises(TypeError, match="scale"):
        flash_ext.attention(*tensors(), scale=1.0)
    for ask in (flash_ext.supported, flash_ext.explain):
        with pytest.raises(TypeError, match=r"unknown option scale; attention takes causal, softmax_scale, window_size"):
            ask(*tensors(), scale=1.0)


def test_options_are_keywords() -> None:
    with pytest.raises(TypeError, match="positional"):
        flash_ext.attention(*tensors(), True)


@pytest.mark.parametrize(
    "options",
    [
        {"softmax_scale": 2}, {"softmax_scale": 0}, {"softmax_scale": -1e-3}, {"softcap": 3}, {"window_size": [4, 0]},
        {"window_size": (10**12, -1)}, {"deterministic": True}, {"backend": "reference"},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_allowed(options: dict) -> None:
    assert flash_ext.attention(*tensors(), **options).shape == (2, 5, 4, 16)


def test_any_strides_but_the_last_are_allowed() -> None:
    q, k, v = tensors()
    shuffled = torch.zeros(16, 4, 5, 2, 16)[0].permute(2, 1, 0, 3)
    assert flash_ext.attention(shuffled, k, v).shape == q.shape
    assert flash_ext.attention(torch.zeros(2, 5, 4, 16)[..., 3:4], k[..., 3:4], v[..., 3:4]).shape == (
        2,
        5,
        4,
        1,
    )  # one column: stride is moot


# --- symbolic sizes ---


def test_dynamic_sizes_are_checked() -> None:
    torch.compiler.reset()
    compiled = torch.compile(flash_ext.attention, backend="eager", dynamic=True)
    for seqlen in (5, 6, 9):
        assert compiled(*tensors((2, seqlen, 4, 16))).shape == (2, seqlen, 4, 16)
    expect(
        lambda: compiled(*tensors((2, 5, 4, 16), (2, 8, 3, 16))),
        ValueError,
        ["q.num_heads must be a multiple of k.num_heads, got 4 and 3"],
    )


def test_a_marked_sequence_stays_dynamic() -> None:
    """No rule may pin a sequence length down to the one traced: one graph serves every length."""
    torch.compiler.reset()
    graphs = []

    def backend(module: torch.fx.GraphModule, _: list) -> Callable:
        graphs.append(module)
        return module.forward

    compiled = torch.compile(lambda q, k, v: flash_ext.attention(q, k, v, causal=True), backend=backend, fullgraph=True)
    for seqlen in (5, 64, 129):
        q, k, v = tensors((2, seqlen, 4, 16), (2, seqlen + 3, 2, 16))
        for tensor in (q, k, v):
            torch._dynamo.mark_dynamic(tensor, 1)
        torch._dynamo.mark_dynamic(q, 0)
        torch._dynamo.mark_dynamic(k, 0)
        torch._dynamo.mark_dynamic(v, 0)
        assert compiled(q, k, v).shape == q.shape
    assert len(graphs) == 1


def test_an_unbacked_size_is_accepted() -> None:
    """A length known only from data (nonzero) neither fulfils nor violates a rule for certain; it must not be guarded on."""
    torch.compiler.reset()
    torch._dynamo.config.capture_dynamic_output_shape_ops = True
    try:

        def selected(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
            rows = keep.nonzero()[:, 0]
            return flash_ext.attention(q[:, rows], k, v)

        q, k, v = (torch.randn(s) for s in ((1, 6, 2, 8), (1, 5, 2, 8), (1, 5, 2, 8)))
        keep = torch.tensor([True, False, True, True, False, True])
        compiled = torch.compile(selected, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(q, k, v, keep), selected(q, k, v, keep))
    finally:
        torch._dynamo.config.capture_dynamic_output_shape_ops = False


# --- what C++ and the ops check on their own, for direct callers ---


def test_direct_ops_name_an_unavailable_backend() -> None:
    q, k, v = tensors()
    with pytest.raises((ValueError, RuntimeError), match=re.escape("backend 'sm90' cannot run this call")):
        torch.ops.flash_ext.fwd(q, k, v, *PLAIN, "sm90")


def test_numpy_scalars_are_numbers() -> None:
    numpy = pytest.importorskip("numpy")
    q, k, v = tensors()
    out = flash_ext.attention(q, k, v, softmax_scale=numpy.float64(0.25), softcap=numpy.float64(2.0))
    assert torch.equal(out, flash_ext.attention(q, k, v, softmax_scale=0.25, softcap=2.0))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"window_size": (2**63, 0)}, "window_size left must be below 2**63"),
        ({"softmax_scale": 10**400}, "softmax_scale must be finite"),
        ({"softcap": 1e39}, "softcap must be finite"),
    ],
)
def test_numbers_beyond_every_kernel(options: dict, words: str) -> None:
    q, k, v = tensors()
    for call in (flash_ext.attention, flash_ext.explain, flash_ext.supported):
        with pytest.raises(ValueError, match=words.replace("*", r"\*")):
            call(q, k, v, **options)


def test_nested_tensors_are_refused() -> None:
    q, k, v = tensors()
    nested = torch.nested.nested_tensor([torch.randn(3, 2, 8), torch.randn(5, 2, 8)])
    with pytest.raises(ValueError, match="q must be a dense"):
        flash_ext.attention(nested, k, v)
    with pytest.raises(ValueError, match="v must be a dense"):
        flash_ext.explain(q, k, nested)


def test_direct_calls_of_the_op_check_heads_and_dtype() -> None:
    q, k, v = tensors()
    for bad in ((q.int(), k.int(), v.int()), (q[:, :, :1].repeat(1, 1, 3, 1), k[:, :, :1].repeat(1, 1, 2, 1), v)):
        with pytest.raises(ValueError, match="multiple of k's"):
            torch.ops.flash_ext.fwd(*bad, *PLAIN, None)
