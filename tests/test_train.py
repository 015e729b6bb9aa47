"""The training command from end to end, and the options of the machine (snnfast.train)."""

from __future__ import annotations

import csv
import functools
import importlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("safetensors", reason="snnfast[train] is not installed")
pytest.importorskip("lightning_fabric", reason="snnfast[train] is not installed")
pytest.importorskip("rich", reason="snnfast[train] is not installed")
pytest.importorskip("matplotlib", reason="snnfast[train] is not installed")
pytest.importorskip("yaml", reason="snnfast[train] is not installed")
from safetensors.torch import load_file
from train_runs import SMALL, environment, losses, report, train

from snnfast.train import cli, data, experiment
from snnfast.train.augment import Augment
from snnfast.train.evaluation import evaluate

pytestmark = pytest.mark.usefixtures("keeps_threads")


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the figures, which take most of the time of a small run."""
    monkeypatch.setattr(experiment, "write_report", lambda *args: None)


# ---- end to end ----
def test_everything_in_one_command(small_mnist: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "run"
    more = ["--distill", "logit,feature", "temporal,spatial", "--epochs", "9", "--lr", "1e-2", "--no-tensorboard"]
    assert train(small_mnist, out, *more, "--augment", "auto", "--robustness-samples", "20") == 0
    found = report(out)
    names = ["teacher", "plain", "distilled-logit-feature", "distilled-temporal-spatial"]
    assert list(found["results"]) == names
    for name in names:
        r = found["results"][name]
        assert r["test_accuracy"] > 0.5, name  # ten patterns: chance is 0.1
        assert r["operations"]["macs"] > 0
        assert r["peak_memory"] > 10**7
        assert 0 < r["data_share"] < 0.6
        assert len(r["history"]) == 9
        assert r["history"][-1]["train_loss"] < r["history"][0]["train_loss"]
        rows = list(csv.DictReader((out / name / "log.csv").open()))
        assert len(rows) == 9
        spiking = name != "teacher"
        assert set(r["firing_rates"]) == ({"layer1.2", "layer2.2"} if spiking else set())
        assert not spiking or 0 < r["firing_rate"] < 1
    terms = found["results"]["distilled-logit-feature"]["history"][-1]["terms"]
    assert set(terms) == {"task", "logit_kd", "feature_kd.layer2"}
    assert found["machine"]["processes"] == 1
    assert found["versions"]["torch"] == torch.__version__
    assert found["options"]["seed"] == 0
    assert set(found["robustness"]["curves"]) == set(names[1:])
    for figure in ("accuracy", "loss", "firing_rates", "raster", "robustness"):
        assert (out / f"{figure}.png").read_bytes().startswith(b"\x89PNG"), figure
        assert f"({figure}.png)" in (out / "report.md").read_text()
    assert "| distilled-logit-feature " in capsys.readouterr().err
    # A distilled student is a bare network: it loads into one, with nothing missing or left over.
    networks = importlib.import_module("train_networks")
    weights = load_file(out / "distilled-temporal-spatial" / "model.safetensors")
    networks.student(10, 1, 2).load_state_dict(weights, strict=True)
    # Students of one seed start alike and end apart.
    assert losses(out) != losses(out, "distilled-logit-feature")
    # The weights that were written are those that were measured.
    assert _accuracy(small_mnist, networks.student(10, 1, 2), weights) == found["results"][names[3]]["test_accuracy"]


def _accuracy(folder: Path, network: torch.nn.Module, weights: dict) -> float:
    """By hand, from the files."""
    network.load_state_dict(weights)

    def images(name: str) -> torch.Tensor:
        raw = np.frombuffer((folder / f"{name}-images-idx3-ubyte").read_bytes(), np.uint8, offset=16)
        return torch.from_numpy(raw.copy()).view(-1, 1, 28, 28).float() / 255

    x = (images("t10k") - images("train").mean()) / images("train").std(unbiased=False)
    with torch.no_grad():
        predicted = network.eval()(x).mean(0).argmax(1)
    return (predicted == torch.arange(50) % 10).float().mean().double().item().__round__(6)


@pytest.mark.usefixtures("no_report")
def test_same_seed_same_run_and_a_stage_more(small_mnist: Path, tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    assert train(small_mnist, a, "--distill", "none") == 0
    assert train(small_mnist, b, "--distill", "logit") == 0
    assert losses(a) == losses(b)  # the plain student, whatever is trained beside it
    assert train(small_mnist, a, "--distill", "logit", "--resume") == 0  # adds the teacher and the distilled one
    for name in ("teacher", "plain", "distilled-logit"):
        assert (a / name / "model.safetensors").read_bytes() == (b / name / "model.safetensors").read_bytes()
    assert train(small_mnist, tmp_path / "c", "--distill", "none", "--seed", "1") == 0
    assert losses(a) != losses(tmp_path / "c")
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    assert list((b / "tensorboard" / "plain").glob("events*"))


def test_the_objective_is_that_of_the_distiller_by_hand(small_mnist: Path, tmp_path: Path) -> None:
    """One step of the command, and the same step written out with torch alone."""
    out = tmp_path / "run"
    more = ["--distill", "logit", "--epochs", "1", "--teacher-epochs", "0", "--batch-size", "200", "--no-plain"]
    assert train(small_mnist, out, *more, "--temperature", "3", "--logit-weight", "0.7", "--task-weight", "0.3") == 0
    entry = report(out)["results"]["distilled-logit"]["history"][0]
    networks = importlib.import_module("train_networks")
    from snnfast.train.data import load, split_seed

    dataset = load("mnist", small_mnist)
    x = (dataset.train.images.float() / 255 - dataset.mean) / dataset.std
    torch.manual_seed(split_seed(0, 11))
    student = networks.student(10, 1, 2)
    torch.manual_seed(split_seed(0, 10))
    teacher = networks.teacher(10, 1)
    z, t = student(x).mean(0), teacher(x)
    kl = torch.nn.functional.kl_div((z / 3).log_softmax(1), (t / 3).softmax(1), reduction="batchmean") * 9
    task = torch.nn.functional.cross_entropy(z, dataset.train.labels)
    assert entry["terms"]["logit_kd"] == pytest.approx(0.7 * kl.item(), rel=1e-4)
    assert entry["terms"]["task"] == pytest.approx(0.3 * task.item(), rel=1e-4)
    assert entry["train_loss"] == pytest.approx(0.3 * task.item() + 0.7 * kl.item(), rel=1e-4)


@pytest.mark.usefixtures("no_report")
def test_a_teacher_that_stays_as_it_is_need_not_be_trainable(small_mnist: Path, tmp_path: Path) -> None:
    teacher = ["--teacher", "train_networks:auxiliary", "--teacher-epochs", "0"]  # its logits in training are a tuple
    assert train(small_mnist, tmp_path / "run", *teacher, "--distill", "logit", "--no-plain", "--epochs", "1") == 0


@pytest.mark.usefixtures("no_report")
def test_teacher_checkpoints_and_cached_logits(small_mnist: Path, tmp_path: Path) -> None:
    a = tmp_path / "a"
    assert train(small_mnist, a, "--distill", "logit", "--no-plain") == 0
    weights = load_file(a / "teacher" / "model.safetensors")
    torch.save({"state_dict": weights}, tmp_path / "teacher.pt")
    given = [a / "teacher" / "model.safetensors", tmp_path / "teacher.pt", a / "teacher" / "checkpoints"]
    for i, path in enumerate(given):
        out = tmp_path / str(i)
        assert train(small_mnist, out, "--distill", "logit", "--no-plain", "--teacher-checkpoint", str(path)) == 0
        assert losses(out, "distilled-logit") == losses(a, "distilled-logit")
    assert train(small_mnist, tmp_path / "cached", "--distill", "logit", "--no-plain", "--cache-teacher") == 0
    assert losses(tmp_path / "cached", "distilled-logit") == pytest.approx(losses(a, "distilled-logit"), rel=1e-4)


# ---- the machine's options ----
@pytest.fixture(scope="module")
def single(small_mnist: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of a run without batch norm, whose statistics would depend on how a batch is cut."""
    out = tmp_path_factory.mktemp("single") / "run"
    assert train(small_mnist, out, *WHOLE) == 0
    return losses(out, "distilled-logit")


