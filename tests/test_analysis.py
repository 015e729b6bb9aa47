"""Firing rates, sizes and plots (snnfast.analysis)."""

from __future__ import annotations

import copy
import json
import sys
import warnings

import pytest
import torch
from analysis_networks import DATA, classifier, predict
from torch import nn

import snnfast
from snnfast import analysis, chunked, functional
from snnfast.checkpoint import checkpoint
from snnfast.surrogate import ATan

T, B = 3, 2


# ---- firing rates ----
def spiking_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 16),
        snnfast.LIFNode(step_mode="m", surrogate_function=ATan()),
        nn.Linear(16, 16),
        snnfast.IFNode(step_mode="m"),
    )


def test_firing_rate_monitor():
    net = spiking_net()
    x = torch.rand(2, T, B, 6) * 4
    with analysis.FiringRateMonitor(net) as monitor:
        spikes = []
        for x_call in x:
            functional.reset_net(net)
            h = net[1](net[0](x_call))
            spikes.append((h, net[3](net[2](h))))
            h.sum().backward()  # in training
        expected = [torch.stack([s[i] for s in spikes]).mean().item() for i in range(2)]
        assert monitor.rates() == pytest.approx(dict(zip("13", expected, strict=True)))
        assert monitor.mean() == pytest.approx(sum(expected) / 2)
        assert min(expected) > 0
        monitor.clear()
        assert monitor.rates() == {}
    net(x[0])
    assert monitor.rates() == {}
    assert not any(m._forward_hooks for m in net.modules())
    with pytest.raises(ValueError, match=r"spiking neurons.*types="):
        analysis.FiringRateMonitor(nn.Linear(1, 1))
    with pytest.raises(TypeError, match=r"types must be classes in a tuple.*Linear"):
        analysis.FiringRateMonitor(nn.Linear(1, 1), types=nn.Linear)
    with pytest.raises(TypeError, match="target must be a number, got NoneType"):
        analysis.FiringRateRegulariser(net, None)


@pytest.mark.parametrize("run", [lambda net, x: net(x), checkpoint, lambda net, x: chunked(net, x, 2)])
def test_what_a_backward_runs_again_is_counted_once(run):
    net, losses, sums = spiking_net(), [], []
    with analysis.FiringRateRegulariser(net, 0.1) as regulariser, analysis.FiringRateMonitor(net) as monitor:
        for i in range(2):
            functional.reset_net(net)
            monitor.clear()
            y = run(net, torch.full((T, B, 6), 1.0 + i))
            before, loss = monitor.mean(), regulariser.loss()
            (y.sum() + loss).backward()
            losses.append(loss.item())
            sums.append((before, monitor.mean(), monitor._elements["1"]))
    rates = [[r for r, _, _ in sums], [r for _, r, _ in sums]]
    assert rates[0] == rates[1]
    assert [n for _, _, n in sums] == [T * B * 16] * 2
    net, expected = spiking_net(), []
    for i in range(2):
        functional.reset_net(net)
        h = net[1](net[0](torch.full((T, B, 6), 1.0 + i)))
        expected.append((((h.mean() - 0.1) ** 2 + (net[3](net[2](h)).mean() - 0.1) ** 2) / 2).item())
    assert losses == pytest.approx(expected)


def test_copies_of_a_watched_network_are_not_watched():
    net = spiking_net()
    with analysis.FiringRateMonitor(net) as monitor, analysis.FiringRateRegulariser(net, 0.1) as regulariser:
        teacher = copy.deepcopy(net)
        net(torch.rand(T, B, 6))
        rates = monitor.rates()
        teacher(torch.rand(T, B, 6) * 9)
        assert monitor.rates() == rates
        assert all(len(calls) == 1 for calls in regulariser._calls.values())


def test_peers_neurons_are_found():
    found = []
    snn = pytest.importorskip("snntorch", reason="snntorch is not installed")
    norse = pytest.importorskip("norse.torch", reason="norse is not installed")
    sinabs = pytest.importorskip("sinabs.layers", reason="sinabs is not installed")
    sj = pytest.importorskip("spikingjelly.activation_based.neuron", reason="spikingjelly is not installed")
    for neuron in (snn.Leaky(0.9), norse.LIFCell(), norse.LIFBoxCell(), sinabs.IAF(), sj.LIFNode()):
        with analysis.FiringRateMonitor(nn.Sequential(nn.Linear(3, 3), neuron)) as monitor, torch.no_grad():
            x = torch.full((2, 4, 3), 2.0)
            neuron(x)
            found.append(monitor.rates())
    assert all(list(rates) == ["1"] and 0 <= rates["1"] <= 2 for rates in found)
    assert found[-1] == {"1": 1.0}
    with analysis.FiringRateMonitor(
        nn.Sequential(norse.LIFRecurrent(3, 2), norse.LI(), sinabs.ExpLeak(5.0))
    ) as monitor:
        assert list(monitor._modules) == ["0"]  # the others give potentials


