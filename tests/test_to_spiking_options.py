"""to_spiking's options: input codings, calibration, pooling, dropout; and what it refuses."""

from __future__ import annotations

import copy
import dataclasses
import functools
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import snnfast
from snnfast.convert.to_spiking_layers import Dropout, MaxPoolOfRates, repeat

T, B = 4, 3


def small(relu=nn.ReLU):
    return nn.Sequential(nn.Linear(6, 8), relu(), nn.Linear(8, 5))


# ---- input codings ----
def test_poisson_coding_is_seeded_and_has_the_rates_of_the_input():
    ann = nn.Sequential(nn.Identity(), nn.ReLU())
    arguments = {"neuron": snnfast.IFNode, "coding": "poisson"}  # such a neuron passes spikes on
    x = torch.tensor([[0.0, 0.1, 0.5, 0.9, 1.0]]).expand(100, 5)
    net = snnfast.to_spiking(ann, 200, seed=3, **arguments)
    first = net(x)
    assert set(first.unique().tolist()) == {0.0, 1.0}
    assert torch.allclose(first.mean((0, 1)), x[0], atol=0.01)
    assert first[:, :, 0].sum() == 0
    assert first[:, :, 4].all()
    assert torch.equal(snnfast.to_spiking(ann, 200, seed=3, **arguments)(x), first)
    assert not torch.equal(snnfast.to_spiking(ann, 200, seed=4, **arguments)(x), first)
    again = copy.deepcopy(net), pickle.loads(pickle.dumps(net))
    second = net(x)
    assert not torch.equal(second, first)
    assert all(torch.equal(n(x), second) for n in again)
    torch.manual_seed(1)
    unseeded = snnfast.to_spiking(ann, 200, **arguments)(x)
    torch.manual_seed(1)
    assert torch.equal(snnfast.to_spiking(ann, 200, **arguments)(x), unseeded)
    with pytest.raises(ValueError, match=r"x must be from 0 to 1 for Poisson coding, got values from -1 to 0.5"):
        net(torch.tensor([[-1.0, 0.5]]))


def test_a_coding_of_ones_own():
    def later(x, T):
        return torch.stack([x * (t / T) for t in range(T)])

    ann, x = small(), torch.randn(B, 6)
    net = snnfast.to_spiking(ann, T, coding=later)
    assert torch.equal(net(x), snnfast.to_spiking(ann, T, coding="temporal")(later(x, T)))
    with pytest.raises(ValueError, match=r"coding must give \[T, B, \*\] with T = 4, got a tensor of shape \(3, 6\)"):
        snnfast.to_spiking(ann, T, coding=lambda x, T: x)(x)


def test_wrong_codings():
    with pytest.raises(ValueError, match=r"x must be \[T, B, \*\] with T = 4 .* got shape \(3, 6\)"):
        snnfast.to_spiking(small(), T, coding="temporal")(torch.randn(B, 6))
    with pytest.raises(ValueError, match="coding must be one of 'direct', 'poisson', 'temporal' or a callable"):
        snnfast.to_spiking(small(), T, coding="rank")
    with pytest.raises(TypeError, match="coding must be a name or a callable"):
        snnfast.to_spiking(small(), T, coding=3)
    with pytest.raises(ValueError, match="seed=3 is for coding='poisson'"):
        snnfast.to_spiking(small(), T, seed=3)


# ---- dropout and pooling ----
class FunctionalDropout(nn.Module):
    def __init__(self, always=False):
        super().__init__()
        self.fc, self.always = nn.Linear(6, 200), always

    def forward(self, x):
        x = F.relu(self.fc(x))
        return F.dropout(x + 1, 0.25) if self.always else F.dropout(x + 1, 0.25, training=self.training)


@pytest.mark.parametrize(
    "ann", [nn.Sequential(nn.Linear(6, 200), nn.ReLU(), nn.Hardtanh(1, 2), nn.Dropout(0.25)), FunctionalDropout()]
)
def test_dropout_has_one_mask_for_all_steps_and_none_in_evaluation(ann):
    net = snnfast.to_spiking(ann, T, other_activations="keep")
    y = net(torch.randn(B, 6))
    dropped = y == 0
    assert (dropped == dropped[:1]).all()
    assert 0.15 < dropped.float().mean() < 0.35
    assert (dropped[:, 0] != dropped[:, 1]).any()
    assert torch.isin(y, torch.tensor([0, 1 / 0.75, 2 / 0.75])).all()
    net.eval()
    assert (net(torch.randn(B, 6)) >= 1).all()
    net.train()
    assert (net(torch.randn(B, 6)) == 0).any()


