"""Fixtures and helpers shared by the tests."""

from __future__ import annotations

import contextlib
import os
import sys
import types

import numpy as np
import pytest
import torch

from snnfast import backends, dynamics, surrogate

with contextlib.suppress(ImportError):  # a machine with a GPU may lack it
    from hypothesis import settings

    # The same examples in every run, so that a change fails by its own fault; `make fuzz` draws new ones.
    settings.register_profile("fixed", deadline=None, derandomize=True)
    settings.register_profile("fuzz", deadline=None)
    settings.load_profile("fixed")

# Their assertions say what they compared, as those in tests do.
pytest.register_assert_rewrite("memory_checks", "peer_checks", "spiking_loops")


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is NaN, so that an element that nobody writes shows."""

    def poison(make):
        def poisoned(*args, **kwargs):
            t = make(*args, **kwargs)
            # Only real eager tensors: the compiler traces these functions too.
            if (
                type(t) is torch.Tensor
                and t.is_floating_point()
                and t.device.type != "meta"
                and t.layout is torch.strided
            ):
                with torch.no_grad():
                    t.fill_(float("nan"))
            return t

        return poisoned

    if os.environ.get("SNNFAST_POISON", "1") == "1":
        for name in ("empty", "empty_like", "empty_strided"):
            monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
        monkeypatch.setattr(torch.Tensor, "new_empty_strided", poison(torch.Tensor.new_empty_strided))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_thread():
    """For tests on tiny tensors, where a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def keeps_threads():
    """For what sets the number of threads for good, as snnfast-train does."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def count_fused(monkeypatch):
    """How many calls of a batch norm with its neuron went to the kernels."""
    from snnfast.fused import kernels

    calls = []
    run = kernels.multi_step
    monkeypatch.setattr(kernels, "multi_step", lambda *args: calls.append(1) or run(*args))
    return calls


@pytest.fixture
def pool_calls(monkeypatch):
    """The names of the max-pooling kernels' calls."""
    made = []
    for name in ("max_pool", "max_pool_backward"):
        run = getattr(backends.native, name)
        monkeypatch.setattr(backends.native, name, lambda *args, run=run, name=name: made.append(name) or run(*args))
    return made


CPU_SETS = ("avx512", "avx2", "baseline")


@pytest.fixture(params=CPU_SETS)
def cpu_set(request):
    """Each instruction set of the compiled CPU kernels in turn."""
    _C = pytest.importorskip("snnfast._C", reason="the compiled extension is not built here")
    if request.param not in _C.cpu_sets():
        pytest.skip(f"{request.param} is not built or this processor lacks it")
    before = _C.cpu_set()
    _C.set_cpu_set(request.param)
    backends.native._config.cache_clear()  # how to divide by tau depends on the set
    yield request.param
    _C.set_cpu_set(before)
    backends.native._config.cache_clear()


@pytest.fixture(scope="module")
def small_mnist(tmp_path_factory):
    """A folder with 200 and 50 images like MNIST's, noise around ten patterns, in idx files."""
    folder = tmp_path_factory.mktemp("mnist")
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 2, (10, 7, 7)).repeat(4, 1).repeat(4, 2) * 180
    for prefix, count in (("train", 200), ("t10k", 50)):
        labels = np.arange(count) % 10
        images = (patterns[labels] + rng.integers(0, 75, (count, 28, 28))).astype(np.uint8)
        header = np.array([2051, count, 28, 28], ">i4").tobytes()
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        content = np.array([2049, count], ">i4").tobytes() + labels.astype(np.uint8).tobytes()
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(content)
    return folder


@pytest.fixture(scope="session")
def nvcc_output(tmp_path_factory):
    """What nvcc makes of cuda.cu: per pass the folder with what it kept, and what ptxas said."""
    from cuda_host import compile_for_gpu

    return compile_for_gpu({name: tmp_path_factory.mktemp(f"nvcc_{name}") for name in ("forward", "backward")})


@pytest.fixture(scope="session")
def ptx_kernels(request, tmp_path_factory):
    """The CUDA kernels as nvcc's PTX, which tests/ptx runs on the CPU."""
    from cuda_host import GXX, NVCC
    from ptx_machine import open_compiled

    if NVCC is None or GXX is None:
        pytest.skip("nvcc or g++ is not on PATH")
    return open_compiled(request.getfixturevalue("nvcc_output"), tmp_path_factory.mktemp("ptx"))


@pytest.fixture(scope="session", params=["source", "ptx"])
def cuda_host_kernels(request, tmp_path_factory):
    """The CUDA kernels on the CPU, once for all tests that drive them: their source compiled for it, and nvcc's PTX."""
    from cuda_host import build, open_library

    if request.param == "ptx":
        return request.getfixturevalue("ptx_kernels")
    return open_library(build(tmp_path_factory.mktemp("cuda_host")))


