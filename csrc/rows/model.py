"""What a row of the table of variants is, and the C++ names that its columns stand for."""

from __future__ import annotations

from dataclasses import dataclass

GROUPS = ("sm80", "sm89", "sm90")
ARCHITECTURES = ("sm80", "sm90")  # the groups that have every kernel of a 16-bit call; sm89 adds FP8 to sm80
DTYPES = ("bf16", "fp16")
CXX_ELEMENT = {"bf16": "__nv_bfloat16", "fp16": "__half"}
CXX_SCALAR_TYPE = {
    "bf16": "ScalarType::kBFloat16", "fp16": "ScalarType::kFloat16", "f32": "ScalarType::kFloat32", "": "ScalarType::kBool",
    "e4m3": "ScalarType::kFloat8E4m3",
}  # fmt: skip
CXX_MASK = {"full": "FullMask", "causal": "CausalMask", "local": "LocalMask", "blocks": "BlockMask", "segments": "SegmentMask"}
CXX_SCORE = {False: "PlainScore", True: "ModifiedScore"}


@dataclass(frozen=True)
class Kernel:
    """A kernel source: its header and the C++ names that the generated code puts together (in namespace flash_ext)."""

    op: str
    header: str
    params: str
    body: str
    launch: str

    @property
    def launcher(self) -> str:
        """The type of its launchers, in host/launchers.h."""
        return self.params.removesuffix("Params") + "Launcher"


@dataclass(frozen=True)
class Variant:
    """One row: one kernel entry.

    arch is the group whose compiler flags the row is built with, and the lowest architecture that runs it: sm80 (SASS of
    the chosen 8.x and later architectures, and compute_80 PTX for all others), sm89 (the same from 8.9 on) or sm90 (sm_90a
    only). dtype is '' where there is none. head_dim and head_dim_v are the largest that the row covers (0 where there are
    none); smaller multiples of 8 run on it too. mask is the policy, '' where there is none; scored: with the modified score
    (softcap, ALiBi, key bias). block_m and block_n are the tile (rows of queries, rows of keys; 0 where there is none). config
    is the C++ type that the kernel template is instantiated with. smem_kib: rows that differ in it alone are tiles for devices
    whose CTAs may have that much shared memory (in KiB); the planner takes the largest that fits. 0: one tile for every device.
    """

    op: str
    arch: str
    dtype: str
    head_dim: int
    head_dim_v: int
    mask: str
    block_m: int
    block_n: int
    config: str
    scored: bool = False
    smem_kib: int = 0
    # FP8 forward: one scale for a 'head' or for each 'block' of 64 rows; '_unflushed': sums stay in the tensor cores.
    # Backward: 'dq' and 'dkv' form these gradients alone.
    kind: str = ""

    @property
    def name(self) -> str:
        dims = f"d{self.head_dim}" if self.head_dim == self.head_dim_v else f"d{self.head_dim}x{self.head_dim_v}"
        parts = (self.op, self.arch, self.dtype, dims if self.head_dim else "", self.mask, "scored" if self.scored else "")
        parts += (f"smem{self.smem_kib}",) if self.smem_kib else ()
        parts += (self.kind,)
        return "_".join(filter(None, parts))

    @property
    def unit(self) -> str:
        """The translation unit that holds this row: rows of one kernel source, dtype, architecture and size together."""
        if self.op.startswith("fwd_mla"):
            return f"fwd_mla_{self.arch}_{self.dtype}"
        if self.op.startswith(("fwd_cache", "fwd_fp8_cache")):
            return f"{self.op}_{self.arch}_{self.dtype}"
        if self.op == "fwd_fp8":
            return f"{self.op}_{self.arch}_{self.kind}" + "_large" * (self.head_dim > 128) + "_scored" * self.scored
        if self.op not in ("fwd", "bwd"):
            return f"small_{self.arch}_{self.dtype if self.dtype in CXX_ELEMENT else 'bf16'}"
        return f"{self.op}_{self.arch}_{self.dtype}" + "_large" * (self.head_dim > 128) + "_scored" * self.scored
