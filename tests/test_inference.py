"""optimize_for_inference(): what it folds, what it leaves alone and why, equal outputs; and what capture() refuses."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import pickle
import sys
import types

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import snnfast
from snnfast import _notices, backends, inference, layer, models, optimize_for_inference

pytestmark = [
    pytest.mark.skipif(
        backends.native.missing(torch.device("cpu")) is not None, reason="the compiled extension is not built here"
    ),
    pytest.mark.usefixtures("one_thread"),
]
T = 4


def lively(net: nn.Module) -> nn.Module:
    """Norms with statistics and weights of their own, under which neurons fire."""
    generator = torch.Generator().manual_seed(3)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for t, low, high in (
                (module.weight, 0.8, 2.5),
                (module.bias, 0.2, 1.2),
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.3, 2.0),
            ):
                if t is not None:
                    with torch.no_grad():
                        t.uniform_(low, high, generator=generator)
    return net.eval()


def neuron_calls(net: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, tuple]]:
    """The output, and input and spikes of each neuron by its name."""
    calls, handles = {}, []
    for name, module in net.named_modules():
        if isinstance(module, snnfast.neuron.BaseNode):
            handles.append(
                module.register_forward_hook(lambda m, args, out, name=name: calls.update({name: (args[0], out)}))
            )
    snnfast.functional.reset_net(net)
    with torch.no_grad():
        y = net(x)
    for handle in handles:
        handle.remove()
    return y, calls


def charges(x: torch.Tensor) -> torch.Tensor:
    """``h`` of each step of the default LIF, of an input with time folded into the batch, by its equations."""
    v, found = torch.zeros_like(x.unflatten(0, (T, -1))[0]), []
    for step in x.unflatten(0, (T, -1)):
        h = v + (step - v) / 2.0
        found.append(h)
        v = torch.where(h >= 1.0, torch.zeros_like(h), h)
    return torch.cat(found)


MODELS = {
    "vgg11": (8, 0, 0),
    "resnet18": (20, 0, 0),
    "sew_resnet18": (20, 0, 0),
    "wrn16_2": (7, 6, 0),  # the norms after a sum go to the neuron behind
    "pyramidnet18": (17, 1, 8),
}


@pytest.mark.parametrize("name", MODELS)
def test_networks_in_float64(name):
    """Rounding is far from any threshold there, so everything must be equal."""
    torch.manual_seed(1)
    net = lively(getattr(models, name)(timesteps=T, width=8).double())
    before = {k: v.clone() for k, v in net.state_dict().items()}
    fast, report = optimize_for_inference(net)
    assert (len(report.folded), len(report.fused), len(report.left_alone)) == MODELS[name], report
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    (want, calls), (got, _) = neuron_calls(net, x), neuron_calls(fast, x)
    rates = [out.mean().item() for _, out in calls.values()]
    assert min(rates) > 0.01, rates
    assert torch.allclose(got, want, rtol=1e-9, atol=1e-9)
    assert (want[0] - want[1]).abs().max() > 1e-6  # steps differ: the neurons do something
    assert torch.equal(fast(x), got)  # starts afresh
    after = net.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert all(p.requires_grad for p in net.parameters())
    assert not any(p.requires_grad for p in fast.parameters())
    assert not any(m.training for m in fast.modules())
    assert isinstance(fast, type(net))
    assert not fast(x).requires_grad


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", ["vgg11", "resnet18", "wrn16_2"])
def test_spikes_in_float32(name, memory_format):
    """Where a spike turns first, its charge was within rounding of the threshold."""
    torch.manual_seed(2)
    net = lively(getattr(models, name)(timesteps=T, width=8)).to(memory_format=memory_format)
    fast, _ = optimize_for_inference(net)
    x = torch.rand(4, 3, 16, 16).contiguous(memory_format=memory_format)
    (want, calls), (got, fast_calls) = neuron_calls(net, x), neuron_calls(fast, x)
    for neuron, (given, spikes) in calls.items():
        turned = fast_calls[neuron][1] != spikes
        if turned.any():
            h = charges(given)
            first = turned.unflatten(0, (T, -1)).cumsum(0).flatten(0, 1)[turned] == 1  # later ones follow from it
            assert ((h[turned][first] - 1.0).abs() < 1e-4).all()
            return
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-5)
    conv = fast.features[4] if name == "vgg11" else fast.layers[0][0].conv1
    assert conv.weight.is_contiguous(memory_format=memory_format)


def zoo_network(monkeypatch, ours):
    """SpikingJelly's SEW-ResNet as it is, or with our neurons; of torchvision it wants only a download function."""
    pytest.importorskip("spikingjelly.activation_based", reason="spikingjelly is not installed")
    if "torchvision" not in sys.modules:
        package, utils = types.ModuleType("torchvision"), types.ModuleType("torchvision._internally_replaced_utils")
        utils.load_state_dict_from_url = None
        package._internally_replaced_utils = utils
        monkeypatch.setitem(sys.modules, "torchvision", package)
        monkeypatch.setitem(sys.modules, "torchvision._internally_replaced_utils", utils)
    from spikingjelly.activation_based import functional, neuron
    from spikingjelly.activation_based.model import sew_resnet

    net = sew_resnet.SEWResNet(
        sew_resnet.BasicBlock, [1, 1, 1, 1], num_classes=10, cnf="ADD",
        spiking_neuron=snnfast.IFNode if ours else neuron.IFNode,
    )  # fmt: skip
    functional.set_step_mode(net, "m")
    return net


