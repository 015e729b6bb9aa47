"""Sizes: parameters by layer, and the bytes that a forward pass keeps for its backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import memory
from ._tables import table

__all__ = ["ParameterTable", "parameter_table", "saved_bytes"]


@dataclass
class ParameterTable:
    """What :func:`parameter_table` found; ``print`` shows it as a table.

    Attributes:
        layers: path, class, parameters, of them trainable, bytes with buffers, of each module that has some itself.
    """

    layers: list[tuple[str, str, int, int, int]]

    @property
    def parameters(self) -> int:
        """Number of parameters, shared ones counted once."""
        return sum(layer[2] for layer in self.layers)

    @property
    def trainable(self) -> int:
        """Number of parameters that require a gradient."""
        return sum(layer[3] for layer in self.layers)

    @property
    def bytes(self) -> int:
        """Bytes of parameters and buffers."""
        return sum(layer[4] for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers for JSON."""
        keys = ("name", "kind", "parameters", "trainable", "bytes")
        layers = [dict(zip(keys, layer, strict=True)) for layer in self.layers]
        return {"parameters": self.parameters, "trainable": self.trainable, "bytes": self.bytes, "layers": layers}

    def __str__(self) -> str:
        rows = [(name, kind, *(f"{n:,}" for n in numbers)) for name, kind, *numbers in self.layers]
        total = ("total", "", f"{self.parameters:,}", f"{self.trainable:,}", f"{self.bytes:,}")
        return table(("layer", "kind", "parameters", "trainable", "bytes"), [*rows, total], left=2)


def parameter_table(model: nn.Module) -> ParameterTable:
    """Parameters and bytes of a network by layer; what two layers share is counted at the first.

    Raises:
        TypeError: ``model`` is no module.

    Example:
        >>> parameter_table(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))).parameters
        12
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    seen: set[int] = set()
    layers = []
    for name, module in model.named_modules():
        parameters = [p for p in module.parameters(recurse=False) if id(p) not in seen and not seen.add(id(p))]  # type: ignore[func-returns-value]
        buffers = [b for b in module.buffers(recurse=False) if id(b) not in seen and not seen.add(id(b))]  # type: ignore[func-returns-value]
        if parameters or buffers:
            layers.append(
                (
                    name or "network",
                    type(module).__name__,
                    sum(p.numel() for p in parameters),
                    sum(p.numel() for p in parameters if p.requires_grad),
                    sum(t.numel() * t.element_size() for t in [*parameters, *buffers]),
                )
            )
    return ParameterTable(layers)


def _place(storage: torch.UntypedStorage) -> int:
    """What tells ``storage`` from others: its address, or on the meta device, without memory, that of its object."""
    return storage.data_ptr() or storage._cdata


def saved_bytes(function: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Bytes of memory that ``function(*args, **kwargs)`` keeps for its backward pass.

    Counted are the storages of all tensors that autograd saves, each storage once and whole, however many tensors look
    into it; parameters and buffers, where ``function`` is a module, are left out, for they are there anyway. The input
    is counted if it is kept, and so is what the function itself lets go again before it returns. Tensors that a custom
    function hides from autograd are not seen. Within :class:`snnfast.packed_spikes`, what that keeps is counted.

    Args:
        function: a module or any function; it is called once, with gradients.

    Raises:
        TypeError: ``function`` cannot be called.

    Example:
        >>> x = torch.randn(10, 100, requires_grad=True)
        >>> saved_bytes(torch.sin, x), saved_bytes(lambda x: x + 1, x)
        (4000, 0)
    """
    if not callable(function):
        raise TypeError(f"function must be a module or a function, got {type(function).__name__}")
    own: set[int] = set()
    if isinstance(function, nn.Module):
        own = {_place(t.untyped_storage()) for t in [*function.parameters(), *function.buffers()]}
    kept: dict[int, int] = {}
    alive: list[Any] = []  # a freed storage's address would be used again
    packing = memory.is_packing()

    def pack(t: Tensor) -> Any:
        storage = t.untyped_storage()
        place = _place(storage)
        packed = memory.made_smaller(t) if packing and place not in own else None
        if packed is not None:
            kept[id(packed)] = packed.nbytes
            alive.append(packed)
        elif place not in own and storage.nbytes():
            kept[place] = storage.nbytes()
            alive.append(storage)
        return packed or t

    def unpack(kept: Any) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept.unpack()

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        function(*args, **kwargs)
    return sum(kept.values())