@pytest.mark.parametrize("target", [0.05, 0.4])
def test_firing_rate_regulariser_reaches_its_target(target):
    net, x = spiking_net(), torch.rand(8, 16, 6) * 2
    optimizer = torch.optim.Adam(net.parameters(), lr=0.03)
    with analysis.FiringRateRegulariser(net, target, weight=2.0) as regulariser:
        for step in range(80):
            functional.reset_net(net)
            h = net[1](net[0](x))
            out = net[3](net[2](h))
            loss = regulariser.loss()
            expected = 2.0 * ((h.mean() - target) ** 2 + (out.mean() - target) ** 2) / 2
            assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
            if step == 0:
                grads = torch.autograd.grad(expected, net.parameters(), retain_graph=True)
            optimizer.zero_grad()
            loss.backward()
            if step == 0:
                for p, g in zip(net.parameters(), grads, strict=True):
                    assert torch.allclose(p.grad, g, atol=1e-7)
            optimizer.step()
        with torch.no_grad():
            net(x)  # an evaluation in between does not count
        with pytest.raises(RuntimeError, match="must run with gradients"):
            regulariser.loss()
    assert abs(h.mean().item() - target) < 0.03
    assert abs(out.mean().item() - target) < 0.03
    double = spiking_net().double()
    with analysis.FiringRateRegulariser(double, 0.1) as regulariser:
        double(x.double())
        assert regulariser.loss().dtype == torch.float64
    for wrong in ({"target": 1.5}, {"target": 0.1, "weight": -1.0}):
        with pytest.raises(ValueError, match="must be"):
            analysis.FiringRateRegulariser(net, **wrong)


# ---- sizes ----
def test_parameter_table():
    shared = nn.Linear(3, 3)
    net = nn.Sequential(shared, nn.BatchNorm1d(3), snnfast.ParametricLIFNode(), shared, nn.Linear(3, 2, bias=False))
    net[4].weight.requires_grad_(False)
    report = analysis.parameter_table(net)
    assert report.parameters == sum(p.numel() for p in net.parameters()) == 12 + 6 + 1 + 6
    assert report.trainable == 19
    assert report.bytes == 4 * (25 + 6) + 8
    assert [layer[0] for layer in report.layers] == ["0", "1", "2", "4"]
    assert "ParametricLIFNode" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["parameters"] == 25


def test_saved_bytes():
    x = torch.randn(8, 4, 100)
    lif = snnfast.LIFNode(step_mode="m", backend="native")
    if reason := snnfast.neuron.backends.KERNELS[0].missing(torch.device("cpu")):
        pytest.skip(reason)
    given = (x * 1).requires_grad_()
    assert analysis.saved_bytes(lif, given) == x.numel() * 4  # the input, and nothing else
    lif.reset()
    lif.backend = "reference"
    assert analysis.saved_bytes(lif, given) >= 3 * x.numel() * 4
    net = nn.Sequential(nn.Linear(100, 50), nn.ReLU(), nn.Linear(50, 10))
    rows = x.flatten(0, 1)
    assert analysis.saved_bytes(net, rows) == 32 * (100 + 50) * 4  # the input, and ReLU's output, once; no weights
    view = torch.randn(10, 10, requires_grad=True)
    assert analysis.saved_bytes(lambda t: t[:2].sin() + t[5:7].cos(), view) == 400  # one storage, counted whole
    with torch.no_grad():
        assert analysis.saved_bytes(torch.sin, view) == 400
    discarded = lambda t: [None for _ in range(3) if (t * 1).sin() is None]  # noqa: E731 (memory that is used again)
    assert analysis.saved_bytes(discarded, view) == 3 * 400
    for device in ("cpu", "meta"):
        few = torch.rand(10, device=device, requires_grad=True)
        assert analysis.saved_bytes(lambda t: t.sin() * t.cos(), few) == 3 * 40
        assert analysis.saved_bytes(nn.Linear(10, 5, device=device), few) == 40
    with pytest.raises(TypeError, match="function must be"):
        analysis.saved_bytes(3)


