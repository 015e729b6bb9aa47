"""A readout without spikes: its output is its membrane potential."""

from __future__ import annotations

import math

from torch import Tensor

from . import dynamics, functional
from ._arguments import says_what_it_takes
from .base import KernelModule
from .surrogate import Rect

__all__ = ["LI"]

_NEVER = Rect()  # no neuron comes within its width of an infinite threshold


class LI(KernelModule):
    """Leaky integrator: a LIF neuron that never spikes and returns its potential, for the last layer of a network.

    ``v = v + (x - (v - v_reset)) / tau`` with ``decay_input``, else ``v = v - (v - v_reset) / tau + x``. All steps run
    in one fused call. The cross-entropy of the potentials' mean or maximum over time is a common loss.

    Args:
        tau: membrane time constant in time steps, above 1.
        decay_input: whether the input is divided by ``tau`` too.
        v_reset: the potential at rest, where the state starts and to which it decays.
        step_mode: ``'s'``, input ``[*]``, one time step a call; ``'m'``, input ``[T, *]``.
        backend: ``'auto'``, ``'native'``, ``'triton'`` or ``'reference'``.
        timesteps: ``T`` of an input folded as ``[T * B, *]``; implies multi-step mode.

    Attributes:
        v: the potential: a number until the first call and after :meth:`reset`, then a tensor, as a neuron's.

    Returns:
        The potential after each step, of the input's shape, in float32 (float64 for float64 input).

    Raises:
        TypeError, ValueError: an argument of another kind; the message names it.

    Example:
        >>> import torch
        >>> LI(tau=2.0, step_mode="m")(torch.full((3, 1), 1.0)).flatten()
        tensor([0.5000, 0.7500, 0.8750])
    """

    @says_what_it_takes
    def __init__(
        self,
        tau: float = 2.0,
        decay_input: bool = True,
        v_reset: float = 0.0,
        step_mode: str = "s",
        *,
        backend: str = "auto",
        timesteps: int | None = None,
    ) -> None:
        super().__init__()
        self.tau = functional.check_tau("tau", tau)
        self.decay_input = bool(decay_input)
        self.v_reset = functional.check_number("v_reset", v_reset)
        self.register_memory("v", self.v_reset)
        self.backend = backend
        self.timesteps = timesteps
        if timesteps is None:
            self.step_mode = step_mode

    def _integrate(self, x_seq: Tensor) -> Tensor:
        """``[T, *]`` -> potentials ``[T, *]``; updates ``self.v``."""
        _, v, v_seq = functional.multi_step(
            dynamics.LIF,
            x_seq,
            self._state_for(x_seq),
            tau=self.tau,
            decay_input=self.decay_input,
            v_threshold=math.inf,
            v_reset=self.v_reset,  # a soft reset would subtract 0 * inf
            surrogate_function=_NEVER,
            detach_reset=True,
            store_v_seq=True,
            backend=self._backend,
        )
        assert v_seq is not None
        self._leave(v)
        return v_seq

    def single_step_forward(self, x: Tensor) -> Tensor:
        """One time step: ``[*]`` -> potential ``[*]``."""
        functional.check_input("x", x, 0)
        return self._integrate(x.unsqueeze(0)).squeeze(0)

    def multi_step_forward(self, x_seq: Tensor) -> Tensor:
        """All time steps: ``[T, *]`` -> ``[T, *]``; with ``timesteps`` ``[T * B, *]`` -> ``[T * B, *]``."""
        T = self._timesteps
        functional.check_input("x_seq", x_seq, 1, folded=T is not None)
        if T is None:
            return self._integrate(x_seq)
        if x_seq.shape[0] % T:
            raise ValueError(
                f"x_seq must be [T * B, *] with timesteps={T}, got a first dimension of {x_seq.shape[0]}, which {T} "
                "does not divide"
            )
        return self._integrate(x_seq.unflatten(0, (T, x_seq.shape[0] // T))).flatten(0, 1)

    def extra_repr(self) -> str:
        parts = f"tau={self.tau}, decay_input={self.decay_input}, v_reset={self.v_reset}, step_mode={self.step_mode}"
        return parts if self.timesteps is None else f"{parts}, timesteps={self.timesteps}"
