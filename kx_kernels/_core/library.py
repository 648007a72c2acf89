"""The operators as torch sees them, in namespace `kx`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

NAMESPACE = "kx"


def register(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Defines `kx::<schema>` with one implementation for every device and one for tensors without data."""
    name = f"{NAMESPACE}::{schema.split('(', 1)[0]}"
    torch.library.define(name, schema[schema.index("(") :])
    torch.library.impl(name, "default", run)
    torch.library.register_fake(name, fake)


@contextlib.contextmanager
def autograd_on() -> Iterator[None]:
    """Within the block autograd works, also where torch runs an operator's implementation below it (dispatch modes)."""
    key = torch._C.DispatchKey
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    for one in (key.AutogradFunctionality, key.ADInplaceOrView):
        excluded = excluded.remove(one)
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


def transforming(tensors: Sequence[torch.Tensor | None] = ()) -> bool:
    """True within a torch.func transform or forward-mode autograd, which see through torch's own operators only.

    So does a batch of gradients (is_grads_batched): that is one of `tensors` then.
    """
    if torch.compiler.is_compiling():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return True
    return any(x is not None and torch._C._functorch.is_legacy_batchedtensor(x) for x in tensors)


def plain(p: Any) -> Any:
    """p, a NamedTuple with tensors, without lazy negation, which a kernel that reads addresses would not see."""

    def one(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return x.resolve_neg() if x.is_neg() else x
        if isinstance(x, (tuple, list)) and any(isinstance(y, torch.Tensor) for y in x):
            return type(x)(one(y) for y in x)
        return x

    return p._make(one(x) for x in p)


def needs_operator(tensors: Sequence[torch.Tensor]) -> bool:
    """True if something watches this call, so that it has to go through torch's dispatcher.

    That is: torch.compile, torch.export, torch.jit.trace, fake and other subclass tensors, dispatch modes; or if there
    is no data to compute with. An eager call on plain tensors may go to the kernel directly, which saves the
    dispatcher's microseconds.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.jit.is_tracing()
        or any(x.is_meta or (type(x) is not torch.Tensor and type(x) is not torch.nn.Parameter) for x in tensors)
    )
