"""The formulation that users of the released code run today, beside ours in the same run.

    python benchmarks/eager_baseline.py --config unival_base --threads 2 --out runs/eager_unival
    python benchmarks/eager_baseline.py --config unival_tiny --batch 2 --image 64 --steps 3

`eager` has our model's weights and computes what the released code computes, in the way it does:
the product of the positions is cloned for every layer and relative biases are gathered onto it for
every pair of tokens and every row, scores are in memory and their softmax is float32, every norm,
activation, dropout and sum is an operator of its own, maps of pictures and clips are NCHW, norms
and convolutions are torch's, media that rows share are encoded once a row, the loss makes the
logits of all positions and their whole log-softmax, and AdamW goes through the parameters one by
one. Batch comes first in its tensors, where the released code has the sequence first.

Every variant is a process of its own, since peak memory is a process's; they take turns (A B C,
C B A, ...), so that what the machine does meets all alike. Before, one row's loss and gradients
must be the same. First `pass`, forward and backward, then `step`, with clipping and the update.

The load is measured: the load average, and the cores that other programs kept busy during the
turns. A variant whose spread, (p80 - p20) / p50, exceeds 10 % is marked unreliable, and so is one
of fewer than three measurements.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from progress import Progress
from torch import Tensor, nn
from torch.nn import functional as F
from train_step import DTYPES, ROOT, describe_machine

from unival.data.batch import MEDIUM_KEYS
from unival.kernels.cpu.memory import keep_freed
from unival.model.batchnorm import BatchNorm2d, BatchNorm3d
from unival.model.configuration import UnivalConfig
from unival.model.convolution import Conv2d, Conv3d
from unival.model.encoder import MEDIUM, TEXT
from unival.model.image_encoder import ImageEncoder
from unival.model.modeling import UnivalForConditionalGeneration
from unival.model.norm import LayerNorm
from unival.model.positions import (
    audio_positions,
    grid_buckets,
    image_positions,
    text_buckets,
    video_positions,
)
from unival.model.transformer import Attention, EncoderLayer, score_scale, split_heads
from unival.model.video_encoder import VideoEncoder
from unival.training.freezing import freeze
from unival.training.losses import Criterion
from unival.vocabulary import BOS, IGNORE

BASELINE = "eager-fp32"
VARIANTS = (BASELINE, "ours-fp32", "ours-bf16")
PHASES = ("pass", "step")
SMOOTHING, CLIP_NORM = 0.1, 1.0
FIRST_WORD = 4  # ids below are special
UNRELIABLE, LEAST = 0.10, 3  # spread; measurements that tell of one
# Relative differences of one row's loss and gradient norms from the baseline's that roundings make.
SAME = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.1}
# At batch 4, 384 pixels, 20 + 16 tokens: times faster than the baseline, share of its memory.
AIMS = {
    ("unival_base", "ours-fp32", "pass"): (1.3, 0.85),
    ("unival_base", "ours-bf16", "pass"): (2.5, 0.6),
    ("ofa_base", "ours-fp32", "pass"): (1.6, None),
    ("unival_base", "ours-fp32", "step"): (2.0, None),
    ("ofa_base", "ours-fp32", "step"): (2.0, None),
}


class PlainBatchNorm2d(nn.BatchNorm2d):
    """torch's, and a ReLU after it."""

    def forward(self, x: Tensor, relu: bool = False) -> Tensor:
        y = super().forward(x)
        return F.relu(y) if relu else y


def plain_modules(model: nn.Module) -> None:
    """Put torch's own norms and convolutions, with the same weights and statistics, where the model
    has ours."""
    for parent in list(model.modules()):
        for name, own in list(parent.named_children()):
            plain: nn.Module
            if isinstance(own, LayerNorm):
                plain = nn.LayerNorm(own.normalized_shape, own.eps)
            elif isinstance(own, BatchNorm2d | BatchNorm3d):
                kind = PlainBatchNorm2d if isinstance(own, BatchNorm2d) else nn.BatchNorm3d
                plain = kind(own.num_features, own.eps, own.momentum)
                for buffer in ("running_mean", "running_var", "num_batches_tracked"):
                    setattr(plain, buffer, getattr(own, buffer))
            elif isinstance(own, Conv2d | Conv3d):
                form = nn.Conv2d if isinstance(own, Conv2d) else nn.Conv3d
                sizes = (own.kernel_size, own.stride, own.padding, own.dilation, own.groups)
                plain = form(own.in_channels, own.out_channels, *sizes, bias=False)  # type: ignore[arg-type]
            else:
                continue
            plain.weight, plain.bias = own.weight, own.bias
            setattr(parent, name, plain.train(own.training))


