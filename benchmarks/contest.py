"""What the measurements of all operators share: contenders, the calls that are timed, and goals about them."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from . import measure
from .calling import Missing, calling
from .environment import own_version
from .goals import Measured, Where

WRONG = 0.05  # of the largest value: far beyond what a bfloat16 or a phase in float32 explains
WRONG_OURS = 0.005  # and of ours where tensors are float32
FIRST = 128  # queries that are compared with exact attention
SHORT = 512  # tokens of which gradients are compared

Function = Callable[..., Any]
"""Takes an operator's differentiable tensors; gives a tensor or several."""


class Inputs(Protocol):
    """One set of buffers of a case."""

    case: Any
    leaves: tuple[Tensor, ...]  # what the function is called with
    grads: tuple[Tensor, ...]  # gradients of what it returns

    def define(self, *leaves: Tensor) -> Any:
        """What the operator gives by its definition, of leaves in float64."""


@dataclass(frozen=True)
class Contender:
    """Someone's operator. `prepare(inputs)` returns the function to time, or raises Missing with the reason it cannot.

    kind: "ours", "torch", "peer", or "other" for what computes something else on purpose.
    package: that it comes from.
    exact: what it has to give of the first rows, in float64, where that is not what the operator gives.
    work: bytes and flops of a case, where they are not the operator's.
    """

    name: str
    kind: str
    prepare: Callable[[Any], Function]
    package: str = "torch"
    exact: Callable[[Any], Tensor] | None = None
    work: Callable[[Any], dict[str, int]] | None = None

    @property
    def version(self) -> str:
        return own_version() if self.kind == "ours" else told(self.package)


def imported(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except Exception as error:  # a peer may fail to import in ways of its own
        raise Missing(f"{package} does not import here: {measure.reason(error)}") from error


def version(package: str) -> str | None:
    """With the commit, where one was installed."""
    try:
        found = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return None
    commit = json.loads(found.read_text("direct_url.json") or "{}").get("vcs_info", {}).get("commit_id")
    return f"{found.version} ({commit[:7]})" if commit else found.version


def told(package: str) -> str:
    return f"{package} {version(package) or 'not installed'}"


def versions(packages: Sequence[str]) -> dict[str, str | None]:
    return {package: version(package) for package in packages}


def off(out: Tensor, exact: Tensor) -> float:
    """The largest difference over the largest value, of what is exact: perhaps the first rows of [B, n, ...] alone."""
    return (out[: exact.shape[0], : exact.shape[1]].double() - exact).abs().max().item() / exact.abs().max().item()


def wrong(off: float, most: float = WRONG) -> str | None:
    """The reason that a result which is so far off has no speed."""
    return None if off <= most else f"wrong: off by {off:.2g} of the largest value"


def most_off(ours: bool, dtype: torch.dtype, gradient: bool = False) -> float:
    """How far a result may be off, or a gradient: rounding takes those of an eager Performer in bfloat16 to 8 %."""
    if ours:
        return WRONG_OURS if dtype == torch.float32 else WRONG
    return 2 * WRONG if gradient and dtype != torch.float32 else WRONG


def original(function: Any) -> Any:
    """What was compiled; None where nothing was."""
    return getattr(function, "_orig_mod", None) or getattr(function, "_torchdynamo_orig_callable", None)


def gradients_off(op: Any, contender: Contender, function: Function, x: Any) -> float:
    """How far its gradients are off, over the largest value of each: on the first tokens of a case; of what is compiled
    for one size on all of them, from those of what it was compiled of.
    """
    if uncompiled := original(function):
        exact = _both(uncompiled, [x])(0)
    else:
        x = op.Inputs(replace(x.case, length=min(x.case.length, SHORT)), x.leaves[0].device.type)
        function = contender.prepare(x)
        exact = _exact_gradients(contender, x)
    return max(off(mine, its.double()) for mine, its in zip(_both(function, [x])(0), exact, strict=True))


def _exact_gradients(contender: Contender, x: Any) -> tuple[Tensor, ...]:
    """In float64, of what it has to give. Where that is of the first rows, x.grads become zeros elsewhere."""
    wide = tuple(leaf.double().requires_grad_() for leaf in x.leaves)
    if contender.exact is None:
        return torch.autograd.grad(x.define(*wide), wide, [grad.double() for grad in x.grads])
    of_wide = copy(x)
    of_wide.leaves = wide
    out = contender.exact(of_wide)
    (grad,) = x.grads
    first = grad[: out.shape[0], : out.shape[1]]
    x.grads = (torch.zeros_like(grad),)
    x.grads[0][: out.shape[0], : out.shape[1]] = first
    return torch.autograd.grad(out, wide, first.double())


def softmax(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """Softmax attention of the first queries [B, n, H, D], in float64."""
    q, k, v = (x.double().transpose(1, 2) for x in (q[:, :FIRST], k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def calls(
    op: Any, sets: Sequence[Any], contenders: Sequence[Contender] | None = None
) -> Iterator[tuple[Contender, Callable[[int], object] | str]]:
    """An operator's contenders, each with the call to time, on one set of buffers after another, or why it has none."""
    for contender in op.contenders(sets[0].case) if contenders is None else contenders:
        yield contender, _call(op, contender, sets)


def _call(op: Any, contender: Contender, sets: Sequence[Any]) -> Callable[[int], object] | str:
    try:
        with calling(contender.name):
            return _checked(op, contender, sets)
    except Missing as missing:
        return str(missing)
    except Exception as failure:  # one that breaks on this case, or has no room for it, is a finding
        return f"fails: {measure.reason(failure)}"


def _checked(op: Any, contender: Contender, sets: Sequence[Any]) -> Callable[[int], object] | str:
    function = contender.prepare(sets[0])
    with torch.no_grad():
        exact = contender.exact
        error = op.error(function, sets[0]) if exact is None else off(function(*sets[0].leaves), exact(sets[0]))
    ours, what, dtype = contender.kind == "ours", sets[0].case.what, sets[0].case.dtype
    why = wrong(error, most_off(ours, dtype))
    if why is None and what != "forward":
        why = wrong(gradients_off(op, contender, function, sets[0]), most_off(ours, dtype, gradient=True))
    timed = {"forward": _forward, "backward": _backward, "both": _both}[what]
    return why or timed(function, sets)


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


def _both(function: Function, sets: Sequence[Any]) -> Callable[[int], tuple[Tensor, ...]]:
    ready = [(_leaves(x), x.grads) for x in sets]

    def call(turn: int) -> tuple[Tensor, ...]:
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
