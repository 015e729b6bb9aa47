"""snnfast: fused multi-timestep spiking neurons for PyTorch.

>>> import torch, snnfast
>>> net = torch.nn.Sequential(torch.nn.Linear(8, 4), snnfast.LIFNode(step_mode="m"))
>>> net(torch.randn(16, 2, 8)).shape  # [T, B, features], all 16 steps in one fused call
torch.Size([16, 2, 4])
"""

from typing import TYPE_CHECKING

from . import analysis, distill, encoding, functional, fused, layer, losses, models, neuron, surrogate
from ._arguments import suggests
from ._version import __version__
from .convert import accelerate, from_nir, restore, to_nir, to_spiking, unroll, verify
from .events import event_driven
from .fused import fuse, unfuse
from .inference import capture, optimize_for_inference
from .memory import chunked, keep_freed_memory, packed_spikes
from .neuron import IFNode, LIFNode, ParametricLIFNode

__all__ = [
    "IFNode",
    "LIFNode",
    "ParametricLIFNode",
    "__version__",
    "accelerate",
    "analysis",
    "capture",
    "chunked",
    "distill",
    "encoding",
    "event_driven",
    "from_nir",
    "functional",
    "fuse",
    "fused",
    "keep_freed_memory",
    "layer",
    "losses",
    "models",
    "neuron",
    "optimize_for_inference",
    "packed_spikes",
    "restore",
    "surrogate",
    "to_nir",
    "to_spiking",
    "unfuse",
    "unroll",
    "verify",
]

if not TYPE_CHECKING:  # to a type checker, what is not there is an error
    __getattr__ = suggests(__name__)
del TYPE_CHECKING, suggests
