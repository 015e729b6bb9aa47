"""Weights from and to networks of other libraries: the spikes of both are compared, in each direction."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import snnfast
from snnfast.convert import give_peer_weights, load_peer_weights, peer_state_dict

warnings.filterwarnings("ignore", category=SyntaxWarning)
pytestmark = pytest.mark.usefixtures("one_thread")

PEERS = ("spikingjelly", "snntorch", "norse", "sinabs")


def layers(neurons):
    """Input [B, 6] -> spikes [B, 5], two layers of the neurons given."""
    net = nn.Sequential(nn.Linear(6, 16), neurons[0], nn.Linear(16, 5, bias=False), neurons[1])
    with torch.no_grad():
        net[0].weight.mul_(6.0)
        net[2].weight.mul_(12.0)
    return net


def own_neuron(kind, leak, hard, decay_input, threshold, rest=0.0):
    keywords = {"v_threshold": threshold, "v_reset": rest if hard else None, "step_mode": "m"}
    if kind == "IF":
        return snnfast.IFNode(**keywords)
    if kind == "ParametricLIF":
        return snnfast.ParametricLIFNode(1 / leak, decay_input, **keywords)
    return snnfast.LIFNode(1 / leak, decay_input, **keywords)


class Theirs:
    """How each library's neuron is made for IF (leak None) or LIF, and how its network is run on [T, B, 6]."""

    @staticmethod
    def spikingjelly(leak, hard, threshold, decay_input=True):
        sj = pytest.importorskip("spikingjelly.activation_based.neuron", reason="spikingjelly is not installed")
        keywords = {"v_threshold": threshold, "v_reset": 0.0 if hard else None, "step_mode": "m"}
        if leak is None:
            return sj.IFNode(**keywords)
        return sj.LIFNode(tau=1 / leak, decay_input=decay_input, **keywords)

    @staticmethod
    def snntorch(leak, hard, threshold, reset_delay=True):
        snntorch = pytest.importorskip("snntorch", reason="snntorch is not installed")
        return snntorch.Leaky(
            beta=1.0 if leak is None else 1 - leak,
            threshold=threshold,
            init_hidden=True,
            reset_mechanism="zero" if hard else "subtract",
            reset_delay=reset_delay or not hard,
        )

    @staticmethod
    def norse(leak, hard, threshold):
        norse = pytest.importorskip("norse.torch", reason="norse is not installed")
        from norse.torch.functional import reset
        from norse.torch.functional.iaf import IAFParameters
        from norse.torch.functional.lif_box import LIFBoxParameters

        if leak is None:
            return norse.IAFCell(IAFParameters(v_th=torch.tensor(threshold)))
        return norse.LIFBoxCell(
            LIFBoxParameters(
                tau_mem_inv=torch.tensor(leak * 1000),
                v_th=torch.tensor(threshold),
                reset_method=reset.reset_value if hard else reset.reset_subtract,
            )
        )

    @staticmethod
    def sinabs(leak, hard, threshold, norm_input=True, train_alphas=False):
        sl = pytest.importorskip("sinabs.layers", reason="sinabs is not installed")
        from sinabs import activation

        keywords = {
            "spike_fn": activation.SingleSpike,
            "reset_fn": activation.MembraneReset() if hard else activation.MembraneSubtract(),
            "spike_threshold": torch.tensor(threshold),
        }
        if leak is None:
            return sl.IAF(**keywords)
        tau = -1 / torch.log1p(torch.tensor(-leak, dtype=torch.float64)).item()
        return sl.LIF(tau_mem=tau, norm_input=norm_input, train_alphas=train_alphas, **keywords)


@torch.no_grad()
def spikes_of(net, x_seq):
    """[T, B, 6] -> spikes [T, B, 5] of either library's network."""
    for m in net.modules():
        for name in ("reset", "reset_mem", "reset_states"):
            if type(getattr(m, name, None)).__name__ == "method":
                getattr(m, name)()
    modules, found = list(net), x_seq
    library = type(net[1]).__module__.partition(".")[0]
    for m in modules:
        if library == "sinabs":
            found = m(found.transpose(0, 1)).transpose(0, 1)
        elif library == "snntorch" and not isinstance(m, nn.Linear):
            found = torch.stack([m(x) for x in found])
        elif library == "norse" and not isinstance(m, nn.Linear):
            state, outs = None, []
            for x in found:
                z, state = m(x, state)
                outs.append(z)
            found = torch.stack(outs)
        else:
            found = m(found)
    return found


