import dataclasses
import inspect
import math

import pytest

from perilune.rl import config as module
from perilune.rl.config import (
    CurationConfig,
    LengthConfig,
    ObjectiveConfig,
    RLConfig,
    RolloutConfig,
    SamplingConfig,
    UpdateConfig,
)


@pytest.mark.parametrize(
    ("config", "field", "value", "message"),
    [
        (RolloutConfig, "group_size", 1, "group_size must be >= 2"),
        (RolloutConfig, "prompts_per_iteration", 0, "prompts_per_iteration"),
        (RolloutConfig, "temperature", 0.0, "temperature must be finite and > 0"),
        (RolloutConfig, "temperature", math.inf, "temperature"),
        (RolloutConfig, "max_response_tokens", 0, "max_response_tokens"),
        (RolloutConfig, "repetition_penalty", -0.1, "repetition_penalty"),
        (ObjectiveConfig, "tau", 0.0, "tau must be finite and > 0, got 0.0"),
        (ObjectiveConfig, "tau", math.nan, "tau"),
        (ObjectiveConfig, "max_abs_logratio", 0.0, "max_abs_logratio"),
        (UpdateConfig, "minibatches_per_iteration", 0, "minibatches_per_iteration"),
        (UpdateConfig, "grad_clip", 0.0, "grad_clip"),
        (UpdateConfig, "iter_warmup_steps", -1, "iter_warmup_steps"),
        (UpdateConfig, "final_lr_ratio", 1.1, "final_lr_ratio"),
        (LengthConfig, "weight", 2.0, r"length weight must be in \[0, 2\), got 2.0"),
        (LengthConfig, "weight", -0.1, "length weight"),
        (LengthConfig, "start", 1.1, "length start"),
        (SamplingConfig, "strategy", ("curriculum", "curriculum"), "strategy"),
        (SamplingConfig, "floor", -1.0, "floor"),
        (SamplingConfig, "decay", 0.0, "decay"),
        (SamplingConfig, "prior_visits", 0.0, "prior_visits"),
        (RLConfig, "iterations", 0, "iterations"),
        (RLConfig, "budget_s", 0.0, "budget_s"),
        (RLConfig, "min_iterations", 61, "min_iterations"),
        (RLConfig, "max_verifier_error_rate", 1.5, "max_verifier_error_rate"),
        (RLConfig, "checkpoint_interval", 0, "checkpoint_interval"),
        (CurationConfig, "passes", 0, "passes"),
        (CurationConfig, "guess_n", -1, "guess_n"),
        (CurationConfig, "file_problems", 0, "file_problems"),
    ],
)
def test_values_out_of_range_are_named(config, field, value, message):
    with pytest.raises(ValueError, match=message):
        config(**{field: value})


def test_defaults_are_those_of_the_specification():
    config = RLConfig()
    assert (config.rollout.group_size, config.rollout.prompts_per_iteration, config.rollout.temperature) == (8, 16, 1.0)
    assert (config.objective.kind, config.objective.tau, config.objective.baseline) == ("k15", 0.1, "mean")
    assert (config.update.minibatches_per_iteration, config.update.optimizer_reset) == (4, "state")
    assert (config.length.weight, config.length.start) == (0.2, 0.4)
    assert config.sampling.floor == 0.02
    assert (CurationConfig().passes, CurationConfig().guess_n) == (10, 8)


def test_every_field_is_documented_and_read():
    source = inspect.getsource(module)
    classes = [
        value
        for value in vars(module).values()
        if dataclasses.is_dataclass(value) and value.__module__ == module.__name__
    ]
    assert len(classes) == 7
    for config in classes:
        for field in dataclasses.fields(config):
            _, _, after = source.partition(f"    {field.name}: ")
            assert after.partition("\n")[2].lstrip().startswith('"""'), field.name