def stages(encoder: ImageEncoder | VideoEncoder, x: Tensor) -> Tensor:
    """The stages of a convolutional encoder, operator by operator."""
    for stage in range(1, encoder.num_stages + 1):
        for block in getattr(encoder, f"layer{stage}"):
            y = F.relu(block.bn1(block.conv1(x)), inplace=True)
            y = F.relu(block.bn2(block.conv2(y)), inplace=True)
            y = block.bn3(block.conv3(y))
            y += x if block.downsample is None else block.downsample(x)
            x = F.relu(y, inplace=True)
    return x


def encode_medium(encoder: nn.Module, values: Tensor) -> Tensor:
    """Feature maps of pixels or clips as they lie in memory, channels before places; of sounds."""
    if isinstance(encoder, ImageEncoder):
        x = F.relu(encoder.bn1(encoder.conv1(values)), inplace=True)
        return stages(encoder, F.max_pool2d(x, kernel_size=3, stride=2, padding=1))
    if isinstance(encoder, VideoEncoder):
        x = F.relu(encoder.bn1(encoder.conv1(values)))
        return stages(encoder, F.max_pool3d(x, kernel_size=3, stride=2, padding=1))
    return encoder(values)


def attend(
    block: Attention, x: Tensor, memory: Tensor, bias: Tensor, padding: Tensor | None, causal: bool
) -> Tensor:
    """[B, S, D] attending to memory [B, T, D] under a bias [B, H, S, T]."""
    query = split_heads(block.q_proj(x) * block.scaling, block.num_heads).contiguous()
    key, value = (
        split_heads(linear(memory), block.num_heads).contiguous()
        for linear in (block.k_proj, block.v_proj)
    )
    scores = query @ key.transpose(-1, -2)
    scores += bias
    if causal:
        hidden = torch.full(scores.shape[-2:], -torch.inf, device=x.device, dtype=x.dtype)
        scores += hidden.triu(1)
    if padding is not None:
        scores = scores.masked_fill(padding[:, None, None], -torch.inf)
    wide = torch.promote_types(scores.dtype, torch.float32)
    probabilities = torch.softmax(scores, dim=-1, dtype=wide).type_as(scores)
    y = (probabilities @ value).transpose(1, 2)
    y = torch.einsum("bshd,h->bshd", y, block.head_scale)
    return block.out_proj(y.flatten(2))


def add(layer: EncoderLayer, x: Tensor, branch: Tensor) -> Tensor:
    """x + DropPath(Dropout(branch))."""
    branch = F.dropout(branch, layer.dropout, layer.training)
    rate = layer.drop_path_rate
    if layer.training and rate > 0.0:
        drawn = torch.rand(len(branch), 1, 1, device=x.device, dtype=x.dtype)
        branch = branch.div(1.0 - rate) * torch.floor(1.0 - rate + drawn)
    return x + branch


def feed_forward(layer: EncoderLayer, x: Tensor) -> Tensor:
    """The last block of a layer of either stack."""
    ffn = layer.ffn
    y = ffn.fc1(layer.ffn_norm(x))
    y = F.gelu(y.to(torch.promote_types(y.dtype, torch.float32))).type_as(y)
    return add(layer, ffn.residual(x), ffn.fc2(ffn.norm(y)))


