"""What to_nir and from_nir refuse: networks, graphs, arguments and files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nir_networks import DT
from torch import nn

import snnfast
from snnfast.convert import from_nir, to_nir

nir = pytest.importorskip("nir", reason="nir is not installed")


class Loop(nn.Module):
    def __init__(self):
        super().__init__()
        self.sn = snnfast.IFNode()

    def forward(self, x):
        return torch.stack([self.sn(x_t) for x_t in x])


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.sn = snnfast.IFNode(step_mode="m")

    def forward(self, x):
        return self.sn(self.sn(x))


class MeanReadout(nn.Module):
    def __init__(self):
        super().__init__()
        self.sn = snnfast.IFNode(step_mode="m")

    def forward(self, x):
        return self.sn(x).mean(0)


class Padding(nn.Module):
    def forward(self, x):
        return torch.nn.functional.pad(x, (1, 1))


class PaddingBefore(nn.Module):
    def forward(self, x):
        return torch.nn.functional.pad(x, (0, 0, 0, 0, 1, 0))


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.calls = nn.Linear(3, 2), nn.Linear(3, 2), 0

    def forward(self, x):
        self.calls += 1
        return self.first(x) if self.calls == 1 else self.second(x)


class InPlace(nn.Module):
    def __init__(self, method):
        super().__init__()
        self.fc, self.method = nn.Linear(3, 3), method

    def forward(self, x):
        y = z = self.fc(x)
        if self.method:
            y.add_(x)
        else:
            y += x
        return z


class Doubling(snnfast.neuron.BaseNode):
    def neuronal_charge(self, x):
        self.v = self.v + 2 * x


class NormAndActivation(nn.BatchNorm2d):
    """As timm's BatchNormAct2d."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.Tanh()

    def forward(self, x):
        y = torch.nn.functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False)
        return self.act(y)


class Halved(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight / 2, bias)


