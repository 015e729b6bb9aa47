"""``unroll``: a model that is written for one time step, run layer by layer over all of them.

Code that loops ``for t in range(T): out = net(x[t])`` makes T small calls to each layer. The same results come from one
call to each layer on all steps, wherever a step of a layer needs nothing from a later layer: stateless layers take time
as part of the batch, and neurons run over time in one fused call.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map

from .._arguments import check_steps, says_what_it_takes
from .._notices import say_once
from ..pooling import PYTORCHS, MaxPool2d, max_pool2d
from ..tensors import is_called_plainly
from .adapters.base import FinalState
from .stepping import is_stateful, refuse_multi_step, refuse_wrapper, run_over_time
from .unroll_graph import CONSTANT, TIMED, Program, program_of

__all__ = ["unroll"]


@says_what_it_takes
def unroll(
    model: nn.Module,
    x: Tensor,
    timesteps: int | None = None,
    *,
    state: Sequence[Any] = (),
    bn: str = "per_step",
) -> Any:
    """Run a model of one time step layer by layer over all time steps, with the results of the loop over time.

    It replaces ``for t in range(T): out, *state = model(x[t], *state)`` and gives what the loop collects, stacked:
    tensors ``[T, B, ...]`` in the nest that ``forward`` returns (membranes that snnTorch's neurons return are
    sequences; a Norse state is the one after the last step). Neurons keep and update their own state as in the loop.

    snnfast's own neurons and those that :func:`snnfast.accelerate` converted run fused; any other neuron of
    SpikingJelly, snnTorch or Norse, and one with hooks, is stepped. Other layers see ``[T * B, ...]``, and so do their
    hooks; ``forward`` must treat each sample by itself, for a mean over the batch would be one over time too. Dropout
    and other random numbers are drawn for each step, from others than the loop would. Layers before the first neuron
    (and before a random draw) run once if the input is constant. Its tensors are ``T`` times as large as the loop's:
    on a CPU call :func:`snnfast.keep_freed_memory` once, or malloc fetches the larger ones from the system each time.

    Args:
        model: its ``forward`` takes one time step ``[B, ...]``, then states of its neurons, if it takes any.
        x: ``[T, B, ...]``; or, with ``timesteps``, a constant input ``[B, ...]`` for every step.
        timesteps: ``T`` of a constant input; for a sequence, which has its own, leave it out.
        state: what the loop passes before the first step for ``forward``'s further arguments, each the state of one
            neuron.
        bn: batch norm in training mode: ``'per_step'`` normalises each step by its own statistics, as the loop does;
            ``'merged'`` all steps by common ones, which is faster and another model.

    Raises:
        TypeError: ``model`` is not a module; ``x`` is not a tensor; ``forward`` needs other states than were given.
        ValueError: ``forward`` has its own loop over time, is recurrent, changes states, attributes, buffers or
            parameters itself, does another thing at each call, or holds a neuron that is multi-step already; a module
            with neurons inside has hooks; a layer cannot take the steps of ``x``, which has no time axis, or has one
            beside ``timesteps``.

    Example:
        >>> import snnfast
        >>> net = nn.Sequential(nn.Linear(3, 2), snnfast.IFNode())
        >>> unroll(net, torch.ones(4, 3), timesteps=5).shape
        torch.Size([5, 4, 2])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    refuse_wrapper(model)
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
    if bn not in ("per_step", "merged"):
        raise ValueError(f"bn must be 'per_step' or 'merged', got {bn!r}")
    if timesteps is not None:
        timesteps = check_steps("timesteps", timesteps, ", or None")
    if x.dim() < (2 if timesteps is None else 1) or (timesteps is None and not x.shape[0]):
        raise ValueError(
            f"x must be [T, B, ...] with at least one step, or [B, ...] with timesteps, got {tuple(x.shape)}"
        )
    T, batch = (x.shape[0], x.shape[1]) if timesteps is None else (timesteps, x.shape[0])
    if is_stateful(model):
        return _alone(model, x if timesteps is None else x.expand(T, *x.shape), state)
    try:
        program = program_of(model, len(state))
    except ValueError:
        _refuse_multi_step_layers(model)  # a container of them may look like a loop over time
        raise
    reading = _reading(tuple(x.shape), timesteps)
    if _looks_misread(model, program, x, timesteps):
        say_once(f"unroll: {reading}")
    hoists = timesteps is not None and program.hoists
    if not hoists:
        x = x.flatten(0, 1) if timesteps is None else _repeated(x, T)
    kinds = program.kinds if hoists else program.kinds_timed
    return _Pass(model, program, kinds, T, batch, bn, reading).run(x, state)


