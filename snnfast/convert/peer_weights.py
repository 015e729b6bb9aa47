"""Weights from and to the same architecture written with another library: :func:`load_peer_weights` and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..neuron import BaseNode
from ..readout import LI
from .adapters.base import Fused, adapters
from .peer_neurons import PEERS, Inexpressible, Peer, own, set_own

__all__ = ["give_peer_weights", "load_peer_weights", "peer_state_dict"]


def load_peer_weights(
    model: nn.Module, source: nn.Module | Mapping[str, Tensor], peer: str | None = None, **options: Any
) -> None:
    """Load into ``model`` the weights of the same architecture written with SpikingJelly, snnTorch, Norse or sinabs.

    Layers and neurons correspond by their names in the two networks. Besides the ``state_dict`` of the layers, each
    neuron of ``model`` gets the ``tau`` (or ``w``) and the ``v_threshold`` with which it spikes as the other does; a
    neuron that cannot is refused. What is carried over, and what not, is in ``docs/migration.md``.

    Args:
        model: a network with :class:`~snnfast.IFNode`, :class:`~snnfast.LIFNode` and
            :class:`~snnfast.ParametricLIFNode`; nothing is changed if anything is refused.
        source: the other network; or its ``state_dict``, which tells less of its neurons. Norse's tells nothing.
        peer: whose ``state_dict`` it is, ``'spikingjelly'``, ``'snntorch'`` or ``'sinabs'``; found from its entries if
            it holds neurons of the last two.
        options: how the neurons of a ``state_dict`` were made where it does not tell and the library's default does
            not hold: ``reset_delay`` for snnTorch; ``spike_fn``, ``reset_fn`` and ``norm_input`` for sinabs.

    Raises:
        TypeError: ``model`` is not a module, ``source`` neither a module nor a mapping, or an option is unknown.
        ValueError: neurons or entries do not correspond, or a neuron has no equal; the message names it.

    Example:
        >>> import snnfast, snntorch
        >>> theirs = nn.Sequential(nn.Linear(3, 2), snntorch.Leaky(beta=0.75, reset_mechanism="zero"))
        >>> net = nn.Sequential(nn.Linear(3, 2), snnfast.LIFNode(decay_input=False))
        >>> load_peer_weights(net, theirs.state_dict())
        >>> net[1].tau, torch.equal(net[0].weight, theirs[0].weight)
        (4.0, True)
    """
    ours = _own_neurons(model)
    if isinstance(source, nn.Module):
        if options:
            raise TypeError(f"{', '.join(options)}: only for a state_dict; a network tells how its neurons were made")
        library, neurons = _network(source)
        if peer not in (None, library.name):
            raise ValueError(f"peer is {peer!r}, but the neurons of source are {library.name}'s")
        values: Mapping[str, Tensor] = source.state_dict()
        made = _made(library, neurons)
    elif isinstance(source, Mapping):
        library, values = _library_of(source, peer), source
        told = _checked_options(library, options)
        if library.required is None:  # SpikingJelly: what it does not tell, the code does, on both sides
            _check_entries(values, model.state_dict(), "model")
            model.load_state_dict(dict(values))
            return
        made = {path: {**library.defaults, **told} for path in _neurons_in(values, library.required)}
    else:
        raise TypeError(f"source must be a network or its state_dict, got {type(source).__name__}")
    _check_paths(ours, made, library.name)
    layers = {k: v for k, v in values.items() if not any(_is_within(k, path) for path in made)}
    numbers: dict[str, dict[str, Any]] = {}
    for path, node in ours.items():
        with _at(path, node):
            entries = {k.removeprefix(f"{path}.") if path else k: v for k, v in values.items() if _is_within(k, path)}
            more = sorted(set(entries) - library.entries)
            if more:
                raise Inexpressible(f"there it has {', '.join(more)}, which no neuron of snnfast has")
            numbers[path] = set_own(node, library.read(entries, made[path]))
    _check_shared(ours, numbers, "model")
    for path, found in numbers.items():
        if "w" in found:
            layers[_join(path, "w")] = found.pop("w")
    _check_entries(layers, model.state_dict(), "model")
    model.load_state_dict(layers)
    for path, found in numbers.items():
        for name, value in found.items():
            setattr(ours[path], name, value)


def peer_state_dict(model: nn.Module, peer: str, **options: Any) -> dict[str, Tensor]:
    """The ``state_dict`` for the same architecture written with SpikingJelly, snnTorch or sinabs.

    The other network's neurons must be made as ``docs/migration.md`` says, for a ``state_dict`` does not tell it all;
    :func:`give_peer_weights` checks that, and serves Norse.

    Args:
        model: a network with neurons of snnfast.
        peer: ``'spikingjelly'``, ``'snntorch'`` or ``'sinabs'``.
        options: how the neurons there are made, for sinabs: ``norm_input=False`` or ``train_alphas=True``.

    Raises:
        TypeError: ``model`` is not a module, or an option is unknown.
        ValueError: a neuron has no equal in that library; the message names it.

    Example:
        >>> import snnfast
        >>> net = nn.Sequential(nn.Linear(3, 2), snnfast.LIFNode(tau=4.0, decay_input=False))
        >>> {k: round(v.item(), 4) for k, v in peer_state_dict(net, "snntorch").items() if k.startswith("1.")}
        {'1.threshold': 1.0, '1.beta': 0.75, '1.graded_spikes_factor': 1.0, '1.reset_mechanism_val': 1}
    """
    ours = _own_neurons(model)
    library = _named(peer)
    made = {**library.defaults, **library.assumed, **_checked_options(library, options)}
    if library.required is None:
        for path, node in ours.items():
            with _at(path, node):
                own(node)
        return dict(model.state_dict())
    return _written(model, ours, library, dict.fromkeys(ours, made), {})


def give_peer_weights(model: nn.Module, target: nn.Module) -> None:
    """Load the weights of ``model`` into ``target``, the same architecture written with another library.

    The counterpart of :func:`load_peer_weights`: ``target``'s neurons get the decays and thresholds with which they
    spike as ``model``'s do.

    Args:
        model: a network with neurons of snnfast.
        target: a network with neurons of SpikingJelly, snnTorch, Norse or sinabs; nothing is changed if anything is
            refused.

    Raises:
        TypeError: an argument is not a module.
        ValueError: neurons or entries do not correspond, or a neuron has no equal; the message names it.

    Example:
        >>> import snnfast, snntorch
        >>> net = nn.Sequential(nn.Linear(3, 2), snnfast.LIFNode(tau=4.0))
        >>> theirs = nn.Sequential(nn.Linear(3, 2), snntorch.Leaky(beta=0.5, reset_mechanism="zero"))
        >>> give_peer_weights(net, theirs)
        >>> theirs[1].beta, theirs[1].threshold  # the input is not divided by tau there, so the threshold is 4 times
        (tensor(0.7500), tensor(4.0000))
    """
    ours = _own_neurons(model)
    if not isinstance(target, nn.Module):
        raise TypeError(f"target must be a torch.nn.Module, got {type(target).__name__}; peer_state_dict takes a name")
    library, neurons = _network(target)
    _check_paths(ours, neurons, library.name)
    there = target.state_dict()
    found = _written(model, ours, library, _made(library, neurons), there)
    given = {path: own(ours[path]) for path in neurons}
    _check_shared(neurons, given, "target")
    _check_entries(found, there, "target")
    target.load_state_dict(found)
    for path, neuron in neurons.items():
        library.set(neuron, given[path])


# ---- neurons, by their paths ----
@contextmanager
def _at(path: str, module: Any) -> Iterator[None]:
    """Say which neuron it is that cannot be expressed."""
    try:
        yield
    except Inexpressible as why:
        raise ValueError(f"{path or 'the model'} ({type(module).__name__}) cannot be carried over: {why}") from None


def _own_neurons(model: Any) -> dict[str, Any]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    modules = model.named_modules(remove_duplicate=False)
    return {path: m for path, m in modules if isinstance(m, (BaseNode, LI))}


def _network(network: nn.Module) -> tuple[Peer, dict[str, nn.Module]]:
    """Whose neurons a network has, and where."""
    found: dict[str, dict[str, nn.Module]] = {}
    for adapter in adapters():
        for path, module in network.named_modules(remove_duplicate=False):
            if adapter.is_neuron(module):
                found.setdefault(adapter.__name__.rpartition(".")[2], {})[path] = module
                with _at(path, module):
                    _check_class(module, adapter.FUSED)
    if len(found) != 1:
        raise ValueError(
            "the other network must have neurons of one of SpikingJelly, snnTorch, Norse and sinabs, got neurons of "
            f"{' and '.join(found) or 'none of them'}"
        )
    ((name, neurons),) = found.items()
    return PEERS[name], neurons


def _check_class(neuron: nn.Module, known: Mapping[type, type[Fused]]) -> None:
    """Only a neuron whose class computes as the library's does can be judged by its numbers."""
    cls = type(neuron).snnfast_replaced if isinstance(neuron, Fused) else type(neuron)
    peer = next((c for c in cls.__mro__ if c in known), None)
    if peer is None:
        raise Inexpressible("its equations are those of no neuron of snnfast")
    changed = [m for m in known[peer].methods if getattr(cls, m) is not getattr(peer, m) or m in neuron.__dict__]
    if changed:
        raise Inexpressible(f"it overrides {' and '.join(changed)} of {peer.__name__}")


