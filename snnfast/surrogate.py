"""Surrogate gradients: a spike in the forward pass, a smooth derivative in the backward pass.

Each object is called with ``u = h - v_threshold`` and gives ``1`` where ``u >= 0``; its gradient is ``derivative(u)``.
The names, arguments and defaults are SpikingJelly's, and so are the functional forms (``atan.apply(u, alpha)``). All
eight run inside the fused kernels, as do SpikingJelly's own objects of those names. A surrogate of your own (a subclass
with its own ``derivative``, or any function from ``u`` to spikes that autograd can differentiate) works on the
reference path.

To add one: its struct in ``csrc/surrogates.h``, its branch in ``backends/triton_dynamics.py``, its class here.
"""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._arguments import without

__all__ = [
    "ATan",
    "Erf",
    "PiecewiseExp",
    "PiecewiseQuadratic",
    "Rect",
    "Rectangular",
    "Scaled",
    "Sigmoid",
    "SoftSign",
    "SuperSpike",
    "SurrogateFunction",
    "atan",
    "erf",
    "heaviside",
    "piecewise_exp",
    "piecewise_quadratic",
    "rect",
    "sigmoid",
    "soft_sign",
    "super_spike",
]

SurrogateLike = Union["SurrogateFunction", Callable[[Tensor], Tensor]]


def heaviside(u: Tensor) -> Tensor:
    """``1`` where ``u >= 0``, else ``0``, in ``u``'s dtype."""
    return (u >= 0).to(u)


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)``, which says what would do where forward-mode differentiation meets it.

    Raises:
        NotImplementedError: an argument has a forward-mode tangent.
    """
    if torch.compiler.is_compiling():
        return function.apply(*args)
    try:
        return function.apply(*args)
    except NotImplementedError as error:  # a jvp of ours that only raises would keep torch.compile out
        if "jvp" not in str(error):
            raise
        raise NotImplementedError(
            "snnfast's neurons have no forward-mode derivative (torch.func.jvp, jacfwd and hessian, "
            "torch.autograd.forward_ad), on no backend; use reverse mode: torch.func.vjp and jacrev, "
            "jacrev(jacrev(f)) for a Hessian, torch.autograd.functional.jvp(f, x, v) for the product with a tangent"
        ) from error


class _Spike(torch.autograd.Function):
    """Heaviside forward, ``surrogate.derivative`` backward; twice differentiable, because the derivative is."""

    generate_vmap_rule = True

    @staticmethod
    def forward(u: Tensor, surrogate: int, alpha: float) -> Tensor:
        return heaviside(u)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        u, ctx.surrogate, ctx.alpha = inputs
        ctx.save_for_backward(u)

    @staticmethod
    def backward(ctx: Any, grad_s: Tensor) -> tuple[Tensor, None, None]:
        (u,) = ctx.saved_tensors
        return grad_s * SURROGATES[ctx.surrogate]._derivative(u, ctx.alpha), None, None


class _UserSpike(torch.autograd.Function):
    """The same for a surrogate that only its own object can differentiate."""

    generate_vmap_rule = True

    @staticmethod
    def forward(u: Tensor, surrogate: SurrogateFunction) -> Tensor:
        return heaviside(u)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        u, ctx.surrogate = inputs
        ctx.save_for_backward(u)

    @staticmethod
    def backward(ctx: Any, grad_s: Tensor) -> tuple[Tensor, None]:
        (u,) = ctx.saved_tensors
        return grad_s * ctx.surrogate.derivative(u), None


class SurrogateFunction(nn.Module):
    """Base of the surrogates, and of your own: override :meth:`derivative`.

    Args:
        alpha: sharpness; its meaning differs from surrogate to surrogate. Above 0.
        spiking: ``False`` gives the smooth primitive instead of spikes, in both passes.

    Raises:
        ValueError: ``alpha`` is not a number above 0.

    Example:
        >>> class Triangle(SurrogateFunction):
        ...     def derivative(self, u):
        ...         return (1 - self.alpha * u.abs()).clamp(min=0)
        >>> Triangle()(torch.tensor([-0.5, 0.0, 0.5]))
        tensor([0., 1., 1.])
    """

    id: ClassVar[int | None] = None
    gain: float = 1.0

    def __init__(self, alpha: float = 1.0, spiking: bool = True) -> None:
        super().__init__()
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float, numbers.Real)) or not 0 < alpha < math.inf:
            raise ValueError(f"alpha must be a finite number above 0, got {alpha!r}")
        self.alpha = float(alpha)
        self.spiking = spiking

    def derivative(self, u: Tensor) -> Tensor:
        """The derivative of a spike by ``u``, of ``u``'s shape and dtype."""
        return self._derivative(u, self.alpha)

    def primitive(self, u: Tensor) -> Tensor:
        """The function whose derivative this is, rising from 0 to 1 where it is bounded."""
        return self._primitive(u, self.alpha)

    @staticmethod
    def _derivative(u: Tensor, alpha: float) -> Tensor:
        raise NotImplementedError("a surrogate of your own overrides derivative(self, u)")

    @staticmethod
    def _primitive(u: Tensor, alpha: float) -> Tensor:
        raise NotImplementedError("this surrogate has no primitive: spiking=False is not available for it")

    # ---- SpikingJelly's functional forms, which take alpha as an argument ----
    @classmethod
    def spiking_function(cls, u: Tensor, alpha: float) -> Tensor:
        """Spikes, with this surrogate's derivative in the backward pass."""
        return _Spike.apply(u, cls.id, alpha)

    @classmethod
    def primitive_function(cls, u: Tensor, alpha: float) -> Tensor:
        """The smooth primitive."""
        return cls._primitive(u, alpha)

    @classmethod
    def backward(cls, grad_output: Tensor, u: Tensor, alpha: float) -> Tensor:
        """The gradient of ``u`` from that of the spikes."""
        return grad_output * cls._derivative(u, alpha)

    def set_spiking_mode(self, spiking: bool) -> None:
        """Switch between spikes (``True``) and the smooth primitive (``False``)."""
        self.spiking = spiking

    def forward(self, u: Tensor) -> Tensor:
        if not self.spiking:
            return self.primitive(u)
        if type(self).derivative is SurrogateFunction.derivative and self.id is not None:
            return apply(_Spike, u, self.id, self.alpha)
        return apply(_UserSpike, u, self)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, spiking={self.spiking}"


