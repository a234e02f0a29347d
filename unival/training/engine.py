"""DeepSpeed around the model: precision, ZeRO, and the arithmetic of one step."""

from __future__ import annotations

import logging
import os
import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unival.data.batch import MEDIUM_KEYS, collate
from unival.generation.constraints import Trie
from unival.kernels.cpu import native
from unival.kernels.cpu.memory import keep_freed
from unival.model.batchnorm import set_batchnorm_contribution, set_batchnorm_statistics
from unival.model.compiling import compile_parts
from unival.model.modeling import UnivalForConditionalGeneration
from unival.tasks import TASKS
from unival.tasks.base import Example
from unival.training.batches import FREE, Batch, stage_media
from unival.training.deepspeed_config import (
    BUCKET,
    deepspeed_config,
    precision_of,
    zero_stage_of,
)
from unival.training.ema import Average
from unival.training.freezing import describe_trainable, freeze, set_modes
from unival.training.losses import Criterion
from unival.training.options import Run, Stage
from unival.training.parts import PartClock
from unival.training.zero_state import base_optimizer, pieces, zero_stage
from unival.vocabulary import BOS, EOS, IGNORE

log = logging.getLogger(__name__)

MEDIA = ("text", *MEDIUM_KEYS)
WAIT = timedelta(hours=24)  # for rank 0, which measures models and writes them


@dataclass
class StepResult:
    """Means over all ranks: loss, per-task nll, gradient norm; counts of examples and tokens.

    finite   the update was made; else nothing has moved on any rank, and `scaling` says whether
             that was fp16's search for its loss scale
    stop     a rank was asked to stop
    failed   a rank could not write its checkpoint
    """

    loss: float
    task_nll: dict[str, float]
    grad_norm: float
    samples: int
    tokens: int
    finite: bool = True
    scaling: bool = False
    stop: bool = False
    failed: bool = False


@dataclass
class World:
    """The ranks of a run; `control` joins them by gloo, on CPU tensors, and waits a day."""

    rank: int
    size: int
    control: Any

    def barrier(self) -> None:
        """Wait for all ranks, also while rank 0 measures or writes."""
        dist.barrier(group=self.control)


