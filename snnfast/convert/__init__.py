"""Networks from elsewhere: :func:`accelerate` their neurons, :func:`unroll` their single-step code, :func:`to_spiking`
an ANN, and :func:`to_nir` and back."""

from .accelerate import Report, Verification, accelerate, restore, verify
from .nir import from_nir, to_nir
from .to_spiking import SpikingNetwork, to_spiking
from .unroll import unroll

__all__ = [
    "Report",
    "SpikingNetwork",
    "Verification",
    "accelerate",
    "from_nir",
    "restore",
    "to_nir",
    "to_spiking",
    "unroll",
    "verify",
]
