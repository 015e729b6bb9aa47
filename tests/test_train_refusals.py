"""What the training command refuses before training starts: networks, checkpoints, devices (snnfast.train)."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("safetensors", reason="snnfast[train] is not installed")
pytest.importorskip("lightning_fabric", reason="snnfast[train] is not installed")
pytest.importorskip("rich", reason="snnfast[train] is not installed")
pytest.importorskip("matplotlib", reason="snnfast[train] is not installed")
pytest.importorskip("yaml", reason="snnfast[train] is not installed")
from safetensors.torch import save_file
from train_runs import train

pytestmark = pytest.mark.usefixtures("keeps_threads")


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
        ("--event-driven --precision bf16-mixed", "--event-driven computes in float32.* got bf16-mixed"),
        (
            "--event-driven",
            r"--event-driven finds no convolution of --student .* \(layer1.0: it maps 1 channels to 8; .*",
        ),
        ("--fuse --model-args norm=False", r"--fuse finds no batch norm of --student .* \(it has none\); leave it out"),
    ],
)
def test_refused_before_training_starts(
    small_mnist: Path, tmp_path: Path, capsys: pytest.CaptureFixture, options: str, message: str
) -> None:
    assert train(small_mnist, tmp_path / "run", *options.split()) == 2
    text = capsys.readouterr().err
    assert re.search(message, text), text
    assert "epoch 1" not in text


def test_bad_teacher_checkpoints(small_mnist: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    networks = importlib.import_module("train_networks")
    path = tmp_path / "teacher.safetensors"
    save_file(networks.teacher(10, 1).state_dict(), path)
    content = path.read_bytes()
    path.write_bytes(content[:-10])
    assert train(small_mnist, tmp_path / "run", "--teacher-checkpoint", str(path)) == 2
    assert f"teacher.safetensors ({len(content) - 10:,} bytes) is damaged or not weights" in capsys.readouterr().err
    save_file(networks.teacher(7, 1).state_dict(), path)  # a teacher with other classes
    assert train(small_mnist, tmp_path / "run", "--teacher-checkpoint", str(path)) == 2
    assert "2 of another shape (fc.bias, fc.weight)" in capsys.readouterr().err
    torch.save([1, 2], tmp_path / "list.pt")
    assert train(small_mnist, tmp_path / "run", "--teacher-checkpoint", str(tmp_path / "list.pt")) == 2
    assert "must hold a state_dict" in capsys.readouterr().err
