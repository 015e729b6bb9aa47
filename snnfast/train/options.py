"""The options of a run as a command line and a YAML file give them."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import re
import sys
import types
import typing
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from .config import Config, flag
from .errors import InputError, nearest

__all__ = ["parse"]


def _plain_type(name: str) -> tuple[type, bool, bool]:
    """A field's scalar type, whether it may be None, and whether it is a list."""
    kind = typing.get_type_hints(Config)[name]
    optional = isinstance(kind, types.UnionType)
    if optional:
        kind = next(k for k in typing.get_args(kind) if k is not types.NoneType)
    if typing.get_origin(kind) is list:
        return typing.get_args(kind)[0], optional, True
    return kind, optional, False


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments:"):
            first = message.split(": ", 1)[1].split()[0]
            message += nearest(first.split("=")[0], [flag(f.name) for f in fields(Config)])
        option = re.match(r"argument (--[\w-]+): (?:invalid choice: '(.*?)'|expected )", message)
        known = {flag(f.name): f.metadata for f in fields(Config)}
        if option is not None and option[1] in known:
            extra = known[option[1]]
            if option[2] is not None:
                message += nearest(option[2].lower(), extra["choices"])
            else:
                message += f": {option[1]} {extra.get('metavar', 'NAME')} ({extra['help']})"
        raise InputError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="snnfast-train",
        description="Train a teacher, a plain spiking network and distilled ones, and compare them.",
        epilog="example: snnfast-train --data mnist5k --teacher resnet18 --student wrn16_2 --timesteps 4 "
        "--distill logit,feature --out runs/first",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=110),
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="YAML file of options by these names; the command line wins over it"
    )
    groups: dict[str, Any] = {}
    for f in fields(Config):
        group = f.metadata["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        kind, _, many = _plain_type(f.name)
        extra = {k: v for k, v in f.metadata.items() if k not in ("group", "help")}
        text = f.metadata["help"]
        default: Any = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        if kind is bool:
            extra["action"] = argparse.BooleanOptionalAction if default else "store_true"
        else:
            extra["type"] = kind
            if many:
                extra["nargs"] = "+"
            if default not in (None, []):
                text += f" (default: {' '.join(default) if many else default})"
        groups[group].add_argument(flag(f.name), help=text.replace("%", "%%"), **extra)
    return parser


def _from_yaml(path: Path) -> dict[str, Any]:
    """Options of a YAML file; anything wrong in it is named with its line."""
    try:
        yaml: Any = importlib.import_module("yaml")
    except ImportError:
        raise InputError("--config needs PyYAML: pip install snnfast[train]") from None
    try:
        text = path.read_text()
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text) or {}
    except OSError as error:
        raise InputError(f"--config {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"--config {path} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"--config {path}, line 1: must be lines of the form 'option: value'")
    lines = {key.value: key.start_mark.line + 1 for key, _ in root.value} if root is not None else {}
    if root is not None and len(lines) < len(root.value):
        seen: set[str] = set()
        for key, _ in root.value:
            if key.value in seen:
                raise InputError(f"--config {path}, line {key.start_mark.line + 1}: {key.value!r} is there twice")
            seen.add(key.value)
    known = {f.name for f in fields(Config)}
    options = {}
    for key, value in values.items():
        where = f"--config {path}, line {lines.get(str(key), '?')}"
        name = str(key).replace("-", "_")
        if name not in known:
            raise InputError(f"{where}: unknown option {key!r}{nearest(name, known)}")
        options[name] = _converted(name, value, where)
    return options


def _converted(name: str, value: Any, where: str) -> Any:
    kind, optional, many = _plain_type(name)
    if value is None and optional:
        return None
    if many:
        items = value if isinstance(value, list) else [value]
        return [_converted_scalar(kind, name, item, where) for item in items]
    value = _converted_scalar(kind, name, value, where)
    choices = next(f for f in fields(Config) if f.name == name).metadata.get("choices")
    if choices and value not in choices:
        raise InputError(f"{where}: {name} must be one of {', '.join(choices)}, got {value!r}{nearest(value, choices)}")
    return value


def _converted_scalar(kind: type, name: str, value: Any, where: str) -> Any:
    if kind is bool or isinstance(value, bool):
        if not isinstance(value, bool) or kind is not bool:
            raise InputError(
                f"{where}: {name} must be {'true or false' if kind is bool else kind.__name__}, got {value!r}"
            )
        return value
    if isinstance(value, (dict, list)) or value is None or (kind is int and isinstance(value, float)):
        raise InputError(f"{where}: {name} must be {kind.__name__}, got {value!r}")
    try:
        return kind(value)
    except ValueError:
        raise InputError(f"{where}: {name} must be {kind.__name__}, got {value!r}") from None


def parse(argv: Sequence[str] | None = None) -> Config:
    """The configuration that a command line (and the YAML file that it names) asks for, checked.

    Raises:
        InputError: an unknown option or a value that cannot work, with the remedy.

    Example:
        >>> parse(["--timesteps", "2", "--distill", "logit,feature"]).distilled()
        [('logit', 'feature')]
    """
    given = vars(_parser().parse_args(sys.argv[1:] if argv is None else argv))
    path = given.pop("config", None)
    options = _from_yaml(path) if path is not None else {}
    return Config(**{**options, **given}).check()
