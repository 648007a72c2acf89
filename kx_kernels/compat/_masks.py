"""Masks that other libraries add to scores."""

from __future__ import annotations

import torch
from torch import Tensor

from .._core.checks import reject


def kept(module: str, argument: str, mask: Tensor) -> Tensor:
    """bool, of the mask's shape: itself, or where nothing is added that hides a key, be it −∞ or as low as −1000."""
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        reject(module, argument, mask, "bool, or floats that are added to scores", TypeError)
    return mask > -1000
