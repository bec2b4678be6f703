"""On a GPU: the same results as on the CPU, PyTorch's current stream, graphs, no waiting. Skipped where there is none."""

import subprocess
import sys

import pytest
import torch

import cumoe
from cases import assert_same_bits, every_gate, gradients, make_moe

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
T, H = 130, 10


def step(moe, x, call):
    moe.zero_grad()
    x = x.detach().requires_grad_()
    out = moe(x, call=call)
    (out.y.float().square().sum() + out.loss).backward()
    values = [out.y, out.losses, x.grad, *gradients(moe).values()]
    return out, [value.detach().clone() for value in values]  # .cuda() moves gradients where they stand


@every_gate
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_cpu(gate, dtype):
    moe = make_moe(gate, dtype, bias=True)
    x, call = torch.randn(T, H, dtype=dtype), torch.tensor([3, 4])
    host, on_host = step(moe, x, call)
    out, on_device = step(moe.cuda(), x.cuda(), call.cuda())
    assert torch.equal(out.chosen_expert.cpu(), host.chosen_expert) or gate == "balanced"
    limit = {torch.float32: 1e-4, torch.bfloat16: 0.06, torch.float16: 0.01}[dtype]
    for a, b in zip(on_device, on_host):
        a, b = a.cpu().double(), b.double()
        assert (a - b).abs().max() <= limit * (1 + b.abs().max())


def test_runs_on_the_current_stream_and_waits_for_nothing():
    """A stream that is busy: the call comes back at once, and its result is there when the stream is through."""
    moe = make_moe("softmax_topk", torch.float32).cuda().eval()
    x = torch.randn(T, H, device="cuda")
    with torch.no_grad():
        expected, value = moe(x).y, torch.zeros_like(x)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10**9)
            value.copy_(x)
            y = moe(value).y
            assert not stream.query()
        stream.synchronize()
    assert_same_bits(y, expected)


def test_pytorch_is_not_made_to_wait():
    """Of the Python side alone: PyTorch does not see what the library calls. That is the test above."""
    moe = make_moe("noisy_topk", torch.float32).cuda()
    x = torch.randn(T, H, device="cuda")
    step(moe, x, None)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(moe, x, None)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_gate
def test_cuda_graph(gate):
    """Captured forward and backward, replayed with other tokens and other noise."""
    moe = make_moe(gate, torch.float32).cuda()
    x, call = torch.randn(T, H, device="cuda"), torch.tensor([1, 0], device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(moe, x, call)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _, captured = step(moe, x, call)
    for offset in 5, 6:
        x.copy_(torch.randn(T, H))
        call[1] = offset
        graph.replay()
        replayed = [value.clone() for value in captured]
        for a, b in zip(replayed, step(moe, x, call)[1]):
            assert_same_bits(a, b)


def test_compile_with_cuda_graphs():
    pytest.importorskip("triton")
    moe = make_moe("softmax_topk", torch.float32).cuda()
    compiled = torch.compile(moe, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        x = torch.randn(T, H, device="cuda")
        for a, b in zip(step(compiled, x, None)[1], step(moe, x, None)[1]):
            torch.testing.assert_close(a.clone(), b)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_another_device_than_the_current_one():
    moe = make_moe("softmax_topk", torch.float32)
    x = torch.randn(T, H)
    first = step(moe.to("cuda:0"), x.to("cuda:0"), None)[1]
    second = step(moe.to("cuda:1"), x.to("cuda:1"), None)[1]
    assert torch.cuda.current_device() == 0 and second[0].device.index == 1
    for a, b in zip(first, second):
        assert_same_bits(a.cpu(), b.cpu())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_no_context_on_the_current_device():
    """Memory of a GPU is taken where PyTorch works on another."""
    code = """
import torch, cumoe
moe = cumoe.MoE(8, 8, 4, 2).to("cuda:1")
out = moe(torch.randn(5, 8, device="cuda:1"))
(out.y.sum() + out.loss).backward()
torch.cuda.synchronize("cuda:1")
assert torch._C._cuda_hasPrimaryContext(1) and not torch._C._cuda_hasPrimaryContext(0)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_out_of_memory_is_pytorchs_own():
    experts, tokens = cumoe.Experts(1, 4 * 10**6, 1, device="cuda"), 10**7
    x, index = torch.zeros(tokens, 1, device="cuda"), torch.zeros(tokens, 1, dtype=torch.int64, device="cuda")
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        experts(x, index, x)


def test_cpu_tensors_beside_cuda_tensors_are_refused():
    experts = cumoe.Experts(H, 12, 8).cuda()
    x, index, weight = torch.randn(T, H, device="cuda"), torch.zeros(T, 2, dtype=torch.int64), torch.rand(T, 2)
    with pytest.raises(RuntimeError, match="index is on another device than x"):
        experts(x, index, weight.cuda())
