"""Functions on networks (``reset_net`` and friends) and the neurons as functions with explicit state.

The functional forms take and return the state, so they hold none: ``s, v, v_seq = lif_multi_step(x_seq, v, ...)``.
"""

from __future__ import annotations

import functools
import math
import numbers
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import backends, dynamics, ops
from ._arguments import without
from ._notices import say_once
from .dynamics import Constants, Inputs, Neuron, Parameters
from .network import (
    chunk_multi_step_forward,
    delay,
    detach_net,
    first_spike_index,
    kaiming_normal_conv_linear_weight,
    multi_step_forward,
    redundant_one_hot,
    reset_net,
    seq_to_ann_forward,
    set_backend,
    set_step_mode,
    temporal_efficient_training_cross_entropy,
)
from .surrogate import Sigmoid, SurrogateLike, is_fused, recognise
from .tensors import time_major

__all__ = [
    "chunk_multi_step_forward",
    "delay",
    "detach_net",
    "first_spike_index",
    "if_multi_step",
    "kaiming_normal_conv_linear_weight",
    "lif_multi_step",
    "multi_step_forward",
    "plif_multi_step",
    "redundant_one_hot",
    "reset_net",
    "seq_to_ann_forward",
    "set_backend",
    "set_step_mode",
    "temporal_efficient_training_cross_entropy",
]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_DEFAULT_SURROGATE = Sigmoid()


# ---- checks of a user's numbers and tensors ----
def check_number(name: str, value: Any) -> float:
    """``value`` as a float.

    Raises:
        TypeError: it is not a number.
        ValueError: it is NaN.
    """
    if isinstance(value, Tensor) and value.numel() == 1 and not value.requires_grad:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):  # NumPy's are Real
        raise TypeError(f"{name} must be a number, got {type(value).__name__} {value!r}")
    if value != value:  # not math.isnan, which torch.compile cannot trace once the number varies
        raise ValueError(f"{name} must be a number, got nan")
    return float(value)


def check_tau(name: str, value: Any) -> float:
    """A time constant, in time steps.

    Raises:
        TypeError: it is not a number.
        ValueError: it is not above 1: the membrane would not leak but overshoot.
    """
    tau = check_number(name, value)
    if not 1.0 < tau < math.inf:
        raise ValueError(
            f"{name} must be a finite number of time steps above 1, got {value!r}; without a leak use IFNode"
        )
    return tau


def _check_v_min(value: Any, neuron: int) -> float:
    """A lowest potential.

    Raises:
        TypeError: it is not a number.
        ValueError: it is not finite, or the neuron resets a step late and knows none.
    """
    v_min = check_number("v_min", value)
    if not -math.inf < v_min < math.inf:
        raise ValueError(f"v_min must be finite, got {value!r}; None lets the potential fall as low as it will")
    if neuron >= dynamics.LEAKY.id:
        raise ValueError(f"v_min must be None for {dynamics.NEURONS[neuron].name}, whose reset is a step late")
    return v_min


def check_surrogate(surrogate_function: Any) -> None:
    """Raise unless this can be called on a tensor.

    Raises:
        TypeError: it cannot, or it is a class, which would take the tensor as its ``alpha``.
    """
    if not callable(surrogate_function) or isinstance(surrogate_function, type):
        raise TypeError(
            "surrogate_function must be callable on a tensor, such as snnfast.surrogate.ATan(), got "
            f"{surrogate_function!r}"
        )


def check_input(name: str, x: Any, least_dimensions: int, folded: bool = False) -> None:
    """Raise unless ``x`` is a dense floating-point tensor that a neuron can take.

    Raises:
        TypeError: not a tensor, or a dtype other than float32, float64, bfloat16 and float16.
        ValueError: sparse, without the time dimension, or with no time steps.
    """
    if not isinstance(x, Tensor):
        got = getattr(type(x), "not_a_tensor", type(x).__name__)
        if isinstance(x, torch.fx.Proxy):
            got += (
                " of torch.fx, whose tracer looks into modules that are not torch's: give it an is_leaf_module that is "
                "True for snnfast.base.StepModule as well"
            )
        raise TypeError(f"{name} must be a torch.Tensor, got {got}")
    if x.dtype not in _DTYPES:
        raise TypeError(
            f"{name} must be float32, float64, bfloat16 or float16, got {str(x.dtype).removeprefix('torch.')}; "
            f"convert it with {name}.float()"
        )
    if x.layout is not torch.strided:
        raise ValueError(f"{name} must be a dense tensor, got layout {x.layout}; convert it with {name}.to_dense()")
    if x.dim() < least_dimensions:
        raise ValueError(
            f"{name} must have time as its first dimension, [T, *], got a tensor of shape {tuple(x.shape)}"
        )
    if least_dimensions and x.shape[0] == 0 and not folded:
        raise ValueError(f"{name} must have at least one time step, got T = 0 in shape {tuple(x.shape)}")


