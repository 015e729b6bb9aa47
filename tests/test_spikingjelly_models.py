"""SpikingJelly's models and scripts as they are, with snnfast's neurons, layers and functions in place of its own."""

from __future__ import annotations

import pathlib
import re
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import snnfast
from snnfast import functional, surrogate

sj = pytest.importorskip("spikingjelly.activation_based", reason="spikingjelly is not installed")
sj_functional = pytest.importorskip("spikingjelly.activation_based.functional")
sj_layer = pytest.importorskip("spikingjelly.activation_based.layer")
sj_neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
sj_surrogate = pytest.importorskip("spikingjelly.activation_based.surrogate")

NAMES = ("IFNode", "LIFNode", "ParametricLIFNode")
FUSED = ("Sigmoid", "ATan", "PiecewiseQuadratic", "PiecewiseExp", "SoftSign", "SuperSpike", "Erf", "Rect")


def build(zoo, model: str, neurons, **kwargs) -> nn.Module:
    torch.manual_seed(1)
    if model == "spiking_vgg11_bn":
        net = zoo.spiking_vgg.spiking_vgg11_bn(spiking_neuron=neurons, num_classes=10, init_weights=False, **kwargs)
        for index, shape in ((0, (512 * 7 * 7, 64)), (3, (64, 64)), (6, (64, 10))):
            old = net.classifier[index]  # 120 million weights that only take memory here
            net.classifier[index] = type(old)(*shape)
        return net
    if model == "sew_resnet18":
        return zoo.sew_resnet.sew_resnet18(spiking_neuron=neurons, cnf="ADD", num_classes=10, **kwargs)
    return zoo.spiking_resnet.spiking_resnet18(spiking_neuron=neurons, num_classes=10, **kwargs)


def run(net: nn.Module, f, x: torch.Tensor, target: torch.Tensor) -> tuple[list, dict, float]:
    """Two batches through ``net``: outputs, the first's weight gradients by name, and the last neuron's firing rate."""
    f.set_step_mode(net, "m")
    last = [m for m in net.modules() if hasattr(m, "surrogate_function")][-1]
    rates: list[float] = []
    hook = last.register_forward_hook(lambda module, args, out: rates.append(out.mean().item()))
    outputs = []
    for batch in range(2):
        torch.manual_seed(batch)
        y = net(x + 0.1 * batch)
        if batch == 0:
            nn.functional.cross_entropy(y.mean(0), target).backward()
        outputs.append(y.detach())
        f.reset_net(net)
    hook.remove()
    return outputs, {name: p.grad for name, p in net.named_parameters()}, sum(rates)


def assert_same(theirs, ours) -> None:
    assert theirs[2] > 0, "no spikes reached the end of the network: nothing was compared"
    for t, o in zip(theirs[0], ours[0], strict=True):
        assert torch.equal(t, o)
    assert theirs[1].keys() == ours[1].keys()
    # A convolution's bias before batch norm has a gradient of zero, of which only rounding is left.
    floor = 1e-4 * max(t.norm() for t in theirs[1].values())
    for name, t in theirs[1].items():
        difference = (t - ours[1][name]).norm() / t.norm().clamp(min=floor)
        assert difference < 1e-4, f"{name}: {difference:.1e}"


CASES = [
    ("sew_resnet18", "IFNode", {"v_threshold": 0.5}),
    ("spiking_resnet18", "LIFNode", {"tau": 1.5, "v_threshold": 0.25, "detach_reset": True}),
    ("spiking_vgg11_bn", "ParametricLIFNode", {"init_tau": 1.5, "v_threshold": 0.3, "v_reset": None}),
]


@pytest.mark.parametrize(("model", "name", "kwargs"), CASES, ids=[f"{m}-{n}" for m, n, _ in CASES])
def test_model_zoo(zoo, model, name, kwargs):
    x, target = torch.rand(2, 2, 3, 32, 32) * 2, torch.tensor([1, 7])
    kwargs = {"surrogate_function": sj_surrogate.ATan(), **kwargs}
    theirs_net = build(zoo, model, getattr(sj_neuron, name), **kwargs)
    weights = {k: v.clone() for k, v in theirs_net.state_dict().items()}
    theirs = run(theirs_net, sj_functional, x, target)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours_net = build(zoo, model, getattr(snnfast, name), **kwargs)
        ours_net.load_state_dict(weights)
        ours = run(ours_net, sj_functional, x, target)
    assert_same(theirs, ours)
    # Weights after their training continue under ours, and back.
    assert list(theirs_net.state_dict()) == list(ours_net.state_dict())
    ours_net.load_state_dict(theirs_net.state_dict())
    theirs_net.load_state_dict(ours_net.state_dict())
    for net in (theirs_net, ours_net):
        net.eval()
    with torch.no_grad():
        assert torch.equal(theirs_net(x), ours_net(x))


