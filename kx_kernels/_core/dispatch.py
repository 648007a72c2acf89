"""Choosing a backend: `auto` takes the first that can serve, a name must serve or raise."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from . import library, triton

AUTO = "auto"
NAMES = ("cuda", "triton", "cpu", "torch", "reference")


class Backend(NamedTuple):
    """One implementation of one operator.

    unsupported(problem): why it cannot serve this call, or None if it can.
    run(problem, ...): tensors in, fresh tensors out (or the operator's documented in-place form).
    run_backward(problem, ...): gradients, where they are another computation than `run`.
    comes_last(problem): whether `auto` tries it after those that serve everything, as one of these is faster.
    """

    name: str
    unsupported: Callable[[Any], str | None]
    run: Callable[..., Any]
    run_backward: Callable[..., Any] | None = None
    comes_last: Callable[[Any], bool] = lambda problem: False


class UnsupportedError(RuntimeError):
    """A backend was asked for by name and cannot serve this call."""


def _checked(name: str, source: str) -> str:
    if name != AUTO and name not in NAMES:
        raise ValueError(f"{source} is {name!r}; expected one of {', '.join(map(repr, (AUTO, *NAMES)))}")
    return name


_default = _checked(os.environ.get("KX_BACKEND", AUTO), "environment variable KX_BACKEND")


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Within the block, calls that pass no `backend=` use this one ("auto", "cuda", "triton", "cpu", "torch" or
    "reference").

    Process-wide, like torch.backends flags: threads that autograd starts see it too.
    """
    global _default
    before, _default = _default, _checked(name, "backend")
    try:
        yield
    finally:
        _default = before


def requested(name: str | None) -> str:
    """The backend that a call asks for: its own argument, else the enclosing `kx.backend(...)`, else KX_BACKEND."""
    return _default if name is None else _checked(name, "argument 'backend'")


def _reason(backend: Backend, problem: Any) -> str | None:
    if backend.name != "reference" and library.transforming():
        return "torch.func transforms see through torch's own operators only, and it is none"
    return backend.unsupported(problem)


def _in_order(backends: Sequence[Backend], problem: Any) -> Sequence[Backend]:
    """As `auto` tries them: Triton's interpreter, which is for looking into a kernel, after everything else."""
    interpreted = triton.interpreted()
    return sorted(backends, key=lambda b: (interpreted and b.name == "triton") or b.comes_last(problem))


def survey(backends: Sequence[Backend], problem: Any) -> list[tuple[str, str | None]]:
    """(name, reason it cannot serve, or None) for each backend, in the order that `auto` tries them."""
    return [(b.name, _reason(b, problem)) for b in _in_order(backends, problem)]


def choose(op: str, backends: Sequence[Backend], name: str, problem: Any) -> Backend:
    """The backend that serves this call.

    Raises UnsupportedError, with every backend's reason, if the one asked for by name cannot.
    """
    for candidate in _in_order(backends, problem):
        if name in (AUTO, candidate.name) and _reason(candidate, problem) is None:
            return candidate
    found = survey(backends, problem)
    if name not in (AUTO, *(n for n, _ in found)):
        found.insert(0, (name, "this operator has none"))
    reasons = "\n".join(f"  {n}: {why or 'can serve'}" for n, why in found)
    raise UnsupportedError(f"{op}: backend {name!r} cannot serve this call\n{reasons}")
