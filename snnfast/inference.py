"""Networks that only infer: batch norms folded into the convolutions before them, and whole forwards as CUDA graphs."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils._pytree import tree_leaves, tree_map

from . import functional, layer, network
from ._before import Proxy, is_same, optional
from ._notices import say_once
from .events import EventConv2d, event_driven
from .fused.batch_norm import PLAIN_NORMS, STEP_NORMS
from .fused.fuse import _LEAVES, _shared_parameters, _Tracer, fuse, traced, unfuse, unseen
from .tensors import has_hooks

__all__ = ["Captured", "InferenceReport", "capture", "optimize_for_inference"]

_NORM = nn.modules.batchnorm._BatchNorm
_CONVOLUTIONS: tuple[type, ...] = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, layer.Conv1d, layer.Conv2d, layer.Conv3d,
)  # fmt: skip
_TRANSPOSED: tuple[type, ...] = (
    nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    layer.ConvTranspose1d, layer.ConvTranspose2d, layer.ConvTranspose3d,
)  # fmt: skip
# SpikingJelly's layers are the same operations with a step mode, known by name: it need not be installed.
_THEIR_LAYERS = {c.__name__: c for c in (*_CONVOLUTIONS[:3], *_TRANSPOSED[:3])}
_PEERS = ("spikingjelly", "snntorch", "norse", "sinabs")
_THEIR_NORMS = {c.__name__: c for c in PLAIN_NORMS}


@dataclass
class InferenceReport:
    """What :func:`optimize_for_inference` did with a network's batch norms and convolutions, by their names.

    Attributes:
        folded: ``(layer, norm)`` where the norm became part of the layer's weights.
        fused: ``(norm, neuron)`` that run as one (:func:`snnfast.fuse`).
        left_alone: norms that stay as they were, with the reason.
        event_driven: convolutions that skip inputs of 0 on a CPU (:func:`snnfast.event_driven`).
    """

    folded: list[tuple[str, str]] = field(default_factory=list)
    fused: list[tuple[str, str]] = field(default_factory=list)
    left_alone: dict[str, str] = field(default_factory=dict)
    event_driven: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        counts = len(self.folded), len(self.fused), len(self.left_alone)
        words = "batch norms folded into the convolution before: {}, fused with the neuron behind: {}, left alone: {}"
        lines = [words.format(*counts)]
        lines += [f"  {before} <- {norm}" for before, norm in self.folded]
        lines += [f"  {norm} + {neuron}" for norm, neuron in self.fused]
        lines += [f"  {norm or '(model)'} left alone: {reason}" for norm, reason in self.left_alone.items()]
        if self.event_driven:
            names = ", ".join(name or "(model)" for name in self.event_driven)
            lines.append(f"convolutions that skip inputs of 0 on a CPU: {names}")
        return "\n".join(lines)


# ---- folding ----
def _kind(module: nn.Module, known: tuple[type, ...], theirs: dict[str, Any]) -> type | None:
    """The class of ``module`` if its forward is known: ours, torch's, or SpikingJelly's layer of that name."""
    cls = type(module)
    if isinstance(module, EventConv2d):
        cls = nn.Conv2d
    if cls in known:
        return cls
    if (
        cls.__module__.startswith("spikingjelly.")
        and cls.__name__ in theirs
        and isinstance(module, theirs[cls.__name__])
    ):
        return theirs[cls.__name__]
    return None


def _before(module: nn.Module) -> type | None:
    return _kind(module, _CONVOLUTIONS + _TRANSPOSED, _THEIR_LAYERS)


_Graph = tuple[fx.Graph, dict[str, Any]]  # with the constants that the forward computed


@dataclass
class _Part:
    """A largest part of a network that can be traced, and what its forward does."""

    name: str
    module: nn.Module
    graphs: list[_Graph]
    pairs: list[tuple[Any, Any]] = field(default_factory=list)  # the convolution and the norm that becomes part of it


@dataclass
class _Seen:
    """What the traces show of a network's calls."""

    parts: list[_Part] = field(default_factory=list)
    before: dict[nn.Module, nn.Module] = field(default_factory=dict)  # of each norm
    part: dict[nn.Module, _Part] = field(default_factory=dict)  # likewise
    reasons: dict[nn.Module, str] = field(default_factory=dict)
    calls: Counter[nn.Module] = field(default_factory=Counter)
    fetched: set[str] = field(default_factory=set)  # names of parameters and buffers that a forward reads by itself


