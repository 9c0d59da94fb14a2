"""One op, one room, one name: each module here is read top to bottom (formula, checks, reference, kernels, backward)."""