def test_dropout_that_is_always_on_stays_so():
    net = snnfast.to_spiking(FunctionalDropout(always=True), T).eval()
    assert (net(torch.randn(B, 6)) == 0).any()


def test_dropout_of_channels():
    y = Dropout(0.5, "feature_dropout", 2)(torch.ones(2 * 8, 16, 3, 3)).unflatten(0, (2, 8))
    assert torch.equal(y[0], y[1])
    assert (y == y[..., :1, :1]).all()
    assert set(y.unique().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.AdaptiveMaxPool2d(2)])
def test_max_pooling_of_rates(pool):
    x = (torch.rand(9, B, 2, 6, 6) < 0.4).float()
    y = MaxPoolOfRates(pool, 9)(x.flatten(0, 1)).unflatten(0, (9, B))
    assert torch.equal(y.sum(0), pool(x.sum(0)))
    assert set(y.unique().tolist()) == {0.0, 1.0}
    assert (y.sum(0) < pool(x.flatten(0, 1)).unflatten(0, (9, B)).sum(0)).any()


class FunctionalPool(nn.Module):
    def forward(self, x):
        x = F.max_pool2d(F.relu(x), 3, stride=2, padding=1)
        return F.adaptive_max_pool2d(x, (1, 1))


def test_max_pool_option():
    x = torch.rand(B, 2, 8, 8)
    modules = nn.Sequential(nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.AdaptiveMaxPool2d(1))
    for rates in ("rates", "keep"):
        nets = [snnfast.to_spiking(m, 16, snnfast.IFNode, max_pool=rates) for m in (modules, FunctionalPool())]
        a, b = (net(x) for net in nets)
        assert torch.equal(a, b)
        found = sum(isinstance(m, MaxPoolOfRates) for m in nets[1].modules())
        assert found == (2 if rates == "rates" else 0)
        n = snnfast.functional.if_multi_step(x.expand(16, *x.shape))[0].sum(0).amax((2, 3))
        assert torch.equal(a.sum(0).flatten(1), n) == (rates == "rates")


