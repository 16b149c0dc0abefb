"""The training loop: pre-training, SFT and DPO are losses and data, not loops.

A run that is stopped and resumed gives the same weights, bit for bit on a CPU, as one that was not: data are a pure
function of the step, the learning rate of the progress, and everything else is in the checkpoint.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from perilune.data import Batch, BatchSource
from perilune.errors import CheckpointError
from perilune.models import Decoder, attention_modes, config_as_set, flops_per_token, set_attention_mode
from perilune.optim import Muon, WSDSchedule, set_lr
from perilune.report import MetricValue, ProgressTask
from perilune.train.checkpoint import CheckpointStore
from perilune.train.clock import Interval, StageClock
from perilune.train.config import TrainConfig
from perilune.train.context import TrainContext, TrainResult
from perilune.train.losses import Loss
from perilune.train.monitors import LayerMonitor, clip_metrics
from perilune.train.runtime import choose_precision, matmul_rate
from perilune.train.snapshot import (
    model_state,
    module_tensors,
    optimizer_state,
    restore_model,
    restore_optimizer,
)
from perilune.train.step import (
    BadStepGuard,
    StepTotals,
    accumulate_gradients,
    dump_batches,
    finish_gradients,
    trainable,
)

logger = logging.getLogger(__name__)


def train(
    model: Decoder,
    optimizer: Optimizer,
    source: BatchSource,
    loss: Loss,
    config: TrainConfig,
    context: TrainContext | None = None,
) -> TrainResult:
    """Train until the steps or the budget are used up; resume if the store holds a checkpoint.

    With a store, metrics of the stage beyond the step that it starts from are dropped, as they will come again.

    Args:
        model: a decoder; trained in place, left in evaluation mode.
        optimizer: over the model's parameters, from `optim.build_optimizer(model, config.optimizer)`.
        source: gives `config.micro_batches` batches for each step.
        loss: `lm_loss`, `dpo_loss` or another.
        config: settings.
        context: store, metrics, progress, evaluation, stop requests.

    Returns:
        Counts and last numbers, also of the part before a resume.

    Raises:
        ValueError: there is a schedule of attention but no MoBA layer.
        NumericsError: too many bad steps in a row; the batch is dumped beside the checkpoints.
        CheckpointError: a checkpoint cannot be written, read, or belongs to another configuration.
        Exception: what `context.stopped()` makes, after a stop was requested and the state saved.
    """
    trainer = _Trainer(model, optimizer, source, loss, config, context or TrainContext())
    trainer.resume()
    try:
        with trainer.context.progress.task(trainer.context.stage, total=1.0, unit="") as task:
            trainer.run(task)
    finally:
        model.eval()
    return trainer.result()


class _Trainer:
    """A stage under way: what changes from step to step."""

    def __init__(
        self,
        model: Decoder,
        optimizer: Optimizer,
        source: BatchSource,
        loss: Loss,
        config: TrainConfig,
        context: TrainContext,
    ) -> None:
        if config.attn_schedule and not attention_modes(model):
            raise ValueError(f"attn_schedule needs moba layers; the model's are {', '.join(model.config.layers)}")
        self.model, self.optimizer, self.source, self.loss = model, optimizer, source, loss
        self.config, self.context = config, context
        self.device = next(model.parameters()).device
        self.schedule: WSDSchedule = config.schedule.build(config.optimizer.lr)
        self.monitor = LayerMonitor(model)
        self.step, self.tokens, self.skipped = 0, 0, 0
        self.last_loss: float | None = None
        self.evaluation: Mapping[str, MetricValue] = {}
        self.evaluated_step = self.saved_step = -1
        self.guard = BadStepGuard(config.max_bad_steps)
        self.clock = StageClock(config, clock=context.clock)
        self.precision: torch.dtype | None = None

    def resume(self) -> None:
        """Load the newest whole checkpoint, if there is one, and drop the metrics that come after it."""
        store, context = self.context.store, self.context
        if store is None:
            return
        store.clean()
        if store.latest(verify=False) is not None:
            self._restore(store)
        if context.metrics is not None:
            context.metrics.rewind(context.stage, self.step if self.saved_step >= 0 else -1)

    def run(self, task: ProgressTask) -> None:
        """Take steps until the stage is done."""
        if self.precision is None:
            self.precision = choose_precision(self.config.precision, self.device)
        self._start_intervals()
        while self.clock.progress(self.step) < 1.0:
            self._take_step(task)
            self._after_step()
        if self.saved_step != self.step or self.evaluated_step != self.step:
            self._evaluate()
            self._save(is_last=True)

    def result(self) -> TrainResult:
        """Return what was done so far."""
        return TrainResult(
            steps=self.step,
            tokens=self.tokens,
            elapsed_s=self.clock.elapsed_s(),
            skipped_steps=self.skipped,
            loss=self.last_loss,
            evaluation=self.evaluation,
        )

    def _start_intervals(self) -> None:
        config, now_s = self.config, self.clock.elapsed_s()
        self.evaluations = Interval(config.eval_interval, config.eval_interval_s, now_s)
        self.checkpoints = Interval(config.checkpoint_interval, config.checkpoint_interval_s, now_s)
        self.peak_flops = self.context.peak_flops
        if self.context.metrics is not None and not self.peak_flops:
            self.peak_flops = matmul_rate(self.precision or torch.float32, self.device)

    def _take_step(self, task: ProgressTask) -> None:
        started_s = self.clock.elapsed_s()
        progress = self.clock.progress(self.step + 0.5)
        lr = self.schedule.lr(progress)
        set_lr(self.optimizer, lr)
        self._switch_attention(progress)
        batches = [self.source.batch(self.step, micro).to(self.device) for micro in range(self.config.micro_batches)]
        totals, norm = self._compute_gradients(batches)
        metrics: dict[str, MetricValue] = {"loss": totals.loss, "lr": lr, "grad_norm": norm, **totals.metrics}
        should_log = self.context.metrics is not None and (self.step + 1) % self.config.log_interval == 0
        if should_log:
            metrics |= self.monitor.metrics()
        self._apply(totals, norm, batches)
        if should_log:
            metrics |= clip_metrics(self.optimizer)
        self.step += 1
        self.tokens += totals.num_tokens
        speed = self._speed(totals, self.clock.elapsed_s() - started_s)
        if should_log:
            self._log({**metrics, **speed, "tokens": self.tokens, "skipped_steps": self.skipped})
        task.update(self.clock.progress(self.step), {"loss": totals.loss, "tok/s": speed["tokens_per_s"]})

    def _switch_attention(self, progress: float) -> None:
        mode = self.config.attention_mode(progress)
        if mode is None:
            return
        before = attention_modes(self.model)
        set_attention_mode(self.model, mode)
        if attention_modes(self.model) != before:
            logger.info("%s: attention is %r from step %d on", self.context.stage, mode, self.step + 1)

    def _compute_gradients(self, batches: list[Batch]) -> tuple[StepTotals, float]:
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        precision = self.precision or torch.float32
        totals = accumulate_gradients(self.model, batches, self.loss, precision)
        norm = finish_gradients(trainable(self.model), totals.count, self.config.grad_clip) if totals.count else 0.0
        return totals, norm

    def _apply(self, totals: StepTotals, norm: float, batches: list[Batch]) -> None:
        """Update the weights, or skip: the data go on either way."""
        if totals.count == 0:
            logger.warning("step %d skipped: nothing in its batches is trained on", self.step)
            self._skip()
        elif self.guard.is_good(self.step, loss=totals.loss, grad_norm=norm):
            self.optimizer.step()
            self.monitor.finish_step(self.config.router_bias_rate)
            self.last_loss = totals.loss
        else:
            self._skip()
            if self.guard.give_up():
                raise self.guard.error(self.step, self._last_good(), self._dump(batches))
        self.optimizer.zero_grad(set_to_none=True)

    def _skip(self) -> None:
        self.skipped += 1
        if isinstance(self.optimizer, Muon):
            self.optimizer.skip_step()
        self.monitor.skip_step()

    def _speed(self, totals: StepTotals, elapsed_s: float) -> dict[str, float]:
        rate = totals.num_tokens / elapsed_s if elapsed_s > 0 else 0.0
        if not self.peak_flops or not totals.num_tokens:
            return {"tokens_per_s": rate}
        # Forward and backward are three forwards' worth; a token sees half of its sequence.
        context = (totals.num_tokens / totals.num_sequences + 1) / 2
        flops = 3 * flops_per_token(config_as_set(self.model), context)
        return {"tokens_per_s": rate, "flop_utilization": rate * flops / self.peak_flops}

    def _after_step(self) -> None:
        now_s = self.clock.elapsed_s()
        if self.context.evaluate is not None and self.evaluations.is_due(self.step, now_s):
            self._evaluate()
        stop = self.context.should_stop()
        if stop or self.checkpoints.is_due(self.step, now_s):
            self._save(is_last=stop)
        if stop:
            raise self.context.stopped()

    @torch.no_grad()
    def _evaluate(self) -> None:
        if self.context.evaluate is None or self.evaluated_step == self.step:
            self.evaluated_step = self.step
            return
        self.model.eval()
        self.evaluation = dict(self.context.evaluate(self.model))
        self.evaluated_step = self.step
        self._log(self.evaluation)

    def _log(self, values: Mapping[str, MetricValue]) -> None:
        if self.context.metrics is not None:
            self.context.metrics.log(self.step, values, stage=self.context.stage)

    def _save(self, *, is_last: bool = False) -> None:
        store = self.context.store
        if store is None:
            return
        tensors, skeleton = optimizer_state(self.optimizer)
        groups = {"model": module_tensors(self.model), "optimizer": tensors}
        try:
            store.save(self.step, groups, self._state(skeleton), self.context.config_hash)
        except CheckpointError as error:
            may_continue = self.config.on_save_error == "continue" and not is_last
            if not may_continue or store.latest(verify=False) is None:
                raise
            logger.warning("training goes on without a new checkpoint: %s", error)
        else:
            self.saved_step = self.step

    def _state(self, optimizer_skeleton: Any) -> dict[str, Any]:
        return {
            "step": self.step,
            "tokens": self.tokens,
            "elapsed_s": self.clock.elapsed_s(),
            "skipped_steps": self.skipped,
            "bad_steps_in_a_row": self.guard.in_a_row,
            "bad_steps": self.guard.total,
            "precision": str(self.precision).removeprefix("torch."),
            "num_threads": torch.get_num_threads(),
            "loss": self.last_loss,
            "evaluation": _plain(self.evaluation),
            "evaluated_step": self.evaluated_step,
            **model_state(self.model),
            "optimizer": optimizer_skeleton,
        }

    def _restore(self, store: CheckpointStore) -> None:
        checkpoint = store.load()
        if checkpoint.config_hash != self.context.config_hash:
            raise CheckpointError(
                f"{checkpoint.path}: was written with configuration {checkpoint.config_hash or 'none'}, this is "
                f"{self.context.config_hash or 'none'}; resume with the same settings, or start in a new directory"
            )
        restore_model(self.model, checkpoint)
        state = checkpoint.state
        try:
            restore_optimizer(self.optimizer, checkpoint.group("optimizer"), state["optimizer"])
            self.step, self.tokens, self.skipped = state["step"], state["tokens"], state["skipped_steps"]
            self.guard = BadStepGuard(self.config.max_bad_steps, state["bad_steps_in_a_row"], state["bad_steps"])
            self.last_loss, self.evaluation = state["loss"], state["evaluation"]
            self.evaluated_step, self.saved_step = state["evaluated_step"], state["step"]
            # `auto` may choose differently on another day; a stage keeps what it began with.
            self.precision = {"float32": torch.float32, "bfloat16": torch.bfloat16}[state["precision"]]
            self.clock = StageClock(self.config, state["elapsed_s"], self.context.clock)
            _warn_of_threads(state["num_threads"])
        except KeyError as error:
            raise CheckpointError(
                f"{checkpoint.path}: state.json lacks {error}, it is not of a training stage"
            ) from error
        logger.info("resuming %s at step %d of %s", self.context.stage, self.step, checkpoint.path)

    def _last_good(self) -> str:
        store = self.context.store
        step = None if store is None else store.latest(verify=False)
        return "none" if store is None or step is None else str(store.path(step))

    def _dump(self, batches: list[Batch]) -> str:
        if self.context.store is None:
            return "not written, as there is no checkpoint store"
        path = self.context.store.directory / f"bad-batch-{self.step:06d}.safetensors"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            dump_batches(path, batches)
        except OSError as error:
            return f"not written ({error.strerror})"
        return str(path)


def _warn_of_threads(saved: int) -> None:
    if saved != torch.get_num_threads():
        # Sums are split among threads, and float addition is not associative.
        logger.warning(
            "resuming with %d threads what %d began: numbers may differ in their last bits",
            torch.get_num_threads(),
            saved,
        )


def _plain(values: Mapping[str, MetricValue]) -> dict[str, Any]:
    """Numbers that JSON can hold; what is not finite becomes None."""
    return {name: _plain_value(value) for name, value in values.items()}


def _plain_value(value: MetricValue) -> Any:
    if isinstance(value, int | float):
        return value if abs(value) < float("inf") else None
    return [_plain_value(item) for item in value]
