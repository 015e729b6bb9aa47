"""Networks from elsewhere: :func:`accelerate` their neurons, :func:`unroll` their single-step code, :func:`to_spiking`
an ANN, and :func:`to_nir` and back, and weights between libraries
(:func:`load_peer_weights`, :func:`give_peer_weights`, :func:`peer_state_dict`)."""

from .accelerate import Report, Verification, accelerate, restore, verify
from .nir import from_nir, to_nir
from .peer_weights import give_peer_weights, load_peer_weights, peer_state_dict
from .to_spiking import SpikingNetwork, to_spiking
from .unroll import unroll

__all__ = [
    "Report",
    "SpikingNetwork",
    "Verification",
    "accelerate",
    "from_nir",
    "give_peer_weights",
    "load_peer_weights",
    "peer_state_dict",
    "restore",
    "to_nir",
    "to_spiking",
    "unroll",
    "verify",
]