# ---- calibration ----
class Calibrated(nn.Module):
    """With a shortcut, pooling of both kinds, a concatenation and a ReLU that is used twice."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.conv3 = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(12, 4, 3, padding=1)
        self.relu, self.pool, self.drop = nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.5)
        self.fc1, self.fc2 = nn.Linear(16, 12), nn.Linear(12, 5)

    def forward(self, x):
        x = self.relu(self.bn(self.conv1(x)))
        y = self.relu(self.conv2(x) + x)
        y = F.avg_pool2d(F.relu(self.conv3(self.pool(torch.cat([x, y], 1)))), 2)
        return self.fc2(self.drop(F.relu(self.fc1(y.flatten(1)))))


def test_a_calibrated_network_tends_to_the_ann():
    ann = Calibrated()
    for p in ann.parameters():
        p.data.mul_(1.5)
    ann.eval()
    x = torch.randn(16, 2, 8, 8)
    want = ann(x)
    net = snnfast.to_spiking(ann, 8, calibration=x, percentile=100)
    errors = []
    for steps in (8, 32, 128, 512, 2048):
        net.timesteps = steps
        errors.append(((net(x).mean(0) - want).norm() / want.norm()).item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01 < errors[0]
    assert errors[-1] < errors[0] / 30


def test_thresholds_are_percentiles_of_the_activations():
    ann = Calibrated().train()
    x = torch.randn(16, 2, 8, 8)
    seen = []
    copied = copy.deepcopy(ann).eval()
    for name in ("conv3", "fc1"):
        copied.get_submodule(name).register_forward_hook(lambda m, i, o: seen.append(o.relu().flatten()))
    before = copy.deepcopy(ann.state_dict())
    copied(x)
    for percentile in (100, 90.0):
        net = snnfast.to_spiking(ann, T, calibration=x, percentile=percentile)
        for found, values in ((net.relu_3, seen[0]), (net.relu_4, seen[1])):
            want = torch.quantile(values, percentile / 100, interpolation="nearest").item()
            assert found.neuron.v_threshold == pytest.approx(want, rel=0.02)
            assert found.neuron.v_reset is None
    assert net.training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items() if k in before)
    kinds = {type(m).__name__ for m in net.modules()}
    assert "Observer" not in kinds
    other = snnfast.to_spiking(ann, T, calibration=0.1 * x)
    other.load_state_dict(net.state_dict())
    net.eval(), other.eval()
    assert torch.equal(other(x), net(x))
    assert other.relu.neuron.v_threshold == net.relu.neuron.v_threshold
    net(x)
    assert set(net.relu.neuron(x[:1].repeat(T, 1, 1, 1)).unique().tolist()) <= {0.0, 1.0}  # spikes within, θ outside


def test_what_calibration_refuses():
    x = torch.randn(2, 6)
    with pytest.raises(ValueError, match=r"neuron must be snnfast.IFNode with calibration: LIFNode"):
        snnfast.to_spiking(small(), T, snnfast.LIFNode, calibration=x)
    with pytest.raises(ValueError, match="v_threshold must not be given with calibration"):
        snnfast.to_spiking(small(), T, calibration=x, v_threshold=2.0)
    with pytest.raises(ValueError, match="percentile must be above 0 and at most 100, got 101"):
        snnfast.to_spiking(small(), T, calibration=x, percentile=101)
    for wrong in (x[:0], [x]):
        with pytest.raises(ValueError, match="calibration must be a tensor of at least one input"):
            snnfast.to_spiking(small(), T, calibration=wrong)
    with pytest.raises(ValueError, match="calibration must be finite"):
        snnfast.to_spiking(small(), T, calibration=x / 0)


def test_parameters_of_neurons_are_on_the_models_device():
    net = snnfast.to_spiking(small().to("meta"), T, snnfast.ParametricLIFNode)
    assert {p.device.type for p in net.parameters()} == {"meta"}


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    loss: torch.Tensor
    hidden: None = None


class OwnNames(nn.Module):
    """Layers of the names that the network's options have, and outputs of several kinds."""

    def __init__(self):
        super().__init__()
        self.coding, self.readout = nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, x):
        y = self.readout(F.relu(self.coding(x)))
        return Output(y, y.square().mean()), {"loss": y.mean()}


def test_layers_named_as_options_and_outputs_of_several_kinds():
    ann = OwnNames()
    x = 2 * torch.randn(B, 6)
    out, more = snnfast.to_spiking(ann, T)(x)
    assert out.logits.shape == (T, B, 5)
    assert torch.equal(out.loss, out.logits.square().mean())
    assert out.hidden is None
    assert torch.allclose(more["loss"], out.logits.mean())
    mean = snnfast.to_spiking(ann, T, readout=lambda y: y[0].logits.mean(0))(x)
    assert torch.equal(mean, out.logits.mean(0))
    ann.timesteps = 1000
    with pytest.raises(ValueError, match=r"no attribute timesteps, .* got 1000"):
        snnfast.to_spiking(ann, T)


class WithIndices(nn.Module):
    def __init__(self):
        super().__init__()
        self.pool, self.unpool, self.conv = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2), nn.Conv2d(2, 2, 1)

    def forward(self, x):
        x, places = self.pool(F.relu(self.conv(x)))
        x, more = F.max_pool2d(x, 2, return_indices=True)
        return self.unpool(F.max_unpool2d(x, more, 2), places)


def test_pools_with_indices_stay_when_calibrated():
    x = torch.rand(B, 2, 8, 8)
    assert snnfast.to_spiking(WithIndices(), T, calibration=x)(x).shape == (T, B, 2, 8, 8)


def test_readout():
    ann, x = small(), torch.randn(B, 6)
    net = snnfast.to_spiking(ann, T, readout=lambda y: y.mean(0))
    assert torch.equal(net(x), snnfast.to_spiking(ann, T)(x).mean(0))


