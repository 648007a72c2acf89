"""The same by torch's own matrix products, in panels that stay in the caches: for bfloat16 where there is AMX, which
these use and the C++ kernel does not. The formulas and their names are those of README.md."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ._problem import GauProblem, Gradients, Results, empty_gradients, empty_results
from .presets import ACTIVATIONS

PANEL = 512  # rows of a panel, or keys: with 4096 of the other, 8 MB of scores
AT_ONCE = 4  # tensors as large as a panel
FEW = 128  # queries: with fewer, memory is what a call waits for


def unsupported(p: GauProblem) -> str | None:
    if p.device.type != "cpu":
        return f"the tensors are on {p.device.type}, and its panels are for a CPU"
    if p.by_sum or any(x is not None for x in (p.bias, p.query_mask, p.key_mask, p.cu_seqlens)):
        return "padding, packed sequences, biases and sums of rows are left to kernels"
    return None


def comes_last(p: GauProblem) -> bool:
    """Whether the C++ kernel is the faster one."""
    return p.q.dtype != torch.bfloat16 or p.q.shape[1] < FEW or not has_amx()


@functools.cache
def has_amx() -> bool:
    """Whether this processor multiplies whole tiles of bfloat16."""
    return torch.cpu._is_amx_tile_supported()


def run(p: GauProblem) -> Results:
    results = empty_results(p)
    for batch in range(p.q.shape[0]):
        for head in range(p.q.shape[2]):
            _attend(p, batch, head, results)
    return results


def run_backward(p: GauProblem, results: Results, grad_o: Tensor) -> Gradients:
    gradients = empty_gradients(p)
    for batch in range(p.q.shape[0]):
        for kv_head in range(p.k.shape[2]):
            _differentiate(p, batch, kv_head, results, grad_o, gradients)
    return gradients


def _attend(p: GauProblem, batch: int, head: int, results: Results) -> None:
    """One head of one sequence, by panels of rows."""
    n_q, n_k, kv_head = p.q.shape[1], p.k.shape[1], head // _group(p)
    q, k = p.q[batch, :, head].to(p.wide), p.k[batch, :, kv_head].to(p.wide)  # [n_q, s], [n_k, s]
    v = p.v[batch, :, kv_head].to(_operands(p))  # [n_k, e]
    for first in range(0, n_q, _panel(p, n_k)):
        rows = slice(first, min(n_q, first + _panel(p, n_k)))
        keys = slice(0, max(0, min(n_k, rows.stop + n_k - n_q)) if p.causal else n_k)
        x = (q[rows] @ k[keys].mT).mul_(_factor(p.scale, p.a, batch, rows))  # [rows, keys]
        weights = _visible(p, _activate(x, p), rows, keys).to(v.dtype)
        sums = (weights @ v[keys]).to(p.wide) * _factor(p.out_scale, p.c, batch, rows)  # [rows, e]
        if results.ungated is not None:
            results.ungated[batch, rows, head] = sums
        results.o[batch, rows, head] = sums if p.gate is None else sums * p.gate[batch, rows, head]


def _differentiate(
    p: GauProblem, batch: int, kv_head: int, results: Results, grad_o: Tensor, gradients: Gradients
) -> None:
    """One head of keys of one sequence, by panels of keys, with every head of queries that sees it."""
    n_q, n_k = p.q.shape[1], p.k.shape[1]
    k, v = (x[batch, :, kv_head].to(p.wide) for x in (p.k, p.v))
    operands = _operands(p)
    wide_k, k, v = k, k.to(operands), v.to(operands)
    grad_k, grad_v = torch.zeros_like(wide_k), torch.zeros(v.shape, dtype=p.wide)
    for head in range(kv_head * _group(p), (kv_head + 1) * _group(p)):
        wide_q, grad = (x[batch, :, head].to(p.wide) for x in (p.q, grad_o))
        if p.gate is not None and gradients.gate is not None and results.ungated is not None:
            gradients.gate[batch, :, head] = grad * results.ungated[batch, :, head]
            grad = grad * p.gate[batch, :, head]
        every = slice(0, n_q)
        g = (grad * _factor(p.out_scale, p.c, batch, every)).to(operands)  # [n_q, e]
        q, grad_q = wide_q.to(operands), torch.zeros_like(wide_q)
        for first in range(0, n_k, _panel(p, n_q)):
            keys = slice(first, min(n_k, first + _panel(p, n_q)))
            rows = slice(min(n_q, max(0, first + n_q - n_k)) if p.causal else 0, n_q)
            a = _factor(p.scale, p.a, batch, rows)
            x = (wide_q[rows] @ wide_k[keys].mT).mul_(a)  # [rows, keys]
            weights = _visible(p, _activate(x, p), rows, keys).to(operands)
            grad_v[keys] += weights.mT @ g[rows]
            grad_x = _slope(x, p) * (g[rows] @ v[keys].mT)
            grad_x = (_visible(p, grad_x, rows, keys) * a).to(operands)
            grad_k[keys] += grad_x.mT @ q[rows]
            grad_q[rows] += grad_x @ k[keys]
        gradients.q[batch, :, head] = grad_q
    gradients.k[batch, :, kv_head] = grad_k
    gradients.v[batch, :, kv_head] = grad_v


def _group(p: GauProblem) -> int:
    """Heads of queries that share one of keys."""
    return p.q.shape[2] // p.k.shape[2]


def _operands(p: GauProblem) -> torch.dtype:
    """What wide products take: float16 in float32, whose range squares of scores need."""
    return p.q.dtype if p.q.dtype == torch.bfloat16 else p.wide


def _panel(p: GauProblem, across: int) -> int:
    """Rows that `workspace` has room for, each of `across` scores."""
    return max(1, min(PANEL, p.workspace // (AT_ONCE * p.wide.itemsize * max(1, across))))


def _factor(number: float, by_row: Tensor | None, batch: int, rows: slice) -> float | Tensor:
    """[rows, 1] where it differs by row."""
    return number if by_row is None else number * by_row[batch, rows, None]


def _visible(p: GauProblem, x: Tensor, rows: slice, keys: slice) -> Tensor:
    """x [rows, keys], in its place 0 where a row does not see a key."""
    return x.tril_(rows.start + p.k.shape[1] - p.q.shape[1] - keys.start) if p.causal else x


def _activate(x: Tensor, p: GauProblem) -> Tensor:
    """f(x)."""
    name = ACTIVATIONS[p.activation]
    if name == "relu2":
        return F.relu(x).square_()
    if name == "relu":
        return F.relu(x)
    if name == "silu":
        return F.silu(x)
    if name == "sigmoid":
        return x.sigmoid()
    if name == "laplace":
        return (x - math.sqrt(0.5)).mul_(math.sqrt(2 * math.pi)).erf_().add_(1).mul_(0.5)
    return x.clone()


def _slope(x: Tensor, p: GauProblem) -> Tensor:
    """f'(x)."""
    name = ACTIVATIONS[p.activation]
    if name == "relu2":
        return 2 * F.relu(x)
    if name == "relu":
        return (x > 0).to(x.dtype)
    if name == "laplace":
        return (x - math.sqrt(0.5)).square_().mul_(-2 * math.pi).exp_().mul_(math.sqrt(2))
    if name == "identity":
        return torch.ones_like(x)
    sigmoid = x.sigmoid()
    return sigmoid * (1 - sigmoid) if name == "sigmoid" else sigmoid * (1 + x * (1 - sigmoid))
