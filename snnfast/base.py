"""State and step mode: what every stateful spiking module shares."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from . import backends, dynamics
from ._arguments import check_steps

__all__ = ["KernelModule", "MemoryModule", "StepModule"]


class StepModule:
    """A module that knows single-step (``'s'``, one call per time step) and multi-step (``'m'``, time first) mode."""

    _step_mode: str = "s"

    def supported_step_mode(self) -> tuple[str, ...]:
        """The step modes that this module accepts."""
        return ("s", "m")

    @property
    def step_mode(self) -> str:
        """``'s'``: input ``[*]``, one time step a call; ``'m'``: input ``[T, *]``, all steps in one call."""
        return self._step_mode

    @step_mode.setter
    def step_mode(self, value: str) -> None:
        if value not in self.supported_step_mode():
            accepted = " or ".join(map(repr, self.supported_step_mode()))
            raise ValueError(f"step_mode must be {accepted}, got {value!r}")
        self._step_mode = value


class MemoryModule(nn.Module, StepModule):
    """A module with state that outlives a call and returns to its initial value on :meth:`reset`.

    Register state with :meth:`register_memory` and use it as an ordinary attribute. Deep copies and pickles carry the
    state without its autograd history.

    Example:
        >>> class Counter(MemoryModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.register_memory("n", 0)
        >>> m = Counter(); m.n += 1; m.n
        1
        >>> m.reset(); m.n
        0
    """

    _by_class: ClassVar[tuple[str, ...]] = ()  # methods that are looked for in the class alone

    def __init__(self) -> None:
        super().__init__()
        self._memory_reset_values: dict[str, Any] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        # State is set on every call: past nn.Module's search for parameters, buffers and modules of that name.
        if name in self.__dict__ and name in self.__dict__.get("_memory_reset_values", ()):
            object.__setattr__(self, name, value)
        elif name in self._by_class:
            raise TypeError(f"{name} of one {type(self).__name__} would not be called: override it in a subclass")
        else:
            super().__setattr__(name, value)

    def register_memory(self, name: str, value: Any) -> None:
        """Add the state variable ``name``, which starts at ``value`` and returns to it on reset."""
        if hasattr(self, name):
            raise ValueError(f"name must be new: this module has an attribute {name!r} already")
        self._memory_reset_values[name] = copy.deepcopy(value)
        setattr(self, name, value)

    def set_reset_value(self, name: str, value: Any) -> None:
        """Change the value that ``name`` takes on the next reset."""
        if name not in self._memory_reset_values:
            raise ValueError(f"name must be one of {list(self._memory_reset_values)}, got {name!r}")
        self._memory_reset_values[name] = copy.deepcopy(value)

    def named_memories(self) -> list[tuple[str, Any]]:
        """The state variables of this module, by name."""
        return [(name, getattr(self, name)) for name in self._memory_reset_values]

    def reset(self) -> None:
        """Return every state variable to its initial value."""
        for name, value in self._memory_reset_values.items():
            # torch.compile before 2.8 knows no deepcopy of a number.
            setattr(self, name, value if isinstance(value, (int, float)) else copy.deepcopy(value))

    def detach(self) -> None:
        """Keep the state and drop its autograd history (truncated BPTT)."""
        for name in self._memory_reset_values:
            value = getattr(self, name)
            if isinstance(value, Tensor):
                setattr(self, name, value.detach())

    def __getstate__(self) -> dict[str, Any]:
        # Autograd history can be neither copied nor pickled, and a copy has no use for it.
        return {
            name: value.detach() if isinstance(value, Tensor) and value.grad_fn is not None else value
            for name, value in self.__dict__.items()
            if name != "_left"
        }

    @property
    def __deepcopy__(self) -> Any:
        """``None``, as copies are made from ``__getstate__``; parametrized modules, which have none, are copied here.

        Were there no such attribute, :mod:`torch.nn.utils.parametrize` would add a method that copies the history too.
        """
        return self._copy_parametrized if parametrize.is_parametrized(self) else None

    def _copy_parametrized(self, memo: dict[int, Any]) -> MemoryModule:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(MemoryModule.__getstate__(self), memo))
        return copied

    def _apply(self, fn: Any, recurse: bool = True) -> MemoryModule:
        for name in self._memory_reset_values:
            value = getattr(self, name)
            if isinstance(value, Tensor):
                setattr(self, name, fn(value))
        for name, value in self._memory_reset_values.items():
            if isinstance(value, Tensor):
                self._memory_reset_values[name] = fn(value)
        return super()._apply(fn, recurse)

    def single_step_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """One time step; input ``[*]``."""
        raise NotImplementedError(f"{type(self).__name__} must implement single_step_forward")

    def multi_step_forward(self, x_seq: Tensor, *args: Any, **kwargs: Any) -> Any:
        """All time steps, by default one after another; input ``[T, *]``."""
        return torch.stack([self.single_step_forward(x, *args, **kwargs) for x in x_seq])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._step_mode == "s":
            return self.single_step_forward(*args, **kwargs)
        return self.multi_step_forward(*args, **kwargs)

    def extra_repr(self) -> str:
        return f"step_mode={self.step_mode}"


class KernelModule(MemoryModule):
    """What a neuron and the readout share: the potential ``v``, the backend, and the folded layout."""

    v: Any  # a number or a tensor
    v_reset: float | None
    _left: int = 0  # the id of the potential that the last call left

    def __init__(self) -> None:
        super().__init__()
        self._left = 0

    def __prepare_scriptable__(self) -> Any:
        raise TypeError(
            f"torch.jit.script cannot compile {type(self).__name__}: record the model with torch.export.export(model, "
            "(x,)) or torch.jit.trace(model, x, check_trace=False)"
        )

    @property
    def backend(self) -> str:
        """The backend's name; see :func:`snnfast.functional.set_backend`."""
        return self._backend

    @backend.setter
    def backend(self, value: str) -> None:
        self._backend = backends.check_name(value)

    @property
    def timesteps(self) -> int | None:
        """``T`` of an input folded as ``[T * B, *]``, which implies multi-step mode; ``None`` for the other layouts."""
        return self._timesteps

    @timesteps.setter
    def timesteps(self, value: int | None) -> None:
        self._timesteps = None if value is None else check_steps("timesteps", value, ", or None")
        if value is not None:
            self.step_mode = "m"

    @property
    def step_mode(self) -> str:
        """``'s'``: input ``[*]``, one time step a call; ``'m'``: input ``[T, *]``, all steps in one call."""
        return self._step_mode

    @step_mode.setter
    def step_mode(self, value: str) -> None:
        if value == "s" and self._timesteps is not None:
            raise ValueError(
                f"step_mode must be 'm' while timesteps={self._timesteps}, whose input [T * B, *] has all steps: set "
                "timesteps = None first"
            )
        StepModule.step_mode.fset(self, value)  # type: ignore[attr-defined]

    def _leave(self, v: Tensor) -> None:
        """Keep the potential after a call."""
        self.v = v
        if not torch.compiler.is_compiling():
            # What a backward pass has run again itself it may go on from: a loop over time, a later chunk.
            self.__dict__["_left"] = id(v) if torch._C._current_graph_task_id() == -1 else 0

    def _state_for(self, x_seq: Tensor) -> float | Tensor:
        """``self.v`` as it fits ``x_seq``: kept, moved to its dtype and device, or started afresh."""
        v = self.v
        if not isinstance(v, Tensor):
            return float(v)
        self._refuse_to_go_on_in_backward()
        if v.shape != x_seq.shape[1:]:
            start = self._memory_reset_values["v"]
            return start if not isinstance(start, Tensor) else 0.0 if self.v_reset is None else self.v_reset
        dtype = dynamics.state_dtype(x_seq.dtype)
        return v if v.dtype == dtype and v.device == x_seq.device else v.to(device=x_seq.device, dtype=dtype)

    def _refuse_to_go_on_in_backward(self) -> None:
        """Raise where a checkpoint that knows nothing of states runs this again: from the potential of its own end."""
        if torch.compiler.is_compiling():
            return
        if torch._C._current_graph_task_id() != -1 and id(self.v) == self._left:
            raise RuntimeError(
                "a snnfast neuron is run again in a backward pass, from the potential that the forward pass left: "
                "gradients would be wrong. Use snnfast.checkpoint.checkpoint(module, x) in place of "
                "torch.utils.checkpoint"
            )
