"""The training command from end to end, its options and what it refuses (snnfast.train)."""

# ruff: noqa: E402 (skips come before imports)
from __future__ import annotations

import csv
import dataclasses
import functools
import importlib
import inspect
import json
import os
import subprocess
import sys
import types
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("safetensors", reason="snnfast[train] is not installed")
pytest.importorskip("lightning_fabric", reason="snnfast[train] is not installed")
pytest.importorskip("rich", reason="snnfast[train] is not installed")
pytest.importorskip("matplotlib", reason="snnfast[train] is not installed")
yaml = pytest.importorskip("yaml", reason="snnfast[train] is not installed")

from safetensors.torch import load_file, save_file

from snnfast.train import Config, cli, config, experiment, objective
from snnfast.train.errors import InputError
from snnfast.train.options import parse

TESTS = Path(__file__).parent
SMALL = [
    "--data",
    "mnist",
    "--student",
    "train_networks:student",
    "--teacher",
    "train_networks:teacher",
    "--timesteps",
    "2",
    "--epochs",
    "2",
    "--batch-size",
    "20",
    "--threads",
    "1",
    "--device",
    "cpu",
    "--augment",
    "none",
    "--robustness-samples",
    "0",
]


@pytest.fixture(scope="module")
def data(small_mnist: Path) -> Path:
    return small_mnist


@pytest.fixture(autouse=True)
def _setting(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(TESTS))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def train(data: Path, out: Path, *more: str) -> int:
    return cli.main([*SMALL, "--data-dir", str(data), "--out", str(out), *more])


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the figures, which take most of the time of a small run."""
    monkeypatch.setattr(experiment, "write_report", lambda *args: None)


def report(out: Path) -> dict:
    return json.loads((out / "report.json").read_text())


def losses(out: Path, network: str = "plain") -> list[float]:
    with (out / network / "log.csv").open() as file:
        return [float(row[key]) for row in csv.DictReader(file) for key in ("train_loss", "test_loss")]


# ---- end to end ----
def test_everything_in_one_command(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "run"
    more = ["--distill", "logit,feature", "temporal,spatial", "--epochs", "9", "--lr", "1e-2", "--no-tensorboard"]
    assert train(data, out, *more, "--augment", "auto", "--robustness-samples", "20") == 0
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
    assert _accuracy(data, networks.student(10, 1, 2), weights) == found["results"][names[3]]["test_accuracy"]


def _accuracy(data: Path, network: torch.nn.Module, weights: dict) -> float:
    """By hand, from the files."""
    network.load_state_dict(weights)

    def images(name: str) -> torch.Tensor:
        raw = np.frombuffer((data / f"{name}-images-idx3-ubyte").read_bytes(), np.uint8, offset=16)
        return torch.from_numpy(raw.copy()).view(-1, 1, 28, 28).float() / 255

    x = (images("t10k") - images("train").mean()) / images("train").std(unbiased=False)
    with torch.no_grad():
        predicted = network.eval()(x).mean(0).argmax(1)
    return (predicted == torch.arange(50) % 10).float().mean().double().item().__round__(6)


@pytest.mark.usefixtures("no_report")
def test_same_seed_same_run_and_a_stage_more(data: Path, tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    assert train(data, a, "--distill", "none") == 0
    assert train(data, b, "--distill", "logit") == 0
    assert losses(a) == losses(b)  # the plain student, whatever is trained beside it
    assert train(data, a, "--distill", "logit", "--resume") == 0  # adds the teacher and the distilled one
    for name in ("teacher", "plain", "distilled-logit"):
        assert (a / name / "model.safetensors").read_bytes() == (b / name / "model.safetensors").read_bytes()
    assert train(data, tmp_path / "c", "--distill", "none", "--seed", "1") == 0
    assert losses(a) != losses(tmp_path / "c")
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    assert list((b / "tensorboard" / "plain").glob("events*"))


def test_the_objective_is_that_of_the_distiller_by_hand(data: Path, tmp_path: Path) -> None:
    """One step of the command, and the same step written out with torch alone."""
    out = tmp_path / "run"
    more = ["--distill", "logit", "--epochs", "1", "--teacher-epochs", "0", "--batch-size", "200", "--no-plain"]
    assert train(data, out, *more, "--temperature", "3", "--logit-weight", "0.7", "--task-weight", "0.3") == 0
    entry = report(out)["results"]["distilled-logit"]["history"][0]
    networks = importlib.import_module("train_networks")
    from snnfast.train.data import load, split_seed

    dataset = load("mnist", data)
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
def test_teacher_checkpoints_and_cached_logits(data: Path, tmp_path: Path) -> None:
    a = tmp_path / "a"
    assert train(data, a, "--distill", "logit", "--no-plain") == 0
    weights = load_file(a / "teacher" / "model.safetensors")
    torch.save({"state_dict": weights}, tmp_path / "teacher.pt")
    given = [a / "teacher" / "model.safetensors", tmp_path / "teacher.pt", a / "teacher" / "checkpoints"]
    for i, path in enumerate(given):
        out = tmp_path / str(i)
        assert train(data, out, "--distill", "logit", "--no-plain", "--teacher-checkpoint", str(path)) == 0
        assert losses(out, "distilled-logit") == losses(a, "distilled-logit")
    assert train(data, tmp_path / "cached", "--distill", "logit", "--no-plain", "--cache-teacher") == 0
    assert losses(tmp_path / "cached", "distilled-logit") == pytest.approx(losses(a, "distilled-logit"), rel=1e-4)


# ---- the machine's options ----
@pytest.fixture(scope="module")
def single(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of a run without batch norm, whose statistics would depend on how a batch is cut."""
    sys.path.insert(0, str(TESTS))
    out = tmp_path_factory.mktemp("single") / "run"
    assert train(data, out, *WHOLE) == 0
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
def test_accumulated_gradients_give_the_same_losses(data: Path, tmp_path: Path, single: list[float]) -> None:
    assert train(data, tmp_path / "run", *WHOLE, "--accumulate", "4") == 0
    assert losses(tmp_path / "run", "distilled-logit") == pytest.approx(single, rel=1e-4)