def _check_state(v: Any, x: Tensor) -> float | Tensor:
    if not isinstance(v, Tensor):
        if v is None:
            raise TypeError(
                "v must be a number or a tensor with the shape of one time step, got None; 0.0 is the start"
            )
        return check_number("v", v)
    if v.shape != x.shape[1:]:
        raise ValueError(
            f"v must have the shape of one time step of x_seq, {tuple(x.shape[1:])}, got {tuple(v.shape)}; a number "
            "starts every neuron at the same potential"
        )
    if v.device != x.device:
        raise ValueError(f"v must be on x_seq's device {x.device}, got {v.device}; move it with v.to(x_seq.device)")
    if not v.is_floating_point():
        raise TypeError(f"v must be floating point, got {str(v.dtype).removeprefix('torch.')}")
    if v.layout is not torch.strided:
        raise ValueError(f"v must be a dense tensor, got layout {v.layout}; convert it with v.to_dense()")
    return v


# ---- one neuron over time ----
def _constants(
    neuron: int,
    surrogate: int,
    alpha: float,
    gain: float,
    v_init: float,
    tau: float = 2.0,
    decay_input: bool = True,
    v_threshold: float = 1.0,
    v_reset: float | None = 0.0,
    v_leak: float = 0.0,
    detach_reset: bool = False,
    strict: bool = False,
    multi_spike: bool = False,
    resets: bool = True,
    store_v_seq: bool = False,
    v_min: float | None = None,
) -> Constants:
    flags = (
        (dynamics.DECAY_INPUT if decay_input else 0)
        | (dynamics.SOFT_RESET if v_reset is None else 0)
        | (dynamics.DETACH_RESET if detach_reset else 0)
        | (dynamics.STORE_V_SEQ if store_v_seq else 0)
        | (dynamics.STRICT if strict else 0)
        | (dynamics.MULTI_SPIKE if multi_spike else 0)
        | (0 if resets else dynamics.NO_RESET)
        | (0 if v_min is None else dynamics.CLIPPED)
    )
    return Constants(
        neuron,
        surrogate,
        flags,
        check_number("v_threshold", v_threshold),
        0.0 if v_reset is None else check_number("v_reset", v_reset),
        check_tau("tau", tau) if neuron == dynamics.LIF.id else 1.0,
        alpha,
        gain,
        check_number("v_leak", v_leak) if v_min is None else _check_v_min(v_min, neuron),
        v_init,
    )


@functools.lru_cache(maxsize=4096)
def _cached_constants(*args: Any, **keywords: Any) -> Constants:
    if any(isinstance(value, Tensor) for value in (*args, *keywords.values())):
        raise TypeError  # a cache knows tensors by their identity, and this one's value may be another one next time
    return _constants(*args, **keywords)


def constants_of(
    neuron: Neuron, surrogate_function: SurrogateLike, v_init: float, *rest: Any, **keywords: Any
) -> Constants:
    """The kernels' constants of a call of :func:`multi_step` with a fused surrogate and these keywords."""
    s: Any = surrogate_function
    if not torch.compiler.is_compiling():  # dynamo warns of caches
        try:
            return _cached_constants(neuron.id, s.id, s.alpha, s.gain, v_init, *rest, **keywords)
        except TypeError:  # a tensor, or a list, which no cache takes: it is refused below, by its name
            pass
    # As floats at once: with dynamic=True dynamo must not meet them for the first time within an autograd function.
    return _constants(neuron.id, s.id, float(s.alpha), float(s.gain), v_init, *rest, **keywords)


