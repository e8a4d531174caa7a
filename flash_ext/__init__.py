"""flash_ext: exact attention for PyTorch. One function, hand-written CUDA kernels behind it, correct on any device."""

from importlib.metadata import PackageNotFoundError, version

from . import autograd as autograd  # registers the gradients
from .attention import attention
from .dispatch import Explanation, explain, supported
from .env import FallbackWarning

try:
    __version__ = version("flash_ext")
except PackageNotFoundError:  # run from a checkout that was never installed
    __version__ = "0+unknown"

__all__ = ["Explanation", "FallbackWarning", "attention", "explain", "supported"]
