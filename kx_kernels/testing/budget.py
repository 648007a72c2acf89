"""The one tolerance: how far a kernel may be from the float64 reference."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]


def budget(exact: Tensor, eager: Tensor, dtype: torch.dtype | None = None) -> float:
    """Twice the largest error of the same-dtype eager reference, plus one rounding of the largest value.

    For float64, pass as `eager` the float32 reference of the same inputs: its error, scaled to float64's rounding,
    stands for that of the float64 reference, which has nothing more exact to be compared with. It errs as well, so
    three errors may meet and not two.

    Args:
        exact: the reference's result in float64.
        eager: the reference's result in the dtype under test (float32 for float64).
        dtype: the dtype under test; eager's if it is not given.
    """
    finite = exact.isfinite() & eager.isfinite()
    if not finite.any():
        return 0.0
    error = (eager.double() - exact)[finite].abs().max().item()
    rounding = torch.finfo(eager.dtype).eps / 2 * exact[finite].abs().max().item()
    unit = 1.5 * torch.finfo(torch.float64).eps / torch.finfo(eager.dtype).eps if dtype == torch.float64 else 1.0
    return (2 * error + rounding) * unit


def assert_within_budget(
    actual: Tensor, exact: Tensor, eager: Tensor, name: str, neighbours: Callable[[], Iterable[Pair]] = tuple
) -> None:
    """Fails unless `actual` is as near to `exact` as the budget asks, with NaN and infinities in the same places.

    Args:
        actual: the result under test, any dtype.
        exact: the reference in float64, of the same shape.
        eager: the reference in actual's dtype (float32 for float64).
        name: what the failure message calls it.
        neighbours: gives (exact, eager) of inputs next to these. The error of the eager reference is one draw of many:
            where it happens to be small, that of a neighbour counts. Asked only where the first budget is exceeded.
    """
    assert actual.shape == exact.shape, f"{name}: shape {list(actual.shape)}, the reference has {list(exact.shape)}"
    if actual.dtype != torch.float64:
        assert actual.dtype == eager.dtype, f"{name}: dtype {actual.dtype}, the reference has {eager.dtype}"
    allowed = budget(exact, eager, actual.dtype)
    value = actual.double()
    same = (value == exact) | (value.isnan() & exact.isnan())
    error = torch.where(same, 0.0, (value - exact).abs().nan_to_num(nan=torch.inf))
    if error.numel() > 0 and error.max() > allowed:
        allowed = max(allowed, *(budget(*pair, actual.dtype) for pair in neighbours()), 0.0)
    if error.numel() == 0 or error.max() <= allowed:
        return
    worst = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    off = error[worst].item()
    raise AssertionError(
        f"{name}: {int((error > allowed).sum())} of {error.numel()} elements exceed the budget; "
        f"worst at {list(worst)}: {actual[worst].item()!r}, the float64 reference has {exact[worst].item()!r}; "
        f"error {off:.3e}, budget {allowed:.3e}, ratio {off / allowed if allowed else float('inf'):.2f}"
    )
