"""A whole run: check everything, train the teacher, the plain student and the distilled ones, report."""

from __future__ import annotations

import contextlib
import os
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .. import functional
from ..analysis._modules import evaluating
from ..distill.layers import untouched
from ..events import event_driven
from ..fused import fuse
from ..memory import keep_freed_memory
from . import data, models
from .augment import Augment
from .checkpoint import seed_everything, write_atomically
from .config import TEACHERLESS, Config
from .errors import InputError
from .evaluation import evaluate
from .objective import Objective, average_time, distiller, readout, repeated
from .progress import Display, history_csv
from .report import Logs, write_report
from .trainer import Stage, Trainer

__all__ = ["run"]

_TEACHER, _STUDENT, _LOSSES, _TRAINING = 10, 11, 14, 12  # what a seed is for


def _fabric(config: Config) -> Any:
    try:
        import lightning_fabric
    except ImportError:
        raise InputError("training needs lightning-fabric: pip install snnfast[train]") from None
    kind = config.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    elif kind == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "--device cuda: torch sees no CUDA device here (python -m snnfast says more); use --device cpu"
        )
    if kind == "cpu" and config.precision == "16-mixed":
        raise InputError("--precision 16-mixed needs a GPU; --precision bf16-mixed works on a CPU")
    devices, nodes = config.devices or 1, 1
    if "LOCAL_WORLD_SIZE" in os.environ and "RANK" in os.environ:  # torchrun
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        devices, nodes = local, int(os.environ["WORLD_SIZE"]) // local
        if config.devices not in (None, local):
            raise InputError(
                f"--devices {config.devices} does not match the {local} processes that torchrun started here"
            )
    parts = devices * nodes * config.accumulate
    if config.batch_size % parts:
        raise InputError(
            f"--batch-size {config.batch_size} must be divisible by processes times --accumulate, {parts}: it is the "
            "number of images of one optimiser step"
        )
    try:
        fabric = lightning_fabric.Fabric(
            accelerator=kind,
            devices=devices,
            num_nodes=nodes,
            strategy="ddp" if devices * nodes > 1 else "auto",
            precision=config.precision,  # type: ignore[arg-type]
        )
    except (ValueError, RuntimeError, TypeError) as error:
        raise InputError(f"--device {config.device}, --devices {devices}: {error}") from None
    fabric.launch()
    return fabric


@contextlib.contextmanager
def _only_run_in(folder: Path) -> Iterator[None]:
    """Refuse a folder in which another run is at work; the lock dies with the process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise InputError(f"--out {folder} cannot be written: {error.strerror}") from None
    with file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # no such locks on Windows
            pass
        except OSError:
            raise InputError(f"--out {folder}: another run is writing there; give another folder") from None
        yield


def _neuron(config: Config) -> dict[str, Any]:
    """Neuron arguments of snnfast.models' students: inputs are not scaled down by tau, so that normalised ones fire."""
    from .. import neuron, surrogate

    options: dict[str, Any] = {"surrogate_function": surrogate.ATan(), "detach_reset": True}
    if config.neuron == "if":
        return options | {"neuron": neuron.IFNode}
    options["decay_input"] = False
    if config.neuron == "lif":
        return options | {"neuron": neuron.LIFNode, "tau": config.tau}
    return options | {"neuron": neuron.ParametricLIFNode, "init_tau": config.tau}


