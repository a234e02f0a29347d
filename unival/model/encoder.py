"""The encoder: one medium's tokens before the text's, untied positions, relative bias.

A soft prompt is virtual tokens of the text, before its first: the same to positions, biases and
masks as words with these embeddings.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import ModelOutput

from unival.kernels.attention.relative import RelativeBias, RelativeLayout
from unival.model.audio_encoder import AudioEncoder
from unival.model.configuration import UnivalConfig
from unival.model.image_encoder import ImageEncoder
from unival.model.norm import LayerNorm
from unival.model.positions import (
    audio_positions,
    audio_side,
    grid_cells,
    image_positions,
    num_grid_buckets,
    offset_buckets,
    slot_buckets,
    text_buckets,
    video_positions,
)
from unival.model.transformer import EncoderLayer, PositionTerms, next_norms, run_layer, split_heads
from unival.model.video_encoder import VideoEncoder

TEXT, MEDIUM = 0, 1  # rows of the type embedding


@dataclass
class EncoderOutput(ModelOutput):
    """What the decoder needs.

    last_hidden_state    [B, S, D], medium tokens first, then text
    padding_mask         bool [B, S], True at padding; None where there is none
    position_embeddings  [B, S, D], layer-normed; expanded from one row where all rows share
    positions
    hidden_states        input of every layer and output of the last, before the final norm
    """

    last_hidden_state: Tensor | None = None
    padding_mask: Tensor | None = None
    position_embeddings: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class MediaFeatures(NamedTuple):
    """What the encoder of a medium gives.

    features   [R, N, C]
    positions  grid position ids int64 [N]
    extent     rows and columns of the grid that the ids lie in
    """

    features: Tensor
    positions: Tensor
    extent: tuple[int, int]


def one_row(x: Tensor) -> Tensor:
    """The single row behind an expanded batch (stride 0), so that shared work is done once."""
    return x[:1] if x.stride(0) == 0 and x.shape[0] > 1 else x


def position_projection(linear: nn.Linear, positions: Tensor, config: UnivalConfig) -> Tensor:
    """Project position embeddings [B, S, D] to heads [B or 1, H, S, d]."""
    return split_heads(linear(one_row(positions)), config.num_heads)


class RelativeTables(nn.Module):
    """Per-layer relative position tables of one stack: text offsets and grid offsets."""

    text_bucket: Tensor

    def __init__(self, config: UnivalConfig, layers: int) -> None:
        super().__init__()
        self.grid = config.image_bucket_size
        self.max_positions = config.max_text_positions
        rows = 2 * config.token_bucket_size - 1
        grid_rows = num_grid_buckets(self.grid)
        self.text = nn.ModuleList(nn.Embedding(rows, config.num_heads) for _ in range(layers))
        self.image = nn.ModuleList(nn.Embedding(grid_rows, config.num_heads) for _ in range(layers))
        self.register_buffer(
            "text_bucket", text_buckets(config.token_bucket_size, config.max_text_positions)
        )

    def tables(self, layout: RelativeLayout) -> list[Tensor]:
        """Per layer, the biases by offset [H, L] in the order of a layout."""
        device = self.text_bucket.device
        # Rows of image codes are longer than any text may be; no text offset of theirs is read.
        last = self.max_positions - 1
        text = self.text_bucket[layout.text_offsets(device).clamp(-last, last) + last]
        grid = slot = None
        if layout.rows:
            grid = offset_buckets(*layout.grid_offsets(device), self.grid)
        if layout.start_slot:
            slots = slot_buckets(self.grid)
            slot = torch.arange(slots.start, slots.stop, device=device)
        return [
            layout.table(
                text_table(text),
                None if grid is None else image_table(grid),
                None if slot is None else image_table(slot),
            )
            for text_table, image_table in zip(self.text, self.image, strict=True)
        ]


class Encoder(nn.Module):
    """Media encoders, projections and the transformer encoder."""

    main_input_name = "input_ids"

    def __init__(self, config: UnivalConfig) -> None:
        super().__init__()
        width = config.d_model
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.soft_prompt: nn.Embedding | None = None
        if config.num_virtual_tokens:
            self.soft_prompt = nn.Embedding(config.num_virtual_tokens, width)
        self.type_embedding = nn.Embedding(2, width)
        self.token_norm = LayerNorm(width, config)
        self.patch_norm = LayerNorm(width, config)
        self.text_positions = nn.Embedding(config.num_text_positions, width)
        self.text_position_norm = LayerNorm(width, config)
        self.grid_position_norm = LayerNorm(width, config)
        self.position_query = nn.Linear(width, width)
        self.position_key = nn.Linear(width, width)
        self._add_media_encoders(config)
        self.relative = RelativeTables(config, config.encoder_layers)
        rates = torch.linspace(0.0, config.encoder_drop_path, config.encoder_layers, device="cpu")
        self.layers = nn.ModuleList(EncoderLayer(config, rate.item()) for rate in rates)
        self.norm = LayerNorm(width, config)
        self.gradient_checkpointing = False  # the name that transformers switches it on by

    def _add_media_encoders(self, config: UnivalConfig) -> None:
        cells = config.image_bucket_size**2 + 1
        encoders: dict[str, nn.Module] = {}
        if config.image_layers is not None:
            encoders["image"] = ImageEncoder(config.image_layers, config.image_channels)
        if config.video_layers is not None:
            encoders["video"] = VideoEncoder(
                config.video_layers, config.video_channels, config.video_cardinality
            )
        if config.audio_channels is not None:
            encoders["audio"] = AudioEncoder(
                config.audio_channels,
                config.mel_bins,
                config.hop_size,
                config.audio_sample_rate,
                config.audio_dropout,
                config.spec_augment,
            )
        for name, encoder in encoders.items():
            self.add_module(f"{name}_encoder", encoder)
            self.add_module(f"{name}_proj", nn.Linear(encoder.out_channels, config.d_model))
            self.add_module(f"{name}_positions", nn.Embedding(cells, config.d_model))

    def set_soft_prompt(self, vectors: Tensor) -> None:
        """Put virtual tokens [n, D] before every text, as a part of the model and of its config.

        Raises:
            ValueError: another width, or as many tokens as leave no place for a text.
        """
        width, limit = self.config.d_model, self.config.max_text_positions
        if vectors.ndim != 2 or vectors.shape[1] != width or not 0 < len(vectors) < limit:
            raise ValueError(
                f"a soft prompt of {list(vectors.shape)}; wanted [n, {width}] with n from 1 to "
                f"{limit - 1}"
            )
        own = self.embed_tokens.weight
        vectors = vectors.detach().to(own.device, own.dtype, copy=True)
        self.soft_prompt = nn.Embedding.from_pretrained(vectors, freeze=False)
        self.config.num_virtual_tokens = len(vectors)

    def media_features(self, medium: str, values: Tensor) -> MediaFeatures:
        """Encode one medium.

        Args:
            medium: image, video or audio.
            values: [R, 3, h, w], [R, 3, F, h, w] or [R, L].

        Raises:
            ValueError: the model has no encoder for the medium.
        """
        encoder = getattr(self, f"{medium}_encoder", None)
        if encoder is None:
            raise ValueError(
                f"this model has no {medium} encoder; set {medium}_layers (audio: audio_channels) "
                "in its config"
            )
        features = encoder(values)
        grid, device = self.config.image_bucket_size, features.device
        extent = (features.shape[-2], features.shape[-1])
        if medium == "image":
            positions = image_positions(*extent, grid, device)
        elif medium == "video":
            positions = video_positions(features.shape[-3], *extent, grid, device)
        else:
            tokens = features[0, 0].numel()
            positions = audio_positions(tokens, grid, device)
            extent = (audio_side(tokens), audio_side(tokens))
        return MediaFeatures(features.flatten(2).transpose(1, 2), positions, extent)

    def sample_patches(self, features: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Keep a random subset of tokens in random order: [R, n, C] and position ids [R, n].

        Drawn from Python's generator, row after row, as the released code does.
        """
        rows, tokens, _ = features.shape
        count = self.config.sample_patch_num
        order = torch.tensor([random.sample(range(tokens), count) for _ in range(rows)])
        order = order.to(features.device)
        return features.gather(1, order[..., None].expand(-1, -1, features.shape[-1])), positions[
            order
        ]

    def embed_medium(
        self, medium: str, values: Tensor, media_index: Tensor | None
    ) -> MediaFeatures:
        """Tokens [B, N, D] of a medium; grid position ids are [B, N] for random subsets."""
        features, positions, extent = self.media_features(medium, values)
        count = self.config.sample_patch_num
        if media_index is not None:
            features = features[media_index]
        if count is not None and count < features.shape[1]:
            features, positions = self.sample_patches(features, positions)
        tokens = getattr(self, f"{medium}_proj")(features) + self.type_embedding.weight[MEDIUM]
        tokens = F.dropout(self.patch_norm(tokens), self.config.dropout, self.patch_norm.training)
        return MediaFeatures(tokens, positions, extent)

    def embed_text(
        self, input_ids: Tensor | None, attention_mask: Tensor | None, inputs_embeds: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Tokens of the soft prompt and the text [B, n + T, D], and where they are padding.

        Positions are not added: they act through the scores only.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        tokens = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if attention_mask is not None:
            padding = attention_mask == 0
        elif input_ids is not None:
            padding = input_ids == self.config.pad_token_id
        else:
            padding = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        if self.soft_prompt is not None:
            virtual = torch.arange(self.soft_prompt.num_embeddings, device=tokens.device)
            prompt = self.soft_prompt(virtual).expand(tokens.shape[0], -1, -1)
            tokens = torch.cat([prompt.to(tokens.dtype), tokens], dim=1)
            padding = F.pad(padding, (len(virtual), 0), value=False)
        if tokens.shape[1] > self.config.max_text_positions:
            virtual_tokens = self.config.num_virtual_tokens
            own = f" after {virtual_tokens} virtual ones" if virtual_tokens else ""
            raise ValueError(
                f"input_ids has {tokens.shape[1] - virtual_tokens} tokens a row{own}; the model's "
                f"limit is {self.config.max_text_positions}"
            )
        tokens = tokens + self.type_embedding.weight[TEXT]
        # The mode is the norm's, not the encoder's: where only projections are trained, the words
        # stay what they were.
        tokens = F.dropout(self.token_norm(tokens), self.config.dropout, self.token_norm.training)
        return tokens, padding

    def relative_biases(self, text: int, media: MediaFeatures | None) -> list[RelativeBias]:
        """Per layer, the biases of text against text and of medium against medium."""
        rows, columns = (0, 0) if media is None else media.extent
        layout = RelativeLayout(text, rows, columns)
        device = self.relative.text_bucket.device
        query, key = (x[None] for x in layout.text_codes(torch.arange(text, device=device)))
        if media is not None:
            cells = grid_cells(media.positions, self.config.image_bucket_size)
            grid = [x if x.ndim == 2 else x[None] for x in layout.grid_codes(*cells)]
            batch = grid[0].shape[0]
            query, key = (
                torch.cat([medium, words.expand(batch, -1)], dim=1)
                for medium, words in zip(grid, (query, key), strict=True)
            )
        return [RelativeBias(table, query, key) for table in self.relative.tables(layout)]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        video_values: Tensor | None = None,
        audio_values: Tensor | None = None,
        media_index: Tensor | None = None,
        patch_mask: Tensor | None = None,
        output_hidden_states: bool = False,
        inputs_embeds: Tensor | None = None,
        **_: object,
    ) -> EncoderOutput:
        """Encode text and at most one medium; arguments as in UnivalForConditionalGeneration."""
        x, padding = self.embed_text(input_ids, attention_mask, inputs_embeds)
        batch, length = padding.shape
        text = torch.arange(length, device=x.device)
        positions = self.text_position_norm(self.text_positions(text)).unsqueeze(0)
        embedded = None
        media = {"image": pixel_values, "video": video_values, "audio": audio_values}
        given = [name for name, values in media.items() if values is not None]
        if len(given) > 1:
            raise ValueError(f"one medium a batch: got {' and '.join(given)}")
        if given:
            medium = given[0]
            embedded = self.embed_medium(medium, media[medium], media_index)
            tokens, grid, _ = embedded
            if tokens.shape[0] != batch:
                raise ValueError(
                    f"{tokens.shape[0]} rows of {medium} for {batch} rows of input_ids; "
                    "use media_index to share a medium between rows"
                )
            x = torch.cat([tokens, x], dim=1)
            table = getattr(self, f"{medium}_positions")
            found = self.grid_position_norm(table(grid if grid.ndim == 2 else grid[None]))
            positions = torch.cat([found, positions.expand(found.shape[0], -1, -1)], dim=1)
            absent = padding.new_zeros(batch, tokens.shape[1])
            if patch_mask is not None:
                absent = absent | ~patch_mask[:, None]
            padding = torch.cat([absent, padding], dim=1)
        x = x.masked_fill(padding[..., None], 0.0)
        terms = PositionTerms(
            position_projection(self.position_query, positions, self.config),
            position_projection(self.position_key, positions, self.config),
        )
        states: Sequence[Tensor] = [x]
        normed = self.layers[0].self_attn_norm(x)
        recompute = self.gradient_checkpointing and self.training
        for layer, bias, norm in zip(
            self.layers,
            self.relative_biases(length, embedded),
            next_norms(self.layers, self.norm),
            strict=True,
        ):
            x, normed = run_layer(layer, recompute, x, normed, norm, terms, bias, padding)
            if output_hidden_states:
                states = [*states, x]
        return EncoderOutput(
            last_hidden_state=normed,
            padding_mask=padding,
            position_embeddings=positions.expand(batch, -1, -1),
            hidden_states=tuple(states) if output_hidden_states else None,
        )
