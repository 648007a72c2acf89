"""Efficient-attention operators for PyTorch, each written as a reference, C++, Triton and CUDA kernel."""

__version__ = "0.1.0"

from . import nn
from ._core.dispatch import UnsupportedError, backend
from ._core.explain import explain
from .ops.gau_attention.api import gau_attention
from .ops.gau_inputs.api import gau_inputs
from .ops.linear_attention.api import linear_attention, linear_attention_step
from .ops.linear_attention.state import LinearAttentionState
from .ops.mixed_chunk_attention.api import mixed_chunk_attention
from .ops.nystrom_attention.api import nystrom_attention
from .ops.rope.api import rope
from .ops.rope.tables import rope_tables

__all__ = [
    "LinearAttentionState",
    "UnsupportedError",
    "backend",
    "explain",
    "gau_attention",
    "gau_inputs",
    "linear_attention",
    "linear_attention_step",
    "mixed_chunk_attention",
    "nn",
    "nystrom_attention",
    "rope",
    "rope_tables",
]