CONFIGURATION = {
    "kind": st.sampled_from(("IF", "LIF", "ParametricLIF")),
    "leak": st.floats(0.05, 0.9),
    "hard": st.booleans(),
    "decay_input": st.booleans(),
    "threshold": st.floats(0.3, 2.0),
}


def expressible(peer, kind, hard):
    return not ((peer == "norse" and kind == "IF" and not hard) or (peer == "snntorch" and kind != "IF" and not hard))


@pytest.mark.parametrize("peer", PEERS)
@settings(max_examples=40)
@given(**CONFIGURATION, option=st.booleans(), rest=st.sampled_from((0.0, 0.0, -0.25, 0.125)), seed=st.integers(0, 999))
def test_spikes_after_giving_weights(peer, kind, leak, hard, decay_input, threshold, option, rest, seed):
    if not expressible(peer, kind, hard):
        return
    torch.manual_seed(seed)
    ours = layers([own_neuron(kind, leak, hard, decay_input, threshold, rest) for _ in range(2)])
    more = {"snntorch": {"reset_delay": option}, "sinabs": {"norm_input": option, "train_alphas": not option}}
    more["spikingjelly"] = {"decay_input": option}
    other = 0.4 if kind != "IF" else None
    theirs = layers([getattr(Theirs, peer)(other, hard, 0.7, **more.get(peer, {})) for _ in range(2)])
    give_peer_weights(ours, theirs)
    x = torch.randn(12, 8, 6)
    want, got = spikes_of(ours, x), spikes_of(theirs, x)
    assert torch.equal(got, want)
    if peer in ("snntorch", "sinabs"):  # the same without the network
        options = {"norm_input": option, "train_alphas": not option} if peer == "sinabs" and kind != "IF" else {}
        again = layers([getattr(Theirs, peer)(other, hard, 0.7, **more[peer]) for _ in range(2)])
        again.load_state_dict(peer_state_dict(ours, peer, **options))
        assert torch.equal(spikes_of(again, x), want)


@pytest.mark.parametrize("peer", PEERS)
@settings(max_examples=40)
@given(**CONFIGURATION, option=st.booleans(), rest=st.sampled_from((0.0, 0.0, -0.25, 0.125)), seed=st.integers(0, 999))
def test_spikes_after_loading_weights(peer, kind, leak, hard, decay_input, threshold, option, rest, seed):
    if not expressible(peer, kind, hard):
        return
    torch.manual_seed(seed)
    more = {"snntorch": {"reset_delay": option}, "sinabs": {"norm_input": option, "train_alphas": not option}}
    more["spikingjelly"] = {"decay_input": option}
    theirs = layers(
        [getattr(Theirs, peer)(None if kind == "IF" else leak, hard, threshold, **more.get(peer, {})) for _ in range(2)]
    )
    ours = layers([own_neuron(kind, 0.4, hard, decay_input, 0.7, rest) for _ in range(2)])
    x = torch.randn(12, 8, 6)
    want = spikes_of(theirs, x)
    load_peer_weights(ours, theirs)
    assert torch.equal(spikes_of(ours, x), want)
    if peer in ("snntorch", "sinabs"):
        options = {}
        if peer == "sinabs":
            options = {"spike_fn": "SingleSpike", "reset_fn": "MembraneReset" if hard else "MembraneSubtract"}
            options["norm_input"] = option and kind != "IF"
        again = layers([own_neuron(kind, 0.4, hard, decay_input, 0.7, rest) for _ in range(2)])
        load_peer_weights(again, theirs.state_dict(), **options)  # after a run: sinabs' has its potentials in it
        assert torch.equal(spikes_of(again, x), want)


def test_these_networks_spike():
    torch.manual_seed(0)
    net = layers([own_neuron("LIF", 0.5, True, True, 1.0) for _ in range(2)])
    assert 0.05 < spikes_of(net, torch.randn(12, 8, 6)).mean() < 0.95


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("leak", [None, 0.5], ids=["IF", "LIF"])
@pytest.mark.parametrize("way", ["give", "load"])
def test_potentials_at_the_threshold(peer, leak, way):
    """Where one library needs more than the threshold and the other does not, on input that often meets it."""
    theirs = nn.Sequential(nn.Linear(6, 6), getattr(Theirs, peer)(leak, True, 1.0))
    ours = nn.Sequential(nn.Linear(6, 6), own_neuron("LIF" if leak else "IF", leak, True, peer != "snntorch", 1.0))
    for net in (ours, theirs):
        with torch.no_grad():
            net[0].weight.copy_(torch.eye(6))
            net[0].bias.zero_()
    x = torch.randint(0, 9, (40, 4, 6)) / 4
    assert torch.equal(spikes_of(ours, x), spikes_of(theirs, x)) == (peer in ("spikingjelly", "sinabs"))
    if way == "give":
        give_peer_weights(ours, theirs)
    else:
        load_peer_weights(ours, theirs)
    assert torch.equal(spikes_of(ours, x), spikes_of(theirs, x))


