"""Reading a module's ``forward`` with torch.fx: the calls it makes, and which of them are activations."""

from __future__ import annotations

import ast
import builtins
import contextlib
import functools
import inspect
import itertools
import os
import random
import textwrap
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from .._before import IN_PLACE, Before, Proxy, TensorProxy, Tracer

__all__ = [
    "Untraceable",
    "activation_of",
    "functional_activations",
    "given_in",
    "is_shape",
    "is_torch_leaf",
    "trace",
]

RELU = "ReLU"
VALUE, VALUES = object(), object()  # stand for an argument that is computed, and for a list or tuple of such
# Not what an error's reader looks for. With the separator: torchvision's folder begins with torch's.
_TORCH, _HERE = (os.path.join(os.path.dirname(file), "") for file in (torch.__file__, __file__))
_RELU_FUNCTIONS = (F.relu, F.relu_, torch.relu, torch.relu_)
_RELU_METHODS = ("relu", "relu_")
_CLAMPS = (torch.clamp, torch.clamp_, torch.clip, torch.clip_)
_CLAMP_METHODS, _CLAMP_MIN_METHODS = ("clamp", "clamp_", "clip", "clip_"), ("clamp_min", "clamp_min_")
_OTHER_NAMES = (
    "relu6", "gelu", "silu", "mish", "elu", "celu", "selu",
    "leaky_relu", "prelu", "rrelu", "hardtanh", "hardswish", "hardsigmoid",
    "softplus", "softsign", "tanhshrink", "logsigmoid", "sigmoid", "tanh",
    "threshold", "hardshrink", "softshrink", "glu",
)  # fmt: skip
_OTHER_FUNCTIONS = {
    getattr(place, name + suffix): name
    for place in (F, torch)
    for name in _OTHER_NAMES
    for suffix in ("", "_")
    if hasattr(place, name + suffix)
} | {torch.special.expit: "sigmoid"}
_OTHER_METHODS = {name + suffix: name for name in _OTHER_NAMES for suffix in ("", "_")}
_OTHER_MODULES = (
    nn.ReLU6, nn.GELU, nn.SiLU, nn.Mish, nn.ELU, nn.CELU, nn.SELU, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.Hardtanh,
    nn.Hardswish, nn.Hardsigmoid, nn.Softplus, nn.Softsign, nn.Tanhshrink, nn.LogSigmoid, nn.Sigmoid, nn.Tanh, nn.GLU,
    nn.Threshold, nn.Softshrink, nn.Hardshrink,
)  # fmt: skip
_TRANSFORMERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)  # their activation is a function inside
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)  # so are theirs


class Untraceable(Exception):
    """torch.fx cannot follow a ``forward``, for the reason given."""


class _Tracer(Tracer):
    """One module's own forward; every module that it calls is a leaf.

    Args:
        lists: arguments that are lists of tensors; ``None`` where nobody knows which are.
    """

    def proxy(self, node: fx.Node) -> fx.Proxy:
        is_tensor = node.op != "placeholder" or (self.lists is not None and node.target not in self.lists)
        return (TensorProxy if is_tensor else Proxy)(node, self)

    def __init__(self, of_buffers: bool, lists: list[str] | None) -> None:
        super().__init__()
        self.lists = lists
        self.record_stack_traces = True
        self.proxy_buffer_attributes = of_buffers

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def given_in(call: fx.Node, module: nn.Module) -> dict[str, Any]:
    """What a call of ``module`` gives for arguments with a default: a constant, or ``VALUE`` for what it computed; and
    which of the other arguments are lists, ``VALUES``."""
    recipe = getattr(module, "_recipe", None)  # of a generated forward, whose arguments are those of an earlier call
    try:
        signature = inspect.signature((type(module) if recipe is None else recipe.original).forward)
        bound = signature.bind(None, *call.args, **call.kwargs).arguments
    except (TypeError, ValueError):
        return {}  # a call that the model cannot make either
    empty, found = inspect.Parameter.empty, {}
    for name, value in list(bound.items())[1:]:
        if signature.parameters[name].default is not empty:
            nodes: list[fx.Node] = []
            fx.map_arg(value, nodes.append)
            found[name] = VALUE if nodes else value
        elif isinstance(value, (list, tuple)):
            found[name] = VALUES
    return found


def _wrapped(module: nn.Module, given: dict[str, Any]) -> Any:
    """``module``'s forward with the arguments that are there to be traced; the others have the values they always have.

    Those without a default value are there, and those that the call gives. A constant among these is an argument of
    the result, since the call gives it, but the trace sees its value: ``if shortcut is None`` must find a ``None``.
    """
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        raise Untraceable("its forward takes *args or **kwargs")
    taken = [p for p in parameters if p.default is p.empty or p.name in given]
    constants = {name: value for name, value in given.items() if value not in (VALUE, VALUES)}
    passed = [
        ("" if p.kind is p.POSITIONAL_ONLY else f"{p.name}=")
        + (f"constants[{p.name!r}]" if p.name in constants else p.name)
        for p in taken
    ]
    made: dict[str, Any] = {"original": type(module).forward, "constants": constants}
    signature = ", ".join(["self", *(p.name for p in taken)])
    exec(f"def forward({signature}): return original({', '.join(['self', *passed])})", made)
    return made["forward"]


