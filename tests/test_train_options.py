"""The training command's options: how they are read, their defaults, and values that are refused (snnfast.train)."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import sys
import types
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("safetensors", reason="snnfast[train] is not installed")
pytest.importorskip("lightning_fabric", reason="snnfast[train] is not installed")
pytest.importorskip("rich", reason="snnfast[train] is not installed")
pytest.importorskip("matplotlib", reason="snnfast[train] is not installed")
pytest.importorskip("yaml", reason="snnfast[train] is not installed")
from snnfast.train import Config, cli, config, objective
from snnfast.train.errors import InputError
from snnfast.train.options import parse


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
        ("--feature-pairs a=b", "--feature-pairs is for feature: add that to --distill, or leave --feature-pairs out"),
        ("--spatial-layers a", "--spatial-layers is for spatial"),
        ("--timesteps-teacher 8", "--timesteps-teacher is for temporal"),
        ("--image-size 64", "--image-size is for imagefolder, cifar10dvs, dvsgesture: mnist5k has images of one size"),
        ("--cache-teacher --augment none --distill temporal", "--cache-teacher is for losses with a teacher"),
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
    for given, message in (
        ({"timesteps": "3"}, r"--timesteps must be a whole number \(int\), got '3'"),
        ({"epochs": 2.5}, r"--epochs must be a whole number \(int\), got 2.5"),
        ({"seed": True}, r"--seed must be a whole number \(int\), got True"),
        ({"tau": None}, r"--tau must be a number \(float\), got None"),
        ({"fuse": 1}, "--fuse must be True or False, got 1"),
        ({"distill": "logit"}, "--distill must be a list of texts, got 'logit'"),
        ({"model_args": [8]}, r"--model-args must be a list of texts, got \[8\]"),
    ):
        with pytest.raises(InputError, match=message):
            Config(**given).check()
    Config(lr=1, clip=None, distill=("logit",)).check()
    assert Config(out="here", data_dir="there") == Config(out=Path("here"), data_dir=Path("there"))


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
