"""Functional operators, a module each."""

from nvae_fast.ops import _load

__all__ = ["_load"]  # which defines them all and loads their kernels