class EagerModel(nn.Module):
    """A model in the released code's formulation; takes the model over, whose norms it replaces.

    The decoder writes text; image codes and soft prompts are not served.
    """

    text_pairs: Tensor
    grid_pairs: Tensor

    def __init__(self, model: UnivalForConditionalGeneration) -> None:
        super().__init__()
        plain_modules(model)
        self.model, config = model, model.config
        self.scale = score_scale(config)
        limit, grid = config.max_text_positions, config.image_bucket_size
        place, cells = torch.arange(limit), torch.arange(grid**2 + 1)
        buckets = text_buckets(config.token_bucket_size, limit)
        self.register_buffer("text_pairs", buckets[place[:, None] - place + limit - 1])
        self.register_buffer("grid_pairs", grid_buckets(cells, cells, grid))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Logits [B, U, V] of a batch as `collate` makes it."""
        states, padding, positions = self.encode(batch)
        states = self.decode(batch["decoder_input_ids"], states, padding, positions)
        return F.linear(states, self.model.encoder.embed_tokens.weight)

    def product(self, query: nn.Linear, key: nn.Linear, rows: Tensor, columns: Tensor) -> Tensor:
        """Scores of positions alone: [B, H, S, T] of [B, S, D] and [B, T, D]."""
        heads = self.model.config.num_heads
        one = split_heads(query(rows), heads) * self.scale
        return one @ split_heads(key(columns), heads).transpose(-1, -2)

    def text_bias(self, table: nn.Embedding, batch: int, length: int) -> Tensor:
        """[B, H, T, T], a copy for every row."""
        found = table(self.text_pairs[:length, :length])
        return found.expand(batch, -1, -1, -1).permute(0, 3, 1, 2).contiguous()

    def grid_bias(self, table: nn.Embedding, ids: Tensor) -> Tensor:
        """[B, H, N, N] of grid position ids [B, N]."""
        batch, count = ids.shape
        cells = len(self.grid_pairs)
        pairs = self.grid_pairs.expand(batch, cells, cells)
        pairs = pairs.gather(1, ids[:, :, None].expand(batch, count, cells))
        pairs = pairs.gather(2, ids[:, None, :].expand(batch, count, count))
        return table(pairs).permute(0, 3, 1, 2)

    def embed_medium(self, batch: dict[str, Tensor], medium: str) -> tuple[Tensor, Tensor]:
        """Tokens [B, N, D] and grid position ids [B, N]; every row encodes a medium of its own."""
        encoder, config = self.model.encoder, self.model.config
        values = batch[MEDIUM_KEYS[medium]]
        if "media_index" in batch:
            values = values[batch["media_index"]]
        found = encode_medium(getattr(encoder, f"{medium}_encoder"), values)
        grid, device = config.image_bucket_size, found.device
        if medium == "image":
            ids = image_positions(*found.shape[-2:], grid, device)
        elif medium == "video":
            ids = video_positions(*found.shape[-3:], grid, device)
        else:
            ids = audio_positions(found[0, 0].numel(), grid, device)
        features, count = found.flatten(2).transpose(1, 2), config.sample_patch_num
        ids = ids.expand(len(features), -1)
        if count is not None and count < features.shape[1]:
            features, ids = encoder.sample_patches(features, ids[0])
        tokens = (
            getattr(encoder, f"{medium}_proj")(features) + encoder.type_embedding.weight[MEDIUM]
        )
        return F.dropout(encoder.patch_norm(tokens), config.dropout, self.training), ids

    def encode(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """States [B, S, D], padding bool [B, S] and position embeddings [B, S, D]."""
        encoder, config, text = self.model.encoder, self.model.config, batch["input_ids"]
        rows, length = text.shape
        x = encoder.embed_tokens(text) + encoder.type_embedding.weight[TEXT]
        x = F.dropout(encoder.token_norm(x), config.dropout, self.training)
        padding = batch["attention_mask"] == 0
        place = torch.arange(length, device=x.device).expand(rows, -1)
        positions, ids = encoder.text_position_norm(encoder.text_positions(place)), None
        for medium, key in MEDIUM_KEYS.items():
            if key in batch:
                tokens, ids = self.embed_medium(batch, medium)
                table = getattr(encoder, f"{medium}_positions")
                positions = torch.cat([encoder.grid_position_norm(table(ids)), positions], dim=1)
                x = torch.cat([tokens, x], dim=1)
                padding = F.pad(padding, (ids.shape[1], 0), value=False)
        if padding.any():
            x = x * (1 - padding[..., None].type_as(x))
        absolute = self.product(encoder.position_query, encoder.position_key, positions, positions)
        tables = zip(encoder.layers, encoder.relative.text, encoder.relative.image, strict=True)
        for layer, text_table, image_table in tables:
            bias = absolute.clone()
            bias[:, :, -length:, -length:] += self.text_bias(text_table, rows, length)
            if ids is not None:
                count = ids.shape[1]
                bias[:, :, :count, :count] += self.grid_bias(image_table, ids)
            normed = layer.self_attn_norm(x)
            y = attend(layer.self_attn, normed, normed, bias, padding, causal=False)
            x = feed_forward(layer, add(layer, x, layer.self_attn_post_norm(y)))
        return encoder.norm(x), padding, positions

    def decode(
        self, ids: Tensor, memory: Tensor, memory_padding: Tensor, memory_positions: Tensor
    ) -> Tensor:
        """States [B, U, D] of decoder ids [B, U]."""
        decoder, config = self.model.decoder, self.model.config
        rows, length = ids.shape
        x = decoder.token_norm(self.model.encoder.embed_tokens(ids))
        x = F.dropout(x, config.dropout, self.training)
        padding = ids == config.pad_token_id
        place = torch.arange(length, device=x.device).expand(rows, -1)
        positions = decoder.text_position_norm(decoder.text_positions(place))
        own = self.product(
            decoder.self_position_query, decoder.self_position_key, positions, positions
        )
        cross = self.product(
            decoder.cross_position_query, decoder.cross_position_key, positions, memory_positions
        )
        for layer, table in zip(decoder.layers, decoder.relative.text, strict=True):
            bias = own.clone()
            bias += self.text_bias(table, rows, length)
            normed = layer.self_attn_norm(x)
            y = attend(layer.self_attn, normed, normed, bias, padding, causal=True)
            x = add(layer, x, layer.self_attn_post_norm(y))
            normed = layer.cross_attn_norm(x)
            y = attend(layer.cross_attn, normed, memory, cross, memory_padding, causal=False)
            x = feed_forward(layer, add(layer, x, layer.cross_attn_post_norm(y)))
        return decoder.norm(x)


def eager_loss(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Mean label-smoothed loss: log-softmax of all positions, then those with a target."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    logp = torch.log_softmax(logits, dim=-1, dtype=wide).flatten(0, 1)
    target = labels.flatten()
    logp, target = logp[target != IGNORE], target[target != IGNORE]
    nll = -logp.gather(-1, target[:, None]).squeeze(-1)
    smooth = -logp.sum(-1)
    spread = smoothing / (logp.shape[-1] - 1)
    return ((1.0 - smoothing - spread) * nll + spread * smooth).mean()


def ours_loss(model: UnivalForConditionalGeneration, batch: dict[str, Tensor]) -> Tensor:
    """The same loss as training makes it."""
    tensors = dict(batch)
    labels = tensors.pop("labels")
    out = model(**tensors, output_logits=False)
    result = Criterion(label_smoothing=SMOOTHING).of_states(
        out.decoder_last_hidden_state, model.get_input_embeddings().weight, labels
    )
    return result.loss / result.tokens


class Variant(NamedTuple):
    """A formulation (eager, ours) in a precision."""

    formulation: str
    precision: str


def multiplies_bf16(device: torch.device) -> bool:
    """Whether it is a GPU, or this processor has instructions: without, a pass takes minutes."""
    own = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device.type == "cuda" or own


def default_variants(device: torch.device) -> list[str]:
    """VARIANTS, without bf16 where the device does not multiply it."""
    return [x for x in VARIANTS if "bf16" not in x or multiplies_bf16(device)]


def parse_variant(text: str) -> Variant:
    """`ours-bf16` and the like.

    Raises:
        ValueError: names what is known.
    """
    formulation, _, precision = text.partition("-")
    if formulation not in ("eager", "ours") or precision not in DTYPES:
        raise ValueError(f"variant {text!r}; wanted eager or ours, -, and {' or '.join(DTYPES)}")
    return Variant(formulation, precision)


def make_batch(config: UnivalConfig, args: argparse.Namespace) -> dict[str, Tensor]:
    """Pictures of noise and random words; no padding."""
    source = torch.Generator().manual_seed(1)
    words = (FIRST_WORD, min(50_000, config.vocab_size))
    target = torch.randint(*words, (args.batch, args.target), generator=source)
    begin = torch.full((args.batch, 1), BOS)
    return {
        "input_ids": torch.randint(*words, (args.batch, args.text), generator=source),
        "attention_mask": torch.ones(args.batch, args.text, dtype=torch.bool),
        "decoder_input_ids": torch.cat([begin, target[:, :-1]], dim=1),
        "labels": target,
        "pixel_values": torch.randn(args.batch, 3, args.image, args.image, generator=source),
    }


class Subject:
    """A variant of a model, its batch and its optimizer."""

    def __init__(self, args: argparse.Namespace, variant: Variant) -> None:
        torch.manual_seed(0)
        config = config_of(args.config)
        self.device, dtype = torch.device(args.device), DTYPES[variant.precision]
        model = UnivalForConditionalGeneration(config).train()
        freeze(model, [], ["image"])
        eager = variant.formulation == "eager"
        if not eager and self.device.type == "cpu":
            keep_freed()  # as training does
        self.model = (EagerModel(model) if eager else model).to(self.device, dtype).train()
        self.batch = {name: x.to(self.device) for name, x in make_batch(config, args).items()}
        self.batch["pixel_values"] = self.batch["pixel_values"].to(dtype)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        own = {"foreach": False, "fused": False} if eager else {"fused": True}
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, weight_decay=0.01, **own)
        self.loop = False if eager else None  # clip one parameter after the other

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        if isinstance(self.model, EagerModel):
            return eager_loss(self.model(batch), batch["labels"], SMOOTHING)
        return ours_loss(self.model, batch)

    def check(self) -> dict[str, float]:
        """Loss and gradient norms of one row without dropout, by part."""
        self.model.eval()
        loss = self.loss({name: x[:1] for name, x in self.batch.items()})
        loss.backward()
        found = {"loss": float(loss.detach())}
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                part = ".".join(name.removeprefix("model.").split(".")[:2])
                square = float(parameter.grad.double().square().sum())
                found[part] = found.get(part, 0.0) + square
        self.optimizer.zero_grad()
        self.model.train()
        return {name: x if name == "loss" else x**0.5 for name, x in found.items()}

    def run(self, phase: str) -> dict[str, float]:
        """Seconds and processor seconds of a pass or a step."""
        self._wait()
        wall, cpu = time.perf_counter(), time.process_time()
        self.loss(self.batch).backward()
        if phase == "step":
            nn.utils.clip_grad_norm_(self.trained, CLIP_NORM, foreach=self.loop)
            self.optimizer.step()
        self.optimizer.zero_grad()
        self._wait()
        return {"seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu}

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def peak_memory(device: torch.device) -> int:
    """Most bytes so far: of tensors on a GPU, else resident of this process, libraries included.

    Not `ru_maxrss`, which begins with what the process that started this one held.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def work(args: argparse.Namespace) -> None:
    """A variant's process: a command a line on stdin, an answer a line on stdout."""
    answers, sys.stdout = sys.stdout, sys.stderr
    if args.threads:
        torch.set_num_threads(args.threads)
    subject = Subject(args, parse_variant(args.worker))
    for line in sys.stdin:
        command = line.strip()
        if command == "check":
            answer: dict[str, Any] = subject.check()
        elif command == "peak":
            answer = {"bytes": peak_memory(subject.device)}
        else:
            answer = subject.run(command)
        print(json.dumps(answer), file=answers, flush=True)


