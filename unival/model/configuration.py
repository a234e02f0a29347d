"""The model's shape: every field of UnivalConfig and its released value."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from transformers import PreTrainedConfig

# How a model runs, not what it is: never saved with it.
EXECUTION = ("attention_backend", "kernel_backend")


class UnivalConfig(PreTrainedConfig):
    """Configuration of UnIVAL and of OFA (the defaults are `unival_base` with image and video).

    An encoder of a medium is present when its `*_layers` is not None. The image encoder is a ResNet
    whose number of stages is len(image_layers): four for UnIVAL (stride 32), three for OFA (stride
    16).

    Args:
        vocab_size: text entries, `<mask>`, image codes and location bins.
        num_text_positions: rows of the absolute text position tables.
        max_text_positions: longest text; also the extent of the text relative-position buckets.
        token_bucket_size: text offsets up to half of this are told apart exactly.
        image_bucket_size: side of the position grid of image, video and audio tokens.
        code_image_size: pixels of a generated image; its side in codes is this divided by 8.
        attn_scale_factor: scores are scaled by (head width * this)^-1/2.
        scale_resids: a learned scale on the residual of the feed-forward block (off when released).
        sample_patch_num: keep a random subset of at most this many tokens of the medium.
        num_virtual_tokens: of a soft prompt that is put before every text of the encoder.
        hop_size: STFT hop in samples. Released audio runs: 200.
        audio_dropout: after each pooled block of the audio encoder, in training.
        spec_augment: hide stripes of the spectrogram in training.
        attention_backend: auto, triton, sdpa, flash_attn or eager (unival.kernels.attention.op).
        kernel_backend: of norms and loss: auto, triton or torch. The two backends are not saved.
    """

    model_type = "unival"
    keys_to_ignore_at_inference = ("past_key_values",)
    attribute_map = {  # noqa: RUF012  (transformers reads a plain dict)
        "hidden_size": "d_model",
        "num_hidden_layers": "decoder_layers",
        "num_attention_heads": "num_heads",
    }

    def __init__(
        self,
        vocab_size: int = 59457,
        d_model: int = 768,
        ffn_dim: int = 3072,
        encoder_layers: int = 6,
        decoder_layers: int = 6,
        num_heads: int = 12,
        dropout: float = 0.1,
        encoder_drop_path: float = 0.1,
        decoder_drop_path: float = 0.1,
        num_text_positions: int = 1026,
        max_text_positions: int = 1024,
        token_bucket_size: int = 256,
        image_bucket_size: int = 42,
        code_image_size: int = 128,
        attn_scale_factor: float = 2.0,
        scale_resids: bool = False,
        sample_patch_num: int | None = None,
        num_virtual_tokens: int = 0,
        image_layers: Sequence[int] | None = (3, 4, 23, 3),
        image_channels: Sequence[int] = (64, 128, 256, 512),
        video_layers: Sequence[int] | None = (3, 4, 23, 3),
        video_channels: Sequence[int] = (128, 256, 512, 1024),
        video_cardinality: int = 32,
        audio_channels: Sequence[int] | None = None,
        mel_bins: int = 64,
        hop_size: int = 200,
        audio_sample_rate: int = 48000,
        audio_dropout: float = 0.2,
        spec_augment: bool = True,
        initializer_range: float = 0.02,
        attention_backend: str = "auto",
        kernel_backend: str = "auto",
        **kwargs: Any,
    ) -> None:
        if d_model % num_heads:
            raise ValueError(f"d_model {d_model} is not a multiple of num_heads {num_heads}")
        if image_layers is not None and len(image_channels) < len(image_layers):
            raise ValueError("image_channels needs one entry for each stage of image_layers")
        if not 0 <= num_virtual_tokens < max_text_positions:
            raise ValueError(
                f"num_virtual_tokens {num_virtual_tokens} is not in 0..{max_text_positions - 1}, "
                "which leaves a place for a text"
            )
        self.vocab_size = vocab_size
        self.d_model = d_model
        self.ffn_dim = ffn_dim
        self.encoder_layers = encoder_layers
        self.decoder_layers = decoder_layers
        self.num_heads = num_heads
        self.dropout = dropout
        self.encoder_drop_path = encoder_drop_path
        self.decoder_drop_path = decoder_drop_path
        self.num_text_positions = num_text_positions
        self.max_text_positions = max_text_positions
        self.token_bucket_size = token_bucket_size
        self.image_bucket_size = image_bucket_size
        self.code_image_size = code_image_size
        self.attn_scale_factor = attn_scale_factor
        self.scale_resids = scale_resids
        self.sample_patch_num = sample_patch_num
        self.num_virtual_tokens = num_virtual_tokens
        self.image_layers = None if image_layers is None else list(image_layers)
        self.image_channels = list(image_channels)
        self.video_layers = None if video_layers is None else list(video_layers)
        self.video_channels = list(video_channels)
        self.video_cardinality = video_cardinality
        self.audio_channels = None if audio_channels is None else list(audio_channels)
        self.mel_bins = mel_bins
        self.hop_size = hop_size
        self.audio_sample_rate = audio_sample_rate
        self.audio_dropout = audio_dropout
        self.spec_augment = spec_augment
        self.initializer_range = initializer_range
        self.attention_backend = attention_backend
        self.kernel_backend = kernel_backend
        kwargs.setdefault("bos_token_id", 0)
        kwargs.setdefault("pad_token_id", 1)
        kwargs.setdefault("eos_token_id", 2)
        # The decoder starts from <s>, not from </s> as fairseq's models usually do.
        kwargs.setdefault("decoder_start_token_id", 0)
        kwargs.setdefault("is_encoder_decoder", True)
        super().__init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The fields that are saved."""
        return {name: x for name, x in super().to_dict().items() if name not in EXECUTION}

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: Any) -> UnivalConfig:
        """Read one of configs/model/*.yaml; a key that is not a field is an error."""
        fields = OmegaConf.to_container(OmegaConf.load(path))
        if not isinstance(fields, dict):
            raise ValueError(f"{path}: a model config is a mapping of field names to values")
        return cls.checked(str(path), {str(k): v for k, v in fields.items()} | overrides)

    @classmethod
    def checked(cls, origin: str, fields: dict[str, Any]) -> UnivalConfig:
        """Build from `fields`; an unknown one is a ValueError naming its origin and the nearest."""
        known = [*cls().to_dict(), *EXECUTION]
        for name in fields:
            if name not in known:
                nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
                raise ValueError(
                    f"{origin}: unknown model field {name!r}; did you mean {nearest!r}?"
                )
        return cls(**fields)