# ---- what is refused, and where it is ----
class Helper(nn.Module):
    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, x):
        return self.call(x)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.GELU(), r"GELU at 'body.1' \(GELU\)"),
        (nn.ReLU6(), r"ReLU6 at 'body.1'"),
        (nn.TransformerEncoderLayer(8, 2), "TransformerEncoderLayer at 'body.1'"),
        (Helper(F.silu), r"silu at 'body.1' \(Helper\), File .*test_to_spiking_options.py.*, line \d+"),
        (Helper(F.relu6), "relu6 at 'body.1'"),
        (Helper(lambda x: x.clip(0, 6)), "relu6 at 'body.1'"),
        (Helper(lambda x: torch.clamp(x, min=0.0, max=6.0)), "relu6 at 'body.1'"),
        (Helper(lambda x: x.tanh()), "tanh at 'body.1'"),
        (Helper(torch.sigmoid), "sigmoid at 'body.1'"),
        (Helper(torch.special.expit), "sigmoid at 'body.1'"),
        (Helper(F.hardshrink), "hardshrink at 'body.1'"),
        (Helper(lambda x: F.threshold(x, 0.1, 0.0)), "threshold at 'body.1'"),
    ],
    ids=lambda p: type(p).__name__ if isinstance(p, nn.Module) else "",
)
def test_other_activations(layer, message):
    ann = nn.Sequential()
    ann.body = nn.Sequential(nn.Linear(6, 8), layer, nn.ReLU())
    ann.head = nn.Linear(8, 5)
    with pytest.raises(ValueError, match=f"model must have ReLU activations, but has {message}"):
        snnfast.to_spiking(ann, T)
    kept = snnfast.to_spiking(ann, T, other_activations="keep")
    assert sum(isinstance(m, snnfast.LIFNode) for m in kept.modules()) == 1
    assert kept(torch.randn(B, 6)).shape == (T, B, 5)
    if isinstance(layer, nn.TransformerEncoderLayer):
        with pytest.raises(ValueError, match="TransformerEncoderLayer"):
            snnfast.to_spiking(ann, T, other_activations="replace")
        return
    replaced = snnfast.to_spiking(ann, T, other_activations="replace")
    assert sum(isinstance(m, snnfast.LIFNode) for m in replaced.modules()) == 2
    assert replaced(torch.randn(B, 6)).shape == (T, B, 5)


class Recurrent(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.fc, self.relu, self.layer, self.head = nn.Linear(6, 8), nn.ReLU(), layer, nn.Linear(8, 5)

    def forward(self, x):
        y = self.layer(self.relu(self.fc(x)))
        return self.head(y[0] if isinstance(y, tuple) else y)


class OwnLSTM(nn.LSTM):
    pass


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN, OwnLSTM, nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_recurrent_layers_are_refused_unless_kept(kind):
    cell = issubclass(kind, nn.RNNCellBase)
    ann = Recurrent(kind(8, 8) if cell else kind(8, 8, batch_first=True))
    for choice in ("error", "replace"):
        message = r"feed-forward .* recurrent layer \w+ at 'layer' .*other_activations='keep'"
        with pytest.raises(ValueError, match=message):
            snnfast.to_spiking(ann, T, other_activations=choice)
    kept = snnfast.to_spiking(ann, T, other_activations="keep").eval()
    x = torch.randn(B, 6) if cell else torch.randn(B, 7, 6)
    seen = []
    kept.relu.register_forward_hook(lambda module, args, spikes: seen.append(spikes.unflatten(0, (T, B))))
    y = kept(x)
    step = [ann.layer(s) for s in seen[0]]  # each step from the initial state
    step = [s[0] if isinstance(s, tuple) else s for s in step]
    torch.testing.assert_close(y, ann.head(torch.stack(step)))


class AttentionAndSoftmax(Recurrent):
    def forward(self, x):
        y = self.relu(self.fc(x))
        return self.head(self.layer(y, y, y)[0].softmax(-1))


def test_attention_and_softmax_are_computed_at_each_step():
    ann = AttentionAndSoftmax(nn.MultiheadAttention(8, 2, batch_first=True)).eval()
    net = snnfast.to_spiking(ann, T)
    seen = []
    net.relu.register_forward_hook(lambda module, args, spikes: seen.append(spikes.unflatten(0, (T, B))))
    y = net(torch.randn(B, 7, 6))
    steps = [ann.head(ann.layer(s, s, s)[0].softmax(-1)) for s in seen[0]]
    torch.testing.assert_close(y, torch.stack(steps))


def test_spiking_models_of_other_libraries_are_refused():
    snntorch = pytest.importorskip("snntorch", reason="snntorch is not installed")
    net = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), snntorch.Leaky(beta=0.9, init_hidden=True))
    net(torch.ones(1, 3))  # a state with a graph cannot be copied
    with pytest.raises(ValueError, match=r"'2' \(Leaky\) is a spiking module already; snnfast.accelerate"):
        snnfast.to_spiking(net, T)


