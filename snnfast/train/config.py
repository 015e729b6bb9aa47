"""The options of a run, stated once: fields of a dataclass, which :mod:`.options` reads from a command line or file."""

# ruff: noqa: RUF009 (_option makes dataclass fields)
from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .augment import KINDS
from .data import EVENTS, NAMES
from .errors import InputError, nearest
from .models import arguments

__all__ = ["LOSSES", "TEACHERLESS", "Config", "flag"]

_SIZED = ("imagefolder", "cifar10dvs", "dvsgesture")
LOSSES = ("logit", "per-step", "feature", "temporal", "spatial", "confidence")
TEACHERLESS = frozenset(("temporal", "spatial", "confidence"))


def _option(group: str, default: Any, help: str, **extra: Any) -> Any:
    metadata = {"group": group, "help": help, **extra}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


_KINDS: dict[str, tuple[Any, str]] = {  # by a field's type
    "str": (str, "text"),
    "int": (int, "a whole number (int)"),
    "float": (int | float, "a number (float)"),
    "bool": (bool, "True or False"),
    "Path": (Path, "a path"),
    "list[str]": (list | tuple, "a list of texts"),
}


def _is_of(kind: str, value: Any) -> bool:
    if isinstance(value, bool):  # which Python takes for a number
        return kind == "bool"
    return isinstance(value, _KINDS[kind][0]) and (kind != "list[str]" or all(isinstance(v, str) for v in value))


