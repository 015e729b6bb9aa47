"""Arguments and names that are not there: errors that say which ones there are and which was meant."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import numbers
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

__all__ = ["check_steps", "names_of", "nearest", "refuse_unknown", "says_what_it_takes", "suggests", "without"]

_Function = TypeVar("_Function", bound=Callable[..., Any])

# Arguments of other libraries' neurons in ours; docs/migration.md has the whole.
_THEIRS = {
    "beta": "snnTorch's beta is tau = 1 / (1 - beta){tau}, decay_input=False",
    "threshold": "snnTorch's threshold is v_threshold",
    "spike_grad": "snnTorch's spike_grad is surrogate_function, such as snnfast.surrogate.ATan()",
    "reset_mechanism": "snnTorch's 'subtract' is v_reset=None, its 'zero' v_reset=0.0",
    "init_hidden": "a neuron keeps its state by itself, until functional.reset_net: leave init_hidden out",
    "learn_beta": "ParametricLIFNode learns its time constant",
    "tau_mem_inv": "Norse's tau_mem_inv is tau = 1 / (dt * tau_mem_inv){tau}, with its dt of 0.001",
    "v_th": "Norse's v_th is v_threshold",
    "tau_mem": "sinabs' tau_mem is tau = 1 / (1 - exp(-1 / tau_mem)){tau}",
    "spike_threshold": "sinabs' spike_threshold is v_threshold",
    "surrogate_grad_fn": "sinabs' surrogate_grad_fn is surrogate_function, such as snnfast.surrogate.ATan()",
    "alpha": "alpha is a surrogate's: surrogate_function=snnfast.surrogate.ATan(alpha=2.0)",
    "tau": "LIFNode's is tau, ParametricLIFNode's, which learns, init_tau",
    "init_tau": "LIFNode's is tau, ParametricLIFNode's, which learns, init_tau",
    "T": "the number of time steps is timesteps",
    "num_steps": "the number of time steps is timesteps",
}
_TAU: dict[str, Callable[[float], float]] = {
    "beta": lambda beta: 1 / (1 - beta),
    "tau_mem_inv": lambda rate: 1 / (0.001 * rate),
    "tau_mem": lambda tau: 1 / (1 - math.exp(-1 / tau)),
}


def check_steps(name: str, value: Any, default: str = "") -> int:
    """A number of time steps; the error goes on with what the argument may be beside, ``default``.

    Raises:
        ValueError: not a whole number from 1.
    """
    if isinstance(value, bool) or not isinstance(value, (int, numbers.Integral)) or value < 1:  # NumPy's are Integral
        raise ValueError(f"{name} must be a whole number from 1{default}, got {value!r}")
    return int(value)


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """``"; did you mean 'a' or 'b'?"``, or an empty string where nothing is near.

    Example:
        >>> nearest("epoch", ["epochs", "seed"])
        "; did you mean 'epochs'?"
    """
    close = difflib.get_close_matches(name, list(known), count, 0.6)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


def _meant(name: str, value: Any, known: list[str]) -> str:
    theirs = _THEIRS.get(name)
    if theirs is None:
        return nearest(name, known)
    try:
        tau = _TAU[name](value) if isinstance(value, (int, float)) else math.nan
    except (KeyError, ZeroDivisionError, OverflowError):
        tau = math.nan
    return f": {theirs.format(tau=f' = {tau:g}' if 1 < tau < math.inf else '')}"


def names_of(function: Callable[..., Any]) -> list[str] | None:
    """The names by which ``function`` takes its arguments, ``None`` if it takes any name or does not tell."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def refuse_unknown(owner: str, given: Mapping[str, Any], known: list[str]) -> None:
    """Refuse arguments of a neuron, or of what makes neurons, that it does not take.

    Raises:
        TypeError: naming each, what was meant if that can be told, and all that there are.

    Example:
        >>> refuse_unknown("IFNode", {"v_treshold": 2.0}, ["v_threshold", "v_reset"])
        Traceback (most recent call last):
        TypeError: IFNode takes no argument 'v_treshold'; did you mean 'v_threshold'? It takes v_threshold, v_reset
    """
    unknown = [f"{owner} takes no argument {k!r}{_meant(k, v, known)}" for k, v in given.items() if k not in known]
    if unknown:
        told = " ".join(text if text.endswith("?") else f"{text}." for text in unknown)
        raise TypeError(f"{told} It takes {', '.join(known)}")


def _of_subclass(cls: type, init: Callable[..., Any]) -> list[str]:
    """The names that the constructors of ``cls`` take before ``init``, to which they hand on others."""
    names: list[str] = []
    for each in cls.__mro__:
        own = each.__dict__.get("__init__")
        if own is init:
            break
        if own is not None:
            parameters = list(inspect.signature(own).parameters.values())[1:]
            names += [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return names


def says_what_it_takes(function: _Function) -> _Function:
    """A function, or an ``__init__``, that refuses unknown arguments by :func:`refuse_unknown`; its signature stays."""
    known = names_of(function)
    assert known is not None
    is_init = function.__name__ == "__init__"

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        unknown = {name: value for name, value in kwargs.items() if name not in known}
        if unknown:
            owner = type(args[0]).__name__ if is_init else function.__name__
            theirs = _of_subclass(type(args[0]), checked) if is_init else []
            taken = [name for name in (*theirs, *known[is_init:]) if name not in unknown]
            refuse_unknown(owner, unknown, list(dict.fromkeys(taken)))
        return function(*args, **kwargs)

    return checked  # type: ignore[return-value]


def suggests(module: str) -> Callable[[str], Any]:
    """The ``__getattr__`` of a module that says which names are near one that it has not."""

    def missing(name: str) -> Any:
        told = f"module {module!r} has no attribute {name!r}"
        if name.startswith("_"):
            raise AttributeError(told)
        for place in ("functional", "neuron", "surrogate", "layer"):
            found = vars(sys.modules[f"{module}.{place}"])
            if name in found:
                raise AttributeError(f"{told}; it is {module}.{place}.{name}")
        raise AttributeError(told + nearest(name, sys.modules[module].__all__))

    return missing


def without(module: str) -> Callable[[str], Any]:
    """The ``__getattr__`` of a module that stands for SpikingJelly's of that name and has not all that it has."""
    theirs = f"spikingjelly.activation_based.{module.rpartition('.')[2]}"

    def missing(name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        told = f"module {module!r} has no attribute {name!r}"
        if name.startswith("MultiStep"):
            raise AttributeError(f"{told}: SpikingJelly's older {name} is {name[9:]}(..., step_mode='m')")
        near = nearest(name, [known for known in dir(sys.modules[module]) if not known.startswith("_")])
        raise AttributeError(
            f"{told}{near}{' What' if near else '; what'} SpikingJelly has and this has not keeps its import, {theirs},"
            " and works beside it"
        )

    return missing
