"""What is constant over time in a converted network: computed once, and repeated by the first neuron's kernels."""

from __future__ import annotations

import pytest
import torch
from spiking_loops import B, T, TorchvisionResNet, trained_norms
from torch import nn

import snnfast
from snnfast.convert import to_spiking_layers

pytestmark = pytest.mark.usefixtures("one_thread")


def test_what_is_constant_is_computed_once():
    ann = trained_norms(TorchvisionResNet().double()).train()
    once, always = (snnfast.to_spiking(ann, T, coding=c) for c in ("direct", lambda x, T: x.expand(T, *x.shape)))
    seen = {}
    for name in ("conv1", "bn1", "maxpool", "layer1.0.conv1", "fc"):
        once.get_submodule(name).register_forward_hook(lambda m, i, o, n=name: seen.__setitem__(n, len(i[0])))
    x = torch.randn(B, 3, 12, 12).double()
    got, want = once(x), always(x)
    assert seen == {"conv1": B, "bn1": B, "maxpool": T * B, "layer1.0.conv1": T * B, "fc": T * B}
    assert torch.allclose(got, want)
    for y in (got, want):
        y.square().sum().backward()
    for (name, p), q in zip(once.named_parameters(), always.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-6, atol=1e-9), name
    assert torch.allclose(once.bn1.running_mean, always.bn1.running_mean)
    n = B * 12 * 12  # the running variance is unbiased: it counts the samples
    biased = [(v - 0.9 * ann.bn1.running_var) * (m - 1) / m for v, m in (
        (once.bn1.running_var, n), (always.bn1.running_var, T * n),
    )]  # fmt: skip
    assert torch.allclose(*biased)


def test_the_kernels_repeat_the_input_unless_someone_looks(monkeypatch):
    if snnfast.backends.native.missing(torch.device("cpu")) is not None:
        pytest.skip("the CPU kernels are not built")
    calls = []
    run = snnfast.constant_input.multi_step
    monkeypatch.setattr(snnfast.constant_input, "multi_step", lambda *args: calls.append(len(args[0])) or run(*args))
    ann = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten())
    x = torch.randn(B, 2, 9, 9)
    results = []

    def result(prepare):
        torch.manual_seed(0)
        net = snnfast.to_spiking(ann, T, snnfast.ParametricLIFNode, surrogate_function=snnfast.surrogate.ATan())
        prepare(net[2])
        given = x.clone().requires_grad_()
        y = net(given)
        assert y.shape == (T, B, 4 * 25)
        results.append((y, net[2].v, *torch.autograd.grad((y.sin()).sum(), [given, *net.parameters()])))
        return net

    seen = []
    result(lambda neuron: None)
    assert calls == [B]
    # Whoever looks at the neuron's input or calls sees the repeated input.
    result(lambda neuron: neuron.register_forward_hook(lambda m, i, o: seen.append(len(i[0]))))
    result(lambda neuron: neuron.register_forward_pre_hook(lambda m, i: seen.append(len(i[0]))))
    assert seen == [T * B] * 2
    kept = result(lambda neuron: setattr(neuron, "store_v_seq", True))
    assert kept[2].v_seq.shape[:2] == (T, B)
    result(lambda neuron: snnfast.functional.set_backend(neuron, "reference"))
    assert calls == [B]
    for other in results[1:]:
        for k, (got, want) in enumerate(zip(results[0], other, strict=True)):
            assert torch.equal(got, want) if k < 2 else torch.allclose(got, want, rtol=1e-4, atol=1e-5)


def first_neuron(kind=snnfast.IFNode, **kwargs):
    """As a converted network has it."""
    return to_spiking_layers.prepare_neuron(kind(timesteps=T, v_threshold=0.3, **kwargs), True)


def repeated(neuron, x):
    """What it gives for the input that is repeated."""
    other = type(neuron)(timesteps=T, v_threshold=0.3)
    other.load_state_dict(neuron.state_dict())
    return other.to(next(neuron.parameters(), x).dtype)(x.repeat(T, *(1,) * (x.dim() - 1)))


def test_a_constant_input_is_of_one_call():
    x = torch.rand(6, 33)
    neuron = first_neuron()
    for other in (x.bfloat16(), x.double(), x):
        assert torch.equal(neuron(other).double(), repeated(neuron, other).double())
    neuron._takes_constant(x)  # a call that never came
    assert torch.equal(neuron(x[:4].bfloat16()), repeated(neuron, x[:4].bfloat16()))
    with pytest.raises(ValueError, match="x must be a dense float32 tensor on the CPU, and T from 2 to 16, got"):
        snnfast.constant_input.multi_step(x, 17, None, None, neuron._constants(0.0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float32])
def test_a_constant_input_and_a_decay_of_any_dtype(dtype):
    neuron = first_neuron(snnfast.ParametricLIFNode).to(dtype)
    x = torch.rand(6, 33) * 2
    got = neuron(x)
    assert torch.equal(got, repeated(neuron, x))
    assert 0.01 < got.mean() < 0.9
    got.sum().backward()
    assert neuron.w.grad.dtype == dtype
    assert neuron.w.grad != 0


def test_a_constant_input_that_is_looked_at_or_has_no_values_of_its_own():
    neuron, x, seen = first_neuron(), torch.rand(6, 33), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: seen.append(len(i[0])))
    try:
        neuron(x)
    finally:
        handle.remove()
    assert seen[0] == T * 6
    negative = torch._neg_view(-x)
    assert torch.equal(neuron(negative), repeated(neuron, x))
