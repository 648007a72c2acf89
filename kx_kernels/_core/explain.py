"""Which backend serves a call, and why the others do not."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from .dispatch import AUTO, requested


def table(survey: list[tuple[str, str | None]], wanted: str = AUTO) -> str:
    """One line per backend: the one that serves, those that could, and why the others cannot."""
    from tabulate import tabulate

    rows = []
    serves = next((n for n, why in survey if why is None and wanted in (AUTO, n)), None)
    for name, why in survey:
        verdict = f"cannot: {why}" if why is not None else "serves this call" if name == serves else "could serve it"
        rows.append((name, verdict))
    return tabulate(rows, tablefmt="plain")


def explain(op: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> str:
    """A table of the backends of `op`: which one serves the call op(*args, **kwargs), and why the others do not.

    Args:
        op: an operator with backends (`rope`, `linear_attention`, `linear_attention_step`, `gau_attention`), or its
            name.
        args, kwargs: what it would be called with. Nothing is computed.

    Raises what the call itself would raise for wrong arguments.
    """
    name = op if isinstance(op, str) else op.__name__
    try:
        api = importlib.import_module(f"kx_kernels.ops.{name.removesuffix('_step')}.api")
        survey = api.survey_step if name.endswith("_step") else api.survey
    except (ModuleNotFoundError, AttributeError):
        raise ValueError(f"explain: argument 'op' is {name!r}; expected an operator, such as kx.rope") from None
    return table(survey(*args, **kwargs), requested(kwargs.get("backend")))
