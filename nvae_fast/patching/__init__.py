"""This package's kernels in models that were built elsewhere: ``accelerate``, ``acceleration_report``, ``restore``."""

from nvae_fast.patching.apply import AccelerationReport, accelerate, acceleration_report, restore

__all__ = ["AccelerationReport", "accelerate", "acceleration_report", "restore"]
