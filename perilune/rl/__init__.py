"""Reinforcement learning of Kimi k1.5: curation, sampling, objective, length reward, the iteration loop, long2short."""

from perilune.rl.config import (
    CurationConfig,
    LengthConfig,
    ObjectiveConfig,
    RLConfig,
    RolloutConfig,
    SamplingConfig,
    UpdateConfig,
)
from perilune.rl.curation import Candidate, CuratedPrompt, Curation, curate
from perilune.rl.curation_rules import exclusion_reason, wilson_interval
from perilune.rl.length import length_reward, length_weight
from perilune.rl.long2short import (
    dpo_pairs,
    merge_weights,
    short_phase,
    shortest_correct,
)
from perilune.rl.loop import RLHooks, RLLoop, RLResult, run_rl
from perilune.rl.metrics import kl_estimates, reward_metrics
from perilune.rl.objective import (
    group_advantages,
    k15_loss,
    log_partition,
    mean_reward,
    objective_loss,
    policy_gradient_loss,
    rest_loss,
)
from perilune.rl.rollout import Group, NativeRolloutEngine, Prompt, RolloutEngine, Trajectory, collect_groups
from perilune.rl.sampling import PromptSampler, priority_weights
from perilune.rl.scoring import Score, ScoredGroups, Scorer, score_groups, shape_rewards
from perilune.rl.short_data import preference_pairs, response_example, shortest_examples
from perilune.rl.text import TaskScorer, problem_prompt, response_text, task_candidates

__all__ = [
    "Candidate",
    "CuratedPrompt",
    "Curation",
    "CurationConfig",
    "Group",
    "LengthConfig",
    "NativeRolloutEngine",
    "ObjectiveConfig",
    "Prompt",
    "PromptSampler",
    "RLConfig",
    "RLHooks",
    "RLLoop",
    "RLResult",
    "RolloutConfig",
    "RolloutEngine",
    "SamplingConfig",
    "Score",
    "ScoredGroups",
    "Scorer",
    "TaskScorer",
    "Trajectory",
    "UpdateConfig",
    "collect_groups",
    "curate",
    "dpo_pairs",
    "exclusion_reason",
    "group_advantages",
    "k15_loss",
    "kl_estimates",
    "length_reward",
    "length_weight",
    "log_partition",
    "mean_reward",
    "merge_weights",
    "objective_loss",
    "policy_gradient_loss",
    "preference_pairs",
    "priority_weights",
    "problem_prompt",
    "response_example",
    "response_text",
    "rest_loss",
    "reward_metrics",
    "run_rl",
    "score_groups",
    "shape_rewards",
    "short_phase",
    "shortest_correct",
    "shortest_examples",
    "task_candidates",
    "wilson_interval",
]