class Untraceable(nn.Module):
    """Its forward asks for a value, which no trace has."""

    def __init__(self, functional=False):
        super().__init__()
        self.fc, self.relu, self.functional = nn.Linear(6, 6), nn.ReLU(), functional
        self.more = nn.ModuleList([nn.Linear(6, 6), nn.Dropout(0.5), nn.ReLU()])

    def forward(self, x):
        if x.abs().max() > 1000:
            raise ValueError("too large")
        x = self.relu(self.fc(x))
        for layer in self.more:
            x = layer(x)
        return x


class UntraceableFunctional(Untraceable):
    def forward(self, x):
        if x.sum() > 0:
            x = x.clamp(0, 1) + torch.clamp(x, min=-1)
        return F.relu(self.fc(x))


class UntraceableClamps(Untraceable):
    def __init__(self):
        super().__init__()
        self.act = F.relu

    def forward(self, x):
        told = """A text
that begins to the left of the code"""
        return self.by(x) if x.sum() > 0 and told else self.by(-x)

    def by(self, x):
        return torch.clip(nn.ReLU()(x), 0) + self.fc(x).clamp(0.0, 6.0)


ALIAS = torch.relu


def helper(x):
    return F.relu(x)


class UntraceableHidden(Untraceable):
    """ReLUs by other names than theirs."""

    half = functools.partial(F.relu, inplace=False)

    def forward(self, x):
        return helper(ALIAS(x)) if x.sum() > 0 else self.half(self.fc(x))


@pytest.mark.parametrize("before", [(), (nn.Linear(6, 6),), (nn.Linear(6, 6), nn.ReLU())], ids=len)
def test_a_module_that_cannot_be_traced(before):
    ann = nn.Sequential(*before, Untraceable(), nn.Linear(6, 5)).eval()
    with torch.no_grad():
        for p in ann.parameters():
            p.mul_(3)
    net = snnfast.to_spiking(ann, T)
    same = nn.Sequential(*before, nn.Sequential(ann[-2].fc, nn.ReLU(), *ann[-2].more), ann[-1])
    x = torch.randn(B, 6) * 2
    assert type(net[-2]) is Untraceable
    assert torch.allclose(net(x), snnfast.to_spiking(same, T)(x))
    assert net(x).std() > 0
    with pytest.raises(ValueError, match=r"auto_reset can be False only .* 'Untraceable'|\(Untraceable\) cannot be"):
        net.auto_reset = False
    net.train()
    net(x)
    hidden = []
    net[-2].more[1].register_forward_hook(lambda m, i, o: hidden.append((i[0], o)))
    net(x)
    (given, dropped), = hidden  # fmt: skip
    assert ((given != 0) & (dropped == 0)).sum() == 0 or isinstance(net[-2].more[1], Dropout)


def test_an_activation_that_cannot_be_found_is_refused():
    ann = nn.Sequential(nn.Linear(6, 6), UntraceableFunctional())
    message = r"model calls relu, line \d+ of '1' \(UntraceableFunctional\), whose forward torch.fx cannot follow"
    with pytest.raises(ValueError, match=message):
        snnfast.to_spiking(ann, T)
    with pytest.raises(ValueError, match=r"calls relu, its act; clip, line \d+; clamp, line \d+; ReLU, line \d+ of"):
        snnfast.to_spiking(nn.Sequential(UntraceableClamps()), T)
    with pytest.raises(ValueError, match=r"model calls relu, its half; relu, line \d+; relu, line \d+ of"):
        snnfast.to_spiking(nn.Sequential(UntraceableHidden()), T)


