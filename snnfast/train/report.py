"""The end of a run: figures, ``report.md`` and ``report.json``; and TensorBoard logs on the way."""

from __future__ import annotations

import contextlib
import json
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__, functional
from ..analysis._modules import evaluating, spiking_modules
from .augment import Augment
from .checkpoint import write_atomically
from .config import Config
from .data import Dataset
from .errors import CheckpointError, InputError
from .progress import Display

__all__ = ["Logs", "write_report"]

_OPERATIONS_SAMPLES = 32  # test images on which synaptic operations are counted


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Tell that a file that others write there cannot be written."""
    try:
        yield
    except OSError as error:
        where, why = error.filename or f"a file in {folder}", error.strerror or error
        raise CheckpointError(
            f"{where} cannot be written: {why}; checkpoints are kept: make room, then go on with --resume"
        ) from None


class Logs:
    """TensorBoard logs, one run for each network; what a resumed run writes again takes the place of the old."""

    def __init__(self, config: Config, active: bool) -> None:
        self.folder = config.out / "tensorboard"
        self.writers: dict[str, Any] = {}
        self.make: Any = None
        if active and not config.no_tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise InputError(
                    "TensorBoard logs need tensorboard: pip install snnfast[train]; or --no-tensorboard"
                ) from None
            self.make = SummaryWriter

    def epoch(self, name: str, history: list[dict[str, Any]]) -> None:
        """Log the last entry of a network's history."""
        if self.make is None:
            return
        entry = history[-1]
        with _writing(self.folder):
            if name not in self.writers:
                self.writers[name] = self.make(str(self.folder / name), purge_step=entry["epoch"])
            writer = self.writers[name]
            for key in ("train_loss", "test_loss", "train_accuracy", "test_accuracy", "learning_rate", "firing_rate"):
                if entry[key] is not None:
                    writer.add_scalar(key, entry[key], entry["epoch"])
            for group in ("terms", "firing_rates"):
                for key, value in entry[group].items():
                    writer.add_scalar(f"{group}/{key}", value, entry["epoch"])
            writer.flush()

    def close(self) -> None:
        """Finish the files."""
        for writer in self.writers.values():
            writer.close()


