"""What only a GPU can show: streams, graphs, devices, and that one launch does it all."""

from __future__ import annotations

import pytest
import torch

import kx_kernels as kx
from kx_kernels.testing.poison import same_bits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.parametrize("backend", ["cuda", "triton"]),
]


def inputs(device: str = "cuda") -> tuple[torch.Tensor, ...]:
    q = torch.randn(2, 64, 8, 128, device=device, dtype=torch.bfloat16)
    k = torch.randn(2, 64, 2, 128, device=device, dtype=torch.bfloat16)
    return q, k, *kx.rope_tables(128, 128, device=device)


@pytest.mark.parametrize("layout", ["plain", "transposed"])
def test_one_kernel_and_no_copy(backend: str, layout: str) -> None:
    q, k, cos, sin = inputs()
    if layout == "transposed":
        q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
    kx.rope(q, k, cos, sin, backend=backend)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        kx.rope(q, k, cos, sin, backend=backend)
        torch.cuda.synchronize()
    events = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len(events) == 1, events
    assert "rope" in events[0]


def test_stream(backend: str) -> None:
    """Work goes to the current stream: it waits for what that stream waits for."""
    q, _, cos, sin = inputs()
    expected = kx.rope(q.clone(), None, cos, sin, backend=backend)
    late = torch.zeros_like(q)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(q)
        out = kx.rope(late, None, cos, sin, backend=backend)
    stream.synchronize()
    assert same_bits(out, expected)


def test_graph_replay_with_other_positions(backend: str) -> None:
    q, k, cos, sin = inputs()
    offset = torch.zeros(2, dtype=torch.int32, device="cuda")
    kx.rope(q, k, cos, sin, offset=offset, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = kx.rope(q, k, cos, sin, offset=offset, backend=backend)
    for values in ([0, 0], [3, 60], [-5, 7]):
        offset.copy_(torch.tensor(values))
        graph.replay()
        expected = kx.rope(q, k, cos, sin, offset=offset, backend=backend)
        for a, b in zip(outs, expected, strict=True):
            assert same_bits(a, b)


@pytest.mark.parametrize("workspace", [0, 1 << 26])
def test_graph_replay_with_other_lengths(backend: str, workspace: int) -> None:
    leaves = [torch.randn(512, 1, d, device="cuda", dtype=torch.bfloat16).requires_grad_() for d in (128, 128, 256)]
    ends = torch.tensor([0, 200, 512], dtype=torch.int32, device="cuda")

    def call() -> list[torch.Tensor]:
        out = kx.gau_attention(*leaves, cu_seqlens=ends, workspace=workspace, backend=backend)
        return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = call()
    for values in ([0, 200, 512], [0, 1, 512], [3, 500, 500]):
        ends.copy_(torch.tensor(values))
        graph.replay()
        for a, b in zip(outs, call(), strict=True):
            assert same_bits(a, b)


def test_no_synchronisation(backend: str) -> None:
    q, k, cos, sin = inputs()
    offset = torch.zeros(2, dtype=torch.int32, device="cuda")
    cu_seqlens = torch.tensor([0, 30, 128], dtype=torch.int32, device="cuda")
    positions = torch.zeros(2, 64, dtype=torch.long, device="cuda")
    kx.rope(q, k, cos, sin, backend=backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        kx.rope(q, k, cos, sin, offset=offset, backend=backend)
        kx.rope(q, k, cos, sin, positions=positions, backend=backend)
        kx.rope(q.flatten(0, 1), k.flatten(0, 1), cos, sin, cu_seqlens=cu_seqlens, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_position_past_the_table_is_nan(backend: str) -> None:
    q, _, cos, sin = inputs()
    out = kx.rope(q, None, cos, sin, offset=torch.tensor([65, 0], device="cuda"), backend=backend)
    assert out[0, 63].isnan().all()
    assert out[0, :63].isfinite().all()
    assert out[1].isfinite().all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_another_device(backend: str) -> None:
    q, k, cos, sin = inputs("cuda:1")
    expected = kx.rope(q, k, cos, sin, backend="reference")
    outs = kx.rope(q, k, cos, sin, backend=backend)
    assert torch.cuda.current_device() == 0
    for a, b in zip(outs, expected, strict=True):
        torch.testing.assert_close(a, b)