class Sigmoid(SurrogateFunction):
    """``alpha * sigmoid(alpha u) * (1 - sigmoid(alpha u))``; SpikingJelly's default.

    Example:
        >>> Sigmoid(alpha=4.0).derivative(torch.tensor(0.0))
        tensor(1.)
    """

    id = 0

    def __init__(self, alpha: float = 4.0, spiking: bool = True) -> None:
        super().__init__(alpha, spiking)

    @staticmethod
    def _derivative(u: Tensor, alpha: float) -> Tensor:
        s = (u * alpha).sigmoid()
        return (1.0 - s) * s * alpha

    @staticmethod
    def _primitive(u: Tensor, alpha: float) -> Tensor:
        return (u * alpha).sigmoid()


class ATan(SurrogateFunction):
    """``(alpha / 2) / (1 + (pi alpha u / 2)^2)`` (Fang et al., ICCV 2021)."""

    id = 1

    def __init__(self, alpha: float = 2.0, spiking: bool = True) -> None:
        super().__init__(alpha, spiking)

    @staticmethod
    def _derivative(u: Tensor, alpha: float) -> Tensor:
        scaled = u * (math.pi / 2 * alpha)
        return (alpha / 2) / (1.0 + scaled * scaled)

    @staticmethod
    def _primitive(u: Tensor, alpha: float) -> Tensor:
        return (u * (math.pi / 2 * alpha)).atan() / math.pi + 0.5


