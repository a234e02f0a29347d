"""Operations, bytes and live memory of one training pass, counted from the real modules.

The model is made on torch's meta device, where tensors have shapes and no values: a forward and a
backward pass of it run every operator that a real pass runs, in seconds and in no memory. Each
operator is recorded with its module, its floating-point operations (torch's registered formulas
and ours) and the bytes of its inputs and outputs, each tensor once.

Counted as operations: convolutions, matrix products, attention and the loss over the vocabulary.
Everything else counts as bytes alone.
"""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.hooks import RemovableHandle

from unival.data.batch import MEDIUM_KEYS
from unival.kernels.cpu import native
from unival.kernels.layernorm.op import layer_norm_op, residual_layer_norm_op
from unival.kernels.triton_tools.resources import tensor_bytes
from unival.model.batchnorm import BatchNorm2d, BatchNorm3d, finish, set_batchnorm_statistics
from unival.model.configuration import UnivalConfig
from unival.model.modeling import UnivalForConditionalGeneration
from unival.model.norm import LayerNorm
from unival.model.residual import Bottleneck
from unival.training.freezing import freeze
from unival.training.losses import Criterion

aten = torch.ops.aten
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ENCODERS = tuple(f"{medium}_encoder" for medium in MEDIUM_KEYS)
PARTS = (*ENCODERS, "projection", "lm_encoder", "lm_decoder", "loss")
KINDS = (
    "conv",
    "pointwise_conv",
    "grouped_conv",
    "matmul",
    "attention",
    "loss",
    "memory",
    "statistics",
)
# Operators that make or name memory without touching it.
UNTOUCHED = {"empty", "empty_like", "new_empty", "empty_strided", "promote_types", "_assert_async"}
# Operators that read as much of their first argument as they write.
LOOKUPS = {"embedding", "index", "index_select", "gather"}
# Norms by means and variances over a batch of maps, which a GPU reads twice.
STATISTICS = {"native_batch_norm", "native_batch_norm_backward", "cudnn_batch_norm"}
# Bytes from which a CPU's allocator gets memory from the system and gives it back at once: glibc's
# highest M_MMAP_THRESHOLD. Its pages cost more than what is written to them.
LARGE = 32 * 2**20


@dataclass(frozen=True)
class Work:
    """One forward and backward pass of a rank.

    medium      image, video, audio or text
    media_size  of one medium: (height, width), (frames, height, width), () for text; of a sound its
                spectrogram's (frames, mel bins), for the spectrogram itself is not counted
    media       how many different media; rows may share one
    rows        examples
    text        tokens of the encoder's text in a row
    target      tokens of the decoder in a row
    """

    medium: str
    media_size: tuple[int, ...]
    media: int
    rows: int
    text: int
    target: int

    def __post_init__(self) -> None:
        if self.medium != "text" and self.medium not in MEDIUM_KEYS:
            raise ValueError(f"medium {self.medium!r}; known: text, {', '.join(MEDIUM_KEYS)}")
        if min(self.rows, self.text, self.target, self.media, *self.media_size) < 1:
            raise ValueError(f"{self}: every size must be at least 1")
        if self.rows % self.media:
            raise ValueError(f"{self.rows} rows do not share {self.media} media evenly")


@dataclass(frozen=True)
class Training:
    """How a pass is computed.

    precision  fp32, bf16 or fp16
    fused      as on a GPU: each norm, with the residual sum or GELU before it, is one operator;
               without, as on this CPU, whose convolutions and compiled passes are counted
    """

    precision: str = "fp32"
    fused: bool = True
    recompute: bool = False
    batchnorm: str = "local"
    freeze: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.precision not in DTYPES:
            raise ValueError(f"precision {self.precision!r}; known: {', '.join(DTYPES)}")


@dataclass(frozen=True)
class Operation:
    """Calls of an operator that are alike; the numbers are of one of them.

    fresh  bytes of results of at least LARGE
    """

    part: str
    phase: str
    kind: str
    name: str
    flops: int
    bytes: int
    fresh: int = 0
    calls: int = 1