def test_other_refusals():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got function"):
        snnfast.to_spiking(F.relu, T)
    with pytest.raises(ValueError, match="timesteps must be a whole number from 1, got 0"):
        snnfast.to_spiking(small(), 0)
    with pytest.raises(ValueError, match="model must have at least one ReLU, found none in Sequential"):
        snnfast.to_spiking(nn.Sequential(nn.Linear(3, 2)), T)
    with pytest.raises(ValueError, match=r"model must be an ordinary ANN, but '1' .* is a spiking module already"):
        snnfast.to_spiking(snnfast.to_spiking(small(), T), T)
    with pytest.raises(TypeError, match=r"neuron must be a class of neurons, such as snnfast.LIFNode, got 'lif'"):
        snnfast.to_spiking(small(), T, "lif")
    with pytest.raises(TypeError, match=r"neuron must be a class of neurons.*got IFNode\("):
        snnfast.to_spiking(small(), T, snnfast.IFNode())
    with pytest.raises(TypeError, match="neuron must make a module with timesteps"):
        snnfast.to_spiking(small(), T, lambda timesteps: nn.ReLU())
    with pytest.raises(TypeError, match=r"neuron must take timesteps, as snnfast.LIFNode .* got torch.nn.*\.ReLU"):
        snnfast.to_spiking(small(), T, nn.ReLU)  # or another library's neuron
    with pytest.raises(ValueError, match="tau must be"):
        snnfast.to_spiking(small(), T, tau=0.5)
    for name in ("max_pool", "other_activations"):
        with pytest.raises(ValueError, match=f"{name} must be one of"):
            snnfast.to_spiking(small(), T, **{name: "drop"})


class DifferentInTraining(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x):
        return F.relu(F.relu(self.fc(x)) * 2) if self.training else F.relu(self.fc(x))


def test_another_number_of_activations_in_training():
    with pytest.raises(ValueError, match=r"same activations in training and in evaluation, .* calls 2 and 1"):
        snnfast.to_spiking(DifferentInTraining(), T)


class Recording(nn.Module):
    """Counts its calls in a buffer and keeps what it computed."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.last, self.all, self.offset, self.relu = None, [], None, nn.ReLU()

    def activation(self, x):
        return self.relu(x)

    def forward(self, x):
        if self.offset is None:
            self.offset = torch.ones(())
        self.calls.add_(1)
        self.last = self.activation(x) + self.offset
        self.all.append(self.last)
        return self.last


def test_tracing_changes_nothing():
    net = snnfast.to_spiking(Recording().eval(), T)
    assert (net.calls, net.last, net.all) == (0, None, [])
    assert not net.training
    pickle.loads(pickle.dumps(net))  # proxies of the trace would not let it
    y = net(torch.rand(2, 3))
    assert (y >= 1).all()
    assert net.calls == 1
    assert torch.equal(net.last.unflatten(0, (T, -1)), y)


class RecordingFunction(Recording):
    def activation(self, x):
        return F.relu(x)


class RecordingTwice(Recording):
    def activation(self, x):
        return self.relu(self.relu(x) - 1)


@pytest.mark.parametrize("cls", [RecordingFunction, RecordingTwice])
def test_what_a_forward_written_anew_would_not_keep_is_refused(cls):
    message = rf"must not keep what it computes, as '0' \({cls.__name__}\) does in last, all, .*: return it, or give"
    with pytest.raises(ValueError, match=message):
        snnfast.to_spiking(nn.Sequential(cls()), T)


class Asking(nn.Module):
    """Another thing for each kind of its layers, and for tensors."""

    def __init__(self, functional):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU())
        self.functional = functional

    def forward(self, x):
        if isinstance(x, torch.Tensor):
            x = 2 * x
        for layer in self.layers:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                x = x - 0.1
        return F.relu(x) if self.functional else x


class Rectifier(nn.Module):
    """A ReLU for a neuron: the network then computes what the ANN does."""

    def __init__(self, timesteps):
        super().__init__()
        self.timesteps = timesteps

    def forward(self, x):
        return x.relu()


@pytest.mark.parametrize("functional", [True, False])
def test_a_forward_that_asks_does_as_before(functional):
    torch.manual_seed(0)
    ann, x = Asking(functional), torch.rand(2, 3)
    assert torch.allclose(snnfast.to_spiking(ann, T, neuron=Rectifier)(x), ann(x).expand(T, 2, 3))


class Catching(nn.Module):
    def forward(self, x):
        try:
            return F.relu(x) if x.sum() > 0 else x
        except RuntimeError:
            return F.relu(x)
        except Exception:
            return x


def test_a_branch_whose_error_is_caught_is_one():
    with pytest.raises(ValueError, match=r"whose forward torch.fx cannot follow \(TraceError: "):
        snnfast.to_spiking(nn.Sequential(Catching()), T)


class WarmingUp(nn.Module):
    """Another factor at each call, by what forward counts in ``place``."""

    def __init__(self, place, activation):
        super().__init__()
        self.activation = activation
        self.place = place
        self.part = nn.Identity()
        self.part.steps, self.steps, self.config, self.count = 0, 0, {"steps": 0}, torch.zeros(())

    def forward(self, x):
        if self.place == "number":
            self.steps += 1
        elif self.place == "number of a part":
            self.part.steps += 1
        elif self.place == "dictionary":
            self.config["steps"] += 1
        else:
            self.count += 1
        return self.activation(x * (self.steps + self.part.steps + self.config["steps"] + self.count))


@pytest.mark.parametrize("place", ["number", "number of a part", "dictionary", "tensor"])
def test_a_forward_that_counts_stays_as_it_is(place):
    """A generated one would have the count of its trace for good."""
    net = snnfast.to_spiking(nn.Sequential(WarmingUp(place, nn.ReLU())), T, neuron=snnfast.IFNode)
    x = torch.full((1, 1), 0.3)
    assert [net(x).sum().item() for _ in range(4)] == [1, 2, 2, 4]  # of currents 0.3, 0.6, 0.9, 1.2
    message = r"model calls relu, its activation of '0' \(WarmingUp\), .* \(it writes the attribute \w+\), .*nn.ReLU"
    with pytest.raises(ValueError, match=message):
        snnfast.to_spiking(nn.Sequential(WarmingUp(place, F.relu)), T)


class NormAndActivation(nn.BatchNorm2d):
    """Its forward calls torch's own, which looks at the number of dimensions and counts batches."""

    act = staticmethod(torch.relu)

    def forward(self, x):
        return self.act(super().forward(x))


