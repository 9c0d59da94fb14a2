"""The inverted residual cell: in training, in evaluation, and the parts that both are made of."""
