"""Measurements of every op and of whole training steps: ``python -m benchmarks --help``.

A case is measured only after every provider's outputs and gradients agree with the float64 reference.
"""
