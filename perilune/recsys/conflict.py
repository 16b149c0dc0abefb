"""Whether tasks pull the same representations apart: cosines between the gradients of their losses, user by user."""

# N nodes  K behaviors (tasks, experts)  B users of a batch  d width

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from perilune.recsys.cigf import CIGF
from perilune.recsys.config import FitConfig
from perilune.recsys.data import InteractionData
from perilune.recsys.fit import EpochPlan, bpr_loss
from perilune.recsys.sampling import TripleSampler
from perilune.report.recommender import ConflictRow
from perilune.seeding import make_generator

SHARED = "X"
"""Name of the embeddings that all experts' tables are made of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConflictReport:
    """Agreement of tasks over some steps of training that changed nothing."""

    rows: Sequence[ConflictRow]
    """A row for each place (the experts' tables, then `SHARED`) and pair of tasks."""
    steps: int

    def row(self, place: str, first: str, second: str) -> ConflictRow:
        """Return the row of a place and two tasks, in either order.

        Raises:
            KeyError: there is none.
        """
        for row in self.rows:
            if row.place == place and set(row.tasks) == {first, second}:
                return row
        raise KeyError(f"{place}: {first}, {second}")


def gradient_conflict(
    model: CIGF, data: InteractionData, *, steps: int = 16, seed: int = 0, config: FitConfig | None = None
) -> ConflictReport:
    """Compare the gradients that two tasks' losses send to the same representation, for every pair of tasks.

    For each step's batch of users and each task k the gradient of L_k (`bpr_loss`) is taken with respect to every
    expert's table X*_j and to the embeddings X, and the rows of the batch's users are kept. A user counts at a place
    for two tasks if both of the gradients there are other than 0: with separate input and a gate that never reads
    another expert nobody does. A cosine says nothing of size, which `magnitude` tells.

    Args:
        model: with any decoder; not changed.
        data: what it is trained on.
        steps: batches; as many epochs of users as it takes.
        seed: of users, positives and negatives.
        config: batch sizes; weights of losses do not matter.

    Returns:
        Rows in the order of experts, X last.
    """
    settings = config or FitConfig()
    device = model.user_embedding.weight.device
    plan = EpochPlan(data.num_users, settings, seed)
    sampler = TripleSampler(data, settings.samples_per_user, device)
    places = [*model.behaviors, SHARED]
    sums: dict[tuple[int, int, int], Tensor] = {}
    for step in range(steps):
        batch = plan.epoch(step // plan.steps)
        if not batch:
            break
        users = batch[step % plan.steps].to(device)
        generator = make_generator(seed, "recsys", "conflict", step, device=device)
        gradients = _gradients(model, sampler, users, generator)
        for first, second in combinations(model.tasks, 2):
            for place in range(len(places)):
                found = _agreement(gradients[first][:, place], gradients[second][:, place])
                key = (place, first, second)
                sums[key] = sums[key] + found if key in sums else found
    rows = [
        _row(model, places[place], (model.behaviors[first], model.behaviors[second]), sums.get((place, first, second)))
        for place in range(len(places))
        for first, second in combinations(model.tasks, 2)
    ]
    return ConflictReport(rows=rows, steps=steps)


def _gradients(model: CIGF, sampler: TripleSampler, users: Tensor, generator: torch.Generator) -> dict[int, Tensor]:
    """Gradients `[B, K + 1, d]` of each task's loss at the users' rows of X*_1, ..., X*_K and X."""
    with torch.enable_grad():
        tables = model.tables()
        split = tables[: model.num_users], tables[model.num_users :]
        losses = {task: bpr_loss(model, split, sampler.draw(task, users, generator), task) for task in model.tasks}
    embedding = model.user_embedding.weight
    found = {}
    for task, loss in losses.items():
        at_tables, at_embedding = tables.new_zeros(tables.shape), torch.zeros_like(embedding)
        if loss.requires_grad:  # not where no user of the batch has the behavior
            at_tables, at_embedding = torch.autograd.grad(loss, (tables, embedding), retain_graph=True)
        found[task] = torch.cat((at_tables[users], at_embedding[users][:, None]), 1)
    return found


def _agreement(a: Tensor, b: Tensor) -> Tensor:
    """Sums over users `[4]`, in float64: how many count, negative cosines, cosines, similarities of magnitude.

    Args:
        a: `[B, d]`, gradients of one task.
        b: `[B, d]`, gradients of another.
    """
    a, b = a.double(), b.double()
    a_norm, b_norm = a.norm(dim=1), b.norm(dim=1)
    both = (a_norm > 0) & (b_norm > 0)
    a, b, a_norm, b_norm = a[both], b[both], a_norm[both], b_norm[both]
    cosine = (a / a_norm[:, None] * (b / b_norm[:, None])).sum(1)
    ratio = torch.minimum(a_norm, b_norm) / torch.maximum(a_norm, b_norm)
    return torch.stack((both.sum(), (cosine < 0).sum(), cosine.sum(), (2 * ratio / (1 + ratio.square())).sum()))


def _row(model: CIGF, place: str, tasks: tuple[str, str], sums: Tensor | None) -> ConflictRow:
    users, negative, cosine, magnitude = (0.0,) * 4 if sums is None else sums.tolist()
    return ConflictRow(
        decoder=model.config.decoder,
        place=place,
        tasks=tasks,
        users=int(users),
        negative=negative / users if users else None,
        cosine=cosine / users if users else None,
        magnitude=magnitude / users if users else None,
    )
