"""Drop-in replacements: the signatures of other attention libraries, computed by flash_ext.

    from flash_ext.compat import flash_attn_func, flash_attn_varlen_func     # flash-attn 2.8
    from flash_ext.compat import flash_attn_3                                # flash-attn's hopper/flash_attn_interface.py
    from flash_ext.compat import flash_mla                                   # FlashMLA, dense decoding
    from flash_ext.compat import bert_padding                                # flash_attn/bert_padding.py
    from flash_ext.compat import scaled_dot_product_attention                # torch.nn.functional
    flash_ext.compat.transformers.register()                                 # Hugging Face transformers

Every argument of the original is there, in its order and with its default. One that is not supported raises
NotImplementedError with its name and value; nothing is ignored but hints that only tune speed.
"""

from . import bert_padding, flash_attn_3, flash_mla, transformers
from .flash_attn_2 import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from .kvcache import flash_attn_with_kvcache
from .sdpa import scaled_dot_product_attention

__all__ = [
    "bert_padding",
    "flash_attn_3",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "flash_mla",
    "scaled_dot_product_attention",
    "transformers",
]
