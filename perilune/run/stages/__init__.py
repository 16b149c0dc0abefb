"""The kinds of stage: each is one function of its context and its settings that returns the stage's numbers."""

from perilune.run.pipeline import Registry
from perilune.run.stages.recommend import RECOMMENDER_STAGES, check_recommender
from perilune.run.stages.reinforce import run_curate, run_rl_stage, run_short_rl
from perilune.run.stages.shorten import run_dpo, run_merge, run_rejection
from perilune.run.stages.supervised import run_pretrain, run_sft, run_synthetic

STAGES: Registry = {
    "pretrain": run_pretrain,
    "synthetic": run_synthetic,
    "sft": run_sft,
    "curate": run_curate,
    "rl": run_rl_stage,
    "l2s_rl": run_short_rl,
    "l2s_merge": run_merge,
    "l2s_rejection": run_rejection,
    "l2s_dpo": run_dpo,
}

__all__ = ["RECOMMENDER_STAGES", "STAGES", "check_recommender"]
