"""One file per room of ``nvae_fast/ops``; each holds a tuple ``CASES`` of :class:`benchmarks.case.Case`."""