def _reading(shape: tuple[int, ...], timesteps: int | None) -> str:
    """How ``x`` was understood, for the error of a layer that it does not fit."""
    if timesteps is None:
        return (
            f"x of shape {shape} was read as [T, B, ...], {shape[0]} time steps of {shape[1]} samples of shape "
            f"{shape[2:]}; if it has no time axis, say how many steps it is to be given: unroll(model, x, timesteps=T)"
        )
    return (
        f"x of shape {shape} was read as [B, ...], {shape[0]} samples of shape {shape[1:]}, each the same at "
        f"timesteps={timesteps} steps; if it is a sequence [T, B, ...], leave timesteps out: unroll(model, x)"
    )


def _looks_misread(model: nn.Module, program: Program, x: Tensor, timesteps: int | None) -> bool:
    """Whether a constant was most likely meant as a sequence, or images as a constant, where no layer would refuse it:
    a linear layer takes the time axis as one more, flattening takes what is there. Other layers refuse."""
    called = [n for n in program.placeholders[0].users if n.op == "call_module"]
    first = [model.get_submodule(str(n.target)) for n in called]
    if timesteps is not None:
        return x.dim() > 2 and x.shape[0] == timesteps and any(isinstance(m, nn.Linear) for m in first)
    return x.dim() > 3 and x.shape[1] == 1 and any(isinstance(m, nn.Flatten) for m in first)  # [B, 1, H, W]


def _refuse_multi_step_layers(model: nn.Module) -> None:
    """The reason why a call failed, if it is that a layer takes all steps already."""
    for name, module in model.named_modules():
        refuse_multi_step(name or "the model", module)


def _alone(neuron: nn.Module, x: Tensor, state: Sequence[Any]) -> Any:
    """A model that is one neuron."""
    found = run_over_time(neuron, type(neuron).__name__, x, state, {}, None)
    shape = x.shape[:2]
    found = tuple(
        t.state if isinstance(t, FinalState) else t.unflatten(0, shape)
        for t in (found if isinstance(found, tuple) else (found,))
    )
    return found if len(found) > 1 else found[0]


def _repeated(x: Tensor, T: int) -> Tensor:
    """A constant for every step, ``[B, ...]`` -> ``[T * B, ...]``; a number as it is."""
    return x if not x.dim() else x.unsqueeze(0).expand(T, *x.shape).flatten(0, 1)


def _plain(value: Any) -> Any:
    """With lists and dictionaries of Python's own in place of fx's, which nobody may change."""
    if type(value) is fx.immutable_collections.immutable_list:
        return [_plain(v) for v in value]
    if type(value) is fx.immutable_collections.immutable_dict:
        return {k: _plain(v) for k, v in value.items()}
    return tuple(_plain(v) for v in value) if type(value) is tuple else value


@contextlib.contextmanager
def _under(modes: Sequence[Any]) -> Iterator[None]:
    """The modes that forward set for a node: no gradients, or a cast of a kind of device."""
    with contextlib.ExitStack() as stack:
        for mode in modes:
            stack.enter_context(torch.autocast(*mode) if isinstance(mode, tuple) else torch.set_grad_enabled(mode))
        yield


def _place(node: fx.Node) -> str:
    """``node`` as the user knows it: a module by its path."""
    return repr(node.target) if node.op == "call_module" else node.name


