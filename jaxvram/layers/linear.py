"""Matrix products with parameters."""

import flax.linen as nn


class Linear(nn.Dense):
    """nn.Dense on rows: every axis but the last is flattened first.

    The gradient of the kernel is then one product of two matrices; over (B, T, D), XLA:CPU writes both out transposed.
    """

    @nn.compact
    def __call__(self, x_xD):
        rows_NxF = super().__call__(x_xD.reshape(-1, x_xD.shape[-1]))
        return rows_NxF.reshape(*x_xD.shape[:-1], self.features)
