"""What one forward pass of training computes: a network's loss, alone or under a Distiller."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional
from .config import Config
from .errors import InputError

__all__ = ["Objective", "average_time", "distiller", "readout", "repeated"]


def readout(output: Tensor) -> Tensor:
    """Logits ``[B, C]`` of an ANN's output, or of a spiking network's ``[T, B, C]`` (the mean over T).

    Raises:
        InputError: something else, as networks with auxiliary classifiers give in training.
    """
    if not isinstance(output, Tensor):
        raise InputError(
            f"a network must give a tensor of logits in training too, got {type(output).__name__}; switch auxiliary "
            "classifiers off, as --teacher-args aux_logits=False does for torchvision's GoogLeNet and Inception"
        )
    return output.mean(0) if output.dim() == 3 else output


class Objective(nn.Module):
    """(inputs, labels) to (loss, logits ``[B, C]``, terms ``[K]``): plain tensors, as distributed wrappers like them.

    Args:
        network: gives ``[B, C]`` or ``[T, B, C]``.
        distil: a :class:`snnfast.distill.Distiller` of that network, or ``None`` for cross-entropy alone.
        steps: repeat event frames ``[T, B, *]`` from the first to make so many (the target of temporal
            self-distillation runs longer than a recording).

    Attributes:
        names: of the weighted terms, known after the first call.
    """

    def __init__(self, network: nn.Module, distil: Any = None, steps: int | None = None) -> None:
        super().__init__()
        self.network = network
        self.distil = distil
        self.steps = steps
        self.names: tuple[str, ...] = ()

    def forward(
        self, inputs: Tensor, labels: Tensor, teacher_logits: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self.distil is None:
            functional.reset_net(self.network)
            logits = readout(self.network(inputs))
            loss = F.cross_entropy(logits, labels)
            self.names = ("task",)
            return loss, logits.detach(), loss.detach()[None]
        result = self.distil(repeated(inputs, self.steps), labels, teacher_logits=teacher_logits)
        self.names = tuple(result.weighted)
        terms = torch.stack([term.detach().float() for term in result.weighted.values()])
        return result.loss, result.logits.detach(), terms

    def extra(self) -> dict[str, Tensor]:
        """Parameters and buffers that are neither the network's nor the teacher's: adapters, weak classifiers."""
        if self.distil is None:
            return {}
        own = {id(t) for t in _state(self.network)}
        state = self.distil.state_dict(keep_vars=True)
        return {name: t for name, t in state.items() if isinstance(t, Tensor) and id(t) not in own}


def _state(module: nn.Module) -> list[Tensor]:
    return [t for t in module.state_dict(keep_vars=True).values() if isinstance(t, Tensor)]


def average_time(teacher: nn.Module) -> None:
    """Let an ANN see the mean over time of event frames ``[T, B, C, H, W]``; its layers' paths stay as they are."""

    def mean(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0].mean(0), *inputs[1:]) if inputs[0].dim() == 5 else inputs

    teacher.register_forward_pre_hook(mean)


def repeated(frames: Tensor, steps: int | None) -> Tensor:
    """Event frames ``[T, B, *]`` played again from the start until there are ``steps``; ``None``: as they are."""
    if steps is None or len(frames) == steps:
        return frames
    return frames[torch.arange(steps, device=frames.device) % len(frames)]


def _stages(model: nn.Module) -> list[str]:
    """Paths of a network's stages in order: numbered children (``layer1`` …), those of ``layers`` or ``stages``, or
    what comes before each pooling of a chain ``features``."""
    groups: dict[str, list[str]] = {}
    for name, child in model.named_children():
        stem = name.rstrip("0123456789")
        if stem and stem != name:
            groups.setdefault(stem, []).append(name)
        elif isinstance(child, nn.ModuleList) or (name in ("layers", "stages") and isinstance(child, nn.Sequential)):
            groups[name] = [f"{name}.{part}" for part, _ in child.named_children()]
        elif name == "features" and isinstance(child, nn.Sequential):
            pools = [i for i, m in enumerate(child) if "Pool" in type(m).__name__]
            ends = {i - 1 for i in (*pools, len(child)) if i and i - 1 not in pools}
            parts = [part for part, _ in child.named_children()]  # DenseNet's have names
            groups[name] = [f"{name}.{parts[i]}" for i in sorted(ends)]
    return next((groups[stem] for stem in ("layers", "layer", "stages", "stage", "features") if stem in groups), [])


def _end(model: nn.Module) -> list[str]:
    """Where the last features are: the last stage, or the activation after it in pre-activation networks."""
    children = dict(model.named_children())
    return ["relu"] if {"bn", "relu"} <= set(children) else _stages(model)[-1:]


def _pairs(config: Config, student: nn.Module, teacher: nn.Module) -> dict[str, str]:
    if config.feature_pairs:
        return dict(pair.split("=") for pair in config.feature_pairs)
    ends = [_end(m) for m in (student, teacher)]
    if not all(ends):
        raise InputError(
            "--distill feature needs --feature-pairs STUDENT=TEACHER: these networks have no stages by name"
        )
    return {ends[0][0]: ends[1][0]}


def _spatial(config: Config, student: nn.Module, classes: int) -> dict[str, int]:
    layers = config.spatial_layers or _stages(student)[-2:-1]
    if not layers:
        raise InputError("--distill spatial needs --spatial-layers PATH: this network has no stages by name")
    return dict.fromkeys(layers, classes)


def distiller(
    losses: Sequence[str], config: Config, student: nn.Module, teacher: nn.Module | None, classes: int, example: Tensor
) -> nn.Module:
    """The Distiller for ``--distill`` losses.

    Raises:
        InputError: a layer, weight or shape that does not fit, with the remedy.
    """
    try:
        from .. import distill as d
    except ImportError:
        raise InputError("this version has no snnfast.distill; give --distill none") from None
    made: list[Any] = []
    # Where none is given, each loss has its own.
    softening: dict[str, Any] = {} if config.temperature is None else {"temperature": config.temperature}
    task_weight = config.task_weight
    if task_weight is None:
        task_weight = 1.0 - config.logit_weight if "logit" in losses else 1.0
    try:
        for loss in losses:
            if loss == "logit":
                made.append(d.LogitKD(weight=config.logit_weight, **softening))
            elif loss == "per-step":
                weights = {"weight": config.per_step_weight, "self_weight": config.self_weight}
                made.append(d.PerStepKD(**weights, task_weight=task_weight, **softening))
            elif loss == "feature":
                assert teacher is not None
                made.append(d.FeatureKD(_pairs(config, student, teacher), config.feature_weight))
            elif loss == "temporal":
                steps = (config.long_timesteps(), config.timesteps)
                made.append(d.TemporalSelfKD(*steps, weight=config.temporal_weight, **softening))
            elif loss == "spatial":
                layers = _spatial(config, student, classes)
                made.append(d.SpatialSelfKD(layers, weight=config.spatial_weight, **softening))
            else:
                made.append(d.ConfidenceKD(weight=config.confidence_weight, **softening))
        if "per-step" in losses:  # its cross-entropy of every step takes the place of the one on the mean
            task_weight = 0.0
        return d.Distiller(student, teacher, made, task_weight=task_weight, example_inputs=example)
    except InputError:
        raise
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise InputError(f"--distill {','.join(losses)}: {error}") from None
