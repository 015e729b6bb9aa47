"""The compiled kernels: C++ on the CPU, CUDA C++ on NVIDIA GPUs. This module is the only caller of ``snnfast._C``.

``forward`` and ``backward`` have the signature of every backend. Tensors are laid out as :mod:`snnfast.ops` makes them:
everything ``[T, *]`` in one dense, time-major layout, states ``[*]`` in the layout of one step and in the state's
dtype; outputs are allocated by the caller and fully written, and ``None`` where they are not wanted.
"""

from __future__ import annotations

import functools
import importlib
import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..dynamics import NEURONS, Constants, Inputs
from ..surrogate import SURROGATES

_CALLS = 10  # csrc/bindings.cpp: what this module calls
try:
    _C: Any = importlib.import_module("snnfast._C")
except ImportError as error:
    _C = None
    _why_missing = (
        f"the compiled extension is not here ({error}). Install a C++ compiler and run `pip install -e .` again"
    )
if _C is not None and getattr(_C, "calls", None) != _CALLS:
    _C = None
    _why_missing = "the compiled extension was built from an older source. Run `pip install -e .` again"
if _C is not None:
    assert {s.__name__: s.id for s in SURROGATES} == _C.surrogates, "csrc/surrogates.h and surrogate.py disagree"
    assert {n.name: n.id for n in NEURONS} == _C.neurons, "csrc/neurons.h and dynamics.py disagree"

NEURONS_SERVED = frozenset(n.id for n in NEURONS)
_DTYPE = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_DIVIDE, _MULTIPLY, _CORRECTED = 0, 1, 2