@pytest.mark.parametrize("neurons", ["theirs", "accelerated", "ours"])
def test_spikingjelly_zoo(neurons, monkeypatch):
    torch.manual_seed(3)
    net = lively(zoo_network(monkeypatch, neurons == "ours").double())
    if neurons == "accelerated":
        assert snnfast.accelerate(net).replaced
    fast, report = optimize_for_inference(net)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in net.modules()) == 12
    counts = len(report.folded), len(report.fused)
    assert counts == (12, 0), report
    assert not report.left_alone
    x = torch.rand(T, 2, 3, 32, 32, dtype=torch.float64)
    snnfast.functional.reset_net(net)
    with torch.no_grad():
        want, got = net(x), fast(x)
    assert torch.allclose(got, want, rtol=1e-9, atol=1e-9)
    assert (want[0] - want[-1]).abs().max() > 1e-6


# ---- single pairs ----
def pair(before=None, norm=None, **kwargs):
    return nn.Sequential(before or nn.Conv2d(3, 5, 3, **kwargs), norm or nn.BatchNorm2d(5), nn.ReLU())


FOLDED = {
    "bias": (lambda: pair(), (2, 3, 6, 6)),
    "no bias": (lambda: pair(bias=False), (2, 3, 6, 6)),
    "groups": (lambda: pair(nn.Conv2d(3, 6, 3, groups=3), nn.BatchNorm2d(6)), (2, 3, 6, 6)),
    "reflected border": (lambda: pair(padding=1, padding_mode="reflect"), (2, 3, 6, 6)),
    "without affine": (lambda: pair(norm=nn.BatchNorm2d(5, affine=False)), (2, 3, 6, 6)),
    "large eps": (lambda: pair(norm=nn.BatchNorm2d(5, eps=0.5)), (2, 3, 6, 6)),
    "transposed": (lambda: pair(nn.ConvTranspose2d(3, 5, 3)), (2, 3, 6, 6)),
    "1d": (lambda: pair(nn.Conv1d(3, 5, 3), nn.BatchNorm1d(5)), (2, 3, 6)),
    "3d": (lambda: pair(nn.Conv3d(3, 5, 3), nn.BatchNorm3d(5)), (2, 3, 4, 4, 4)),
    "steps": (
        lambda: pair(layer.Conv2d(3, 5, 3, step_mode="m"), layer.BatchNorm2d(5, step_mode="m")),
        (T, 2, 3, 6, 6),
    ),
}


@pytest.mark.parametrize("name", FOLDED)
def test_folded(name):
    make, shape = FOLDED[name]
    net = lively(make().double())
    fast, report = optimize_for_inference(net)
    assert report.folded == [("0", "1")], report
    assert isinstance(fast[1], nn.Identity)
    x = torch.randn(shape, dtype=torch.float64)
    assert torch.allclose(fast(x), net(x), rtol=1e-10, atol=1e-10)
    assert net(x).count_nonzero()


@pytest.mark.parametrize("dims", [2, 3])
def test_layouts_of_weights_stay(dims):
    conv, norm, layout = {
        2: (nn.Conv2d, nn.BatchNorm2d, torch.channels_last),
        3: (nn.Conv3d, nn.BatchNorm3d, torch.channels_last_3d),
    }[dims]
    net = pair(conv(3, 5, 3), norm(5)).eval().to(memory_format=layout)
    fast, report = optimize_for_inference(net)
    assert report.folded
    assert fast[0].weight.stride() == net[0].weight.stride()
    x = torch.randn(2, 3, *[6] * dims)
    assert fast(x).stride() == net(x).stride()