class PiecewiseQuadratic(SurrogateFunction):
    """``max(0, alpha - alpha^2 |u|)``, a triangle (Esser et al., PNAS 2016)."""

    id = 2

    @staticmethod
    def _derivative(u: Tensor, alpha: float) -> Tensor:
        return torch.where(u.abs() > 1 / alpha, torch.zeros_like(u), alpha - alpha**2 * u.abs())

    @staticmethod
    def _primitive(u: Tensor, alpha: float) -> Tensor:
        inside = -(alpha**2) / 2 * u.square() * u.sign() + alpha * u + 0.5
        return torch.where(u.abs() > 1 / alpha, (u > 0).to(u), inside)


class PiecewiseExp(SurrogateFunction):
    """``(alpha / 2) exp(-alpha |u|)`` (Shrestha and Orchard, NeurIPS 2018)."""

    id = 3

    @staticmethod
    def _derivative(u: Tensor, alpha: float) -> Tensor:
        return alpha / 2 * (-alpha * u.abs()).exp()

    @staticmethod
    def _primitive(u: Tensor, alpha: float) -> Tensor:
        tail = (-alpha * u.abs()).exp() / 2
        return torch.where(u >= 0, 1 - tail, tail)


class SoftSign(SurrogateFunction):
    """``1 / (2 alpha (1 / alpha + |u|)^2)``."""

    id = 4

    def __init__(self, alpha: float = 2.0, spiking: bool = True) -> None:
        super().__init__(alpha, spiking)

    @staticmethod
    def _derivative(u: Tensor, alpha: float) -> Tensor:
        return 1 / (2 * alpha * (1 / alpha + u.abs()).square())

    @staticmethod
    def _primitive(u: Tensor, alpha: float) -> Tensor:
        return (F.softsign(u * alpha) + 1.0) / 2.0


class SuperSpike(SurrogateFunction):
    """``alpha / (1 + |u|)^2`` (Zenke and Ganguli, Neural Computation 2018)."""

    id = 5

    @staticmethod
    def _derivative(u: Tensor, alpha: float) -> Tensor:
        return alpha / (1.0 + u.abs()).square()


class Erf(SurrogateFunction):
    """``(alpha / sqrt(pi)) exp(-(alpha u)^2)``."""

    id = 6

    def __init__(self, alpha: float = 2.0, spiking: bool = True) -> None:
        super().__init__(alpha, spiking)

    @staticmethod
    def _derivative(u: Tensor, alpha: float) -> Tensor:
        return (-(u * alpha).square()).exp() * (alpha / math.sqrt(math.pi))

    @staticmethod
    def _primitive(u: Tensor, alpha: float) -> Tensor:
        return torch.erfc(-alpha * u) / 2.0


class Rect(SurrogateFunction):
    """``alpha`` where ``|u| < 1 / (2 alpha)``, else 0."""

    id = 7

    @staticmethod
    def _derivative(u: Tensor, alpha: float) -> Tensor:
        return alpha * (u.abs() < 0.5 / alpha).to(u)

    @staticmethod
    def _primitive(u: Tensor, alpha: float) -> Tensor:
        return (alpha * u + 0.5).clamp(0.0, 1.0)


Rectangular = Rect

SURROGATES: tuple[type[SurrogateFunction], ...] = (
    Sigmoid,
    ATan,
    PiecewiseQuadratic,
    PiecewiseExp,
    SoftSign,
    SuperSpike,
    Erf,
    Rect,
)


