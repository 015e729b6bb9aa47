"""Networks from elsewhere as snnfast networks, and back."""

from .nir import from_nir, to_nir
from .to_spiking import SpikingNetwork, to_spiking

__all__ = ["SpikingNetwork", "from_nir", "to_nir", "to_spiking"]