@contextlib.contextmanager
def _as_it_was(module: nn.Module) -> Iterator[Before]:
    """Undo what running a forward does to a module: its attributes, its buffers' values, the random numbers drawn."""
    before, cls = Before(module.modules()), type(module)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            yield before
        finally:
            # What fx keeps there of tensors that forward made is for the generated one.
            made = {k: v for k, v in module.__dict__.items() if k.startswith("_tensor_constant")}
            before.put_back()
            module.__dict__.update(made)
            module.__class__ = cls


def trace(module: nn.Module, given: dict[str, Any] | None) -> tuple[list[fx.Graph], list[str]]:
    """The graph of ``module.forward``, or that of training and that of evaluation where they differ; and the attributes
    in which forward keeps what it computes, which are no part of a graph.

    ``given`` is what :func:`given_in` found in the call, ``None`` where that is not known.

    Raises:
        Untraceable: torch.fx cannot follow it.
    """
    try:
        graphs, kept = _both_modes(module, given, of_buffers=True)
    except Untraceable:
        graphs, kept = _both_modes(module, given, of_buffers=False)  # it may decide by a buffer's value
    return graphs[: len({graph.python_code("self").src for graph in graphs})], kept


def _both_modes(module: nn.Module, given: dict[str, Any] | None, of_buffers: bool) -> tuple[list[fx.Graph], list[str]]:
    """The graphs of training and of evaluation. What they compute from buffers is part of them, or else becomes a
    constant, which knows nothing of values loaded later or of another device."""
    graphs, kept = [], []
    lists = None if given is None else [name for name, value in given.items() if value is VALUES]
    for training in (True, False):
        with _as_it_was(module) as before:
            cls = type(module)
            try:
                forward = _wrapped(module, given or {})
                module.training = training
                # A batch norm's check looks at a number of dimensions, which a proxy does not have.
                body = {"forward": forward, "_check_input_dim": lambda self, x: None}
                module.__class__ = type(cls.__name__, (cls,), body)
                randomness = random.getstate(), torch.get_rng_state()
                graphs.append(_Tracer(of_buffers, lists).trace(module))
                if random.getstate() != randomness[0] or not torch.equal(torch.get_rng_state(), randomness[1]):
                    raise Untraceable("it draws random numbers that do not depend on its input")
                if (written := before.written()) is not None:
                    raise Untraceable(f"it writes the {written[1]} {written[2]}")
                kept += [name for _, name, _ in before.kept()]
            except Untraceable:
                raise
            except Exception as error:  # a forward run on proxies may raise anything
                raise Untraceable(f"{type(error).__name__}: {error}".splitlines()[0]) from error
    return graphs, list(dict.fromkeys(kept))


def activation_of(thing: nn.Module | fx.Node) -> str | None:
    """``'ReLU'``, the name of another activation, or ``None``."""
    if isinstance(thing, nn.Module):
        if isinstance(thing, nn.ReLU):
            return RELU
        if not isinstance(thing, (*_OTHER_MODULES, *_TRANSFORMERS, *_RECURRENT)):
            return None
        return next(c.__name__ for c in type(thing).__mro__ if c.__module__.startswith("torch."))
    if thing.op == "call_function":
        clamp = _clamp(thing, _CLAMPS, (torch.clamp_min, torch.clamp_min_))
        return RELU if thing.target in _RELU_FUNCTIONS else clamp or _OTHER_FUNCTIONS.get(thing.target)
    if thing.op == "call_method":
        clamp = _clamp(thing, _CLAMP_METHODS, _CLAMP_MIN_METHODS)
        return RELU if thing.target in _RELU_METHODS else clamp or _OTHER_METHODS.get(str(thing.target))
    return None


def _clamp(node: fx.Node, both: tuple[Any, ...], below: tuple[Any, ...]) -> str | None:
    """What a clamp at 0 from below is another name for: a ReLU, or with 6 from above a ReLU6."""
    if node.target not in (*both, *below):
        return None
    low = node.args[1] if len(node.args) > 1 else node.kwargs.get("min")
    high = node.args[2] if len(node.args) > 2 else node.kwargs.get("max")
    if not isinstance(low, (int, float)) or low != 0:
        return None
    return RELU if high is None else "relu6" if isinstance(high, (int, float)) and high == 6 else None