class _Networks:
    """Builds the networks of a run, on their device and in their layout."""

    def __init__(self, config: Config, dataset: data.Dataset, fabric: Any) -> None:
        self.config, self.dataset, self.fabric = config, dataset, fabric
        normal = Augment((), dataset.mean, dataset.std, dataset.has_time)
        # So many images that no dimension of theirs is mistaken for time.
        taken = (config.timesteps, config.long_timesteps(), dataset.channels)
        self.count = next(n for n in (2, 3, 5, 7) if n not in taken)
        few = torch.arange(self.count, device=dataset.train.labels.device) % len(dataset.train)
        self.example = normal.normalise(dataset.train.gather(few))

    def _build(self, what: str, name: str, timesteps: int | None, extra: dict[str, Any], seed: int) -> nn.Module:
        seed_everything(data.split_seed(self.config.seed, seed))
        network = models.build(name, what, self.dataset.classes, self.dataset.channels, timesteps, extra)
        if self.fabric.world_size > 1 and self.fabric.device.type == "cuda":
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        return network.to(self.fabric.device)

    def student(self) -> nn.Module:
        """A student, with the weights that every student of this seed starts from."""
        config = self.config
        extra = models.arguments(config.model_args, "--model-args")
        if ":" not in config.student:
            if "neuron" in extra:
                raise InputError(
                    f"--model-args must not have neuron for {config.student}, got {extra['neuron']!r}: give --neuron "
                    "if, lif or plif, or a module:function with a neuron of your own"
                )
            extra = _neuron(config) | extra
            if self.dataset.has_time:
                extra.setdefault("coding", "temporal")
        network = self._build("student", config.student, config.timesteps, extra, _STUDENT)
        if config.fuse:
            fused = fuse(network)
            self._expect_some(fused.fused, fused.left_alone, "--fuse", "batch norm")
        if config.event_driven:
            by_events = event_driven(network)
            self._expect_some(by_events.event_driven, by_events.left_alone, "--event-driven", "convolution")
        self._check("student", config.student, network, (config.timesteps, self.count, self.dataset.classes), True)
        return network

    def _expect_some(self, changed: list[Any], left_alone: dict[str, str], option: str, what: str) -> None:
        if not changed:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in left_alone.items()) or "it has none"
            where = f"of --student {self.config.student} that it can serve ({reasons})"
            raise InputError(f"{option} finds no {what} {where}; leave it out")

    def teacher(self) -> nn.Module:
        """The teacher, untrained or with the weights of ``--teacher-checkpoint``."""
        config = self.config
        extra = models.arguments(config.teacher_args, "--teacher-args")
        network = self._build("teacher", config.teacher, None, extra, _TEACHER)
        if self.dataset.has_time:
            average_time(network)
        self._check("teacher", config.teacher, network, (self.count, self.dataset.classes), config.trains_teacher())
        if config.teacher_checkpoint is not None:
            weights = models.load_weights(config.teacher_checkpoint)
            models.fill(network, weights, f"--teacher-checkpoint {config.teacher_checkpoint}")
        return network

    def _check(self, what: str, name: str, network: nn.Module, shape: tuple[int, ...], trained: bool) -> None:
        """One forward pass in evaluation, and one in training where it will be trained, which leave no trace."""
        try:
            if any(is_lazy(t) for t in (*network.parameters(), *network.buffers())):
                with torch.no_grad():
                    network.eval()(self.example)  # makes what such layers lack, and must leave it
                functional.reset_net(network)
            with untouched(network):
                output = network(self.example)
                if trained:
                    functional.reset_net(network)
                    readout(network.train()(self.example))
        except InputError as error:
            raise InputError(f"--{what} {name}: {error}") from None
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:  # timm asserts sizes
            raise InputError(
                f"--{what} {name} cannot run on {self.dataset.name}'s input {tuple(self.example.shape)}: {error}"
            ) from None
        if not isinstance(output, Tensor) or tuple(output.shape) != shape:
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            meaning = "[T, B, classes]" if len(shape) == 3 else "[B, classes]"
            raise InputError(f"--{what} {name} must give logits {meaning} = {shape} for {self.count} images, got {got}")
        network.train()

    def distilled(self, losses: tuple[str, ...], student: nn.Module, teacher: nn.Module | None) -> Objective:
        """The objective of a distilled student."""
        config = self.config
        steps = config.long_timesteps() if self.dataset.has_time and "temporal" in losses else None
        seed_everything(data.split_seed(config.seed, _LOSSES))
        example = repeated(self.example, steps)
        made = distiller(losses, config, student, teacher, self.dataset.classes, example)
        return Objective(student, made, steps)


def _checksum(network: nn.Module) -> int:
    value = 0
    for tensor in network.state_dict().values():
        value = zlib.crc32(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy(), value)
    return value


@torch.no_grad()
def _logits(teacher: nn.Module, store: data.Store, augment: Augment, batch_size: int) -> Tensor:
    """The teacher's logits of every training image."""
    logits = []
    with evaluating(teacher):
        for indices in torch.arange(len(store), device=store.labels.device).split(batch_size):
            functional.reset_net(teacher)
            logits.append(teacher(augment.normalise(store.gather(indices))).float())
    return torch.cat(logits)


def run(config: Config) -> dict[str, Any]:
    """Train what ``config`` asks for; returns what the report says, as plain values.

    Files are in ``config.out``: ``report.md``, ``report.json``, figures, a folder for each network with its weights
    (``model.safetensors``), ``log.csv`` and checkpoints.

    Raises:
        InputError: refused before training starts; the message names the remedy.
        NonFiniteError, CheckpointError, Interrupted: training stopped; the last good checkpoint is kept.
    """
    config.check()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    joined_before = torch.distributed.is_available() and torch.distributed.is_initialized()
    fabric = _fabric(config)
    display = Display(quiet=not fabric.is_global_zero)
    if fabric.device.type == "cpu":
        keep_freed_memory()
    with _only_run_in(config.out) if fabric.is_global_zero else contextlib.nullcontext():
        if not config.resume and any(config.out.glob("*/checkpoints/step-*")):
            raise InputError(f"--out {config.out} holds checkpoints: add --resume to go on, or give another folder")
        fabric.barrier()
        report = _run(config, fabric, display)
        if fabric.world_size > 1 and not joined_before:
            # A process that ends while it belongs to a group is at times aborted by the group's threads.
            fabric.barrier()
            torch.distributed.destroy_process_group()
        return report


