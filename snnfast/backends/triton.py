"""The Triton kernels: for GPUs that have no native build (ROCm, XPU, or CUDA without nvcc).

The module is the twin of :mod:`snnfast.backends.native`, which describes the signatures; the kernels themselves are in
``triton_kernels.py`` and are compiled at the first call of each neuron, surrogate, dtype and number of time steps.
"""

from __future__ import annotations

import contextlib
import functools
import math
import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..dynamics import DETACH_RESET, MULTI_SPIKE, NEURONS, STORE_V_SEQ, Constants, Inputs, state_dtype

NEURONS_SERVED = frozenset(n.id for n in NEURONS)
_DEVICES = ("cuda", "xpu")
_LONGEST_UNROLLED, _CHUNK = 32, 16
_WARPS = 4
# Kernels recompute the charges, so backward's must be forward's to the bit: no fused multiply-adds in either.
_OPTIONS = {"num_warps": _WARPS, "enable_fp_fusion": False}


@functools.cache
def _why_missing() -> str | None:
    try:
        import triton
    except ImportError as error:
        return f"Triton is not here ({error}); it comes with PyTorch's builds for Linux GPUs, or `pip install triton`"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 3):
        return f"it needs Triton 3.3 or newer (PyTorch 2.7), this is {triton.__version__}"
    return None


@functools.cache
def kernels() -> Any:
    """The module of the kernels; not imported before it is needed, for Triton takes a quarter of a second."""
    from . import triton_kernels

    return triton_kernels


def _interpreted() -> bool:
    """Whether TRITON_INTERPRET=1 was set when the kernels were imported."""
    import triton

    return not isinstance(kernels().forward_kernel, triton.JITFunction)


def missing(device: torch.device) -> str | None:
    """Why this backend cannot serve the device, or ``None``."""
    if (reason := _why_missing()) is not None:
        return reason
    if _interpreted():
        return None if device.type in ("cpu", *_DEVICES) else f"its interpreter does not serve {device.type}"
    if device.type == "cpu":
        return "Triton has kernels for GPUs; TRITON_INTERPRET=1 in the environment interprets them, to debug them"
    if device.type not in _DEVICES:
        return f"Triton has kernels for cuda and xpu, not for {device.type}"
    return _probe(device.type)


@functools.cache
def _probe(device_type: str) -> str | None:
    import triton

    try:
        active = triton.runtime.driver.active.get_current_target().backend
    except Exception as error:  # each vendor's driver fails in its own way
        return f"Triton {triton.__version__} finds no {device_type} driver ({error})"
    expected = "xpu" if device_type == "xpu" else ("hip" if torch.version.hip else "cuda")
    return None if active == expected else f"this Triton serves {active}, not {expected}"


def served() -> str:
    """What this installation serves, in words."""
    if _why_missing() is not None:
        return "nothing"
    import triton

    if _interpreted():
        return f"cpu, interpreted (Triton {triton.__version__})"
    # torch.xpu is there in every build
    devices = [name for name in _DEVICES if getattr(torch, name).is_available() and _probe(name) is None]
    return f"{', '.join(devices)} (Triton {triton.__version__})" if devices else "nothing: no GPU here"


# ---- launch ----
def block_size(neuron: int, T: int, state: torch.dtype) -> int:
    """Neurons per program: backward holds up to 32 steps' tapes of each in registers, which must not spill."""
    block = 1024 if T <= 4 else 512 if T <= 16 else 256
    if NEURONS[neuron].own:  # a longer tape, more states, and the gradients of the parameters
        block //= 2
    return block // 2 if state == torch.float64 else block


def split_time(T: int, flags: int) -> tuple[int, int, int]:
    """``(chunks, chunk, rest)`` with ``T = chunks * chunk + rest`` and ``rest`` above 0; one piece while T is small."""
    # Counts of spikes are quotients, which the compiler keeps in registers next to the tape.
    longest = _CHUNK if flags & MULTI_SPIKE else _LONGEST_UNROLLED
    if longest >= T:
        return 0, 0, T
    chunks = (T - 1) // _CHUNK
    return chunks, _CHUNK, T - chunks * _CHUNK


def _bits(number: float) -> int:
    """The bits of a float64 as an integer: Triton would round a Python float to float32."""
    return struct.unpack("<q", struct.pack("<d", number))[0]


@functools.lru_cache(maxsize=4096)
def _plan(
    c: Constants, T: int, dtype: torch.dtype, each: int
) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Any], int]:
    """For both kernels the numbers, for each its compile-time arguments, and the number of chunks."""
    state = state_dtype(dtype)
    chunks, chunk, rest = split_time(T, c.flags)
    numbers = (c.threshold, c.v_reset, c.v_leak, c.tau, 1.0 / c.tau, c.v_init, c.alpha, 0.5 / c.alpha, c.gain)
    flags = c.flags & ~STORE_V_SEQ  # which the pointer tells
    shared = {
        "NEURON": c.neuron,
        "MULTIPLY": math.frexp(c.tau)[0] == 0.5,
        "EACH": each,
        "CHUNK": chunk,
        "REST": rest,
        "BLOCK": block_size(c.neuron, T, state),
        **_OPTIONS,
    }
    return (
        numbers if state == torch.float32 else tuple(_bits(n) for n in numbers),
        {**shared, "FLAGS": flags & ~DETACH_RESET},
        {**shared, "FLAGS": flags, "SURROGATE": c.surrogate},
        chunks,
    )


def _each(inputs: Inputs) -> int:
    """Which of the neurons' own parameters have one value for each neuron, as bits."""
    if inputs.threshold is None:
        return 0
    own = inputs.threshold, inputs.beta, inputs.current_decay
    return sum(1 << k for k, t in enumerate(own) if t is not None and t.numel() > 1)


def _on(device: torch.device) -> Any:
    """Triton launches on the current device's current stream."""
    return contextlib.nullcontext() if device.type == "cpu" else getattr(torch, device.type).device(device)


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
    x = inputs.x
    T = x.shape[0]
    N = x.numel() // T
    numbers, compile_time, _, chunks = _plan(constants, T, x.dtype, _each(inputs))
    with _on(x.device):
        kernels().forward_kernel[(-(-N // compile_time["BLOCK"]),)](
            *inputs, s, v, i, v_seq, N, chunks, *numbers[:6], **compile_time
        )


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
    x = inputs.x
    T = x.shape[0]
    N = x.numel() // T
    numbers, _, compile_time, chunks = _plan(constants, T, x.dtype, _each(inputs))
    programs = -(-N // compile_time["BLOCK"])
    partial = None if grad_decay is None else torch.empty(programs, dtype=torch.float64, device=x.device)
    room = len(NEURONS[constants.neuron].states), chunks, N
    states = torch.empty(room, dtype=state_dtype(x.dtype), device=x.device) if chunks else None
    with _on(x.device):
        kernels().backward_kernel[(programs,)](
            *grads,
            *inputs,
            grad_x,
            grad_v0,
            grad_i0,
            partial,
            *grad_own,
            states,
            N,
            chunks,
            *numbers,
            **compile_time,
        )
    if grad_decay is not None and partial is not None:
        grad_decay.copy_(partial.sum())
