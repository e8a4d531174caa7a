"""flash_ext: exact attention for PyTorch. A few functions, hand-written CUDA kernels behind them, correct on any device."""

from importlib.metadata import PackageNotFoundError, version

from . import autograd as autograd  # registers the gradients
from . import compat as compat
from .attention import attention, attention_partials
from .dispatch import Explanation, explain, supported
from .env import FallbackWarning
from .merge import merge_attention
from .varlen import attention_varlen

try:
    __version__ = version("flash_ext")
except PackageNotFoundError:  # run from a checkout that was never installed
    __version__ = "0+unknown"

__all__ = [
    "Explanation", "FallbackWarning", "attention", "attention_partials", "attention_varlen", "compat", "explain", "merge_attention",
    "supported",
]  # fmt: skip
