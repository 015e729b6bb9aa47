"""The CUDA kernels of the whole registry, driven on the CPU, against the CPU kernels (which tests/test_parity.py holds
against the plain loop): two states, parameters of each neuron and their gradients."""

import ctypes
import itertools

import pytest
import torch
from conftest import flat, own_parameters, start, variants
from cuda_host import GXX, OWN, FlatCall, Guarded, guarded_copy, point

from snnfast import dynamics, functional, ops, surrogate
from snnfast.backends import NATIVE, native
from snnfast.dynamics import NEURONS, Inputs

pytestmark = [
    pytest.mark.skipif(GXX is None, reason="g++ is not on PATH, so the CUDA kernels cannot be built for the CPU"),
    pytest.mark.skipif(native.missing(torch.device("cpu")) is not None, reason="the CPU kernels are not built"),
]


def constants_of(neuron, v_reset, surrogate_id, **variant):
    """The constants that functional.multi_step makes of its arguments."""
    seen = []
    kind = surrogate.Scaled(surrogate.SURROGATES[surrogate_id](), 1.25)

    def catch(inputs, constants, backend):
        seen.append(constants)
        raise StopIteration

    original, ops.multi_step = ops.multi_step, catch
    try:
        functional.multi_step(
            neuron, torch.zeros(1, 1), 0.0, torch.tensor(0.4) if neuron.learnable else None,
            tuple(torch.tensor(0.5) for _ in neuron.own), v_threshold=0.9, v_reset=v_reset, surrogate_function=kind,
            store_v_seq=True, backend="native", **variant,
        )  # fmt: skip
    except StopIteration:
        pass
    finally:
        ops.multi_step = original
    return seen[0]


def run(library, c, x, v0, i0, own, grads, shift):
    """Forward and backward of the shim on guarded memory."""
    T, N = x.shape
    state = dynamics.state_dtype(x.dtype)
    each = sum(1 << k for k, t in enumerate(own) if t.numel() > 1)
    integers = (T, N, c.neuron, c.surrogate, c.flags, native._DTYPE[x.dtype], 0, each)

    def call(**tensors):
        flat_call = FlatCall(*integers, c.threshold, c.v_reset, c.tau, c.alpha, c.gain, c.v_leak, c.v_init)
        return point(flat_call, **tensors)

    given = {"x": guarded_copy(x, shift), "v0": guarded_copy(v0)}
    given |= {"i0": guarded_copy(i0)} if i0 is not None else {}
    given |= dict(zip(OWN, map(guarded_copy, own), strict=False))
    out = {"s": Guarded(T, N, dtype=x.dtype, shift=shift), "v_seq": Guarded(T, N, dtype=state)}
    out |= {name: Guarded(N, dtype=state) for name in (("v",) if i0 is None else ("v", "i"))}
    assert library.shim_forward(ctypes.byref(call(**given, **out)), 0) == b""

    names = ("grad_s", "grad_v", "grad_i", "grad_v_seq")
    given |= {n: guarded_copy(g) for n, g in zip(names, grads, strict=True) if g is not None}
    workspace = library.shim_workspace(ctypes.byref(call())) // state.itemsize
    back = {"grad_x": Guarded(T, N, dtype=x.dtype, shift=shift), "grad_v0": Guarded(N, dtype=state)}
    back |= {} if i0 is None else {"grad_i0": Guarded(N, dtype=state)}
    back |= {f"grad_{name}": Guarded(N, dtype=state) for name in OWN[: len(own)]}
    extra = {"workspace": Guarded(workspace, dtype=state)}
    assert library.shim_backward(ctypes.byref(call(**given, **back, **extra)), 0) == b""
    for name, guarded in {**out, **back}.items():
        guarded.check(name)
    extra["workspace"].check("workspace", written=False)
    return {name: guarded.tensor for name, guarded in {**out, **back}.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("neuron", [n for n in NEURONS if n.own], ids=lambda n: n.name)
def test_every_neuron_with_parameters_of_its_own(cuda_host_kernels, neuron, dtype):
    cases = itertools.product(variants(neuron), (0.125, None), (1, 4, 17, 40), ((1032, 0), (37, 1)))
    for index, (variant, v_reset, T, (N, shift)) in enumerate(cases):
        c = constants_of(
            neuron, v_reset, index % len(surrogate.SURROGATES), **variant, detach_reset=bool(index % 3 == 0)
        )
        x = (torch.randn(T, N, dtype=torch.float64) * 2 + 0.5).to(dtype)
        state = flat(start(neuron, (N,), dtype, 0.5))
        v0, i0 = state[0], state[1] if len(state) > 1 else None
        own = own_parameters(neuron, (N,), dtype, "each" if index % 2 else "one")
        grads = [torch.randn(T, N).to(dtype), *(torch.randn_like(t) for t in state), torch.randn(T, N).to(v0.dtype)]
        if i0 is None:
            grads.insert(2, None)
        got = run(cuda_host_kernels, c, x, v0, i0, own, grads, shift)

        inputs = Inputs(x, v0, i0, None, *own)
        s, v, i, v_seq = ops._run_forward(inputs, c, NATIVE)
        assert torch.equal(got["s"], s)
        assert torch.equal(got["v"], v)
        assert torch.equal(got["v_seq"], v_seq)
        assert i is None or torch.equal(got["i"], i)
        want = ops._run_backward(grads, inputs, c, NATIVE, own_gradients=True)
        found = [got["grad_x"], got["grad_v0"], got.get("grad_i0"), None]
        found += [got[f"grad_{name}"].sum_to_size(t.shape) for name, t in zip(OWN, own, strict=False)]
        for name, g, w in zip(("x", "v0", "i0", "decay", *neuron.own), found, want, strict=False):
            if g is not None:
                tolerance = 2e-2 if g.dtype in (torch.bfloat16, torch.float16) else 1e-4
                error = (g.double() - w.double()).abs().max() / w.double().abs().max().clamp(min=1e-2)
                assert error < tolerance, (name, neuron.name, variant, v_reset, T, N, float(error))