def test_keys_of_spikingjelly_and_norse_are_ours():
    theirs, ours = layers([Theirs.norse(0.5, True, 1.0)] * 2), layers([snnfast.LIFNode()] * 2)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    sj = pytest.importorskip("spikingjelly.activation_based.neuron")
    theirs, ours = layers([sj.ParametricLIFNode(3.0)] * 2), layers([snnfast.ParametricLIFNode()] * 2)
    load_peer_weights(ours, theirs.state_dict(), "spikingjelly")
    assert ours[3].w == theirs[3].w
    assert list(peer_state_dict(ours, "spikingjelly")) == list(theirs.state_dict())


def test_round_trip_gives_the_numbers_back():
    for peer in PEERS:
        ours = layers([own_neuron("LIF", 1 / 3, True, True, 1.0) for _ in range(2)])
        theirs = layers([getattr(Theirs, peer)(0.4, True, 0.7) for _ in range(2)])
        give_peer_weights(ours, theirs)
        again = layers([own_neuron("LIF", 0.25, True, True, 2.0) for _ in range(2)])
        load_peer_weights(again, theirs)
        assert again[1].tau == pytest.approx(3.0, rel=1e-6)
        assert again[1].v_threshold == pytest.approx(1.0, rel=3e-7)
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), ours.parameters(), strict=True))


def test_accelerated_learnt_and_nested_neurons():
    snntorch = pytest.importorskip("snntorch", reason="snntorch is not installed")

    class Block(nn.Module):
        def __init__(self, neuron):
            super().__init__()
            self.conv, self.bn, self.lif = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), neuron

        def forward(self, x):
            return self.lif(self.bn(self.conv(x)))

    leaky = snntorch.Leaky(
        beta=torch.full((3, 1, 1), 0.8), threshold=0.5, learn_beta=True, learn_threshold=True, reset_mechanism="zero"
    )
    theirs, ours = Block(leaky), Block(snnfast.ParametricLIFNode(decay_input=False))
    theirs.bn.running_mean.normal_()
    snnfast.accelerate(theirs)
    load_peer_weights(ours, theirs)
    assert torch.equal(ours.bn.running_mean, theirs.bn.running_mean)
    assert 1 / ours.lif.w.sigmoid().item() == pytest.approx(5.0)
    with torch.no_grad():
        ours.lif.w.fill_(0.0)
    give_peer_weights(ours, theirs)
    assert type(theirs.lif.beta) is nn.Parameter
    assert torch.equal(theirs.lif.beta, torch.full((3, 1, 1), 0.5))
    x = torch.randn(9, 2, 2, 8, 8) * 3
    theirs.eval(), ours.eval()
    mem, spikes = torch.zeros(2, 3, 6, 6), []
    for step in x:
        spk, mem = theirs.lif(theirs.bn(theirs.conv(step)), mem)
        spikes.append(spk)
    assert torch.equal(torch.stack([ours(step) for step in x]), torch.stack(spikes))


def leaky(**keywords):
    snntorch = pytest.importorskip("snntorch", reason="snntorch is not installed")
    return snntorch.Leaky(**{"beta": 0.5, "reset_mechanism": "zero", **keywords})


def synaptic():
    return pytest.importorskip("snntorch").Synaptic(alpha=0.5, beta=0.5, reset_mechanism="zero")


def sinabs_lif(**keywords):
    sl = pytest.importorskip("sinabs.layers", reason="sinabs is not installed")
    from sinabs import activation

    return sl.LIF(**{"tau_mem": 5.0, "spike_fn": activation.SingleSpike, **keywords})


def norse_cell(name, **keywords):
    norse = pytest.importorskip("norse.torch", reason="norse is not installed")
    from norse.torch.functional.lif_box import LIFBoxParameters

    return getattr(norse, name)(*([LIFBoxParameters(**keywords)] if keywords else []))


def membrane_subtract():
    from sinabs import activation

    return activation.MembraneSubtract(0.5)


def multi_spike():
    from sinabs import activation

    return activation.MultiSpike


def overriding():
    class Mine(type(leaky())):
        def fire(self, mem):
            return super().fire(mem) * 2

    return Mine(beta=0.5, reset_mechanism="zero")


