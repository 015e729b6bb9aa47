"""``v_min`` of ``functional.multi_step``: the kernels against the plain loop, in every dtype and transform."""

from __future__ import annotations

import pytest
import torch
from conftest import kernel_backends

from snnfast import dynamics, functional, surrogate

LOWEST = -0.25
RESETS = [  # (v_reset, multi_spike, detach_reset), as sinabs has them and as it has not
    (None, True, False),
    (None, False, False),
    (0.0, False, True),
    (0.125, False, False),
]
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-10, torch.bfloat16: 2e-2, torch.float16: 2e-2}


def given(shape, dtype, device, size=1):
    """Input, first potential, threshold and beta, all to be differentiated."""
    state = dynamics.state_dtype(dtype)
    x = (torch.randn(shape, dtype=torch.float64) * 1.5).to(dtype)
    own = 0.75 + torch.rand(size, dtype=state) / 2, 0.7 + torch.rand(size, dtype=state) / 4
    made = x, torch.randn(shape[1:], dtype=state), *own
    return [t.to(device).requires_grad_() for t in made]


def run(tensors, backend="auto", v_min=LOWEST, **keywords):
    """Spikes, the last potential, and the potentials after each step."""
    x, v, *own = tensors
    keywords = {"v_reset": None, "surrogate_function": surrogate.ATan(), "store_v_seq": True} | keywords
    return functional.multi_step(
        dynamics.EXPONENTIAL_LIF, x, v, None, tuple(own), backend=backend, v_min=v_min, **keywords
    )


def loss(outputs):
    s, v, v_seq = outputs
    steps = torch.arange(1, len(s) + 1, device=s.device, dtype=v.dtype).view(-1, *[1] * (s.dim() - 1))
    return (s.to(v.dtype) * steps).sum() + v.square().sum() + (v_seq.square() * steps).sum()


@pytest.mark.parametrize(("backend", "device"), kernel_backends())
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("v_reset", "multi_spike", "detach_reset"), RESETS)
def test_kernels_match_the_loop(backend, device, dtype, v_reset, multi_spike, detach_reset):
    keywords = {"v_reset": v_reset, "multi_spike": multi_spike, "detach_reset": detach_reset}
    for shape, size in (((6, 37), 37), ((3, 2, 5, 4), 1)):
        tensors = given(shape, dtype, device, size)
        strided = tensors[0].detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_()
        for x in (tensors[0], strided):
            found, want = ([*run([x, *tensors[1:]], which, **keywords)] for which in (backend, "reference"))
            assert all(map(torch.equal, found, want))
            assert (want[2] == LOWEST).any()
            assert (want[2] > LOWEST).any()
            for g, w in zip(*(torch.autograd.grad(loss(o), [x, *tensors[1:]]) for o in (found, want)), strict=True):
                assert (g - w).abs().max() <= TOLERANCES[dtype] * w.abs().max()


@pytest.mark.parametrize(("v_reset", "multi_spike", "detach_reset"), RESETS[:2])
def test_second_derivatives(v_reset, multi_spike, detach_reset):
    tensors, results = given((4, 5), torch.float64, "cpu"), []
    for backend in ("auto", "reference"):
        outputs = run(tensors, backend, v_reset=v_reset, multi_spike=multi_spike, detach_reset=detach_reset)
        first = torch.autograd.grad(loss(outputs), tensors, create_graph=True)
        results.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), tensors)])
    for g, w in zip(*results, strict=True):
        assert torch.allclose(g, w, rtol=1e-9, atol=1e-9)


def test_samples_and_their_gradients_by_torch_func():
    x, v, *own = (t.detach() for t in given((3, 4, 5), torch.float32, "cpu"))
    v = v[:3]  # one for each sample, too
    found = torch.func.vmap(lambda x, v: run((x, v, *own)))(x, v)
    grads = torch.func.vmap(torch.func.grad(lambda *t: loss(run(t)), argnums=(0, 1, 2, 3)), (0, 0, None, None))(
        x, v, *own
    )
    for k in range(3):
        leaves = [t.clone().requires_grad_() for t in (x[k], v[k], *own)]
        want = run(leaves, "reference")
        assert all(torch.equal(f[k], w) for f, w in zip(found, want, strict=True))
        for g, w in zip(grads, torch.autograd.grad(loss(want), leaves), strict=True):
            torch.testing.assert_close(g[k], w, rtol=1e-4, atol=1e-4)


def test_compiled_with_one_lowest_potential_after_the_other():
    compiled = torch.compile(
        lambda tensors, v_min: loss(run(tensors, v_min=v_min)), backend="aot_eager", fullgraph=True
    )
    tensors = given((4, 5), torch.float32, "cpu")
    for v_min in (LOWEST, -0.5, None):
        found = torch.autograd.grad(compiled(tensors, v_min), tensors)
        want = torch.autograd.grad(loss(run(tensors, "reference", v_min=v_min)), tensors)
        for g, w in zip(found, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4)
