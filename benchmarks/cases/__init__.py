"""One file for each operator module of ``nvae_fast/ops``; each holds a tuple ``CASES`` of :class:`benchmarks.case.Case`."""