def test_a_subclass_of_ours_whose_forward_is_its_own_is_refused():
    class Doubles(snnfast.LIFNode):
        def forward(self, x):
            return super().forward(2 * x)

    us, them = (nn.Sequential(nn.Linear(2, 2), n) for n in (Doubles(decay_input=False), leaky()))
    for carry in (load_peer_weights, give_peer_weights):
        with pytest.raises(ValueError, match=r"1 \(Doubles\) cannot be carried over: Doubles overrides forward"):
            carry(us, them)


@pytest.mark.parametrize(
    ("theirs", "ours", "message"),
    [
        (lambda: leaky(reset_mechanism="subtract"), {"v_reset": None}, "reset_mechanism='zero' there and v_reset=0.0"),
        (lambda: leaky(reset_mechanism="none"), {}, "does not reset"),
        (lambda: leaky(beta=torch.tensor([0.5, 0.6])), {}, "beta differs from neuron to neuron"),
        (lambda: leaky(beta=0.0), {}, "keeps 0 of its potential"),
        (lambda: leaky(beta=1.0), {}, "make it an IFNode"),
        (lambda: leaky(graded_spikes_factor=0.5), {}, "graded_spikes_factor"),
        (lambda: leaky(threshold=-0.5), {}, "resets before its first spike"),
        (lambda: leaky(state_quant=torch.round), {}, "state_quant"),
        (lambda: leaky(), {"v_reset": None}, "make it with v_reset=0.0"),
        (overriding, {}, "overrides fire of Leaky"),
        (synaptic, {}, "alpha"),
        (lambda: sinabs_lif(spike_fn=multi_spike()), {"v_reset": None}, "spike_fn=sinabs.activation.SingleSpike"),
        (lambda: sinabs_lif(reset_fn=membrane_subtract()), {"v_reset": None}, "MembraneSubtract"),
        (lambda: sinabs_lif(tau_syn=3.0), {"v_reset": None}, "tau_syn"),
        (lambda: sinabs_lif(min_v_mem=-1.0), {"v_reset": None}, "min_v_mem"),
        (lambda: sinabs_lif(), {}, "make it with v_reset=None"),
        (lambda: norse_cell("LIFCell"), {}, "LIFBoxCell has none"),
        (lambda: norse_cell("LIFBoxCell", v_leak=torch.tensor(0.5)), {}, "resets to 0 and leaks to 0.5"),
        (lambda: norse_cell("IAFCell"), {}, "make it an IFNode"),
        (lambda: norse_cell("LIFAdExCell"), {}, "no neuron of snnfast"),
    ],
)
def test_refusals_name_the_neuron_and_change_nothing(theirs, ours, message):
    them = nn.Sequential(nn.Linear(2, 2), theirs())
    us = nn.Sequential(nn.Linear(2, 2), snnfast.LIFNode(**ours))
    before = copy.deepcopy(us.state_dict())
    with pytest.raises(ValueError, match=r"1 \(\w+\) cannot be carried over: .*" + message):
        load_peer_weights(us, them)
    assert all(torch.equal(v, before[k]) for k, v in us.state_dict().items())
    assert (us[1].tau, us[1].v_threshold) == (2.0, 1.0)


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        (lambda: snnfast.LIFNode(v_reset=None), leaky, "v_reset=0.0 here"),
        (lambda: snnfast.LIFNode(v_threshold=-1.0), leaky, "resets before its first spike"),
        (lambda: snnfast.LIFNode(), sinabs_lif, "reset_fn=sinabs.activation.MembraneReset"),
        (lambda: snnfast.LIFNode(v_reset=None), lambda: norse_cell("LIFBoxCell"), "reset_method=reset_subtract"),
        (lambda: snnfast.IFNode(), lambda: norse_cell("LIFBoxCell"), "make it an IAFCell"),
        (lambda: snnfast.neuron.LI(), leaky, "LI is none of"),
    ],
)
def test_refusals_of_own_neurons(ours, theirs, message):
    us, them = nn.Sequential(nn.Linear(2, 2), ours()), nn.Sequential(nn.Linear(2, 2), theirs())
    before = copy.deepcopy(them.state_dict())
    with pytest.raises(ValueError, match=r"1 \(\w+\) cannot be carried over: .*" + message):
        give_peer_weights(us, them)
    assert all(torch.equal(v, before[k]) for k, v in them.state_dict().items())


