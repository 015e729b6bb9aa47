"""NIR: graphs written and read again give the same spikes, and hold what the conventions say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nir_networks import DT, randomised, spikes
from torch import nn

import snnfast
from snnfast.convert import from_nir, to_nir
from snnfast.convert.nir_import import Elementwise

nir = pytest.importorskip("nir", reason="nir is not installed")


def multi_step(*layers):
    """Layers on ``[T, B, *]``: what is no neuron is called with time folded into the batch."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(layers)

        def forward(self, x):
            T, B = x.shape[:2]
            for layer in self.layers:
                if isinstance(layer, (snnfast.neuron.BaseNode)):
                    x = layer(x)
                else:
                    x = layer(x.flatten(0, 1)).unflatten(0, (T, B))
            return x

    return Net()


class Residual(nn.Module):
    """A SEW block: spikes are added around it."""

    def __init__(self, channels, neuron):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.sn1 = neuron()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, groups=2)
        self.sn2 = neuron()

    def forward(self, x):
        out = self.sn1(self.bn1(self.conv1(x)))
        out = self.sn2(self.conv2(out))
        return out + x


def folded_resnet(T):
    def neuron():
        return snnfast.LIFNode(tau=1.7, timesteps=T)

    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        neuron(),
        Residual(4, neuron),
        nn.AvgPool2d(2),
        nn.BatchNorm2d(4),  # nothing to fold into
        Residual(4, neuron),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 5),
        snnfast.IFNode(timesteps=T),
    )


# ---- round trips ----
neurons = st.one_of(
    st.fixed_dictionaries({"kind": st.just("IFNode")}),
    st.fixed_dictionaries(
        {"kind": st.just("LIFNode"), "tau": st.floats(1.01, 40.0), "decay_input": st.booleans()},
    ),
)


@settings(max_examples=60)
@given(
    configs=st.lists(
        st.tuples(
            neurons,
            st.floats(0.1, 2.0),
            st.one_of(st.just(0.0), st.floats(-0.5, 0.0625, width=32, allow_subnormal=False)),
        ),
        min_size=1,
        max_size=3,
    ),
    dt=st.floats(1e-5, 1.0),
    comparison=st.sampled_from((">=", ">")),
    if_r=st.sampled_from(("1/dt", "1")),
    bias=st.booleans(),
    T=st.integers(1, 9),
    seed=st.integers(0, 10**6),
)
def test_round_trip_gives_equal_spikes(configs, dt, comparison, if_r, bias, T, seed):
    torch.manual_seed(seed)
    layers = []
    for config, v_threshold, v_reset in configs:
        config = dict(config)
        kind = getattr(snnfast, config.pop("kind"))
        layers += [nn.Linear(6, 6, bias), kind(v_threshold=v_threshold, v_reset=v_reset, step_mode="m", **config)]
        nn.init.normal_(layers[-2].weight, std=1.0)
    net = nn.Sequential(*layers)
    x = torch.randn(T, 3, 6)
    graph = to_nir(net, x, dt, comparison=comparison, if_r=if_r)
    back = from_nir(graph)
    assert torch.equal(spikes(back, x), spikes(net, x))
    ours = [m for m in net if isinstance(m, snnfast.neuron.BaseNode)]
    theirs = [m for m in back.modules() if isinstance(m, snnfast.neuron.BaseNode)]
    for a, b in zip(ours, theirs, strict=True):
        assert type(a) is type(b)
        assert np.float32(a.v_threshold) == np.float32(b.v_threshold)
        if type(a) is snnfast.LIFNode:
            assert (a.tau, a.decay_input) == (b.tau, b.decay_input)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_residual_network_with_batch_norm(dtype, tmp_path):
    """In float64 the rounding of a folded batch norm does not reach a spike; written twice, the bits are the same."""
    T = 4
    net = randomised(folded_resnet(T)).to(dtype)
    x = torch.rand(T * 3, 2, 8, 8, dtype=dtype)
    graph = to_nir(net, x, DT)
    kinds = [type(node).__name__ for node in graph.nodes.values()]
    assert kinds.count("Conv2d") == 6  # five, and the batch norm that stands alone
    nir.write(tmp_path / "net.nir", graph)
    back = from_nir(tmp_path / "net.nir", dtype=dtype)
    expected = spikes(net, x).unflatten(0, (T, 3))
    got = spikes(back, x.unflatten(0, (T, 3)))
    assert 0.05 < expected.mean() < 0.95
    if dtype == torch.float64:
        assert torch.equal(got, expected)
    else:
        assert (got != expected).float().mean() < 0.02
    again = from_nir(to_nir(back, x.unflatten(0, (T, 3)), DT), dtype=dtype)
    assert list(again.nodes) == list(back.nodes)
    assert torch.equal(spikes(again, x.unflatten(0, (T, 3))), got)


