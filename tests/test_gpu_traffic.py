"""How many bytes the GPU kernels move, counted as their PTX runs (see tests/ptx): what needs no GPU to be known."""

import pytest
import torch
from test_cuda_host import DECAY_INPUT, MULTIPLY, NEURONS, Case, inputs
from test_cuda_host_bn import BACKWARD, FORWARD, STATISTICS, call
from test_cuda_host_bn import constants as norm_constants

from snnfast import dynamics

DTYPES = [torch.float32, torch.bfloat16]
N = 2048


def case(neuron, dtype, surrogate=0):
    return Case(neuron, dtype, division=MULTIPLY, v_reset=0.0, v_init=0.0, surrogate=surrogate, alpha=4.0)


def sectors_of(rows, states, dtype):
    """Bytes of the sectors touched: a thread's eight bfloat16 neurons have 32 bytes of state in two accesses, so each
    of their sectors is touched twice. A tensor here need not begin with a sector."""
    return 1.07 * rows + states * (2 if dtype == torch.bfloat16 else 1)


@pytest.mark.parametrize("T", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("neuron", NEURONS)
def test_neurons_move_every_byte_once(ptx_kernels, neuron, dtype, T):
    given = inputs(T, N, dtype, 0)
    row, state = T * N * dtype.itemsize, 4 * N
    decay = 4 * N if neuron == "ParametricLIF" else 0  # every thread reads the one number, a warp one sector

    ptx_kernels.counts()
    case(neuron, dtype).forward(ptx_kernels, given["x"], given["v0"], v_seq=False)
    forward = ptx_kernels.counts()
    assert row + state <= forward.bytes_loaded <= row + state + decay
    assert forward.distinct_loaded == row + state + min(decay, 4)
    assert forward.bytes_stored == forward.distinct_stored == row + state
    assert 32 * forward.load_sectors <= sectors_of(row, state, dtype) + decay
    assert 32 * forward.store_sectors <= sectors_of(row, state, dtype)

    case(neuron, dtype).backward(ptx_kernels, given["x"], given["v0"], given["grad_s"], None, None)
    backward = ptx_kernels.counts()
    partials = 8 * (N // 128) if neuron == "ParametricLIF" else 0
    assert 2 * row + state <= backward.bytes_loaded <= 2 * row + state + decay
    assert backward.distinct_loaded == 2 * row + state + min(decay, 4)
    assert backward.bytes_stored == backward.distinct_stored == row + state + partials
    assert 32 * backward.load_sectors <= sectors_of(2 * row, state, dtype) + decay


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_time_has_bounded_traffic(ptx_kernels, dtype):
    """The open backward reads x twice and keeps a state every 16 steps, which it writes and reads."""
    T = 64
    given = inputs(T, N, dtype, 0)
    row, state = T * N * dtype.itemsize, 4 * N
    ptx_kernels.counts()
    case("LIF", dtype).backward(ptx_kernels, given["x"], given["v0"], given["grad_s"], None, None)
    counts = ptx_kernels.counts()
    kept = (T // 16 - 1) * state
    assert counts.bytes_loaded == row * (1 + 3 / 4) + row + 2 * state + kept
    assert counts.bytes_stored == row + state + kept


# Instructions of a warp for each of its neuron-steps, all the way round the kernel, as PTX has them (a load of 16 bytes
# is one). At 4.3 TB/s an H200 has time for some 70 in a float32 forward, 41 in a bfloat16 one and 55 in its backward.
BUDGET = {("forward", torch.float32): 20, ("forward", torch.bfloat16): 17}
BUDGET |= {("backward", torch.float32): 45, ("backward", torch.bfloat16): 41}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_instructions_stay_below_what_memory_takes(ptx_kernels, dtype):
    T = 4
    given = inputs(T, N, dtype, 0)
    ptx_kernels.counts()
    case("LIF", dtype).forward(ptx_kernels, given["x"], given["v0"], v_seq=False)
    forward = ptx_kernels.counts().slots * 32 / (T * N)
    case("LIF", dtype).backward(ptx_kernels, given["x"], given["v0"], given["grad_s"], None, None)
    backward = ptx_kernels.counts().slots * 32 / (T * N)
    assert forward <= BUDGET["forward", dtype]
    assert backward <= BUDGET["backward", dtype]


@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_passes_of_batch_norm_and_neuron(ptx_kernels, dtype, layout):
    """Statistics R; forward R, W. Backward R, R for the sums, with W in bfloat16, and R, R, W."""
    x = torch.randn(4, 16, 32, 16, 16)
    x = (x if layout == "first" else x.movedim(2, -1).contiguous().movedim(-1, 2)).to(dtype)
    T, rows = 4, x.numel() * dtype.itemsize
    state = 4 * x.numel() // T
    c = norm_constants(dynamics.LIF, DECAY_INPUT)
    double = torch.empty(1, 32, dtype=torch.float64)
    flat = torch.empty(T, x.numel() // T)
    out = {"s": flat.to(dtype), "v": flat[0]}
    gradients = {"grad_x": flat.to(dtype), "grad_weight": torch.empty(32), "grad_bias": torch.empty(32)}

    def counts(run, given, outputs):
        ptx_kernels.counts()
        return call(ptx_kernels, run, c, x, 1, given, outputs), ptx_kernels.counts()

    found, statistics = counts(STATISTICS, {}, {"mean": double, "var": double})
    given = {"mean": found["mean"], "var": found["var"], "weight": torch.ones(32), "bias": torch.zeros(32)}
    _, forward = counts(FORWARD, given, out)
    _, backward = counts(BACKWARD, given | {"grad_s": torch.randn(flat.shape).to(dtype)}, gradients)
    # Vectors for each channel, and a sum for each block and channel: half as much again as x where that is as small as
    # here and has channels last, 1-3 % of it from some ten megabytes on.
    slack = 0.12 if layout == "first" else 0.52
    for name, got, loads, stores in (
        ("statistics", statistics, rows, 0),
        ("forward", forward, rows, rows + state),
        ("backward", backward, 4 * rows, (2 if dtype == torch.bfloat16 else 1) * rows),
    ):
        assert loads <= got.distinct_loaded <= loads + slack * rows, f"{name}: {got.distinct_loaded / rows}"
        assert stores <= got.bytes_stored <= stores + slack * rows, f"{name}: {got.bytes_stored / rows}"