def multi_step(
    neuron: Neuron,
    x_seq: Tensor,
    state: float | Tensor | tuple[float | Tensor, float | Tensor],
    decay: Tensor | None = None,
    own: tuple[Tensor, ...] = (),
    *,
    tau: float = 2.0,
    decay_input: bool = True,
    v_threshold: float = 1.0,
    v_reset: float | None = 0.0,
    v_leak: float = 0.0,
    surrogate_function: SurrogateLike = _DEFAULT_SURROGATE,
    detach_reset: bool = False,
    strict: bool = False,
    multi_spike: bool = False,
    resets: bool = True,
    store_v_seq: bool = False,
    v_min: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Any, Tensor | None]:
    """Any neuron of the registry over all time steps of a checked input; what the modules and functions below call.

    ``state`` is the potential before the first step, or the pair of potential and current for a neuron that has both
    (a number other than 0 can start potentials only); it comes back in the same form. ``own`` are the tensors that the
    registry's entry names, each of one element or broadcastable to one time step. No step leaves a potential lower than
    ``v_min``, which neurons that reset a step late do not know.
    """
    fused_surrogate = is_fused(surrogate_function)
    if not fused_surrogate:
        check_surrogate(surrogate_function)
        surrogate_function = recognise(surrogate_function)
        fused_surrogate = is_fused(surrogate_function)
    strict = strict or neuron.strict
    dtype = dynamics.state_dtype(x_seq.dtype)
    if decay is not None and decay.dtype != dtype:
        decay = decay.to(dtype)
    if own:
        own = tuple(t if t.dtype == dtype else t.to(dtype) for t in own)
    chosen = backends.choose(backend, x_seq.device)
    if multi_spike and not neuron.own:  # counted by the kernels of such neurons only
        chosen = backends.REFERENCE
    if v_min is not None and neuron is not dynamics.EXPONENTIAL_LIF:  # its kernels alone know a lowest potential
        chosen = backends.REFERENCE
    if chosen != backends.REFERENCE and neuron.id not in backends.KERNELS[chosen].NEURONS_SERVED:
        if backend not in ("auto", "reference"):
            raise ValueError(f"backend={backend!r} has no kernel for the neuron {neuron.name}; use backend='auto'")
        chosen = backends.REFERENCE
    if chosen != backends.REFERENCE:
        if fused_surrogate:
            v, i = state if isinstance(state, tuple) else (state, None)
            v0, v_init = (v, 0.0) if isinstance(v, Tensor) else (None, v)
            constants = constants_of(
                neuron, surrogate_function, v_init,
                tau, decay_input, v_threshold, v_reset, v_leak, detach_reset, strict, multi_spike, resets, store_v_seq,
                v_min,
            )  # fmt: skip
            inputs = Inputs(time_major(x_seq), v0, i if isinstance(i, Tensor) else None, decay, *own)
            s, v, i, v_seq = ops.multi_step(inputs, constants, chosen)
            return s, (v, i) if isinstance(state, tuple) else v, v_seq
        if backend not in ("auto", "reference"):
            raise ValueError(
                f"backend={backend!r} has no kernel for the surrogate {_name(surrogate_function)}; use backend='auto', "
                "which runs it on the reference path, or one of the fused surrogates of snnfast.surrogate"
            )
        if not torch.compiler.is_compiling():
            say_once(
                f"surrogate {_name(surrogate_function)} is not one of snnfast's fused ones: the neuron runs as a plain "
                "PyTorch loop, many times slower."
            )
    parameters = Parameters(
        threshold=own[0] if own else check_number("v_threshold", v_threshold),
        v_reset=None if v_reset is None else check_number("v_reset", v_reset),
        surrogate=surrogate_function,
        tau=check_tau("tau", tau) if neuron is dynamics.LIF else 1.0,
        decay=decay,
        decay_input=decay_input,
        detach_reset=detach_reset,
        beta=own[1] if own else 1.0,
        current_decay=own[2] if len(own) > 2 else 0.0,
        v_leak=check_number("v_leak", v_leak),
        strict=strict,
        multi_spike=multi_spike,
        resets=resets,
        v_min=None if v_min is None else _check_v_min(v_min, neuron.id),
    )
    return ops.guard(*dynamics.multi_step(neuron, x_seq, state, parameters, store_v_seq))


def _name(surrogate: SurrogateLike) -> str:
    name = getattr(surrogate, "__name__", type(surrogate).__name__)
    owner = getattr(surrogate, "__self__", None)
    if isinstance(owner, type):  # an autograd function's apply
        name = f"{owner.__name__}.{name}"
    return f"{name}(spiking=False)" if getattr(surrogate, "spiking", True) is False else name


