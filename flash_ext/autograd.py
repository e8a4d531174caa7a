"""Gradients of the ops of flash_ext/ops.py, registered with the dispatcher."""

from __future__ import annotations

import torch

from . import op_gradients, ops
from .call import TENSORS, Inputs

op_gradients.register(Inputs, TENSORS)
torch.library.register_autograd(
    "flash_ext::bwd_preprocess",
    op_gradients.no_gradient("bwd_preprocess has no gradient; differentiate flash_ext.attention"),
    lib=ops._library,
)
