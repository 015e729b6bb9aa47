"""NeuroBench runs on snnfast's networks, and counts the synaptic operations that count_synops counts."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import snnfast
from snnfast import functional
from snnfast.analysis import count_synops
from snnfast.surrogate import ATan

pytest.importorskip("neurobench", reason="neurobench is not installed")
from neurobench.benchmarks import Benchmark
from neurobench.metrics.static import ConnectionSparsity, Footprint, ParameterCount
from neurobench.metrics.utils.layers import single_layer_MACs
from neurobench.metrics.workload import ActivationSparsity, ClassificationAccuracy, SynapticOperations
from neurobench.models import TorchModel

T, N = 4, 6


def neuron(kind=snnfast.LIFNode):
    return kind(surrogate_function=ATan(), timesteps=T)


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, groups=2)
        self.sn1 = neuron()
        self.conv2 = nn.Conv2d(channels, channels, (3, 1), padding=(1, 0), bias=False)
        self.sn2 = neuron(snnfast.IFNode)

    def forward(self, x):
        return self.sn2(self.conv2(self.sn1(self.conv1(x)))) + x


def folded():
    """``[T * N, C, H, W]``; the second block's input counts to 2 where spikes are added, so it multiplies."""
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(4),
        neuron(snnfast.ParametricLIFNode),
        Residual(4),
        Residual(4),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 8),
        neuron(),
        nn.Linear(8, 3),
    )
    with torch.no_grad():
        for m in net.modules():
            if isinstance(m, (nn.Conv2d, nn.Linear)):
                fan_in = m.weight[0].numel()
                nn.init.normal_(m.weight, 1.5 / fan_in, 2 / fan_in**0.5)
                m.weight[m.weight.abs() < 0.05] = 0.0  # pruned: no operations
    return net.eval()


def dense():
    net = nn.Sequential(
        nn.Linear(10, 12),
        snnfast.LIFNode(step_mode="m"),
        nn.Linear(12, 12),
        snnfast.IFNode(step_mode="m"),
        nn.Linear(12, 3),
    )
    with torch.no_grad():
        net[0].weight.mul_(3), net[2].weight.mul_(2)
    return net.eval()


def case(kind, events):
    """Network, data ``[N, T, *]``, and how a batch becomes the network's input and its output logits ``[N, 3]``."""
    if kind == "folded":
        net, x = folded(), torch.rand(N, T, 2, 8, 8)
        to_input, to_logits = (lambda b: b.transpose(0, 1).flatten(0, 1)), (lambda y: y.unflatten(0, (T, -1)).mean(0))
    else:
        net, x = dense(), torch.rand(N, T, 10) * 2
        to_input, to_logits = (lambda b: b.transpose(0, 1)), (lambda y: y.mean(0))
    return net, (x < 0.4).float() if events else x, to_input, to_logits


def run(net, x, to_input, to_logits, batch_size):
    labels = torch.arange(N) % 3

    def preprocess(data):
        functional.reset_net(net)
        return to_input(data[0]), data[1]

    model = TorchModel(net)
    for kind in (snnfast.IFNode, snnfast.LIFNode, snnfast.ParametricLIFNode):
        model.add_activation_module(kind)
    benchmark = Benchmark(
        model,
        DataLoader(TensorDataset(x, labels), batch_size=batch_size),
        [preprocess],
        [lambda y: to_logits(y).argmax(1)],
        [
            [ParameterCount, Footprint, ConnectionSparsity],
            [ClassificationAccuracy, ActivationSparsity, SynapticOperations],
        ],
    )
    results = benchmark.run(quiet=True)
    model.cleanup_hooks()
    functional.reset_net(net)
    return results


@pytest.mark.parametrize("batch_size", [N, 4], ids=["one batch", "uneven batches"])
@pytest.mark.parametrize("events", [False, True], ids=["real input", "events"])
@pytest.mark.parametrize("kind", ["folded", "dense"])
def test_benchmark_and_its_totals(kind, events, batch_size):
    net, x, to_input, to_logits = case(kind, events)
    with torch.no_grad():
        results = run(net, x, to_input, to_logits, batch_size)
        batches = [to_input(part) for part in x.split(batch_size)]
        report = count_synops(net, batches)
        assert (report.samples, report.timesteps) == (N, T)
        theirs = results["SynapticOperations"]
        assert theirs["Effective_MACs"] == pytest.approx(report.macs, rel=1e-9)
        assert theirs["Effective_ACs"] == pytest.approx(report.acs, rel=1e-9)
        assert theirs["Dense"] == pytest.approx(report.dense, rel=1e-9)
        assert report.acs > 0
        assert (report.macs > 0) == (not events or kind == "folded")

        counts, correct = [], 0
        for m in net.modules():
            if isinstance(m, snnfast.neuron.BaseNode):
                m.register_forward_hook(lambda m, args, s: counts.append((s.count_nonzero().item(), s.numel())))
        for part, labels in zip(batches, (torch.arange(N) % 3).split(batch_size), strict=True):
            functional.reset_net(net)
            correct += (to_logits(net(part)).argmax(1) == labels).sum().item()
        spiked, neurons = (sum(c) for c in zip(*counts, strict=True))
    assert results["ClassificationAccuracy"] == pytest.approx(correct / N)
    if batch_size == N:  # theirs is a mean over batches
        assert results["ActivationSparsity"] == pytest.approx(1 - spiked / neurons)
    assert results["ParameterCount"] == sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("events", [False, True], ids=["real input", "events"])
@pytest.mark.parametrize("kind", ["folded", "dense"])
def test_layer_by_layer(kind, events):
    net, x, to_input, _ = case(kind, events)
    x = to_input(x)
    inputs = {}
    hooks = [
        m.register_forward_pre_hook(lambda m, args, name=name: inputs.update({name: args[0].detach().clone()}))
        for name, m in net.named_modules()
        if isinstance(m, (nn.Conv2d, nn.Linear))
    ]
    with torch.no_grad():
        net(x)
        for hook in hooks:
            hook.remove()
        functional.reset_net(net)
        report = count_synops(net, x)
        assert [layer.name for layer in report.layers] == list(inputs)
        for layer in report.layers:
            operations, spiking = single_layer_MACs(inputs[layer.name], net.get_submodule(layer.name))
            total, _ = single_layer_MACs(inputs[layer.name], net.get_submodule(layer.name), total=True)
            assert (layer.acs if spiking else layer.macs) == operations
            assert (layer.macs if spiking else layer.acs) == 0
            assert layer.dense == total