def test_half_precision_is_rounded_once():
    net = lively(pair()).bfloat16()
    fast, _ = optimize_for_inference(net)
    assert fast[0].weight.dtype == torch.bfloat16
    exact = copy.deepcopy(net).double()
    scale = exact[1].weight / (exact[1].running_var + exact[1].eps).sqrt()
    assert torch.equal(fast[0].weight, (exact[0].weight * scale.view(-1, 1, 1, 1)).bfloat16())


class UsesTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) + y


class CallsTwice(UsesTwice):
    def forward(self, x):
        return self.bn(self.conv(self.conv(x)))


class ReadsWeight(UsesTwice):
    def forward(self, x):
        return self.bn(self.conv(x)) * self.conv.weight.sum()


class ReadsStatistics(UsesTwice):
    def forward(self, x):
        return self.bn(self.conv(x)) + self.bn.running_mean.sum()


class Standardised(nn.Conv2d):
    def forward(self, x):
        return nn.functional.conv2d(x, self.weight - self.weight.mean(), self.bias, padding=self.padding)


class Untraced(UsesTwice):
    def forward(self, x):
        return self.bn(self.conv(x)) if x.sum() < 1e9 else x


def tied():
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))
    net[2].weight = net[0].weight
    return net


class TwoNames(UsesTwice):
    def __init__(self):
        super().__init__()
        self.same = self.bn

    def forward(self, x):
        return self.same(self.conv(x))  # a trace calls it by its first name


class AsksForATensor(UsesTwice):
    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) + y if isinstance(x, torch.Tensor) else self.bn(y)


class AsksForAnOption(UsesTwice):
    def forward(self, x, skip=None):
        y = self.conv(x)
        return self.bn(y) + y if skip is None else self.bn(y) + skip


class AsksForANorm(UsesTwice):
    def forward(self, x):
        for module in self.children():
            x = module(x)
            if isinstance(module, nn.BatchNorm2d):
                x = 2 * x
        return x


class ReadsParameters(UsesTwice):
    def forward(self, x):
        return self.bn(self.conv(x)) * sum(p.sum() for p in self.parameters())


class ReadsANumber(UsesTwice):
    def forward(self, x):
        return self.bn(self.conv(x)) * self.bn.eps * 1e5


class Keeps(UsesTwice):
    def forward(self, x):
        self.last = self.conv(x)
        return self.bn(self.last)


class Counts(UsesTwice):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        y = self.conv(x)
        return self.bn(y) if self.calls % 2 else self.bn(y) + y


class Slices(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU())

    def forward(self, x):
        return self.parts[:2](x) + self.parts[:1](x)


def hooked(which):
    net = pair()
    net[which].register_forward_hook(lambda m, args, out: out * 2)
    return net


class NormAndActivation(nn.BatchNorm2d):
    """As timm's BatchNormAct2d."""

    def __init__(self, features):
        super().__init__(features)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(super().forward(x))


def test_an_identity_between_changes_nothing():
    net = lively(nn.Sequential(nn.Conv2d(3, 5, 3), nn.Identity(), nn.BatchNorm2d(5), nn.ReLU())).eval()
    fast, report = optimize_for_inference(net)
    assert report.folded == [("0", "2")]
    x = torch.randn(2, 3, 5, 5)
    assert torch.allclose(fast(x), net(x), atol=1e-5)


