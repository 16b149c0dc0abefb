"""Small data for the recommender's tests."""

from __future__ import annotations

import numpy as np
from torch import nn

from perilune.nn import initialize
from perilune.recsys import InteractionData, from_behaviors
from perilune.recsys.cigf import CIGF
from perilune.recsys.config import CIGFConfig


def small_data(
    num_users: int = 7,
    num_items: int = 9,
    behaviors: tuple[str, ...] = ("view", "cart", "buy"),
    density: float = 0.4,
    seed: int = 0,
    empty: tuple[str, ...] = (),
) -> InteractionData:
    """Pairs by chance; the test item of a user is one that was not bought, if there is one."""
    generator = np.random.default_rng(seed)
    drawn = {name: generator.random((num_users, num_items)) < density * (name not in empty) for name in behaviors}
    bought = drawn[behaviors[-1]]
    test = [None if row.all() else int(generator.choice(np.flatnonzero(~row))) for row in bought]
    pairs = {name: (*np.nonzero(matrix), None) for name, matrix in drawn.items()}
    return from_behaviors(pairs, test, num_users=num_users, num_items=num_items)


def model_of(data: InteractionData, seed: int = 1, range_: float = 0.5, **settings: object) -> CIGF:
    """A CIGF in float64 with embeddings and biases that are not tiny, so that every term counts."""
    model = CIGF(CIGFConfig(**{"dim": 4, **settings}), data)  # pyright: ignore[reportArgumentType]
    return scrambled(initialize(model, seed=seed), seed, range_).double()  # pyright: ignore[reportReturnType]


def scrambled(model: nn.Module, seed: int, range_: float) -> nn.Module:
    """Fill what is trained with N(0, range_)."""
    for index, parameter in enumerate(model.parameters()):
        if parameter.requires_grad:
            values = np.random.default_rng((seed, index)).normal(size=tuple(parameter.shape)) * range_
            parameter.data.copy_(parameter.new_tensor(values))
    return model