@dataclass(frozen=True)
class Counts:
    """What one pass takes.

    operations   in no order
    parameters   trained and frozen, of the whole model
    activations  the most bytes that lived at once beside parameters and their gradients
    """

    operations: tuple[Operation, ...]
    parameters: dict[str, int]
    activations: int

    def total(self, field: str, **wanted: str) -> int:
        """The sum of `flops`, `bytes` or 1 (`calls`) over operations, such as part="loss"."""
        found = 0
        for operation in self.operations:
            if all(getattr(operation, name) == value for name, value in wanted.items()):
                one = 1 if field == "calls" else getattr(operation, field)
                found += one * operation.calls
        return found


def count(config: UnivalConfig, work: Work, training: Training | None = None) -> Counts:
    """Count one pass of a model.

    Raises:
        ValueError: the model has no encoder for the medium, or `freeze` leaves nothing to train.
    """
    training = training or Training()
    model, parameters = _model(config, work.medium, training)
    recorder = Recorder()
    recorder.meta_is_cpu = not training.fused
    recorder.watch(model)
    with torch.device("meta"), recorder:
        loss = run_pass(model, make_batch(work, DTYPES[training.precision], "meta"))
        recorder.backward(loss)
    return Counts(tuple(recorder.operations()), parameters, recorder.peak)


def parameter_counts(
    config: UnivalConfig, media: Sequence[str], rules: Sequence[str] = ()
) -> dict[str, int]:
    """Trained and frozen parameters of a model in a stage that shows these media."""
    with torch.device("meta"):
        model = UnivalForConditionalGeneration(config)
    return freeze(model, rules, media)