def init_distributed() -> World:
    """Join or make the process group (of one in a plain `python` run).

    NCCL where there is a GPU, else gloo.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for name, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",  # any that is free
    }.items():
        os.environ.setdefault(name, value)
    import deepspeed

    if not torch.cuda.is_available():
        # Compiling the shared-memory collective takes a minute and gains nothing here.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed still calls collectives by their earlier names, which torch says at every call.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")
    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    control = dist.new_group(backend="gloo", timeout=WAIT)
    return World(dist.get_rank(), dist.get_world_size(), control)


def learning_rate(stage: Stage, step: int) -> float:
    """Linear warm-up to the peak, then linear decay to 0 at the horizon; step counts from 1."""
    horizon = stage.schedule_steps or stage.steps
    warmup = int(stage.warmup_ratio * horizon)
    if step <= warmup:
        return stage.learning_rate * step / max(warmup, 1)
    return stage.learning_rate * max(0.0, 1.0 - (step - warmup) / max(horizon - warmup, 1))


class TrainingModel(nn.Module):
    """The model and its loss in one forward pass: ZeRO 3 shows a module its weights only there."""

    def __init__(
        self,
        model: UnivalForConditionalGeneration,
        criterion: Criterion,
        trie: Trie | None = None,
    ) -> None:
        super().__init__()
        self.model, self.criterion, self.trie = model, criterion, trie

    def forward(self, batch: dict[str, Tensor], update: int) -> tuple[Tensor, Tensor]:
        """Summed loss of a micro-batch, and nll [B * U] of its tokens."""
        tensors = dict(batch)
        labels, weight = tensors.pop("labels"), tensors.pop("loss_weight")
        allowed = self._allowed(tensors.pop("answer_states", None))
        embedding = self.model.get_input_embeddings().weight
        for name in ("pixel_values", "video_values"):
            if name in tensors:
                tensors[name] = tensors[name].to(embedding.dtype)
        out = self.model(**tensors, output_logits=False)
        result = self.criterion.of_states(
            out.decoder_last_hidden_state,
            self.model.get_input_embeddings().weight,
            labels,
            weight=weight,
            allowed=allowed,
            update=update,
            backend=self.model.config.kernel_backend,
        )
        return result.loss, result.token_nll

    def _allowed(self, states: Tensor | None) -> Tensor | None:
        """int64 [B, U] states of the trie to bool [B, U, V]: the tokens that may come there."""
        if states is None or self.trie is None:
            return None
        self.trie = self.trie.to(states.device)
        mask = self.trie.allowed(states.flatten().clamp(min=Trie.OFF), self.model.config.vocab_size)
        mask |= (states == FREE).flatten()[:, None]
        return mask.view(*states.shape, -1)


class Engine:
    """A model in training: forward, backward and update of one step over all ranks.

    Attributes:
        model: the model; its weights are DeepSpeed's to place.
        deepspeed: the DeepSpeed engine.
        names: the name of every parameter.
        pieces: this rank's pieces of the trained parameters.
        frozen: float32 copies of what is not trained, on the CPU of rank 0; half precision would
            round what a checkpoint hands on.
        average: of the weights, where the stage wants one.
    """

    def __init__(
        self,
        model: UnivalForConditionalGeneration,
        run: Run,
        stage: Stage,
        world: World,
        trie: Trie | None = None,
    ) -> None:
        import deepspeed

        self.run, self.stage, self.model, self.world = run, stage, model, world
        config = deepspeed_config(run, stage)
        self.precision = precision_of(config)
        self._prepare(model, zero_stage_of(config))
        limits = stage.constraint_range
        self.criterion = Criterion(
            label_smoothing=stage.label_smoothing,
            log_end=stage.log_end,
            drop_worst_ratio=stage.drop_worst_ratio,
            drop_worst_after=stage.drop_worst_after,
            constraint_range=None if limits is None else (limits[0], limits[1]),
        )
        self.names = {parameter: name for name, parameter in model.named_parameters()}
        trained = [p for p in self.names if p.requires_grad]
        self.frozen = {}
        if world.rank == 0:
            self.frozen = {
                name: p.detach().float().cpu().clone()
                for p, name in self.names.items()
                if not p.requires_grad
            }
        # At stage 0 DeepSpeed clips, but neither tells the norm nor looks whether it is finite.
        self.clip_norm = float(config.get("gradient_clipping", 0.0))
        if zero_stage_of(config) == 0:
            config["gradient_clipping"] = 0.0
        self.deepspeed, self.optimizer, _, self.scheduler = deepspeed.initialize(
            model=TrainingModel(model, self.criterion, trie),
            model_parameters=trained,
            optimizer=None if "optimizer" in config else self._adamw(trained),
            config=config,
        )
        self.deepspeed.enable_backward_allreduce = zero_stage(self.deepspeed) > 0  # see _update
        self.device = self.deepspeed.device
        if self.device.type == "cpu":
            keep_freed()
            if not native.AVAILABLE:
                log.info(native.NOT_AVAILABLE)
        self._stop = self._failed = False
        self.pieces = pieces(self.deepspeed, self.names)
        self.buffers = dict(model.named_buffers())
        self.shapes = {name: buffer.shape for name, buffer in self.buffers.items()}
        # Under ZeRO 3 a parameter's own shape is that of what is left of it.
        self.shapes |= {n: getattr(p, "ds_shape", p.shape) for p, n in self.names.items()}
        # Batch norm's.
        self._running = [
            b for n, b in self.buffers.items() if "running_" in n or "num_batches_" in n
        ]
        self._running_before = [b.clone() for b in self._running]
        self.average = None
        if stage.ema_decay is not None:
            self.average = Average(stage.ema_decay, self.pieces, self.buffers)
        self.clock = PartClock(self.device)

    def _prepare(self, model: UnivalForConditionalGeneration, zero_stage: int) -> None:
        run, stage = self.run, self.stage
        set_batchnorm_statistics(model, run.batchnorm)  # type: ignore[arg-type]
        # After batch norm's mode, which says anew what of it has gradients.
        rules = stage.freeze if stage.adapter is None else [*stage.freeze, "all_but_adapter"]
        freeze(model, rules, [micro.medium for micro in stage.micro_batches])
        if self.world.rank == 0:
            log.info("stage %s trains\n%s", stage.name, describe_trainable(model))
        for stack in (model.encoder, model.decoder):
            stack.gradient_checkpointing = run.recompute
        if run.compile != "off":
            if zero_stage == 3:
                raise ValueError(
                    f"compile={run.compile} with ZeRO stage 3: the hooks that gather weights break "
                    "compiled graphs apart; take deepspeed.zero_stage of 2 or less"
                )
            compile_parts(model, run.compile)

    def _adamw(self, trained: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        options = self.run.optimizer
        return torch.optim.AdamW(
            trained,
            lr=self.stage.learning_rate,
            betas=(options.betas[0], options.betas[1]),
            eps=options.eps,
            weight_decay=options.weight_decay,
            fused=True,
        )

    def step(self, batches: list[Batch], update: int) -> StepResult:
        """One optimizer step, or none where a loss or a gradient is not finite on any rank.

        The loss is the sum over micro-batches of weight times mean over the target tokens of all
        ranks and passes, so that it does not depend on how the rows are split. Ranks whose passes
        are of different media run the others' with an empty batch: every rank takes part in every
        collective of ZeRO and of shared batch norm, in one order.
        """
        with self.clock.part("agree"):
            passes, counts = self.passes(batches, update)
            agreed_stop, agreed_failed = self._stop, self._failed
            self.keep_running_statistics()
        self.seed(update)
        self.set_modes()
        if self.run.compile == "cuda_graphs":  # what an earlier step's graphs put out may go
            torch.compiler.cudagraph_mark_step_begin()
        if self.scheduler is None:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.stage, update)
        # Row t: summed nll and token count of the t-th task; the last row: the loss.
        sums = torch.zeros(len(TASKS) + 1, 2, dtype=torch.float64, device=self.device)
        self._clear_gradients()
        for batch in passes:
            with self.clock.part("forward"):
                loss = self._micro_loss(batch, update, sums)
                share = batch.weight / max(counts[batch.group], 1.0)
                sums[-1, 0] += share * loss.detach()
                # A loss that is not finite makes gradients that are not, on whichever rank they
                # end: infinity alone would not (a target with a logit of -inf has a finite one).
                loss = loss * torch.where(loss.detach().isfinite(), 1.0, float("nan"))
            with self.clock.part("backward"):
                self.deepspeed.backward(loss * (share * self.world.size), scale_wrt_gas=False)
        with self.clock.part("optimizer"):
            norm, finite, scaling = self._update()
        if finite and self.average is not None:
            with self.clock.part("average"):
                self.average.update()
        if not finite:
            self.restore_running_statistics()
        with self.clock.part("agree"):
            result = self._result(sums, batches)
        result.grad_norm, result.finite, result.scaling = norm, finite, scaling
        result.stop, result.failed = agreed_stop, agreed_failed
        return result

    def set_modes(self) -> None:
        """Training mode, but for frozen modules where the stage wants them in eval mode."""
        self.deepspeed.train()
        set_modes(self.model, self.stage.frozen_in_eval)

    def keep_running_statistics(self) -> None:
        """Remember batch norm's running statistics; a step that is refused must not move them."""
        if self._running:
            torch._foreach_copy_(self._running_before, self._running)

    def restore_running_statistics(self) -> None:
        if self._running:
            torch._foreach_copy_(self._running, self._running_before)

    def _clear_gradients(self) -> None:
        """ZeRO 3, and ZeRO 2 with offload, overwrite the last step's gradients in the first pass
        of a step and add to them in the others: those of weights that the first pass does not use
        would go on for ever."""
        if zero_stage(self.deepspeed) == 3:
            self.optimizer.grad_partitions_flat_buffer.zero_()
        for gradient in getattr(self.optimizer, "accumulated_grads_in_cpu", {}).values():
            gradient.zero_()

    def seed(self, update: int) -> None:
        """Dropout of an update follows from the seed, the update and the rank."""
        number = self.run.seed + update * self.world.size + self.world.rank
        torch.manual_seed(number)
        random.seed(number)  # the choice of image tokens (sample_patch_num)

    def request(self, stop: bool = False, failed: bool = False) -> None:
        """Tell all ranks in the next step that this one was asked to stop, or could not save."""
        self._stop |= stop
        self._failed |= failed

    def passes(self, batches: list[Batch], update: int) -> tuple[list[Batch], list[float]]:
        """The passes that this rank runs, and the target tokens of each micro-batch on all ranks.

        Also tells the ranks each other's requests; all call it together.
        """
        groups = 1 + max(batch.group for batch in batches)
        counts = torch.zeros(groups, dtype=torch.float64)
        shown = torch.zeros(len(batches), len(MEDIA), dtype=torch.float64)
        for number, batch in enumerate(batches):
            counts[batch.group] += self.criterion.kept(batch.tensors["labels"], update)
            shown[number, MEDIA.index(batch.medium)] = 1.0
        flags = torch.tensor([self._stop, self._failed], dtype=torch.float64)
        told = torch.cat([counts, shown.flatten(), flags])
        dist.all_reduce(told, group=self.world.control)
        self._stop, self._failed = (bool(flag > 0) for flag in told[-2:])
        shown = told[groups:-2].view_as(shown) > 0
        passes = []
        for batch, media in zip(batches, shown, strict=True):
            for index in media.nonzero().flatten().tolist():
                own = MEDIA[index] == batch.medium
                passes.append(batch if own else self._absent(batch, MEDIA[index]))
        return passes, told[:groups].tolist()

    def _absent(self, like: Batch, medium: str) -> Batch:
        """A row of a medium without a target: what a rank runs whose own pass is of another.

        Its loss is a sum over no tokens, so its gradients are exact zeros.
        """
        shape = self.media_shape(medium)
        media = [] if shape is None else [torch.zeros(shape)]
        lengths = None if self.run.text_lengths is None else tuple(self.run.text_lengths)
        example = Example([BOS, EOS], [BOS], [IGNORE])
        tensors = collate([(example, 0)], media, medium, lengths=lengths)
        return Batch(tensors, [], 0.0, medium, like.group)

    def media_shape(self, medium: str) -> tuple[int, ...] | None:
        """Shape of one medium of the stage."""
        media = stage_media(self.run, self.stage)
        return {
            "text": None,
            "image": (3, media.image_size, media.image_size),
            "video": (3, media.video_frames, media.video_size, media.video_size),
            "audio": (media.audio_samples,),
        }[medium]

    def run_pass(
        self, batch: Batch, update: int, tracked: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Forward pass of this rank: summed loss, nll [B * U] of the tokens, labels [B, U].

        A backward pass over what is not tracked leaves DeepSpeed's gradients alone.
        """
        tensors = {name: t.to(self.device, non_blocking=True) for name, t in batch.tensors.items()}
        set_batchnorm_contribution(self.model, bool(batch.tasks))
        forward = self.deepspeed if tracked else self.deepspeed.module
        return *forward(tensors, update), tensors["labels"]

    def _micro_loss(self, batch: Batch, update: int, sums: Tensor) -> Tensor:
        """Summed loss of a micro-batch; adds each task's nll and token count to `sums`."""
        loss, token_nll, labels = self.run_pass(batch, update)
        if batch.tasks:
            names = list(TASKS)
            task_of_row = torch.tensor([names.index(task) for task in batch.tasks])
            nll = token_nll.detach().double().view(labels.shape).sum(1)
            entries = torch.stack([nll, self.criterion.counted(labels).sum(1).double()], dim=1)
            sums.index_add_(0, task_of_row.to(nll.device), entries)
        return loss

    def _update(self) -> tuple[float, bool, bool]:
        """Clip by the global norm and update, if that norm is finite.

        DeepSpeed's ZeRO optimizers look at the norm themselves, on all ranks alike.

        Returns:
            The norm before clipping, whether it was finite, and whether a norm that was not is
            fp16's search for its loss scale.
        """
        if zero_stage(self.deepspeed) == 0:
            trained = [p for p in self.names if p.requires_grad]
            for parameter in trained:
                if parameter.grad is None:  # decay acts on it all the same, as under ZeRO
                    parameter.grad = torch.zeros_like(parameter)
            if self.world.size > 1:
                self.deepspeed.buffered_allreduce_fallback(elements_per_buffer=BUCKET)
            norm = torch.nn.utils.get_total_norm(p.grad for p in trained if p.grad is not None)
            if not norm.isfinite():
                self.deepspeed.zero_grad()
                return float(norm), False, False
            if self.clip_norm:
                torch.nn.utils.clip_grads_with_norm_(trained, self.clip_norm, norm)
            self.deepspeed.step()
            return float(norm), True, False
        scale = self.loss_scale
        self.deepspeed.step()
        if self.optimizer.overflow:
            return float("nan"), False, self.precision == "fp16" and scale > 1.0
        return float(self.deepspeed.get_global_grad_norm()), True, False

    @property
    def loss_scale(self) -> float:
        """fp16's factor of the loss; 1 in other precisions."""
        return float(self.optimizer.cur_scale) if self.precision == "fp16" else 1.0

    def loss_scaler_state(self) -> dict[str, float]:
        """Where fp16's search for the loss scale stands."""
        if self.precision != "fp16":
            return {}
        scaler = self.optimizer.loss_scaler
        return {n: v for n, v in vars(scaler).items() if isinstance(v, int | float)}

    def set_loss_scaler_state(self, state: dict[str, float]) -> None:
        for name, value in state.items():
            setattr(self.optimizer.loss_scaler, name, value)

    @property
    def lr(self) -> float:
        """The learning rate of the last update; by a schedule of the ds_config, of the next."""
        return float(base_optimizer(self.deepspeed).param_groups[0]["lr"])

    def _result(self, sums: Tensor, batches: list[Batch]) -> StepResult:
        examples = sum(len(batch.tasks) for batch in batches)
        tokens = sum(
            int((b.tensors[n] != 1).sum())
            for b in batches
            for n in ("input_ids", "decoder_input_ids")
        )
        total = torch.cat([sums, sums.new_tensor([[examples, tokens]])])
        dist.all_reduce(total)
        *tasks, (loss, _), (examples, tokens) = total.tolist()
        pairs = dict(zip(TASKS, tasks, strict=True))
        return StepResult(
            loss=loss,
            task_nll={task: nll / count for task, (nll, count) in pairs.items() if count},
            grad_norm=float("nan"),
            samples=int(examples),
            tokens=int(tokens),
        )
