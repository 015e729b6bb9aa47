"""Networks from elsewhere as snnfast networks."""

from .to_spiking import SpikingNetwork, to_spiking

__all__ = ["SpikingNetwork", "to_spiking"]