def is_in_place(thing: nn.Module | fx.Node) -> bool:
    """Whether a call overwrites its input."""
    if isinstance(thing, nn.Module):
        return bool(getattr(thing, "inplace", False))
    if thing.op == "call_method":
        return str(thing.target).endswith("_") and not str(thing.target).endswith("__")
    name = getattr(thing.target, "__name__", "")
    if thing.target in IN_PLACE or (name.endswith("_") and not name.endswith("__")):
        return True
    if "inplace" in thing.kwargs or activation_of(thing) is None:
        return bool(thing.kwargs.get("inplace"))
    return len(thing.args) > 1 and thing.args[-1] is True


def is_shape(node: Any) -> bool:
    """Whether a node is not a tensor but a shape, a size, or something computed from these."""
    if not isinstance(node, fx.Node):
        return False
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel", "ndimension", "stride")
    if node.op != "call_function":
        return False
    if node.target is builtins.getattr:
        return node.args[1] in ("shape", "ndim", "dtype", "device")
    if getattr(node.target, "__module__", "") in ("_operator", "builtins", "math"):
        return bool(node.all_input_nodes) and all(map(is_shape, node.all_input_nodes))
    return False


def is_torch_leaf(module: nn.Module) -> bool:
    """Whether ``module`` is one of torch's own, with nothing of the user's inside."""
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    return type(module).__module__.startswith("torch.") and not isinstance(module, containers)


def functional_activations(module: nn.Module) -> list[str]:
    """Activations that the source of an untraceable module calls, no submodules of it, as ``name, line n``."""
    known = dict.fromkeys(_RELU_FUNCTIONS, "relu") | _OTHER_FUNCTIONS
    classes = [c for c in type(module).__mro__ if not c.__module__.startswith("torch.") and c is not object]
    found, functions = [], []
    for name, value in itertools.chain(*(vars(owner).items() for owner in (module, *classes))):
        function = _unwrapped(value)
        if inspect.isroutine(function) and function in known:
            found.append(f"{known[function]}, its {name}")
        elif inspect.isfunction(function):
            functions.append(function)
    for function in functions:  # which grows by those that are called by a name of their file
        try:
            lines, start = inspect.getsourcelines(function)
            source = ast.parse(textwrap.dedent("".join(lines)))
        except (OSError, TypeError, SyntaxError):
            continue
        for call in (node for node in ast.walk(source) if isinstance(node, ast.Call)):
            of_file = function.__globals__.get(call.func.id) if isinstance(call.func, ast.Name) else None
            called = _unwrapped(of_file)
            activation = known.get(called) if inspect.isroutine(called) else None
            if activation := activation or _activation_called(call):
                found.append(f"{activation}, line {start + call.lineno - 1}")
            elif inspect.isfunction(called) and not called.__module__.startswith("torch.") and called not in functions:
                functions.append(called)
    return found


def _unwrapped(value: Any) -> Any:
    """The function of a static method or of a partial."""
    while isinstance(value, (staticmethod, functools.partial)):
        value = value.__func__ if isinstance(value, staticmethod) else value.func
    return value


def _activation_called(call: ast.Call) -> str | None:
    """The activation that a call in a source is, if it is known by its name."""
    called = call.func
    if isinstance(called, ast.Call):  # nn.ReLU()(x)
        name = _last_name(called.func)
        return name if name in {RELU, *(c.__name__ for c in _OTHER_MODULES)} else None
    name = _last_name(called)
    if isinstance(called, ast.Attribute) and _path_of_self(called.value):
        return None
    if name in {*_OTHER_METHODS, *_RELU_METHODS}:
        return name
    if name not in {*_CLAMP_METHODS, *_CLAMP_MIN_METHODS}:
        return None
    of_torch = _last_name(getattr(called, "value", called)) in ("torch", name)
    limits = dict(zip(("min", "max"), call.args[of_torch:], strict=False)) | {k.arg: k.value for k in call.keywords}
    values = {k: v.value if isinstance(v, ast.Constant) else v for k, v in limits.items()}
    return name if values.get("min") == 0 and values.get("max") in (None, 6) else None


def _last_name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _path_of_self(node: ast.expr) -> bool:
    """Whether an expression is an attribute path from ``self``, such as ``self.block``."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name) and node.id == "self"


def place(path: str, module: nn.Module, node: fx.Node | None = None) -> str:
    """Where something is, for an error: dotted path, class and source line."""
    where = f"'{path}' ({type(module).__name__})" if path else f"the model's own forward ({type(module).__name__})"
    frames = (node.meta.get("stack_trace") or node.stack_trace or "") if node is not None else ""
    own = [
        line.strip()
        for line in frames.splitlines()
        if line.strip().startswith("File ") and not any(p in line for p in (_TORCH, _HERE, 'File "<'))
    ]
    return f"{where}, {own[-1].rpartition(', in ')[0] or own[-1]}" if own else where