@pytest.mark.parametrize("before", [(), (nn.ReLU(),)], ids=["static", "dynamic"])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}], ids=str)
def test_a_batch_norm_with_an_activation(before, options):
    ann = nn.Sequential(nn.Conv2d(2, 3, 3), *before, NormAndActivation(3, **options))
    apart = nn.Sequential(ann[0], *before, nn.BatchNorm2d(3, **options), nn.ReLU())
    net, expected = (snnfast.to_spiking(a, T, v_threshold=0.2) for a in (ann, apart))
    x = torch.randn(B, 2, 6, 6) * 3
    for training in (True, True, False):
        spikes = net.train(training)(x)
        assert torch.equal(spikes, expected.train(training)(x))
        assert spikes.std() > 0
    own, theirs = dict(net[-1].named_buffers()), dict(expected[-2].named_buffers())
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[name], theirs[name]) for name in own)


def test_a_batch_norm_with_an_activation_that_cannot_be_followed():
    message = r"model calls relu, its act of '0' \(NormAndActivation\), .* \(it writes the buffer num_batches_tracked\)"
    with pytest.raises(ValueError, match=message):
        snnfast.to_spiking(nn.Sequential(NormAndActivation(3, momentum=None)), T)


def test_a_forward_whose_random_numbers_would_be_drawn_once_is_refused():
    class Skipping(nn.Module):
        def forward(self, x):
            return x if self.training and torch.rand(()) < 0.5 else F.relu(x)

    state = torch.get_rng_state()
    for _ in range(3):
        with pytest.raises(ValueError, match=r"\(it draws random numbers that do not depend on its input\)"):
            snnfast.to_spiking(Skipping(), T)
    assert torch.equal(torch.get_rng_state(), state)


def test_repeat_keeps_layout_and_gradient():
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = repeat(x, 3)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, torch.cat([x, x, x]))
    y.sum().backward()
    assert (x.grad == 3).all()
    assert repeat(7, 3) == 7


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda net: torch.compile(net, backend="eager")])
def test_a_wrapped_network_is_asked_for_itself(wrap):
    with pytest.raises(
        TypeError, match=r"wrapped in a (DataParallel: give model.module|OptimizedModule: give model._orig)"
    ):
        snnfast.to_spiking(wrap(small()), T)