def if_multi_step(
    x_seq: Tensor,
    v: float | Tensor = 0.0,
    v_threshold: float = 1.0,
    v_reset: float | None = 0.0,
    surrogate_function: SurrogateLike = _DEFAULT_SURROGATE,
    detach_reset: bool = False,
    store_v_seq: bool = False,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Integrate-and-fire neurons over all time steps: ``h = v + x``.

    Args:
        x_seq: input ``[T, *]``, float32, float64, bfloat16 or float16; potentials are in units of the threshold.
        v: potential before the first step, one number or ``[*]`` on ``x_seq``'s device.
        v_threshold: a neuron spikes where its potential reaches it.
        v_reset: potential after a spike (hard reset), or ``None`` to subtract the threshold (soft reset).
        surrogate_function: derivative of the spike (see :mod:`snnfast.surrogate`).
        detach_reset: let no gradient through the reset.
        store_v_seq: also return the potential after each step.
        backend: ``'auto'``, ``'native'``, ``'triton'`` or ``'reference'``.

    Returns:
        Spikes ``[T, *]`` in ``x_seq``'s dtype; potential ``[*]`` after the last step, and after each ``[T, *]`` or
        ``None``, in float32 (float64 for float64 input). All are differentiable.

    Raises:
        TypeError, ValueError: an argument of another kind; the message names it.
        RuntimeError: the named backend cannot serve the device.

    Example:
        >>> s, v, _ = if_multi_step(torch.tensor([[0.6], [0.6], [0.6]]))
        >>> s.flatten(), v
        (tensor([0., 1., 0.]), tensor([0.6000]))
    """
    check_input("x_seq", x_seq, 1)
    return multi_step(
        dynamics.IF,
        x_seq,
        _check_state(v, x_seq),
        v_threshold=v_threshold,
        v_reset=v_reset,
        surrogate_function=surrogate_function,
        detach_reset=detach_reset,
        store_v_seq=store_v_seq,
        backend=backend,
    )


def lif_multi_step(
    x_seq: Tensor,
    v: float | Tensor = 0.0,
    tau: float = 2.0,
    decay_input: bool = True,
    v_threshold: float = 1.0,
    v_reset: float | None = 0.0,
    surrogate_function: SurrogateLike = _DEFAULT_SURROGATE,
    detach_reset: bool = False,
    store_v_seq: bool = False,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Leaky integrate-and-fire neurons over all time steps.

    ``h = v + (x - (v - v_reset)) / tau`` with ``decay_input``, else ``h = v - (v - v_reset) / tau + x`` (``v_reset``
    taken as 0 for soft reset).

    Args:
        tau: membrane time constant in time steps, above 1.
        decay_input: whether the input is divided by ``tau`` too.

    The other arguments, the returned values and the errors are those of :func:`if_multi_step`.

    Example:
        >>> s, v, _ = lif_multi_step(torch.tensor([[1.5], [1.5]]), tau=2.0)
        >>> s.flatten(), v
        (tensor([0., 1.]), tensor([0.]))
    """
    check_input("x_seq", x_seq, 1)
    return multi_step(
        dynamics.LIF,
        x_seq,
        _check_state(v, x_seq),
        tau=tau,
        decay_input=decay_input,
        v_threshold=v_threshold,
        v_reset=v_reset,
        surrogate_function=surrogate_function,
        detach_reset=detach_reset,
        store_v_seq=store_v_seq,
        backend=backend,
    )


def plif_multi_step(
    x_seq: Tensor,
    v: float | Tensor,
    w: Tensor,
    decay_input: bool = True,
    v_threshold: float = 1.0,
    v_reset: float | None = 0.0,
    surrogate_function: SurrogateLike = _DEFAULT_SURROGATE,
    detach_reset: bool = False,
    store_v_seq: bool = False,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Parametric LIF neurons over all time steps: LIF with the learnable ``sigmoid(w)`` in place of ``1 / tau``.

    From Fang et al., "Incorporating Learnable Membrane Time Constant to Enhance Learning of Spiking Neural Networks",
    ICCV 2021.

    Args:
        w: scalar tensor; its gradient is summed over all neurons and steps.

    The other arguments, the returned values and the errors are those of :func:`lif_multi_step`.

    Example:
        >>> w = torch.tensor(0.0, requires_grad=True)
        >>> s, v, _ = plif_multi_step(torch.full((2, 1), 0.4), 0.0, w, detach_reset=True)
        >>> v.sum().backward(); w.grad
        tensor(0.1000)
    """
    check_input("x_seq", x_seq, 1)
    if not isinstance(w, Tensor) or w.numel() != 1 or not w.is_floating_point():
        raise TypeError(f"w must be a floating-point tensor of one element, got {w!r}")
    if w.device != x_seq.device:
        raise ValueError(f"w must be on x_seq's device {x_seq.device}, got {w.device}; move it with w.to(x_seq.device)")
    return multi_step(
        dynamics.PARAMETRIC_LIF,
        x_seq,
        _check_state(v, x_seq),
        w.reshape(()).sigmoid(),
        decay_input=decay_input,
        v_threshold=v_threshold,
        v_reset=v_reset,
        surrogate_function=surrogate_function,
        detach_reset=detach_reset,
        store_v_seq=store_v_seq,
        backend=backend,
    )


if not TYPE_CHECKING:  # to a type checker, what is not there is an error
    __getattr__ = without(__name__)
