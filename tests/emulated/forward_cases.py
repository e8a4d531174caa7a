"""Cases of the forward beside tests/cases.py, made for the kernels: rings that wrap, every row, windows, scores, odd sizes."""

from __future__ import annotations

import cases
from cases import Case

# (head_dim, head_dim_v) of the rows beside 64 and 128.
MORE_DIMS = ((96, 96), (192, 128), (192, 192), (256, 256))

# Long enough that persistent CTAs take several tiles and every ring of stages wraps.
LONG = (
    Case("wrap", 600, 1200, batch=1, num_heads=2, num_heads_kv=1, head_dim=128),
    Case("wrap", 700, 900, batch=1, num_heads=4, num_heads_kv=2, head_dim=128, causal=True),
    Case("wrap", 900, 1100, batch=1, num_heads=2, num_heads_kv=2, head_dim=64),
    Case("wrap", 500, 800, batch=2, num_heads=2, num_heads_kv=1, head_dim=64, causal=True),
    Case("tall", 700, 200, batch=1, num_heads=2, num_heads_kv=2, head_dim=128, causal=True),
    *(Case("no_key", 140, 0, head_dim=128, causal=causal) for causal in (False, True)),
    # A scale that is not positive rewrites Q in shared memory, in every stage of its ring.
    *(
        Case("wrap", 400, 300, num_heads_kv=1, head_dim=head_dim, causal=causal, softmax_scale=scale)
        for head_dim in (64, 128)
        for causal in (False, True)
        for scale in (-0.2, 0.0)
    ),
    *(
        Case("wrap", 430, 450, batch=1, num_heads_kv=1, head_dim=d, head_dim_v=d_v, causal=causal, softmax_scale=scale)
        for d, d_v in MORE_DIMS
        for causal, scale in ((False, None), (True, None), (False, -0.2), (True, 0.0))
    ),
    # Tiles of queries that see no key, before and after others, where the output is staged in the buffer of Q.
    *(Case("hidden_tiles", 600, 200, batch=1, head_dim=d, causal=True) for d in (192, 256)),
    *(Case("no_key", 140, 0, head_dim=d, head_dim_v=d_v, causal=causal) for d, d_v in MORE_DIMS for causal in (False, True)),
)
# What every row can do besides: rows of Q no tile of keys is visited for, packed sequences (more than one round of the search
# for a slot, grouped heads in one tile, or a tile for each head), parts of the keys.
KINDS = (
    {}, {"causal": True}, {"window_size": (70, 20)},
    {"window_size": (70, 20), "alibi": "heads", "k_bias": "hidden", "softcap": 5.0},
)  # fmt: skip
ALL_DIMS = ((64, 64), (128, 128), *MORE_DIMS)
SHOWN = {
    "seqused_q": (2, 3, 0, 1, 1, 120, 0, 200), "seqused_k": (0, 2, 1, 1, 1, 290, 5, 150),
    "leftpad_q": (1, 0, 0, 0, 0, 10, 0, 3), "leftpad_k": (0, 1, 0, 0, 0, 20, 0, 9),
}  # fmt: skip
SEQUENCES = (*((n % 5, (3 * n) % 7) for n in range(68)), (140, 300), (0, 9), (230, 200))
ROWS = tuple(
    case
    for d, d_v in ALL_DIMS
    for kind in KINDS
    for fields in [{"head_dim": d, "head_dim_v": d_v, **kind}]
    for case in (
        cases.packed("rows", SEQUENCES, num_heads=3, num_heads_kv=1, beyond=(3, 5), sinks=True, max_logit=True, **fields),
        cases.packed("rows", SEQUENCES[-8:], num_heads=2, num_heads_kv=2, sinks=True, max_logit=True, **SHOWN, **fields),
        Case("rows", 150, 300, batch=1, num_heads_kv=1, splits=(0, 100, 100, 300), **fields),
        Case("rows_few", 3, 150, num_heads=6, num_heads_kv=2, softmax_scale=0.8, **fields),
    )
)
# Windows and scores over several tiles, masked and not, in every row; what the scores can be, one by one.
BEYOND_CAUSAL = tuple(
    case
    for d, d_v in ALL_DIMS
    for fields in [{"batch": 1, "num_heads_kv": 1, "head_dim": d, "head_dim_v": d_v}]
    for case in (
        Case("wrap", 430, 700, window_size=(300, 90), **fields),
        Case("wrap", 430, 500, window_size=(-1, 40), softmax_scale=-0.2, **fields),
        Case("wrap", 430, 500, window_size=(400, -1), softmax_scale=0.0, **fields),
        Case("hidden_tiles", 600, 200, window_size=(50, 20), **fields),
        Case("wrap", 430, 700, window_size=(300, 90), alibi="batch", k_bias="hidden", **fields),
        Case("wrap", 430, 700, window_size=(300, 90), softcap=4.0, softmax_scale=-0.2, **fields),
        Case("wrap", 430, 700, window_size=(300, 90), softcap=520.0, softmax_scale=3.0, **fields),
        Case("wrap", 430, 500, causal=True, k_bias="normal", softmax_scale=0.0, sinks=True, **fields),
        Case("hidden_tiles", 600, 200, window_size=(50, 20), k_bias="hidden", sinks=True, **fields),
    )
)
# Other head dims run on the next larger row: TMA fills the columns beyond them with zeros, the store leaves them out.
ODD_DIMS = (
    *((d, d) for d in (8, 16, 24, 40, 56, 72, 80, 88, 104, 120, 136, 152, 184, 200, 248)),
    *((8, 256), (256, 8), (64, 96), (72, 24), (40, 128), (128, 40), (136, 128), (192, 96), (184, 136), (160, 192), (200, 64)),
)
ODD = tuple(
    Case("zero_fill", 150, 190, batch=1, num_heads_kv=1, head_dim=d, head_dim_v=d_v, causal=n % 2 == 0, layout="padded")
    for n, (d, d_v) in enumerate(ODD_DIMS)
)
ALL = (*cases.CASES.values(), *LONG, *ROWS, *BEYOND_CAUSAL, *ODD)
