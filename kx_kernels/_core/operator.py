"""An operator with one differentiable result: who runs it, its gradients of every order, and what torch sees of it.

The gradient recomputes what it needs, and has a gradient itself, which comes of the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import dispatch, library

Leaves = Sequence[Tensor | None]


def _own(leaves: Leaves) -> list[Tensor | None]:
    """The same values as leaves that require grad."""
    return [None if x is None else x.detach().requires_grad_() for x in leaves]


class _Value(torch.autograd.Function):
    """o. Saves the tensors of a call, and what the backward pass is given."""

    @staticmethod
    def forward(ctx: Any, op: Operator, p: Any, backend: str, *leaves: Tensor | None) -> Tensor:
        p = op.with_leaves(p, leaves)
        results = op.run(p, backend)
        ctx.save_for_backward(*p[: op.num_tensors], *results[1:])
        ctx.op, ctx.options, ctx.backend = op, p[op.num_tensors :], backend
        return results[0]

    @staticmethod
    def backward(ctx: Any, grad_o: Tensor) -> tuple[Tensor | None, ...]:
        op = ctx.op
        kept = ctx.saved_tensors[op.num_tensors :]
        p = op.problem(*ctx.saved_tensors[: op.num_tensors], *ctx.options)
        if library.transforming((grad_o,)):
            with torch.enable_grad():
                found = op.reference_gradients(op.with_leaves(p, _own(op.leaves(p))), grad_o, create_graph=False)
        elif torch.is_grad_enabled():
            found = _Gradient.apply(op, p, ctx.backend, kept, *op.leaves(p), grad_o)
        else:
            found = op.run_backward(p, ctx.backend, op.results(grad_o, *kept), grad_o)
        return None, None, None, *found


class _Gradient(torch.autograd.Function):
    """The gradient as a function of its own."""

    @staticmethod
    def forward(ctx: Any, op: Operator, p: Any, backend: str, kept: Leaves, *values: Tensor | None) -> tuple:
        *leaves, grad_o = values
        p = op.with_leaves(p, leaves)
        assert grad_o is not None
        ctx.save_for_backward(*p[: op.num_tensors], grad_o)
        ctx.op, ctx.options = op, p[op.num_tensors :]
        return tuple(op.run_backward(p, backend, op.results(grad_o, *kept), grad_o))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, grad_o = ctx.saved_tensors
        p = ctx.op.problem(*tensors, *ctx.options)
        return None, None, None, None, *ctx.op.second_gradients(p, grad_o, grads)


@dataclass(frozen=True)
class Operator:
    """
    Args:
        name: of the public function.
        problem: NamedTuple of a checked call; its first `num_tensors` fields are tensors or None.
        results: NamedTuple of o and of what the backward pass is given beside it: tensors of two or more dimensions, or
            None.
        gradients: NamedTuple whose fields are those of a problem that gradients reach, in its order.
        arguments: the fields of a problem as torch's schemas write them.
        reference(p): o by torch's own operators, which autograd and torch.func see through.
        check(p): raises for values that no kernel could serve, where reading them waits for nothing.
        empty_results(p), empty_gradients(p): memory for either, laid out as every backend's.
        backends(): in the order that `auto` tries them.
        alone(p): the same call where nothing but o is wanted.
    """

    name: str
    problem: Callable[..., Any]
    num_tensors: int
    results: Any
    gradients: Any
    arguments: str
    reference: Callable[[Any], Tensor]
    check: Callable[[Any], None]
    empty_results: Callable[[Any], Any]
    empty_gradients: Callable[[Any], Any]
    backends: Callable[[], tuple[dispatch.Backend, ...]]
    alone: Callable[[Any], Any] = lambda p: p

    def leaves(self, p: Any) -> tuple[Tensor | None, ...]:
        return tuple(getattr(p, name) for name in self.gradients._fields)

    def with_leaves(self, p: Any, leaves: Leaves) -> Any:
        """The same call of other leaves."""
        return p._replace(**dict(zip(self.gradients._fields, leaves, strict=True)))

    def reference_gradients(self, p: Any, grad_o: Tensor, create_graph: bool) -> Any:
        """The gradients of p's leaves for that of o."""
        present = [x for x in self.leaves(p) if x is not None]
        o = self.reference(p)
        found = iter(torch.autograd.grad(o, present, grad_o, create_graph=create_graph, materialize_grads=True))
        return self.gradients._make(None if x is None else next(found) for x in self.leaves(p))

    def run_reference(self, p: Any) -> Any:
        results = self.empty_results(p)
        results[0].copy_(self.reference(p))
        for unused in results[1:]:  # its gradient does not ask for them
            if unused is not None:
                unused.zero_()
        return results

    def run_reference_backward(self, p: Any, results: Any, grad_o: Tensor) -> Any:
        with library.autograd_on():
            found = self.reference_gradients(self.with_leaves(p, _own(self.leaves(p))), grad_o, create_graph=False)
        gradients = self.empty_gradients(p)
        for x, g in zip(gradients, found, strict=True):
            if x is not None and g is not None:
                x.copy_(g)
        return gradients

    def run(self, p: Any, backend: str) -> Any:
        """The results with no autograd."""
        self.check(p)
        return dispatch.choose(self.name, self.backends(), backend, p).run(library.plain(p))

    def run_backward(self, p: Any, backend: str, results: Any, grad_o: Tensor) -> Any:
        """The gradients of a call whose forward pass gave `results`."""
        chosen = dispatch.choose(self.name, self.backends(), backend, p)
        assert chosen.run_backward is not None
        return chosen.run_backward(library.plain(p), results, grad_o.resolve_neg())

    def second_gradients(self, p: Any, grad_o: Tensor, grads: Leaves) -> list[Tensor | None]:
        """The gradients of the gradients of p's leaves for that of o, in all of these: by the reference."""
        with library.autograd_on():
            leaves, grad_o = _own(self.leaves(p)), grad_o.detach().requires_grad_()
            first = self.reference_gradients(self.with_leaves(p, leaves), grad_o, create_graph=True)
            pairs = [(y, g) for y, g in zip(first, grads, strict=True) if y is not None and g is not None]
            ys, gs = zip(*pairs, strict=True)
            inputs = [x for x in (*leaves, grad_o) if x is not None]
            found = iter(torch.autograd.grad(ys, inputs, gs, materialize_grads=True))
        return [None if x is None else next(found) for x in (*leaves, grad_o)]

    def attend(self, p: Any, backend: str) -> Tensor:
        """o, differentiable, by the shortest road that is correct for this call."""
        if library.needs_operator([x for x in p[: self.num_tensors] if x is not None]):
            return getattr(torch.ops.kx, self.name)(*p, backend)[0]
        if library.transforming():
            dispatch.choose(self.name, self.backends(), backend, p)
            return self.reference(p)
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in self.leaves(p)):
            return _Value.apply(self, p, backend, *self.leaves(p))
        return self.run(self.alone(p), backend)[0]

    def register(self) -> None:
        """Defines kx::<name> and kx::<name>_backward, each with its gradient.

        torch's operators return tensors, never None: what a call does not have is an empty one.
        """
        num, size = self.num_tensors, self.arguments.count(",") + 1  # of a problem
        num_leaves, num_kept = len(self.gradients._fields), len(self.results._fields) - 1

        def given(tensors: Leaves, like: Tensor) -> tuple[Tensor, ...]:
            return tuple(like.new_empty(0) if x is None else x for x in tensors)

        def run(*arguments: Any) -> tuple[Tensor, ...]:
            return given(self.run(self.problem(*arguments[:size]), arguments[size]), arguments[0])

        def fake(*arguments: Any) -> tuple[Tensor, ...]:
            return given(self.empty_results(self.problem(*arguments[:size])), arguments[0])

        def run_backward(*arguments: Any) -> tuple[Tensor, ...]:
            p, backend, kept, grad_o = (
                self.problem(*arguments[:size]),
                arguments[size],
                arguments[size + 1 : -1],
                arguments[-1],
            )
            return given(self.run_backward(p, backend, self.results(grad_o, *kept), grad_o), arguments[0])

        def fake_backward(*arguments: Any) -> tuple[Tensor, ...]:
            return given(self.empty_gradients(self.problem(*arguments[:size])), arguments[0])

        def setup(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.options, ctx.backend = inputs[num:size], inputs[size]
            ctx.save_for_backward(*inputs[:num], *output[1:])

        def present(p: Any, found: Leaves) -> list[Tensor | None]:
            return [None if x is None else g for x, g in zip(self.leaves(p), found, strict=True)]

        def places(p: Any, found: Leaves) -> tuple[Tensor | None, ...]:
            """The gradients of leaves, each at its place among the fields of a problem."""
            by_name = dict(zip(self.gradients._fields, found, strict=True))
            return tuple(by_name.get(name) for name in p._fields)

        def gradients(ctx: Any, grad_o: Tensor, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
            p = self.problem(*ctx.saved_tensors[:num], *ctx.options)
            kept = [None if x.dim() == 1 else x for x in ctx.saved_tensors[num:]]
            found = getattr(torch.ops.kx, f"{self.name}_backward")(*p, ctx.backend, *kept, grad_o)
            return *places(p, present(p, found)), None

        def setup_backward(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.options = inputs[num:size]
            ctx.save_for_backward(*inputs[:num], inputs[-1])

        def second_gradients(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            *tensors, grad_o = ctx.saved_tensors
            p = self.problem(*tensors, *ctx.options)
            *found, grad = self.second_gradients(p, grad_o, present(p, grads))
            return *places(p, found), *(None,) * (1 + num_kept), grad

        arguments = f"{self.arguments}, str backend"
        kept = "".join(f", Tensor? {name}" for name in self.results._fields[1:])
        library.register(f"{self.name}({arguments}) -> ({', '.join(['Tensor'] * (1 + num_kept))})", run, fake)
        library.register(
            f"{self.name}_backward({arguments}{kept}, Tensor grad_o) -> ({', '.join(['Tensor'] * num_leaves)})",
            run_backward,
            fake_backward,
        )
        torch.library.register_autograd(f"kx::{self.name}", gradients, setup_context=setup)
        torch.library.register_autograd(f"kx::{self.name}_backward", second_gradients, setup_context=setup_backward)