X = torch.rand(4, 2, 3)
IMAGE = torch.rand(2, 3, 8, 8)
EXPORT = {
    "soft reset": (nn.Sequential(snnfast.IFNode(v_reset=None, step_mode="m")), X, r"0 has a soft reset.*v_reset=0\.0"),
    "max pool": (nn.Sequential(nn.Conv2d(3, 3, 3), nn.MaxPool2d(2)), IMAGE, r"MaxPool2d at 1; .*AvgPool2d"),
    "relu": (nn.Sequential(nn.Linear(3, 3), nn.ReLU()), X[0], r"ReLU at 1; .*to_spiking"),
    "time loop": (Loop(), X, r"cannot be traced.*time loop"),
    "shared neuron": (Twice(), X, r"sn is called more than once"),
    "readout": (MeanReadout(), X, r"operation 'mean'.*before it"),
    "own neuron": (Doubling(step_mode="m"), X, r"Doubling .*equations of its own"),
    "no time in the sample": (
        nn.Sequential(snnfast.IFNode(step_mode="m")),
        torch.rand(3),
        r"sample must have the time",
    ),
    "circular padding": (nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular"), IMAGE, r"pads with 'circular'"),
    "ceil_mode": (nn.AvgPool2d(3, ceil_mode=True), IMAGE, r"ceil_mode"),
    "padding": (Padding(), IMAGE, r"pad pads in another way"),
    "padding before": (PaddingBefore(), torch.zeros(2, 3, 8, 8), r"pad pads in another way"),
    "counting": (Counting(), X, r"must do the same at each call, and the forward of the model \(Counting\) does not"),
    "in place": (InPlace(method=True), X, r"add_ changes a tensor in place that is used again"),
    "in place by +=": (InPlace(method=False), X, r"iadd changes a tensor in place that is used again"),
    "uneven pool": (nn.AdaptiveAvgPool2d(3), IMAGE, r"does not divide evenly"),
    "no statistics": (nn.BatchNorm2d(3, track_running_stats=False), IMAGE, r"no running statistics"),
    "norm with an activation": (nn.Sequential(nn.Conv2d(3, 3, 3), NormAndActivation(3)), IMAGE, r"'batch_norm' at 1\."),
    "weight of its own": (nn.Sequential(Halved(3, 3, 3)), IMAGE, r"'conv2d' at 0\."),
    "nothing": (nn.Sequential(), X, r"at least one layer"),
}


@pytest.mark.parametrize("case", EXPORT)
def test_export_refuses(case):
    model, sample, message = EXPORT[case]
    with pytest.raises(ValueError, match=message):
        to_nir(model, sample, DT)


def test_export_checks_its_arguments():
    net = nn.Linear(3, 3)
    with pytest.raises(TypeError, match=r"model must be .*got list"):
        to_nir([net], X, DT)
    with pytest.raises(TypeError, match=r"sample must be .*int64"):
        to_nir(net, torch.ones(2, 3, dtype=torch.int64), DT)
    for dt in (0.0, -1.0, float("inf")):
        with pytest.raises(ValueError, match=r"dt must be a time step in seconds above 0"):
            to_nir(net, X, dt)
    with pytest.raises(ValueError, match=r"comparison must be '>=' or '>', got '<'"):
        to_nir(net, X, DT, comparison="<")
    with pytest.raises(ValueError, match=r"if_r must be '1/dt' or '1', got '2'"):
        to_nir(net, X, DT, if_r="2")


def of(n, *values):
    return [np.full(n, v) for v in values]


LINEAR = nir.Linear(np.ones((2, 3), np.float32))
IMPORT = {
    "unknown node": ([LINEAR, nir.Threshold(np.ones(2))], r"'threshold' of type Threshold.*it has Affine"),
    "wrong shape": (
        [LINEAR, nir.Linear(np.ones((2, 4), np.float32))],
        r"'linear_1' does not fit its input of shape \(2,\)",
    ),
    "several taus": ([LINEAR, nir.LIF(np.array([1e-2, 2e-2]), *of(2, 1.0, 0.0, 1.0))], r"'lif' must have one tau"),
    "tau below dt": ([LINEAR, nir.LIF(*of(2, 1e-5, 1.0, 0.0, 1.0))], r"'lif' must have tau above dt"),
    "threshold": ([LINEAR, nir.IF(*of(2, 1e4, -1.0))], r"'if' must have v_threshold above v_reset"),
    "nan weight": ([nir.Linear(np.full((2, 3), np.nan, np.float32))], r"'linear' must have finite weight"),
    "nan tau": ([LINEAR, nir.LIF(*of(2, np.nan, 1.0, 0.0, 1.0))], r"'lif' must have finite tau"),
    "bias": ([nir.Affine(np.ones((2, 3), np.float32), np.ones(3, np.float32))], r"'affine' must have a bias of 2"),
}


@pytest.mark.parametrize("case", IMPORT)
def test_import_refuses(case):
    nodes, message = IMPORT[case]
    with pytest.raises(ValueError, match=message):
        from_nir(nir.NIRGraph.from_list(*nodes, type_check=False), DT)


def test_import_refuses_cycles_and_loose_ends():
    square = nir.Linear(np.ones((3, 3), np.float32))
    ends = {"input": nir.Input(np.array([3])), "output": nir.Output(np.array([3]))}
    recurrent = {**ends, "a": nir.IF(*of(3, 1.0, 1.0)), "w": square}
    edges = [("input", "a"), ("a", "w"), ("w", "a"), ("a", "output")]
    with pytest.raises(ValueError, match=r"cycle, (a -> w -> a|w -> a -> w): recurrence"):
        from_nir(nir.NIRGraph(recurrent, edges, type_check=False), DT)
    with pytest.raises(ValueError, match=r"no edge ends in 'w'"):
        from_nir(nir.NIRGraph({**ends, "w": square}, [("w", "output")], type_check=False), DT)
    with pytest.raises(ValueError, match=r"no node 'b'"):
        from_nir(nir.NIRGraph({**ends, "w": square}, [("input", "b"), ("w", "output")], type_check=False), DT)
    with pytest.raises(ValueError, match=r"one input and one output"):
        from_nir(nir.NIRGraph({"input": ends["input"], "w": square}, [("input", "w")], type_check=False), DT)
    with pytest.raises(ValueError, match=r"dt must be given"):
        from_nir(nir.NIRGraph.from_list(LINEAR))
    with pytest.raises(TypeError, match=r"graph must be a nir.NIRGraph or the path.*int"):
        from_nir(3, DT)


def test_import_refuses_broken_files(tmp_path):
    net = nn.Sequential(nn.Linear(40, 40), snnfast.LIFNode(step_mode="m"))
    path = tmp_path / "net.nir"
    nir.write(path, to_nir(net, torch.zeros(1, 1, 40), DT))
    whole = path.read_bytes()
    for share in (0.0, 0.01, 0.2, 0.5, 0.9, 0.99):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(ValueError, match=r"cannot be read from .*net\.nir.*truncated or of another kind"):
            from_nir(path)
    path.write_text("not HDF5 at all")
    with pytest.raises(ValueError, match=r"truncated or of another kind"):
        from_nir(path)
    with pytest.raises(FileNotFoundError, match=r"no file .*missing\.nir"):
        from_nir(tmp_path / "missing.nir")


def test_import_names_unknown_types_in_a_file(tmp_path):
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "net.nir"
    nir.write(path, nir.NIRGraph.from_list(LINEAR))
    with h5py.File(path, "a") as f:
        del f["node/nodes/linear/type"]
        f["node/nodes/linear/type"] = "Resonator"
    with pytest.raises(ValueError, match=r"unknown type: linear \(Resonator\)"):
        from_nir(path, DT)


def test_a_neuron_of_another_library_is_refused_by_name():
    snntorch = pytest.importorskip("snntorch", reason="snntorch is not installed")
    with pytest.raises(ValueError, match=r"Leaky at .* is a neuron of snntorch, not of snnfast"):
        to_nir(nn.Sequential(nn.Linear(4, 3), snntorch.Leaky(beta=0.9, init_hidden=True)), torch.rand(1, 4), dt=1e-3)
