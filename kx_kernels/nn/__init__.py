"""Modules: parameters and state, no mathematics."""

from .favor import FavorFeatures
from .flash import FLASH
from .gated_attention import GatedAttentionCache, GatedAttentionUnit
from .linear_attention import DecodingState, LinearAttention
from .nystrom_attention import NystromAttention
from .rotary import RotaryEmbedding

__all__ = [
    "FLASH",
    "DecodingState",
    "FavorFeatures",
    "GatedAttentionCache",
    "GatedAttentionUnit",
    "LinearAttention",
    "NystromAttention",
    "RotaryEmbedding",
]
