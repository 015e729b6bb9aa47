"""Bad input gets an exception that names the argument, what it got and what would do."""

from __future__ import annotations

import copy
import inspect
import pickle
import re

import numpy as np
import pytest
import torch

import snnfast
from snnfast import _notices, distill, dynamics, encoding, functional, layer, neuron, surrogate

X = torch.randn(4, 3)
ATAN = surrogate.ATan()
OWN = (torch.tensor(1.0), torch.tensor(0.9))


class Own(snnfast.LIFNode):
    def __init__(self, size, **kwargs):
        super().__init__(**kwargs)
        self.size = size


CASES = {
    "integer input": (lambda: functional.if_multi_step(X.int()), TypeError, r"x_seq.*float32.*int32"),
    "complex input": (lambda: functional.if_multi_step(X.cfloat()), TypeError, r"x_seq.*complex64"),
    "boolean input": (lambda: snnfast.IFNode()(X > 0), TypeError, r"x must be .*bool"),
    "surrogate's class": (
        lambda: snnfast.IFNode(surrogate_function=surrogate.ATan),
        TypeError,
        r"such as .*ATan\(\), got",
    ),
    "not a tensor": (lambda: functional.if_multi_step([1.0]), TypeError, r"x_seq must be a torch.Tensor, got list"),
    "no time": (lambda: functional.if_multi_step(torch.tensor(1.0)), ValueError, r"x_seq.*\[T, \*\].*\(\)"),
    "T = 0": (lambda: functional.lif_multi_step(X[:0]), ValueError, r"x_seq.*at least one time step.*\(0, 3\)"),
    "T = 0 in a module": (lambda: snnfast.IFNode(step_mode="m")(X[:0]), ValueError, r"x_seq"),
    "sparse": (lambda: functional.if_multi_step(X.to_sparse()), ValueError, r"x_seq.*to_dense"),
    "indivisible": (lambda: snnfast.IFNode(timesteps=3)(X), ValueError, r"x_seq.*timesteps=3.*4"),
    "state's shape": (lambda: functional.if_multi_step(X, torch.zeros(2)), ValueError, r"v .*\(3,\).*\(2,\)"),
    "state's device": (
        lambda: functional.if_multi_step(X, torch.zeros(3, device="meta")),
        ValueError,
        r"v .*cpu.*meta",
    ),
    "state's dtype": (lambda: functional.if_multi_step(X, torch.zeros(3, dtype=torch.int32)), TypeError, r"v .*int32"),
    "state sparse": (lambda: functional.if_multi_step(X, X[0].to_sparse()), ValueError, r"v .*sparse.*v\.to_dense"),
    "state no number": (lambda: functional.if_multi_step(X, "0"), TypeError, r"v must be a number"),
    "w's size": (lambda: functional.plif_multi_step(X, 0.0, torch.zeros(2)), TypeError, r"w must be"),
    "w's device": (lambda: functional.plif_multi_step(X, 0.0, torch.zeros((), device="meta")), ValueError, r"w .*cpu"),
    "w's size in a module": (
        lambda: torch.func.functional_call(snnfast.ParametricLIFNode(step_mode="m"), {"w": torch.zeros(2)}, X),
        ValueError,
        r"w must be one number .*\(2,\)",
    ),
    "tau 1": (lambda: snnfast.LIFNode(tau=1.0), ValueError, r"tau .*above 1, got 1.0.*IFNode"),
    "v_min inf": (
        lambda: functional.multi_step(dynamics.EXPONENTIAL_LIF, X, 0.0, None, OWN, v_min=-float("inf")),
        ValueError,
        r"v_min must be finite, got -inf; None",
    ),
    "v_min inf on the reference path": (
        lambda: functional.multi_step(dynamics.IF, X, 0.0, v_min=float("inf")),
        ValueError,
        r"v_min must be finite, got inf; None",
    ),
    "v_min of a late reset": (
        lambda: functional.multi_step(dynamics.LEAKY, X, 0.0, None, OWN, v_min=-1.0),
        ValueError,
        r"v_min must be None for Leaky",
    ),
    "v_min no number": (
        lambda: functional.multi_step(dynamics.EXPONENTIAL_LIF, X, 0.0, None, OWN, v_min="-1"),
        TypeError,
        r"v_min must be a number",
    ),
    "tau nan": (lambda: snnfast.LIFNode(tau=float("nan")), ValueError, r"tau .*nan"),
    "tau inf": (lambda: snnfast.LIFNode(tau=float("inf")), ValueError, r"tau .*inf"),
    "tau text": (lambda: snnfast.LIFNode(tau="2"), TypeError, r"tau must be a number, got str '2'"),
    "init_tau": (lambda: snnfast.ParametricLIFNode(init_tau=0.5), ValueError, r"init_tau .*0.5"),
    "functional tau": (lambda: functional.lif_multi_step(X, tau=0.9), ValueError, r"tau .*0.9"),
    "threshold": (lambda: snnfast.IFNode(v_threshold=None), TypeError, r"v_threshold must be a number, got NoneType"),
    "threshold nan": (lambda: snnfast.IFNode(v_threshold=float("nan")), ValueError, r"v_threshold .*nan"),
    "threshold flag": (lambda: snnfast.IFNode(v_threshold=True), TypeError, r"v_threshold"),
    "reset": (lambda: snnfast.IFNode(v_reset="zero"), TypeError, r"v_reset must be a number, got str 'zero'"),
    "functional reset": (
        lambda: functional.if_multi_step(X, v_reset=[0]),
        TypeError,
        r"^v_reset must be a number, got list",
    ),
    "functional threshold": (lambda: functional.lif_multi_step(X, v_threshold=[1]), TypeError, r"^v_threshold must be"),
    "functional tau in a list": (lambda: functional.lif_multi_step(X, tau=[2.0]), TypeError, r"^tau must be a number"),
    "step mode": (lambda: snnfast.IFNode(step_mode="multi"), ValueError, r"step_mode must be 's' or 'm', got 'multi'"),
    "set_step_mode": (lambda: functional.set_step_mode(snnfast.IFNode(), "x"), ValueError, r"step_mode .*'x'"),
    "backend": (
        lambda: snnfast.IFNode(backend="cuda"),
        ValueError,
        r"backend must be one of 'auto', 'native', 'triton'",
    ),
    "set_backend": (lambda: functional.set_backend(snnfast.IFNode(), "gpu"), ValueError, r"backend must be one of"),
    "functional backend": (lambda: functional.if_multi_step(X, backend="gpu"), ValueError, r"backend must be one of"),
    "functional backend in a list": (
        lambda: functional.if_multi_step(X, backend=["native"]),
        ValueError,
        r"backend must be one of .*\['native'\]",
    ),
    "backend's device": (
        lambda: functional.if_multi_step(X, backend="triton"),
        RuntimeError,
        r"backend='triton' cannot serve",
    ),
    "timesteps": (lambda: snnfast.IFNode(timesteps=0), ValueError, r"timesteps .*0"),
    "timesteps float": (lambda: snnfast.IFNode(timesteps=2.0), ValueError, r"timesteps .*2.0"),
    "surrogate": (lambda: snnfast.IFNode(surrogate_function="atan"), TypeError, r"surrogate_function .*ATan"),
    "functional surrogate": (
        lambda: functional.if_multi_step(X, surrogate_function=None),
        TypeError,
        r"surrogate_function .*ATan\(\), got None",
    ),
    "functional surrogate's class": (
        lambda: functional.if_multi_step(X, surrogate_function=surrogate.ATan),
        TypeError,
        r"surrogate_function .*such as .*ATan\(\), got <class",
    ),
    "alpha": (lambda: surrogate.ATan(alpha=0.0), ValueError, r"alpha .*above 0, got 0.0"),
    "no state": (lambda: functional.if_multi_step(X, None), TypeError, r"v must be a number or a tensor .* got None"),
    "unknown argument": (
        lambda: snnfast.IFNode(v_treshold=1.0),
        TypeError,
        r"IFNode takes no argument 'v_treshold'; did you mean 'v_threshold'\? It takes v_threshold, v_reset",
    ),
    "snnTorch's beta": (lambda: snnfast.LIFNode(beta=0.9), TypeError, r"LIFNode .*'beta'.* = 10, decay_input=False"),
    "snnTorch's beta as a tensor": (lambda: snnfast.LIFNode(beta=X), TypeError, r"1 / \(1 - beta\), decay_input=False"),
    "snnTorch's beta = 1": (lambda: neuron.LI(beta=1.0), TypeError, r"LI .*1 / \(1 - beta\), decay_input=False"),
    "Norse's": (lambda: snnfast.LIFNode(tau_mem_inv=100.0), TypeError, r"tau = 1 / \(dt \* tau_mem_inv\) = 10,"),
    "sinabs'": (lambda: snnfast.LIFNode(tau_mem=9.491222), TypeError, r"tau_mem\)\) = 10\. It"),
    "another neuron's": (
        lambda: snnfast.ParametricLIFNode(tau=3.0),
        TypeError,
        r"'tau': .* init_tau\. It takes init_tau",
    ),
    "several": (lambda: snnfast.LIFNode(threshold=1, alpha=2), TypeError, r"v_threshold\..*'alpha': .*surrogate\.ATan"),
    "a subclass's": (
        lambda: Own(1, taw=2.0),
        TypeError,
        r"Own takes no argument 'taw'; did you mean 'tau'\? It takes size, tau,",
    ),
    "a subclass's own": (lambda: Own(sise=1, size=2), TypeError, r"Own takes no argument 'sise'; did you mean 'size'"),
    "a model's": (
        lambda: snnfast.models.resnet18(time=4),
        TypeError,
        r"'time'; did you mean 'timesteps'\? It takes num_classes, .*timesteps, .*coding.*tau",
    ),
    "a spiking model's": (lambda: snnfast.models.vgg9(timesteps=2, beta=0.5), TypeError, r"'beta': .* = 2, decay"),
    "to_spiking's": (
        lambda: snnfast.to_spiking(torch.nn.ReLU(), 4, codign="poisson"),
        TypeError,
        r"to_spiking takes no argument 'codign'; did you mean 'coding'",
    ),
    "SpikingJelly's neuron": (
        lambda: neuron.QIFNode,
        AttributeError,
        r"'QIFNode'; did you mean 'IFNode'.*keeps its import, spikingjelly\.activation_based\.neuron",
    ),
    "an older neuron": (lambda: neuron.MultiStepLIFNode, AttributeError, r"is LIFNode\(\.\.\., step_mode='m'\)"),
    "SpikingJelly's layer": (
        lambda: layer.SynapseFilter,
        AttributeError,
        r"import, spikingjelly\.activation_based\.layer",
    ),
    "SpikingJelly's surrogate": (lambda: surrogate.S2NN, AttributeError, r"spikingjelly\.activation_based\.surrogate"),
    "SpikingJelly's function": (lambda: functional.if_step, AttributeError, r"did you mean .*'if_multi_step'.*\? What"),
    "net": (lambda: functional.reset_net("net"), TypeError, r"net must be"),
    "memory name": (lambda: snnfast.IFNode().register_memory("v", 0), ValueError, r"name .*'v'"),
    "module's device": (
        lambda: snnfast.ParametricLIFNode(step_mode="m")(X.to("meta")),
        ValueError,
        r"x_seq .*cpu.*meta",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_refused_with_the_arguments_name_and_the_remedy(case, monkeypatch):
    call, error, message = CASES[case]
    with pytest.raises(error, match=message):
        call()


def test_numbers_in_tensors_are_read_at_each_call():
    threshold = torch.tensor(1.0)
    for value in (1.0, 3.0, 0.5):
        threshold.fill_(value)
        want, *_ = functional.if_multi_step(X.abs(), v_threshold=value)
        assert torch.equal(functional.if_multi_step(X.abs(), v_threshold=threshold)[0], want)


def test_numbers_of_numpy_are_numbers():
    node = snnfast.LIFNode(
        np.float32(2.5), True, np.int64(1), np.float16(0.25), surrogate.ATan(np.float32(3)), timesteps=np.int64(2)
    )
    plain = snnfast.LIFNode(2.5, True, 1.0, 0.25, surrogate.ATan(3.0), timesteps=2)
    assert repr(node) == repr(plain)
    assert {type(v) for v in (node.tau, node.v_threshold, node.v_reset, node.surrogate_function.alpha)} == {float}
    assert type(node.timesteps) is int
    assert torch.equal(functional.lif_multi_step(X, tau=np.float32(3))[1], functional.lif_multi_step(X, tau=3.0)[1])
    with pytest.raises(TypeError, match="v_threshold must be a number"):
        snnfast.IFNode(np.bool_(True))
    assert type(neuron.LI(timesteps=np.int64(2)).timesteps) is int
    assert encoding.poisson(X, np.int64(3)).shape == (3, *X.shape)
    assert snnfast.unroll(snnfast.IFNode(), X[0], np.int64(3)).shape == (3, *X.shape[1:])
    converted = snnfast.to_spiking(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU()), np.int64(4))
    assert type(converted.timesteps) is int
    assert type(distill.TemporalSelfKD(np.int64(4), np.int64(2)).timesteps_student) is int
    with pytest.raises(ValueError, match="timesteps must be a whole number from 1"):
        encoding.poisson(X, np.bool_(True))


def test_the_notice_of_a_plain_loop_names_an_autograd_function_not_its_apply():
    class Half(torch.autograd.Function):
        @staticmethod
        def forward(ctx, u):
            return (u >= 0).to(u)

    with pytest.warns(UserWarning, match=r"surrogate Half\.apply is not one of"):
        snnfast.IFNode(surrogate_function=Half.apply)(X)


@pytest.mark.parametrize("store_v_seq", [False, True])
def test_spikes_without_a_derivative_fail_in_the_backward_as_in_a_loop(store_v_seq):
    x = X.clone().requires_grad_()
    s, v, v_seq = functional.if_multi_step(x, surrogate_function=surrogate.heaviside, store_v_seq=store_v_seq)
    with pytest.raises(RuntimeError, match="does not require grad"):
        s.sum().backward()
    (v if v_seq is None else v_seq).sum().backward()
    assert x.grad is not None


def test_an_explicit_backend_never_falls_back():
    class Own(surrogate.SurrogateFunction):
        def derivative(self, u):
            return u

    if snnfast.functional.backends.native.missing(X.device) is not None:
        pytest.skip("the native backend is not built here")
    with pytest.raises(ValueError, match="surrogate Own"):
        functional.if_multi_step(X, surrogate_function=Own(), backend="native")


@pytest.mark.parametrize("beta", [0.5, 0.9])
def test_the_translation_of_a_decay_is_the_same_decay(beta):
    with pytest.raises(TypeError) as error:
        snnfast.LIFNode(beta=beta)
    tau = float(re.search(r"= ([\d.]+), decay_input=False", str(error.value)).group(1))
    node = snnfast.LIFNode(tau=tau, decay_input=False, v_threshold=100.0, step_mode="m")
    node(torch.tensor([[1.0], [0.25]]))
    torch.testing.assert_close(node.v, torch.tensor([beta + 0.25]))


def test_constructors_stay_inspectable_and_copies_exact():
    parameters = inspect.signature(snnfast.LIFNode).parameters
    assert list(parameters)[:3] == ["tau", "decay_input", "v_threshold"]
    assert parameters["tau"].default == 2.0
    for node in (snnfast.LIFNode(3.0, timesteps=2), snnfast.IFNode(0.5), snnfast.ParametricLIFNode(), neuron.LI(4.0)):
        for made in (copy.deepcopy(node), pickle.loads(pickle.dumps(node))):
            assert type(made) is type(node)
            assert repr(made) == repr(node)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("LifNode", "did you mean 'LIFNode'"),
        ("reset_net", r"it is snnfast\.functional\.reset_net"),
        ("ATan", r"it is snnfast\.surrogate\.ATan"),
        ("to_spikng", "did you mean 'to_spiking'"),
    ],
)
def test_names_that_the_package_has_not(name, told):
    with pytest.raises(AttributeError, match=told):
        getattr(snnfast, name)


def test_functions_say_what_they_take():
    with pytest.raises(TypeError, match="unroll takes no argument 'T': the number of time steps is timesteps"):
        snnfast.unroll(snnfast.IFNode(), X, T=4)
    with pytest.raises(TypeError, match="chunked takes no argument 'chunk_size'; did you mean 'chunk'"):
        snnfast.chunked(snnfast.IFNode(step_mode="m"), X, chunk_size=4)
    with pytest.raises(TypeError, match=r"run must be a function of the model and x, got Tensor.*run=lambda model, x"):
        snnfast.verify(snnfast.IFNode(), X, X)


def test_notices_point_at_the_users_line(monkeypatch):
    monkeypatch.setattr(_notices, "_said", set())
    with pytest.warns(UserWarning, match="backend='cupy'") as found:
        torch.nn.Sequential(snnfast.IFNode(step_mode="m", backend="cupy"))
    assert found[0].filename == __file__
