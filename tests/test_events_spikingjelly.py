"""Event-driven convolutions in SpikingJelly's networks."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import snnfast

pytest.importorskip("spikingjelly.activation_based", reason="spikingjelly is not installed")
from spikingjelly.activation_based import functional, layer, neuron


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        layer.Conv2d(3, 32, 3, padding=1), neuron.LIFNode(detach_reset=True), layer.MaxPool2d(2),
        layer.Conv2d(32, 64, 3, padding=1, bias=False), neuron.IFNode(), layer.Conv2d(64, 16, 3, stride=2),
    )  # fmt: skip
    for conv in (net[0], net[3]):
        conv.weight.data *= 1.5  # so that both neurons fire
    functional.set_step_mode(net, "m")
    return net


@pytest.mark.parametrize("accelerated", [False, True])
def test_its_network_as_it_is(net, accelerated):
    dense = copy.deepcopy(net)
    if accelerated:
        snnfast.accelerate(net)
    report = snnfast.event_driven(net)
    assert report.event_driven == ["3", "5"]
    assert report.left_alone == {"0": "it maps 3 channels to 32; both must be 16 or more"}
    assert all(isinstance(net[i], layer.Conv2d) for i in (0, 3, 5))
    x = torch.rand(4, 2, 3, 12, 12) * 2
    found = []
    for each in (net, dense):
        y = each(x)
        assert y.std() > 0.05
        found.append((y, *torch.autograd.grad(y.square().sum(), tuple(each.parameters()))))
        functional.reset_net(each)
    for g, w in zip(*found, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5 * w.abs().max().item())
    seen: list[str] = []
    net[3].register_forward_hook(lambda module, inputs, output: seen.append(str(output.grad_fn.next_functions[0][0])))
    net(x)
    assert "EventConvolution" in seen[0]
    functional.reset_net(net)
    net[3]._forward_hooks.clear()
    for again in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert type(again[3]) is type(net[3])
        assert torch.equal(again(x), found[0][0])
        functional.reset_net(again)
    functional.set_step_mode(net, "s")
    torch.testing.assert_close(torch.stack([net(x_t) for x_t in x]), found[0][0], rtol=1e-4, atol=1e-5)


def test_batch_norms_still_fold_into_them():
    net = nn.Sequential(layer.Conv2d(32, 32, 3), layer.BatchNorm2d(32), neuron.IFNode(step_mode="m")).eval()
    functional.set_step_mode(net, "m")
    snnfast.event_driven(net)
    assert snnfast.optimize_for_inference(net)[1].folded == [("0", "1")]