def missing(device: torch.device) -> str | None:
    """Why this backend cannot serve the device, or ``None``."""
    if _C is None:
        return _why_missing
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"it has kernels for cpu and cuda, not for {device.type}"
    if torch.version.hip:
        return "it has kernels for NVIDIA GPUs, not for ROCm"
    if _C.cuda_architectures is None:
        return "it was built without CUDA kernels: there was no nvcc, or SNNFAST_CUDA=0"
    return _cuda_probe(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _cuda_probe(index: int) -> str | None:
    reason = _C.cuda_probe(index)
    if not reason:
        return None
    reason = f"its CUDA kernels ({_C.cuda_architectures}) do not run on device {index}: {reason}"
    from .._notices import say_once

    say_once(f"snnfast's native backend: {reason}. The Triton kernels take over.")
    return reason


def has_cuda_kernels() -> bool:
    """Whether there are any in this build, with or without a GPU here."""
    return _C is not None and _C.cuda_architectures is not None


def served() -> str:
    """What this build serves, in words."""
    if _C is None:
        return "nothing"
    cpu = f"cpu ({_C.cpu_set()}; built: {', '.join(_C.cpu_sets())})"
    return cpu if _C.cuda_architectures is None else f"{cpu}, cuda ({_C.cuda_architectures})"


@functools.lru_cache(maxsize=4096)
def _config(c: Constants) -> Any:
    """The constants as the kernels take them, with the fastest exact way to divide by tau."""
    if math.frexp(c.tau)[0] == 0.5:
        division = _MULTIPLY
    else:
        division = _CORRECTED if _C.corrected_division_is_exact(c.tau) else _DIVIDE
    return _C.Config(
        c.neuron, c.surrogate, c.flags, division, c.threshold, c.v_reset, c.tau, c.alpha, c.gain, c.v_leak, c.v_init
    )


def _each(threshold: Tensor, beta: Tensor | None, current_decay: Tensor | None) -> int:
    """Which of the neurons' own parameters have one value for each neuron, as bits."""
    each = 1 if threshold.numel() > 1 else 0
    if beta is not None and beta.numel() > 1:
        each |= 2
    return each | 4 if current_decay is not None and current_decay.numel() > 1 else each


def forward(
    constants: Constants,
    inputs: Inputs,
    # outputs
    s: Tensor,
    v: Tensor,
    i: Tensor | None,
    v_seq: Tensor | None,
) -> None:
    """Spikes ``s`` and final states of input ``x``, and the potentials ``v_seq`` if wanted."""
    launch_forward(_config(constants), inputs.x.shape[0], inputs, s, v, i, v_seq)


def launch_forward(
    config: Any, T: int, inputs: Sequence[Any], s: Tensor, v: Tensor, i: Tensor | None, v_seq: Tensor | None
) -> None:
    """The same for a caller that keeps the constants as :func:`_config` makes them, and whose tensors may lack the
    dimension of time where ``T`` is 1."""
    # Spelled out, as below: a small call costs what this costs.
    x, v0, i0, decay, threshold, beta, current_decay = inputs
    rest = (
        _DTYPE[x.dtype],
        T,
        x.numel() // T,
        x.data_ptr(),
        0 if v0 is None else v0.data_ptr(),
        0 if i0 is None else i0.data_ptr(),
        0 if decay is None else decay.data_ptr(),
        0 if threshold is None else threshold.data_ptr(),
        0 if beta is None else beta.data_ptr(),
        0 if current_decay is None else current_decay.data_ptr(),
        0 if threshold is None else _each(threshold, beta, current_decay),
        s.data_ptr(),
        v.data_ptr(),
        0 if i is None else i.data_ptr(),
        0 if v_seq is None else v_seq.data_ptr(),
    )
    if x.is_cuda:
        _C.cuda_forward(config, x.device.index, torch.cuda.current_stream(x.device).cuda_stream, *rest)
    else:
        _C.cpu_forward(config, torch.get_num_threads(), *rest)


def backward(
    constants: Constants,
    grads: Sequence[Tensor | None],
    inputs: Inputs,
    # outputs
    grad_x: Tensor,
    grad_v0: Tensor | None,
    grad_i0: Tensor | None,
    grad_decay: Tensor | None,
    *grad_own: Tensor | None,
) -> None:
    """Gradients of the inputs from any subset of the outputs' gradients (``s``, ``v``, ``i``, ``v_seq``).

    ``grad_own`` has one value for each neuron, also where the parameter itself has one for all.
    """
    T = inputs.x.shape[0]
    launch_backward(_config(constants), T, grads, inputs, grad_x, grad_v0, grad_i0, grad_decay, *grad_own)


def launch_backward(
    config: Any,
    T: int,
    grads: Sequence[Tensor | None],
    inputs: Sequence[Any],
    # outputs
    grad_x: Tensor,
    grad_v0: Tensor | None,
    grad_i0: Tensor | None,
    grad_decay: Tensor | None,
    *grad_own: Tensor | None,
) -> None:
    """To :func:`backward` what :func:`launch_forward` is to :func:`forward`."""
    x, v0, i0, decay, threshold, beta, current_decay = inputs
    grad_s, grad_v, grad_i, grad_v_seq = grads
    grad_threshold, grad_beta, grad_current_decay = grad_own
    rest = (
        _DTYPE[x.dtype],
        T,
        x.numel() // T,
        x.data_ptr(),
        0 if v0 is None else v0.data_ptr(),
        0 if i0 is None else i0.data_ptr(),
        0 if decay is None else decay.data_ptr(),
        0 if threshold is None else threshold.data_ptr(),
        0 if beta is None else beta.data_ptr(),
        0 if current_decay is None else current_decay.data_ptr(),
        0 if threshold is None else _each(threshold, beta, current_decay),
        0 if grad_s is None else grad_s.data_ptr(),
        0 if grad_v is None else grad_v.data_ptr(),
        0 if grad_i is None else grad_i.data_ptr(),
        0 if grad_v_seq is None else grad_v_seq.data_ptr(),
        grad_x.data_ptr(),
        0 if grad_v0 is None else grad_v0.data_ptr(),
        0 if grad_i0 is None else grad_i0.data_ptr(),
        0 if grad_threshold is None else grad_threshold.data_ptr(),
        0 if grad_beta is None else grad_beta.data_ptr(),
        0 if grad_current_decay is None else grad_current_decay.data_ptr(),
    )
    if not x.is_cuda:
        sum_decay = _C.cpu_backward(config, torch.get_num_threads(), *rest)
        if grad_decay is not None:
            grad_decay.fill_(sum_decay)
        return
    workspace_bytes, partials = _C.cuda_backward_needs(config, *rest[:3])
    workspace = torch.empty(workspace_bytes, dtype=torch.uint8, device=x.device)
    partial = torch.empty(partials, dtype=torch.float64, device=x.device)
    stream = torch.cuda.current_stream(x.device).cuda_stream
    _C.cuda_backward(config, x.device.index, stream, *rest, partial.data_ptr(), workspace.data_ptr())
    if grad_decay is not None:
        grad_decay.copy_(partial.sum())


# ---- tensors of two values as bits ----
def pack_bits(t: Tensor, bits: Tensor) -> int | None:
    """Write a dense CPU tensor as one bit an element, in memory order, where it holds 0 and at most one other value.

    ``bits`` is uint8, of whole 8-byte words. Returns the other value as its bits, or ``None`` where there are more.
    """
    return _C.cpu_pack_bits(torch.get_num_threads(), t.element_size(), t.numel(), t.data_ptr(), bits.data_ptr())


def unpack_bits(bits: Tensor, one: int, to: Tensor) -> None:
    """The reverse of :func:`pack_bits` into a dense tensor."""
    _C.cpu_unpack_bits(torch.get_num_threads(), to.element_size(), to.numel(), to.data_ptr(), bits.data_ptr(), one)


def _cuda_bits(call: Any, t: Tensor, bits: Tensor, one: int) -> None:
    stream = torch.cuda.current_stream(t.device).cuda_stream
    other = bits.data_ptr() + bits.numel() - 8
    call(t.device.index, stream, t.element_size(), t.numel(), t.data_ptr(), bits.data_ptr(), one, other)


def cuda_pack_bits(t: Tensor, bits: Tensor, one: int) -> None:
    """The same on a GPU for a tensor that is known to hold 0 and the value whose bits are ``one``, and nothing else.

    ``bits`` is zeros and has 8 bytes more than the words, where the GPU notes that this was wrong after all.
    """
    _cuda_bits(_C.cuda_pack_bits, t, bits, one)


def cuda_unpack_bits(bits: Tensor, one: int, to: Tensor) -> None:
    """The reverse of :func:`cuda_pack_bits`; NaN where other values than the two had been there."""
    _cuda_bits(_C.cuda_unpack_bits, to, bits, one)


# ---- max-pooling ----
def max_pool(dims: tuple[int, int, int, int], x: Tensor, y: Tensor, chosen: Tensor | None) -> None:
    """Max-pooling of 2x2 windows side by side, on the CPU: of ``x`` into ``y``.

    ``dims`` are the planes, height, width and channels of dense tensors ``[planes, height, width, channels]``; channels
    first is many planes of one channel. ``chosen`` takes the number of each window's element, 0 to 3, in a byte each.
    """
    addresses = x.data_ptr(), y.data_ptr(), 0 if chosen is None else chosen.data_ptr()
    _C.cpu_max_pool(torch.get_num_threads(), _DTYPE[x.dtype], *dims, *addresses)


def max_pool_backward(dims: tuple[int, int, int, int], grad_y: Tensor, chosen: Tensor, grad_x: Tensor) -> None:
    """The gradient of :func:`max_pool`'s input."""
    addresses = grad_y.data_ptr(), chosen.data_ptr(), grad_x.data_ptr()
    _C.cpu_max_pool_backward(torch.get_num_threads(), _DTYPE[grad_x.dtype], *dims, *addresses)


# ---- event-driven convolution ----
def count_events(x: Tensor) -> int:
    """How many elements of a dense float32 CPU tensor are not 0."""
    return _C.cpu_count_events(torch.get_num_threads(), x.numel(), x.data_ptr())


def pack_event_weights(sizes: tuple[int, ...], weight: Tensor, bias: Tensor | None) -> Tensor:
    """A dense weight ``[O, C, kh, kw]`` and its bias as :func:`event_convolve` takes them.

    ``sizes`` are x's shape ``[B, C, H, W]``, O, y's height and width, and pairs for kernel, stride, padding, dilation.
    """
    packed = torch.empty(_C.event_packed_floats(sizes), dtype=torch.float32, device=weight.device)
    addresses = weight.data_ptr(), 0 if bias is None else bias.data_ptr(), packed.data_ptr()
    _C.cpu_pack_event_weights(torch.get_num_threads(), sizes, not weight.is_contiguous(), *addresses)
    return packed


def event_convolve(sizes: tuple[int, ...], x: Tensor, packed: Tensor, y: Tensor) -> None:
    """The convolution of the elements of ``x`` that are not 0; ``x`` is dense, ``y`` dense with channels last."""
    addresses = x.data_ptr(), packed.data_ptr(), y.data_ptr()
    _C.cpu_event_convolve(torch.get_num_threads(), sizes, not x.is_contiguous(), *addresses)


def event_workspace(sizes: tuple[int, ...]) -> int:
    """How many numbers :func:`event_weight_gradient` copies the gradients into, with a border of zeros."""
    return _C.event_workspace_floats(sizes)


def event_weight_gradient(sizes: tuple[int, ...], x: Tensor, grad_y: Tensor, grad_weight: Tensor) -> None:
    """The gradient of the weight of :func:`event_convolve` with a stride of 1; ``grad_y`` has channels last."""
    workspace = torch.empty(event_workspace(sizes), dtype=torch.float32, device=x.device)
    addresses = x.data_ptr(), grad_y.data_ptr(), grad_weight.data_ptr(), workspace.data_ptr()
    layouts = not x.is_contiguous(), not grad_weight.is_contiguous()
    _C.cpu_event_weight_gradient(torch.get_num_threads(), sizes, *layouts, *addresses)


# ---- the loss of feature distillation ----
def feature_loss(student: Tensor, teacher: Tensor, weight: Tensor, bias: Tensor, gradients: bool) -> tuple[Tensor, ...]:
    """The mean of ``(weight * student's mean over time + bias - teacher)^2``.

    With ``gradients`` also that mean over time, and the gradients of one step of ``student``, of ``weight`` and of
    ``bias``. Everything is contiguous float32 on the CPU: ``[T, B, C, *]``, ``[B, C_teacher, *]``,
    ``[C_teacher, C, 1, 1]`` and ``[C_teacher]``.
    """
    T, B, C = student.shape[:3]
    step = student[0]
    loss = torch.empty((), dtype=torch.float32, device=student.device)
    wanted = tuple(map(torch.empty_like, (step, step, weight, bias))) if gradients else ()
    _C.cpu_feature_loss(
        *(torch.get_num_threads(), T, B, C, teacher.shape[1], step.numel() // (B * C)),
        *(t.data_ptr() for t in (student, teacher, weight, bias, loss)),
        *((t.data_ptr() for t in wanted) if gradients else (0, 0, 0, 0)),
    )
    return loss, *wanted


def openmp_runtimes() -> list[str]:
    """The OpenMP runtimes loaded into this process; two of them fight over the cores."""
    if not sys.platform.startswith("linux"):
        return []
    with open("/proc/self/maps") as maps:
        paths = {line.split()[-1] for line in maps if "/lib" in line}
    return sorted(p for p in paths if any(name in p.rsplit("/", 1)[-1] for name in ("libgomp", "libomp", "libiomp")))
