"""Spikes kept in one bit each (snnfast.memory): the gradients' bits, and what is recognised, kept and let go."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import snnfast
from snnfast import functional, memory, packed_spikes
from snnfast.analysis import saved_bytes
from snnfast.backends import native

pytestmark = pytest.mark.usefixtures("one_thread")

T = 4
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
FORMATS = [torch.contiguous_format, torch.channels_last]
_C = native._C
needs_kernels = pytest.mark.skipif(_C is None, reason="the compiled extension is not built here")


class Residual(nn.Module):
    """Spikes that go two ways, of which one is added to and one is pooled."""

    def __init__(self):
        super().__init__()
        self.conv, self.neuron = nn.Conv2d(8, 8, 3, padding=1), snnfast.LIFNode(timesteps=T)

    def forward(self, x):
        return self.neuron(self.conv(x) + x)


def network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        snnfast.LIFNode(timesteps=T),
        Residual(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3),
        snnfast.fused.BatchNormNode(nn.BatchNorm2d(8), snnfast.ParametricLIFNode(timesteps=T)),
        nn.Flatten(),
        nn.Linear(8 * 36, 16),
        snnfast.IFNode(timesteps=T),
        nn.Linear(16, 3),
    )


def gradients(net, x, context, autocast=False):
    """Output, and the gradients of the input and of every parameter."""
    functional.reset_net(net)
    net.zero_grad()
    x = x.detach().requires_grad_()
    with context, torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
        y = net(x)
    y.float().square().sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in net.parameters())]


def assert_equal(got, want):
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


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
def test_gradients_have_the_same_bits_on_a_gpu(dtype, memory_format):
    torch.backends.cudnn.deterministic = True
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


# ---- round trips ----
def bits_of(t):
    return t.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def spikes_like(shape, dtype=torch.float32, value=1.0):
    return (torch.rand(shape) < 0.3).to(dtype) * value


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 17), min_size=1, max_size=5),
    order=st.randoms(use_true_random=False),
    dtype=st.sampled_from(DTYPES),
    value=st.sampled_from([1.0, 0.25, -0.0, float("inf"), float("nan")]),
    cut=st.booleans(),
)
def test_any_layout_comes_back(shape, order, dtype, value, cut):
    dimensions = list(range(len(shape)))
    order.shuffle(dimensions)
    t = spikes_like([*shape, 3], dtype)
    t = torch.where(t > 0, torch.tensor(value, dtype=dtype), torch.tensor(0.0, dtype=dtype))
    t = t[..., 1:].permute(*dimensions, len(shape)) if cut else t.permute(len(shape), *dimensions)
    packed = memory._as_bits(t)
    back = packed.unpack()
    assert (back.shape, back.stride(), back.dtype) == (t.shape, t.stride(), t.dtype)
    assert torch.equal(bits_of(back), bits_of(t))
    assert packed.nbytes <= t.numel() / 8 + 8


@needs_kernels
@pytest.mark.parametrize("name", _C.cpu_sets() if _C else [])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set_packs_alike(name, dtype):
    before = _C.cpu_set()
    _C.set_cpu_set(name)
    try:
        for n in (0, 1, 63, 64, 65, 1000, 16384, 16385, 100_003):
            t = spikes_like(n, dtype)
            bits = torch.full(((n + 63) // 64 * 8,), 255, dtype=torch.uint8)
            assert native.pack_bits(t, bits) is not None
            ones = ((bits.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8)) & 1).flatten().bool()
            assert torch.equal(ones[:n], t != 0)
            assert not ones[n:].any()
            back = torch.full((n + 8,), 7.0, dtype=dtype)
            native.unpack_bits(bits, memory._ONES[dtype], back[:n])
            assert torch.equal(back[:n], t)
            assert bool((back[n:] == 7).all()), "written beyond the end"
            for place in {0, n // 2, n - 1} if n > 2 else ():
                other = torch.ones_like(t)
                other[place] = 0.5
                assert native.pack_bits(other, bits) is None
    finally:
        _C.set_cpu_set(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_kernels_torch_packs_the_same_bits(dtype, monkeypatch):
    t = spikes_like((5, 7, 33), dtype).transpose(0, 1)
    want = memory._as_bits(t)
    monkeypatch.setattr(native, "missing", lambda device: "for this test")
    got = memory._as_bits(t)
    assert torch.equal(got.bits, want.bits)
    assert torch.equal(got.unpack(), t)
    assert got.unpack().stride() == t.stride()
    assert memory._as_bits(t + 0.5) is None


def test_indices_of_a_pooling_take_as_few_bytes_as_hold_them():
    for most, size in ((200, 1), (1000, 2), (40_000, 4)):
        t = torch.randint(0, most, (64, 64))
        t[0, 0] = most
        packed = memory.made_smaller(t)
        assert packed.nbytes == t.numel() * size
        assert torch.equal(packed.unpack(), t)
    assert memory.made_smaller(torch.randint(0, 2**40, (64, 64))) is None
    assert memory.made_smaller(torch.full((64, 64), -1)) is None


@pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
def test_what_was_repeated_is_kept_once(memory_format):
    from snnfast.convert.to_spiking_layers import repeat

    x = torch.randn(2, 3, 16, 16, requires_grad=True)
    y = repeat((x * 1).contiguous(memory_format=memory_format), T)
    for t in (y, y.unflatten(0, (T, 2)), y.flatten(2), x.repeat(3, 1, 1, 1).transpose(1, 2)):
        times = 3 if len(t) == 6 else T
        packed = memory.made_smaller(t)
        assert packed.nbytes == t.numel() * 4 // times
        assert torch.equal(packed.unpack(), t)
        assert packed.unpack().stride() == t.stride()
    changed = x.repeat(3, 1, 1, 1)
    with torch.no_grad():
        changed[0] += 1
    for t in (y[2:], x.repeat(2, 2, 1, 1), changed, y * 2, y.unflatten(0, (T, 2))[:, :1], y.flip(0)):
        assert memory.made_smaller(t) is None


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


# ---- what is kept as it is ----
def test_what_has_other_values_is_kept():
    for t in (
        spikes_like((64, 64)) + spikes_like((64, 64)),  # sums of spikes, as SEW blocks make
        torch.randn(64, 64),
        spikes_like((64, 64)).expand(3, 64, 64),
        spikes_like((64, 64)).requires_grad_(),  # a parameter: it is there anyway
        spikes_like((8, 8)),  # too small to matter
        torch.zeros(64, 64).index_fill_(0, torch.tensor([3]), 2.0) + torch.eye(64),
    ):
        assert memory.made_smaller(t) is None


def test_neurons_that_spike_several_times_at_once_are_kept():
    from snnfast import dynamics

    x = (torch.randn(T, 64, 64) * 4).requires_grad_()
    own = (torch.tensor(1.0), torch.tensor(0.9))
    s, _, _ = functional.multi_step(dynamics.EXPONENTIAL_LIF, x, 0.0, None, own, multi_spike=True)
    assert s.max() > 1
    assert not memory.is_spikes(s)
    assert memory.made_smaller(s) is None


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


# ---- spikes by the graph alone, as on a GPU ----
def test_spikes_that_the_graph_shows():
    conv = nn.Conv2d(3, 8, 3)
    x = torch.randn(T * 2, 3, 12, 12)
    fused = snnfast.fused.BatchNormNode(nn.BatchNorm2d(8), snnfast.LIFNode(timesteps=T))
    for neuron in (snnfast.LIFNode(timesteps=T), fused):
        s = neuron(conv(x))
        if s._version:  # conftest fills fresh memory
            s = s.clone()
        p = nn.MaxPool2d(2)(s)
        changed = s.clone()
        with torch.no_grad():
            changed.mul_(0.5)  # the graph does not know
        assert not memory.is_spikes(changed)
        for t in (
            *(s, s.flatten(1), s.unflatten(0, (T, 2)), s[:3], s.transpose(0, 1), s.contiguous(), s.bfloat16()),
            *(p, p.flatten(1).to(torch.float64), torch.cat([s, s]), torch.stack([s, s])),
            *(s.repeat(2, 1, 1, 1), s.to(memory_format=torch.channels_last), s.chunk(2)[1], nn.MaxPool2d(3, 2, 1)(s)),
        ):
            assert memory.is_spikes(t), t.grad_fn
            assert bool(((t == 0) | (t == 1)).all())
        for t in (
            *(s + s, s * 1.0, nn.AvgPool2d(2)(s), s.mean(0), conv(x), torch.cat([s, conv(x)]), s.detach()),
            *(nn.functional.dropout(s), s.cumsum(0), nn.functional.pad(s, (1, 1), value=2.0), s.sum()),
            *(getattr(neuron, "neuron", neuron).v, s.clone().mul_(2.0), torch.cat([s, torch.randn_like(s)])),
        ):
            assert not memory.is_spikes(t), t.grad_fn


@pytest.mark.parametrize(("connect", "spikes"), [("CHARGE", True), ("ADD", False), ("AND", False), ("IAND", False)])
def test_spikes_that_met_a_residual_connection_are_none_by_the_graph(connect, spikes):
    node = snnfast.fused.BatchNormNode(nn.BatchNorm2d(8), snnfast.LIFNode(timesteps=T), connect=connect)
    x = torch.randn(T * 2, 8, 12, 12, requires_grad=True)
    y = node(x, torch.randn_like(x) + 0.5)
    assert memory._gives_spikes(y.grad_fn, y.output_nr, 16) == spikes
    assert bool(((y == 0) | (y == 1)).all()) == spikes


def test_the_graph_alone_gives_the_same_gradients(monkeypatch):
    """The way of a GPU, on the CPU: what is not shown to be spikes is not packed."""
    net = network()
    x = torch.randn(T * 2, 3, 16, 16) * 2
    want = gradients(net, x, torch.enable_grad())
    pack, seen = memory._as_bits, []

    def by_graph(t):
        # The fixture that poisons fresh memory counts as a change.
        seen.append(t.grad_fn is not None and memory._gives_spikes(t.grad_fn, t.output_nr, 16))
        return pack(t) if seen[-1] else None

    monkeypatch.setattr(memory, "_as_bits", by_graph)
    assert_equal(gradients(net, x, packed_spikes()), want)
    assert sum(seen) == 4


@pytest.mark.parametrize(
    "pool", [nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(3, 1, ceil_mode=True, dilation=2)]
)
@pytest.mark.parametrize("side", [7, 16, 200])
def test_indices_of_a_pooling_are_narrowed_without_a_look(pool, side, monkeypatch):
    """The way of a GPU, on the CPU."""
    x = torch.randn(2, 3, side, side, requires_grad=True)
    want = torch.autograd.grad(pool(x).sin().sum(), x)[0]
    monkeypatch.setattr(memory, "_narrowed", lambda t: None)
    kept = []
    monkeypatch.setattr(memory, "_Kept", lambda t, make=memory._Kept: kept.append(make(t)) or kept[-1])
    with packed_spikes():
        y = pool(x)
        before = {k.tensor.dtype for k in kept}
        memory._narrow_pooling(y.flatten(1).grad_fn, 16)
        y = y.sin().sum()
    after = {k.tensor.dtype for k in kept}
    assert before == {torch.float32, torch.int64}
    assert after == {torch.float32, torch.int64 if side == 200 else torch.int16}
    assert torch.equal(torch.autograd.grad(y, x)[0], want)


# ---- the CUDA kernels, compiled for the CPU ----
DRIVER = """
#include "cuda_bits.cuh"
dim3 threadIdx, blockIdx, blockDim, gridDim;
namespace host_shim {
int64_t first_block = 0;
void wait_for_block() {}
double exchange_down(double value, int) { return value; }
void run_grid(dim3 grid, dim3 block, const std::function<void()>& body) {
  for (unsigned b = 0; b < grid.x; ++b)
    for (unsigned t = 0; t < block.x; ++t) {
      blockIdx = dim3(b), threadIdx = dim3(t);
      body();
    }
}
}  // namespace host_shim
extern "C" int run(int pack, int64_t n, int element_bytes, void* elements, void* bits, uint64_t one, void* other) {
  snnfast::BitsCall c{};
  c.n = n, c.element_bytes = element_bytes, c.elements = elements, c.bits = bits, c.one = one, c.other = other;
  return snnfast::launch_bits(c, pack, nullptr);
}
"""


@pytest.fixture(scope="module")
def cuda_bits(tmp_path_factory):
    import ctypes
    import subprocess

    from cuda_host import GXX, ROOT, SHIM

    if GXX is None:
        pytest.skip("there is no g++ here")
    folder = tmp_path_factory.mktemp("cuda_bits")
    (folder / "driver.cpp").write_text(DRIVER)
    command = [GXX, "-std=c++17", "-O1", "-fPIC", "-shared", "-Wno-psabi", f"-I{SHIM}", f"-I{ROOT / 'csrc'}"]
    subprocess.run([*command, str(folder / "driver.cpp"), "-o", str(folder / "bits.so")], check=True)
    run = ctypes.CDLL(str(folder / "bits.so")).run
    run.argtypes = [
        *(ctypes.c_int, ctypes.c_int64, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64),
        ctypes.c_void_p,
    ]
    return run


@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "shifted"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_cuda_kernels_on_the_host(cuda_bits, dtype, shift):
    one, size = memory._ONES[dtype], dtype.itemsize
    for n in (0, 1, 7, 8, 64, 65, 1000, 4099):
        words = (n + 63) // 64 * 8
        t = spikes_like(n + shift, dtype)[shift:]
        bits = torch.full((words + 8,), 85, dtype=torch.uint8)
        bits[words:] = 0
        flag = bits.data_ptr() + words
        assert cuda_bits(1, n, size, t.data_ptr(), bits.data_ptr(), one, flag) == 0
        assert not bits[words:].any()
        packed = memory._as_bits(t)
        assert torch.equal(bits[:words], packed.bits[:words])
        back = torch.full((n + shift + 8,), 7.0, dtype=dtype)
        assert cuda_bits(0, n, size, back[shift:].data_ptr(), bits.data_ptr(), one, flag) == 0
        assert torch.equal(back[shift : n + shift], t)
        assert bool((back[n + shift :] == 7).all())
        if n:
            t[n // 2] = 2.0
            assert cuda_bits(1, n, size, t.data_ptr(), bits.data_ptr(), one, flag) == 0
            assert cuda_bits(0, n, size, back[shift:].data_ptr(), bits.data_ptr(), one, flag) == 0
            assert bool(back[shift : n + shift].isnan().all()), "wrong values must show"
