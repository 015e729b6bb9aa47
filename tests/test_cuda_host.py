"""The CUDA kernels without a GPU: cuda.cu compiled for the CPU by tests/cuda_host_shim, against a PyTorch loop."""

import ctypes
import itertools
import math
import mmap
import os
import subprocess
import sys

import pytest
import torch
from cuda_host import GXX, ROOT, FlatCall, Guarded, build, guarded_copy, point

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(GXX is None, reason="g++ is not on PATH, so the CUDA kernels cannot be built for the CPU"),
]

NEURONS = {"IF": 0, "LIF": 1, "ParametricLIF": 2}
DTYPES = {"float32": 0, "float64": 1, "bfloat16": 2, "float16": 3}
DECAY_INPUT, SOFT_RESET, DETACH_RESET = 1, 2, 4
DIVIDE, MULTIPLY, CORRECTED = 0, 1, 2


@pytest.fixture
def kernels(cuda_host_kernels):
    return cuda_host_kernels


class Case:
    """One neuron and its constants, run by the kernels and by the loop."""

    def __init__(
        self,
        neuron,
        dtype,
        *,
        decay_input=True,
        soft=False,
        detach=False,
        surrogate=1,
        alpha=2.0,
        tau=2.0,
        division=DIVIDE,
        threshold=1.0,
        v_reset=0.1,
        v_init=0.1,
    ):
        self.neuron, self.dtype, self.surrogate, self.alpha, self.tau = neuron, dtype, surrogate, alpha, tau
        self.decay_input, self.soft, self.detach, self.division = decay_input, soft, detach, division
        self.threshold, self.v_reset, self.v_init = threshold, 0.0 if soft else v_reset, v_init
        self.state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.decay = torch.sigmoid(torch.tensor(-math.log(tau - 1 + 1e-3), dtype=self.state_dtype))

    def call(self, T, N, **tensors):
        flags = DECAY_INPUT * self.decay_input | SOFT_RESET * self.soft | DETACH_RESET * self.detach
        call = FlatCall(
            T,
            N,
            NEURONS[self.neuron],
            self.surrogate,
            flags,
            DTYPES[str(self.dtype).split(".")[1]],
            self.division,
            0,
            self.threshold,
            self.v_reset,
            self.tau,
            self.alpha,
            1.0,
            0.0,
            self.v_init,
        )
        if self.neuron == "ParametricLIF":
            tensors["decay"] = self.decay
        return point(call, **tensors)

    def forward(self, library, x, v0=None, v_seq=True, shift=0):
        T, N = x.shape
        out = {"s": Guarded(T, N, dtype=self.dtype, shift=shift), "v": Guarded(N, dtype=self.state_dtype)}
        if v_seq:
            out["v_seq"] = Guarded(T, N, dtype=self.state_dtype)
        x = guarded_copy(x, shift)
        v0 = None if v0 is None else guarded_copy(v0)
        assert library.shim_forward(ctypes.byref(self.call(T, N, x=x, v0=v0, **out)), 0) == b""
        for name, guarded in out.items():
            guarded.check(name, written=not x.tensor.isinf().any())
        return {name: guarded.tensor for name, guarded in out.items()}

    def backward(self, library, x, v0, grad_s, grad_v, grad_v_seq, shift=0):
        T, N = x.shape
        given = {"x": x, "v0": v0, "grad_s": grad_s, "grad_v": grad_v, "grad_v_seq": grad_v_seq}
        shifted = {"x", "grad_s"}
        given = {k: None if t is None else guarded_copy(t, shift if k in shifted else 0) for k, t in given.items()}
        sizes = self.call(T, N)
        partials = library.shim_partials(ctypes.byref(sizes))
        workspace = library.shim_workspace(ctypes.byref(sizes)) // self.state_dtype.itemsize
        out = {"grad_x": Guarded(T, N, dtype=self.dtype, shift=shift)}
        if v0 is not None:
            out["grad_v0"] = Guarded(N, dtype=self.state_dtype)
        if self.neuron == "ParametricLIF":
            out["grad_decay_partial"] = Guarded(partials, dtype=torch.float64)
        else:
            assert partials == 0
        out["workspace"] = Guarded(workspace, dtype=self.state_dtype)
        assert library.shim_backward(ctypes.byref(self.call(T, N, **given, **out)), 0) == b""
        for name, guarded in out.items():
            guarded.check(name, written=name != "workspace" or shift == 0)
        result = {name: guarded.tensor for name, guarded in out.items()}
        result["grad_decay"] = result["grad_decay_partial"].sum() if "grad_decay_partial" in result else None
        return result

    # ---- the truth ----
    def charge(self, x, v, decay):
        if self.neuron == "IF":
            return v + x
        scaled = (lambda a: a * decay) if self.neuron == "ParametricLIF" else (lambda a: a / self.tau)
        if self.decay_input:
            return v + scaled(x - (v - self.v_reset))
        return v - scaled(v - self.v_reset) + x

    def reset(self, h, s):
        return h - s * self.threshold if self.soft else s * self.v_reset + (1 - s) * h

    def loop(self, x, v0=None):
        """Charges, spikes and states of the plain loop, in the state's dtype."""
        x = x.to(self.state_dtype)
        v = torch.full_like(x[0], self.v_init) if v0 is None else v0
        h_seq, s_seq, v_seq = [], [], []
        for x_t in x:
            h = self.charge(x_t, v, self.decay)
            s = (h >= self.threshold).to(h.dtype)
            v = self.reset(h, s)
            for seq, value in ((h_seq, h), (s_seq, s), (v_seq, v)):
                seq.append(value)
        return torch.stack(h_seq), torch.stack(s_seq), torch.stack(v_seq)

    def loop_gradients(self, x, v0, grad_s, grad_v, grad_v_seq):
        """Autograd's gradients of the loop in float64, its spikes and surrogates taken at the charges of loop()."""
        h_seq, s_seq, _ = self.loop(x, v0)
        derivatives = surrogate_derivative(self.surrogate, h_seq.double() - self.threshold, self.alpha)
        x = x.double().requires_grad_()
        v = v0 = (torch.full_like(x[0], self.v_init) if v0 is None else v0.double()).detach().requires_grad_()
        decay = self.decay.double().clone().requires_grad_()
        total = torch.zeros((), dtype=torch.float64)
        for t in range(len(x)):
            h = self.charge(x[t], v, decay)
            s = s_seq[t].double() + derivatives[t] * (h - h.detach())
            v = self.reset(h, s.detach() if self.detach else s)
            if grad_s is not None:
                total = total + (s * grad_s[t].double()).sum()
            if grad_v_seq is not None:
                total = total + (v * grad_v_seq[t].double()).sum()
        if grad_v is not None:
            total = total + (v * grad_v.double()).sum()
        total.backward()
        return {"grad_x": x.grad, "grad_v0": v0.grad, "grad_decay": decay.grad}


