"""Spikes kept in one bit each (snnfast.memory): the gradients' bits, in-place changes, and what is let go."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import pytest
import torch
from memory_checks import DTYPES, FORMATS, T, assert_equal, gradients, needs_kernels, network
from torch import nn

import snnfast
from snnfast import functional, memory, packed_spikes
from snnfast.analysis import saved_bytes

pytestmark = pytest.mark.usefixtures("one_thread")


def check_network(device, dtype, memory_format, autocast=False):
    net = network().to(device, dtype)
    x = (torch.randn(T * 2, 3, 16, 16) * 2).to(device, dtype).contiguous(memory_format=memory_format)
    packed = packed_spikes()
    want = gradients(net, x, torch.enable_grad(), autocast)
    assert_equal(gradients(net, x, packed, autocast), want)
    return packed


# ---- gradients ----
@pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_have_the_same_bits(dtype, memory_format):
    packed = check_network("cpu", dtype, memory_format)
    # Spikes to the residual block's convolution, to the pooling, pooled ones, and its indices; and to the linear layer.
    assert packed.tensors == 5
    assert packed.bytes_after * 8 < packed.bytes_before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_have_the_same_bits_on_a_gpu(dtype, memory_format, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    packed = check_network("cuda", dtype, memory_format)
    assert packed.tensors >= 4


def test_autocast_packs_the_cast_spikes():
    packed = check_network("cpu", torch.float32, torch.contiguous_format, autocast=True)
    assert packed.tensors == 5


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("make", [snnfast.models.resnet18, snnfast.models.vgg11, snnfast.models.sew_resnet18])
def test_whole_networks(make, fused):
    net = make(timesteps=2, width=8, tau=2.0)
    if fused:
        snnfast.fuse(net)
    x = torch.rand(2, 3, 32, 32)
    packed = packed_spikes()
    assert_equal(gradients(net, x, packed), gradients(net, x, torch.enable_grad()))
    assert packed.bytes_after * 6 < packed.bytes_before


def test_plain_neurons_in_both_step_modes():
    for mode in ("m", "s"):
        net = nn.Sequential(snnfast.layer.Linear(32, 64), snnfast.LIFNode(), snnfast.layer.Linear(64, 2))
        functional.set_step_mode(net, mode)
        x = torch.randn(T, 32, 32) if mode == "m" else torch.randn(32, 32)
        packed = packed_spikes()
        assert_equal(gradients(net, x, packed), gradients(net, x, torch.enable_grad()))
        assert packed.tensors == 1


def test_the_target_of_half_of_what_spikingjelly_keeps():
    """At the real width; benchmarks/memory.py counts more variants."""
    from benchmarks.memory import NETWORKS, kept

    for make in NETWORKS.values():
        found = kept(make, torch.float32)
        assert found["snnfast + fuse + packed_spikes"] <= 0.5 * found["SpikingJelly, GPU"]


def test_the_first_neuron_of_a_converted_network_keeps_its_input_once():
    net = snnfast.to_spiking(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), T)
    x = torch.randn(2, 3, 16, 16) * 2
    packed = packed_spikes()
    net[1].register_forward_hook(lambda *_: None)  # otherwise the kernels repeat it themselves
    assert_equal(gradients(net, x, packed), gradients(net, x, torch.enable_grad()))
    assert packed.tensors == 2
    neurons = T * 2 * 8 * 14 * 14
    assert packed.bytes_after == neurons // T * 4 + neurons // 8


@needs_kernels
def test_the_first_neuron_keeps_its_constant_input_once_without_packing():
    net = snnfast.to_spiking(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten()), T)
    x = torch.randn(2, 3, 16, 16)
    kept = saved_bytes(net, x)
    net[1].register_forward_hook(lambda *_: None)
    assert saved_bytes(net, x) - kept == (T - 1) * 2 * 8 * 14 * 14 * 4


# ---- in-place changes ----
def first_layers():
    return nn.Conv2d(3, 8, 3), snnfast.IFNode(timesteps=T), nn.Conv2d(8, 4, 3)


@pytest.mark.parametrize("change", ["mul_", "zero_"])
def test_spikes_changed_before_they_are_saved(change):
    first, neuron, second = first_layers()
    x = torch.randn(T, 3, 12, 12) * 3

    def run(context):
        for layer in (first, second):
            layer.zero_grad()
        neuron.reset()
        with context:
            s = neuron(first(x))
            with torch.no_grad():
                s[:2].mul_(0.5) if change == "mul_" else s[:, ::2].zero_()
            y = second(s)
            assert not memory.is_spikes(s)
        y.square().sum().backward()
        return [y, first.weight.grad.clone(), second.weight.grad.clone()]

    assert_equal(run(packed_spikes()), run(torch.enable_grad()))


def test_spikes_changed_after_they_are_saved():
    """Torch can only refuse the backward; from the bits it is right."""
    first, neuron, second = first_layers()
    x = torch.randn(T, 3, 12, 12) * 3
    with packed_spikes():
        s = neuron(first(x))
        second(s).square().sum().backward()
    want = second.weight.grad.clone()
    second.zero_grad()
    neuron.reset()
    with packed_spikes():
        s = neuron(first(x))
        y = second(s)
    with torch.no_grad():
        s.add_(1)
    y.square().sum().backward()
    assert torch.equal(second.weight.grad, want)


def test_other_tensors_changed_after_they_are_saved_are_an_error():
    """Under hooks torch does not look for it."""
    x = torch.randn(64, 64, requires_grad=True)
    with packed_spikes():
        h = x * 2
        y = h.square()
    with torch.no_grad():
        h.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# ---- memory is let go ----
def test_spikes_die_with_the_forward_and_bits_with_the_graph():
    first, neuron, second = first_layers()
    seen = []
    handle = neuron.register_forward_hook(lambda m, args, s: seen.append(weakref.ref(s.untyped_storage())))
    dead = []
    neuron.register_forward_hook(lambda m, args, s: weakref.finalize(s, dead.append, 1) and None)
    packed = []
    with packed_spikes() as context:
        pack = memory._as_bits

        def noting(t):
            found = pack(t)
            if found is not None:
                packed.append(weakref.ref(found.bits))
            return found

        memory._as_bits = noting
        try:
            y = second(neuron(first(torch.randn(T, 3, 12, 12) * 3)))
        finally:
            memory._as_bits = pack
    assert context.tensors == 1
    assert dead == [1], "the spikes are still alive after the forward"
    assert packed[0]() is not None
    y.sum().backward()
    assert packed[0]() is None, "the bits are still alive after the backward"
    handle.remove()


def test_no_cycles():
    gc.collect()
    gc.disable()
    try:
        with packed_spikes():
            y = torch.randn(64, 64, requires_grad=True).exp()  # saves its own output
        alive = weakref.ref(y.untyped_storage())
        del y
        assert alive() is None
        net = network()
        with packed_spikes():
            y = net(torch.randn(T * 2, 3, 16, 16))
        alive = weakref.ref(y)
        functional.reset_net(net)
        del y
        assert alive() is None
    finally:
        gc.enable()


# ---- the context ----
def test_nested_contexts_threads_and_errors():
    net = nn.Sequential(nn.Linear(64, 64), snnfast.IFNode(step_mode="m"), nn.Linear(64, 8))
    x = torch.randn(T, 32, 64)
    want = gradients(net, x, torch.enable_grad())
    with packed_spikes() as outer:
        assert_equal(gradients(net, x, packed_spikes()), want)
        assert outer.tensors == 0
        assert memory.is_packing()
        elsewhere = []
        thread = threading.Thread(target=lambda: elsewhere.append(memory.is_packing()))
        thread.start()
        thread.join()
        assert elsewhere == [False]
        assert_equal(gradients(net, x, torch.enable_grad()), want)
        assert outer.tensors == 1
    with pytest.raises(ZeroDivisionError), packed_spikes():
        raise ZeroDivisionError
    assert not memory.is_packing()
    assert saved_bytes(torch.sin, torch.randn(100, requires_grad=True)) == 400  # the hooks are gone


def test_threads_with_a_decorated_forward():
    nets = [nn.Sequential(nn.Linear(64, 64), snnfast.IFNode(step_mode="m"), nn.Linear(64, 8)) for _ in range(4)]
    x = torch.randn(T, 32, 64)
    want = [gradients(net, x, torch.enable_grad()) for net in nets]
    run = packed_spikes()(lambda net: gradients(net, x, torch.enable_grad()))
    got = {}
    threads = [threading.Thread(target=lambda k=k, net=net: got.update({k: run(net)})) for k, net in enumerate(nets)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k, wanted in enumerate(want):
        assert_equal(got[k], wanted)


def test_retain_graph_and_double_backward():
    net = nn.Sequential(nn.Linear(64, 64), snnfast.LIFNode(step_mode="m"), nn.Linear(64, 8)).double()
    x = torch.randn(T, 32, 64, dtype=torch.float64)
    found = []
    newer = hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks")  # not in torch 2.6
    for inside in (None, False, True) if newer else (None, False):
        functional.reset_net(net)
        net.zero_grad()
        leaf = x.clone().requires_grad_()
        packed = packed_spikes()
        with torch.enable_grad() if inside is None else packed:
            y = net(leaf).square().sum()
            if inside:
                (grad,) = torch.autograd.grad(y, leaf, create_graph=True)
                (grad.square().sum() * 100).backward(retain_graph=True)
        if not inside:
            (grad,) = torch.autograd.grad(y, leaf, create_graph=True)
            (grad.square().sum() * 100).backward(retain_graph=True)
        y.backward()  # a second time
        found.append([grad.detach(), leaf.grad, *(p.grad.clone() for p in net.parameters())])
        assert (packed.tensors > 0) == (inside is not None)
    assert found[0][2].abs().sum() > 0
    for other in found[1:]:
        assert_equal(other, found[0])


@pytest.mark.parametrize("where", ["around the forward", "around the call", "in the function"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(where, reentrant):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), snnfast.to_spiking(nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU()), T))
    x = torch.randn(2, 3, 16, 16)

    def in_the_function(x):
        with packed_spikes():
            return net[1](x)

    def forward(stage):
        function = in_the_function if where == "in the function" else net[1]
        with packed_spikes() if where == "around the call" else torch.enable_grad():
            return torch.utils.checkpoint.checkpoint(function, stage, use_reentrant=reentrant)

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return forward(net[0](x))

    got = gradients(Checkpointed(), x, packed_spikes() if where == "around the forward" else torch.enable_grad())
    assert_equal(got, gradients(net, x, torch.enable_grad()))


def test_saved_bytes_counts_what_is_kept():
    net = nn.Sequential(nn.Linear(64, 64), snnfast.IFNode(step_mode="m"), nn.Linear(64, 8))
    x = torch.randn(T, 32, 64)
    whole = saved_bytes(net, x)
    functional.reset_net(net)
    with packed_spikes():
        packed = saved_bytes(net, x)
    spikes = T * 32 * 64
    assert whole - packed == spikes * 4 - spikes // 8


def test_deep_copies_and_pickles_of_the_network_are_not_disturbed():
    net = network()
    with packed_spikes():
        y = net(torch.randn(T * 2, 3, 16, 16))
        copy.deepcopy(net)
    y.sum().backward()
