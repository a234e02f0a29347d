"""LoRA and prompt tuning through the `peft` library, on the model itself.

The adapter is put into the model before training and taken up in its weights when they are saved,
so what is between and behind (engine, checkpoints, search) works on an ordinary model. It can also
be saved alone, as `peft` saves it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from unival.model.modeling import UnivalForConditionalGeneration
from unival.training.freezing import freeze
from unival.vocabulary import Vocabulary

KINDS = ("lora", "prompt")
# Linear maps of attention (self and cross) and of the feed-forward blocks.
TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
TASK = "SEQ_2_SEQ_LM"  # peft's name for encoder-decoders
LORA_A, LORA_B = ".lora_A.default.weight", ".lora_B.default.weight"


@dataclass
class Adapter:
    """What is trained instead of the model's own weights.

    kind            lora: W + alpha / rank * B A instead of W in linear maps; prompt: vectors before
                    every text
    rank            lora: rows of A and columns of B
    alpha           lora: see above
    dropout         lora: of the input of A, in training
    targets         lora: names of TARGETS; a name is that map in all layers of both stacks
    virtual_tokens  prompt: how many vectors
    init_text       prompt: the embeddings of its tokens, over and over, are the first vectors;
                    absent: those of tokens drawn at random

    Raises:
        ValueError: names the field that cannot be.
    """

    kind: str
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: list[str] = field(default_factory=lambda: [*TARGETS[:4]])
    virtual_tokens: int = 20
    init_text: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"adapter.kind={self.kind!r}; known: {', '.join(KINDS)}")
        for name in ("rank", "virtual_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"adapter.{name}={getattr(self, name)}; wanted at least 1")
        if not self.alpha > 0.0:
            raise ValueError(f"adapter.alpha={self.alpha}; wanted more than 0")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"adapter.dropout={self.dropout}; wanted 0 or more and less than 1")
        unknown = [name for name in self.targets if name not in TARGETS]
        if unknown or not self.targets:
            raise ValueError(f"adapter.targets={self.targets}; wanted some of {', '.join(TARGETS)}")
        if self.init_text is not None and self.kind != "prompt":
            raise ValueError("adapter.init_text is of kind prompt alone")
        if self.init_text is not None and not self.init_text.strip():
            raise ValueError(f"adapter.init_text={self.init_text!r} has no text")

    @property
    def scale(self) -> float:
        """Of LoRA's B A."""
        return self.alpha / self.rank


def add_adapter(
    model: UnivalForConditionalGeneration, adapter: Adapter, vocabulary: Vocabulary
) -> None:
    """Put an adapter into a model and freeze everything else.

    LoRA begins with B = 0, the model as it was; A, and a prompt without `init_text`, are drawn from
    torch's generator. A prompt of this length that the model has already is trained on.

    Raises:
        ImportError: the `peft` library is not installed.
        ValueError: the model has LoRA in it, or another prompt already.
    """
    _require_peft()
    if adapter.kind == "lora":
        from peft import inject_adapter_in_model

        if any(LORA_A in name for name, _ in model.named_parameters()):
            raise ValueError("adapter: this model has LoRA in its linear maps already")
        inject_adapter_in_model(_peft_config(adapter), model)
    elif model.encoder.soft_prompt is None:
        model.encoder.set_soft_prompt(_first_vectors(model, adapter, vocabulary))
    elif model.config.num_virtual_tokens != adapter.virtual_tokens or adapter.init_text:
        raise ValueError(
            f"adapter.virtual_tokens={adapter.virtual_tokens}, init_text={adapter.init_text!r}: "
            f"this model has a soft prompt of {model.config.num_virtual_tokens} already, which can "
            "only be trained on as it is"
        )
    freeze(model, ["all_but_adapter"], ["image", "video", "audio"])


def _require_peft() -> None:
    if find_spec("peft") is None:
        raise ImportError("adapters want the `peft` library: pip install 'unival[peft]'")


def _peft_config(adapter: Adapter) -> Any:
    from peft import LoraConfig, PromptTuningConfig

    if adapter.kind == "prompt":
        return PromptTuningConfig(
            task_type=TASK,
            num_virtual_tokens=adapter.virtual_tokens,
            num_transformer_submodules=1,  # the encoder; the decoder has no virtual tokens
            prompt_tuning_init="SAMPLE_VOCAB",
        )
    return LoraConfig(
        task_type=TASK,
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]
        lora_dropout=adapter.dropout,
        target_modules=[*adapter.targets],
    )


def _first_vectors(
    model: UnivalForConditionalGeneration, adapter: Adapter, vocabulary: Vocabulary
) -> Tensor:
    """[n, D] embeddings of a text's tokens, repeated or cut, or of tokens drawn by `peft`."""
    embedding = model.get_input_embeddings()
    if adapter.init_text is None:
        from peft import PromptEmbedding

        config = _peft_config(adapter)
        config.token_dim = model.config.d_model
        return PromptEmbedding(config, embedding).embedding.weight
    tokens = vocabulary.encode_text(f" {adapter.init_text.strip()}")
    return embedding.weight[[*islice(cycle(tokens), adapter.virtual_tokens)]]


def merged_state(state: Mapping[str, Tensor], adapter: Adapter) -> dict[str, Tensor]:
    """The weights of a model with LoRA in it as those of a plain model: W + scale * B A for each W.

    Args:
        state: a state_dict of a model that `add_adapter` has changed. That of a soft prompt is a
            plain one already.
    """
    merged = {}
    for name, tensor in state.items():
        if ".lora_" in name:
            continue
        module, base, leaf = name.rpartition(".base_layer.")
        if base and leaf == "weight":
            a, b = state[module + LORA_A], state[module + LORA_B]
            tensor = (tensor.float() + adapter.scale * (b.float() @ a.float())).to(tensor.dtype)
        merged[f"{module}.{leaf}" if base else name] = tensor
    return merged


def save_adapter(state: Mapping[str, Tensor], adapter: Adapter, folder: str | Path) -> None:
    """Write the adapter alone, as `peft.PeftModel.from_pretrained(base, folder)` reads it.

    Args:
        state: a state_dict of a model that `add_adapter` has changed.
        folder: gets adapter_config.json and adapter_model.safetensors; made where it is not there.

    Raises:
        ImportError: the `peft` library is not installed.
    """
    _require_peft()
    if adapter.kind == "prompt":
        found = {"prompt_embeddings": state["encoder.soft_prompt.weight"]}
    else:
        found = {
            f"base_model.model.{name.replace('.default.', '.')}": tensor
            for name, tensor in state.items()
            if name.endswith((LORA_A, LORA_B))
        }
    Path(folder).mkdir(parents=True, exist_ok=True)
    config = _peft_config(adapter)
    config.inference_mode = True
    config.save_pretrained(folder)
    contiguous = {name: tensor.detach().contiguous() for name, tensor in found.items()}
    save_file(contiguous, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})