class Worker:
    """A variant in its own process."""

    def __init__(self, argv: Sequence[str], variant: str) -> None:
        command = [sys.executable, __file__, *argv, "--worker", variant]
        self.variant = variant
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, command: str) -> dict[str, float]:
        """Its answer.

        Raises:
            RuntimeError: the process has ended.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(command + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # said below
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.variant} ended with status {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait()


class LoadMeter:
    """Cores that other programs keep busy while something of ours runs."""

    def __init__(self) -> None:
        self.found: list[float] = []
        self.average = [os.getloadavg()[0]]
        self._begin()

    def _begin(self) -> None:
        self._wall, self._busy = time.perf_counter(), self._cpu()

    @staticmethod
    def _cpu() -> float:
        times = psutil.cpu_times()
        return sum(times) - times.idle - getattr(times, "iowait", 0.0)

    def begin(self) -> None:
        """Something of ours begins."""
        self._begin()

    def end(self, own: float) -> None:
        """It has ended, after `own` processor seconds."""
        wall = time.perf_counter() - self._wall
        self.found.append(max(self._cpu() - self._busy - own, 0.0) / wall)

    def read(self) -> dict[str, float]:
        """Load averages before and after, and the median of the others' cores."""
        return {
            "load_before": round(self.average[0], 2),
            "load_after": round(os.getloadavg()[0], 2),
            "others_cores": round(statistics.median(self.found), 2) if self.found else 0.0,
        }


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """p20, p50, p80 and the spread (p80 - p20) / p50."""
    ordered = sorted(values)
    low, middle, high = (_quantile(ordered, share) for share in (0.2, 0.5, 0.8))
    return {"p20": low, "p50": middle, "p80": high, "spread": (high - low) / middle}


