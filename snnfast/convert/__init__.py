"""Conversion of networks from and to other forms."""

from .nir import from_nir, to_nir

__all__ = ["from_nir", "to_nir"]
