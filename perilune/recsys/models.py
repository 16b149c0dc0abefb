"""The models by the `kind` of their settings."""

from __future__ import annotations

from perilune.nn import initialize
from perilune.recsys.cigf import CIGF
from perilune.recsys.config import CIGFConfig, FactorConfig, MBGCNConfig, RecommenderConfig
from perilune.recsys.data import InteractionData
from perilune.recsys.factor_models import MBGCN, FactorModel
from perilune.recsys.recommender import Recommender

INIT_RANGE = 0.01
"""Standard deviation of what has no initial value of its own: the encoders' matrices."""


def build_recommender(config: RecommenderConfig, data: InteractionData, *, seed: int) -> Recommender:
    """Return a model for data, initialized from a seed.

    Raises:
        DataError: the configuration names a behavior that is not in the data.
    """
    match config:
        case CIGFConfig():
            model: Recommender = CIGF(config, data)
        case FactorConfig():
            model = FactorModel(config, data)
        case MBGCNConfig():
            model = MBGCN(config, data)
    initialize(model, seed=seed, init_range=INIT_RANGE)
    return model