def is_reliable(values: Sequence[float]) -> bool:
    """Whether there are enough of them, and they agree."""
    return len(values) >= LEAST and quantiles(values)["spread"] <= UNRELIABLE


def _quantile(ordered: Sequence[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def check_same(found: dict[str, dict[str, float]]) -> dict[str, float]:
    """The largest relative difference of each variant's check from the baseline's.

    Raises:
        ValueError: it is more than roundings make.
    """
    baseline, worst = found[BASELINE], {}
    for variant, values in found.items():
        if values.keys() != baseline.keys():
            other = sorted(values.keys() ^ baseline.keys())
            raise ValueError(f"{variant}: not the same parts have gradients: {', '.join(other)}")
        off = {name: abs(x - baseline[name]) / baseline[name] for name, x in values.items()}
        name = max(off, key=lambda key: (off[key] != off[key], off[key]))  # NaN first
        if not off[name] <= SAME[parse_variant(variant).precision]:
            raise ValueError(
                f"{variant} does not compute what {BASELINE} does: {name} is {values[name]:.6g} "
                f"and not {baseline[name]:.6g}"
            )
        worst[variant] = off[name]
    return worst


def compare(args: argparse.Namespace, argv: Sequence[str]) -> dict[str, Any]:
    """Check, then measure the variants in turns."""
    meter, workers = LoadMeter(), [Worker(argv, variant) for variant in args.variants]
    try:
        same = check_same({worker.variant: worker.ask("check") for worker in workers})
        progress = Progress(len(PHASES) * (args.warmup + args.steps))
        rows = [row for phase in PHASES for row in _measure(args, phase, workers, meter, progress)]
    finally:
        for worker in workers:
            worker.close()
    baseline = {row["phase"]: row for row in rows if row["variant"] == BASELINE}
    for row in rows:
        other = baseline[row["phase"]]
        row["faster"] = other["p50"] / row["p50"]
        row["memory"] = row["peak_bytes"] / other["peak_bytes"]
    machine = describe_machine(torch.device(args.device))
    return {
        "machine": machine | {"threads": args.threads or machine["threads"]} | meter.read(),
        "command": shlex.join(["python", "benchmarks/eager_baseline.py", *argv]),
        "options": {
            key: value for key, value in vars(args).items() if key not in ("out", "worker")
        },
        "differences": same,
        "rows": rows,
    }


def _measure(
    args: argparse.Namespace,
    phase: str,
    workers: list[Worker],
    meter: LoadMeter,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Rows of a phase, in the order of the workers."""
    seconds: dict[str, list[float]] = {worker.variant: [] for worker in workers}
    order = list(workers)
    for number in range(args.warmup + args.steps):
        told = []
        for worker in order:
            meter.begin()
            found = worker.ask(phase)
            meter.end(found["cpu"])
            told.append(f"{worker.variant} {found['seconds']:.2f} s")
            if number >= args.warmup:
                seconds[worker.variant].append(found["seconds"])
        progress.line(f"{phase}: {', '.join(told)}")
        order.reverse()
    rows = []
    for worker in workers:
        own = seconds[worker.variant]
        row = {"phase": phase, "variant": worker.variant, **quantiles(own)}
        row |= {"peak_bytes": worker.ask("peak")["bytes"], "reliable": is_reliable(own)}
        rows.append(row)
    return rows


def table(report: dict[str, Any]) -> str:
    """The report for people, in Markdown."""
    options = report["options"]
    shape = (options["batch"], options["image"], options["text"], options["target"])
    off = report["differences"].items()
    differences = ", ".join(f"{x:.1e} ({name})" for name, x in off if name != BASELINE)
    lines = [
        f"# {options['config']}: the released formulation and ours",
        "",
        ", ".join(f"{key} {value}" for key, value in report["machine"].items()),
        "",
        f"    {report['command']}",
        "",
        "Batch {}, pictures of {} px, {} source and {} target tokens; ".format(*shape)
        + f"{options['steps']} measurements each after {options['warmup']}; p50 in seconds. "
        f"Faster, memory: over {BASELINE} in the same phase. "
        f"One row's loss and gradient norms differ from its by at most {differences}.",
        "",
        "| phase | variant | p50 | p20 | p80 | spread | faster | peak MiB | memory | aim | |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        aim = AIMS.get((options["config"], row["variant"], row["phase"]))
        wanted = ""
        if aim is not None and shape == (4, 384, 20, 16) and options["device"] == "cpu":
            wanted = f"{aim[0]:g}x" + ("" if aim[1] is None else f", {aim[1]:g} of memory")
        cells = [
            row["phase"],
            row["variant"],
            *(f"{row[key]:.3f}" for key in ("p50", "p20", "p80")),
        ]
        cells += [f"{row['spread']:.1%}", f"{row['faster']:.2f}x"]
        cells += [f"{row['peak_bytes'] / 2**20:.0f}", f"{row['memory']:.2f}", wanted]
        lines.append(f"| {' | '.join(cells)} | {'' if row['reliable'] else 'unreliable'} |")
    return "\n".join(lines)


def config_of(name: str) -> UnivalConfig:
    """A model of configs/model."""
    return UnivalConfig.from_yaml(ROOT / f"configs/model/{name}.yaml")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments; ends with status 2 where they cannot be served."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = sorted(path.stem for path in (ROOT / "configs" / "model").glob("*.yaml"))
    parser.add_argument("--config", default="unival_base", choices=names)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    told = f"({' '.join(VARIANTS)}; those of bf16 only where the device multiplies bf16)"
    parser.add_argument("--variants", nargs="+", help=told)
    for name, value, least, what in (
        ("batch", 4, 1, "rows, each with a picture"),
        ("image", 384, 32, "pixels of a picture's side"),
        ("text", 20, 1, "tokens of the encoder's text"),
        ("target", 16, 1, "tokens of the decoder"),
        ("steps", 7, 1, "measurements of each variant and phase"),
        ("warmup", 2, 0, "before them"),
        ("threads", 0, 0, "of torch; 0: as many as it takes by itself"),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{what} ({value})")
        parser.set_defaults(**{f"least_{name}": least})
    parser.add_argument("--out", type=Path, metavar="FILE", help="write FILE.md and FILE.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for name in [key for key in vars(args) if key.startswith("least_")]:
        least, option = vars(args).pop(name), name.removeprefix("least_")
        if getattr(args, option) < least:
            parser.error(f"--{option} must be at least {least}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} finds no usable GPU here")
    if args.variants is None:
        args.variants = default_variants(torch.device(args.device))
    try:
        for variant in args.variants:
            parse_variant(variant)
    except ValueError as error:
        parser.error(f"--variants: {error}")
    if BASELINE not in args.variants:
        parser.error(f"--variants: {BASELINE} is what the others are compared with")
    return args


def main() -> int:
    """Compare, print the table, write the files."""
    argv = sys.argv[1:]
    args = parse(argv)
    if args.worker:
        work(args)
        return 0
    report = compare(args, argv)
    print(table(report))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        told = json.dumps(report, indent=2)
        args.out.with_suffix(".json").write_text(told + "\n", encoding="utf-8")
        args.out.with_suffix(".md").write_text(table(report) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
