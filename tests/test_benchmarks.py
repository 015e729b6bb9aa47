"""The benchmark suite at tiny sizes: every sub runs, records what it must, and refuses what it should."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import snnfast
from snnfast import backends

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import __main__ as suite
from benchmarks import bn_neuron, cpu_targets, gpu, gpu_sanitize, measure, network, peer_neurons, peers, report
from benchmarks.breakdown import Breakdown
from benchmarks.rows import Point, Row, Settings, at_least, at_most

pytestmark = [
    pytest.mark.skipif(
        backends.native.missing(torch.device("cpu")) is not None, reason="the compiled extension is not built here"
    ),
    pytest.mark.usefixtures("one_thread", "short"),
]


@pytest.fixture
def short(monkeypatch):
    """One call each in place of medians, and no torch.compile, which takes seconds for each shape."""

    def few(contenders, *args, **kwargs):
        return {name: max(measure.once(call), 1e-9) for name, call in contenders.items()}

    for module in (bn_neuron, cpu_targets, peers):
        monkeypatch.setattr(module, "compare", few)
    for module in (cpu_targets, peers):
        monkeypatch.setattr(module, "per_call", lambda call, *args: measure.once(call))
    monkeypatch.setattr(peer_neurons, "COMPILES_TO", 0)
    for name in ("LARGE", "MIDDLE"):  # --quick changes them
        monkeypatch.setattr(cpu_targets, name, getattr(cpu_targets, name))
    for name in ("B", "SIZE"):
        monkeypatch.setattr(bn_neuron, name, getattr(bn_neuron, name))
    monkeypatch.setenv("SNNFAST_POISON", "0")
    import warnings

    with warnings.catch_warnings():
        yield


def installed(*names):
    for name in names:
        pytest.importorskip(name, reason=f"{name} is not installed")


def recorded(folder: Path, stem: str) -> dict:
    record = json.loads((folder / f"{stem}.json").read_text())
    environment = record["environment"]
    for fact in ("processor", "threads", "torch", "snnfast", "spikingjelly", "date", "commit", "seconds"):
        assert fact in environment
    assert "--quick" in environment["label"]
    assert "ended early" not in environment
    assert (folder / f"{stem}.md").read_text().count("\n| ") >= len(record["rows"])
    return record


SMALL = {"neuron": 8, "bn_neuron": 16, "network": 16, "overhead": 12, "scaling": 15, "inference": 8,
         "open_neuromorphic": 8}  # fmt: skip


@pytest.mark.parametrize("sub", SMALL)
def test_every_sub(sub, tmp_path, capsys):
    assert suite.main([sub, "--quick", "--out", str(tmp_path)]) == 0
    stem = suite.SUBS[sub].stems["cpu"]
    record = recorded(tmp_path, stem)
    measured = [r for r in record["rows"] if r["value"] is not None]
    assert len(measured) >= SMALL[sub]
    assert all(r["value"] > 0 for r in measured)
    assert all(r["note"] for r in record["rows"] if r["value"] is None)  # the reason
    text = (tmp_path / "REPORT.md").read_text()
    assert f"## {suite.title_of(suite.SUBS[sub], 'cpu')}" in text
    assert measured[0]["work"] in text
    out = capsys.readouterr().out
    if "cuda" in suite.SUBS[sub].stems and not torch.cuda.is_available():
        assert "no cuda device here" in out
        assert not (tmp_path / f"{suite.SUBS[sub].stems['cuda']}.json").exists()
        assert "Not measured: no GPU has run it yet" in text
    if sub in ("network", "overhead", "scaling", "open_neuromorphic"):
        against = {r["against"].removesuffix("'s neurons") for r in record["rows"]} | {
            r["work"] for r in record["rows"]
        }
        for peer in peer_neurons.all_of("cpu", 4):
            assert any(peer.name in a for a in against), peer.name
    if sub == "scaling":
        for figure in report.FIGURES:
            assert (tmp_path / f"scaling-{figure}.png").stat().st_size > 5000
            assert f"scaling-{figure}.png" in text


def test_what_the_sanitizer_runs_runs():
    assert gpu_sanitize.main("cpu", seconds=60) > 300


def test_the_cases_of_a_gpu_give_rows(monkeypatch):
    row = at_least("work", "peer", 2.0, 1.0)
    for name in ("bandwidth_of", "against_peers", "overhead"):
        monkeypatch.setattr(gpu, name, lambda *args: [row])
    monkeypatch.setattr(gpu, "copy_bandwidth", lambda: 4e12)
    for kernels in backends.KERNELS:
        monkeypatch.setattr(kernels, "missing", lambda device: None)
    found = list(suite.neuron(Settings("cuda", True, True)))
    assert found.count(row) == len(found) - 1 == 2 * 24 + 2


def test_peers_models(tmp_path):
    installed("spikingjelly", "snntorch", "norse")
    assert suite.main(["peers", "--quick", "--out", str(tmp_path)]) == 0
    assert len(recorded(tmp_path, "peers")["rows"]) == 23


def test_memory_is_taken_from_its_own_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(suite, "memory_module", lambda: None)
    assert suite.main(["memory", "--quick", "--out", str(tmp_path)]) == 0
    assert f"not measured: {suite.ABSENT_MEMORY}" in capsys.readouterr().out
    assert suite.ABSENT_MEMORY in (tmp_path / "REPORT.md").read_text()


def test_a_missing_peer_is_reported(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "norse", None)
    monkeypatch.setitem(sys.modules, "norse.torch", None)
    found = {p.name: p for p in peer_neurons.all_of("cpu", 4)}
    assert "not installed here" in found["Norse LIF"].missing
    suite.main(["overhead", "--quick", "--device", "cpu", "--out", str(tmp_path)])
    rows = {r["work"]: r for r in recorded(tmp_path, "overhead")["rows"]}
    assert rows["Norse LIF"]["value"] is None
    assert "not installed here" in rows["Norse LIF"]["note"]
    assert "| Norse LIF | host time | - | - | not measured | not installed" in (tmp_path / "overhead.md").read_text()


def test_wrong_spikes_stop_the_clock(tmp_path, monkeypatch, capsys):
    class Wrong(nn.Module):
        def forward(self, x_seq):
            return (x_seq > 1.0).to(x_seq.dtype)

    wrong = peer_neurons.Peer("wrong", Wrong, True)
    with pytest.raises(SystemExit, match=r"wrong and snnfast disagree on .* of the spikes"):
        peer_neurons.disagreement(wrong, 4)
    rate, words = peer_neurons.disagreement(peer_neurons.Peer("wrong", Wrong, False), 4)
    assert rate > 0
    assert "another dynamics" in words
    monkeypatch.setattr(peer_neurons, "all_of", lambda *args: [wrong])
    assert suite.main(["overhead", "--quick", "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert "ended early: overhead (cpu)" in capsys.readouterr().out


def test_a_time_limit_leaves_what_was_measured(tmp_path, monkeypatch):
    def limited(settings):
        yield at_least("first", "nothing", 2.0, None)
        raise KeyboardInterrupt  # what `timeout -s INT` is to Python

    monkeypatch.setitem(suite.SUBS, "overhead", suite.Sub("Limited", limited, {"cpu": "overhead"}))
    with pytest.raises(KeyboardInterrupt):
        suite.main(["overhead", "--quick", "--device", "cpu", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "overhead.json").read_text())
    assert [r["work"] for r in found["rows"]] == ["first"]
    assert "KeyboardInterrupt" in found["environment"]["ended early"]


def test_results_without_matplotlib_and_rich(tmp_path, monkeypatch):
    for name in ("matplotlib", "rich", "rich.console", "rich.table"):
        monkeypatch.setitem(sys.modules, name, None)
    measured = lambda settings: iter([at_least("first", "nothing", 2.0, None), Point("time", "a", 1, 1.0)])  # noqa: E731
    monkeypatch.setitem(suite.SUBS, "overhead", suite.Sub("Limited", measured, {"cpu": "overhead"}))
    assert suite.main(["overhead", "--quick", "--device", "cpu", "--out", str(tmp_path)]) == 0
    assert "| first |" in (tmp_path / "overhead.md").read_text()
    assert not list(tmp_path.glob("*.png"))


def test_inference_compares_in_whole_float32(monkeypatch):
    """TF32 would turn spikes in every image where folding changes the weights; a graph has that of its capture."""
    from benchmarks import inference

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    seen = []

    def model(name):
        return lambda x: seen.append((name, torch.backends.cudnn.allow_tf32)) or x.sum(1)

    x = torch.rand(4, 2, 3, 5)
    calls = {inference.OPTIMIZED: (model("fast"), x), inference.CAPTURED: (model("graph"), x)}
    notes = inference.check(model("net"), calls, x)
    assert seen == [("net", False), ("fast", False), ("fast", True), ("graph", True)]
    assert set(notes.values()) == {"same logits"}
    assert torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("peer", peer_neurons.all_of("cpu", 4), ids=lambda p: p.name)
def test_peers_fire_and_start_afresh(peer):
    if peer.make is None:
        pytest.skip(peer.missing)
    if peer.name == peer_neurons.COMPILED:
        pytest.skip("torch.compile takes seconds; each benchmark checks its spikes")
    rate, _ = peer_neurons.disagreement(peer, 4)
    assert rate == 0
    module, x = peer.make(), torch.full((4, 2, 3), 1.5, requires_grad=True)
    with torch.no_grad():
        first = module(x)
        assert torch.equal(module(x), first)
    assert first.count_nonzero()
    for _ in range(2):
        torch.autograd.grad(module(x).sum(), x)


def test_networks_have_the_same_weights_and_their_neurons():
    nets, _ = network.contenders("ResNet-18", Settings(quick=True), 8)
    want = nets["snnfast"].state_dict()
    for name, net in nets.items():
        state = net.state_dict()
        assert all(torch.equal(state[k], v) for k, v in want.items()), name
        assert len(network._neurons(net)) == 17, name
    assert network.check_logits("ResNet-18", nets, torch.rand(2, 3, 16, 16))["plain loop"] == "logits equal"
    broken = nets["plain loop"]
    for module in broken.modules():
        if isinstance(module, snnfast.LIFNode):
            module.v_threshold = 0.3
    with pytest.raises(SystemExit, match="other logits"):
        network.check_logits("ResNet-18", nets, torch.rand(2, 3, 16, 16))


class Sleeps(nn.Module):
    """20 ms forward and 40 ms backward."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            time.sleep(0.02)
            return x * 1.0

        @staticmethod
        def backward(ctx, grad):
            time.sleep(0.04)
            return grad

    def forward(self, x):
        return self.Function.apply(x)