def _run(config: Config, fabric: Any, display: Display) -> dict[str, Any]:
    started = time.perf_counter()
    # One process downloads; the others then find the files.
    with fabric.rank_zero_first() if config.download else contextlib.nullcontext():
        dataset = data.load(
            config.data,
            config.data_dir,
            fabric.device,
            timesteps=config.timesteps,
            seed=config.seed,
            image_size=config.image_size,
            fetch=config.download,
            train_samples=config.train_samples,
            test_samples=config.test_samples,
        )
    if len(dataset.train) < config.batch_size:
        raise InputError(
            f"--batch-size {config.batch_size} is more than the {len(dataset.train)} training images: there would be "
            f"no batch; give {len(dataset.train)} or less"
        )
    if len(dataset.test) < fabric.world_size:
        raise InputError(
            f"{len(dataset.test)} test images are fewer than the {fabric.world_size} processes that share them; give "
            "more, or fewer --devices"
        )
    display.say(
        f"{dataset.name}: {len(dataset.train):,} training and {len(dataset.test):,} test images, {dataset.classes} "
        f"classes, on {fabric.device}; read in {time.perf_counter() - started:.1f} s"
    )
    normal = Augment((), dataset.mean, dataset.std, dataset.has_time)
    Augment(config.augmentation(), dataset.mean, dataset.std, dataset.has_time)  # refuses unknown kinds now
    networks = _Networks(config, dataset, fabric)
    teacher = networks.teacher() if config.needs_teacher() else None
    students = {} if config.no_plain else {"plain": networks.student()}
    objectives = {name: Objective(network) for name, network in students.items()}
    for losses in config.distilled():
        name = "distilled-" + "-".join(losses)
        students[name] = networks.student()
        own_teacher = teacher if set(losses) - TEACHERLESS else None
        objectives[name] = networks.distilled(losses, students[name], own_teacher)

    fingerprint = {"data": dataset.fingerprint()}
    logs = Logs(config, fabric.is_global_zero)
    results: dict[str, dict[str, Any]] = {}
    trained: dict[str, nn.Module] = {}

    def train(stage: Stage) -> None:
        trainer = Trainer(config, stage, dataset, fabric, config.out / stage.name, display, logs.epoch)
        seed_everything(data.split_seed(config.seed, _TRAINING, fabric.global_rank))
        if config.resume and trainer.resume():
            done = trainer.epoch == stage.epochs
            display.say(f"{stage.name}: {'finished' if done else 'goes on'} at step {trainer.step}")
            if fabric.is_global_zero and trainer.history:
                write_atomically(config.out / stage.name / "log.csv", history_csv(trainer.history))
        history = trainer.run()
        results[stage.name] = _result(stage.network, history)
        trained[stage.name] = stage.network
        if fabric.is_global_zero:
            from safetensors.torch import save

            weights = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in stage.network.state_dict().items()}
            write_atomically(config.out / stage.name / "model.safetensors", save(weights))

    if teacher is not None:
        if config.trains_teacher():
            epochs = config.teacher_epochs or config.epochs
            teacher.requires_grad_(True)  # the Distillers have frozen it
            identity = config.identity("teacher") | fingerprint
            train(Stage("teacher", "teacher", teacher, Objective(teacher), epochs, None, identity))
            teacher.requires_grad_(False)
        else:
            figures = evaluate(teacher, dataset.test, normal, config.batch_size, fabric)
            results["teacher"] = _result(teacher, []) | {
                "test_accuracy": figures["accuracy"], "test_loss": figures["loss"]
            }  # fmt: skip
            trained["teacher"] = teacher
            display.say(f"teacher: test accuracy {figures['accuracy']:.2%} as it was given")
        teacher.eval()
    cached = None
    if config.cache_teacher and teacher is not None:
        cached = _logits(teacher, dataset.train, normal, config.batch_size)
    for name, network in students.items():
        kind = "plain" if name == "plain" else "distilled"
        identity = config.identity(kind) | fingerprint
        if kind == "distilled" and objectives[name].distil.teacher is not None:
            assert teacher is not None
            identity["teacher weights"] = _checksum(teacher)
        logits = cached if "teacher weights" in identity else None
        train(Stage(name, kind, network, objectives[name], config.epochs, logits, identity))
    logs.close()
    report = {"seconds": time.perf_counter() - started, "results": results}
    if fabric.is_global_zero:
        write_report(config, dataset, trained, report, fabric, display)
    return report


def _result(network: nn.Module, history: list[dict[str, Any]]) -> dict[str, Any]:
    last = history[-1] if history else {}
    return {
        "parameters": sum(p.numel() for p in network.parameters()),
        **{k: last.get(k) for k in ("test_accuracy", "test_loss", "train_accuracy", "train_loss", "firing_rate")},
        **{k: last.get(k) for k in ("firing_rates", "seconds", "processor_seconds", "data_share", "peak_memory")},
        "epochs": len(history),
        "history": history,
    }