def test_two_processes_give_the_same_losses(data: Path, tmp_path: Path, single: list[float]) -> None:
    """torchrun, two gloo processes."""
    path = os.pathsep.join(filter(None, (str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command += ["snnfast.train", *SMALL, *WHOLE, "--data-dir", str(data), "--out", str(tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert report(tmp_path / "run")["machine"]["processes"] == 2
    assert losses(tmp_path / "run", "distilled-logit") == pytest.approx(single, rel=1e-4)


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("options", [("--precision", "bf16-mixed"), ("--channels-last",), ("--clip", "1e3")])
def test_options_of_the_machine_change_little(
    data: Path, tmp_path: Path, single: list[float], options: tuple[str, ...]
) -> None:
    assert train(data, tmp_path / "run", *WHOLE, *options) == 0
    assert losses(tmp_path / "run", "distilled-logit") == pytest.approx(single, rel=2e-2)


@pytest.mark.usefixtures("no_report")
def test_compiled_training(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What inductor makes of neurons is test_torch's to see; here it would take half a minute.
    compiler = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", compiler)
    torch._dynamo.utils.counters.clear()
    more = ["--distill", "none", "--no-tensorboard", "--epochs", "1"]
    assert train(data, tmp_path / "eager", *more) == 0
    assert train(data, tmp_path / "compiled", *more, "--compile") == 0
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-3)
    assert "rate layer1.2" in (tmp_path / "compiled" / "plain" / "log.csv").read_text()


@pytest.mark.usefixtures("no_report")
def test_clipping_and_schedules_do_something(data: Path, tmp_path: Path) -> None:
    found = {}
    for options in ("", "--clip 1e-3", "--schedule constant", "--schedule onecycle", "--optimizer sgd", "--warmup 0"):
        out = tmp_path / options.replace(" ", "")
        assert train(data, out, "--distill", "none", "--no-tensorboard", *options.split()) == 0
        found[options] = tuple(losses(out))
    assert len(set(found.values())) == len(found)


# ---- options ----
def test_help_is_grouped_and_shows_every_option(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(Config):
        assert config.flag(field.name) in text
    for group in ("data", "networks", "distillation", "training", "machine", "output"):
        assert f"\n{group}:" in text
    assert "(default: 64)" in text


def test_yaml_and_the_command_line_wins(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("# a run\ntimesteps: 6\nlr: 1e-3\ndistill: [logit, 'temporal,spatial']\nout: here\nclip: null\n")
    found = parse(["--config", str(path), "--lr", "0.5"])
    assert (found.timesteps, found.lr, found.out, found.clip) == (6, 0.5, Path("here"), None)
    assert found.distilled() == [("logit",), ("temporal", "spatial")]
    # What a report prints as its options can be read again.
    path.write_text("\n".join(f"{k}: {json.dumps(v)}" for k, v in found.record().items()))
    assert parse(["--config", str(path)]) == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs: 3\nepoch: 4\n", r"line 2: unknown option 'epoch'; did you mean 'epochs'"),
        ("\n\ntimesteps: four\n", r"line 3: timesteps must be int, got 'four'"),
        ("timesteps: 2.5\n", r"line 1: timesteps must be int, got 2.5"),
        ("channels_last: 1\n", r"line 1: channels_last must be true or false, got 1"),
        ("neuron: lip\n", r"line 1: neuron must be one of if, lif, plif, got 'lip'; did you mean"),
        ("seed: 1\nlr: 1\nseed: 2\n", r"line 3: 'seed' is there twice"),
        ("- epochs\n", r"line 1: must be lines of the form 'option: value'"),
        ("epochs: [1\n", r"is not YAML"),
        ("epochs: {a: 1}\n", r"line 1: epochs must be int"),
    ],
)
def test_bad_files_are_named_with_their_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        parse(["--config", str(path)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--timesteps 0", "--timesteps must be a whole number from 1, got 0"),
        ("--tau 0", "--tau must be more than 1"),
        ("--temperature 0", "--temperature must be positive, got 0.0"),
        ("--temperature -1", "--temperature must be positive"),
        ("--lr nan", "--lr must be positive"),
        ("--distill temporal --timesteps-teacher 4", r"--timesteps-teacher must be more than --timesteps \(4\), got 4"),
        ("--distill logits", "got 'logits'; did you mean 'logit'"),
        ("--distill logit,logit", "must name each loss once"),
        ("--distill logit logit", "is there twice"),
        ("--distill none --no-plain", "leaves nothing to train"),
        ("--batch-size 10 --accumulate 3", "--batch-size 10 must be divisible by --accumulate 3"),
        ("--feature-pairs layer1", "--feature-pairs must be STUDENT=TEACHER, got 'layer1'"),
        ("--cache-teacher", "--cache-teacher needs --augment none"),
        ("--cache-teacher --augment none --distill feature", "keeps logits only"),
        ("--logit-weight -1", "--logit-weight must be 0 or more"),
        ("--logit-weight 2", "--logit-weight must be at most 1 without --task-weight"),
        ("--self-weight nan", "--self-weight must be 0 or more"),
        ("--timesteps-teacher 0", "--timesteps-teacher must be a whole number from 2, got 0"),
        ("--feature-pairs a=b a=c", "--feature-pairs must name each layer of the student once, got a, a"),
        ("--epoch 3", "unrecognized arguments.*did you mean '--epochs'"),
        ("--data mist", "invalid choice: 'mist'.*did you mean 'mnist'"),
        ("--neuron LIF", "--neuron: invalid choice: 'LIF'.*did you mean 'lif'"),
        ("--tau", r"--tau: expected one argument: --tau TAU \(time constant"),
        ("--model-args", r"--model-args: expected at least one argument: --model-args KEY=VALUE"),
        ("--model-args width", "--model-args must be KEY=VALUE without blanks, such as width=2, got 'width'"),
        ("--model-args =2", "--model-args must be KEY=VALUE .*got '=2'"),
        ("--teacher-args width=2 width=3", "--teacher-args must name width once, got width=2 width=3"),
        ("--model-args timesteps=3", "--model-args must not have timesteps, got 'timesteps=3': --timesteps sets it"),
        ("--teacher-args num_classes=3", "--teacher-args must not have num_classes, .*the data decide it"),
        ("--config nowhere.yaml", "nowhere.yaml cannot be read"),
    ],
)
def test_bad_options_are_refused(options: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse(options.split())


def test_options_from_python_are_checked_as_those_of_the_command_line() -> None:
    for name, message in (
        ("neuron", r"--neuron must be one of if, lif, plif, got 'lip'; did you mean"),
        ("optimizer", "--optimizer must be one of adamw, adam, sgd, got 'lip'"),
        ("data", "--data must be one of mnist5k, .*, got 'lip'"),
    ):
        with pytest.raises(InputError, match=message):
            Config(**{name: "lip"}).check()
    assert Config(out="here", data_dir="there") == Config(out=Path("here"), data_dir=Path("there"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--data-dir nowhere", "--data-dir nowhere is not a folder"),
        ("--batch-size 400", "--batch-size 400 is more than the 200 training images: .*give 200 or less"),
        ("--train-samples 500", "a subset must have 1 to 200 images, got 500"),
        ("--student train_networks:studen", "train_networks has no function 'studen'; did you mean 'student'"),
        ("--student nowhere:f", "cannot import nowhere"),
        ("--student wrn16_3", "must be a network of snnfast.models .*did you mean 'wrn16_2'"),
        ("--student timm:resnet18", "is not a spiking network"),
        ("--student train_networks:teacher", r"must take num_classes, in_channels, timesteps .*timesteps is not among"),
        ("--student train_networks:no_time", r"must give logits \[T, B, classes\] = \(2, 3, 10\) .*got \(3, 10\)"),
        ("--teacher train_networks:student", r"--teacher .* cannot"),
        ("--teacher train_networks:auxiliary", "tensor of logits in training too, got tuple; .*aux_logits=False"),
        ("--teacher train_networks:of_one_size", "cannot run on mnist.*Wrong image height! Expected 224 but got"),
        ("--student ./nets.py:f", "cannot import ./nets.py: .*looked for here"),
        ("--student train_networks:auxiliary_student", "--student .*tensor of logits in training too, got tuple"),
        ("--student wrn16_2 --model-args width=no", "--model-args width must be a number, such as 16, got 'no'"),
        (
            "--student wrn16_2 --model-args v_reset=none",
            "v_reset must be a number.*v_reset=none was read as text .*None",
        ),
        (
            "--student wrn16_2 --model-args widht=2",
            "cannot be made: .*'widht'; did you mean 'width'.*called with .*widht=2",
        ),
        (
            "--student wrn16_2 --model-args neuron=plif",
            "--model-args must not have neuron for wrn16_2, got 'plif'.*--neuron",
        ),
        (
            "--model-args norms=no",
            "--model-args norms: train_networks:.* 'norms'; did you mean 'norm'.*it takes num_cl",
        ),
        ("--augment crop,blur", "--augment must be of crop, flip, cutout, randaugment or none, got 'blur'"),
        ("--distill feature --feature-pairs layer3=layer2", "layer3.*layer2"),
        ("--distill feature --feature-pairs layer2=layr2", "layr2.*layer2"),
        ("--distill spatial --spatial-layers fcc", "fcc.*fc"),
        ("--teacher-checkpoint nowhere.pt", "--teacher-checkpoint nowhere.pt is missing"),
        ("--device cuda:99", "--device cuda:99"),
        ("--precision 16-mixed", "--precision 16-mixed needs a GPU"),
    ],
)
def test_refused_before_training_starts(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture, options: str, message: str
) -> None:
    assert train(data, tmp_path / "run", *options.split()) == 2
    text = capsys.readouterr().err
    import re

    assert re.search(message, text), text
    assert "epoch 1" not in text


def test_bad_teacher_checkpoints(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    networks = importlib.import_module("train_networks")
    path = tmp_path / "teacher.safetensors"
    save_file(networks.teacher(10, 1).state_dict(), path)
    content = path.read_bytes()
    path.write_bytes(content[:-10])
    assert train(data, tmp_path / "run", "--teacher-checkpoint", str(path)) == 2
    assert f"teacher.safetensors ({len(content) - 10:,} bytes) is damaged or not weights" in capsys.readouterr().err
    save_file(networks.teacher(7, 1).state_dict(), path)  # a teacher with other classes
    assert train(data, tmp_path / "run", "--teacher-checkpoint", str(path)) == 2
    assert "2 of another shape (fc.bias, fc.weight)" in capsys.readouterr().err
    torch.save([1, 2], tmp_path / "list.pt")
    assert train(data, tmp_path / "run", "--teacher-checkpoint", str(tmp_path / "list.pt")) == 2
    assert "must hold a state_dict" in capsys.readouterr().err


def test_timm_and_torchvision_teachers(monkeypatch: pytest.MonkeyPatch) -> None:
    from snnfast.train import models

    for library in ("timm", "torchvision"):
        monkeypatch.setitem(sys.modules, library, None)
        monkeypatch.setitem(sys.modules, "torchvision.models", None)
        with pytest.raises(InputError, match=f"needs {library}: pip install {library}"):
            models.build(f"{library}:resnet18", "teacher", 10, 3, None, {})
    asked: dict[str, object] = {}

    def create(name: str, **options: object) -> torch.nn.Module:
        if "raises" in asked:
            raise asked["raises"]
        asked[name] = options
        return torch.nn.Identity()

    package = types.SimpleNamespace(create_model=create, get_model=create, list_models=lambda: ["resnet18", "vgg11"])
    monkeypatch.setitem(sys.modules, "timm", package)
    monkeypatch.setitem(sys.modules, "torchvision.models", package)
    models.build("timm:a", "teacher", 10, 1, None, {"pretrained": True})
    models.build("torchvision:b", "teacher", 10, 3, None, {})
    assert asked == {"a": {"num_classes": 10, "in_chans": 1, "pretrained": True}, "b": {"num_classes": 10}}
    with pytest.raises(InputError, match="takes images of 3 channels, these have 1"):
        models.build("torchvision:b", "teacher", 10, 1, None, {})
    for error in (RuntimeError("Unknown model"), OSError("no network"), KeyError("foo")):  # of a name, of weights
        asked["raises"] = error
        for library in ("timm", "torchvision"):
            message = f"{library}:resnett18 cannot be made: .*{error.args[0]}.*; did you mean 'resnet18'"
            with pytest.raises(InputError, match=message):
                models.build(f"{library}:resnett18", "teacher", 10, 3, None, {})
            with pytest.raises(InputError, match=r"num_classes=10[^;]*$"):
                models.build(f"{library}:resnet18", "teacher", 10, 3, None, {})


def test_defaults_of_distillation_are_those_of_the_losses(capsys: pytest.CaptureFixture) -> None:
    from snnfast import distill

    def default(loss: type, name: str) -> object:
        return inspect.signature(loss).parameters[name].default

    settings = Config()
    assert settings.logit_weight == default(distill.LogitKD, "weight")
    assert settings.per_step_weight == default(distill.PerStepKD, "weight")
    assert settings.self_weight == default(distill.PerStepKD, "self_weight")
    assert settings.feature_weight == default(distill.FeatureKD, "weight")
    assert settings.temporal_weight == default(distill.TemporalSelfKD, "weight")
    assert settings.spatial_weight == default(distill.SpatialSelfKD, "weight")
    assert settings.confidence_weight == default(distill.ConfidenceKD, "weight")
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: 3 for logit and per-step, 2 for temporal, spatial and confidence)" in text
    assert default(distill.LogitKD, "temperature") == default(distill.PerStepKD, "temperature") == 3
    for loss in (distill.TemporalSelfKD, distill.SpatialSelfKD, distill.ConfidenceKD):
        assert default(loss, "temperature") == 2


@pytest.mark.parametrize(
    ("losses", "given", "task_weight", "others"),
    [
        ("logit", {}, 0.5, {"logit_kd": (0.5, 3.0)}),
        ("logit", {"logit_weight": 0.9, "temperature": 5.0}, 0.1, {"logit_kd": (0.9, 5.0)}),
        ("logit", {"logit_weight": 2.0, "task_weight": 0.7}, 0.7, {"logit_kd": (2.0, 3.0)}),
        ("confidence,spatial", {}, 1.0, {"confidence_kd": (1.0, 2.0), "spatial_self_kd": (0.1, 2.0)}),
        ("per-step", {"task_weight": 0.3}, 0.0, {"per_step": (0.2, 3.0)}),
        ("per-step", {"self_weight": 0.7, "temperature": 4.0}, 0.0, {"per_step": (0.2, 4.0)}),
    ],
)
def test_options_reach_the_distiller(losses: str, given: dict, task_weight: float, others: dict) -> None:
    networks = importlib.import_module("train_networks")
    settings, example = Config(timesteps=2, distill=[losses], **given).check(), torch.rand(3, 1, 28, 28)
    student, teacher = networks.student(10, 1, 2), networks.teacher(10, 1)
    made = objective.distiller(settings.distilled()[0], settings, student, teacher, 10, example)
    assert made.task_weight == pytest.approx(task_weight)
    assert {k: (loss.weight, loss.temperature) for k, loss in made.losses.items()} == others
    if losses == "per-step":  # it brings the cross-entropy of every step
        per_step = made.losses["per_step"]
        assert per_step.task_weight == given.get("task_weight", 1.0)
        assert per_step.self_weight == given.get("self_weight", 0.5)


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


# ---- networks of snnfast.models, event data ----
@pytest.mark.parametrize("name", ["resnet18", "wrn16_2", "vgg9", "pyramidnet18", "sew_resnet18"])
def test_default_layers_exist(name: str) -> None:
    from snnfast import models

    make = getattr(models, name)
    student, teacher = make(timesteps=2, width=4), make(width=4)
    settings = Config()
    pairs, spatial = objective._pairs(settings, student, teacher), objective._spatial(settings, student, 10)
    for path in (*pairs, *spatial):
        student.get_submodule(path)
    for path in pairs.values():
        teacher.get_submodule(path)


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


def test_stages_by_name() -> None:
    def chain(**parts: nn.Module) -> nn.Module:
        return nn.Sequential(OrderedDict(parts))

    def named(**children: nn.Module) -> nn.Module:
        net = nn.Module()
        for name, child in children.items():
            net.add_module(name, child)
        return net

    conv = nn.Identity
    dense = chain(conv0=conv(), relu0=nn.ReLU(), pool0=nn.MaxPool2d(2), denseblock1=conv(), norm5=conv())
    for net, want in (
        (named(features=dense), ["features.relu0", "features.norm5"]),  # DenseNet
        (named(features=nn.Sequential(conv(), nn.MaxPool2d(2), conv())), ["features.0", "features.2"]),  # VGG
        (named(stem=conv(), stages=nn.Sequential(conv(), conv())), ["stages.0", "stages.1"]),  # most of timm's
        (named(conv1=conv(), layer1=conv(), layer2=conv()), ["layer1", "layer2"]),  # ResNet
        (named(layers=nn.ModuleList([conv(), conv()])), ["layers.0", "layers.1"]),
        (named(conv1=conv(), fc=conv()), []),
    ):
        assert objective._stages(net) == want
