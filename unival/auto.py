"""Makes the Auto classes of transformers know UnIVAL."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoProcessor

from unival.model.configuration import UnivalConfig
from unival.model.modeling import UnivalForConditionalGeneration
from unival.processing import UnivalProcessor


def register() -> None:
    """Register config, model and processor; calling it again changes nothing."""
    AutoConfig.register(UnivalConfig.model_type, UnivalConfig, exist_ok=True)
    AutoModelForSeq2SeqLM.register(UnivalConfig, UnivalForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(UnivalConfig, UnivalProcessor, exist_ok=True)
