"""Training a recommender: BPR on every behavior over batches of users, with checkpoints from which it goes on.

Every draw is a function of the seed and the step, and everything else is in the checkpoint: a run that was stopped and
resumed gives the same weights as one that was not, to the bit on a CPU with as many threads.
"""

# U users  K behaviors  B users of a batch

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from perilune.errors import BackendError, CheckpointError, DataError, NumericsError
from perilune.optim import Muon, StaircaseSchedule, parameter_groups, set_lr
from perilune.recsys.cigf import CIGF
from perilune.recsys.config import FitConfig
from perilune.recsys.data import InteractionData
from perilune.recsys.evaluation import Ranker
from perilune.recsys.graphs import check_behaviors
from perilune.recsys.recommender import Recommender
from perilune.recsys.sampling import Triples, TripleSampler, warn_of_gaps
from perilune.recsys.subgraphs import Subgraph, SubgraphSampler
from perilune.report import MetricValue, ProgressTask
from perilune.seeding import derive_seed, make_generator
from perilune.train import TrainContext, module_tensors, optimizer_state, restore_module, restore_optimizer
from perilune.train.clock import Interval

logger = logging.getLogger(__name__)

SELECTED_BY = "ndcg@10"
"""Metric of the validation set, ranked in full, by which the best epoch is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FitResult:
    """What training did, over all its starts."""

    epochs: int
    steps: int
    elapsed_s: float
    """Wall-clock seconds, evaluation and checkpoints included."""
    epoch_s: float
    """Median seconds of an epoch's steps, evaluation apart; of this start."""
    loss: float
    """Mean of the last epoch, without the L2 term; NaN without an epoch."""
    validation: Mapping[str, float] = field(default_factory=dict)
    """Best validation numbers; empty without a validation set."""
    best_epoch: int | None = None
    """Epoch whose weights the model has; None: those of the last."""


def fit(
    model: Recommender,
    data: InteractionData,
    config: FitConfig,
    context: TrainContext | None = None,
    *,
    seed: int = 0,
) -> FitResult:
    """Train a model in place; resume if the store holds a checkpoint.

    With a validation set the weights of the best validation epoch are kept, otherwise those of the last.

    Args:
        model: initialized.
        data: what it was made for; never its test set is looked at.
        config: settings.
        context: store, metrics, progress and stop requests; its `evaluate` is not used.
        seed: of batches and negatives.

    Raises:
        DataError: a behavior weight names no behavior; `subgraph` is given, and the model is no CIGF.
        BackendError: the device is not there.
        NumericsError: the loss is not finite.
        CheckpointError: a checkpoint cannot be written or read, or is of other settings.
        Exception: what `context.stopped()` makes, after a stop was requested and the state saved.
    """
    trainer = _Trainer(model, data, config, context or TrainContext(), seed)
    trainer.resume()
    trainer.start()
    with trainer.context.progress.task(trainer.context.stage, total=float(config.epochs), unit="epoch") as task:
        trainer.run(task)
    return trainer.result()


def bpr_loss(model: Recommender, tables: tuple[Tensor, Tensor], triples: Triples, task: int) -> Tensor:
    """Mean of softplus(-(o_us - o_ut)) over the triples of a behavior; 0 without any.

    Source: CIGF, eq. 13.

    Args:
        model: whose head scores.
        tables: the users' representations `[U, S, d]` and the items' `[I, S, d]`.
        triples: users and items by their places in the tables.
        task: the behavior.
    """
    users, items = tables
    if not len(triples.users):
        return users.new_zeros(())
    x = _rows(users, triples.users)
    seen, unseen = _rows(items, torch.cat((triples.positives, triples.negatives))).chunk(2)
    return F.softplus(model.logits(x, unseen, task) - model.logits(x, seen, task)).mean()


def _rows(table: Tensor, places: Tensor) -> Tensor:
    flat = table.flatten(1)
    # Both gradients repeat to the bit: on a CPU that of index_select takes a fifth of the time, on a GPU it would not.
    taken = F.embedding(places, flat) if flat.is_cuda else flat.index_select(0, places)
    return taken.unflatten(1, table.shape[1:])