def _device(fabric: Any) -> str:
    if fabric.device.type == "cuda":
        return torch.cuda.get_device_name(fabric.device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _operations(network: nn.Module, dataset: Dataset, normal: Augment) -> dict[str, Any]:
    from ..analysis import count_synops

    few = torch.arange(min(_OPERATIONS_SAMPLES, len(dataset.test)), device=dataset.test.labels.device)
    x = normal.normalise(dataset.test.gather(few)).to(next(network.parameters()).dtype)
    found = count_synops(network, x, samples=len(few)).to_dict()
    return {k: found[k] for k in ("macs", "acs", "synops", "energy_pj", "energy_source")}


@torch.no_grad()
def _raster(network: nn.Module, dataset: Dataset, normal: Augment, timesteps: int, path: Path) -> None:
    """Spikes of the first test image in the last layer of neurons."""
    from ..analysis import plot_raster

    name, layer = list(spiking_modules(network).items())[-1]
    seen: list[Tensor] = []
    first = torch.zeros(1, dtype=torch.long, device=dataset.test.labels.device)
    functional.reset_net(network)
    hook = layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    try:
        with evaluating(network):
            network(normal.normalise(dataset.test.gather(first)).to(next(network.parameters()).dtype))
    finally:
        hook.remove()
    functional.reset_net(network)
    spikes = torch.cat([s.unsqueeze(0) for s in seen]) if len(seen) > 1 else seen[0]
    title = f"{name}, first test image"
    plot_raster(spikes.reshape(timesteps, -1).float(), path, title=title)


def _robustness(networks: Mapping[str, nn.Module], dataset: Dataset, normal: Augment, count: int, path: Path) -> Any:
    from ..analysis import plot_robustness, robustness

    device = dataset.test.labels.device
    # Evenly over the test set, which may be sorted by class.
    few = torch.linspace(0, len(dataset.test) - 1, min(count, len(dataset.test)), device=device).long()
    images = dataset.test.gather(few).float() / 255
    dtype = next(next(iter(networks.values())).parameters()).dtype
    report = robustness(
        dict(networks),
        (images, dataset.test.labels[few]),
        transform=lambda x: ((x - normal.mean) / normal.std).to(dtype),
    )
    plot_robustness(report, path)
    return report.to_dict()


def write_report(
    config: Config,
    dataset: Dataset,
    networks: Mapping[str, nn.Module],
    report: dict[str, Any],
    fabric: Any,
    display: Display,
) -> None:
    """Write everything of a finished run into ``config.out``; adds what it measures to ``report``.

    Raises:
        CheckpointError: a file cannot be written; the networks' weights are there.
    """
    try:
        import lightning_fabric
        import matplotlib
    except ImportError as error:
        raise InputError(f"the report needs {error.name}: pip install snnfast[train]") from None
    from ..analysis import plot_accuracy, plot_firing_rates

    normal = Augment((), dataset.mean, dataset.std, dataset.has_time)
    report["options"] = config.record()
    report["data"] = {
        "name": dataset.name,
        "training images": len(dataset.train),
        "test images": len(dataset.test),
        "fingerprint": dataset.fingerprint(),
    }
    report["machine"] = {"device": _device(fabric), "processes": fabric.world_size, "threads": torch.get_num_threads()}
    report["versions"] = {
        "snnfast": __version__,
        "torch": torch.__version__,
        "lightning-fabric": lightning_fabric.__version__,
        "python": platform.python_version(),
    }
    out, results = config.out, report["results"]
    with matplotlib.rc_context({"backend": "Agg"}), _writing(out):
        for name, network in networks.items():
            results[name]["operations"] = _operations(network, dataset, normal)
        curves = {name: r["history"] for name, r in results.items() if r["history"]}
        for file, key, label in (
            ("accuracy", "test_accuracy", "test accuracy [%]"),
            ("loss", "train_loss", "training loss"),
        ):
            plot_accuracy({n: [e[key] for e in h] for n, h in curves.items()}, out / f"{file}.png", ylabel=label)
        spiking = {name: r["firing_rates"] for name, r in results.items() if r["firing_rates"]}
        if spiking:
            plot_firing_rates(spiking, out / "firing_rates.png")
            last = list(spiking)[-1]
            _raster(networks[last], dataset, normal, config.timesteps, out / "raster.png")
        if config.robustness_samples and not dataset.has_time:
            students = {name: n for name, n in networks.items() if name != "teacher"}
            count = config.robustness_samples
            report["robustness"] = _robustness(students, dataset, normal, count, out / "robustness.png")
    write_atomically(out / "report.json", (json.dumps(report, indent=1) + "\n").encode())
    write_atomically(out / "report.md", _markdown(config, report).encode())
    display.say(_table(report["results"]))
    display.say(f"report, weights and figures: {out}")


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _table(results: Mapping[str, dict[str, Any]]) -> str:
    head = (
        "network", "test accuracy", "to plain", "firing rate", "parameters", "MACs", "ACs", "energy (µJ)", "time (s)",
        "memory (MB)",
    )  # fmt: skip
    rows = [head, tuple("---" if i == 0 else "---:" for i in range(len(head)))]
    plain = results.get("plain", {}).get("test_accuracy")
    for name, r in results.items():
        difference = (
            "" if plain is None or name in ("plain", "teacher") else f"{100 * (r['test_accuracy'] - plain):+.2f}"
        )
        operations = r["operations"]
        memory = r["peak_memory"]
        rows.append(
            (
                name,
                f"{100 * r['test_accuracy']:.2f} %",
                difference,
                _number(r["firing_rate"], ".3f"),
                f"{r['parameters']:,}",
                f"{operations['macs']:,.0f}",
                f"{operations['acs']:,.0f}",
                f"{operations['energy_pj'] / 1e6:.2f}",
                _number(r["seconds"], ".0f"),
                _number(None if memory is None else memory / 1e6, ",.0f"),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in rows)


def _markdown(config: Config, report: dict[str, Any]) -> str:
    machine, versions = report["machine"], report["versions"]
    used = "; ".join(f"{k} {v}" for k, v in versions.items())
    shares = [r["data_share"] for r in report["results"].values() if r["data_share"] is not None]
    figures = [
        f"![{name}]({name.replace(' ', '_')}.png)"
        for name in ("accuracy", "loss", "firing rates", "raster", "robustness")
        if (config.out / f"{name.replace(' ', '_')}.png").is_file()
    ]
    options = "\n".join(f"{k}: {json.dumps(v)}" for k, v in report["options"].items())
    return f"""# {config.data}: {config.student} at T = {config.timesteps}, seed {config.seed}

{_table(report["results"])}

Accuracies are those of the last epoch, differences in points to the plain student of the same seed: one seed says
little, compare several. MACs, ACs and energy are per image, on {_OPERATIONS_SAMPLES} test images; energy is an estimate
(4.6 pJ per MAC, 0.9 pJ per AC: 45 nm, Horowitz 2014). Memory is the peak of the whole process on a CPU, of tensors on
a GPU.

{machine["device"]}, {machine["processes"]} process(es), {machine["threads"]} CPU threads; {used}.
{report["data"]["training images"]:,} training and {report["data"]["test images"]:,} test images;
{report["seconds"]:.0f} s in all; {100 * max(shares, default=0):.1f} % of the training time went to data at most.

{chr(10).join(figures)}

## Options
```yaml
{options}
```
"""