def test_convolutions_of_all_kinds():
    """Oblong kernels, strides, dilation, groups, 'same' padding, sum pools and one dimension."""
    if_node = lambda: snnfast.IFNode(step_mode="m")  # noqa: E731
    net = multi_step(
        nn.Conv2d(4, 6, (3, 1), stride=(1, 2), padding=(2, 0), dilation=(2, 1), groups=2),
        if_node(),
        nn.Conv2d(6, 6, 3, padding="same", bias=False),
        nn.AvgPool2d(2, divisor_override=1),
        if_node(),
        nn.Flatten(2),
        nn.Conv1d(6, 3, 5, stride=2, padding=1),
        nn.BatchNorm1d(3),
        if_node(),
        nn.Flatten(),
        nn.Linear(3 * 3, 4, bias=False),
        nn.BatchNorm1d(4),
        if_node(),
    )
    net = randomised(net).double()
    x = torch.rand(5, 2, 4, 8, 8, dtype=torch.float64) * 2
    graph = to_nir(net, x, DT)
    kinds = [type(node).__name__ for node in graph.nodes.values() if not hasattr(node, "r")]
    assert kinds == ["Input", "Conv2d", "Conv2d", "SumPool2d", "Flatten", "Conv1d", "Flatten", "Affine", "Output"]
    back = from_nir(graph, dtype=torch.float64)
    expected = spikes(net, x)
    assert 0.05 < expected.mean() < 0.95
    assert torch.equal(spikes(back, x), expected)


def test_single_step_and_functional_forms_give_the_same_graph():
    class Functional(nn.Module):
        def __init__(self, mode):
            super().__init__()
            self.mode = mode
            self.conv = nn.Conv2d(1, 2, 3)
            self.sn = snnfast.IFNode(step_mode=mode)
            self.fc = nn.Linear(2 * 3 * 3, 2)

        def forward(self, x):
            if self.mode == "m":
                T = x.shape[0]
                x = self.sn(self.conv(x.flatten(0, 1)).unflatten(0, (T, -1)))
                return self.fc(torch.nn.functional.avg_pool2d(x.flatten(0, 1), 2).reshape(x.shape[0], x.shape[1], -1))
            return self.fc(torch.flatten(torch.nn.functional.avg_pool2d(self.sn(self.conv(x)), 2), 1))

    multi, single = Functional("m"), Functional("s")
    single.load_state_dict(multi.state_dict())
    x = torch.rand(4, 3, 1, 8, 8)
    graphs = [to_nir(multi, x, DT), to_nir(single, x[0], DT)]
    assert [type(n) for n in graphs[0].nodes.values()] == [type(n) for n in graphs[1].nodes.values()]
    assert torch.equal(spikes(from_nir(graphs[0]), x), spikes(from_nir(graphs[1]), x))
    assert torch.equal(spikes(from_nir(graphs[0]), x), spikes(multi, x))


class Overridden(nn.Sequential):
    """A Sequential with a forward of its own."""

    def forward(self, x):
        return self[0](self[1](x)) + x


def test_a_forward_of_its_own_is_not_taken_for_a_sequence():
    net = Overridden(snnfast.IFNode(step_mode="m"), nn.Linear(3, 3))
    x = torch.rand(4, 2, 3)
    assert torch.equal(spikes(from_nir(to_nir(net, x)), x), spikes(net, x))


class Flattening(nn.Identity):
    def forward(self, x):
        return x.flatten(1)


