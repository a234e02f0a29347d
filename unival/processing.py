"""UnivalProcessor: text and media to the model's arguments, saved next to a model."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from unival.data.batch import MEDIUM_KEYS, collate
from unival.data.media import MediaOptions
from unival.data_gpu.audio import decode_waveform, repeat_pad, through_int16
from unival.data_gpu.image import decode_image, exact_plan, image_to_array, render
from unival.data_gpu.resize import resize
from unival.data_gpu.video import decode_clip, frame_indices
from unival.tasks.base import Example
from unival.vocabulary import BOS, EOS, Vocabulary

ENCODED = (bytes, str, Path)


class UnivalProcessor(ProcessorMixin):
    """Text, pictures, films and sounds to the arguments of UnivalForConditionalGeneration.

    Media are prepared as in evaluation: nothing is random.

    Args:
        tokenizer: of `unival.vocabulary.build_tokenizer`.
        media: fields of `MediaOptions`; saved in processor_config.json.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, media: dict[str, Any] | None = None
    ) -> None:
        self.media = asdict(MediaOptions(**(media or {})))
        super().__init__(tokenizer)

    @property
    def options(self) -> MediaOptions:
        return MediaOptions(**self.media)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "media_index", *MEDIUM_KEYS.values()]

    def __call__(
        self,
        text: str | Sequence[str],
        images: Any = None,
        videos: Any = None,
        audio: Any = None,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """Prepare one batch.

        Args:
            text: a prompt, or one per row. A space is put in front where it is missing, because
                the prompts of all tasks start with one.
            images: encoded bytes, path, PIL picture or uint8 [H, W, 3]; or a list of them.
            videos: encoded bytes, path or uint8 [F, H, W, 3]; or a list.
            audio: encoded bytes, path or mono waveform [L] at the options' sample rate; or a list.
            return_tensors: only "pt".

        Returns:
            input_ids int64 [B, T], attention_mask bool [B, T], and pixel_values [R, 3, H, W],
            video_values [R, 3, F, H, W] or audio_values [R, L]; media_index where R differs from B.

        Raises:
            ValueError: two media, a number of media that is neither one nor the number of texts,
                a medium that cannot be decoded.
        """
        if return_tensors != "pt":
            raise ValueError(f"return_tensors={return_tensors!r}; only 'pt' is supported")
        vocabulary = Vocabulary(tokenizer=self.tokenizer)
        texts = [text] if isinstance(text, str) else list(text)
        sources = [vocabulary.source(t if t.startswith(" ") else f" {t}") for t in texts]
        medium, media = self._load({"image": images, "video": videos, "audio": audio})
        if medium != "text" and len(media) not in (1, len(texts)):
            raise ValueError(
                f"{len(texts)} texts with {len(media)} media: one each, or one for all"
            )
        shared = medium != "text" and len(media) != len(texts)
        examples = [
            (Example(source, [BOS], [EOS]), 0 if shared else row)
            for row, source in enumerate(sources)
        ]
        batch = collate(examples, media, medium)
        names = ["input_ids", "attention_mask", *(["media_index"] if shared else [])]
        names += [MEDIUM_KEYS[medium]] if medium != "text" else []
        return BatchFeature({name: batch[name] for name in names})

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = True) -> list[str]:
        """Texts of generated ids; bins and codes stay as `<bin_17>`."""
        return self.tokenizer.batch_decode(sequences, skip_special_tokens=skip_special_tokens)

    def _load(self, given: dict[str, Any]) -> tuple[str, list[Tensor]]:
        chosen = [name for name, values in given.items() if values is not None]
        if len(chosen) > 1:
            raise ValueError(f"one medium a batch: got {' and '.join(chosen)}")
        if not chosen:
            return "text", []
        values = given[chosen[0]]
        values = list(values) if isinstance(values, list | tuple) else [values]
        loaders: dict[str, Callable[[Any], Tensor]] = {
            "image": self._image,
            "video": self._video,
            "audio": self._audio,
        }
        return chosen[0], [loaders[chosen[0]](value) for value in values]

    def _image(self, value: Any) -> Tensor:
        """uint8 [3, size, size]."""
        if isinstance(value, ENCODED):
            picture = decode_image(_media(value))
        elif isinstance(value, Image.Image):
            picture = value.convert("RGB")
        else:
            picture = Image.fromarray(_pixels(value, 3, "an image is uint8 [H, W, 3]"))
        plan = exact_plan(self.options.image_size)
        return torch.from_numpy(image_to_array(render(picture, plan)))

    def _video(self, value: Any) -> Tensor:
        """uint8 [3, F, size, size]."""
        frames, size = self.options.video_frames, self.options.video_size
        if isinstance(value, ENCODED):
            mode = self.options.fixed().video_transform
            return torch.from_numpy(decode_clip(_media(value), frames, size, mode=mode))
        clip = _pixels(value, 4, "a video is uint8 [F, H, W, 3]")
        chosen = frame_indices(frames, len(clip), "uniform", random.Random(0))
        resized = resize(clip[chosen], size, size)
        return torch.from_numpy(np.ascontiguousarray(resized.transpose(3, 0, 1, 2)))

    def _audio(self, value: Any) -> Tensor:
        """float32 [audio_samples]."""
        samples, rate = self.options.audio_samples, self.options.audio_sample_rate
        if isinstance(value, ENCODED):
            return torch.from_numpy(decode_waveform(_media(value), samples, rate))
        wave = np.asarray(value)
        if wave.ndim != 1 or not len(wave) or wave.dtype.kind != "f":
            raise ValueError(
                f"a sound is a float waveform [L], got {wave.dtype} {list(wave.shape)}"
            )
        if not np.isfinite(wave).all():
            raise ValueError("a sound holds samples that are not finite")
        start = max(0, (len(wave) - samples) // 2)  # the middle, as `decode_waveform` takes
        wave = wave.astype(np.float32)[start : start + samples]
        return torch.from_numpy(repeat_pad(through_int16(wave), samples))


def _media(value: bytes | str | Path) -> bytes | Path:
    return value if isinstance(value, bytes) else Path(value)


def _pixels(value: Any, dims: int, wanted: str) -> np.ndarray:
    array = np.ascontiguousarray(value)
    if array.ndim != dims or array.shape[-1] != 3 or array.dtype != np.uint8 or not array.size:
        raise ValueError(f"{wanted}, got {array.dtype} {list(array.shape)}")
    return array