def _made(library: Peer, neurons: Mapping[str, nn.Module]) -> dict[str, Mapping[str, Any]]:
    found: dict[str, Mapping[str, Any]] = {}
    for path, neuron in neurons.items():
        with _at(path, neuron):
            found[path] = library.options(neuron)
    return found


def _check_paths(ours: Mapping[str, Any], theirs: Mapping[str, Any], name: str) -> None:
    for here, there, where in ((ours, theirs, f"the {name} network"), (theirs, ours, "the snnfast network")):
        alone = sorted(set(here) - set(there))
        if alone:
            raise ValueError(
                f"neurons must have the same names in both networks, but {where} has none at {', '.join(alone)}"
            )


def _check_shared(neurons: Mapping[str, Any], values: Mapping[str, Any], what: str) -> None:
    """A neuron at two paths can take the numbers of one only."""
    first: dict[int, str] = {}
    for path, neuron in neurons.items():
        other = first.setdefault(id(neuron), path)
        if values[other] != values[path]:
            raise ValueError(f"{other} and {path} are one neuron in {what}, and two that differ in the other network")


# ---- state_dicts ----
def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _is_within(key: str, path: str) -> bool:
    return not path or key.startswith(f"{path}.")


def _neurons_in(values: Mapping[str, Tensor], required: str) -> list[str]:
    """The paths of the neurons in a ``state_dict``, of which each has the entry ``required``."""
    return [k[: -len(required)].rstrip(".") for k in values if k.rpartition(".")[2] == required]


