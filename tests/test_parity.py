"""Every neuron of the registry on every backend against the plain loop: spikes and states bit for bit, gradients
against the loop in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import kernel_backends

from snnfast import dynamics, functional, surrogate
from snnfast.dynamics import NEURONS

RESETS = {"hard": 0.125, "hard0": 0.0, "soft": None}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPES = [(1, 1), (4, 33), (7, 2, 3, 5), (8, 1025), (33, 17), (4, 40000)]
TAUS = (2.0, 3.0, 1.7)


def learnable(neuron, device, dtype):
    if not neuron.learnable:
        return None
    return torch.tensor(0.375, dtype=dynamics.state_dtype(dtype), device=device)


def loop(neuron, x, v, decay, *, v_reset, store_v_seq=True, surrogate_function=None, **kwargs):
    """The truth: the plain loop on the CPU, for float32 in float32."""
    parameters = dynamics.Parameters(
        kwargs["v_threshold"],
        v_reset,
        surrogate_function or surrogate.ATan(),
        kwargs.get("tau", 2.0),
        decay,
        kwargs.get("decay_input", True),
        kwargs.get("detach_reset", False),
    )
    return dynamics.multi_step(neuron, x, v, parameters, store_v_seq)


@pytest.mark.parametrize(("backend", "device"), kernel_backends())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("neuron", NEURONS, ids=lambda n: n.name)
def test_forward_has_the_loops_bits(backend, device, dtype, reset, neuron):
    for shape, decay_input, tau, start in itertools.product(SHAPES, (True, False), TAUS, ("number", "tensor")):
        if neuron is not dynamics.LIF and tau != TAUS[0]:
            continue
        x = (torch.randn(shape, dtype=torch.float64) * 1.5).to(dtype)
        v = 0.25 if start == "number" else torch.randn(shape[1:], dtype=dynamics.state_dtype(dtype))
        kwargs = {"tau": tau, "decay_input": decay_input, "v_threshold": 0.9, "v_reset": RESETS[reset]}
        decay = learnable(neuron, "cpu", dtype)
        want = loop(neuron, x, v, decay, **kwargs)
        got = functional.multi_step(
            neuron,
            x.to(device),
            v.to(device) if isinstance(v, torch.Tensor) else v,
            learnable(neuron, device, dtype),
            store_v_seq=True,
            backend=backend,
            **kwargs,
        )
        assert want[0].float().mean() > 0.02 or x.numel() < 50, "the test must fire to mean something"
        for name, g, w in zip(("spikes", "final state", "v_seq"), got, want, strict=True):
            assert g.dtype == w.dtype
            assert torch.equal(g.cpu(), w), (name, shape, kwargs, start)


def gradients(outputs, weights, inputs):
    loss = sum((o.to(w.dtype) * w).sum() for o, w in zip(outputs, weights, strict=True) if w is not None)
    return torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize(("backend", "device"), kernel_backends())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("detach_reset", [False, True], ids=["bptt", "detach"])
@pytest.mark.parametrize("reset", ["hard", "soft"])
@pytest.mark.parametrize("neuron", NEURONS, ids=lambda n: n.name)
def test_gradients_match_the_loop_in_float64(backend, device, dtype, detach_reset, reset, neuron):
    compared = 0
    subsets = [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1)]
    for (shape, decay_input, subset), kind in zip(
        itertools.product([(1, 3), (4, 33), (16, 65), (5, 2, 7), (40, 9)], (True, False), subsets),
        itertools.cycle(surrogate.SURROGATES),
    ):
        x = (torch.randn(shape, dtype=torch.float64) * 1.2).to(dtype)
        v = torch.randn(shape[1:], dtype=dynamics.state_dtype(dtype)) * 0.5
        kwargs = {
            "tau": 3.0,
            "decay_input": decay_input,
            "v_threshold": 0.875,
            "v_reset": RESETS[reset],
            "detach_reset": detach_reset,
            "surrogate_function": kind(),
        }
        weights = [
            torch.randn(s, dtype=torch.float64) if on else None
            for s, on in zip((shape, shape[1:], shape), subset, strict=True)
        ]
        weights[0] = None if weights[0] is None else weights[0].to(dtype).double()  # a spike's gradient has its dtype

        decay = learnable(neuron, "cpu", torch.float64)
        inputs = [t.double().requires_grad_() for t in (x, v)] + ([decay.requires_grad_()] if decay is not None else [])
        # A spike may flip between the float32 and the float64 trajectory: compare where none does.
        want_s, *rest = loop(neuron, inputs[0], inputs[1], decay, **kwargs)
        reference_s = loop(neuron, x, v, learnable(neuron, "cpu", dtype), **kwargs)[0]
        same = (want_s == reference_s.double()).flatten(1).all(0)
        if not bool(same.all()):
            continue
        compared += 1
        want = gradients((want_s, *rest), weights, inputs)

        given = [x.to(device).requires_grad_(), v.to(device).requires_grad_()]
        k = learnable(neuron, device, dtype)
        if k is not None:
            given.append(k.requires_grad_())
        out = functional.multi_step(neuron, given[0], given[1], k, store_v_seq=True, backend=backend, **kwargs)
        got = gradients(out, [w if w is None else w.to(device) for w in weights], given)
        tolerance = {torch.float32: 1e-5, torch.float64: 1e-11, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
        for name, g, w in zip(("x", "v", "decay"), got, want, strict=False):
            scale = w.abs().max().clamp(min=1.0 if name == "decay" else 1e-3)  # a sum over all, with cancellation
            state_tolerance = tolerance if name == "x" or dtype == torch.float64 else 1e-5
            error = (g.double().cpu() - w).abs().max() / scale
            assert error < state_tolerance, (name, shape, subset, kind.__name__, kwargs, float(error))
    assert compared > 40, "spikes flipped between float32 and float64 nearly everywhere"


@pytest.mark.parametrize(("backend", "device"), kernel_backends())
def test_extreme_inputs_pass_through_as_in_the_loop(backend, device):
    special = [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 3e38, -3e38, 1e-30, 1e-37, 1.0]
    x = torch.tensor(list(itertools.product(special, repeat=3)), dtype=torch.float32).T.contiguous()
    for neuron, reset, tau, decay_input in itertools.product(NEURONS, RESETS.values(), (2.0, 3.0), (True, False)):
        kwargs = {"tau": tau, "decay_input": decay_input, "v_threshold": 1.0, "v_reset": reset}
        want = loop(neuron, x, 0.0, learnable(neuron, "cpu", x.dtype), **kwargs)
        decay = learnable(neuron, device, x.dtype)
        got = functional.multi_step(neuron, x.to(device), 0.0, decay, store_v_seq=True, backend=backend, **kwargs)
        for g, w in zip(got, want, strict=True):
            # The one exception of the contract: the CPU kernels flush numbers below 2^-126 to zero.
            same = (g.cpu() == w) | (g.cpu().isnan() & w.isnan()) | ((g.cpu() - w).abs() < 2.0**-125)
            assert bool(same.all()), (neuron.name, kwargs)


@pytest.mark.parametrize(("backend", "device"), kernel_backends())
@pytest.mark.parametrize("T", [1, 2, 31, 32, 64, 511, 512, 513, 1100])
def test_long_and_short_sequences(backend, device, T):
    if backend == "triton" and device == "cpu" and T > 64:
        pytest.skip("Triton's interpreter is too slow for long sequences; tests/test_triton_interpreter.py covers them")
    x = torch.randn(T, 5) * 0.8
    want_x = x.double().requires_grad_()
    w = torch.randn(T, 5)
    decay = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    kwargs = {"v_threshold": 0.7, "v_reset": 0.0, "surrogate_function": surrogate.ATan()}
    s, v, _ = loop(dynamics.PARAMETRIC_LIF, want_x, 0.0, decay, **kwargs)
    want = torch.autograd.grad((s * w).sum() + v.sum(), [want_x, decay])
    given, k = x.to(device).requires_grad_(), torch.tensor(0.4, device=device, requires_grad=True)
    s2, v2, _ = functional.multi_step(dynamics.PARAMETRIC_LIF, given, 0.0, k, backend=backend, **kwargs)
    assert torch.equal(s2.cpu(), loop(dynamics.PARAMETRIC_LIF, x, 0.0, k.detach().cpu(), **kwargs)[0])
    got = torch.autograd.grad((s2 * w.to(device)).sum() + v2.sum(), [given, k])
    if torch.equal(s.float(), s2.cpu()):
        assert torch.allclose(got[0].cpu().double(), want[0], rtol=1e-4, atol=1e-6)
        assert torch.allclose(got[1].cpu().double(), want[1], rtol=1e-4)


@pytest.mark.parametrize(("backend", "device"), kernel_backends())
def test_learnable_gradient_is_deterministic_in_bits(backend, device):
    x = torch.randn(4, 70001, device=device)
    k = torch.tensor(0.4, device=device, requires_grad=True)
    seen = set()
    for threads in (1, 2, torch.get_num_threads()):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        s, _, _ = functional.multi_step(dynamics.PARAMETRIC_LIF, x, 0.0, k, backend=backend)
        seen.add(torch.autograd.grad(s.sum(), k)[0].item())
        torch.set_num_threads(before)
    assert len(seen) == 1, seen
