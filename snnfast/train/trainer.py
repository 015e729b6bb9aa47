"""The training loop of one network, which can be left at any step and entered again there."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..analysis._modules import spiking_modules
from .augment import Augment
from .checkpoint import Checkpoints, random_state, restore_random_state, seed_everything, write_atomically
from .config import Config
from .data import Dataset, epoch_order, split_seed
from .errors import InputError, Interrupted, NonFiniteError
from .evaluation import evaluate, laid_out
from .models import fill
from .objective import Objective
from .progress import Display, history_csv, peak_memory, reset_peak_memory

__all__ = ["Stage", "Trainer", "make_optimizer"]

_SHOW_EVERY = 10  # steps between looks at the loss, which make a GPU wait
_TRAINING, _AUGMENTATION = 12, 13  # what a seed is for


@dataclass
class Stage:
    """One network to train.

    Attributes:
        name: of the stage's folder, and in the report.
        kind: "teacher", "plain" or "distilled".
        network: the bare network.
        objective: what computes its loss.
        epochs: passes over the training data.
        cached_logits: of the teacher, for every training image, or ``None``.
        identity: options and data that decide the result; a checkpoint of another identity is refused.
    """

    name: str
    kind: str
    network: nn.Module
    objective: Objective
    epochs: int
    cached_logits: Tensor | None
    identity: dict[str, Any]


def make_optimizer(config: Config, module: nn.Module) -> torch.optim.Optimizer:
    """The optimiser; vectors and scalars (biases, norms, time constants) do not decay."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, config.lr, momentum=0.9, nesterov=True)
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, config.lr)


