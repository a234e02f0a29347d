"""Layer norm of the model: PyTorch's module and weights, the kernels' arithmetic."""

from __future__ import annotations

from torch import Tensor, nn

from unival.kernels.layernorm.op import gelu_layer_norm, layer_norm, residual_layer_norm
from unival.model.configuration import UnivalConfig


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm over the last dimension, alone or fused with what comes before it."""

    def __init__(self, width: int, config: UnivalConfig) -> None:
        super().__init__(width)
        self.backend = config.kernel_backend

    def forward(self, x: Tensor) -> Tensor:
        """LN(x)."""
        return layer_norm(x, self.weight, self.bias, self.eps, self.backend)

    def of_gelu(self, x: Tensor) -> Tensor:
        """LN(GELU(x))."""
        return gelu_layer_norm(x, self.weight, self.bias, self.eps, self.backend)

    def of_sum(
        self, residual: Tensor, branch: Tensor, dropout: float, drop_path: float
    ) -> tuple[Tensor, Tensor]:
        """residual + DropPath(Dropout(branch)) and its norm, [B, S, D] each; rates 0 in evaluation.

        Stochastic depth drops the branch of a whole sample and scales the survivors.
        """
        return residual_layer_norm(
            branch,
            residual,
            self.weight,
            self.bias,
            self.eps,
            dropout if self.training else 0.0,
            drop_path if self.training else 0.0,
            backend=self.backend,
        )
