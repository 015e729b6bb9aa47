"""Every neuron of the registry on every backend against the plain loop: spikes and states bit for bit, gradients
against the loop in float64."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from conftest import flat, kernel_backends, learnable, loop, on, own_parameters, start, variants

from snnfast import dynamics, functional, surrogate
from snnfast.dynamics import NEURONS

RESETS = {"hard": 0.125, "hard0": 0.0, "soft": None}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPES = [(1, 1), (4, 33), (7, 2, 3, 5), (8, 1025), (33, 17), (4, 40000)]


@pytest.mark.parametrize(("backend", "device"), kernel_backends())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("neuron", NEURONS, ids=lambda n: n.name)
def test_forward_has_the_loops_bits(backend, device, dtype, reset, neuron):
    kinds = itertools.cycle(("one", "each", "channel") if neuron.own else ("one",))
    begins = itertools.cycle(("number", "tensor"))
    for (shape, variant), kind, begin in zip(itertools.product(SHAPES, variants(neuron)), kinds, begins, strict=False):
        drive = 4.0 if neuron is dynamics.EXPONENTIAL_LIF else 1.5
        x = (torch.randn(shape, dtype=torch.float64) * drive).to(dtype)
        state = start(neuron, shape[1:], dtype) if begin == "tensor" else (0.25, 0.0)[: len(neuron.states)]
        state = state[0] if isinstance(state, tuple) and len(neuron.states) == 1 else state
        own = own_parameters(neuron, shape[1:], dtype, kind)
        kwargs = {"v_threshold": 0.9, "v_reset": RESETS[reset], **variant}
        want = loop(neuron, x, state, learnable(neuron, "cpu", dtype), own, **kwargs)
        got = functional.multi_step(
            neuron,
            x.to(device),
            on(device, state),
            learnable(neuron, device, dtype),
            on(device, own),
            store_v_seq=True,
            backend=backend,
            **kwargs,
        )
        assert want[0].float().mean() > 0.02 or x.numel() < 50, "the test must fire to mean something"
        for g, w in zip(flat(*got), flat(*want), strict=True):
            assert g.dtype == w.dtype
            assert torch.equal(g.cpu(), w), (shape, kwargs, kind, begin)


@pytest.mark.parametrize(("backend", "device"), kernel_backends())
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("neuron", NEURONS, ids=lambda n: n.name)
def test_comparison_at_the_threshold(backend, device, strict, neuron):
    x = (torch.randn(20, 640) * 4).round() / 4  # a grid, on which the threshold lies
    state = start(neuron, (640,), x.dtype, 0.0)
    own = tuple(torch.tensor({"threshold": 1.0, "beta": 0.5, "current_decay": 0.5}[name]) for name in neuron.own)
    decay = torch.tensor(0.5) if neuron.learnable else None
    kwargs = {"v_threshold": 1.0, "v_reset": 0.0, "decay_input": False}
    want = loop(neuron, x, state, decay, own, strict=strict or neuron.strict, **kwargs)
    other = loop(neuron, x, state, decay, own, strict=not strict, **kwargs)
    got = functional.multi_step(
        neuron,
        x.to(device),
        on(device, state),
        on(device, decay),
        on(device, own),
        strict=strict,
        backend=backend,
        **kwargs,
    )
    assert torch.equal(got[0].cpu(), want[0])
    assert neuron.strict or not torch.equal(want[0], other[0]), "no potential hit the threshold"


def gradients(outputs, weights, inputs):
    loss = sum((o.to(w.dtype) * w).sum() for o, w in zip(outputs, weights, strict=True) if w is not None)
    return torch.autograd.grad(loss, inputs, allow_unused=True)


@pytest.mark.parametrize(("backend", "device"), kernel_backends())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("detach_reset", [False, True], ids=["bptt", "detach"])
@pytest.mark.parametrize("reset", ["hard", "soft"])
@pytest.mark.parametrize("neuron", NEURONS, ids=lambda n: n.name)
def test_gradients_match_the_loop_in_float64(backend, device, dtype, detach_reset, reset, neuron):
    compared = 0
    subsets = [(1, 1, 1, 1), (1, 0, 0, 0), (0, 1, 0, 1), (0, 0, 1, 0), (1, 0, 1, 1)]
    cases = itertools.product([(1, 3), (4, 33), (16, 65), (5, 2, 7), (40, 9)], variants(neuron)[:2], subsets)
    kinds = itertools.cycle(("one", "each", "channel") if neuron.own else ("one",))
    for (shape, variant, subset), surrogate_kind, kind in zip(cases, itertools.cycle(surrogate.SURROGATES), kinds):
        x = (torch.randn(shape, dtype=torch.float64) * 1.2).to(dtype)
        state = start(neuron, shape[1:], dtype, 0.5)
        own = own_parameters(neuron, shape[1:], dtype, kind)
        kwargs = {
            "v_threshold": 0.875,
            "v_reset": RESETS[reset],
            "detach_reset": detach_reset,
            "surrogate_function": surrogate.Scaled(surrogate_kind(), 1.5),
            **variant,
        }
        shapes = [shape, *(shape[1:] for _ in neuron.states), shape]
        chosen = [subset[0], *subset[1 : 1 + len(neuron.states)], subset[3] or not any(subset[:2])]
        weights = [torch.randn(s, dtype=torch.float64) if w else None for s, w in zip(shapes, chosen, strict=True)]
        weights[0] = None if weights[0] is None else weights[0].to(dtype).double()  # a spike's gradient has its dtype

        def run(function, x, state, decay, own, leaf, kwargs=kwargs):
            """Outputs, and the tensors to differentiate by."""
            x, state, decay, own = (
                type(t)(map(leaf, t)) if isinstance(t, tuple) else t if t is None else leaf(t)
                for t in (x, state, decay, own)
            )
            return flat(*function(neuron, x, state, decay, own, store_v_seq=True, **kwargs)), flat(x, state, decay, own)

        # A spike may flip between the float32 and the float64 trajectory: compare where none does.
        want, inputs = run(
            loop, x, state, learnable(neuron, "cpu", torch.float64), own, lambda t: t.double().requires_grad_()
        )
        here = loop(neuron, x, state, learnable(neuron, "cpu", dtype), own, **kwargs)[0]
        if not torch.equal(want[0], here.double()):
            continue
        compared += 1
        want = gradients(want, weights, inputs)

        k = learnable(neuron, device, dtype)
        got, inputs = run(
            functools.partial(functional.multi_step, backend=backend),
            x.to(device), on(device, state), k, on(device, own), lambda t: t.detach().requires_grad_(),
        )  # fmt: skip
        got = gradients(got, [w if w is None else w.to(device) for w in weights], inputs)
        tolerance = {torch.float32: 1e-5, torch.float64: 1e-11, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
        names = ["x", *neuron.states, *(["decay"] if k is not None else []), *neuron.own]
        for name, g, w in zip(names, got, want, strict=True):
            if w is None:
                assert g is None or not g.any(), name
                continue
            summed = name == "decay" or (name in neuron.own and kind != "each")  # sums cancel
            scale = w.abs().max().clamp(min=1.0 if summed else 1e-3)
            state_tolerance = tolerance if name == "x" or dtype == torch.float64 else 5e-5 if summed else 1e-5
            error = (g.double().cpu() - w).abs().max() / scale
            assert error < state_tolerance, (name, shape, subset, surrogate_kind.__name__, kwargs, float(error))
    assert compared > 25, f"spikes flipped between float32 and float64 nearly everywhere ({compared} compared)"


@pytest.mark.parametrize(("backend", "device"), kernel_backends())
def test_extreme_inputs_pass_through_as_in_the_loop(backend, device):
    special = [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 3e38, -3e38, 1e-30, 1e-37, 1.0]
    x = torch.tensor(list(itertools.product(special, repeat=3)), dtype=torch.float32).T.contiguous()
    kinds = [(neuron, {}) for neuron in NEURONS] + [(dynamics.EXPONENTIAL_LIF, {"multi_spike": True})]
    for (neuron, kind), reset, tau, decay_input in itertools.product(kinds, RESETS.values(), (2.0, 3.0), (True, False)):
        kwargs = {"tau": tau, "decay_input": decay_input, "v_threshold": 1.0, "v_reset": reset} | kind
        own = own_parameters(neuron, x.shape[1:], x.dtype)
        state = 0.0 if len(neuron.states) == 1 else (0.0, 0.0)
        want = loop(neuron, x, state, learnable(neuron, "cpu", x.dtype), own, strict=bool(neuron.own), **kwargs)
        decay = learnable(neuron, device, x.dtype)
        if neuron is dynamics.EXPONENTIAL_LIF:
            want = loop(neuron, x, state, None, own, **kwargs)
        got = functional.multi_step(
            neuron, x.to(device), state, decay, on(device, own), store_v_seq=True, backend=backend, **kwargs
        )
        for g, w in zip(flat(*got), flat(*want), strict=True):
            # The one exception of the contract: the CPU kernels flush numbers below 2^-126 to zero.
            same = (g.cpu() == w) | (g.cpu().isnan() & w.isnan()) | ((g.cpu() - w).abs() < 2.0**-125)
            assert bool(same.all()), (neuron.name, kwargs)


def gradients_at_any_potential(backend, device, dtype):
    """Of spikes at potentials up to the largest finite ones, by each surrogate: the kernel's and the loop's."""
    size = torch.logspace(-3, 38, 1000, dtype=torch.float64)
    for kind in surrogate.SURROGATES:
        found = []
        for run, at in ((backend, device), ("reference", "cpu")):
            x = torch.cat((size, -size)).to(at, dtype).unsqueeze(0).requires_grad_()
            s, *_ = functional.if_multi_step(x, surrogate_function=kind(), detach_reset=True, backend=run)
            s.sum().backward()
            found.append(x.grad.cpu())
        yield kind.__name__, *found


@pytest.mark.parametrize(("backend", "device"), kernel_backends())
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_gradients_at_any_potential(backend, device, dtype):
    for name, got, want in gradients_at_any_potential(backend, device, dtype):
        assert torch.allclose(got, want, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6), name


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


@pytest.mark.parametrize(("backend", "device"), kernel_backends())
def test_parameters_with_more_dimensions_than_a_step(backend, device):
    x = torch.randn(6, device=device, requires_grad=True)
    own = tuple(torch.tensor([value], device=device, requires_grad=True) for value in (0.5, 0.75))
    s, v, _ = functional.multi_step(dynamics.LEAKY, x, 0.0, None, own, backend=backend)
    grads = torch.autograd.grad(s.sum() + v, [x, *own])
    assert [g.shape for g in grads] == [(6,), (1,), (1,)]


@pytest.mark.parametrize("neuron", [n for n in NEURONS if not n.own], ids=lambda n: n.name)
def test_strict_comparison_with_a_threshold_of_zero(neuron):
    decay = torch.tensor(0.5) if neuron.learnable else None
    x = torch.tensor([[0.0, -0.0, 1e-30, -1.0, 1.0]])
    s, _, _ = functional.multi_step(neuron, x, 0.0, decay, v_threshold=0.0, strict=True)
    assert s[0].tolist() == [0.0, 0.0, 1.0, 0.0, 1.0]


def test_several_spikes_of_a_neuron_that_has_no_kernel_for_them():
    x = torch.full((2, 3), 2.5)
    for neuron in (dynamics.IF, dynamics.EXPONENTIAL_LIF):
        own = tuple(torch.tensor(1.0) for _ in neuron.own)
        s, v, _ = functional.multi_step(neuron, x, 0.0, None, own, v_reset=None, decay_input=False, multi_spike=True)
        assert s[0].tolist() == [2.0, 2.0, 2.0], neuron.name
        assert torch.equal(v, torch.zeros(3)), neuron.name


def test_a_scaled_surrogate_follows_the_one_it_scales():
    inner = surrogate.ATan(2.0)
    scaled = surrogate.Scaled(inner, 3.0)
    inner.alpha = 7.0
    grads = []
    for backend in ("auto", "reference"):
        x = torch.linspace(-1, 2, 20).view(2, 10).requires_grad_()
        s, _, _ = functional.if_multi_step(x, surrogate_function=scaled, backend=backend)
        grads.append(torch.autograd.grad(s.sum(), x)[0])
    assert torch.allclose(*grads, rtol=1e-5)