def kernel_backends() -> list:
    """Every (backend, device) that has kernels here; those that do not are skipped with the reason."""
    found = []
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for name, kernels in zip(("native", "triton"), backends.KERNELS, strict=True):
        for device in devices:
            reason = kernels.missing(torch.device(device))
            marks = [pytest.mark.skip(reason=f"{name} on {device}: {reason}")] if reason else []
            found.append(pytest.param(name, device, id=f"{name}-{device}", marks=marks))
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no CUDA device here")
        found += [pytest.param(name, "cuda", id=f"{name}-cuda", marks=skip) for name in ("native", "triton")]
    return found


# ---- any neuron of the registry ----
TAUS = (2.0, 3.0, 1.7)


def learnable(neuron, device, dtype):
    if not neuron.learnable:
        return None
    return torch.tensor(0.375, dtype=dynamics.state_dtype(dtype), device=device)


def own_parameters(neuron, shape, dtype, kind="one"):
    """Those that the registry's entry names: one for all, one for each neuron, or one for each of the last axis."""
    like = {"one": (), "each": shape, "channel": shape[-1:]}[kind]
    values = {"threshold": 0.9, "beta": 0.8125, "current_decay": 0.6}
    spread = 0.0 if kind == "one" else 0.15
    return tuple(
        (values[name] + spread * (torch.rand(like, dtype=torch.float64) - 0.5)).to(dynamics.state_dtype(dtype))
        for name in neuron.own
    )


def start(neuron, shape, dtype, scale=1.0):
    """A random state: the potential, or the pair of potential and current."""
    states = tuple(torch.randn(shape, dtype=dynamics.state_dtype(dtype)) * scale for _ in neuron.states)
    return states if len(states) > 1 else states[0]


def on(device, value):
    if isinstance(value, tuple):
        return tuple(on(device, v) for v in value)
    return value.to(device) if isinstance(value, torch.Tensor) else value


def flat(*values):
    """The tensors of a result or of arguments, one after the other."""
    tensors = []
    for value in values:
        tensors += flat(*value) if isinstance(value, tuple) else [value] if isinstance(value, torch.Tensor) else []
    return tensors


def variants(neuron):
    """What else than the reset a neuron can be told."""
    if neuron is dynamics.LIF:
        return [{"tau": tau, "decay_input": d} for tau in TAUS for d in (True, False)] + [{"strict": True}]
    if neuron in (dynamics.IF, dynamics.PARAMETRIC_LIF):
        return [{"decay_input": True}, {"decay_input": False, "strict": True}]
    if neuron is dynamics.EXPONENTIAL_LIF:
        counted = [{"decay_input": d, "multi_spike": m} for d in (True, False) for m in (True, False)]
        return counted + [{"decay_input": False, "multi_spike": m, "v_min": -0.3} for m in (True, False)]
    if neuron in (dynamics.BOX_LIF, dynamics.CURRENT_LIF):
        return [{"strict": True, "v_leak": leak} for leak in (0.0, 0.0625)]
    return [{"strict": True, "resets": resets} for resets in (True, False)]


def loop(neuron, x, state, decay, own=(), *, v_reset, store_v_seq=True, surrogate_function=None, **kwargs):
    """The truth: the plain loop on the CPU, for float32 in float32."""
    own = dict(zip(neuron.own, own, strict=True))
    parameters = dynamics.Parameters(
        own.pop("threshold", kwargs["v_threshold"]),
        v_reset,
        surrogate_function or surrogate.ATan(),
        kwargs.get("tau", 2.0),
        decay,
        kwargs.get("decay_input", True),
        kwargs.get("detach_reset", False),
        **own,
        **{name: kwargs[name] for name in ("v_leak", "strict", "multi_spike", "resets", "v_min") if name in kwargs},
    )
    return dynamics.multi_step(neuron, x, state, parameters, store_v_seq)


@pytest.fixture(scope="module")
def zoo():
    """SpikingJelly's model files; of torchvision they want only a download function, which no test calls."""
    pytest.importorskip("spikingjelly.activation_based", reason="spikingjelly is not installed")
    names = ("torchvision", "torchvision._internally_replaced_utils")
    before = {name: sys.modules.get(name) for name in names}
    if before[names[0]] is None:
        package, utils = (types.ModuleType(name) for name in names)
        utils.load_state_dict_from_url = None
        package._internally_replaced_utils = utils
        sys.modules.update(zip(names, (package, utils), strict=True))
    from spikingjelly.activation_based.model import parametric_lif_net, sew_resnet, spiking_resnet, spiking_vgg

    yield types.SimpleNamespace(
        sew_resnet=sew_resnet, spiking_resnet=spiking_resnet, spiking_vgg=spiking_vgg, plif=parametric_lif_net
    )
    for name, module in before.items():
        if module is None:
            sys.modules.pop(name, None)
