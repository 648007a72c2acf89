"""What names stand for: score functions, normalisers, and the formulas of implementations in the wild."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

ACTIVATIONS = ("relu2", "relu", "silu", "sigmoid", "laplace", "identity")  # kernels know them by their places
SOFTMAXES = ("softmax", "softmax_plus")  # which torch serves
NORMALIZERS = ("visible", "valid", "length", "length_squared", "sum", "none")
SCALES = ("dim", "length", "valid", "visible")


class Preset(NamedTuple):
    """f, a, b and c of README.md."""

    activation: str
    scale: float | str | Tensor
    bias_scale: float | str | Tensor
    normalizer: float | str | Tensor


PRESETS = {
    "su": Preset("relu2", "dim", 1.0, "visible"),
    "bert4keras": Preset("relu2", "dim", 1.0, "visible"),
    "gau_alpha": Preset("softmax_plus", "dim", 1.0, "none"),
    "flash": Preset("relu2", "length", "length", "none"),
    "mega": Preset("relu2", "visible", 1.0, "none"),
    "rtmpose": Preset("relu2", "dim", "dim", "none"),
    "hstu": Preset("silu", 1.0, 1.0, "length"),
}


def resolve(
    preset: str,
    activation: str | None,
    scale: float | str | Tensor | None,
    bias_scale: float | str | Tensor | None,
    normalizer: float | str | Tensor | None,
) -> Preset:
    """The preset with what a call gives instead."""
    own = PRESETS[preset]
    return Preset(
        own.activation if activation is None else activation,
        own.scale if scale is None else scale,
        own.bias_scale if bias_scale is None else bias_scale,
        own.normalizer if normalizer is None else normalizer,
    )