def test_networks_that_do_not_correspond():
    ours, theirs = nn.Sequential(nn.Linear(2, 2), snnfast.LIFNode()), nn.Sequential(nn.Linear(2, 2), leaky())
    with pytest.raises(ValueError, match="the snntorch network has none at 1"):
        load_peer_weights(ours, nn.Sequential(leaky()))
    with pytest.raises(ValueError, match="peer is 'sinabs', but the neurons of source are snntorch's"):
        load_peer_weights(ours, theirs, peer="sinabs")
    with pytest.raises(ValueError, match="the snnfast network has none at 2"):
        load_peer_weights(ours, nn.Sequential(*theirs, leaky()))
    with pytest.raises(ValueError, match=r"0.weight must have shape \(2, 2\) for model, got \(2, 3\)"):
        load_peer_weights(ours, nn.Sequential(nn.Linear(3, 2), leaky()))
    with pytest.raises(ValueError, match=r"target needs \['0.bias'\] and has no lack"):
        give_peer_weights(nn.Sequential(nn.Linear(2, 2, bias=False), snnfast.LIFNode()), theirs)
    with pytest.raises(ValueError, match="got neurons of none of them"):
        load_peer_weights(ours, nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="got neurons of snntorch and norse"):
        load_peer_weights(ours, nn.Sequential(leaky(), norse_cell("LIFBoxCell")))
    with pytest.raises(ValueError, match="does not tell whose it is"):
        load_peer_weights(ours, nn.Linear(2, 2).state_dict())
    with pytest.raises(ValueError, match="outside of the state_dict"):
        load_peer_weights(ours, ours.state_dict(), "norse")
    with pytest.raises(ValueError, match="peer must be one of"):
        peer_state_dict(ours, "brian")
    with pytest.raises(TypeError, match="beta is no option for snntorch, which has reset_delay"):
        load_peer_weights(ours, theirs.state_dict(), beta=0.5)
    with pytest.raises(TypeError, match="only for a state_dict"):
        load_peer_weights(ours, theirs, reset_delay=False)
    for wrong in (lambda: load_peer_weights(3, theirs), lambda: load_peer_weights(ours, 3)):
        with pytest.raises(TypeError, match="must be a"):
            wrong()
    with pytest.raises(TypeError, match=r"target must be .* got str"):
        give_peer_weights(ours, "snntorch")


def test_a_shared_neuron_cannot_take_two_neurons_numbers():
    def shared(neuron):
        return nn.Sequential(nn.Linear(2, 2), neuron, nn.Linear(2, 2), neuron)

    theirs = nn.Sequential(nn.Linear(2, 2), leaky(beta=0.5), nn.Linear(2, 2), leaky(beta=0.75))
    for neuron in (snnfast.LIFNode(decay_input=False), snnfast.ParametricLIFNode(decay_input=False)):
        with pytest.raises(ValueError, match="1 and 3 are one neuron in model"):
            load_peer_weights(shared(neuron), theirs)
    lif = snnfast.LIFNode(decay_input=False)
    load_peer_weights(shared(lif), shared(leaky(beta=0.75)))
    assert lif.tau == 4.0
    with pytest.raises(ValueError, match="1 and 3 are one neuron in target"):
        give_peer_weights(
            nn.Sequential(nn.Linear(2, 2), snnfast.LIFNode(2.0), nn.Linear(2, 2), lif), shared(leaky(beta=0.25))
        )


def test_a_state_dict_of_spikingjelly_that_does_not_fit_changes_nothing():
    model = nn.Sequential(nn.Linear(2, 2), snnfast.ParametricLIFNode(), nn.Linear(2, 4))
    before = copy.deepcopy(model.state_dict())
    other = nn.Sequential(nn.Linear(2, 2), snnfast.ParametricLIFNode(3.0), nn.Linear(2, 3))
    with pytest.raises(ValueError, match=r"2\.weight must have shape"):
        load_peer_weights(model, other.state_dict(), "spikingjelly")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_what_a_bare_state_dict_does_not_tell_is_the_librarys_default():
    soft = nn.Sequential(snnfast.IFNode(v_reset=None))
    theirs = nn.Sequential(leaky(beta=1.0, reset_mechanism="subtract"))
    load_peer_weights(soft, theirs.state_dict())
    with pytest.raises(ValueError, match="use reset_delay=True"):
        load_peer_weights(soft, theirs.state_dict(), reset_delay=False)
    with pytest.raises(ValueError, match="say spike_fn='SingleSpike'"):
        load_peer_weights(nn.Sequential(snnfast.LIFNode(v_reset=None)), nn.Sequential(sinabs_lif()).state_dict())