def surrogate_derivative(surrogate, u, alpha):
    a = abs(u)
    return [
        lambda: alpha * torch.sigmoid(alpha * u) * (1 - torch.sigmoid(alpha * u)),
        lambda: alpha / 2 / (1 + (math.pi / 2 * alpha * u) ** 2),
        lambda: (alpha - alpha**2 * a).clamp(min=0),
        lambda: alpha / 2 * torch.exp(-alpha * a),
        lambda: 1 / (2 * alpha * (1 / alpha + a) ** 2),
        lambda: alpha / (1 + a) ** 2,
        lambda: alpha / math.sqrt(math.pi) * torch.exp(-((alpha * u) ** 2)),
        lambda: torch.where(a < 1 / (2 * alpha), alpha, 0.0).to(u.dtype),
    ][surrogate]()


def inputs(T, N, dtype, seed):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, mean=0.0):
        return torch.randn(*shape, generator=generator, dtype=torch.float64) + mean

    state = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "x": normal(T, N, mean=0.5).to(dtype),
        "v0": (normal(N) / 2).to(state),
        "grad_s": normal(T, N).to(dtype),
        "grad_v": normal(N).to(state),
        "grad_v_seq": normal(T, N).to(state),
    }


GRADIENT_SUBSETS = [
    subset for size in (1, 2, 3) for subset in itertools.combinations(("grad_s", "grad_v", "grad_v_seq"), size)
]


def assert_gradients(got, expected, dtype):
    # relative to the largest gradient: small ones come out of cancellation in any order of summation
    for name, value in expected.items():
        if got.get(name) is None or (name == "grad_decay" and value is None):
            continue
        rounding = {torch.bfloat16: 2**-7, torch.float16: 2**-10}.get(dtype, 0) if name == "grad_x" else 0
        exact = 1e-12 if dtype == torch.float64 else 1e-5
        scale = float(value.abs().max())
        value = value.to(dtype).double() if rounding else value  # which may overflow
        torch.testing.assert_close(
            got[name].double(),
            value,
            rtol=rounding + exact,
            atol=exact * scale + (2**-24 if rounding else 0),
            msg=lambda text, name=name: f"{name}: {text}",
        )


