"""Functional operators, a module each."""

from nvae_fast.ops import _once

__all__ = ["_once"]  # which defines them all and loads their kernels
