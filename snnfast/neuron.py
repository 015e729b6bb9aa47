"""Spiking neurons as modules, drop-in for SpikingJelly's: same arguments, defaults, state handling and equations.

A neuron of your own subclasses :class:`BaseNode` and overrides :meth:`BaseNode.neuronal_charge`, perhaps
:meth:`BaseNode.neuronal_fire` and :meth:`BaseNode.neuronal_reset`; its constructor declares states beside ``v`` by
:meth:`~snnfast.base.MemoryModule.register_memory`. It runs on the reference path. The built-in ones run fused, unless a
subclass overrides a step of theirs.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from . import backends, constant_input, dynamics, functional, ops
from ._arguments import says_what_it_takes, without
from .base import KernelModule
from .dynamics import Constants, Neuron, Parameters
from .readout import LI
from .surrogate import Sigmoid, SurrogateLike, is_fused, recognise
from .tensors import ALL_MODULES_HOOKS, is_wrapped

__all__ = ["LI", "BaseNode", "IFNode", "LIFNode", "ParametricLIFNode"]

_STEPS = ("neuronal_charge", "neuronal_fire", "neuronal_reset", "single_step_functional_forward",
          "single_step_forward", "multi_step_forward")  # fmt: skip
_NOT_HERE = ("multi_step_functional_forward", "materialize_states")  # of SpikingJelly 2's neurons, not called here


class BaseNode(KernelModule):
    """Base of all spiking neurons: charge, fire, reset at each time step, with the membrane potential ``v`` as state.

    Args:
        v_threshold: a neuron spikes where its potential reaches it.
        v_reset: potential after a spike (hard reset), or ``None`` to subtract the threshold (soft reset). The state
            starts there (at 0 for soft reset).
        surrogate_function: derivative of the spike (see :mod:`snnfast.surrogate`).
        detach_reset: let no gradient through the reset.
        step_mode: ``'s'``, input ``[*]``, one time step a call; ``'m'``, input ``[T, *]``.
        store_v_seq: keep the potentials after each step in ``v_seq``, ``[T, *]``.
        backend: ``'auto'``, ``'native'``, ``'triton'`` or ``'reference'``. Older code may give a backend's name as the
            sixth positional argument, before ``store_v_seq``.
        timesteps: ``T`` of an input folded as ``[T * B, *]``, as ordinary convolutional models make it; implies
            multi-step mode.

    Attributes:
        v: the membrane potential: a number until the first call and after :meth:`reset`, then a tensor in float32
            (float64 for float64 input). An input of another shape starts afresh; another dtype or device moves it.
        v_seq: potentials of the last call if ``store_v_seq``, else ``None``.

    Raises:
        TypeError, ValueError: an argument of another kind; the message names it.

    Example:
        >>> class Doubling(BaseNode):
        ...     def neuronal_charge(self, x):
        ...         self.v = self.v + 2 * x
        >>> Doubling(step_mode="m")(torch.full((3, 1), 0.3)).flatten()
        tensor([0., 1., 0.])
    """

    dynamics: ClassVar[Neuron | None] = None  # the registry's entry that the kernels run, None for the reference path
    _constant_input: Tensor | None = None  # what the next call repeats itself, if that is its input
    tau: float = 2.0
    decay_input: bool = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in _NOT_HERE:
            if name in cls.__dict__:
                raise TypeError(
                    f"{cls.__name__} overrides {name}, which snnfast's neurons do not call: override "
                    "single_step_functional_forward alone, or take SpikingJelly's own BaseNode, which works beside ours"
                )
        known = next(c for c in cls.__mro__ if "dynamics" in c.__dict__)
        if any(getattr(cls, step) is not getattr(known, step) for step in _STEPS):  # a mixin's step too
            cls.dynamics = None  # a step of its own: no kernel knows it
        cls._by_class = _STEPS[:4] if cls.dynamics is not None else ()

    @says_what_it_takes
    def __init__(
        self,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: SurrogateLike = Sigmoid(),  # noqa: B008 (stateless; SpikingJelly's default)
        detach_reset: bool = False,
        step_mode: str = "s",
        store_v_seq: bool | str = False,
        *old_store_v_seq: bool,
        backend: str = "auto",
        timesteps: int | None = None,
    ) -> None:
        super().__init__()
        if isinstance(store_v_seq, str):
            backend, store_v_seq = store_v_seq, False
            if old_store_v_seq:
                store_v_seq, old_store_v_seq = old_store_v_seq[0], old_store_v_seq[1:]
        if old_store_v_seq:
            raise TypeError(f"{type(self).__name__} got too many positional arguments: {old_store_v_seq}")
        functional.check_surrogate(surrogate_function)
        self.v_threshold = functional.check_number("v_threshold", v_threshold)
        self.v_reset = None if v_reset is None else functional.check_number("v_reset", v_reset)
        self.register_memory("v", 0.0 if self.v_reset is None else self.v_reset)
        self.surrogate_function = surrogate_function
        self.detach_reset = bool(detach_reset)
        self.backend = backend
        self.timesteps = timesteps
        if timesteps is None:
            self.step_mode = step_mode
        self.store_v_seq = store_v_seq

    @property
    def store_v_seq(self) -> bool:
        """Whether ``v_seq`` keeps the potentials after each step."""
        return self._store_v_seq

    @store_v_seq.setter
    def store_v_seq(self, value: bool) -> None:
        self._store_v_seq = bool(value)
        self.v_seq: Tensor | None = None

    @property
    def supported_backends(self) -> tuple[str, ...]:
        """The names that ``backend`` accepts, those of older SpikingJelly code included."""
        return backends.NAMES + backends.LEGACY_NAMES

    def reset(self) -> None:
        """Return to the initial state; call it (or ``functional.reset_net``) before each new batch of sequences."""
        super().reset()
        self.v_seq = None

    def detach(self) -> None:
        """Keep the state and drop its autograd history (truncated BPTT)."""
        super().detach()
        if self.v_seq is not None:
            self.v_seq = self.v_seq.detach()

    # ---- the three steps, for neurons of your own ----
    def neuronal_charge(self, x: Tensor) -> None:
        """Set ``self.v`` to the charge ``h`` that input ``x`` ``[*]`` gives."""
        raise NotImplementedError(f"{type(self).__name__} must override neuronal_charge(self, x), which updates self.v")

    def neuronal_fire(self) -> Tensor:
        """Spikes ``[*]`` of the charge in ``self.v``."""
        return self.surrogate_function(self.v - self.v_threshold)

    def neuronal_reset(self, spike: Tensor) -> None:
        """Set ``self.v`` to the potential after the spikes."""
        r = spike.detach() if self.detach_reset else spike
        self.v = self.v - r * self.v_threshold if self.v_reset is None else r * self.v_reset + (1.0 - r) * self.v

    def v_float_to_tensor(self, x: Tensor) -> None:
        """Make ``v`` a tensor that fits one time step ``x`` ``[*]``, for a ``single_step_forward`` of your own."""
        v, dtype = self._state_for(x.unsqueeze(0)), dynamics.state_dtype(x.dtype)
        self.v = v if isinstance(v, Tensor) else torch.full_like(x, v, dtype=dtype, requires_grad=False)

    def single_step_functional_forward(
        self, inputs: tuple[Tensor, ...], states: tuple[Any, ...], **kwargs: Any
    ) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        """The three steps as SpikingJelly 2's neurons write them: ``((x,), states)`` -> ``((spikes,), states)``.

        ``states`` are those of :meth:`register_memory`, ``v`` first. A neuron of your own may override this instead.
        """
        self._set_memories(states)
        self._charge(inputs[0])
        s = self.neuronal_fire()
        self.neuronal_reset(s)
        return (s,), tuple(v for _, v in self.named_memories())

    # ---- calls ----
    def _step(self, x: Tensor) -> Tensor:
        """One step of the reference path; ``self.v`` is a tensor."""
        if type(self).single_step_functional_forward is not BaseNode.single_step_functional_forward:
            outputs, states = self.single_step_functional_forward((x,), tuple(v for _, v in self.named_memories()))
            self._set_memories(states)
            return outputs[0]
        self._charge(x)
        s = self.neuronal_fire()
        self.neuronal_reset(s)
        return s

    def _charge(self, x: Tensor) -> None:
        before = self.v
        returned = self.neuronal_charge(x)  # type: ignore[func-returns-value]
        if returned is not None and returned is not self.v and self.v is before:
            raise TypeError(
                f"{type(self).__name__}.neuronal_charge returned a {type(returned).__name__}, self.v is as it was: "
                "it must set self.v, as in self.v = self.v + x"
            )

    def _set_memories(self, states: tuple[Any, ...]) -> None:
        for name, value in zip(self._memory_reset_values, states, strict=True):
            setattr(self, name, value)

    def _own_steps(self, x_seq: Tensor) -> tuple[Tensor, Tensor | None]:
        """The reference path of a user's own neuron: ``[T, *]`` -> spikes and, if wanted, potentials."""
        dtype = dynamics.state_dtype(x_seq.dtype)
        self.v_float_to_tensor(x_seq[0])
        spikes, potentials = [], []
        for x in x_seq.to(dtype):
            spikes.append(self._step(x))
            if self._store_v_seq:
                potentials.append(self.v.clone())  # the next charge may write it in place
        v_seq = torch.stack(potentials) if potentials else None
        s, v, v_seq = ops.guard(torch.stack(spikes).to(x_seq.dtype), self.v, v_seq)
        self._leave(v)
        return s, v_seq

    def _decay(self, x_seq: Tensor) -> Tensor | None:
        """The learnable decay of a neuron that has one."""
        return None

    def _run(self, x_seq: Tensor) -> tuple[Tensor, Tensor | None]:
        """``[T, *]`` -> spikes ``[T, *]`` and potentials ``[T, *]`` or ``None``; updates ``self.v``."""
        neuron = self.dynamics
        if neuron is None:
            if self._backend in ("native", "triton"):
                raise ValueError(
                    f"backend={self._backend!r} has no kernel for {type(self).__name__}, which has steps of its own; "
                    "use backend='auto'"
                )
            return self._own_steps(x_seq)
        # Past nn.Module's search for it, where it is a module.
        surrogate_function = self._modules.get("surrogate_function") or self.surrogate_function
        s, v, v_seq = functional.multi_step(
            neuron,
            x_seq,
            self._state_for(x_seq),
            self._decay(x_seq),
            tau=self.tau,
            decay_input=self.decay_input,
            v_threshold=self.v_threshold,
            v_reset=self.v_reset,
            surrogate_function=surrogate_function,
            detach_reset=self.detach_reset,
            store_v_seq=self._store_v_seq,
            backend=self._backend,
        )
        self._leave(v)
        return s, v_seq

    def _constants(self, v_init: float) -> Constants:
        """What the kernels take of the arguments, for states that start from ``v_init``."""
        return functional.constants_of(
            self.dynamics,  # type: ignore[arg-type]
            recognise(self.surrogate_function),
            v_init,
            tau=self.tau,
            decay_input=self.decay_input,
            v_threshold=self.v_threshold,
            v_reset=self.v_reset,
            detach_reset=self.detach_reset,
        )

    def _state_and_decay(self, x_seq: Tensor) -> tuple[Tensor | None, float, Tensor | None]:
        """What the kernels start from: a state, or else a number; and the decay in the state's dtype."""
        v, decay = self._state_for(x_seq), self._decay(x_seq)
        v0, v_init = (v, 0.0) if isinstance(v, Tensor) else (None, v)
        return v0, v_init, None if decay is None else decay.to(dynamics.state_dtype(x_seq.dtype))

    def _takes_constant(self, x: Tensor) -> bool:
        """Whether the call that follows may take ``x`` ``[B, *]`` as the input of each of its time steps, so that
        nobody need repeat it; :meth:`multi_step_forward` then knows ``x`` by what it is."""
        fits = (
            type(self) in (IFNode, LIFNode, ParametricLIFNode)
            and "forward" not in self.__dict__
            and "multi_step_forward" not in self.__dict__
            and self.timesteps is not None
            and not any((self._forward_hooks, self._backward_hooks, self._backward_pre_hooks))
            and not any(ALL_MODULES_HOOKS)
            and not self._store_v_seq
            and self._backend in ("auto", "native")
            and constant_input.serves(x, self.timesteps)
            and not (isinstance(self.v, Tensor) and is_wrapped(self.v))
            and is_fused(recognise(self.surrogate_function))
        )
        if fits:
            self._constant_input = x
        return fits

    def _run_constant(self, x: Tensor) -> Tensor:
        """``[B, *]``, the same at every step -> spikes ``[T * B, *]``."""
        v0, v_init, decay = self._state_and_decay(x.unsqueeze(0))
        s, v = constant_input.multi_step(x, self._timesteps, v0, decay, self._constants(v_init))  # type: ignore[arg-type]
        self._leave(v)
        self.v_seq = None
        return s.flatten(0, 1)

    def single_step_forward(self, x: Tensor) -> Tensor:
        """One time step: ``[*]`` -> spikes ``[*]``."""
        functional.check_input("x", x, 0)
        s, v_seq = self._run(x.unsqueeze(0))
        if v_seq is not None:
            before = self.v_seq
            goes_on = before is not None and (before.shape[1:], before.dtype, before.device) == (
                v_seq.shape[1:], v_seq.dtype, v_seq.device
            )  # fmt: skip
            self.v_seq = torch.cat((before, v_seq)) if goes_on else v_seq  # type: ignore[arg-type]
        return s.squeeze(0)

    def multi_step_forward(self, x_seq: Tensor) -> Tensor:
        """All time steps: ``[T, *]`` -> spikes ``[T, *]``; with ``timesteps`` ``[T * B, *]`` -> ``[T * B, *]``."""
        constant = self._constant_input
        if constant is not None:
            self._constant_input = None
            if constant is x_seq:
                return self._run_constant(x_seq)
        T = self._timesteps
        functional.check_input("x_seq", x_seq, 1, folded=T is not None)
        own = type(self).single_step_forward is not BaseNode.single_step_forward
        if T is None:
            s, v_seq = self._each_step(x_seq) if own else self._run(x_seq)
            if v_seq is not self.v_seq:
                self.v_seq = v_seq
            return s
        if x_seq.shape[0] % T:
            raise ValueError(
                f"x_seq must be [T * B, *] with timesteps={T}, got a first dimension of {x_seq.shape[0]}, which {T} "
                "does not divide; repeat the input T times before the network, or set timesteps to its number of steps"
            )
        x_seq = x_seq.unflatten(0, (T, x_seq.shape[0] // T))
        s, self.v_seq = self._each_step(x_seq) if own else self._run(x_seq)
        return s.flatten(0, 1)

    def _each_step(self, x_seq: Tensor) -> tuple[Tensor, Tensor | None]:
        """A user's own :meth:`single_step_forward` over time: ``[T, *]`` -> its outputs and, if wanted, potentials."""
        outputs, potentials = [], []
        for x in x_seq:
            outputs.append(self.single_step_forward(x))
            if self._store_v_seq:
                potentials.append(self.v.clone())
        return torch.stack(outputs), torch.stack(potentials) if potentials else None

    def extra_repr(self) -> str:
        parts = [
            f"v_threshold={self.v_threshold}, v_reset={self.v_reset}, detach_reset={self.detach_reset}",
            f"step_mode={self.step_mode}, backend={self.backend}",
        ]
        if self.timesteps is not None:
            parts.append(f"timesteps={self.timesteps}")
        return ", ".join(parts)


class IFNode(BaseNode):
    """Integrate-and-fire neuron: ``h = v + x``, spike where ``h >= v_threshold``, reset.

    Arguments, attributes and errors are those of :class:`BaseNode`.

    Example:
        >>> IFNode(step_mode="m")(torch.full((4, 1), 0.5)).flatten()
        tensor([0., 1., 0., 1.])
    """

    dynamics = dynamics.IF

    def neuronal_charge(self, x: Tensor) -> None:
        self.v = self.v + x


class LIFNode(BaseNode):
    """Leaky integrate-and-fire neuron.

    ``h = v + (x - (v - v_reset)) / tau`` with ``decay_input``, else ``h = v - (v - v_reset) / tau + x`` (``v_reset``
    taken as 0 for soft reset); spike where ``h >= v_threshold``; reset.

    Args:
        tau: membrane time constant in time steps, above 1.
        decay_input: whether the input is divided by ``tau`` too.

    The other arguments, attributes and errors are those of :class:`BaseNode`.

    Example:
        >>> LIFNode(tau=2.0, step_mode="m")(torch.full((4, 1), 1.5)).flatten()
        tensor([0., 1., 0., 1.])
    """

    dynamics = dynamics.LIF

    @says_what_it_takes
    def __init__(
        self,
        tau: float = 2.0,
        decay_input: bool = True,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: SurrogateLike = Sigmoid(),  # noqa: B008
        detach_reset: bool = False,
        step_mode: str = "s",
        store_v_seq: bool | str = False,
        *old_store_v_seq: bool,
        backend: str = "auto",
        timesteps: int | None = None,
    ) -> None:
        super().__init__(
            v_threshold,
            v_reset,
            surrogate_function,
            detach_reset,
            step_mode,
            store_v_seq,
            *old_store_v_seq,
            backend=backend,
            timesteps=timesteps,
        )
        self.tau = functional.check_tau("tau", tau)
        self.decay_input = bool(decay_input)

    def neuronal_charge(self, x: Tensor) -> None:
        p = Parameters(self.v_threshold, self.v_reset, self.surrogate_function, self.tau, None, self.decay_input)
        self.v = dynamics.charge_lif(x, self.v, p)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, tau={self.tau}"


class ParametricLIFNode(BaseNode):
    """Parametric LIF neuron: :class:`LIFNode` with the learnable ``sigmoid(w)`` in place of ``1 / tau``.

    From Fang et al., "Incorporating Learnable Membrane Time Constant to Enhance Learning of Spiking Neural Networks",
    ICCV 2021.

    Args:
        init_tau: initial time constant in time steps, above 1.
        decay_input: whether the input is multiplied by ``sigmoid(w)`` too.

    Attributes:
        w: parameter, a scalar; one time constant for all neurons of the module.

    The other arguments, attributes and errors are those of :class:`BaseNode`.

    Example:
        >>> ParametricLIFNode(init_tau=2.0).w
        Parameter containing:
        tensor(-0., requires_grad=True)
    """

    dynamics = dynamics.PARAMETRIC_LIF

    @says_what_it_takes
    def __init__(
        self,
        init_tau: float = 2.0,
        decay_input: bool = True,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: SurrogateLike = Sigmoid(),  # noqa: B008
        detach_reset: bool = False,
        step_mode: str = "s",
        store_v_seq: bool | str = False,
        *old_store_v_seq: bool,
        backend: str = "auto",
        timesteps: int | None = None,
    ) -> None:
        super().__init__(
            v_threshold,
            v_reset,
            surrogate_function,
            detach_reset,
            step_mode,
            store_v_seq,
            *old_store_v_seq,
            backend=backend,
            timesteps=timesteps,
        )
        self.decay_input = bool(decay_input)
        self.w = nn.Parameter(torch.as_tensor(-math.log(functional.check_tau("init_tau", init_tau) - 1.0)))

    def _decay(self, x_seq: Tensor) -> Tensor:
        if self.w.device != x_seq.device:
            raise ValueError(
                f"x_seq must be on the module's device {self.w.device}, got {x_seq.device}; move one with .to(device)"
            )
        if self.w.dim():
            raise ValueError(f"w must be one number for all neurons, of shape (), got shape {tuple(self.w.shape)}")
        return self.w.sigmoid()

    def neuronal_charge(self, x: Tensor) -> None:
        p = Parameters(self.v_threshold, self.v_reset, self.surrogate_function, 1.0, self.w.sigmoid(), self.decay_input)
        self.v = dynamics.charge_parametric_lif(x, self.v, p)

    def extra_repr(self) -> str:
        if self.w.is_meta or self.w.dim():
            return super().extra_repr()
        with torch.no_grad():
            return f"{super().extra_repr()}, tau={(1.0 / self.w.sigmoid()).item():g}"


if not TYPE_CHECKING:  # to a type checker, what is not there is an error
    __getattr__ = without(__name__)
