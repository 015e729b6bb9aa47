"""What is particular to the compiled CPU kernels: each instruction set, streaming stores, denormals, threads, forks,
exact division."""

from __future__ import annotations

import functools
import itertools
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import flat, learnable, loop, own_parameters, start, variants
from hypothesis import given, settings
from hypothesis import strategies as st
from test_parity import gradients, gradients_at_any_potential

from snnfast import constant_input, dynamics, functional, surrogate
from snnfast.dynamics import NEURONS

_C = pytest.importorskip("snnfast._C", reason="the compiled extension is not built here")


@pytest.fixture(params=["cached", "streamed"])
def stores(request):
    before = _C.stream_stores_from()
    _C.set_stream_stores_from(0 if request.param == "streamed" else 2**60)
    yield request.param
    _C.set_stream_stores_from(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_every_set_and_store_has_the_loops_bits_and_gradients(cpu_set, stores, dtype):
    for neuron in NEURONS:
        for shape, (tau, v_reset) in itertools.product([(4, 1), (5, 67), (17, 2051)], [(3.0, 0.125), (2.0, None)]):
            kwargs = {"v_threshold": 0.875, "v_reset": v_reset, **variants(neuron)[-1]}
            kwargs |= {"tau": tau, "strict": False} if neuron is dynamics.LIF else {}
            drive = 4.0 if neuron is dynamics.EXPONENTIAL_LIF else 1.5
            x = (torch.randn(shape, dtype=torch.float64) * drive).to(dtype)
            state = start(neuron, shape[1:], dtype)
            own = own_parameters(neuron, shape[1:], dtype, "each")

            def run(function, x=x, state=state, own=own, neuron=neuron, kwargs=kwargs):
                x, k = x.clone().requires_grad_(), learnable(neuron, "cpu", dtype)
                state, own = (tuple(t.clone().requires_grad_() for t in flat(ts)) for ts in (state, own))
                k = k if k is None else k.requires_grad_()
                outputs = function(neuron, x, state if len(state) > 1 else state[0], k, own, store_v_seq=True, **kwargs)
                return flat(*outputs), flat(x, state, k, own)

            got, inputs = run(functools.partial(functional.multi_step, surrogate_function=surrogate.ATan()))
            want, loop_inputs = run(loop)
            for g, w in zip(got, want, strict=True):
                assert torch.equal(g, w)
            weights = [torch.randn_like(o) for o in want]
            tolerance = {2: 2e-2, 4: 1e-4, 8: 1e-10}[dtype.itemsize]
            found = gradients(got, weights, inputs), gradients(want, weights, loop_inputs)
            for g, w in zip(*found, strict=True):
                g, w = (torch.zeros(()) if t is None else t for t in (g, w))
                assert (g - w).abs().max() <= tolerance * w.abs().max().clamp(min=1.0), neuron.name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients_at_any_potential(cpu_set, dtype):
    for name, got, want in gradients_at_any_potential("native", "cpu", dtype):
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("neuron", NEURONS, ids=lambda n: n.name)
def test_one_step_is_what_the_rows_compute(cpu_set, neuron):
    """Float32 calls of one step have loops of their own; with potentials wanted, they take those of any T."""
    rates = []
    tau = {"tau": 3.0} if neuron is dynamics.LIF else {}
    cases = itertools.product(surrogate.SURROGATES, (7, 1003, 40_007), ("each", "one"))
    for index, (kind, N, own_kind) in enumerate(cases):
        kwargs = {**variants(neuron)[index % len(variants(neuron))], **tau, "v_reset": (None, 0.0, 0.125)[index % 3]}
        kwargs |= {"v_threshold": 0.75, "detach_reset": bool(index % 2), "surrogate_function": kind()}
        given_states = index % 5 > 0
        found = []
        for store_v_seq in (False, True):
            torch.manual_seed(index)
            x, states = (
                torch.randn(1, N).requires_grad_(),
                tuple(torch.randn(N).requires_grad_() for _ in neuron.states),
            )
            own = own_parameters(neuron, (N,), torch.float32, own_kind)
            own = tuple(t.clone().requires_grad_() for t in flat(own))
            k = learnable(neuron, "cpu", torch.float32)
            k = k if k is None else k.requires_grad_()
            start = states if given_states else (0.25, 0.0)[: len(states)]
            state = start if len(states) > 1 else start[0]
            s, after, v_seq = functional.multi_step(neuron, x, state, k, own, store_v_seq=store_v_seq, **kwargs)
            outputs = flat(s, after)
            weights = [torch.randn_like(o) for o in outputs]
            if index % 3 == 1:  # the spikes have no gradient
                weights[0] = None
            elif index % 3 == 2:  # only they have
                weights[1:] = [None] * (len(weights) - 1)
            pairs = [(o, w) for o, w in zip(outputs, weights, strict=True) if w is not None]
            if store_v_seq:
                pairs.append((v_seq, torch.zeros_like(v_seq)))
            inputs = flat(x, states if given_states else (), k, own)
            outputs, weights = zip(*pairs, strict=True)
            found.append((s, *flat(after), *torch.autograd.grad(outputs, inputs, weights, allow_unused=True)))
        rates.append(found[0][0].mean().item())
        for got, want in zip(*found, strict=True):
            if got is None or want is None:
                assert got is None or not got.any()
                assert want is None or not want.any()
            elif got.numel() > 1:
                assert torch.equal(got, want)
            else:  # sums over all neurons
                assert torch.allclose(got, want, rtol=1e-4, atol=1e-3)
    assert 0.01 < sum(rates) / len(rates) < 0.9


@pytest.mark.parametrize("T", [2, 4, 7, 16])
def test_constant_input_is_a_repeated_one(cpu_set, stores, T):
    kinds = itertools.product((dynamics.IF, dynamics.LIF, dynamics.PARAMETRIC_LIF), surrogate.SURROGATES)
    for index, (neuron, kind) in enumerate(kinds):
        torch.manual_seed(index)
        shape = [(3, 5, 6, 7), (1003,), (16, 64, 8, 8)][index % 3]
        x = torch.randn(shape)
        if len(shape) == 4 and index % 2:
            x = x.contiguous(memory_format=torch.channels_last)
        options = {"v_reset": (None, 0.0, 0.125)[index % 3], "v_threshold": 0.5, "detach_reset": bool(index % 2)}
        options |= {"tau": 3.0 if index % 4 else 2.0}
        v0, decay = torch.randn(shape), torch.tensor(0.375)
        v0 = v0 if index % 4 else None
        constants = functional.constants_of(neuron, kind(), 0.25, **options)
        weights = torch.randn(T, *shape), torch.randn(shape)
        results = []
        for constant in (True, False):
            given = [t.clone().requires_grad_() for t in (x, v0, decay) if t is not None]
            a, b, k = given[0], given[1] if v0 is not None else None, given[-1]
            k = k if neuron.learnable else None
            if constant:
                assert constant_input.serves(a, T)
                s, v = constant_input.multi_step(a, T, b, k, constants)
            else:
                state = 0.25 if b is None else b
                s, v, _ = functional.multi_step(
                    neuron, a.expand(T, *shape), state, k, surrogate_function=kind(), **options
                )
            outputs = [((s, v), weights), ((s,), weights[:1]), ((v,), weights[1:])][index % 3]
            inputs = [t for t in (a, b, k) if t is not None]
            grads = torch.autograd.grad(outputs[0], inputs, outputs[1], create_graph=index % 5 == 4)
            again = torch.autograd.grad(grads[0].square().sum(), inputs, allow_unused=True) if index % 5 == 4 else ()
            results.append((s, v, *grads, *again))
        assert 0.01 < results[0][0].mean() < 0.99
        assert results[0][0].stride()[1:] == x.stride()
        for k, (got, want) in enumerate(zip(*results, strict=True)):
            if k < 2:
                assert torch.equal(got, want)
            elif got is not None or want is not None:
                scale = want.abs().max().clamp(min=1.0)
                assert (got - want).abs().max() <= (1e-6 if want.numel() > 1 else 1e-4) * scale
    assert not constant_input.serves(x, 17)
    assert not constant_input.serves(x.bfloat16(), 4)
    assert not constant_input.serves(torch.randn(4, 6)[:, ::2], 4)


@settings(max_examples=60)
@given(
    T=st.integers(1, 70),
    shape=st.lists(st.integers(1, 50), min_size=1, max_size=3),
    tau=st.floats(1.001, 1e4),
    threshold=st.floats(-2.0, 3.0),
    v_reset=st.one_of(st.none(), st.floats(-1.0, 1.0, width=32, allow_subnormal=False)),
    scale=st.floats(1e-6, 1e6),
    neuron=st.sampled_from(NEURONS),
    decay_input=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_fuzz_forward_bits(T, shape, tau, threshold, v_reset, scale, neuron, decay_input, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(T, *shape, generator=generator) * scale
    kwargs = {"tau": tau, "v_threshold": threshold, "v_reset": v_reset, "decay_input": decay_input}
    kwargs |= {"strict": True} if neuron.own and neuron is not dynamics.EXPONENTIAL_LIF else {}
    state = 0.0 if len(neuron.states) == 1 else (0.0, 0.0)
    own = own_parameters(neuron, shape, x.dtype, ("one", "each", "channel")[seed % 3])
    want = loop(neuron, x, state, learnable(neuron, "cpu", x.dtype), own, **kwargs)
    got = functional.multi_step(
        neuron, x, state, learnable(neuron, "cpu", x.dtype), own, store_v_seq=True, backend="native", **kwargs
    )
    for g, w in zip(flat(*got), flat(*want), strict=True):
        assert torch.equal(g, w)


def test_division_is_exact_for_many_time_constants():
    taus = [1.0 + i * 0.137 for i in range(1, 200)] + [1e3, 12345.678, 9.99e5]
    tested = 0
    for tau in taus:
        tau32 = torch.tensor(tau).item()
        x = torch.randn(1, 4096) * torch.logspace(-30, 30, 4096)
        _, v, _ = functional.lif_multi_step(x, 0.0, tau32, v_threshold=float("inf"), backend="native")
        tested += _C.corrected_division_is_exact(tau32)
        tiny = (x / tau32).abs() < 2.0**-126
        assert torch.equal(v[~tiny[0]], (x / tau32)[0][~tiny[0]]), tau
    if _C.cpu_set() != "baseline":
        assert tested > 150, "the fast division was hardly used"


def test_denormals_are_flushed_and_the_callers_mode_is_kept():
    tiny = torch.tensor([1e-40])
    assert (tiny * 0.5).item() != 0.0
    x = torch.cat([torch.full((1, 64), 1.0), torch.zeros(400, 64)])
    _, v, _ = functional.lif_multi_step(x, 0.0, 2.0, v_threshold=100.0, backend="native")
    assert bool((v <= 2.0**-126).all())
    functional.lif_multi_step(torch.randn(4, 100_000), backend="native")
    assert (tiny * 0.5).item() != 0.0, "flush-to-zero leaked out of the kernel"
    assert bool((torch.full((200_000,), 1e-40) * 0.5 != 0).all()), "flush-to-zero leaked out of a kernel's thread"


def test_results_do_not_depend_on_the_number_of_threads():
    x = torch.randn(6, 123_457)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        given = x.clone().requires_grad_()
        s, v, _ = functional.lif_multi_step(given, 0.0, 3.0, backend="native")
        results.append((s.detach(), v.detach(), torch.autograd.grad((s * x).sum(), given)[0]))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_small_calls_survive_a_fork():
    code = """
import os, torch, snnfast
x = torch.randn(4, 1000)
snnfast.functional.lif_multi_step(torch.randn(4, 100_000))
child = os.fork()
if child == 0:
    snnfast.functional.lif_multi_step(x)
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_sets_contain_packed_arithmetic_of_their_width():
    objdump = shutil.which("objdump")
    if objdump is None:
        pytest.skip("objdump is not installed")
    text = subprocess.run([objdump, "-d", "--no-show-raw-insn", _C.__file__], capture_output=True, text=True).stdout
    for name, register in (("avx512", "zmm"), ("avx2", "ymm"), ("baseline", "xmm")):
        if name in _C.cpu_sets():
            packed = len(re.findall(rf"\bv?(?:mul|add|sub)ps .*%{register}", text))
            assert packed > 500, f"{name}: {packed} packed instructions on {register}"
