"""Modules: parameters and state, no mathematics."""

from .rotary import RotaryEmbedding

__all__ = ["RotaryEmbedding"]