class _AllReads(_Tracer):
    """One forward, called in one way.

    Args:
        tensors: whether its arguments are tensors; else they are lists, or who knows what.
        given: names of the optional arguments that the call gives.
        folded: identities that stand for norms, which a trace shows in their place.
    """

    proxy_buffer_attributes = True  # a forward that reads a running mean itself shall show

    def __init__(self, tensors: bool, given: Collection[str], folded: Collection[nn.Module]) -> None:
        super().__init__()
        self.tensors, self.given, self.folded = tensors, given, folded

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return super().proxy(node) if self.tensors or node.op != "placeholder" else Proxy(node, self)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if m in self.folded:
            return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)
        return super().call_module(m, forward, args, kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # Other libraries' neurons: they have their surrogate as a child and a forward that no trace can follow.
        stateful = any(callable(getattr(m, name, None)) for name in ("reset", "reset_mem", "reset_states"))
        theirs = any(c.__module__.partition(".")[0] in _PEERS for c in type(m).__mro__)
        return (stateful and theirs) or super().is_leaf_module(m, module_qualified_name)


_MOST_OPTIONAL = 3  # arguments of a forward, each given or not: two traces for each of 8 ways to call it


def _graphs(module: nn.Module, folded: Collection[nn.Module] = ()) -> list[_Graph] | None:
    """What the forward does for each way to call it; ``None`` where that cannot be traced."""
    names = list(optional(type(module).forward))
    if len(names) > _MOST_OPTIONAL or "forward" in module.__dict__:  # a trace takes that of the class
        return None
    graphs = []
    for tensors, *chosen in itertools.product((True, False), repeat=1 + len(names)):
        tracer = _AllReads(tensors, list(itertools.compress(names, chosen)), folded)
        graph = traced(tracer, module, stateless=True)
        if graph is None:
            return None
        made = {name: t for t, name in tracer.tensor_attrs.items() if name.startswith("_tensor_constant")}
        graphs.append((graph, made))
    return graphs


def _is_same_forward(a: _Graph, b: _Graph) -> bool:
    sources = [graph.python_code("self").src for graph, _ in (a, b)]
    return sources[0] == sources[1] and a[1].keys() == b[1].keys() and all(is_same(t, b[1][k]) for k, t in a[1].items())


def _look(module: nn.Module, name: str, seen: _Seen) -> None:
    """Look through the largest parts of ``module`` that can be traced."""
    if isinstance(module, _LEAVES) or not any(True for _ in module.children()):
        return
    graphs = _graphs(module)
    if graphs is None:
        for child_name, child in module.named_children():
            _look(child, f"{name}.{child_name}" if name else child_name, seen)
        return
    part = _Part(name, module, graphs)
    seen.parts.append(part)
    found = [_read(part, graph, seen) for graph, _ in graphs]
    for norm, before in dict.fromkeys(pair for pairs, _ in found for pair in pairs.items()):
        if all(pairs.get(norm) is before or not (calls[norm] or calls[before]) for pairs, calls in found):
            seen.before[norm], seen.part[norm] = before, part
        else:
            seen.reasons.setdefault(
                norm, "the convolution before runs without it where the forward is called otherwise"
            )
    for module in {m for _, calls in found for m in calls}:
        seen.calls[module] += max(calls[module] for _, calls in found)


def _read(part: _Part, graph: fx.Graph, seen: _Seen) -> tuple[dict[nn.Module, nn.Module], Counter[nn.Module]]:
    """The convolution before each norm, and how often each module is called."""
    pairs: dict[nn.Module, nn.Module] = {}
    calls: Counter[nn.Module] = Counter()

    def called(node: Any) -> nn.Module | None:
        found = isinstance(node, fx.Node) and node.op == "call_module"
        return part.module.get_submodule(str(node.target)) if found else None

    for node in graph.nodes:
        if node.op == "get_attr":
            seen.fetched.add(f"{part.name}.{node.target}" if part.name else str(node.target))
        norm = called(node)
        if norm is None:
            continue
        calls[norm] += 1
        if not isinstance(norm, _NORM):
            continue
        source = node.args[0] if len(node.args) == 1 and not node.kwargs else None
        before = called(source)
        if before is None or _before(before) is None:
            came = "what goes into it" if not isinstance(source, fx.Node) else str(source)
            seen.reasons[norm] = f"{came} is not the output of a convolution that is known here"
        elif len(source.users) > 1:  # type: ignore[union-attr]
            users = ", ".join(str(u) for u in source.users)  # type: ignore[union-attr]
            seen.reasons[norm] = f"the output of {source} is used {len(source.users)} times: by {users}"  # type: ignore[union-attr]
        else:
            pairs[norm] = before
    return pairs, calls


def _why_not_folded(
    norm: Any, before: Any, names: dict[nn.Module, list[str]], seen: _Seen, shared: set[int]
) -> str | None:
    norm_kind = _kind(norm, PLAIN_NORMS + STEP_NORMS, _THEIR_NORMS)
    if norm_kind is None:
        return f"{type(norm).__name__} is not one of the batch norms that are known here"
    if norm.running_mean is None or norm.running_var is None:
        return "it has no running statistics: it takes those of each batch"
    for module, word in ((before, "the convolution before"), (norm, "the norm")):
        if seen.calls[module] > 1 or len(names[module]) > 1:
            return f"{word} is called, or named, more than once"
        if any(id(t) in shared for t in (*module._parameters.values(), *module._buffers.values()) if t is not None):
            return f"{word} shares a parameter with another module"
        if parametrize.is_parametrized(module) or "weight" not in module._parameters:
            return f"{word} computes its weight anew at each call"
        if "forward" in module.__dict__:
            return f"{word} has a forward of its own"
        if has_hooks(module):
            return f"{word} has hooks"
        if any(f"{names[module][0]}.{name}" in seen.fetched for name in ("weight", "bias", *module._buffers)):
            return f"a parameter of {word} is read by the model's forward itself"
    for t in (before.weight, before.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias):
        if t is not None and (type(t) not in (Tensor, nn.Parameter) or not t.is_floating_point()):
            return f"a parameter is a {type(t).__name__} of {t.dtype}"
    if getattr(before, "step_mode", "s") != getattr(norm, "step_mode", "s"):
        return f"the convolution before is in step mode {before.step_mode!r} and the norm in {norm.step_mode!r}"
    if _before(before) in _TRANSPOSED and before.groups > 1:
        return "the convolution before is a transposed convolution in groups"
    if norm.num_features != before.out_channels:
        return f"a {type(norm).__name__} of {norm.num_features} channels does not fit behind {before.out_channels}"
    return None


def _fold(norm: Any, before: Any) -> None:
    """``norm`` into the weight and bias of ``before``, computed in float64 and rounded once."""
    weight, bias = before.weight, before.bias
    values: Any = weight, bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    double: Any = [v.detach().double() if isinstance(v, Tensor) else v for v in values]
    fold: Any = partial(fuse_conv_bn_weights, transpose=_before(before) in _TRANSPOSED)
    folded_weight, folded_bias = (v.detach() for v in fold(*double))
    before.weight = nn.Parameter(torch.empty_like(weight).copy_(folded_weight), requires_grad=False)  # in its layout
    before.bias = nn.Parameter(folded_bias.to(weight.dtype), requires_grad=False)


class _Inside:
    """Tells whether a part runs: of a forward that nobody could trace, it may not be called piece by piece.

    Its folded layers compute another thing each, and the same together.
    """

    def __init__(self, part: _Part, folded: Iterable[nn.Module]) -> None:
        self.name, self.running = part.name, 0
        part.module.register_forward_pre_hook(self.enter)
        part.module.register_forward_hook(self.leave, always_call=True)
        for module in folded:
            module.register_forward_pre_hook(self.check)

    def enter(self, module: nn.Module, args: Any) -> None:
        self.running += 1

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.running -= 1

    def check(self, module: nn.Module, args: Any) -> None:
        if not self.running:
            raise RuntimeError(
                f"a layer inside {self.name} was called past it, but optimize_for_inference has folded batch norms "
                "into the convolutions there, and could not trace the forward around it to see that: call "
                f"{self.name} itself, or use the model as it was"
            )


def _fold_part(net: nn.Module, part: _Part, names: dict[nn.Module, list[str]]) -> bool:
    """Fold the pairs of ``part``, unless its forward then does something else: it may have asked what its layers are,
    or computed from their weights."""
    weights = [(before, before.weight, before.bias) for before, _ in part.pairs]
    identities: list[nn.Module] = []
    for before, norm in part.pairs:
        _fold(norm, before)
        identities.append(nn.Identity().train(norm.training))
        _put(net, names[norm][0], identities[-1])
    graphs = _graphs(part.module, identities)
    if graphs is None or not all(map(_is_same_forward, part.graphs, graphs)):
        for before, weight, bias in weights:
            before.weight, before.bias = weight, bias
        for _, norm in part.pairs:
            _put(net, names[norm][0], norm)
        return False
    if part.module is not net:
        _Inside(part, [*identities, *(before for before, _ in part.pairs)])
    return True


def _put(net: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    net.get_submodule(parent).add_module(child, module)


def optimize_for_inference(model: nn.Module) -> tuple[Any, InferenceReport]:
    """A copy of ``model`` that only infers, and faster: in evaluation mode, without gradients, its batch norms gone.

    A batch norm whose input is the output of a convolution, which goes nowhere else, becomes part of the convolution's
    weights (an :class:`torch.nn.Identity` stands in its place). Any other one that a neuron follows runs together with
    it (:func:`snnfast.fuse`). Convolutions skip inputs of 0 on a CPU (:func:`snnfast.event_driven`). Neurons keep
    nothing for a backward. Outputs equal those of ``model.eval()`` within
    rounding: a spike may differ only where the charge is within rounding of the threshold. The model itself is not
    changed, and the copy starts from the initial state. The copy stays in evaluation mode: its ``train()`` says so and
    does nothing, for there is no batch norm to train.

    Args:
        model: any module; what might come out different is left alone, and the report says why. Of a forward that
            cannot be traced its parts are looked at one by one: if it calls a layer inside one of them past it, the
            copy raises a :class:`RuntimeError`, and it must not read their weights.

    Returns:
        The copy, an instance of the same class, and an :class:`InferenceReport`, which prints.

    Raises:
        TypeError: ``model`` is not a module.

    Example:
        >>> from snnfast import LIFNode
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), LIFNode(timesteps=4))
        >>> fast, report = optimize_for_inference(net)
        >>> print(report)
        batch norms folded into the convolution before: 1, fused with the neuron behind: 0, left alone: 0
          0 <- 1
        >>> fast(torch.rand(4 * 2, 3, 8, 8)).shape
        torch.Size([8, 8, 6, 6])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    net = network.copy_of(model).eval().requires_grad_(False)
    unfuse(net)
    functional.reset_net(net)
    names: dict[nn.Module, list[str]] = {}
    for name, module in net.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    seen, shared, report = _Seen(), _shared_parameters(net), InferenceReport()
    _look(net, "", seen)
    reasons: dict[str, str] = {}
    for norm, paths in names.items():
        if not isinstance(norm, _NORM):
            continue
        before = seen.before.get(norm)
        if norm in seen.reasons or before is None:
            reasons[paths[0]] = seen.reasons.get(norm, unseen(norm))
        elif (reason := _why_not_folded(norm, before, names, seen, shared)) is not None:
            reasons[paths[0]] = reason
        else:
            seen.part[norm].pairs.append((before, norm))
    for part in seen.parts:
        if not part.pairs:
            continue
        if _fold_part(net, part, names):
            report.folded += [(names[before][0], names[norm][0]) for before, norm in part.pairs]
        else:
            where = part.name or "the model"
            reasons |= {
                names[norm][0]: f"the forward of {where} would do something else then" for _, norm in part.pairs
            }
    fused = fuse(net)
    report.fused = fused.fused
    for name, reason in fused.left_alone.items():
        report.left_alone[name] = f"not folded: {reasons[name]}; not fused: {reason}"
    report.event_driven = event_driven(net).event_driven
    for name in report.event_driven:
        net.get_submodule(name).keeps_weights = True
    net.train = partial(_only_evaluates, net)
    return net, report


def _only_evaluates(net: nn.Module, mode: bool = True) -> nn.Module:
    """The ``train`` of a copy. No error: a frozen part of a larger model gets its ``train()`` too."""
    if mode:
        say_once(
            f"train() leaves this {type(net).__name__} in evaluation mode: it is the copy that optimize_for_inference "
            "made, without batch norms and gradients. Train the model that it was made from, then make the copy again"
        )
    return type(net).train(net, False)


# ---- CUDA graphs ----
class Captured:
    """A model's forward as one CUDA graph; see :func:`capture`.

    Attributes:
        model: the module whose weights the graph reads: changing them in place changes the replays.
    """

    def __init__(self, model: nn.Module, sample: Tensor, warmup: int = 3) -> None:
        self.model = model
        self._input = sample.clone(memory_format=torch.preserve_format)
        stream = torch.cuda.Stream(sample.device)
        stream.wait_stream(torch.cuda.current_stream(sample.device))
        with torch.cuda.stream(stream), torch.no_grad():
            for _ in range(warmup):  # kernels are loaded and autotuned here, which a capture does not allow
                functional.reset_net(model)
                _refuse_unknown_leaves(model(self._input))
        torch.cuda.current_stream(sample.device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        functional.reset_net(model)  # before the capture: the recorded kernels start from the initial state
        # Not on torch's own stream for captures, which is of the device that was the current one at its first use.
        stream = torch.cuda.Stream(sample.device)
        with torch.no_grad(), torch.cuda.graph(self._graph, stream=stream):
            self._output = model(self._input)
        functional.reset_net(model)  # the states that the capture left live in the graph's memory

    def __call__(self, x: Tensor) -> Any:
        """The output for ``x``, of the sample's shape and dtype; a new tensor at each call."""
        if x.shape != self._input.shape or x.dtype != self._input.dtype:
            raise ValueError(
                f"x must be {self._input.dtype} of shape {tuple(self._input.shape)}, as the sample that was captured, "
                f"got {x.dtype} of shape {tuple(x.shape)}"
            )
        self._input.copy_(x)
        self._graph.replay()
        return tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, self._output)


def _refuse_unknown_leaves(output: Any) -> None:
    """Tensors inside an object that is not looked into would be the graph's own, which the next replay overwrites."""
    for leaf in tree_leaves(output):
        if leaf is not None and not isinstance(leaf, (Tensor, int, float, str)):
            got = type(leaf).__name__
            raise TypeError(f"model must return tensors, or tuples, lists and dicts of them, to be captured, got {got}")


def capture(model: nn.Module, sample: Tensor) -> Captured:
    """Record a forward of ``model`` on ``sample`` as a CUDA graph: one launch instead of one for each kernel.

    What pays where kernels are shorter than their launches: small batches. Every replay starts from the neurons'
    initial state, so replays do not depend on each other; states are not carried from one to the next.

    The graph has one input and one output in memory: call it from one stream, or wait between calls from two.

    Args:
        model: a network in evaluation mode on a CUDA device, such as :func:`optimize_for_inference` returns.
        sample: an input on that device, of the shape, dtype and memory format of those to come.

    Returns:
        A callable ``x -> output`` for inputs of the sample's shape.

    Raises:
        TypeError: ``model`` is not a module, ``sample`` not a tensor, or the output has another kind of object than
            tensors, tuples, lists and dicts.
        RuntimeError: ``sample`` or a parameter is not on a CUDA device.
        ValueError: ``model`` is in training mode.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(sample, Tensor):
        raise TypeError(f"sample must be a tensor, got {type(sample).__name__}")
    for name, t in (("sample", sample), *_tensors(model)):
        if t.device.type != "cuda":
            hint = "" if torch.cuda.is_available() else "; torch sees no CUDA device here"
            raise RuntimeError(f"a CUDA graph needs everything on a CUDA device, but {name} is on {t.device}{hint}")
    training = [name or type(model).__name__ for name, m in model.named_modules() if m.training]
    if training:
        raise ValueError(f"model must be in evaluation mode (model.eval()), but {training[0]} is in training mode")
    return Captured(model, sample)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()
