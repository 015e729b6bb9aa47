"""The non-spiking readout: fused, yet the plain loop's potentials and gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import kernel_backends
from hypothesis import given, settings
from hypothesis import strategies as st

import snnfast
from snnfast import functional, neuron


def loop(x_seq, v, tau, decay_input, v_reset):
    """The plain loop: potentials after each step."""
    potentials = []
    for x in x_seq:
        v = v + (x - (v - v_reset)) / tau if decay_input else v - (v - v_reset) / tau + x
        potentials.append(v)
    return torch.stack(potentials)


@settings(max_examples=120)
@given(
    tau=st.floats(1.05, 30.0),
    decay_input=st.booleans(),
    v_reset=st.one_of(st.just(0.0), st.floats(-1, 1, width=32, allow_subnormal=False)),
    mode=st.sampled_from(("s", "m", "folded")),
    T=st.integers(1, 9),
    rest=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    calls=st.integers(1, 2),
    dtype=st.sampled_from((torch.float32, torch.float64)),
    seed=st.integers(0, 10**6),
)
def test_potentials_and_gradients_of_the_plain_loop(tau, decay_input, v_reset, mode, T, rest, calls, dtype, seed):
    torch.manual_seed(seed)
    x = (torch.randn(calls * T, *rest, dtype=dtype) * 3).requires_grad_()
    weight = torch.randn(calls * T, *rest, dtype=dtype)
    want = loop(x, torch.full(rest, v_reset, dtype=dtype), tau, decay_input, v_reset)
    (want_grad,) = torch.autograd.grad((want * weight).sum() + want[-1].sin().sum(), x)
    li = neuron.LI(tau, decay_input, v_reset, "s" if mode == "s" else "m", timesteps=T if mode == "folded" else None)
    assert li.v == v_reset
    outputs = []
    for part in x.split(T):  # the state goes on from call to call
        if mode == "s":
            outputs.append(torch.stack([li(x_t) for x_t in part]))
        else:
            outputs.append(li(part.flatten(0, 1)).unflatten(0, (T, -1)) if mode == "folded" else li(part))
    got = torch.cat(outputs)
    assert torch.equal(got, want)
    assert torch.equal(li.v, want[-1])
    (grad,) = torch.autograd.grad((got * weight).sum() + li.v.sin().sum(), x)
    assert torch.allclose(grad, want_grad, rtol=1e-5, atol=1e-5 * want_grad.abs().max().item())
    li.reset()
    assert li.v == v_reset


@pytest.mark.parametrize(("backend", "device"), kernel_backends())
def test_backends_agree(backend, device):
    x = torch.randn(6, 37, device=device, requires_grad=True)
    results = []
    for name in (backend, "reference"):
        y = neuron.LI(3.0, False, 0.2, "m", backend=name)(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), x)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.allclose(results[0][1], results[1][1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("decode", [None, "last_mem", "mean-mem", "max-mem"])
def test_spikingjellys_non_spiking_lif(decode):
    sj_neuron = pytest.importorskip("spikingjelly.activation_based.neuron", reason="spikingjelly is not installed")
    theirs, ours = sj_neuron.NonSpikingLIFNode(tau=3.0, decode=decode), neuron.LI(tau=3.0, step_mode="m")
    x = torch.randn(7, 4, 5, requires_grad=True)
    want, got = theirs(x), ours(x)
    want = torch.stack(want) if decode is None else want
    got = {None: got, "last_mem": got[-1], "mean-mem": got.mean(0), "max-mem": got.amax(0)}[decode]
    assert torch.equal(got, want)
    grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (want, got)]
    assert torch.allclose(*grads, rtol=1e-5, atol=1e-6)


def test_half_precision_gives_float32_potentials():
    x = torch.randn(5, 3, 4)
    for dtype in (torch.bfloat16, torch.float16):
        y = neuron.LI(step_mode="m")(x.to(dtype))
        assert y.dtype == torch.float32
        assert torch.equal(y, neuron.LI(step_mode="m")(x.to(dtype).float()))


def test_large_potentials_never_spike():
    inf = float("inf")
    # +inf itself is left out: it reaches the infinite threshold, and gives NaN one step before the loop does.
    x = torch.tensor([[1e30, 3e38, 1.0], [-1e30, 3e38, -inf], [3.0, 2.0, 2.0], [1.0, 1.0, inf]])
    want = loop(x, torch.zeros(3), 2.0, True, 0.0)
    assert want[0].isfinite().all()
    torch.testing.assert_close(neuron.LI(step_mode="m")(x), want, rtol=0, atol=0, equal_nan=True)


def test_state_follows_the_network():
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), snnfast.IFNode(), torch.nn.Linear(4, 2), snnfast.neuron.LI())
    functional.set_step_mode(net, "m")
    functional.set_backend(net, "reference")
    assert net[3].backend == "reference"
    functional.set_backend(net, "auto")
    x = torch.randn(5, 6, 3)
    first = net(x)
    assert first.shape == (5, 6, 2)
    assert not torch.equal(net(x), first)  # state kept
    functional.detach_net(net)
    assert net[3].v.grad_fn is None
    assert torch.equal(copy.deepcopy(net)(x), net(x))
    functional.reset_net(net)
    assert torch.equal(net(x), first)
    assert net(x[:, :4]).shape == (5, 4, 2)  # another batch starts afresh
    net[3].set_reset_value("v", 0.5)
    net[3](torch.zeros(1, 3, 2))
    assert torch.equal(net[3].v, torch.full((3, 2), 0.25))  # from the reset value, as every neuron
    assert not list(net[3].state_dict())
    assert "tau=2.0" in repr(net)


def test_under_compile():
    li = neuron.LI(tau=4.0, step_mode="m")
    x = torch.randn(4, 6, requires_grad=True)
    y = li(x)
    (want,) = torch.autograd.grad(y.sum(), x)
    li.reset()
    compiled = torch.compile(li, fullgraph=True, backend="eager")(x)
    assert torch.equal(compiled, y)
    assert torch.equal(torch.autograd.grad(compiled.sum(), x)[0], want)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"tau": 1.0}, "tau must be a finite number of time steps above 1, got 1.0"),
        ({"v_reset": None}, "v_reset must be a number, got NoneType"),
        ({"timesteps": 0}, "timesteps must be a whole number from 1"),
        ({"step_mode": "x"}, "step_mode must be 's' or 'm'"),
        ({"backend": "x"}, "backend"),
    ],
)
def test_wrong_arguments(kwargs, message):
    with pytest.raises((TypeError, ValueError), match=message):
        neuron.LI(**kwargs)


def test_wrong_input():
    with pytest.raises(ValueError, match=r"\[T \* B, \*\] with timesteps=4, got a first dimension of 6"):
        neuron.LI(timesteps=4)(torch.randn(6, 2))
    with pytest.raises(TypeError, match="x_seq must be float32"):
        neuron.LI(step_mode="m")(torch.ones(2, 2, dtype=torch.int64))


def test_an_empty_batch_comes_out_empty():
    assert neuron.LI(timesteps=4)(torch.empty(0, 5)).shape == (0, 5)
    assert neuron.LI(step_mode="m")(torch.empty(4, 0, 5)).shape == (4, 0, 5)