def test_model_zoo_on_our_layers_and_functions(zoo, monkeypatch):
    model = "spiking_resnet18"
    x, target = torch.rand(2, 2, 3, 32, 32) * 2, torch.tensor([1, 7])
    theirs = run(build(zoo, model, sj_neuron.IFNode, v_threshold=0.4), sj_functional, x, target)
    monkeypatch.setattr(zoo.spiking_resnet, "layer", snnfast.layer)
    net = build(zoo, model, snnfast.IFNode, v_threshold=0.4)
    assert any(isinstance(m, snnfast.layer.Conv2d) for m in net.modules())
    assert not any(type(m).__module__.startswith("spikingjelly.activation_based.layer") for m in net.modules())
    assert_same(theirs, run(net, functional, x, target))


def test_dvs_gesture_net_on_our_layers(zoo, monkeypatch):
    """Its network for event data, with dropout, linear layers and voting."""
    x, target = (torch.rand(3, 2, 2, 128, 128) < 0.2).float(), torch.tensor([1, 7])
    kwargs = {"channels": 8, "v_threshold": 0.3}

    def build_it(neurons):
        torch.manual_seed(3)
        return zoo.plif.DVSGestureNet(spiking_neuron=neurons, **kwargs)

    theirs = run(build_it(sj_neuron.LIFNode), sj_functional, x, target)
    monkeypatch.setattr(zoo.plif, "layer", snnfast.layer)
    assert_same(theirs, run(build_it(snnfast.LIFNode), functional, x, target))


SCRIPT = """
import torch
from torch import nn
from spikingjelly.activation_based import neuron, functional, surrogate, layer

class CSNN(nn.Module):
    def __init__(self, T, channels, use_cupy=False):
        super().__init__()
        self.T = T
        self.conv_fc = nn.Sequential(
            layer.Conv2d(1, channels, kernel_size=3, padding=1, bias=False),
            layer.BatchNorm2d(channels),
            neuron.IFNode(surrogate_function=surrogate.ATan()),
            layer.MaxPool2d(2, 2),
            layer.StepModeContainer(
                False, 's', nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
            ),
            neuron.LIFNode(tau=1.5, surrogate_function=surrogate.Sigmoid(alpha=3.0), detach_reset=True),
            layer.MaxPool2d(2, 2),
            layer.Flatten(),
            layer.Dropout(0.3),
            layer.Linear(channels * 7 * 7, channels * 4 * 4, bias=False),
            neuron.ParametricLIFNode(v_threshold=0.5, surrogate_function=surrogate.PiecewiseQuadratic()),
            layer.Linear(channels * 4 * 4, 10, bias=False),
            neuron.IFNode(v_threshold=0.3, surrogate_function=surrogate.ATan()),
        )
        functional.set_step_mode(self, step_mode='m')
        if use_cupy:
            functional.set_backend(self, backend='cupy')

    def forward(self, x):
        x_seq = x.unsqueeze(0).repeat(self.T, 1, 1, 1, 1)
        return self.conv_fc(x_seq).mean(0)

torch.manual_seed(0)
net = CSNN(4, 6, use_cupy)
optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
losses = []
for step in range(3):
    optimizer.zero_grad()
    img, label = torch.rand(5, 1, 28, 28) * 2, torch.randint(0, 10, (5,))
    fr = net(img)
    loss = nn.functional.mse_loss(fr, functional.redundant_one_hot(label, 10, 1))
    loss.backward()
    optimizer.step()
    functional.reset_net(net)
    losses.append(loss.item())
functional.set_step_mode(net, 's')
net.eval()
with torch.no_grad():
    single = sum(net.conv_fc(img) for t in range(4)) / 4
"""


@pytest.mark.parametrize("old_backend", [False, True])
def test_a_script_with_one_changed_import(old_backend):
    theirs: dict = {"use_cupy": False}  # 2.0.0 has no set_backend any more, older code calls it
    exec(SCRIPT, theirs)
    ours: dict = {"use_cupy": old_backend}
    changed = SCRIPT.replace("from spikingjelly.activation_based import", "from snnfast import")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "backend='cupy' is a name of older code")
        exec(changed, ours)
    assert ours["fr"].detach().sum() > 0
    assert ours["losses"][0] == theirs["losses"][0]
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-4)
    assert torch.allclose(ours["single"], theirs["single"])
    # A plain sequential's weights, both ways.
    theirs["net"].load_state_dict(ours["net"].state_dict())
    ours["net"].load_state_dict(theirs["net"].state_dict())


def test_the_migration_guides_example():
    guide = (pathlib.Path(__file__).parent.parent / "docs" / "migration.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    changed = "from snnfast import functional, layer, neuron, surrogate"
    assert changed in example
    results = []
    for code in (example, example.replace(changed, changed.replace("snnfast", "spikingjelly.activation_based"))):
        torch.manual_seed(2)
        scope: dict = {}
        exec(code, scope)
        results.append((scope["y"], [p.grad for p in scope["net"].parameters()]))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-7) for a, b in zip(results[0][1], results[1][1], strict=True))