REFUSED = {
    "activation inside": (lambda: pair(norm=NormAndActivation(5)), "1", "folded: NormAndActivation is not one of"),
    "output used twice": (UsesTwice, "bn", "the output of conv is used 2 times"),
    "called twice": (CallsTwice, "bn", "called, or named, more than once"),
    "named twice": (TwoNames, "bn", "called, or named, more than once"),
    "weight read": (ReadsWeight, "bn", "is read by the model's forward itself"),
    "statistics read": (ReadsStatistics, "bn", "is read by the model's forward itself"),
    "tied": (tied, "1", "shares a parameter"),
    "hook on the layer": (lambda: hooked(0), "1", "the convolution before has hooks"),
    "hook on the norm": (lambda: hooked(1), "1", "the norm has hooks"),
    "weight norm": (
        lambda: pair(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 5, 3))), "1", "is not the output of",
    ),
    "own convolution": (lambda: pair(Standardised(3, 5, 3)), "1", "is not the output of a convolution"),
    "no statistics": (
        lambda: pair(norm=nn.BatchNorm2d(5, track_running_stats=False)), "1", "no running statistics",
    ),
    "unknown norm": (lambda: pair(norm=nn.SyncBatchNorm(5)), "1", "SyncBatchNorm is not one of"),
    "transposed groups": (
        lambda: pair(nn.ConvTranspose2d(3, 6, 3, groups=3), nn.BatchNorm2d(6)), "1", "in groups",
    ),
    "linear": (lambda: nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)), "1", "is not the output of a convolution"),
    "asks for a tensor": (AsksForATensor, "bn", "the output of conv is used 2 times"),
    "asks for an option": (AsksForAnOption, "bn", "the output of conv is used 2 times"),
    "asks for a norm": (AsksForANorm, "bn", "the forward of the model would do something else then"),
    "parameters read": (ReadsParameters, "bn", "the forward of the model would do something else then"),
    "number read": (ReadsANumber, "bn", "the forward of the model would do something else then"),
    "output kept": (Keeps, "bn", "the output of conv is used 2 times: by bn, last"),
    "counts": (Counts, "bn", "cannot be traced"),
    "slices": (Slices, "parts.1", "called, or named, more than once"),
    "untraced": (Untraced, "bn", "cannot be traced"),
    "no layer before": (lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)), "1", "is not the output of"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_left_alone_with_the_reason(name):
    make, norm, reason = REFUSED[name]
    net = lively(make())
    fast, report = optimize_for_inference(net)
    assert not report.folded
    assert reason in report.left_alone[norm], report
    assert f"{norm} left alone" in str(report)
    x = torch.randn(2, 3, 5) if name == "linear" else torch.randn(2, 3, 5, 5)
    if name != "unknown norm":
        assert torch.equal(fast(x), net(x))


def test_a_forward_that_makes_a_neurons_state_is_traced():
    snntorch = pytest.importorskip("snntorch", reason="snntorch is not installed")

    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.lif = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), snntorch.Leaky(beta=0.9)

        def forward(self, x, mem=None):
            if mem is None:
                mem = self.lif.init_leaky()
            return self.lif(self.bn(self.conv(x)), mem)

    net = lively(Step())
    fast, report = optimize_for_inference(net)
    assert report.folded == [("conv", "bn")], report
    x, mem = torch.rand(2, 3, 5, 5), torch.rand(2, 5, 3, 3)
    for args in ((x,), (x, mem)):
        assert torch.allclose(fast(*args)[1], net(*args)[1], atol=1e-5)


class ReachesInside(Slices):
    def forward(self, x, past=False):
        return self.parts[0](x) if past else self.parts(x)


def test_a_part_of_an_untraced_forward_is_not_called_past_it():
    net = lively(ReachesInside())
    fast, report = optimize_for_inference(net)
    assert report.folded == [("parts.0", "parts.1")]
    x = torch.randn(2, 3, 5, 5)
    for model in (fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.allclose(model(x), net(x), atol=1e-5)
        with pytest.raises(RuntimeError, match="a layer inside parts was called past it"):
            model(x, past=True)
        with pytest.raises(RuntimeError, match="channels"):
            model(torch.randn(2, 4, 5, 5))
        with pytest.raises(RuntimeError, match="a layer inside parts was called past it"):
            model(x, past=True)


def test_the_report_names_the_model_itself():
    assert "(model) left alone: not folded" in str(optimize_for_inference(nn.BatchNorm2d(3))[1])


def test_a_norm_before_a_neuron_alone_is_fused_and_a_fused_model_is_folded():
    net = lively(
        nn.Sequential(
            nn.BatchNorm2d(3), snnfast.LIFNode(timesteps=T), nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5),
            snnfast.ParametricLIFNode(timesteps=T),
        ).double()
    )  # fmt: skip
    x = torch.randn(2 * T, 3, 6, 6, dtype=torch.float64) * 2
    want = net(x)
    assert len(snnfast.fuse(net).fused) == 2
    fast, report = optimize_for_inference(net)  # copies a fused network, in the state after a call
    assert (report.fused, report.folded) == ([("0", "1")], [("2", "3")])
    assert "folded into the convolution before: 1" in str(report)
    assert torch.equal(fast(x), want)
    assert 0 < want.mean() < 1
    assert snnfast.unfuse(net) == 2  # the model is as it was: fused


