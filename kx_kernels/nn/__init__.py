"""Modules: parameters and state, no mathematics."""

from .favor import FavorFeatures
from .linear_attention import DecodingState, LinearAttention
from .nystrom_attention import NystromAttention
from .rotary import RotaryEmbedding

__all__ = ["DecodingState", "FavorFeatures", "LinearAttention", "NystromAttention", "RotaryEmbedding"]
