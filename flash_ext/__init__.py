"""flash_ext: exact attention for PyTorch. A few functions, hand-written CUDA kernels behind them, correct on any device."""

from importlib.metadata import PackageNotFoundError, version

from . import autograd as autograd  # registers the gradients
from . import block_attention as block_attention  # registers the ops of block masks
from . import compat as compat
from .attention import attention, attention_partials
from .block_mask import BlockMask, create_block_mask
from .block_sparse import block_sparse_attention
from .dispatch import Explanation, explain, supported
from .env import FallbackWarning
from .fp8 import attention_fp8_straight_through
from .jagged import attention_dense_jagged, attention_jagged
from .jagged_groups import JaggedGroups, jagged_groups
from .kvcache import attention_with_kvcache
from .kvcache_dispatch import CacheExplanation, explain_with_kvcache, supported_with_kvcache
from .masks import document_mask, prefix_lm_mask, rcm_permutation, sliding_window_mask, tree_mask
from .merge import merge_attention
from .packing import PackingCollator, attention_packed, cu_seqlens_from_position_ids
from .quantize import quantize_fp8
from .varlen import attention_varlen

try:
    __version__ = version("flash_ext")
except PackageNotFoundError:  # run from a checkout that was never installed
    __version__ = "0+unknown"

__all__ = [
    "BlockMask",
    "CacheExplanation",
    "Explanation",
    "FallbackWarning",
    "JaggedGroups",
    "PackingCollator",
    "attention",
    "attention_dense_jagged",
    "attention_fp8_straight_through",
    "attention_jagged",
    "attention_packed",
    "attention_partials",
    "attention_varlen",
    "attention_with_kvcache",
    "block_sparse_attention",
    "compat",
    "create_block_mask",
    "cu_seqlens_from_position_ids",
    "document_mask",
    "explain",
    "explain_with_kvcache",
    "jagged_groups",
    "merge_attention",
    "prefix_lm_mask",
    "quantize_fp8",
    "rcm_permutation",
    "sliding_window_mask",
    "supported",
    "supported_with_kvcache",
    "tree_mask",
]