def check(library, case, T, N, seed, *, shift=0, with_v0=True, subset=("grad_s", "grad_v", "grad_v_seq")):
    given = inputs(T, N, case.dtype, seed)
    x, v0 = given["x"], given["v0"] if with_v0 else None
    out = case.forward(library, x, v0, shift=shift)
    _, s, v_seq = case.loop(x, v0)
    assert torch.equal(out["s"], s.to(case.dtype))
    assert torch.equal(out["v_seq"], v_seq)
    assert torch.equal(out["v"], v_seq[-1])
    gradients = {name: given[name] if name in subset else None for name in ("grad_s", "grad_v", "grad_v_seq")}
    got = case.backward(library, x, v0, **gradients, shift=shift)
    assert_gradients(got, case.loop_gradients(x, v0, **gradients), case.dtype)


VARIANTS = [
    (neuron, decay_input, soft, detach)
    for neuron in NEURONS
    for decay_input in ([True] if neuron == "IF" else [True, False])
    for soft in (False, True)
    for detach in (False, True)
]


def variant_id(variant):
    neuron, decay_input, soft, detach = variant
    return "-".join(
        [neuron, "decay_input" if decay_input else "plain_input", "soft" if soft else "hard"] + ["detach"] * detach
    )


TIMESTEPS = {
    "float32": [1, 2, 3, 4, 7, 8, 16, 17, 50],
    "float64": [1, 17, 50],
    "bfloat16": [1, 2, 4, 8, 16, 17],
    "float16": [4, 7, 16],
}


@pytest.mark.parametrize(("dtype", "T"), [(dtype, T) for dtype, steps in TIMESTEPS.items() for T in steps])
@pytest.mark.parametrize("variant", VARIANTS, ids=variant_id)
def test_matches_the_loop(kernels, variant, dtype, T):
    neuron, decay_input, soft, detach = variant
    index = VARIANTS.index(variant) + 3 * T + 5 * DTYPES[dtype]  # walks through what is not crossed in full
    tau, division = [(2.0, MULTIPLY), (3.0, CORRECTED), (1.7, DIVIDE)][index % 3]
    case = Case(
        neuron,
        getattr(torch, dtype),
        decay_input=decay_input,
        soft=soft,
        detach=detach,
        tau=tau,
        division=division,
        surrogate=index % 8,
        alpha=[1.0, 2.0, 4.0][index % 3],
    )
    for k, N in enumerate((1032, 37)):  # wide accesses with a part of a block left over, and single neurons
        check(kernels, case, T, N, seed=index, with_v0=(index + k) % 2 == 0, subset=GRADIENT_SUBSETS[(index + k) % 7])


@pytest.mark.parametrize("surrogate", range(8))
@pytest.mark.parametrize("neuron", NEURONS)
def test_every_surrogate(kernels, neuron, surrogate):
    for alpha in (0.7, 3.0):
        check(kernels, Case(neuron, torch.float32, surrogate=surrogate, alpha=alpha), T=4, N=264, seed=surrogate)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [4, 20])
def test_unaligned_pointers(kernels, dtype, T):
    for neuron in NEURONS:
        check(kernels, Case(neuron, getattr(torch, dtype)), T=T, N=264, seed=T, shift=1)


@pytest.mark.parametrize("subset", GRADIENT_SUBSETS, ids="+".join)
@pytest.mark.parametrize("T", [4, 5, 40])
def test_every_subset_of_gradients(kernels, subset, T):
    check(kernels, Case("ParametricLIF", torch.float32, decay_input=False), T=T, N=72, seed=T, subset=subset)
    check(kernels, Case("LIF", torch.bfloat16), T=T, N=72, seed=T, subset=subset)


@pytest.mark.parametrize("neuron", NEURONS)
def test_long_time(kernels, neuron):
    check(kernels, Case(neuron, torch.float32, surrogate=0, alpha=4.0), T=1000, N=24, seed=0)


@pytest.mark.parametrize("neuron", NEURONS)
def test_one_neuron_and_none(kernels, neuron):
    case = Case(neuron, torch.float32)
    check(kernels, case, T=4, N=1, seed=0)
    empty = torch.empty(4, 0)
    case.forward(kernels, empty)
    case.backward(kernels, empty, None, empty, None, None)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("neuron", NEURONS)
def test_infinities_are_the_loops(kernels, neuron, soft):
    x = inputs(4, 64, torch.float32, 0)["x"]
    x[1, ::3], x[1, 1::3] = math.inf, -math.inf
    case = Case(neuron, torch.float32, soft=soft)
    out = case.forward(kernels, x)
    _, s, v_seq = case.loop(x)
    assert torch.equal(out["s"], s)
    torch.testing.assert_close(out["v_seq"], v_seq, rtol=0, atol=0, equal_nan=True)


