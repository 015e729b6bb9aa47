"""Networks by name: of snnfast.models, any ``module:function``, timm or torchvision; and their weights."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InputError, nearest

__all__ = ["arguments", "build", "fill", "load_weights"]


def _function(name: str, what: str) -> Callable[..., nn.Module]:
    module_name, _, attribute = name.rpartition(":")
    if not module_name:
        try:
            models = importlib.import_module("snnfast.models")
        except ImportError:
            raise InputError(f"--{what} {name}: this version has no snnfast.models; give module:function") from None
        known = [n for n in getattr(models, "__all__", dir(models)) if callable(getattr(models, n, None))]
        if attribute not in known:
            raise InputError(
                f"--{what} must be a network of snnfast.models ({', '.join(known)}) or module:function, got "
                f"{name!r}{nearest(attribute, known)}"
            )
        return getattr(models, attribute)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a console script, unlike python -m, does not look here
    try:
        module = importlib.import_module(module_name)
    except (ImportError, TypeError, ValueError) as error:  # the latter for a path in place of a module's name
        why = error if isinstance(error, ImportError) else "it is no module's name, such as mynets or package.nets"
        raise InputError(
            f"--{what} {name}: cannot import {module_name}: {why}; it is looked for here ({os.getcwd()}) and among the "
            "installed packages"
        ) from None
    if not callable(getattr(module, attribute, None)):
        near = nearest(attribute, [n for n in dir(module) if not n.startswith("_")])
        raise InputError(f"--{what} {name}: {module_name} has no function {attribute!r}{near}")
    return getattr(module, attribute)


_SET_HERE = {
    "timesteps": "--timesteps sets it for the student, and a teacher has no time steps",
    "num_classes": "the data decide it",
    "in_channels": "the data decide it",
}


def arguments(pairs: Sequence[str], option: str) -> dict[str, Any]:
    """``KEY=VALUE`` pairs as keyword arguments; values are Python literals, or text.

    Example:
        >>> arguments(["width=2", "act=relu"], "--model-args")
        {'width': 2, 'act': 'relu'}

    Raises:
        InputError: no such pair, a key that is there twice, or one that this command sets itself.
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.isidentifier():
            raise InputError(f"{option} must be KEY=VALUE without blanks, such as width=2, got {pair!r}")
        if key in found:
            raise InputError(f"{option} must name {key} once, got {' '.join(pairs)}")
        if key in _SET_HERE:
            raise InputError(f"{option} must not have {key}, got {pair!r}: {_SET_HERE[key]}")
        try:
            found[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            found[key] = text
    return found


def build(name: str, what: str, classes: int, channels: int, timesteps: int | None, extra: dict[str, Any]) -> nn.Module:
    """A network, called as the models of snnfast are: ``f(num_classes=…, in_channels=…, timesteps=…, **extra)``.

    Args:
        name: of snnfast.models, ``module:function``, ``timm:NAME`` or ``torchvision:NAME``.
        what: "student" or "teacher", for messages.
        classes: number of classes.
        channels: of the images.
        timesteps: ``None`` for an ANN.
        extra: further keyword arguments.

    Raises:
        InputError: no such network, a missing package, or arguments that it does not take.
    """
    options: dict[str, Any] = {"num_classes": classes, **extra}
    option = "--model-args" if what == "student" else "--teacher-args"
    library, _, rest = name.partition(":")
    if library in ("timm", "torchvision"):
        if timesteps is not None:
            raise InputError(f"--student {name} is not a spiking network: convert it in a module:function of your own")
        try:
            package = importlib.import_module(library if library == "timm" else "torchvision.models")
        except ImportError:
            raise InputError(f"--{what} {name} needs {library}: pip install {library}") from None
        function = package.create_model if library == "timm" else package.get_model
        args: tuple[str, ...] = (rest,)
        if library == "timm":
            options["in_chans"] = channels
        elif channels != 3:
            raise InputError(f"--{what} {name} takes images of 3 channels, these have {channels}")
    else:
        function, args = _function(name, what), ()
        options |= {"in_channels": channels, "timesteps": timesteps}
        parameters = inspect.signature(function).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            missing = [k for k in options if k not in parameters]
            if missing == ["timesteps"] and timesteps is None:
                del options["timesteps"]  # an ordinary ANN need not know of time
            elif missing and (unknown := [k for k in missing if k in extra]):
                raise InputError(
                    f"{option} {unknown[0]}: {name} takes no argument {unknown[0]!r}{nearest(unknown[0], parameters)} "
                    f"(it takes {', '.join(parameters)})"
                )
            elif missing:
                raise InputError(
                    f"--{what} {name} must take {', '.join(options)} as keyword arguments; {', '.join(missing)} is "
                    f"not among ({', '.join(parameters)})"
                )
        for key, value in extra.items():
            default = parameters[key].default if key in parameters else None
            if isinstance(value, str) and isinstance(default, (int, float)):
                raise InputError(f"{option} {key} must be a number, such as {default}, got {value!r}")
    # The errors of a user's own function are for its author to see whole; a library's tell about the arguments.
    kinds = Exception if args else (TypeError, ValueError, RuntimeError, KeyError)
    try:
        model = function(*args, **options)
    except kinds as error:
        given = ", ".join(f"{k}={v.__name__ if isinstance(v, type) else repr(v)}" for k, v in options.items())
        texts = [f"{k}={v}" for k, v in extra.items() if isinstance(v, str)]
        read = f"; of {option}, {', '.join(texts)} was read as text (Python's are None, True, False)" if texts else ""
        said = f"KeyError: {error}" if isinstance(error, KeyError) else f"{error}"
        known = package.list_models() if args else ()
        near = "" if rest.partition(".")[0] in known else nearest(rest, known)  # timm's names have tags
        raise InputError(f"--{what} {name} cannot be made: {said}; it was called with {given}{read}{near}") from None
    if not isinstance(model, nn.Module):
        raise InputError(f"--{what} {name} must return a torch.nn.Module, got {type(model).__name__}")
    return model


def load_weights(path: Path) -> dict[str, Tensor]:
    """A state_dict from a ``.safetensors`` file, a file of torch.save, or a checkpoint folder of this command.

    Raises:
        InputError: missing, damaged, or no state_dict.
    """
    if path.is_dir():
        inside = [path / "model.safetensors", *sorted(path.glob("*/model.safetensors"), reverse=True)]
        found = next((p for p in inside if p.is_file()), None)
        if found is None:
            raise InputError(f"--teacher-checkpoint {path} is a folder without a model.safetensors")
        path = found
    if not path.is_file():
        raise InputError(f"--teacher-checkpoint {path} is missing")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise InputError("a .safetensors file needs safetensors: pip install snnfast[train]") from None
    except Exception as error:  # torch and safetensors raise many kinds
        size = path.stat().st_size
        raise InputError(
            f"--teacher-checkpoint {path} ({size:,} bytes) is damaged or not weights: {str(error).splitlines()[0]}"
        ) from None
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise InputError(f"--teacher-checkpoint {path} must hold a state_dict: tensors by name")
    return content


def fill(model: nn.Module, weights: dict[str, Tensor], where: str) -> None:
    """Load ``weights`` into ``model``, all of them.

    Raises:
        InputError: other names or shapes, with examples of each.
    """
    own = model.state_dict()
    lacking, foreign = (sorted(set(a) - set(b)) for a, b in ((own, weights), (weights, own)))
    shapes = [k for k in sorted(own) if k in weights and own[k].shape != weights[k].shape]
    if lacking or foreign or shapes:
        parts = [f"{len(names)} {what} ({', '.join(names[:3])})" for names, what in
                 ((lacking, "missing"), (foreign, "unknown"), (shapes, "of another shape")) if names]  # fmt: skip
        raise InputError(f"{where} does not fit this network: {'; '.join(parts)}; was it made with other options?")
    model.load_state_dict(weights)