class Scaled(SurrogateFunction):
    """Another surrogate with its derivative multiplied by ``gain``; the spikes are the same.

    snnTorch's fast sigmoid of slope k, ``1 / (k |u| + 1)^2``, is ``Scaled(SoftSign(k), 2 / k)``, say.

    Args:
        surrogate: one of the eight fused surrogates, then it stays fused, or any other with a ``derivative``.
        gain: a finite number.

    Raises:
        TypeError: ``surrogate`` has no derivative to scale.
        ValueError: ``gain`` is not a finite number.

    Example:
        >>> Scaled(Rect(1.0), 0.5).derivative(torch.tensor(0.2))
        tensor(0.5000)
    """

    def __init__(self, surrogate: SurrogateFunction, gain: float) -> None:
        if not isinstance(surrogate, SurrogateFunction):
            raise TypeError(f"surrogate must be a snnfast.surrogate.SurrogateFunction, got {type(surrogate).__name__}")
        if isinstance(gain, bool) or not isinstance(gain, (int, float)) or not math.isfinite(gain):
            raise ValueError(f"gain must be a finite number, got {gain!r}")
        nn.Module.__init__(self)
        self.surrogate: SurrogateFunction = surrogate
        self.factor = float(gain)
        self.spiking = surrogate.spiking
        self.id = surrogate.id  # type: ignore[misc]

    @property
    def alpha(self) -> float:  # type: ignore[override]
        """The scaled surrogate's."""
        return self.surrogate.alpha

    @property
    def gain(self) -> float:  # type: ignore[override]
        """The product of all gains."""
        return self.factor * self.surrogate.gain

    def derivative(self, u: Tensor) -> Tensor:
        return self.surrogate.derivative(u) * self.factor

    def primitive(self, u: Tensor) -> Tensor:
        return self.surrogate.primitive(u) * self.factor


class _Functional:
    """A surrogate as SpikingJelly's functional form."""

    def __init__(self, surrogate: type[SurrogateFunction]) -> None:
        self.apply = surrogate.spiking_function


sigmoid, atan, piecewise_quadratic, piecewise_exp, soft_sign, super_spike, erf, rect = map(_Functional, SURROGATES)

_BY_NAME = {surrogate.__name__: surrogate for surrogate in SURROGATES}
_THEIR_MODULES = ("spikingjelly.activation_based.surrogate", "spikingjelly.clock_driven.surrogate")


def _make(name: str, alpha: float) -> SurrogateFunction:
    return _BY_NAME[name](alpha)


_cached_make = functools.lru_cache(maxsize=256)(_make)


def recognise(surrogate: SurrogateLike) -> SurrogateLike:
    """The fused surrogate in place of SpikingJelly's own object of that name; anything else as it is.

    An object of a subclass, in ``spiking=False`` mode or with an ``alpha`` that is no number above 0 stays as it is.
    """
    kind = type(surrogate)
    if kind in SURROGATES or kind.__module__ not in _THEIR_MODULES or kind.__name__ not in _BY_NAME:
        return surrogate
    alpha = surrogate.alpha  # type: ignore[union-attr]
    if not surrogate.spiking or not isinstance(alpha, (int, float)) or not alpha > 0:  # type: ignore[union-attr]
        return surrogate
    make = _make if torch.compiler.is_compiling() else _cached_make  # dynamo warns of caches
    return make(kind.__name__, float(alpha))


def is_fused(surrogate: SurrogateLike) -> bool:
    """Whether the kernels know this surrogate: one of the eight, unchanged and spiking, or one of those scaled."""
    kind: Any = type(surrogate)
    if kind in SURROGATES:
        return surrogate.spiking  # type: ignore[union-attr]
    if isinstance(surrogate, Scaled):
        return surrogate.spiking and is_fused(surrogate.surrogate)
    # torch.export traces modules behind subclasses of its own, which change none of this.
    return (
        isinstance(surrogate, SURROGATES)
        and kind.derivative is SurrogateFunction.derivative
        and kind.forward is SurrogateFunction.forward
        and any(kind._derivative is known._derivative for known in SURROGATES)
        and surrogate.spiking
    )


if not TYPE_CHECKING:  # to a type checker, what is not there is an error
    __getattr__ = without(__name__)