# ---- plots ----
def png_is_drawn(path):
    from matplotlib.image import imread

    image = imread(path)
    return image.shape[0] > 200 and image.shape[1] > 300 and image[..., :3].std() > 0.02


def test_plots(tmp_path):
    pytest.importorskip("matplotlib")
    models = {"plain": classifier(0), "distilled": classifier(1)}
    levels = {"gaussian": [0.5], "salt_and_pepper": [0.1, 0.3]}
    report = analysis.robustness(models, DATA, predict=predict, corruptions=list(levels), levels=levels)
    figures = {
        "accuracy": lambda p: analysis.plot_accuracy({"plain": [0.5, 0.7], "distilled": [0.6, 0.75]}, p),
        "rates": lambda p: analysis.plot_firing_rates({"1": 0.1, "3": 0.2}, p),
        "two": lambda p: analysis.plot_firing_rates({"plain": {"1": 0.1}, "distilled": {"1": 0.2, "3": 0.1}}, p),
        "raster": lambda p: analysis.plot_raster(torch.rand(8, 16, 8, 8) < 0.1, p, title="layer 3"),
        "robustness": lambda p: analysis.plot_robustness(report, p),
    }
    for name, draw in figures.items():
        figure = draw(tmp_path / f"{name}.png")
        assert type(figure).__name__ == "Figure"
        assert png_is_drawn(tmp_path / f"{name}.png")
    axes = figures["robustness"](None).axes
    assert [a.get_title() for a in axes][:2] == ["gaussian", "salt and pepper"]
    assert axes[0].lines[1].get_ydata()[0] == pytest.approx(100 * report.accuracy("distilled", "gaussian")[0])
    raster = torch.zeros(5, 4)
    raster[2, 3] = 1.0
    (dash,) = analysis.plot_raster(raster).axes[0].collections[0].get_segments()
    assert dash.mean(0).tolist() == [2.0, 3.0]
    for wrong in (
        lambda: analysis.plot_accuracy({}),
        lambda: analysis.plot_firing_rates({}),
        lambda: analysis.plot_raster(torch.rand(5)),
        lambda: analysis.plot_raster(torch.rand(5, 2), most=0),
    ):
        with pytest.raises(ValueError, match="must"):
            wrong()


def test_legends_of_many_long_names_leave_room_for_the_plot(tmp_path):
    pytest.importorskip("matplotlib")
    names = ["teacher", "plain", *(f"distilled-{n}" for n in ("logit", "per-step-confidence", "temporal-spatial"))]
    one = analysis.RobustnessReport(names, {"c": [0.0, 1.0]}, {n: {"c": torch.eye(2)} for n in names}, 0.95, (0,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns where a layout cannot be made
        for figure in (
            analysis.plot_accuracy({n: [0.5, 0.7] for n in names}, tmp_path / "accuracy.png"),
            analysis.plot_firing_rates({n: {"layer1": 0.2} for n in names}, tmp_path / "rates.png"),
            analysis.plot_robustness(one, tmp_path / "robustness.png"),
        ):
            (legend,) = figure.legends
            assert [text.get_text() for text in legend.get_texts()] == names
            box = legend.get_window_extent()
            assert box.x0 >= 0
            assert box.x1 <= figure.bbox.x1
            assert figure.axes[0].get_window_extent().width > 0.6 * figure.bbox.width
            assert not box.overlaps(figure.axes[0].get_window_extent())


@pytest.mark.parametrize("name", ["_plain", ""])
def test_legends_have_names_that_matplotlib_leaves_out(name):
    pytest.importorskip("matplotlib")
    report = analysis.RobustnessReport([name], {"c": [0.0]}, {name: {"c": torch.eye(1)}}, 0.95, (0,))
    for figure in (
        analysis.plot_accuracy({name: torch.tensor([0.5, 0.7])}),
        analysis.plot_firing_rates({name: {"layer1": 0.2}}),
        analysis.plot_robustness(report),
    ):
        assert [text.get_text().strip() for text in figure.legends[0].get_texts()] == [name]


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install snnfast\[train\]"):
        analysis.plot_accuracy({"plain": [1.0]})
