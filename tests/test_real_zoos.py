"""to_spiking, fuse, analysis and distillation on the networks that torchvision and timm define themselves.

The main environment has neither; ``make oldest`` installs both. What was found here is tested with small classes of the
same kind, which need no package, in test_to_spiking_zoo.py, test_fuse.py, test_inference.py, test_neuron.py and
test_train_*.py.
"""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch
from test_to_spiking import trained_norms
from test_to_spiking_zoo import by_calls
from torch import nn

import snnfast
from snnfast import functional
from snnfast.distill import Distiller, FeatureKD, LogitKD

WHY = "needs {}, which torch's pinned CPU build has no package for (make oldest runs this)"
torchvision = pytest.importorskip("torchvision.models", reason=WHY.format("torchvision"), exc_type=ImportError)
timm = pytest.importorskip("timm", reason=WHY.format("timm"), exc_type=ImportError)
pytestmark = pytest.mark.usefixtures("one_thread")

T = 4  # as by_calls steps
SPIKING = [
    *("tv:resnet18", "tv:resnet50", "tv:vgg11_bn", "tv:alexnet", "tv:densenet121"),
    *("tv:googlenet", "tv:squeezenet1_1", "tv:shufflenet_v2_x0_5", "tv:mnasnet0_5", "tv:regnet_x_400mf"),
    *("timm:resnet18", "timm:resnet26d", "timm:resnetblur18", "timm:wide_resnet50_2", "timm:densenet121"),
    *("timm:regnetx_002", "timm:dla34", "timm:hrnet_w18_small", "timm:vovnet39a", "timm:selecsls42"),
    *("timm:resnetv2_50", "timm:repvgg_a0", "timm:res2net50_26w_4s"),
]
LARGER = ["tv:alexnet", "tv:googlenet", "tv:squeezenet1_1"]  # these pool a 32 x 32 image away
GATED = ["tv:regnet_y_400mf", "timm:seresnet18", "timm:legacy_seresnet18", "timm:regnety_002", "timm:skresnet18"]


def network(name: str, **options) -> nn.Module:
    library, _, rest = name.partition(":")
    torch.manual_seed(0)
    make = partial(torchvision.get_model, weights=None) if library == "tv" else timm.create_model
    return make(rest, num_classes=10, **options)


def made(name: str, **options) -> nn.Module:
    """In float64, as after training, and with spikes in every layer; without dropout, whose draws differ in order."""
    ann = trained_norms(network(name, **options).double()).eval()
    with torch.no_grad():
        for m in ann.modules():
            if isinstance(m, nn.Conv2d):
                m.weight.mul_(3.0)
            if isinstance(m, (nn.Conv2d, nn.Linear)) and m.bias is not None:
                m.bias.uniform_(0.5, 1.5)
            if isinstance(m, nn.Dropout):
                m.p = 0.0
    return ann


def tensors(output) -> list[torch.Tensor]:
    return [output] if isinstance(output, torch.Tensor) else [t for t in output if t is not None]


@pytest.mark.parametrize("name", [*SPIKING, *GATED])
def test_the_same_as_step_by_step_and_trains(name):
    ann = made(name)
    net = snnfast.to_spiking(ann, T, tau=2.0, **({"other_activations": "keep"} if name in GATED else {}))
    assert isinstance(net, type(ann))
    assert list(net.state_dict()) == list(ann.state_dict())
    x = 2 * torch.randn(2, 3, *(2 * [64 if name in LARGER else 32])).double()
    got, want = net(x), by_calls(ann, x)
    assert want.std() > 0.01
    assert torch.allclose(got, want, rtol=1e-9, atol=1e-12)
    net.train()
    for _ in range(2):
        sum(y.square().sum() for y in tensors(net(x))).backward()
        functional.reset_net(net)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    assert sum(bool(p.grad.any()) for p in net.parameters()) > 0.8 * len(list(net.parameters()))
    assert torch.equal(net.eval()(x), net(x))


@pytest.mark.parametrize("name", ["tv:resnet18", "tv:googlenet", "timm:resnet18", "timm:regnetx_002"])
def test_copies_and_states_that_stay(name):
    net, x = snnfast.to_spiking(made(name), T), 2 * torch.randn(2, 3, 64, 64).double()
    y = net(x)
    functional.reset_net(net)
    assert torch.equal(copy.deepcopy(net)(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(net))(x), y)
    net.auto_reset = False
    assert torch.equal(net(x), y)
    assert not torch.equal(net(x), y)
    functional.reset_net(net)
    assert torch.equal(net(x), y)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tv:mobilenet_v2", r"ReLU6 at 'features.0.2' \(ReLU6\); replace it by a ReLU"),
        ("tv:efficientnet_b0", r"SiLU at 'features.0.2' \(SiLU\)"),
        ("tv:mobilenet_v3_small", r"Hardswish at 'features.0.2'"),
        (
            "tv:regnet_y_400mf",
            r"Sigmoid at 'trunk_output.block1.block1-0.f.se.scale_activation' .*misc.py",
        ),
        ("tv:vit_b_16", r"GELU at 'encoder.layers.encoder_layer_0.mlp.1'"),
        ("timm:efficientnet_b0", r"SiLU at 'bn1.act' \(SiLU\), .*norm_act.py"),
        ("timm:seresnet18", r"sigmoid at 'layer1.0.se.gate' \(Sigmoid\), .*activations.py"),
        ("timm:convnext_atto", r"gelu at 'stages.0.blocks.0.mlp.act' \(GELU\)"),
    ],
)
def test_other_activations_are_refused_with_their_place(name, message):
    with pytest.raises(ValueError, match="model must have ReLU activations, but has " + message):
        snnfast.to_spiking(network(name), T)


