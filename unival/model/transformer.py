"""Transformer layers: pre-norm with NormFormer's extra norms, untied positions and head scaling.

Shapes: B batch, S queries, T keys, D width, H heads, d = D / H.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers.cache_utils import Cache

from unival.kernels.attention.op import attention
from unival.kernels.attention.reference import attention_reference
from unival.kernels.attention.relative import RelativeBias
from unival.model.configuration import UnivalConfig
from unival.model.norm import LayerNorm


class PositionTerms(NamedTuple):
    """The untied absolute position part of the scores, shared by all layers of a stack.

    query  [B or 1, H, S, d], not yet scaled
    key    [B or 1, H, T, d]
    """

    query: Tensor
    key: Tensor


def score_scale(config: UnivalConfig) -> float:
    """(d * attn_scale_factor)^-1/2; content and position parts of the scores share it."""
    return (config.d_model / config.num_heads * config.attn_scale_factor) ** -0.5


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, S, D] to [B, H, S, d]."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head attention whose scores get position terms and whose heads are scaled."""

    def __init__(self, config: UnivalConfig) -> None:
        super().__init__()
        width = config.d_model
        self.num_heads = config.num_heads
        self.scaling = score_scale(config)
        self.backend = config.attention_backend
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        self.head_scale = nn.Parameter(torch.ones(config.num_heads))

    def project_keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of [B, T, D]: two [B, H, T, d]."""
        key = split_heads(self.k_proj(x), self.num_heads)
        return key, split_heads(self.v_proj(x), self.num_heads)

    def forward(
        self,
        x: Tensor,
        keys_values: tuple[Tensor, Tensor],
        positions: PositionTerms,
        relative: RelativeBias | None = None,
        key_padding_mask: Tensor | None = None,
        causal: bool = False,
    ) -> Tensor:
        """[B, S, D] to the attended [B, S, D]."""
        key, value = keys_values
        output = attention(
            split_heads(self.q_proj(x), self.num_heads),
            key,
            value,
            position_query=positions.query,
            position_key=positions.key,
            relative=relative,
            head_scale=self.head_scale,
            key_padding_mask=key_padding_mask,
            causal=causal,
            scale=self.scaling,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            backend=self.backend,
        )
        return self.out_proj(output.transpose(1, 2).flatten(2))

    def probabilities(
        self,
        x: Tensor,
        keys_values: tuple[Tensor, Tensor],
        positions: PositionTerms,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """[B, H, S, T], for those who want to look at them: no kernel makes them."""
        query = split_heads(self.q_proj(x), self.num_heads)
        return attention_reference(
            query,
            *keys_values,
            positions.query,
            positions.key,
            key_padding_mask=key_padding_mask,
            scale=self.scaling,
        )[1]


class FeedForward(nn.Module):
    """fc1, exact GELU, norm, fc2."""

    def __init__(self, config: UnivalConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.d_model, config.ffn_dim)
        self.norm = LayerNorm(config.ffn_dim, config)
        self.fc2 = nn.Linear(config.ffn_dim, config.d_model)
        self.residual_scale = (
            nn.Parameter(torch.ones(config.d_model)) if config.scale_resids else None
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.norm.of_gelu(self.fc1(x)))

    def residual(self, x: Tensor) -> Tensor:
        return x if self.residual_scale is None else self.residual_scale * x


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, each normed before and after.

    A layer gets its input and the norm of it, and gives its output and the norm of that which comes
    next, so that every residual sum is made in one pass with the norm over it.
    """

    def __init__(self, config: UnivalConfig, drop_path_rate: float) -> None:
        super().__init__()
        self.self_attn_norm = LayerNorm(config.d_model, config)
        self.self_attn = Attention(config)
        self.self_attn_post_norm = LayerNorm(config.d_model, config)
        self.ffn_norm = LayerNorm(config.d_model, config)
        self.ffn = FeedForward(config)
        self.dropout = config.dropout
        self.drop_path_rate = drop_path_rate

    def add(self, x: Tensor, branch: Tensor, norm: LayerNorm) -> tuple[Tensor, Tensor]:
        """x plus a residual branch under dropout and stochastic depth, and the norm of the sum."""
        return norm.of_sum(x, branch, self.dropout, self.drop_path_rate)

    def forward(
        self,
        x: Tensor,
        normed: Tensor,
        next_norm: LayerNorm,
        positions: PositionTerms,
        relative: RelativeBias,
        padding_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """[B, S, D] and self_attn_norm of it to [B, S, D] and next_norm of it."""
        y = self.self_attn(
            normed, self.self_attn.project_keys(normed), positions, relative, padding_mask
        )
        x, normed = self.add(x, self.self_attn_post_norm(y), self.ffn_norm)
        return self.add(self.ffn.residual(x), self.ffn(normed), next_norm)


class DecoderLayer(EncoderLayer):
    """Causal self-attention, cross attention and feed-forward, each normed before and after."""

    def __init__(self, config: UnivalConfig, drop_path_rate: float, index: int) -> None:
        super().__init__(config, drop_path_rate)
        self.index = index
        self.cross_attn_norm = LayerNorm(config.d_model, config)
        self.cross_attn = Attention(config)
        self.cross_attn_post_norm = LayerNorm(config.d_model, config)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        normed: Tensor,
        next_norm: LayerNorm,
        positions: PositionTerms,
        relative: RelativeBias,
        padding_mask: Tensor | None,
        encoder_states: Tensor,
        cross_positions: PositionTerms,
        encoder_padding_mask: Tensor | None,
        cache: Cache | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """As EncoderLayer's; and, where asked for, cross-attention probabilities [B, H, S, T]."""
        keys_values = self.self_attn.project_keys(normed)
        if cache is not None:
            keys_values = cache.self_attention_cache.update(*keys_values, self.index)
        y = self.self_attn(normed, keys_values, positions, relative, padding_mask, causal=True)
        x, normed = self.add(x, self.self_attn_post_norm(y), self.cross_attn_norm)

        keys_values = self.cross_keys_values(encoder_states, cache)
        probabilities = None
        if output_attentions:
            probabilities = self.cross_attn.probabilities(
                normed, keys_values, cross_positions, encoder_padding_mask
            )
        y = self.cross_attn(
            normed, keys_values, cross_positions, key_padding_mask=encoder_padding_mask
        )
        x, normed = self.add(x, self.cross_attn_post_norm(y), self.ffn_norm)
        x, normed = self.add(self.ffn.residual(x), self.ffn(normed), next_norm)
        return x, normed, probabilities

    def cross_keys_values(
        self, encoder_states: Tensor, cache: Cache | None
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of the encoder's states, projected once per generated sequence."""
        if cache is None:
            return self.cross_attn.project_keys(encoder_states)
        if not cache.is_updated.get(self.index):
            keys_values = self.cross_attn.project_keys(encoder_states)
            cache.cross_attention_cache.update(*keys_values, self.index)
            cache.is_updated[self.index] = True
        layer = cache.cross_attention_cache.layers[self.index]
        return layer.keys, layer.values


def run_layer(layer: nn.Module, recompute: bool, *inputs: Any) -> Any:
    """A layer's outputs; with `recompute`, backward makes all but attention's results again.

    The scores of attention are the one thing dear to make twice, and its results are small. Under
    ZeRO 3 they are made twice all the same: selective checkpointing wants the operations of the
    first time, and the gathering of weights comes between them elsewhere.
    """
    if not recompute:
        return layer(*inputs)
    if any(hasattr(parameter, "ds_id") for parameter in layer.parameters()):
        return checkpoint(layer, *inputs, use_reentrant=False)
    kept = [torch.ops.unival.attention_forward.default]
    contexts = partial(create_selective_checkpoint_contexts, kept)
    return checkpoint(layer, *inputs, use_reentrant=False, context_fn=contexts)


def next_norms(layers: nn.ModuleList, last: LayerNorm) -> list[LayerNorm]:
    """The norm that follows each layer of a stack: the next layer's first, then the stack's own."""
    norms: list[Any] = [layer.self_attn_norm for layer in layers]
    return [*norms[1:], last]