def _named(peer: Any) -> Peer:
    if peer not in PEERS:
        raise ValueError(f"peer must be one of {', '.join(map(repr, PEERS))}, got {peer!r}")
    if peer == "norse":
        raise ValueError(
            "Norse keeps the numbers of its neurons outside of the state_dict: give load_peer_weights or "
            "give_peer_weights the network itself"
        )
    return PEERS[peer]


def _library_of(values: Mapping[str, Tensor], peer: str | None) -> Peer:
    if peer is not None:
        return _named(peer)
    found = [p for p in PEERS.values() if p.required and _neurons_in(values, p.required)]
    if len(found) != 1:
        raise ValueError("the state_dict does not tell whose it is: give peer, such as peer='spikingjelly'")
    return found[0]


def _checked_options(library: Peer, options: Mapping[str, Any]) -> Mapping[str, Any]:
    unknown = [name for name in options if name not in library.asked]
    if unknown:
        raise TypeError(
            f"{', '.join(unknown)} is no option for {library.name}, which has {', '.join(library.asked) or 'none'}"
        )
    return options


def _written(
    model: nn.Module, ours: Mapping[str, Any], library: Peer, made: Mapping[str, Any], there: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """``model``'s ``state_dict`` with the entries of the library's neurons; of the shapes and dtypes of ``there``."""
    values = model.state_dict()
    found = {k: v for k, v in values.items() if not any(_is_within(k, path) for path in ours)}
    for path, node in ours.items():
        with _at(path, node):
            for name, value in library.write(own(node), made[path]).items():
                like = there.get(_join(path, name))
                t = torch.as_tensor(value)
                found[_join(path, name)] = t if like is None else t.to(like).expand(like.shape).clone()
    return found


def _check_entries(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], what: str) -> None:
    """Before anything is loaded: what ``load_state_dict`` would find only half-way through."""
    for k, v in found.items():
        if k in wanted and v.shape != wanted[k].shape:
            raise ValueError(f"{k} must have shape {tuple(wanted[k].shape)} for {what}, got {tuple(v.shape)}")
    missing, unexpected = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    if missing or unexpected:
        raise ValueError(
            f"the networks must have the same layers under the same names; {what} needs {missing or 'nothing more'} "
            f"and has no {unexpected or 'lack'}"
        )
