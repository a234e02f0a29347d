"""UnivalForConditionalGeneration: the model users load, train and generate with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import ModelOutput

from unival.kernels.linear_cross_entropy.op import linear_cross_entropy
from unival.model.audio_encoder import AudioEncoder, LogMel, mel_filters
from unival.model.configuration import UnivalConfig
from unival.model.decoder import Decoder
from unival.model.encoder import Encoder, EncoderOutput, RelativeTables
from unival.model.image_encoder import Bottleneck2d
from unival.model.positions import text_buckets
from unival.model.transformer import Attention, FeedForward
from unival.model.video_encoder import VideoEncoder


@dataclass
class UnivalOutput(ModelOutput):
    """loss (mean over target tokens), logits [B, U, V], the cache and what was asked for."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    decoder_last_hidden_state: Tensor | None = None
    decoder_hidden_states: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None
    encoder_last_hidden_state: Tensor | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    encoder_padding_mask: Tensor | None = None


class UnivalForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """UnIVAL (and, with a three-stage image encoder, OFA).

    Logits are the decoder's states times the token embedding, which input and output share.
    """

    config_class = UnivalConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_cache_class = True

    def __init__(self, config: UnivalConfig) -> None:
        super().__init__(config)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Initial values of the original: N(0, 0.02) for linear maps and embeddings, the relative
        tables and the padding row included; each CNN by its own rule."""
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, 0.0, std)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, 0.0, std)
        elif isinstance(module, nn.LayerNorm | nn.BatchNorm2d | nn.BatchNorm3d):
            init.ones_(module.weight)
            init.zeros_(module.bias)
            if not isinstance(module, nn.LayerNorm):
                init.zeros_(module.running_mean)
                init.ones_(module.running_var)
                init.zeros_(module.num_batches_tracked)
        elif isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Conv3d):
            init.normal_(module.weight, 0.0, VideoEncoder.init_std(module))
        elif isinstance(module, Attention):
            init.ones_(module.head_scale)
        elif isinstance(module, FeedForward) and module.residual_scale is not None:
            init.ones_(module.residual_scale)
        elif isinstance(module, LogMel):
            init.copy_(module.filters, mel_filters(module.sample_rate, module.mel_bins))
            init.copy_(module.window, torch.hann_window(module.window.numel(), periodic=True))
        elif isinstance(module, RelativeTables):
            buckets = text_buckets(self.config.token_bucket_size, self.config.max_text_positions)
            init.copy_(module.text_bucket, buckets)
        elif isinstance(module, AudioEncoder):
            for block in range(1, module.num_blocks + 1):
                for conv in (f"conv_block{block}.conv1", f"conv_block{block}.conv2"):
                    init.xavier_uniform_(module.get_submodule(conv).weight)
        elif isinstance(module, Bottleneck2d):
            # As timm does, residual branches of the image encoder start at zero.
            init.zeros_(module.bn3.weight)

    def get_encoder(self, *_: Any, **__: Any) -> Encoder:
        return self.encoder

    def get_decoder(self, *_: Any, **__: Any) -> Decoder:
        return self.decoder

    def get_input_embeddings(self) -> nn.Embedding:
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.encoder.embed_tokens = value

    def logits(self, states: Tensor) -> Tensor:
        """[..., D] decoder states to [..., V]."""
        return F.linear(states, self.encoder.embed_tokens.weight)

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """Shift labels right behind <s>; ignored positions become padding."""
        shifted = labels.roll(1, dims=-1)
        shifted[:, 0] = self.config.decoder_start_token_id
        return shifted.masked_fill(shifted == -100, self.config.pad_token_id)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Cache | None = None,
        encoder_outputs: EncoderOutput | None = None,
        code_mask: Tensor | None = None,
        use_cache: bool = True,
        **_: Any,
    ) -> dict[str, Any]:
        """Inputs of one decoding step: the tokens the cache has not seen."""
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        return {
            "input_ids": None,
            "decoder_input_ids": input_ids[:, seen:],
            "past_key_values": past_key_values,
            "encoder_outputs": encoder_outputs,
            "code_mask": code_mask,
            "use_cache": use_cache,
        }

    def _embed(self, input_ids: Tensor, decoder_input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of both by one lookup: its gradient is as large as the vocabulary."""
        both = (input_ids, decoder_input_ids)
        tokens = self.encoder.embed_tokens(torch.cat([ids.flatten() for ids in both]))
        source, target = tokens.split([ids.numel() for ids in both])
        return source.view(*input_ids.shape, -1), target.view(*decoder_input_ids.shape, -1)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        video_values: Tensor | None = None,
        audio_values: Tensor | None = None,
        media_index: Tensor | None = None,
        patch_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        code_mask: Tensor | None = None,
        labels: Tensor | None = None,
        encoder_outputs: EncoderOutput | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        output_logits: bool = True,
        inputs_embeds: Tensor | None = None,
        **_: Any,
    ) -> UnivalOutput:
        """Run the model on text and at most one medium.

        Args:
            input_ids: int64 [B, T], right-padded with 1.
            attention_mask: [B, T], 0 at padding; made from input_ids where absent.
            pixel_values: [R, 3, h, w] normalised images.
            video_values: [R, 3, F, h, w] normalised clips.
            audio_values: [R, L] waveforms in [-1, 1], or [R, 1 + L // hop, mel_bins] of LogMel.
            media_index: int64 [B], the medium of each row, so that rows can share one. Absent: R =
            B. patch_mask: bool [B]; False hides the medium from a row.
            decoder_input_ids: int64 [B, U]; made from labels where absent.
            code_mask: bool [B]; True in rows whose decoder writes image codes.
            labels: int64 [B, U], -100 where there is no loss.
            encoder_outputs: skips the encoder.
            output_logits: False leaves logits None; a loss is then made without them.
            inputs_embeds: [B, T, D] instead of input_ids, what the token embedding gives for them;
                padding is then what attention_mask says alone.

        Raises:
            ValueError: neither decoder inputs nor labels, a medium without encoder, or not one of
                input_ids and inputs_embeds.
        """
        if decoder_input_ids is None:
            if labels is None:
                raise ValueError("give decoder_input_ids, or labels to make them from")
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        target_embeds = None
        if encoder_outputs is None:
            if input_ids is not None and inputs_embeds is None:
                if attention_mask is None:
                    attention_mask = input_ids != self.config.pad_token_id
                inputs_embeds, target_embeds = self._embed(input_ids, decoder_input_ids)
                input_ids = None
            encoder_outputs = self.encoder(
                input_ids,
                attention_mask,
                pixel_values,
                video_values,
                audio_values,
                media_index,
                patch_mask,
                output_hidden_states,
                inputs_embeds,
            )
        if target_embeds is None:
            target_embeds = self.encoder.embed_tokens(decoder_input_ids)
        if use_cache and past_key_values is None:
            past_key_values = EncoderDecoderCache(DynamicCache(), DynamicCache())
        padding = None
        if past_key_values is None or past_key_values.get_seq_length() == 0:
            padding = (
                decoder_input_ids == self.config.pad_token_id
                if decoder_attention_mask is None
                else decoder_attention_mask == 0
            )
        decoded = self.decoder(
            target_embeds,
            encoder_outputs,
            padding,
            code_mask,
            past_key_values,
            output_hidden_states,
            output_attentions,
        )
        states = decoded.last_hidden_state
        logits = self.logits(states) if output_logits else None
        loss = None
        if labels is not None and logits is not None:
            loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        elif labels is not None:
            sums = linear_cross_entropy(
                states.flatten(0, 1),
                self.encoder.embed_tokens.weight,
                labels.flatten(),
                backend=self.config.kernel_backend,
            )
            loss = sums.loss / sums.tokens
        return UnivalOutput(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values,
            decoder_last_hidden_state=states,
            decoder_hidden_states=decoded.hidden_states,
            cross_attentions=decoded.cross_attentions,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_padding_mask=encoder_outputs.padding_mask,
        )
