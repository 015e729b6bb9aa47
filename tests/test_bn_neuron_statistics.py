"""The statistics of batch norm and neuron in one: against float64, torch's running ones, and step by step."""

from __future__ import annotations

import copy

import pytest
import torch
from bn_neuron_checks import T, close, norm_for, random_input, run
from torch import nn

import snnfast
from snnfast import backends
from snnfast.fused import BatchNormNode

pytestmark = pytest.mark.skipif(
    backends.native.missing(torch.device("cpu")) is not None, reason="the compiled extension is not built here"
)


@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize(
    "shape",
    # The last two: chunks of some of the channels, ending within one and going round from the last to the first.
    [(T, 16, 6, 12, 12), (T, 64, 20, 3, 3), (T, 300, 7), (T, 5, 700, 5, 1), (T, 3, 90, 7, 7)],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("offset", [0.0, 100.0, -1e4])
def test_statistics_are_those_of_float64(shape, dtype, per_step, offset):
    x = (torch.randn(shape, dtype=torch.float64) * 0.5 + 0.5 * offset).to(dtype)
    x[0, 0] = x[0, 0] + 50  # the first element, which the sums are relative to, is an outlier
    layouts = (
        [x, x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (T, -1))]
        if x.dim() == 5
        else [x]
    )
    over = [d for d in range(x.dim()) if d != 2 and not (per_step and d == 0)]
    for t in layouts:
        mean, var = torch.ops.snnfast.bn_statistics(t, per_step)
        want_var, want_mean = torch.var_mean(t.double(), over, unbiased=False)
        assert mean.shape == var.shape == ((T if per_step else 1), x.shape[2])
        want_mean, want_var = want_mean.reshape(mean.shape), want_var.reshape(var.shape)
        assert ((mean - want_mean).abs() <= 1e-6 * want_var.sqrt()).all()
        assert ((var - want_var).abs() <= 2e-6 * want_var).all()
        assert ((var - want_var).abs() <= 1e-10 * want_var).all()  # what this implementation reaches


@pytest.mark.parametrize(("momentum", "track"), [(0.1, True), (None, True), (0.0, True), (0.1, False)])
def test_running_statistics(momentum, track):
    x = random_input(T * 4, 6, 7, 7)
    norm = norm_for(x, momentum=momentum, track_running_stats=track)
    apart = nn.Sequential(copy.deepcopy(norm), snnfast.LIFNode(timesteps=T))
    node = BatchNormNode(norm, snnfast.LIFNode(timesteps=T))
    for training in (True, True, False, True, False):
        x = random_input(T * 4, 6, 7, 7)
        for model in (node, apart):
            model.train(training)
            snnfast.functional.reset_net(model)
        assert torch.equal(node(x), apart(x))
        for b, w in zip(norm.buffers(), apart[0].buffers(), strict=True):
            assert torch.allclose(b, w, rtol=1e-6, atol=1e-6)
    assert not track or norm.num_batches_tracked == 3


def test_running_statistics_of_another_size_have_torchs_error():
    norm = nn.BatchNorm2d(4096)
    norm.running_mean, norm.running_var = torch.zeros(8), torch.ones(8)
    with pytest.raises(RuntimeError, match="running_mean should contain 4096 elements"):
        BatchNormNode(norm, snnfast.IFNode(timesteps=T))(torch.randn(2 * T, 4096, 2, 2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_running_statistics_that_are_far_away_and_of_other_dtypes(dtype):
    x = random_input(T * 4, 6, 7, 7)
    norm = norm_for(x, momentum=1.0)
    norm.running_mean, norm.running_var = torch.full((6,), 1e30, dtype=dtype), torch.full((6,), 1e30, dtype=dtype)
    before = norm.running_mean._version
    BatchNormNode(norm, snnfast.IFNode(timesteps=T))(x)
    var, mean = torch.var_mean(x.double(), (0, 2, 3))
    assert torch.allclose(norm.running_mean, mean.to(dtype))
    assert torch.allclose(norm.running_var, var.to(dtype))
    assert norm.running_mean._version > before


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_statistics_of_each_step(memory_format, count_fused):
    x = random_input(T * 6, 5, 7, 7, memory_format=memory_format) + torch.arange(T).repeat_interleave(6).view(
        -1, 1, 1, 1
    )
    norm = norm_for(x)
    apart, neuron = copy.deepcopy(norm), snnfast.LIFNode(timesteps=T)
    node = BatchNormNode(norm, snnfast.LIFNode(timesteps=T), per_step=True)

    class Apart(nn.Sequential):
        def forward(self, x):
            return self[1](torch.cat([self[0](step) for step in x.chunk(T)]))

    s, grad_x, grads = run(node, x)
    want_s, want_grad_x, want_grads = run(Apart(apart, neuron), x)
    assert torch.equal(s, want_s)
    assert close(grad_x, want_grad_x, 1e-5)
    assert all(close(g, w, 1e-5) for g, w in zip(grads, want_grads, strict=True))
    for b, w in zip(norm.buffers(), apart.buffers(), strict=True):
        assert torch.allclose(b, w, rtol=1e-6, atol=1e-6)
    assert norm.num_batches_tracked == T
    assert count_fused
    # What the kernels do not serve goes the same way.
    unfused = BatchNormNode(copy.deepcopy(norm), snnfast.LIFNode(timesteps=T, backend="reference"), per_step=True)
    snnfast.functional.reset_net(node)
    assert torch.equal(unfused(x), node(x))
