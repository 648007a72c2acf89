"""What names stand for: normalisers, and the formulas of implementations in the wild."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..gau_attention.presets import ACTIVATIONS as ACTIVATIONS

SCALES = ("dim", "chunk")
NORMALIZERS = ("visible", "valid", "chunk", "none")
LIN_NORMALIZERS = ("visible", "length", "chunk", "none")


class Preset(NamedTuple):
    """f, a, b, c and d of README.md."""

    activation: str
    scale: float | str | Tensor
    bias_scale: float | str | Tensor
    normalizer: float | str | Tensor
    lin_normalizer: float | str | Tensor


PRESETS = {  # by whether it is causal
    "su": dict.fromkeys((False, True), Preset("relu2", "dim", 1.0, "chunk", "visible")),
    "lucidrains": {
        False: Preset("relu2", "chunk", 1.0, "none", "length"),
        True: Preset("relu2", "chunk", 1.0, "none", "chunk"),
    },
}


def resolve(
    preset: str,
    causal: bool,
    activation: str | None,
    scale: float | str | Tensor | None,
    bias_scale: float | str | Tensor | None,
    normalizer: float | str | Tensor | None,
    lin_normalizer: float | str | Tensor | None,
) -> Preset:
    """The preset with what a call gives instead."""
    given = (activation, scale, bias_scale, normalizer, lin_normalizer)
    own = PRESETS[preset][bool(causal)]
    return Preset._make(x if y is None else y for x, y in zip(own, given, strict=True))