class EpochPlan:
    """Which users each step takes: a permutation of all, an epoch's first, in batches."""

    def __init__(self, num_users: int, config: FitConfig, seed: int) -> None:
        self._num_users, self._seed, self._batch, self._subgraph = num_users, seed, config.batch_users, config.subgraph
        self.users = min(config.users_per_epoch, num_users)
        self.steps = sum(self._steps(count) for count in self._chunks())
        self.decay_steps = config.decay_steps or max(1, self.users // config.batch_users)

    def epoch(self, epoch: int) -> list[Tensor]:
        """Return the batches of users of an epoch."""
        return [batch for chunk in self.chunks(epoch) for batch in self.batches(chunk)]

    def chunks(self, epoch: int) -> list[Tensor]:
        """Return the users of each part of the graph on which an epoch trains; without parts, all of the epoch's."""
        generator = make_generator(self._seed, "recsys", "users", epoch)
        return list(torch.randperm(self._num_users, generator=generator)[: self.users].split(self._chunks()))

    def batches(self, chunk: Tensor) -> list[Tensor]:
        """Return the batches of a chunk of users; of parts a last one that is not full is left out."""
        return list(chunk.split(self._batch))[: self._steps(len(chunk))]

    def _chunks(self) -> list[int]:
        size = max(1, self.users if self._subgraph is None else self._subgraph.chunk_users)
        return [min(size, self.users - low) for low in range(0, self.users, size)]

    def _steps(self, users: int) -> int:
        return math.ceil(users / self._batch) if self._subgraph is None else max(1, users // self._batch)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """What some steps train on: all data, or a part whose users and items have numbers of their own."""

    num_users: int
    tables: Callable[[], Tensor]
    sampler: TripleSampler
    batches: list[Tensor]


class _Trainer:
    """Training under way."""

    def __init__(
        self, model: Recommender, data: InteractionData, config: FitConfig, context: TrainContext, seed: int
    ) -> None:
        check_behaviors(data, config.behavior_weights or {})
        self.device = _device(config)
        self.model, self.config, self.context, self.seed = model.to(self.device), config, context, seed
        self.plan = EpochPlan(data.num_users, config, seed)
        self.schedule = StaircaseSchedule(peak=config.lr, factor=config.lr_decay, interval=self.plan.decay_steps)
        if config.subgraph is not None and not isinstance(model, CIGF):
            raise DataError(f"subgraph needs a cigf, the model is a {type(model).__name__}")
        self.data = data
        self.parts = None if config.subgraph is None else SubgraphSampler(data, config.subgraph)
        self.sampler = TripleSampler(data, config.samples_per_user, self.device)
        model.trained_with(config.behavior_weights)
        weights = [(config.behavior_weights or {}).get(name, 1.0) for name in data.behaviors]
        self.tasks = [(task, weights[task]) for task in model.tasks if weights[task] > 0]
        # Not by the run's seed: runs of other seeds are chosen by the same users.
        self.ranker = (
            None
            if data.validation is None
            else Ranker(data, protocol="full", split="validation", most_users=config.validation_users or None)
        )
        groups = parameter_groups(model, lr=config.lr, weight_decay=0.0, overrides={"": "adamw"})
        self.optimizer = Muon(groups, config.lr, betas=(0.9, 0.999), weight_decay=0.0)
        self.epoch, self.step, self.loss = 0, 0, math.nan
        self.best: dict[str, float] = {}
        self.best_epoch: int | None = None
        self.best_weights: dict[str, Tensor] = {}
        self.evaluated_epoch = 0
        self.earlier_s, self.started_s = 0.0, time.monotonic()
        self.epoch_times: list[float] = []

    def resume(self) -> None:
        """Load the newest whole checkpoint, if there is one, and drop the metrics that come after it."""
        store = self.context.store
        if store is None:
            return
        store.clean()
        if store.latest(verify=False) is not None:
            self._restore()
        if self.context.metrics is not None:
            self.context.metrics.rewind(self.context.stage, self.epoch or -1)

    def start(self) -> None:
        """Start the clock of checkpoints, and say what of the data nothing can be learned from."""
        warn_of_gaps(self.data)
        self.checkpoints = Interval(None, self.config.checkpoint_interval_s, self._elapsed_s())

    def run(self, task: ProgressTask) -> None:
        """Train the epochs that are left."""
        while not self._is_over():
            metrics = self._train_epoch()
            metrics |= self._evaluate()
            if self.epoch % self.config.log_interval == 0 or self._is_over():
                self._log(metrics)
            shown = {name: metrics[name] for name in ("loss", f"validation_{SELECTED_BY}") if name in metrics}
            task.update(float(self.epoch), shown)
            stop = self.context.should_stop() and not self._is_over()
            if stop or self._is_over() or self.checkpoints.is_due(self.epoch, self._elapsed_s()):
                self._save()
            if stop:
                raise self.context.stopped()
        if self.best_weights:
            self.model.load_state_dict(self.best_weights)

    def result(self) -> FitResult:
        """Return what was done."""
        times = sorted(self.epoch_times)
        return FitResult(
            epochs=self.epoch,
            steps=self.step,
            elapsed_s=self._elapsed_s(),
            epoch_s=times[len(times) // 2] if times else 0.0,
            loss=self.loss,
            validation=self.best,
            best_epoch=self.best_epoch,
        )

    def _is_over(self) -> bool:
        patience, interval = self.config.patience, self.config.eval_interval
        waited = 0 if self.best_epoch is None else (self.evaluated_epoch - self.best_epoch) // max(1, interval)
        return self.epoch >= self.config.epochs or (patience is not None and waited >= patience)

    def _train_epoch(self) -> dict[str, float]:
        began_s = time.monotonic()
        total = torch.zeros((), device=self.device)
        penalty = torch.zeros((), device=self.device)
        steps = 0
        for part in self._parts():
            for users in part.batches:
                loss, l2 = self._train_step(part, users.to(self.device))
                total, penalty, steps = total + loss, penalty + l2, steps + 1
        self.epoch += 1
        took_s = time.monotonic() - began_s
        self.epoch_times.append(took_s)
        self.loss = float(total) / max(1, steps)
        if not math.isfinite(self.loss):
            raise NumericsError(f"epoch {self.epoch}: the loss is {self.loss}; lower lr, now {self.config.lr}")
        return {
            "loss": self.loss,
            "l2_loss": float(penalty) / max(1, steps),
            "lr": self.schedule.lr_at(max(0, self.step - 1)),
            "epoch_s": took_s,
        }

    def _parts(self) -> Iterator[_Part]:
        """What this epoch trains on."""
        for number, chunk in enumerate(self.plan.chunks(self.epoch)):
            batches = self.plan.batches(chunk)
            if self.parts is None:
                yield _Part(
                    num_users=self.data.num_users, tables=self.model.tables, sampler=self.sampler, batches=batches
                )
            else:
                generator = np.random.default_rng(derive_seed(self.seed, "recsys", "subgraph", self.epoch, number))
                yield self._part(self.parts.draw(chunk.numpy(), generator), batches)

    def _part(self, drawn: Subgraph, batches: list[Tensor]) -> _Part:
        assert isinstance(self.model, CIGF)
        users, items = (torch.from_numpy(x).to(self.device) for x in (drawn.users, drawn.items))
        numbers = torch.from_numpy(drawn.users)
        return _Part(
            num_users=len(users),
            tables=partial(self.model.tables_of, users, items, self.model.graph_of(drawn.data)),
            sampler=TripleSampler(drawn.data, self.config.samples_per_user, self.device),
            batches=[torch.searchsorted(numbers, batch) for batch in batches],
        )

    def _train_step(self, part: _Part, users: Tensor) -> tuple[Tensor, Tensor]:
        set_lr(self.optimizer, self.schedule.lr_at(self.step))
        generator = make_generator(self.seed, "recsys", "triples", self.step, device=self.device)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.step_loss(part, users, generator)
        l2 = self.config.l2 * torch.stack([p.square().sum() for p in self.model.decayed()]).sum()
        (loss + l2).backward()
        self.optimizer.step()
        self.step += 1
        return loss.detach(), l2.detach()

    def step_loss(self, part: _Part, users: Tensor, generator: torch.Generator) -> Tensor:
        """Sum of the behaviors' mean losses on a batch of a part's users `[B]`."""
        tables = part.tables()
        of_users, of_items = tables[: part.num_users], tables[part.num_users :]
        loss = tables.new_zeros(())
        for task, weight in self.tasks:
            triples = part.sampler.draw(task, users, generator)
            loss = loss + weight * bpr_loss(self.model, (of_users, of_items), triples, task)
        return loss

    def _evaluate(self) -> dict[str, float]:
        is_due = bool(self.config.eval_interval) and self.epoch % self.config.eval_interval == 0
        if self.ranker is None or not len(self.ranker.users) or not (is_due or self.epoch == self.config.epochs):
            return {}
        found = self.ranker.rank(self.model.scorer()).summary((10,))
        self.evaluated_epoch = self.epoch
        spread = self.model.collapse() if isinstance(self.model, CIGF) else {}
        if found[SELECTED_BY] > self.best.get(SELECTED_BY, -1.0):
            self.best, self.best_epoch = found, self.epoch
            self.best_weights = {name: tensor.clone() for name, tensor in module_tensors(self.model).items()}
        return {f"validation_{name}": value for name, value in found.items()} | spread

    def _elapsed_s(self) -> float:
        return self.earlier_s + time.monotonic() - self.started_s

    def _log(self, values: Mapping[str, MetricValue]) -> None:
        if self.context.metrics is not None:
            self.context.metrics.log(self.epoch, values, stage=self.context.stage)

    def _save(self) -> None:
        """Save the weights that count (`model`), and the last ones (`last`), from which training goes on."""
        store = self.context.store
        if store is None:
            return
        tensors, skeleton = optimizer_state(self.optimizer)
        last = module_tensors(self.model)
        groups = {"model": self.best_weights or last, "last": last, "optimizer": tensors}
        state: dict[str, Any] = {
            "epoch": self.epoch,
            "step": self.step,
            "loss": self.loss if math.isfinite(self.loss) else None,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "evaluated_epoch": self.evaluated_epoch,
            "elapsed_s": self._elapsed_s(),
            "optimizer": skeleton,
        }
        store.save(self.epoch, groups, state, self.context.config_hash)

    def _restore(self) -> None:
        assert self.context.store is not None
        checkpoint = self.context.store.load()
        if checkpoint.config_hash != self.context.config_hash:
            raise CheckpointError(
                f"{checkpoint.path}: was written with settings or data {checkpoint.config_hash or 'none'}, these are "
                f"{self.context.config_hash or 'none'}; resume with the same, or start in a new directory"
            )
        restore_module(self.model, checkpoint, "last")
        state = checkpoint.state
        try:
            restore_optimizer(self.optimizer, checkpoint.group("optimizer"), state["optimizer"])
            self.epoch, self.step = state["epoch"], state["step"]
            self.loss = math.nan if state["loss"] is None else state["loss"]
            self.best, self.best_epoch = dict(state["best"]), state["best_epoch"]
            self.evaluated_epoch, self.earlier_s = state["evaluated_epoch"], state["elapsed_s"]
        except KeyError as error:
            raise CheckpointError(f"{checkpoint.path}: state.json lacks {error}, it is not of a recommender") from error
        if self.best_epoch is not None:
            self.best_weights = {name: tensor.to(self.device) for name, tensor in checkpoint.group("model").items()}
        logger.info("resuming %s at epoch %d of %s", self.context.stage, self.epoch, checkpoint.path)


def _device(config: FitConfig) -> torch.device:
    is_there = torch.cuda.is_available()
    if config.device == "cuda" and not is_there:
        raise BackendError(
            'fit: device "cuda" was asked for, and there is no GPU that torch can use; use "cpu" or "auto"'
        )
    return torch.device("cuda" if is_there and config.device != "cpu" else "cpu")
