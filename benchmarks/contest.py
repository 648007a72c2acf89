"""What the measurements of all operators share: contenders, the calls that are timed, and goals about them."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .goals import Measured, Where

Function = Callable[..., Any]
"""Takes an operator's differentiable tensors; gives a tensor or several."""


class Inputs(Protocol):
    """One set of buffers of a case."""

    case: Any
    leaves: tuple[Tensor, ...]  # what the function is called with
    grads: tuple[Tensor, ...]  # gradients of what it returns


class Missing(Exception):
    """A contender cannot run a case here."""


@dataclass(frozen=True)
class Contender:
    """Someone's operator. `prepare(inputs)` returns the function to time, or raises Missing with the reason it cannot.

    kind: "ours", "torch", "peer", or "other" for what computes something else on purpose.
    """

    name: str
    kind: str
    prepare: Callable[[Any], Function]


def imported(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except Exception as error:  # a peer may fail to import in ways of its own
        raise Missing(
            f"{package} does not import here: {type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error


def versions(packages: Sequence[str]) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in packages:
        found[package] = None
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def calls(
    sets: Sequence[Any], contenders: Sequence[Contender], error: Callable[[Function, Any], float]
) -> Iterator[tuple[Contender, Callable[[int], object] | str]]:
    """Each contender with the call to time, on one set of buffers after another, or the reason there is none.

    error(function, inputs): how far a function is from the reference, over the largest value.
    """
    case = sets[0].case
    for contender in contenders:
        try:
            function = contender.prepare(sets[0])
            wrong = 0.0 if contender.kind == "other" else error(function, sets[0])
        except Missing as missing:
            yield contender, str(missing)
            continue
        except Exception as failure:  # a peer that breaks on this case is a finding, not our failure
            if contender.kind == "ours":
                raise
            yield contender, f"fails: {type(failure).__name__}: {str(failure).splitlines()[0]}"
            continue
        if wrong > 0.05:  # far beyond what a bfloat16 or a phase in float32 explains: it computes something else
            yield contender, f"computes something else: off by {wrong:.2g} of the largest value"
        else:
            yield contender, {"forward": _forward, "backward": _backward, "both": _both}[case.what](function, sets)


def _forward(function: Function, sets: Sequence[Any]) -> Callable[[int], object]:
    def call(turn: int) -> object:
        with torch.no_grad():
            return function(*sets[turn % len(sets)].leaves)

    return call


def _leaves(x: Any) -> tuple[Tensor, ...]:
    return tuple(leaf.detach().requires_grad_() for leaf in x.leaves)


def _backward(function: Function, sets: Sequence[Any]) -> Callable[[int], object]:
    graphs = []
    for x in sets:
        leaves = _leaves(x)
        graphs.append((function(*leaves), leaves, x.grads))

    def call(turn: int) -> object:
        outs, leaves, grads = graphs[turn % len(graphs)]
        return torch.autograd.grad(outs, leaves, grads, retain_graph=True)

    return call


def _both(function: Function, sets: Sequence[Any]) -> Callable[[int], object]:
    ready = [(_leaves(x), x.grads) for x in sets]

    def call(turn: int) -> object:
        leaves, grads = ready[turn % len(ready)]
        return torch.autograd.grad(function(*leaves), leaves, grads)

    return call


def on(device: str) -> Where:
    if device == "cpu":
        return Where("a CPU", lambda environment: environment["device_kind"] == "cpu")
    return Where("an H200", lambda environment: "H200" in environment["device"])


def fraction(case: str, contenders: tuple[str, ...]) -> Callable[[dict[str, Any]], Measured | None]:
    """The best of these contenders, as a fraction of the limit."""

    def value(results: dict[str, Any]) -> Measured | None:
        rows = [r for r in results["timings"] if r["case"] == case and r["contender"] in contenders and r["seconds"]]
        best = max(rows, key=lambda r: r["of_limit"]["median"], default=None)
        return (best["of_limit"]["median"], best["of_limit"]["low"], best["of_limit"]["high"]) if best else None

    return value


def speedup(case: str, over: str, ours: tuple[str, ...] = ("kx cpu",)) -> Callable[[dict[str, Any]], Measured | None]:
    """How many times as fast as another contender the best of ours is."""

    def value(results: dict[str, Any]) -> Measured | None:
        row = {r["contender"]: r["of_limit"] for r in results["timings"] if r["case"] == case and r["seconds"]}
        mine = max((row[name] for name in ours if name in row), key=lambda r: r["median"], default=None)
        theirs = row.get(over)
        if mine is None or theirs is None:
            return None
        return mine["median"] / theirs["median"], mine["low"] / theirs["high"], mine["high"] / theirs["low"]

    return value


def milliseconds(case: str, ours: tuple[str, ...]) -> Callable[[dict[str, Any]], Measured | None]:
    """Of the fastest of these contenders."""

    def value(results: dict[str, Any]) -> Measured | None:
        rows = [r["seconds"] for r in results["timings"] if r["case"] == case and r["contender"] in ours]
        best = min((r for r in rows if r), key=lambda r: r["median"], default=None)
        return (best["median"] * 1e3, best["low"] * 1e3, best["high"] * 1e3) if best else None

    return value
