"""Models that people already have: :func:`accelerate` their neurons, :func:`unroll` their single-step code."""

from .accelerate import Report, Verification, accelerate, restore, verify
from .unroll import unroll

__all__ = ["Report", "Verification", "accelerate", "restore", "unroll", "verify"]