WHOLE = [
    "--model-args",
    "norm=False",
    "--distill",
    "logit",
    "--no-plain",
    "--no-tensorboard",
    "--augment",
    "crop,cutout",
]


@pytest.mark.usefixtures("no_report")
def test_accumulated_gradients_give_the_same_losses(small_mnist: Path, tmp_path: Path, single: list[float]) -> None:
    assert train(small_mnist, tmp_path / "run", *WHOLE, "--accumulate", "4") == 0
    assert losses(tmp_path / "run", "distilled-logit") == pytest.approx(single, rel=1e-4)


def _two_processes(folder: Path, out: Path, *more: str, script: Path | None = None) -> subprocess.CompletedProcess:
    """torchrun, two gloo processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "snnfast.train"] if script is None else [str(script)]
    command += [*SMALL, *more, "--data-dir", str(folder), "--out", str(out)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env=environment())


PREFETCHED = """
import torch
from snnfast.train import cli, data
gather = data.TensorStore.gather
def prefetch(self, indices):
    self.coming = indices
def expected(self, indices):
    coming, self.coming = getattr(self, "coming", None), None
    assert coming is None or torch.equal(coming, indices), "it read what another process uses"
    return gather(self, indices)
data.TensorStore.prefetch, data.TensorStore.gather = prefetch, expected
raise SystemExit(cli.main())
"""


def test_two_processes_give_the_same_losses(small_mnist: Path, tmp_path: Path, single: list[float]) -> None:
    done = _two_processes(small_mnist, tmp_path / "run", *WHOLE)
    assert done.returncode == 0, done.stderr
    assert report(tmp_path / "run")["machine"]["processes"] == 2
    assert losses(tmp_path / "run", "distilled-logit") == pytest.approx(single, rel=1e-4)


def test_two_processes_test_the_network_that_is_saved(small_mnist: Path, tmp_path: Path) -> None:
    """Each has running statistics of its own parts of the batches, and reads no others."""
    script = tmp_path / "prefetched.py"
    script.write_text(PREFETCHED)
    done = _two_processes(small_mnist, tmp_path, "--distill", "none", "--no-tensorboard", script=script)
    assert done.returncode == 0, done.stderr
    dataset = data.load("mnist", small_mnist)
    network = importlib.import_module("train_networks").student(10, 1, 2)
    network.load_state_dict(load_file(tmp_path / "plain" / "model.safetensors"))
    found = evaluate(network, dataset.test, Augment((), dataset.mean, dataset.std), 20)
    assert found["loss"] == pytest.approx(losses(tmp_path)[-1], rel=1e-6)


def test_two_processes_stop_together_at_nan(small_mnist: Path, tmp_path: Path) -> None:
    options = ("--distill", "none", "--no-tensorboard", "--student", "train_networks:not_a_number_elsewhere")
    done = _two_processes(small_mnist, tmp_path, *options)
    assert done.stderr.count("the loss is not finite at epoch 1, step 10") == 2, done.stderr
    assert "Connection closed by peer" not in done.stderr


def test_more_processes_than_test_images_are_refused(small_mnist: Path, tmp_path: Path) -> None:
    done = _two_processes(small_mnist, tmp_path, "--distill", "none", "--test-samples", "1")
    assert "1 test images are fewer than the 2 processes" in done.stderr


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("options", [("--precision", "bf16-mixed"), ("--channels-last",), ("--clip", "1e3")])
def test_options_of_the_machine_change_little(
    small_mnist: Path, tmp_path: Path, single: list[float], options: tuple[str, ...]
) -> None:
    assert train(small_mnist, tmp_path / "run", *WHOLE, *options) == 0
    assert losses(tmp_path / "run", "distilled-logit") == pytest.approx(single, rel=2e-2)


@pytest.mark.usefixtures("no_report")
def test_fused_training(small_mnist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Response and feature distillation of a student whose norms and neurons run as one, and going on afterwards."""
    from snnfast.fused import batch_norm

    calls, run = [], batch_norm.run
    monkeypatch.setattr(batch_norm, "run", lambda norm, *args, **kw: calls.append(norm) or run(norm, *args, **kw))
    more = ["--distill", "logit,feature", "--no-tensorboard", "--no-plain"]
    assert train(small_mnist, tmp_path / "apart", *more) == 0
    assert not calls
    assert train(small_mnist, tmp_path / "fused", *more, "--fuse") == 0
    assert len(set(calls)) == 2
    name = "distilled-logit-feature"
    assert losses(tmp_path / "fused", name) == pytest.approx(losses(tmp_path / "apart", name), rel=2e-2)
    assert train(small_mnist, tmp_path / "apart", *more, "--fuse", "--resume") == 2  # other weights come out


