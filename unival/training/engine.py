"""DeepSpeed around the model: precision, ZeRO, and the arithmetic of one step."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from unival.model.batchnorm import set_batchnorm_statistics
from unival.model.modeling import UnivalForConditionalGeneration
from unival.tasks import TASKS
from unival.training.batches import Batch
from unival.training.losses import Criterion
from unival.training.options import Run, Stage


@dataclass
class StepResult:
    """Means over all ranks: loss, per-task nll, gradient norm; counts of examples and tokens."""

    loss: float
    task_nll: dict[str, float]
    grad_norm: float
    samples: int
    tokens: int


def init_distributed() -> tuple[int, int]:
    """Join or make the process group (of one in a plain `python` run): (rank, world size)."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for name, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29511",
    }.items():
        os.environ.setdefault(name, value)
    import deepspeed

    if not torch.cuda.is_available():
        # Compiling the shared-memory collective takes a minute and gains nothing here.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    return dist.get_rank(), dist.get_world_size()


def learning_rate(stage: Stage, step: int) -> float:
    """Linear warm-up to the peak, then linear decay to 0 at the horizon; step counts from 1."""
    horizon = stage.schedule_steps or stage.steps
    warmup = int(stage.warmup_ratio * horizon)
    if step <= warmup:
        return stage.learning_rate * step / max(warmup, 1)
    return stage.learning_rate * max(0.0, 1.0 - (step - warmup) / max(horizon - warmup, 1))


def deepspeed_config(run: Run, stage: Stage) -> dict[str, Any]:
    """The ds_config of a stage. A step's micro-batches are its gradient accumulation."""
    rows = max(sum(mix.rows for mix in micro.mixture) for micro in stage.micro_batches)
    return {
        "train_micro_batch_size_per_gpu": rows,
        "gradient_accumulation_steps": len(stage.micro_batches),
        "gradient_clipping": stage.clip_norm,
        "zero_optimization": {"stage": run.zero_stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": run.precision == "bf16"},
        "steps_per_print": 10**9,
    }


class Engine:
    """A model in training: forward, backward and update of one step over all ranks."""

    def __init__(self, model: UnivalForConditionalGeneration, run: Run, stage: Stage) -> None:
        import deepspeed

        if run.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision={run.precision!r}; known: fp32, bf16")
        if run.precision == "bf16" and run.zero_stage == 0:
            # DeepSpeed's stage 0 spends one Adam step at start; its first updates are too small.
            raise ValueError("precision=bf16 wants zero_stage of at least 1")
        self.run, self.stage = run, stage
        set_batchnorm_statistics(model, run.batchnorm)  # type: ignore[arg-type]
        for stack in (model.encoder, model.decoder):
            stack.gradient_checkpointing = run.recompute
        self._freeze_unused(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            trained,
            lr=stage.learning_rate,
            betas=(run.optimizer.betas[0], run.optimizer.betas[1]),
            eps=run.optimizer.eps,
            weight_decay=run.optimizer.weight_decay,
            fused=True,
        )
        self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=deepspeed_config(run, stage)
        )
        self.model = model
        self.world_size = dist.get_world_size()
        self.criterion = Criterion(
            label_smoothing=stage.label_smoothing,
            log_end=stage.log_end,
            drop_worst_ratio=stage.drop_worst_ratio,
            drop_worst_after=stage.drop_worst_after,
        )

    def _freeze_unused(self, model: UnivalForConditionalGeneration) -> None:
        """No optimizer state and no decay for encoders whose medium the stage does not show."""
        shown = {micro.medium for micro in self.stage.micro_batches}
        for name, parameter in model.named_parameters():
            for medium in ("image", "video", "audio"):
                if name.startswith(f"encoder.{medium}_") and medium not in shown:
                    parameter.requires_grad_(False)

    def step(self, batches: list[Batch], update: int) -> StepResult:
        """One optimizer step.

        The loss is the sum over micro-batches of weight times mean over the target tokens of all
        ranks, so that it does not depend on how many ranks share the rows.
        """
        counts = torch.tensor(
            [self.criterion.kept(batch.tensors["labels"], update) for batch in batches],
            dtype=torch.float64,
            device=self.deepspeed.device,
        )
        dist.all_reduce(counts)
        torch.manual_seed(self.run.seed + update * self.world_size + dist.get_rank())
        self.deepspeed.train()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.stage, update)
        # Row t: summed nll and token count of the t-th task; the last row: the loss.
        sums = torch.zeros(len(TASKS) + 1, 2, dtype=torch.float64, device=counts.device)
        for batch, count in zip(batches, counts.tolist(), strict=True):
            loss = self._micro_loss(batch, update, sums)
            sums[-1, 0] += batch.weight * loss.detach() / count
            self.deepspeed.backward(
                loss * (batch.weight * self.world_size / count), scale_wrt_gas=False
            )
            self.deepspeed.step()
        return self._result(sums, batches)

    def _micro_loss(self, batch: Batch, update: int, sums: Tensor) -> Tensor:
        """Summed loss of a micro-batch; adds each task's nll and token count to `sums`."""
        tensors = {name: t.to(self.deepspeed.device) for name, t in batch.tensors.items()}
        labels, weight = tensors.pop("labels"), tensors.pop("loss_weight")
        dtype = next(self.model.parameters()).dtype
        for name in ("pixel_values", "video_values"):
            if name in tensors:
                tensors[name] = tensors[name].to(dtype)
        out = self.deepspeed(**tensors, output_logits=False)
        result = self.criterion.of_states(
            out.decoder_last_hidden_state,
            self.model.get_input_embeddings().weight,
            labels,
            weight=weight,
            update=update,
            backend=self.model.config.kernel_backend,
        )
        names = list(TASKS)
        task_of_row = torch.tensor([names.index(task) for task in batch.tasks])
        nll = result.token_nll.double().view(labels.shape).sum(1)
        entries = torch.stack([nll, self.criterion.counted(labels).sum(1).double()], dim=1)
        sums.index_add_(0, task_of_row.to(nll.device), entries)
        return result.loss

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
        norm = self.deepspeed.get_global_grad_norm()
        return StepResult(
            loss=loss,
            task_nll={task: nll / count for task, (nll, count) in pairs.items() if count},
            grad_norm=float("nan") if norm is None else float(norm),
            samples=int(examples),
            tokens=int(tokens),
        )