def make_batch(work: Work, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """A batch of a pass, of zeros (images, clips and sounds: noise)."""
    rows, flags = work.rows, {"device": device, "dtype": torch.bool}
    batch = {
        "input_ids": torch.zeros(rows, work.text, dtype=torch.int64, device=device),
        "attention_mask": torch.ones(rows, work.text, **flags),  # type: ignore[call-overload]
        "decoder_input_ids": torch.zeros(rows, work.target, dtype=torch.int64, device=device),
        "labels": torch.zeros(rows, work.target, dtype=torch.int64, device=device),
    }
    if work.medium != "text":
        channels = () if work.medium == "audio" else (3,)
        shape = (work.media, *channels, *work.media_size)
        dtype = torch.float32 if work.medium == "audio" else dtype
        batch[MEDIUM_KEYS[work.medium]] = torch.randn(shape, dtype=dtype, device=device)
        index = torch.arange(work.media, device=device)
        batch["media_index"] = index.repeat_interleave(rows // work.media, output_size=rows)
    return batch


def run_pass(model: UnivalForConditionalGeneration, batch: dict[str, Tensor]) -> Tensor:
    """The summed loss of a batch, as the engine makes it."""
    tensors = dict(batch)
    labels = tensors.pop("labels")
    out = model(**tensors, output_logits=False)
    weight = model.get_input_embeddings().weight
    return Criterion().of_states(out.decoder_last_hidden_state, weight, labels).loss


def _model(
    config: UnivalConfig, medium: str, training: Training
) -> tuple[UnivalForConditionalGeneration, dict[str, int]]:
    """The model without values, ready for a pass, and its numbers of parameters."""
    if medium != "text" and not _has_encoder(config, medium):
        raise ValueError(f"the model has no {medium} encoder, which a micro-batch of it needs")
    with torch.device("meta"):
        model = UnivalForConditionalGeneration(config).train()
    model.to(dtype=DTYPES[training.precision])  # type: ignore[call-arg]
    set_batchnorm_statistics(model, training.batchnorm)  # type: ignore[arg-type]
    parameters = freeze(model, training.freeze, [medium])
    for stack in (model.encoder, model.decoder):
        stack.gradient_checkpointing = training.recompute
    if training.fused:
        run_as_on_gpu(model)
    for parameter in model.parameters():
        if parameter.requires_grad:  # a step's sums of gradients are the formula's (memory.py)
            parameter.register_post_accumulate_grad_hook(drop_gradient)
    return model, parameters


def _has_encoder(config: UnivalConfig, medium: str) -> bool:
    field = {"image": "image_layers", "video": "video_layers", "audio": "audio_channels"}[medium]
    return getattr(config, field) is not None


def drop_gradient(parameter: Tensor) -> None:
    """A hook for after a gradient is made."""
    parameter.grad = None


def run_as_on_gpu(model: nn.Module) -> None:
    """Let modules that do otherwise on a GPU call the operators that they call there.

    Norms are one operator; a bottleneck is its modules.
    """
    for module in model.modules():
        if isinstance(module, Bottleneck):
            module.is_one_function = _never  # type: ignore[method-assign]
        if isinstance(module, LayerNorm):
            module.forward = partial(_layer_norm, module, gelu=False)  # type: ignore[method-assign]
            module.of_gelu = partial(_layer_norm, module, gelu=True)  # type: ignore[method-assign]
            module.of_sum = partial(_sum_norm, module)  # type: ignore[method-assign]
        elif isinstance(module, BatchNorm2d | BatchNorm3d) and not module.folded:
            module.forward = partial(_batch_norm, module)  # type: ignore[method-assign]


def _never(x: Tensor) -> bool:
    return False


def _layer_norm(norm: LayerNorm, x: Tensor, gelu: bool) -> Tensor:
    return layer_norm_op(x, norm.weight, norm.bias, norm.eps, gelu)


def _sum_norm(
    norm: LayerNorm, residual: Tensor, branch: Tensor, dropout: float, drop_path: float
) -> tuple[Tensor, Tensor]:
    seed = torch.zeros(1, dtype=torch.int64, device=branch.device)
    rates = (dropout, drop_path)
    return residual_layer_norm_op(branch, residual, norm.weight, norm.bias, norm.eps, *rates, seed)


def _batch_norm(
    norm: BatchNorm2d | BatchNorm3d,
    x: Tensor,
    shortcut: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    trained = norm.statistics in ("local", "sync")
    weight, bias = norm.weight.float(), norm.bias.float()
    running = (norm.running_mean, norm.running_var)
    y = F.batch_norm(x, *running, weight, bias, trained, norm.momentum or 0.0, norm.eps)
    return finish(y, shortcut, relu)


class Recorder(native.Recorder):
    """Records every operator of a forward and backward pass, by module, and the memory that lives.

    An operator of the backward pass belongs to the module whose forward pass made the node of the
    graph that it runs in: nodes are numbered in the order in which they are made.

    Attributes:
        peak: the most bytes that tensors made under the recorder have held at once.
    """

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        """`clock` gives seconds; with it, operators are timed too."""
        super().__init__()
        self.clock = clock
        self.seconds: dict[tuple[str, str, str], float] = defaultdict(float)
        self.found: Counter[tuple[str, str, str, str, int, int, int]] = Counter()
        self.live = self.peak = 0
        self._stack = ["loss"]
        self._starts, self._owners = [0], ["loss"]
        self._backward = False
        self._hooks: list[RemovableHandle] = []
        self._storages: dict[int, weakref.ref] = {}

    def watch(self, model: UnivalForConditionalGeneration) -> None:
        """Tell the parts of a model apart."""
        modules = {"": "lm_decoder", "encoder": "lm_encoder", "decoder": "lm_decoder"}
        modules["encoder.embed_tokens"] = "lm_encoder"  # the decoder's words too
        for medium in MEDIUM_KEYS:
            modules |= {f"encoder.{medium}_encoder": f"{medium}_encoder"}
            modules |= {f"encoder.{medium}_proj": "projection"}
        for name, module in model.named_modules():
            if name in modules:
                enter = module.register_forward_pre_hook(partial(self._enter, modules[name]))
                self._hooks += [enter, module.register_forward_hook(self._leave)]

    def release(self) -> None:
        """Leave the watched model as it was."""
        for hook in self._hooks:
            hook.remove()

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass of a loss."""
        self._backward = True
        loss.backward()
        self._backward = False

    def operations(self) -> Iterator[Operation]:
        """What was recorded."""
        for key, calls in self.found.items():
            yield Operation(*key, calls)

    def _enter(self, part: str, *_: Any) -> None:
        self._stack.append(part)
        self._mark()

    def _leave(self, *_: Any) -> None:
        self._stack.pop()
        self._mark()

    def _mark(self) -> None:
        if not self._backward:  # modules run in backward too, where layers are recomputed
            self._starts.append(torch.autograd._get_sequence_nr())
            self._owners.append(self._stack[-1])

    def _part(self) -> str:
        node = torch._C._current_autograd_node() if self._backward else None
        if node is None:
            return self._stack[-1]
        return self._owners[max(bisect_right(self._starts, node._sequence_nr()) - 1, 0)]

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        start = self.clock() if self.clock else 0.0
        out = func(*args, **kwargs)
        seconds = self.clock() - start if self.clock else 0.0
        self._keep(out)
        name = func._schema.name.split("::")[1]
        if func.is_view or name in UNTOUCHED:
            return out
        kind, part = kind_of(func, args), self._part()
        phase = "backward" if self._backward else "forward"
        touched = touched_bytes(name, args, kwargs, out)
        flops = flops_of(func, args, kwargs, out)
        fresh = 0 if func._schema.is_mutable else fresh_bytes(out)
        self.found[part, phase, kind, name, flops, touched, fresh] += 1
        self.seconds[part, phase, kind] += seconds
        return out

    def compiled_pass(self, name: str, tensors: list[Tensor], run: Callable[[], None]) -> None:
        """Record a pass of kernels/cpu, which reads or writes each of its tensors."""
        start = self.clock() if self.clock else 0.0
        run()
        seconds = self.clock() - start if self.clock else 0.0
        part, phase = self._part(), "backward" if self._backward else "forward"
        touched = sum(map(tensor_bytes, tensors))
        self.found[part, phase, "memory", name, 0, touched, 0] += 1
        self.seconds[part, phase, "memory"] += seconds

    def _keep(self, out: Any) -> None:
        """Count what an operator allocated until it is freed."""
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self._storages:
                self._storages[key] = weakref.ref(storage, partial(self._free, key, size))
                self.live += size
        self.peak = max(self.peak, self.live)

    def _free(self, key: int, size: int, *_: Any) -> None:
        del self._storages[key]
        self.live -= size


def kind_of(func: Any, args: tuple[Any, ...]) -> str:
    """One of KINDS: what decides how near to the machine's ceilings an operator comes."""
    namespace, name = func._schema.name.split("::")
    if namespace == "unival":
        for kind, start in (("attention", "attention"), ("loss", "linear_cross_entropy")):
            if name.startswith(start):
                return kind
        if name.startswith("convolution"):
            weight = args[1] if name == "convolution_forward" else args[2]
            return "pointwise_conv" if weight.shape[2] == 1 else "conv"
        return "memory"
    if name in ("convolution", "convolution_backward"):
        weight, groups = (args[1], args[8]) if name == "convolution" else (args[2], args[9])
        if groups > 1:
            return "grouped_conv"
        return "pointwise_conv" if prod(weight.shape[2:]) == 1 else "conv"
    if name in STATISTICS:
        return "statistics"
    return "matmul" if func._overloadpacket in flop_registry else "memory"


def flops_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Floating-point operations of a call, 2 for a multiply-add."""
    packet = func._overloadpacket
    if packet is aten.convolution_backward:
        return _convolution_backward(args)
    formula = flop_registry.get(packet)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=out))


def _convolution_backward(args: tuple[Any, ...]) -> int:
    """One product for each gradient. torch's own formula forgets the groups in the weight's."""
    grad, x, weight, transposed, mask = args[0], args[1], args[2], args[7], args[10]
    places = x if transposed else grad
    one = 2 * places.shape[0] * prod(places.shape[2:]) * weight.numel()
    return one * (int(mask[0]) + int(mask[1]))


def touched_bytes(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Bytes of a call's inputs and outputs, each tensor once; broadcast dimensions count once.

    A lookup reads as much of its table as it gives. What is written where it was read counts twice.
    """
    outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
    inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    written = sum(tensor_bytes(x) for x in outputs)
    if name in LOOKUPS:
        return 2 * written + sum(tensor_bytes(x) for x in inputs[1:])
    if name in ("zeros", "full", "fill_", "zero_", "bernoulli_"):
        return written
    return written + sum(tensor_bytes(x) for x in {id(x): x for x in inputs}.values())


def fresh_bytes(out: Any) -> int:
    """Bytes of results that are too large for memory that was used before."""
    sizes = [tensor_bytes(x) for x in tree_leaves(out) if isinstance(x, Tensor)]
    return sum(size for size in sizes if size >= LARGE)