@pytest.mark.usefixtures("no_report")
def test_event_driven_training(
    small_mnist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from snnfast import events

    monkeypatch.setattr(events, "_MOST_EVENTS_RARE", 1.0)  # for this student's neurons fire often
    served, is_served = [], events.EventConv2d._is_served
    monkeypatch.setattr(
        events.EventConv2d, "_is_served", lambda *args: (served.append(is_served(*args)), served[-1])[1]
    )
    more = ["--distill", "none", "--no-tensorboard", "--epochs", "1", "--model-args", "width=16"]
    assert train(small_mnist, tmp_path / "dense", *more) == 0
    assert not served
    assert train(small_mnist, tmp_path / "events", *more, "--event-driven") == 0
    assert any(served)
    assert losses(tmp_path / "events") == pytest.approx(losses(tmp_path / "dense"), rel=2e-2)
    assert train(small_mnist, tmp_path / "events", *more, "--resume") == 2
    assert "event_driven (True there, False now)" in capsys.readouterr().err


@pytest.mark.usefixtures("no_report")
def test_lazy_layers_are_made_before_training(small_mnist: Path, tmp_path: Path) -> None:
    more = ["--student", "train_networks:lazy", "--distill", "none", "--no-tensorboard", "--epochs", "1"]
    assert train(small_mnist, tmp_path / "run", *more) == 0


@pytest.mark.usefixtures("no_report")
def test_compiled_training(small_mnist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What inductor makes of neurons is test_torch's to see; here it would take half a minute.
    compiler = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", compiler)
    torch._dynamo.utils.counters.clear()
    more = ["--distill", "none", "--no-tensorboard", "--epochs", "1"]
    assert train(small_mnist, tmp_path / "eager", *more) == 0
    assert train(small_mnist, tmp_path / "compiled", *more, "--compile") == 0
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-3)
    assert "rate layer1.2" in (tmp_path / "compiled" / "plain" / "log.csv").read_text()


@pytest.mark.usefixtures("no_report")
def test_clipping_and_schedules_do_something(small_mnist: Path, tmp_path: Path) -> None:
    found = {}
    for options in ("", "--clip 1e-3", "--schedule constant", "--schedule onecycle", "--optimizer sgd", "--warmup 0"):
        out = tmp_path / options.replace(" ", "")
        assert train(small_mnist, out, "--distill", "none", "--no-tensorboard", *options.split()) == 0
        found[options] = tuple(losses(out))
    assert len(set(found.values())) == len(found)


def test_the_report_leaves_the_networks_as_they_were(tmp_path: Path) -> None:
    from snnfast.train import data as datasets
    from snnfast.train import report as reports
    from snnfast.train.augment import Augment

    store = datasets.TensorStore(torch.randint(0, 256, (4, 1, 28, 28), dtype=torch.uint8), torch.arange(4))
    dataset = datasets.Dataset("noise", store, store, 10, torch.zeros(1), torch.ones(1), False)
    network = importlib.import_module("train_networks").student(10, 1, 2).train()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    reports._raster(network, dataset, Augment((), dataset.mean, dataset.std), 2, tmp_path / "raster.png")
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert network.training
    assert not network.layer2[2]._forward_hooks


# ---- event data ----
def test_models_of_the_library_and_events(tmp_path: Path) -> None:
    """N-MNIST recordings through wrn16_2, with a teacher and both kinds of self-distillation."""
    rng = np.random.default_rng(0)
    for split, count in (("Train", 4), ("Test", 2)):
        for digit in range(10):
            for i in range(count):
                x, y = (rng.integers(0, 34, 200) for _ in range(2))
                t = np.sort(rng.integers(0, 300_000, 200))
                content = np.stack((x, y, (digit % 2) << 7 | t >> 16, t >> 8 & 255, t & 255), 1).astype(np.uint8)
                path = tmp_path / split / str(digit) / f"{i}.bin"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content.tobytes())
    out = tmp_path / "run"
    options = [
        "--data",
        "nmnist",
        "--student",
        "wrn16_2",
        "--model-args",
        "width=2",
        "--teacher",
        "resnet18",
        "--teacher-args",
        "width=2",
        "--timesteps",
        "2",
        "--epochs",
        "1",
        "--batch-size",
        "20",
        "--threads",
        "1",
        "--device",
        "cpu",
        "--distill",
        "logit,feature",
        "temporal,spatial",
        "--timesteps-teacher",
        "3",
    ]
    assert cli.main([*options, "--data-dir", str(tmp_path), "--out", str(out)]) == 0
    found = report(out)
    assert "robustness" not in found  # its corruptions are of images
    assert set(found["results"]["distilled-temporal-spatial"]["history"][0]["terms"]) == {
        "task", "temporal_self_kd", "spatial_self_kd.layers.1"
    }  # fmt: skip
    assert (out / "raster.png").is_file()