@pytest.mark.parametrize("remake", [lambda net: net, copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_the_copy_stays_in_evaluation_mode_and_says_so(remake, monkeypatch):
    model = lively(models.resnet18(timesteps=T, width=4)).train()
    fast = remake(optimize_for_inference(model)[0])
    x = torch.rand(2, 3, 16, 16)
    before = fast(x)
    monkeypatch.setattr(_notices, "_said", set())
    with pytest.warns(UserWarning, match="evaluation mode: it is the copy .* Train the model that it was made from"):
        assert fast.train() is fast
    assert not any(m.training for m in fast.modules())
    assert torch.equal(fast(x), before)
    assert fast.eval() is fast
    around = nn.ModuleList([fast, nn.Dropout()]).train()  # a frozen part of a model that trains
    assert [m.training for m in around] == [False, True]
    assert model.train().training


def test_bad_arguments():
    with pytest.raises(TypeError, match="model must be"):
        optimize_for_inference([nn.ReLU()])
    with pytest.raises(TypeError, match="model must be"):
        snnfast.capture(torch.relu, torch.ones(1))
    with pytest.raises(TypeError, match="sample must be"):
        snnfast.capture(nn.ReLU(), [1.0])
    with pytest.raises(RuntimeError, match=r"needs everything on a CUDA device, but sample is on cpu"):
        snnfast.capture(nn.ReLU().eval(), torch.ones(1))


@pytest.fixture
def captured_on(monkeypatch):
    """Without a GPU: the streams that were made, and those that a graph was captured on."""
    made, captured_on = [], []

    class Stream:
        def __init__(self, device=None):
            self.device = device
            made.append(self)

        def wait_stream(self, other):
            pass

    @contextlib.contextmanager
    def graph(found, stream=None):
        captured_on.append(stream)
        yield

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: types.SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(torch.cuda, "graph", graph)
    return made, captured_on


def test_a_capture_takes_streams_of_its_own_device(captured_on):
    """torch.cuda.graph's own stream is of whichever device was the current one when a process first captured."""
    made, captured_on = captured_on
    x = torch.rand(2, 3)
    inference.Captured(nn.Linear(3, 2).eval(), x)
    assert captured_on
    assert all(stream in made and stream.device == x.device for stream in captured_on)


def test_a_capture_gives_new_tensors_or_refuses(captured_on):
    @dataclasses.dataclass
    class Output:
        logits: torch.Tensor

    class Net(nn.Linear):
        def forward(self, x):
            return self.wrap(super().forward(x))

    net, x = Net(3, 2).eval(), torch.rand(2, 3)
    net.wrap = lambda y: {"logits": (y, None, 3)}
    graph = inference.Captured(net, x)
    first, second = graph(x)["logits"][0], graph(x)["logits"][0]
    assert first.data_ptr() != second.data_ptr()
    net.wrap = Output
    with pytest.raises(TypeError, match="to be captured, got Output"):
        inference.Captured(net, x)


# ---- on a GPU ----
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_captured_replays_are_independent():
    torch.manual_seed(0)
    net, _ = optimize_for_inference(lively(models.resnet18(timesteps=T, width=8)).cuda())
    first, second = (torch.rand(2, 3, 32, 32, device="cuda") for _ in range(2))
    with torch.no_grad():
        want = [net(first), net(second)]
    graph = snnfast.capture(net, first)
    got = [graph(first), graph(second), graph(first)]
    for g, w in zip(got, [*want, want[0]], strict=True):
        assert torch.allclose(g, w, rtol=1e-4, atol=1e-5)
    assert torch.equal(got[0], got[2])
    assert not torch.equal(got[0], got[1])
    with pytest.raises(ValueError, match="x must be"):
        graph(first[:1])
    with pytest.raises(ValueError, match="evaluation mode"):
        snnfast.capture(models.resnet18(timesteps=T, width=8).cuda(), first)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_capture_wants_weights_on_the_device():
    with pytest.raises(RuntimeError, match="but weight is on cpu"):
        snnfast.capture(nn.Linear(3, 2).eval(), torch.ones(1, 3, device="cuda"))


def test_weights_that_a_hook_computes():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), snnfast.IFNode(timesteps=T), nn.Linear(3, 2))
    prune.l1_unstructured(net[0], "weight", 0.5)
    fast, report = snnfast.optimize_for_inference(net)
    assert report.fused == [("1", "2")]
    x = torch.randn(T * 2, 1, 5, 5)
    assert torch.equal(fast(x), net.eval()(x))
    with torch.no_grad():
        fast[0].weight_orig.zero_()
    snnfast.functional.reset_net(fast)
    assert fast(x).unflatten(0, (T, 2)).std(1).max() < 1e-6  # the images are the same to it
    assert net[0].weight_orig.abs().sum() > 0


def test_a_state_that_belongs_to_a_graph_names_the_reset():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), PeerLikeNeuron())
    net(torch.randn(1, 1, 5, 5))
    with pytest.raises(RuntimeError, match="reset_net"):
        snnfast.optimize_for_inference(net)


class PeerLikeNeuron(nn.Module):
    """Keeps what it computed, as neurons of other libraries do; ours detach it in a copy."""

    def forward(self, x):
        self.v = x
        return x