def test_denormal_states_are_kept(kernels):
    case = Case("LIF", torch.float32, v_reset=0.0, tau=2.0, division=MULTIPLY)
    x, v0 = torch.zeros(50, 8), torch.full((8,), 1e-30)
    out = case.forward(kernels, x, v0)
    assert torch.equal(out["v_seq"], case.loop(x, v0)[2])
    assert 0 < float(out["v"].max()) < 2**-126


def test_decay_gradient_repeats_to_the_bit(kernels):
    case = Case("ParametricLIF", torch.float32)
    given = inputs(4, 5000, torch.float32, 0)
    arguments = [given[name] for name in ("x", "v0", "grad_s", "grad_v", "grad_v_seq")]
    first = case.backward(kernels, *arguments)["grad_decay_partial"]
    assert len(first) == -(-5000 // 128)
    assert torch.equal(first, case.backward(kernels, *arguments)["grad_decay_partial"])


def test_neurons_beyond_32_bits(kernels):
    """The last blocks of 2**31 + 1032 neurons, on memory that is reserved and hardly touched."""
    if sys.platform != "linux":
        pytest.skip("memory is reserved without being used in Linux's way")
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)  # named from Python 3.13 on
    T, N = 2, 2**31 + 1032
    try:
        memory = [mmap.mmap(-1, size, flags=flags) for size in (T * N * 2, T * N * 2, N * 4)]
    except OSError as error:
        pytest.skip(f"20 GiB of address space cannot be reserved: {error}")
    x, s = (torch.frombuffer(m, dtype=torch.bfloat16).view(T, N) for m in memory[:2])
    v = torch.frombuffer(memory[2], dtype=torch.float32)
    given = inputs(T, 2000, torch.bfloat16, 0)["x"]
    x[:, -2000:] = given
    case = Case("IF", torch.bfloat16)
    blocks = -(-N // (128 * 8))
    kernels.shim_first_block(blocks - 3)
    try:
        assert kernels.shim_forward(ctypes.byref(case.call(T, N, x=x, s=s, v=v)), 0) == b""
    finally:
        kernels.shim_first_block(0)
    _, expected, v_seq = case.loop(given)
    assert torch.equal(s[:, -2000:], expected.bfloat16())
    assert torch.equal(v[-2000:], v_seq[-1])


def test_devices(kernels):
    case = Case("IF", torch.float32)
    x, s, v = torch.ones(2, 8), torch.empty(2, 8), torch.empty(8)
    call = ctypes.byref(case.call(2, 8, x=x, s=s, v=v))
    assert kernels.shim_forward(call, 1) == b""
    assert kernels.shim_device() == 0, "the caller's device must come back"
    assert b"invalid device" in kernels.shim_forward(call, 7)
    assert b"invalid device" in kernels.shim_probe(7)
    assert kernels.shim_probe(1) == b""
    assert kernels.shim_device() == 0


SANITIZED = """
import ctypes, itertools, sys
sys.path.insert(0, sys.argv[2])
from cuda_host import open_library
from test_cuda_host import Case, check
import torch
library = open_library(sys.argv[1])
for neuron, dtype, T, N in itertools.product(["IF", "LIF", "ParametricLIF"], [torch.float32, torch.bfloat16],
                                             [1, 4, 7, 16, 19], [24, 37]):
    check(library, Case(neuron, dtype), T=T, N=N, seed=0)
check(library, Case("ParametricLIF", torch.float64), T=19, N=38, seed=0)
check(library, Case("LIF", torch.float32), T=4, N=24, seed=0, shift=1)
print("clean")
"""


def test_sanitizers(tmp_path):
    """Out-of-bounds and misaligned accesses, overflow and the like, in a process of its own."""
    runtime = subprocess.run([GXX, "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(runtime):
        pytest.skip("g++ has no address sanitizer here")
    library = build(tmp_path, "-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    # protect_shadow_gap=0: a CUDA driver that torch wakes up there maps memory into the gap.
    options = "detect_leaks=0:detect_stack_use_after_return=0:protect_shadow_gap=0"
    environment = dict(os.environ, LD_PRELOAD=runtime, ASAN_OPTIONS=options, CUDA_VISIBLE_DEVICES="")
    process = subprocess.run(
        [sys.executable, "-c", SANITIZED, str(library), str(ROOT / "tests")],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
    )
    assert process.returncode == 0, process.stdout + process.stderr[-4000:]
    assert "clean" in process.stdout