@pytest.mark.parametrize(
    "name", ["tv:resnet18", "tv:googlenet", "tv:mobilenet_v2", "timm:resnet18", "timm:regnetx_002"]
)
def test_calibrated_networks_tend_to_the_ann(name):
    ann = trained_norms(network(name)).eval()
    x = torch.randn(4, 3, 64, 64)
    want = ann(x)
    net = snnfast.to_spiking(ann, 8, calibration=x, percentile=100, other_activations="replace")
    extra = set(net.state_dict()) - set(ann.state_dict())
    assert extra
    assert all(key.endswith("_extra_state") for key in extra)
    errors = []
    with torch.no_grad():
        for steps in (8, 128):
            net.timesteps = steps
            errors.append(((net(x).mean(0) - want).norm() / want.norm()).item())
    assert errors[1] < 0.4 * errors[0]
    assert errors[1] < 0.2


@pytest.mark.parametrize(
    ("name", "fused", "folded"),
    [("tv:resnet18", 16, 20), ("tv:densenet121", 120, 59), ("timm:resnet18", 16, 20), ("timm:vgg11_bn", 7, 8)],
)
def test_fuse_and_inference(name, fused, folded):
    """All but the norms before the first neuron, whose input is constant, and those on a shortcut."""
    net, x = snnfast.to_spiking(made(name), T), 2 * torch.randn(2, 3, 64, 64).double()
    y = net(x)
    fast, report = snnfast.optimize_for_inference(net)
    assert len(report.folded) == folded, report
    assert torch.allclose(fast(x), y, rtol=1e-7, atol=1e-9)
    net.train()
    other = copy.deepcopy(net)
    made_of = snnfast.fuse(net)
    assert len(made_of.fused) == fused, made_of
    got, want = net(x), other(x)
    assert torch.allclose(got, want, rtol=1e-7, atol=1e-9)
    got.square().sum().backward()
    want.square().sum().backward()
    largest = max(p.grad.abs().max().item() for p in other.parameters())
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-6, atol=1e-9 * largest)


def test_norms_with_an_activation_inside_are_left_alone_with_the_reason():
    net = snnfast.to_spiking(network("timm:regnetx_002"), T)
    report = snnfast.fuse(net)
    assert report.left_alone["stem.bn"] == "BatchNormAct2d is not one of the batch norms that are known here"
    assert "BatchNormAct2d is not one of the" in str(snnfast.optimize_for_inference(net)[1])


@pytest.mark.parametrize("name", ["tv:resnet18", "timm:resnet18", "timm:regnetx_002"])
def test_synops_and_packed_spikes(name):
    net, x = snnfast.to_spiking(made(name).float(), T), 2 * torch.randn(2, 3, 64, 64)
    report = snnfast.analysis.count_synops(net, [x])
    layers = [n for n, m in net.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert sorted(layer.name for layer in report.layers) == sorted(layers)
    assert report.timesteps == T
    assert 0 < report.acs < report.dense
    grads = []
    for context in (snnfast.packed_spikes(), torch.enable_grad()):
        net.zero_grad()
        with context:
            y = net(x)
        y.square().sum().backward()
        grads.append([p.grad.clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_nir_refuses_what_it_has_no_node_for():
    pytest.importorskip("nir", exc_type=ImportError)
    net = snnfast.to_spiking(network("timm:resnet18"), T)
    with pytest.raises(ValueError, match="no node for MaxPool2d at maxpool; train it with an AvgPool2d"):
        snnfast.to_nir(net, torch.zeros(2, 3, 64, 64))


@pytest.mark.parametrize(
    ("teacher", "pairs"),
    [("tv:resnet18", {"layer3": "layer3", "layer4": "layer4.1"}), ("timm:vgg11_bn", {"layer4": "features.28"})],
)
def test_distiller(teacher, pairs):
    student = snnfast.to_spiking(network("timm:resnet18"), T)
    x, labels = torch.randn(4, 3, 64, 64), torch.arange(4)
    losses = [LogitKD(4.0, 0.5), FeatureKD(pairs)]
    distiller = Distiller(student, network(teacher), losses, task_weight=0.5, example_inputs=x)
    optimiser = torch.optim.SGD(distiller.parameters(), 0.01)
    found = []
    for _ in range(3):
        optimiser.zero_grad()
        result = distiller(x, labels)
        result.loss.backward()
        optimiser.step()
        found.append(result.loss.item())
    assert list(result.terms) == ["task", "logit_kd", *(f"feature_kd.{path}" for path in pairs)]
    assert result.output.shape == (T, 4, 10)
    assert found[2] < found[0]