def test_nor_for_the_layer_that_it_derives_from():
    net = nn.Sequential(Flattening(), nn.Linear(2 * 9, 4), snnfast.IFNode(timesteps=3))
    assert [type(node).__name__ for node in to_nir(net, torch.rand(3, 2, 3, 3), DT).nodes.values()][1] == "Flatten"


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_weights_that_a_hook_computes_are_those_of_the_next_call():
    net = nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 4)), snnfast.IFNode(step_mode="m"))
    with torch.no_grad():
        net[0].weight_g.mul_(3)
    x = torch.rand(5, 2, 3)
    graph = to_nir(net, x, DT)
    net(x)
    assert np.array_equal(graph.nodes["0"].weight, net[0].weight.detach().numpy())


class Branching(nn.Module):
    """A convolution that feeds more than its batch norm, into which nothing may be folded."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.sn = nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2), snnfast.IFNode()

    def forward(self, x):
        y = self.conv(x)
        return self.sn(self.bn(y) + y)


def test_batch_norm_is_not_folded_into_a_layer_that_others_read():
    net = randomised(Branching()).double()
    x = torch.rand(4, 3, 2, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        expected = torch.stack([net(x_t) for x_t in x])
    assert torch.equal(spikes(from_nir(to_nir(net, x[0]), dtype=torch.float64), x), expected)


class Widening(nn.Module):
    """A shortcut without weights, whose new channels are zero."""

    def __init__(self):
        super().__init__()
        self.conv, self.sn = nn.Conv2d(2, 5, 3, padding=1), snnfast.IFNode()

    def forward(self, x):
        return self.sn(self.conv(x) + torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 3)))


class Pairs(nn.Module):
    def __init__(self, connect, T):
        super().__init__()
        self.conv, self.sn0 = nn.Conv2d(2, 2, 3, padding=1), snnfast.LIFNode(timesteps=T)
        self.pair = snnfast.fused.BatchNormNode(nn.BatchNorm2d(2), snnfast.LIFNode(timesteps=T), connect=connect)

    def forward(self, x):
        x = self.sn0(x)
        return self.pair(self.conv(x), *[x] * bool(self.pair.connect))


@pytest.mark.parametrize("connect", [None, "CHARGE", "ADD"])
def test_batch_norm_and_neuron_as_one_module(connect):
    T, B = 4, 3
    net = randomised(Pairs(connect, T)).double()
    x = torch.rand(T, B, 2, 5, 5, dtype=torch.float64) * 4
    expected = spikes(net, x.flatten(0, 1)).unflatten(0, (T, B))
    assert expected.std() > 0.05
    graph = to_nir(net, x.flatten(0, 1))
    assert [type(n).__name__ for n in graph.nodes.values()].count("Conv2d") == 1  # the norm is folded
    assert torch.equal(spikes(from_nir(graph, dtype=torch.float64), x), expected)


def test_what_batch_norm_and_neuron_as_one_module_must_be():
    net = Pairs("AND", 4)
    with pytest.raises(ValueError, match=r"pair multiplies spikes by a residual connection \(connect='AND'\)"):
        to_nir(net, torch.rand(4, 2, 5, 5))
    with pytest.raises(ValueError, match=r"model must call it with two tensors, as it has connect='AND'"):
        to_nir(net.pair, torch.rand(4, 2, 5, 5))


@pytest.mark.parametrize("first", [nn.Flatten(), nn.BatchNorm2d(2)], ids=repr)
def test_a_folded_sample_whose_first_layer_takes_any_shape(first):
    """A sample ``[T * B, C, H, W]`` is not taken for one of a ``[T, B, *]`` of two dimensions less."""
    T, B = 4, 3
    net = nn.Sequential(first, nn.Flatten(), nn.Linear(2 * 25, 5), snnfast.LIFNode(timesteps=T))
    net = randomised(net).double()
    x = torch.rand(T, B, 2, 5, 5, dtype=torch.float64) * 4
    expected = spikes(net, x.flatten(0, 1)).unflatten(0, (T, B))
    assert expected.std() > 0.05
    back = from_nir(to_nir(net, x.flatten(0, 1)), dtype=torch.float64)
    assert torch.equal(spikes(back, x), expected)


def test_dropout_with_one_mask_is_left_out():
    dropout, neuron = snnfast.layer.Dropout(0.5, "m"), snnfast.IFNode(step_mode="m")
    net = nn.Sequential(dropout, nn.Linear(4, 3), dropout, neuron)
    assert list(to_nir(net, torch.zeros(2, 1, 4)).nodes) == ["input", "1", "3", "output"]


class Doubled(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        y = self.inner(x)
        return y + y


def test_what_was_read_is_written_again():
    """Scales too, of a sum and of an IF neuron that is read with another time step."""
    first, last = snnfast.IFNode(step_mode="m"), snnfast.LIFNode(tau=4.0, v_threshold=0.3, step_mode="m")
    net = nn.Sequential(nn.Linear(4, 4), first, nn.Linear(4, 3), last)
    x = torch.rand(8, 2, 4, dtype=torch.float64) * 4
    once = from_nir(to_nir(Doubled(randomised(net).double()), x, DT), 2 * DT, dtype=torch.float64)
    expected = spikes(once, x)
    assert set(expected.unique().tolist()) == {0.0, 2.0}
    graph = to_nir(once, x, 2 * DT)
    assert sum(isinstance(node, nir.Scale) for node in graph.nodes.values()) == 3
    assert torch.equal(spikes(from_nir(graph, dtype=torch.float64), x), expected)
    with pytest.raises(ValueError, match="0 adds an offset, and NIR's Scale has none"):
        to_nir(nn.Sequential(Elementwise(torch.ones(()), torch.ones(()))), x)


def test_a_shortcut_padded_with_channels():
    net = randomised(Widening())
    x = torch.rand(4, 3, 2, 6, 6)
    with torch.no_grad():
        expected = torch.stack([net(x_t) for x_t in x])
    assert torch.equal(spikes(from_nir(to_nir(net, x[0])), x), expected)


def test_networks_made_spiking():
    """Direct coding: the layers before the first neuron run once; a graph sees the same input at every step."""
    converter = pytest.importorskip("snnfast.convert.to_spiking")
    ann = nn.Sequential(
        *(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(36, 20), nn.ReLU(), nn.Linear(20, 5)),
    )
    x = torch.rand(3, 2, 8, 8, dtype=torch.float64) * 2
    net = converter.to_spiking(randomised(ann).double(), 4, tau=1.5).eval()
    assert snnfast.analysis.count_synops(net, x).timesteps == 4
    expected = spikes(net, x)
    assert expected.std() > 0.05
    back = from_nir(to_nir(net, x), dtype=torch.float64)
    assert torch.allclose(spikes(back, x.expand(4, *x.shape)), expected, rtol=1e-9)
    temporal = converter.to_spiking(ann.double(), 4, tau=1.5, coding="temporal").eval()
    back = from_nir(to_nir(temporal, x.expand(4, *x.shape)), dtype=torch.float64)
    assert torch.allclose(spikes(back, x.expand(4, *x.shape)), expected, rtol=1e-9)
    with pytest.raises(ValueError, match="readout=None"):
        to_nir(converter.to_spiking(ann, 4, readout=lambda y: y.mean(0)), x)


def test_parametric_lif_is_written_with_its_time_constant():
    net = nn.Sequential(nn.Linear(4, 4), snnfast.ParametricLIFNode(init_tau=3.0, step_mode="m")).double()
    x = torch.rand(8, 2, 4, dtype=torch.float64) * 4
    graph = to_nir(net, x, 1e-3)
    np.testing.assert_allclose(graph.nodes["1"].tau, 3e-3, rtol=1e-6)
    assert torch.equal(spikes(from_nir(graph, dtype=torch.float64), x), spikes(net, x))


@pytest.mark.parametrize("decay_input", [True, False])
def test_leaky_integrator_readout(decay_input):
    readout = pytest.importorskip("snnfast.readout")
    net = nn.Sequential(nn.Linear(3, 2), readout.LI(tau=2.3, decay_input=decay_input, v_reset=0.1, step_mode="m"))
    x = torch.rand(6, 2, 3)
    graph = to_nir(net, x, DT)
    assert isinstance(graph.nodes["1"], nir.LI)
    assert torch.equal(spikes(from_nir(graph), x), spikes(net, x))


def test_export_leaves_the_model_alone():
    net = randomised(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), snnfast.LIFNode(), nn.Dropout()))
    net.train()
    net[1].eval()
    x = torch.rand(2, 3)
    net(x)
    v, state = net[2].v.clone(), {k: t.clone() for k, t in net.state_dict().items()}
    to_nir(net, x, DT)
    assert torch.equal(net[2].v, v)
    assert [m.training for m in net] == [True, False, True, True]
    assert all(torch.equal(t, state[k]) for k, t in net.state_dict().items())


# ---- conventions ----
def test_conventions_stand_in_the_graph(tmp_path):
    net = nn.Sequential(nn.Linear(2, 2), snnfast.IFNode(), nn.Linear(2, 2), snnfast.LIFNode(tau=3.0, decay_input=False))
    graph = to_nir(net, torch.zeros(1, 2), 1e-3, comparison=">", if_r="1")
    assert graph.metadata["dt"] == 1e-3
    assert (graph.metadata["comparison"], graph.metadata["if_r"]) == (">", "1")
    assert (graph.nodes["1"].r == 1.0).all()
    assert (graph.nodes["3"].r == 3.0).all()
    assert (np.float32(graph.nodes["3"].v_threshold) < 1).all()
    nir.write(tmp_path / "g.nir", graph)
    read = nir.read(tmp_path / "g.nir")
    assert (read.metadata["comparison"], float(read.metadata["dt"])) == (">", 1e-3)
    assert from_nir(tmp_path / "g.nir").nodes["3"].decay_input is False
    assert (to_nir(net, torch.zeros(1, 2), 1e-3).nodes["1"].r == 1e3).all()


def test_at_the_threshold_itself_the_comparison_decides():
    graph = nir.NIRGraph.from_list(nir.IF(*(np.full(1, v) for v in (1e4, 1.0, 0.0))))
    x = torch.full((3, 1, 1), 0.5)
    assert spikes(from_nir(graph, DT), x).flatten().tolist() == [0, 0, 1]  # NIR's text: v > v_threshold
    assert spikes(from_nir(graph, DT, comparison=">="), x).flatten().tolist() == [0, 1, 0]


def test_parameters_that_no_neuron_has_become_a_scale_of_the_input():
    """Against NIR's equations, stepped by Euler: each neuron with parameters of its own."""
    generator = np.random.default_rng(0)
    n, T, dt, tau = 7, 12, 1e-3, 4e-3
    r, v_leak = generator.uniform(0.5, 3, n), generator.uniform(-0.3, 0.3, n)
    v_threshold, v_reset = generator.uniform(0.4, 1.5, n), generator.uniform(-0.4, 0.2, n)
    x = generator.uniform(0, 2, (T, n))
    tau_steps = np.full(n, tau / dt)  # the resistance at which a LIF neuron adds its input whole
    gain = r
    for leaky, r in ((True, gain), (True, tau_steps), (False, gain)):
        v, expected = v_reset.copy(), []
        for x_t in x:
            v = v + (dt / tau * (v_leak - v + r * x_t) if leaky else dt * 500 * r * x_t)
            s = v > v_threshold
            v = np.where(s, v_reset, v)
            expected.append(s)
        if leaky:
            node = nir.LIF(np.full(n, tau), r, v_leak, v_threshold, v_reset)
        else:
            node = nir.IF(r * 500, v_threshold, v_reset)
        net = from_nir(nir.NIRGraph.from_list(node), dt, dtype=torch.float64)
        got = spikes(net, torch.from_numpy(x)[:, None])[:, 0].numpy().astype(bool)
        assert 0.05 < np.mean(expected) < 0.95
        np.testing.assert_array_equal(got, np.array(expected))


class Optional(nn.Module):
    """Another thing with a second argument, and for what is no tensor."""

    def __init__(self):
        super().__init__()
        self.right, self.wrong = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 1)

    def forward(self, x, state=None, scale=True):
        x = nn.functional.pad(x, (0, 0, 0, 0, 0, 1))
        return self.right(x) if state is None and scale and isinstance(x, torch.Tensor) else self.wrong(x)


def test_optional_arguments_have_their_defaults():
    net, x = Optional(), torch.rand(2, 2, 4, 4)
    assert torch.equal(from_nir(to_nir(net, torch.zeros_like(x)))(x[None])[0], net(x))


def test_the_trace_leaves_nothing_in_the_network():
    class Recording(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.lif, self.all = nn.Linear(3, 2), snnfast.LIFNode(step_mode="m"), []

        def forward(self, x):
            self.all.append(self.lif(self.fc(x)))
            return self.all[-1]

    net = Recording()
    snnfast.to_nir(net, torch.rand(4, 2, 3))
    assert net.all == []
    assert net.training
