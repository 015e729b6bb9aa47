"""Bad input gets an exception that names the argument, what it got and what would do."""

from __future__ import annotations

import pytest
import torch

import snnfast
from snnfast import functional, surrogate

X = torch.randn(4, 3)
ATAN = surrogate.ATan()

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
    "state no number": (lambda: functional.if_multi_step(X, "0"), TypeError, r"v must be a number"),
    "w's size": (lambda: functional.plif_multi_step(X, 0.0, torch.zeros(2)), TypeError, r"w must be"),
    "w's device": (lambda: functional.plif_multi_step(X, 0.0, torch.zeros((), device="meta")), ValueError, r"w .*cpu"),
    "w's size in a module": (
        lambda: torch.func.functional_call(snnfast.ParametricLIFNode(step_mode="m"), {"w": torch.zeros(2)}, X),
        ValueError,
        r"w must be one number .*\(2,\)",
    ),
    "tau 1": (lambda: snnfast.LIFNode(tau=1.0), ValueError, r"tau .*above 1, got 1.0.*IFNode"),
    "tau nan": (lambda: snnfast.LIFNode(tau=float("nan")), ValueError, r"tau .*nan"),
    "tau inf": (lambda: snnfast.LIFNode(tau=float("inf")), ValueError, r"tau .*inf"),
    "tau text": (lambda: snnfast.LIFNode(tau="2"), TypeError, r"tau must be a number, got str '2'"),
    "init_tau": (lambda: snnfast.ParametricLIFNode(init_tau=0.5), ValueError, r"init_tau .*0.5"),
    "functional tau": (lambda: functional.lif_multi_step(X, tau=0.9), ValueError, r"tau .*0.9"),
    "threshold": (lambda: snnfast.IFNode(v_threshold=None), TypeError, r"v_threshold must be a number, got NoneType"),
    "threshold nan": (lambda: snnfast.IFNode(v_threshold=float("nan")), ValueError, r"v_threshold .*nan"),
    "threshold flag": (lambda: snnfast.IFNode(v_threshold=True), TypeError, r"v_threshold"),
    "reset": (lambda: snnfast.IFNode(v_reset="zero"), TypeError, r"v_reset must be a number, got str 'zero'"),
    "functional reset": (lambda: functional.if_multi_step(X, v_reset=[0]), TypeError, r"v_reset|unhashable"),
    "step mode": (lambda: snnfast.IFNode(step_mode="multi"), ValueError, r"step_mode must be 's' or 'm', got 'multi'"),
    "set_step_mode": (lambda: functional.set_step_mode(snnfast.IFNode(), "x"), ValueError, r"step_mode .*'x'"),
    "backend": (
        lambda: snnfast.IFNode(backend="cuda"),
        ValueError,
        r"backend must be one of 'auto', 'native', 'triton'",
    ),
    "set_backend": (lambda: functional.set_backend(snnfast.IFNode(), "gpu"), ValueError, r"backend must be one of"),
    "functional backend": (lambda: functional.if_multi_step(X, backend="gpu"), ValueError, r"backend must be one of"),
    "backend's device": (
        lambda: functional.if_multi_step(X, backend="triton"),
        RuntimeError,
        r"backend='triton' cannot serve",
    ),
    "timesteps": (lambda: snnfast.IFNode(timesteps=0), ValueError, r"timesteps .*0"),
    "timesteps float": (lambda: snnfast.IFNode(timesteps=2.0), ValueError, r"timesteps .*2.0"),
    "surrogate": (lambda: snnfast.IFNode(surrogate_function="atan"), TypeError, r"surrogate_function .*ATan"),
    "alpha": (lambda: surrogate.ATan(alpha=0.0), ValueError, r"alpha .*above 0, got 0.0"),
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


def test_an_explicit_backend_never_falls_back():
    class Own(surrogate.SurrogateFunction):
        def derivative(self, u):
            return u

    if snnfast.functional.backends.native.missing(X.device) is not None:
        pytest.skip("the native backend is not built here")
    with pytest.raises(ValueError, match="surrogate Own"):
        functional.if_multi_step(X, surrogate_function=Own(), backend="native")