@dataclass
class Config:
    """All options of a run; see ``python -m snnfast.train --help``."""

    data: str = _option("data", "mnist5k", "data set", choices=NAMES)
    data_dir: Path | None = _option("data", None, "folder of its files", metavar="DIR")
    download: bool = _option("data", False, "fetch missing files, with checksums (needs a network)")
    train_samples: int | None = _option("data", None, "train on a class-balanced subset of N images", metavar="N")
    test_samples: int | None = _option("data", None, "test on a class-balanced subset of N images", metavar="N")
    image_size: int | None = _option(
        "data", None, "side of imagefolder's images (224) or of DVS frames (64)", metavar="N"
    )
    augment: str = _option(
        "data", "auto", f"comma-separated of {', '.join(KINDS)}; none; auto: by data set", metavar="LIST"
    )

    student: str = _option(
        "networks", "wrn16_2", "NAME of snnfast.models, or module:function, called with num_classes, in_channels and "
        "timesteps", metavar="NAME",
    )  # fmt: skip
    teacher: str = _option(
        "networks", "resnet18", "NAME of snnfast.models, module:function, timm:NAME or torchvision:NAME", metavar="NAME"
    )
    teacher_checkpoint: Path | None = _option(
        "networks", None, "trained weights of the teacher (.safetensors, .pt or a checkpoint of this command); "
        "it is not trained then", metavar="FILE",
    )  # fmt: skip
    neuron: str = _option(
        "networks", "lif", "neuron of a student of snnfast.models: hard reset, ATan surrogate, input not scaled by "
        "tau; --model-args changes that, as in v_reset=None", choices=("if", "lif", "plif"),
    )  # fmt: skip
    tau: float = _option("networks", 2.0, "time constant of lif and plif, in time steps", metavar="TAU")
    timesteps: int = _option("networks", 4, "time steps T of the student (T_s)", metavar="T")
    model_args: list[str] = _option(
        "networks",
        [],
        "further arguments of the student's function, such as width=8 (the channels that snnfast.models begin with)",
        metavar="KEY=VALUE",
    )
    teacher_args: list[str] = _option(
        "networks", [], "further arguments of the teacher's function", metavar="KEY=VALUE"
    )

    distill: list[str] = _option(
        "distillation", ["logit"], f"losses of a distilled student, joined by commas: {', '.join(LOSSES)}; several "
        "lists train several students; none: only the plain one", metavar="LIST",
    )  # fmt: skip
    no_plain: bool = _option("distillation", False, "do not train the plain student for comparison")
    temperature: float | None = _option(
        "distillation", None, "softening of all targets (default: 3 for logit and per-step, 2 for temporal, spatial "
        "and confidence)", metavar="X",
    )  # fmt: skip
    task_weight: float | None = _option(
        "distillation", None, "weight of the cross-entropy with the labels, in every step with per-step (default: 1; "
        "with logit 1 - LOGIT_WEIGHT, as in KDSNN)", metavar="X",
    )  # fmt: skip
    logit_weight: float = _option("distillation", 0.5, "weight of logit, KDSNN's alpha", metavar="X")
    per_step_weight: float = _option(
        "distillation", 0.2, "weight of per-step's divergence from the teacher", metavar="X"
    )
    self_weight: float = _option(
        "distillation", 0.5, "weight of per-step's divergence from the student's own mean over time", metavar="X"
    )
    feature_weight: float = _option("distillation", 1.0, "weight of feature", metavar="X")
    temporal_weight: float = _option("distillation", 1.0, "weight of temporal", metavar="X")
    spatial_weight: float = _option("distillation", 0.1, "weight of spatial", metavar="X")
    confidence_weight: float = _option("distillation", 1.0, "weight of confidence", metavar="X")
    feature_pairs: list[str] = _option(
        "distillation", [], "layers for feature, by dotted path; default: the last stages of both",
        metavar="STUDENT=TEACHER",
    )  # fmt: skip
    spatial_layers: list[str] = _option(
        "distillation", [], "layers for spatial, by dotted path; default: the last stage but one", metavar="PATH"
    )
    timesteps_teacher: int | None = _option(
        "distillation", None, "time steps T_t of temporal, more than --timesteps; default: twice as many", metavar="T"
    )
    cache_teacher: bool = _option(
        "distillation", False, "compute the teacher's logits once for the whole training set (needs --augment none)"
    )

    epochs: int = _option("training", 20, "passes of each student over the training data", metavar="N")
    teacher_epochs: int | None = _option(
        "training", None, "passes of the teacher; 0: as it is; default: as many", metavar="N"
    )
    batch_size: int = _option("training", 64, "images of an optimiser step, over all devices", metavar="N")
    accumulate: int = _option("training", 1, "split each batch into N parts to save memory", metavar="N")
    optimizer: str = _option("training", "adamw", "optimiser", choices=("adamw", "adam", "sgd"))
    lr: float = _option("training", 2e-3, "peak learning rate", metavar="X")
    weight_decay: float = _option(
        "training", 1e-2, "weight decay, not on biases, norms and time constants", metavar="X"
    )
    schedule: str = _option("training", "cosine", "learning rate over time", choices=("cosine", "onecycle", "constant"))
    warmup: float = _option("training", 1.0, "epochs of linear warm-up (cosine, constant)", metavar="N")
    clip: float | None = _option("training", None, "largest norm of the gradient", metavar="X")
    seed: int = _option("training", 0, "of weights, data order and augmentation", metavar="N")

    device: str = _option("machine", "auto", "auto, cpu, cuda ...", metavar="NAME")
    devices: int | None = _option(
        "machine", None, "number of devices or processes; default: 1, or what torchrun started", metavar="N"
    )
    threads: int | None = _option("machine", None, "CPU threads; results depend on their number", metavar="N")
    precision: str = _option("machine", "32-true", "arithmetic", choices=("32-true", "bf16-mixed", "16-mixed"))
    channels_last: bool = _option("machine", False, "images as NHWC, faster for convolutions on GPUs")
    fuse: bool = _option(
        "machine", False, "each batch norm of the student and the neuron behind it in one kernel (snnfast.fuse)"
    )
    event_driven: bool = _option(
        "machine", False, "on a CPU the student's convolutions skip inputs of 0 (snnfast.event_driven)"
    )
    compile: bool = _option(
        "machine", False, "torch.compile the teacher's and the plain student's training; distilled ones run as they are"
    )

    out: Path = _option("output", Path("runs/snnfast"), "folder of checkpoints, logs and report", metavar="DIR")
    resume: bool = _option("output", False, "go on from the checkpoints in --out (or start, if there are none)")
    checkpoint_steps: int = _option(
        "output", 500, "steps between checkpoints; each epoch's end makes one anyway", metavar="N"
    )
    no_tensorboard: bool = _option("output", False, "write no TensorBoard logs")
    robustness_samples: int = _option(
        "output", 200, "test images for the report's noise robustness curves; 0: none", metavar="N"
    )

    def __post_init__(self) -> None:
        for name in ("data_dir", "teacher_checkpoint", "out"):
            if isinstance(getattr(self, name), str):
                setattr(self, name, Path(getattr(self, name)))

    # ---- checks ----
    def check(self) -> Config:
        """Refuse what cannot work, before anything is read; returns the configuration.

        Raises:
            InputError: naming the option, its value and what would do.
        """
        for f in fields(self):  # the command line has seen to it, Python has not
            choices, value = f.metadata.get("choices"), getattr(self, f.name)
            kind, _, optional = str(f.type).partition(" | ")
            if not (_is_of(kind, value) or (optional and value is None)):
                raise InputError(f"{flag(f.name)} must be {_KINDS[kind][1]}, got {value!r}")
            if choices and value not in choices:
                raise InputError(
                    f"{flag(f.name)} must be one of {', '.join(choices)}, got {value!r}{nearest(str(value), choices)}"
                )
        for name, minimum in (
            *(("timesteps", 1), ("epochs", 1), ("batch_size", 1), ("accumulate", 1), ("checkpoint_steps", 1)),
            *(("train_samples", 1), ("test_samples", 1), ("teacher_epochs", 0), ("devices", 1), ("threads", 1)),
            *(("seed", 0), ("image_size", 8), ("robustness_samples", 0), ("timesteps_teacher", 2)),
        ):
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise InputError(f"{flag(name)} must be a whole number from {minimum}, got {value}")
        for name in ("temperature", "lr", "clip"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise InputError(f"{flag(name)} must be positive, got {value}")
        if not 1 < self.tau < float("inf"):
            raise InputError(f"--tau must be more than 1 (a time constant, in time steps), got {self.tau}")
        weights = [f.name for f in fields(self) if f.name.endswith("_weight")]
        for name in (*weights, "weight_decay", "warmup"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise InputError(f"{flag(name)} must be 0 or more, got {value}")
        if self.batch_size % self.accumulate:
            raise InputError(f"--batch-size {self.batch_size} must be divisible by --accumulate {self.accumulate}")
        runs = self.distilled()
        if any("logit" in losses for losses in runs) and self.task_weight is None and self.logit_weight > 1:
            raise InputError(
                f"--logit-weight must be at most 1 without --task-weight, which is 1 minus it, got {self.logit_weight}"
            )
        if any("temporal" in losses for losses in runs) and self.long_timesteps() <= self.timesteps:
            raise InputError(
                f"--timesteps-teacher must be more than --timesteps ({self.timesteps}), got {self.long_timesteps()}"
            )
        if self.event_driven and self.precision != "32-true":
            raise InputError(f"--event-driven computes in float32: it needs --precision 32-true, got {self.precision}")
        if self.cache_teacher:
            if self.augmentation():
                raise InputError("--cache-teacher needs --augment none: augmented images have other logits each time")
            if any("feature" in losses for losses in runs):
                raise InputError("--cache-teacher keeps logits only: leave feature out of --distill")
            if not self.needs_teacher():
                raise InputError("--cache-teacher is for losses with a teacher: add one to --distill, or leave it out")
        arguments(self.model_args, "--model-args")
        arguments(self.teacher_args, "--teacher-args")
        for pair in self.feature_pairs:
            if pair.count("=") != 1 or not all(pair.split("=")):
                raise InputError(f"--feature-pairs must be STUDENT=TEACHER, got {pair!r}")
        layers = [pair.split("=")[0] for pair in self.feature_pairs]
        if len(set(layers)) < len(layers):
            raise InputError(f"--feature-pairs must name each layer of the student once, got {', '.join(layers)}")
        for name, loss in (
            ("feature_pairs", "feature"),
            ("spatial_layers", "spatial"),
            ("timesteps_teacher", "temporal"),
        ):
            if getattr(self, name) and not any(loss in losses for losses in runs):
                raise InputError(f"{flag(name)} is for {loss}: add that to --distill, or leave {flag(name)} out")
        if self.image_size is not None and self.data not in _SIZED:
            raise InputError(
                f"--image-size is for {', '.join(_SIZED)}: {self.data} has images of one size; leave it out"
            )
        if self.no_plain and not runs:
            raise InputError("--no-plain with --distill none leaves nothing to train")
        return self

    def distilled(self) -> list[tuple[str, ...]]:
        """The losses of each distilled student.

        Raises:
            InputError: an unknown loss, or one given twice.
        """
        runs = []
        for text in self.distill:
            losses = tuple(part.strip() for part in text.split(",") if part.strip())
            if losses == ("none",):
                continue
            for loss in losses:
                if loss not in LOSSES:
                    raise InputError(f"--distill must be of {', '.join(LOSSES)}, got {loss!r}{nearest(loss, LOSSES)}")
            if not losses or len(set(losses)) < len(losses):
                raise InputError(f"--distill must name each loss once, got {text!r}")
            if losses in runs:
                raise InputError(f"--distill {text} is there twice")
            runs.append(losses)
        return runs

    def needs_teacher(self) -> bool:
        """Whether a loss asks for a teacher."""
        return any(set(losses) - TEACHERLESS for losses in self.distilled())

    def trains_teacher(self) -> bool:
        """Whether the teacher is trained here; one with a checkpoint, or no epochs, stays as it is."""
        return self.teacher_checkpoint is None and self.teacher_epochs != 0

    def long_timesteps(self) -> int:
        """T_t, the steps of the self-distillation's target."""
        return 2 * self.timesteps if self.timesteps_teacher is None else self.timesteps_teacher

    def augmentation(self) -> tuple[str, ...]:
        """The kinds of augmentation, ``auto`` resolved."""
        if self.augment == "none":
            return ()
        if self.augment == "auto":
            # A mirrored digit or gesture is another one.
            return ("crop", "flip") if self.data in ("cifar10", "cifar100", "imagefolder", "cifar10dvs") else ("crop",)
        return tuple(part.strip() for part in self.augment.split(","))

    def padding(self) -> float:
        """The largest shift of a crop, as a share of the image's side."""
        # MNIST's digits are centred: of 28 pixels, shifts by up to 2 gave a small ANN 99.34 % of 10,000 held-out
        # training images after 6 epochs, shifts by up to 4 (the share that is usual for CIFAR) 99.15 %.
        return 1 / 14 if self.data in ("mnist", "mnist5k") else 1 / 8

    def identity(self, kind: str) -> dict[str, Any]:
        """The options that decide the weights of a stage: "teacher", "plain" or "distilled"."""
        names = {f.name for f in fields(self) if f.metadata["group"] in ("data", "training")}
        names |= {"precision", "channels_last", "compile"}
        names -= {"data_dir", "download", "test_samples"}
        teacher = {"teacher", "teacher_args", "teacher_epochs"}
        student = {"student", "model_args", "neuron", "tau", "timesteps"}
        names -= teacher
        if kind == "teacher":
            names |= teacher | ({"timesteps"} if self.data in EVENTS else set())
        else:
            names |= student | {"fuse", "event_driven"}
        if kind == "distilled":
            names |= {f.name for f in fields(self) if f.metadata["group"] == "distillation"} - {"distill", "no_plain"}
            names |= {"teacher", "teacher_args"}
        return {k: v for k, v in self.record().items() if k in names}

    def record(self) -> dict[str, Any]:
        """All options as plain values, for checkpoints and reports."""
        return {
            k: str(v) if isinstance(v, Path) else list(v) if isinstance(v, list) else v
            for k, v in dataclasses.asdict(self).items()
        }


def flag(name: str) -> str:
    """The command line's spelling of a field."""
    return "--" + name.replace("_", "-")