@settings(max_examples=80)
@given(
    kind=st.sampled_from(FUSED),
    alpha=st.one_of(st.floats(0.5, 5.0), st.integers(1, 4)),
    name=st.sampled_from(NAMES),
    seed=st.integers(0, 10**6),
)
def test_their_surrogates_run_fused(kind, alpha, name, seed):
    torch.manual_seed(seed)
    x = torch.randn(4, 3, 5)
    given_ = getattr(sj_surrogate, kind)(alpha)
    recognised = surrogate.recognise(given_)
    assert type(recognised) is getattr(surrogate, kind)
    assert recognised.alpha == alpha
    results = []
    for node in (
        getattr(sj_neuron, name)(surrogate_function=given_, step_mode="m"),
        # An explicit backend refuses what it has no kernel for.
        getattr(snnfast, name)(surrogate_function=given_, step_mode="m", backend="auto"),
        getattr(snnfast, name)(surrogate_function=getattr(surrogate, kind)(alpha), step_mode="m"),
    ):
        x_given = x.clone().requires_grad_()
        s = node(x_given)
        results.append((s, *torch.autograd.grad(s.sum() + node.v.sum(), x_given)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.allclose(results[0][1], results[1][1], rtol=2e-5, atol=1e-6)
    assert torch.equal(results[1][1], results[2][1])  # the very same kernel


def test_their_surrogate_follows_its_object():
    shared = sj_surrogate.ATan()
    node = snnfast.IFNode(surrogate_function=shared, step_mode="m")
    assert node.surrogate_function is shared
    x = torch.randn(3, 4, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (g,) = torch.autograd.grad(node(x).sum(), x)
        shared.alpha = 4.0
        node.reset()
        (sharper,) = torch.autograd.grad(node(x).sum(), x)
    assert not torch.equal(g, sharper)
    shared.set_spiking_mode(False)
    assert surrogate.recognise(shared) is shared
    node.reset()
    with pytest.warns(UserWarning, match=r"ATan\(spiking=False\) is not one of snnfast's fused ones"):
        y = node(x)
    assert ((y > 0) & (y < 1)).all()


def test_their_other_surrogates_take_the_reference_path_and_say_so_once(monkeypatch):
    from snnfast import _notices

    monkeypatch.setattr(_notices, "_said", set())

    class Mine(sj_surrogate.ATan):
        """A subclass may differ: it is not the fused one."""

        @staticmethod
        def spiking_function(x, alpha):
            return sj_surrogate.sigmoid.apply(x, alpha)

    for other in (sj_surrogate.LeakyKReLU(), sj_surrogate.QPseudoSpike(), sj_surrogate.S2NN(), Mine()):
        assert surrogate.recognise(other) is other
        x = torch.randn(4, 6)
        results = []
        for library in (sj_neuron, snnfast):
            node = library.LIFNode(surrogate_function=other, step_mode="m")
            x_given = x.clone().requires_grad_()
            if library is snnfast:
                with pytest.warns(UserWarning, match=f"surrogate {type(other).__name__} is not one of snnfast's fused"):
                    s = node(x_given)
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    node(x)
                    node.reset()
            else:
                s = node(x_given)
            results.append((s, *torch.autograd.grad(s.sum(), x_given)))
        assert torch.equal(results[0][0], results[1][0])
        assert torch.allclose(results[0][1], results[1][1], rtol=1e-5, atol=1e-7)


def test_their_surrogate_under_compile():
    node = snnfast.LIFNode(surrogate_function=sj_surrogate.Erf(1.5), step_mode="m")
    x = torch.randn(4, 6, requires_grad=True)
    s = node(x)
    (want,) = torch.autograd.grad(s.sum(), x)
    node.reset()
    compiled = torch.compile(node, fullgraph=True, backend="eager")(x)
    assert torch.equal(compiled, s)
    assert torch.equal(torch.autograd.grad(compiled.sum(), x)[0], want)


@pytest.mark.parametrize("kind", FUSED)
def test_functional_forms_are_theirs(kind):
    lower = {
        "ATan": "atan",
        "PiecewiseQuadratic": "piecewise_quadratic",
        "PiecewiseExp": "piecewise_exp",
        "SoftSign": "soft_sign",
        "SuperSpike": "super_spike",
    }.get(kind, kind.lower())
    u = torch.linspace(-2, 2, 101, dtype=torch.float64)
    grads = []
    for library in (sj_surrogate, surrogate):
        u_given = u.clone().requires_grad_()
        s = getattr(library, lower).apply(u_given, 1.7)
        cls = getattr(library, kind)
        grads.append(
            [
                s.detach(),
                cls.spiking_function(u, 1.7),
                *torch.autograd.grad(s.sum(), u_given),
                cls.backward(torch.full_like(u, 2.0), u, 1.7),
                library.heaviside(u),
            ]
        )
        if kind != "SuperSpike":
            grads[-1] += [cls.primitive_function(u, 1.7), cls(1.7, spiking=False)(u)]
        node = cls(alpha=1.7, spiking=True)
        node.set_spiking_mode(False)
        assert not node.spiking
    for t, o in zip(*grads, strict=True):
        assert torch.allclose(t, o, rtol=1e-12, atol=1e-15)