@pytest.mark.parametrize("fused", [False, True])
def test_breakdown(fused):
    sleeps = Sleeps()
    lif = snnfast.LIFNode(timesteps=2)
    net = nn.Sequential(nn.Conv2d(2, 2, 1), sleeps, nn.BatchNorm2d(2), lif)
    if fused:
        assert snnfast.fuse(net).fused
    clocks = Breakdown(net, [sleeps, lif], "cpu")
    x = torch.randn(4, 2, 5, 5)

    def step():
        lif.reset()
        net(x).sum().backward()
        time.sleep(0.01)

    whole = clocks.measure(step, 2)
    forward, backward = clocks.seconds["neurons"]
    assert 0.02 <= forward < 0.03
    assert 0.04 <= backward < 0.06
    assert whole >= 0.07
    norms = sum(clocks.seconds["norms"])
    assert (norms == 0) == fused  # together with its neuron
    clocks.remove()
    grads = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    clocks = Breakdown(net, [sleeps, lif], "cpu")
    step(), step(), step()
    for p, g in zip(net.parameters(), grads, strict=True):
        assert torch.allclose(p.grad, g, rtol=1e-4, atol=1e-6)  # clocks change nothing


def test_rows_and_report(tmp_path):
    rows = [
        at_least("a", "b", 2.0, 1.5),
        at_most("c", "d", 2.0, 1.5, "us", "why"),
        at_least("e", "f", None, 3.0, note="no GPU"),
        at_least("g", "h", 4.0, None),
    ]
    assert [r.verdict for r in rows] == ["met", "missed", "not measured", ""]
    report.write(tmp_path, "some", "Some (CPU)", {"date": "today"}, rows, [Point("time", "x", 1, 2)])
    environment, read = report.read_rows(tmp_path / "some.json")
    assert (environment, read) == ({"date": "today"}, rows)
    report.collect(tmp_path, tmp_path / "R.md", {"some": ("Some (CPU)", "")}, {"some": "python -m benchmarks some"})
    text = (tmp_path / "R.md").read_text()
    assert "| [Some (CPU)](#some-cpu) | 1 of 2, 1 rows not measured | today |" in text
    assert "![](some-time.png)" in text
    assert "| e | f | - | ≥ 3 x | not measured | no GPU |" in text
    assert isinstance(read[0], Row)


def test_refusals(monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit):
        suite.main(["nothing"])
    assert "there are neuron, bn_neuron, peers, network" in capsys.readouterr().err
    monkeypatch.setattr(measure, "busy_share", lambda: 0.6)
    with pytest.raises(SystemExit, match="not idle"):
        suite.main(["overhead", "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_quick_figures_do_not_replace_results():
    before = {p: p.stat().st_mtime_ns for p in measure.RESULTS.iterdir()}
    assert suite.main(["overhead", "--quick", "--device", "cpu"]) == 0
    assert {p: p.stat().st_mtime_ns for p in measure.RESULTS.iterdir()} == before
