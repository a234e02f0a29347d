"""The decoder: text or image codes, untied positions in self- and cross attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.modeling_outputs import ModelOutput

from unival.kernels.attention.relative import RelativeBias, RelativeLayout
from unival.model.configuration import UnivalConfig
from unival.model.encoder import EncoderOutput, RelativeTables, position_projection
from unival.model.norm import LayerNorm
from unival.model.positions import code_positions, grid_cells
from unival.model.transformer import DecoderLayer, PositionTerms, next_norms, run_layer


@dataclass
class DecoderOutput(ModelOutput):
    """last_hidden_state [B, U, D] after the final norm; hidden_states as in EncoderOutput;
    cross_attentions: per layer [B, H, U, S]."""

    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None


class Decoder(nn.Module):
    """The transformer decoder; the token embedding is the encoder's."""

    def __init__(self, config: UnivalConfig) -> None:
        super().__init__()
        width = config.d_model
        self.config = config
        self.token_norm = LayerNorm(width, config)
        self.code_norm = LayerNorm(width, config)
        self.text_positions = nn.Embedding(config.num_text_positions, width)
        self.image_positions = nn.Embedding(config.image_bucket_size**2 + 1, width)
        self.text_position_norm = LayerNorm(width, config)
        self.grid_position_norm = LayerNorm(width, config)
        self.self_position_query = nn.Linear(width, width)
        self.self_position_key = nn.Linear(width, width)
        self.cross_position_query = nn.Linear(width, width)
        self.cross_position_key = nn.Linear(width, width)
        self.relative = RelativeTables(config, config.decoder_layers)
        rates = torch.linspace(0.0, config.decoder_drop_path, config.decoder_layers, device="cpu")
        self.layers = nn.ModuleList(
            DecoderLayer(config, rate.item(), index) for index, rate in enumerate(rates)
        )
        self.norm = LayerNorm(width, config)
        self.gradient_checkpointing = False  # the name that transformers switches it on by

    def embed(self, embedded: Tensor, code_mask: Tensor | None) -> Tensor:
        """Norm token embeddings [B, U, D]; rows of image codes have their own norm."""
        x = self.token_norm(embedded)
        if code_mask is not None:
            x = torch.where(code_mask[:, None, None], self.code_norm(embedded), x)
        return F.dropout(x, self.config.dropout, self.token_norm.training)

    def text_terms(self, total: int, device: torch.device) -> Tensor:
        """Position embeddings [1, total, D] of text."""
        if total > self.config.max_text_positions:
            raise ValueError(
                f"{total} decoder tokens; the model's limit is {self.config.max_text_positions}"
            )
        index = torch.arange(total, device=device)
        return self.text_position_norm(self.text_positions(index)).unsqueeze(0)

    def code_ids(self, total: int, device: torch.device) -> Tensor:
        return code_positions(
            total, self.config.code_image_size, self.config.image_bucket_size, device
        )

    def position_embeddings(
        self, total: int, code_mask: Tensor | None, device: torch.device
    ) -> Tensor:
        """[1 or B, total, D]: text positions, or grid positions in rows of image codes."""
        if code_mask is None:
            return self.text_terms(total, device)
        codes = self.grid_position_norm(self.image_positions(self.code_ids(total, device)))[None]
        if bool(code_mask.all()):
            return codes
        return torch.where(code_mask[:, None, None], codes, self.text_terms(total, device))

    def relative_biases(
        self, past: int, total: int, code_mask: Tensor | None, device: torch.device
    ) -> list[RelativeBias]:
        """Per layer, the bias of queries past..total against keys 0..total."""
        if code_mask is None:
            layout = RelativeLayout(total)
            query, key = (x[None] for x in layout.text_codes(torch.arange(total, device=device)))
        else:
            ids = self.code_ids(total, device)
            side = self.config.code_image_size // 8
            if total > side * side + 1:  # places behind the image share a cell outside it
                side = self.config.image_bucket_size
            layout = RelativeLayout(total, side, side, start_slot=True)
            text = layout.text_codes(torch.arange(total, device=device))
            codes = layout.grid_codes(*grid_cells(ids, self.config.image_bucket_size), ids == 0)
            query, key = (
                torch.where(code_mask[:, None], code, word)
                for code, word in zip(codes, text, strict=True)
            )
        query = query[:, past:]
        return [RelativeBias(table, query, key) for table in self.relative.tables(layout)]

    def cross_key(self, encoder: EncoderOutput, cache: Cache | None) -> Tensor:
        """The encoder's side of the cross-attention positions, projected once a sequence.

        Beams of a sentence share the encoder's positions, so the cached part needs no reordering.
        """
        kept = getattr(cache, "cross_position_key", None)
        if kept is None:
            kept = position_projection(
                self.cross_position_key, encoder.position_embeddings, self.config
            )
            if cache is not None:
                cache.cross_position_key = kept
        return kept

    def forward(
        self,
        embedded: Tensor,
        encoder: EncoderOutput,
        padding_mask: Tensor | None = None,
        code_mask: Tensor | None = None,
        cache: Cache | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> DecoderOutput:
        """Decode.

        Args:
            embedded: token embeddings [B, U, D]; with a cache, only of the tokens not yet seen.
            encoder: the encoder's output for the same rows.
            padding_mask: bool [B, past + U], True at padding.
            code_mask: bool [B], True in rows that generate image codes.
            cache: keys and values of earlier steps.
        """
        device = embedded.device
        past = 0 if cache is None else cache.get_seq_length()
        total = past + embedded.shape[1]
        positions = self.position_embeddings(total, code_mask, device)
        query = positions[:, past:]
        self_terms = PositionTerms(
            position_projection(self.self_position_query, query, self.config),
            position_projection(self.self_position_key, positions, self.config),
        )
        cross_terms = PositionTerms(
            position_projection(self.cross_position_query, query, self.config),
            self.cross_key(encoder, cache),
        )
        x = self.embed(embedded, code_mask)
        states, attentions = [x], []
        normed = self.layers[0].self_attn_norm(x)
        for layer, bias, norm in zip(
            self.layers,
            self.relative_biases(past, total, code_mask, device),
            next_norms(self.layers, self.norm),
            strict=True,
        ):
            x, normed, probabilities = run_layer(
                layer,
                self.gradient_checkpointing and self.training,
                x,
                normed,
                norm,
                self_terms,
                bias,
                padding_mask,
                encoder.last_hidden_state,
                cross_terms,
                encoder.padding_mask,
                cache,
                output_attentions,
            )
            if output_hidden_states:
                states.append(x)
            if output_attentions:
                attentions.append(probabilities)
        return DecoderOutput(
            last_hidden_state=normed,
            hidden_states=tuple(states) if output_hidden_states else None,
            cross_attentions=tuple(attentions) if output_attentions else None,
        )