def _schedule(config: Config, optimizer: Any, per_epoch: int, epochs: int) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rate as a share of its peak, by step."""
    total = per_epoch * epochs
    # onecycle: the first 30 % rise, as in torch's OneCycleLR.
    warmup = round(0.3 * total if config.schedule == "onecycle" else min(config.warmup, epochs / 2) * per_epoch)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if config.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


@contextlib.contextmanager
def _stop_signals(immediately: bool) -> Iterator[list[str]]:
    """Ctrl-C and SIGTERM as entries of a list, looked at between steps; the second one stops at once."""
    asked: list[str] = []

    def handle(number: int, _: Any) -> None:
        # With several processes they would stop at different steps and wait for each other.
        if asked or immediately:
            raise KeyboardInterrupt
        asked.append(signal.Signals(number).name)

    try:
        before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals are somebody else's
        before = {}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Trainer:
    """Trains one stage.

    Args:
        config: the run's options.
        stage: what to train.
        dataset: images on the device.
        fabric: a launched lightning Fabric.
        folder: of checkpoints and log.
        display: for the user.
        on_epoch: called with the stage's history after each epoch, by the first process.
    """

    def __init__(
        self,
        config: Config,
        stage: Stage,
        dataset: Dataset,
        fabric: Any,
        folder: Path,
        display: Display,
        on_epoch: Callable[[str, list[dict[str, Any]]], None] = lambda name, history: None,
    ) -> None:
        self.config, self.stage, self.dataset, self.fabric = config, stage, dataset, fabric
        self.folder, self.display, self.on_epoch = folder, display, on_epoch
        self.parts = fabric.world_size * config.accumulate
        self.per_epoch = len(dataset.train) // config.batch_size
        statistics = (dataset.mean, dataset.std, dataset.has_time)
        self.augment = Augment(config.augmentation(), *statistics, padding=config.padding())
        self.checkpoints = Checkpoints(folder / "checkpoints", display.say, readonly=not fabric.is_global_zero)
        self.layout = torch.channels_last if config.channels_last else torch.contiguous_format
        if config.channels_last:
            stage.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if config.compile and stage.kind != "distilled":  # a Distiller's hooks come and go, which compiled code ignores
            # In place and outermost: keys stay bare, and evaluation's hooks see the network itself.
            stage.objective.compile()
        optimizer = make_optimizer(config, stage.objective)
        self.module, self.optimizer = fabric.setup(stage.objective, optimizer)
        self.scheduler = _schedule(config, optimizer, self.per_epoch, stage.epochs)
        self.generator = torch.Generator(device=dataset.train.labels.device)
        self.step = self.epoch = self.batch = 0
        self.history: list[dict[str, Any]] = []
        self.sums = torch.zeros(2, dtype=torch.float64, device=self.generator.device)  # loss, right answers
        self.terms = torch.zeros(0)
        self.seconds = self.data_seconds = self.processor_seconds = 0.0
        self.rate: float | None = None

    # ---- checkpoints ----
    def save(self) -> None:
        """Write a checkpoint of this very moment.

        Raises:
            NonFiniteError: a weight is NaN or infinite; the checkpoints before are kept.
            CheckpointError: it cannot be written.
        """
        fabric, sums = self.fabric, self._sums()
        bad = [
            k for k, v in self.stage.network.state_dict().items() if v.is_floating_point() and not v.isfinite().all()
        ]
        found = [(random_state(), bad)]
        if fabric.world_size > 1:
            found *= fabric.world_size
            torch.distributed.all_gather_object(found, found[0])
        bad = list(dict.fromkeys(k for _, bad in found for k in bad))
        if bad or not sums.isfinite().all():
            raise self._not_finite(f"; {', '.join(bad[:3])} of the network are not finite" if bad else "")
        if not fabric.is_global_zero:
            return
        state = {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": {k: v for k, v in self.scheduler.state_dict().items() if k != "lr_lambdas"},
            "scaler": fabric.strategy.precision.state_dict(),
            "random": [random for random, _ in found],
            "position": {"epoch": self.epoch, "batch": self.batch},
            "sums": sums.cpu(),
            "terms": self.terms.cpu(),
            "names": list(self.stage.objective.names),
            "rate": self.rate,
            "history": self.history,
            "seconds": [self.seconds, self.data_seconds, self.processor_seconds],
            "identity": json.dumps(self.stage.identity, sort_keys=True),
        }
        self.checkpoints.save(self.step, self.stage.network.state_dict(), self.stage.objective.extra(), state)

    def resume(self) -> bool:
        """Go to the newest checkpoint; ``False`` if there is none.

        Raises:
            CheckpointError: none of them is good.
            InputError: it was made with other options or data.
        """
        found = self.checkpoints.latest()
        if found is None:
            return False
        step, weights, extra, state = found
        mine, theirs = self.stage.identity, json.loads(state["identity"])
        other = [
            f"{k} ({theirs.get(k)} there, {mine.get(k)} now)"
            for k in {**mine, **theirs}
            if mine.get(k) != theirs.get(k)
        ]
        if other:
            raise InputError(
                f"{self.checkpoints.path(step)} was made with other options: {', '.join(other)}; give those again, or "
                "another --out"
            )
        fill(self.stage.network, weights, str(self.checkpoints.path(step)))
        own = self.stage.objective.extra()
        if set(own) != set(extra):
            raise InputError(f"{self.checkpoints.path(step)} has other adapters: {sorted(set(own) ^ set(extra))}")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(extra[name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict({**state["scheduler"], "lr_lambdas": [None] * len(self.optimizer.param_groups)})
        self.fabric.strategy.precision.load_state_dict(state["scaler"])
        self.step = step
        self.epoch, self.batch = state["position"]["epoch"], state["position"]["batch"]
        self.sums.copy_(state["sums"])
        self.terms, self.rate, self.history = state["terms"], state["rate"], state["history"]
        self.stage.objective.names = tuple(state["names"])
        self.seconds, self.data_seconds, self.processor_seconds = state["seconds"]
        rank = self.fabric.global_rank
        if len(state["random"]) == self.fabric.world_size:
            restore_random_state(state["random"][rank])
        else:
            self.display.say("the number of processes changed: dropout and the like go on from other random numbers")
            seed_everything(split_seed(self.config.seed, _TRAINING, step, rank))
        return True

    def _not_finite(self, detail: str = "") -> NonFiniteError:
        good = self.checkpoints.steps()
        kept = f"the checkpoint of step {good[-1]} is intact" if good else "no checkpoint was written yet"
        terms = ", ".join(f"{n} {t:.4g}" for n, t in zip(self.stage.objective.names, self.terms.tolist(), strict=False))
        return NonFiniteError(
            f"{self.stage.name}: the loss is not finite at epoch {self.epoch + 1}, step {self.step} (last terms: "
            f"{terms}){detail}; {kept}. Try a smaller --lr, --clip 1, or --precision 32-true"
        )

    def _sums(self) -> Tensor:
        """Sums of this epoch, of all processes: so they stop together."""
        return self.fabric.all_reduce(self.sums.clone(), reduce_op="mean") if self.fabric.world_size > 1 else self.sums

    # ---- training ----
    def run(self) -> list[dict[str, Any]]:
        """Train to the end, from wherever this trainer is; returns the history, one entry for each epoch.

        Raises:
            Interrupted: Ctrl-C or SIGTERM, after a checkpoint.
            NonFiniteError, CheckpointError: see :meth:`save`.
        """
        alone = self.fabric.world_size == 1
        reset_peak_memory(self.generator.device)
        with _stop_signals(immediately=not alone) as asked, self.display.stage(self.stage.name, self) as bar:
            try:
                while self.epoch < self.stage.epochs:
                    self._epoch(asked, bar)
            except KeyboardInterrupt:
                good = self.checkpoints.steps()
                where = f"the checkpoint of step {good[-1]} is kept" if good else "no checkpoint was written yet"
                raise Interrupted(
                    f"{self.stage.name}: stopped at step {self.step}; {where}: go on with --resume"
                ) from None
        return self.history

    def _epoch(self, asked: list[str], bar: Any) -> None:
        config, started, worked = self.config, time.perf_counter(), time.process_time()
        order = epoch_order(len(self.dataset.train), config.seed, self.epoch)
        batches = order[: self.per_epoch * config.batch_size].to(self.generator.device).view(self.per_epoch, -1)
        self.module.train()
        while self.batch < self.per_epoch:
            if self.batch + 1 < self.per_epoch:
                self._prefetch = batches[self.batch + 1]
            self._step(batches[self.batch])
            self.batch += 1
            self.step += 1
            if self.step % _SHOW_EVERY == 0 or self.batch == self.per_epoch:
                if not self._sums().isfinite().all():
                    raise self._not_finite()
                bar(self)
            last = self.batch == self.per_epoch
            if asked or (self.step % config.checkpoint_steps == 0 and not last):
                now, used = time.perf_counter(), time.process_time()
                self.seconds, started = self.seconds + now - started, now
                self.processor_seconds, worked = self.processor_seconds + used - worked, used
                self.save()
                if asked:
                    raise Interrupted(
                        f"{self.stage.name}: {asked[0]} at epoch {self.epoch + 1}, step {self.step}; a checkpoint is "
                        f"in {self.checkpoints.path(self.step)}: go on with --resume"
                    )
        self.seconds += time.perf_counter() - started
        self.processor_seconds += time.process_time() - worked
        self._end_epoch()

    def _end_epoch(self) -> None:
        loss, accuracy = (self._sums() / self.per_epoch).tolist()
        if self.fabric.world_size > 1:
            for buffer in self.stage.network.buffers():  # running statistics: the figures are those of what is saved
                torch.distributed.broadcast(buffer, 0)
        test = evaluate(
            self.stage.network, self.dataset.test, self.augment, self.config.batch_size, self.fabric, self.layout
        )
        self.rate = test["rate"]
        self.history.append(
            {
                "epoch": self.epoch + 1,
                "step": self.step,
                "learning_rate": self.scheduler.base_lrs[0] * self.scheduler.lr_lambdas[0](self.step - 1),
                "train_loss": loss,
                "train_accuracy": accuracy,
                "test_loss": test["loss"],
                "test_accuracy": test["accuracy"],
                "firing_rate": test["rate"],
                "firing_rates": test["rates"],
                "terms": dict(zip(self.stage.objective.names, self.terms.tolist(), strict=False)),
                "seconds": self.seconds,
                "processor_seconds": self.processor_seconds,  # of this process: beside busy neighbours the fairer one
                "data_share": self.data_seconds / self.seconds if self.seconds else 0.0,
                "peak_memory": peak_memory(self.generator.device),
            }
        )
        self.epoch, self.batch = self.epoch + 1, 0
        self.sums.zero_()
        self.save()
        if self.fabric.is_global_zero:
            write_atomically(self.folder / "log.csv", history_csv(self.history))
            self.on_epoch(self.stage.name, self.history)
        self.display.epoch(self.stage.name, self.stage.epochs, self.history[-1])

    def _step(self, batch: Tensor) -> None:
        """One optimiser step on the images ``batch`` of all processes."""
        config, fabric, store = self.config, self.fabric, self.dataset.train
        size = config.batch_size // self.parts
        mine = slice(fabric.global_rank * config.accumulate * size, (fabric.global_rank + 1) * config.accumulate * size)
        seed = split_seed(config.seed, _AUGMENTATION, self.epoch, self.batch)
        terms = torch.zeros(0)
        watch = self._watch()
        for i in range(config.accumulate):
            before = time.perf_counter()
            part = slice(mine.start + i * size, mine.start + (i + 1) * size)
            self.generator.manual_seed(seed)  # every part draws for the whole batch and keeps its own
            inputs = laid_out(self.augment(store.gather(batch[part]), self.generator, part, len(batch)), self.layout)
            labels = store.labels[batch[part]]
            cached = self.stage.cached_logits
            teacher_logits = None if cached is None else cached[batch[part]]
            self.data_seconds += time.perf_counter() - before
            with fabric.no_backward_sync(self.module, enabled=i + 1 < config.accumulate), watch as monitor:
                loss, logits, parts = self.module(inputs, labels, teacher_logits)
                fabric.backward(loss / config.accumulate)
            if monitor is not None:
                self.rate = monitor.mean()
            right = (logits.argmax(1) == labels).float().mean()
            self.sums += torch.stack((loss.detach().float(), right)).double() / config.accumulate
            terms = parts.float() / config.accumulate + (terms if i else 0)
        self.terms = terms
        if self.batch + 1 < self.per_epoch:
            store.prefetch(self._prefetch[mine])
        if config.clip is not None:
            fabric.clip_gradients(self.module, self.optimizer, max_norm=config.clip, error_if_nonfinite=False)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()

    def _watch(self) -> Any:
        """Counts spikes in the steps that are shown; compiled code must not meet hooks that come and go."""
        shown = (self.step + 1) % _SHOW_EVERY == 0 and sys.stderr.isatty()
        if not shown or self.config.compile or self.config.accumulate > 1 or not spiking_modules(self.stage.network):
            return contextlib.nullcontext()
        from ..analysis import FiringRateMonitor

        return FiringRateMonitor(self.stage.network)