class _Pass:
    """One run of a program. Timed values are tensors ``[T * B, ...]``."""

    def __init__(
        self,
        model: nn.Module,
        program: Program,
        kinds: dict[fx.Node, str],
        T: int,
        batch: int,
        bn: str,
        reading: str,
    ) -> None:
        self.model, self.program, self.kinds, self.T, self.batch, self.bn = model, program, kinds, T, batch, bn
        self.reading = reading
        self.values: dict[fx.Node, Any] = {}

    def run(self, x: Tensor, state: Sequence[Any]) -> Any:
        self.values.update(zip(self.program.placeholders, (x, *state), strict=True))
        for node in self.program.graph.nodes:
            if node.op == "output":
                return _plain(fx.map_arg(node.args[0], self._returned))
            if node not in self.values:
                try:
                    modes = node.meta["modes"]
                    with _under(modes) if modes else contextlib.nullcontext():
                        self.values[node] = self._value(node)
                except (RuntimeError, ValueError, IndexError) as error:
                    if node in self.program.stateful:
                        raise
                    _refuse_multi_step_layers(self.model)
                    if not self._fits_but_for_shape(node, error):
                        raise
                    raise ValueError(
                        f"{_place(node)} cannot take what comes to it ({error}). {self.reading}"
                    ) from error
        raise AssertionError("a graph ends with its output")

    def _fits_but_for_shape(self, node: fx.Node, error: Exception) -> bool:
        """Whether a call may have failed for its input's shape: dtypes and devices agree, and memory was enough."""
        found = [v for n in node.all_input_nodes if isinstance(v := self.values[n], Tensor)]
        if node.op == "call_module":
            found += self.model.get_submodule(str(node.target)).parameters()
        kinds = {(t.dtype, t.device) for t in found if t.is_floating_point()}
        return bool(found) and len(kinds) == 1 and not isinstance(error, torch.OutOfMemoryError)

    def _returned(self, node: fx.Node) -> Any:
        each = {TIMED: self._unfolded, CONSTANT: self._expanded}.get(self.kinds[node])
        value = self.values[node]
        if each is None:
            return value
        return tree_map(
            lambda t: each(t, node) if isinstance(t, Tensor) else t.state if isinstance(t, FinalState) else t,
            value,
            is_leaf=lambda t: isinstance(t, FinalState),
        )

    def _expanded(self, t: Tensor, node: fx.Node) -> Tensor:
        return t.unsqueeze(0).expand(self.T, *t.shape)

    def _unfolded(self, t: Tensor, node: fx.Node, use: str = "forward returns") -> Tensor:
        if not t.dim() or t.shape[0] != self.T * self.batch:
            raise ValueError(
                f"{_place(node)}, which {use}, has shape {tuple(t.shape)} where {self.T} steps of {self.batch} samples "
                f"come: it mixes samples, which unroll cannot take apart. {self.reading}"
            )
        return t.unflatten(0, (self.T, self.batch))

    def _value(self, node: fx.Node) -> Any:
        timed = self.kinds[node] == TIMED
        target: Any = node.target

        def value(n: fx.Node) -> Any:
            v = self.values[n]
            if timed and self.kinds[n] == TIMED and isinstance(v, Tensor) and not v.dim():
                raise ValueError(
                    f"{_place(node)} takes one number, {n.name}, of all samples of all steps, where the loop has one "
                    f"for each step: unroll cannot take it apart. {self.reading}"
                )
            return _repeated(v, self.T) if timed and self.kinds[n] == CONSTANT and isinstance(v, Tensor) else v

        if node.op == "get_attr":
            constants = self.program.constants
            return constants[target] if target in constants else operator.attrgetter(target)(self.model)
        args: Any = fx.map_arg(node.args, value)
        kwargs: Any = fx.map_arg(node.kwargs, value)
        if node.op == "call_function":
            if target in (F.batch_norm, torch.batch_norm) and timed and self.bn == "per_step":
                return torch.cat([target(step, *args[1:], **kwargs) for step in self._steps(args[0])])
            return (max_pool2d if target in PYTORCHS else target)(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        module: Any = self.model.get_submodule(target)
        if node in self.program.stateful:
            used: Any = {n.args[1] for n in node.users} if _unpacked(node) else None
            x = self._unfolded(args[0], node.all_input_nodes[0], f"{_place(node)} takes")
            return run_over_time(module, target, x, args[1:], kwargs, used)
        if type(module) is nn.MaxPool2d and is_called_plainly(module):
            return MaxPool2d.forward(module, *args, **kwargs)  # type: ignore[arg-type]
        if isinstance(module, _BatchNorm) and module.training and self.bn == "per_step":
            return self._batch_norm(module, args[0], timed)
        return module(*args, **kwargs)

    def _steps(self, x: Tensor) -> tuple[Tensor, ...]:
        # Not unflatten: it gives a batch of 1 a stride with which torch's batch norm has wrong gradients.
        return x.split([self.batch] * self.T)

    def _batch_norm(self, module: Any, x: Tensor, timed: bool) -> Tensor:
        """Normalised step by step; for a constant once, and the running statistics as often as the loop would."""
        if timed:
            return torch.cat([module(step) for step in self._steps(x)])
        y = module(x)
        if module.track_running_stats and self.T > 1:
            with torch.no_grad():
                dims = [d for d in range(x.dim()) if d != 1]
                var, mean = torch.var_mean(x.detach(), dims)
                for _ in range(self.T - 1):
                    module.num_batches_tracked.add_(1)
                    m = module.momentum
                    m = 1.0 / float(module.num_batches_tracked) if m is None else m
                    # Past autograd's version counter, as batch norm itself writes them: its backward has them saved.
                    module.running_mean.data.lerp_(mean.to(module.running_mean), m)
                    module.running_var.data.lerp_(var.to(module.running_var), m)
        return y


def _unpacked(node: fx.Node) -> bool:
    """Whether every use of a neuron's result takes one element of it, counted from the front."""
    return all(
        n.op == "call_function" and n.target is operator.getitem and isinstance(n.args[1], int) and n.args[1] >= 0
        for n in node.users
    )
