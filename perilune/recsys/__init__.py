"""Multi-behaviour recommendation (CIGF): so far its data, their evaluation and rules to compare with.

data        pairs of each behaviour, held-out purchases, the protocols "open" and "clean", validation
pickles     sparse matrices out of pickles that run nothing
sources     the field's formats
evaluation  where held-out purchases rank, exact about ties
baselines   popularity, and the rule of evidence
several     the same for several held-out items of a user
item_knn    the nearest neighbors of what a user has
analysis    groups, intervals, concentration
conflict    whether tasks pull the same representations apart (needs torch, and is not imported here)
"""

from perilune.recsys.analysis import (
    Concentration,
    Difference,
    Estimate,
    bootstrap,
    concentration,
    group_report,
    item_groups,
    paired_bootstrap,
    user_groups,
)
from perilune.recsys.baselines import evidence, popularity
from perilune.recsys.data import NONE, InteractionData, Interactions, from_behaviors
from perilune.recsys.evaluation import Ranks, rank_held_out
from perilune.recsys.item_knn import item_knn
from perilune.recsys.several import ManyRanks, rank_many
from perilune.recsys.sources import read_item_lists, read_json, read_npz, read_pair_lists, read_pickles

__all__ = [
    "NONE",
    "Concentration",
    "Difference",
    "Estimate",
    "InteractionData",
    "Interactions",
    "ManyRanks",
    "Ranks",
    "bootstrap",
    "concentration",
    "evidence",
    "from_behaviors",
    "group_report",
    "item_groups",
    "item_knn",
    "paired_bootstrap",
    "popularity",
    "rank_held_out",
    "rank_many",
    "read_item_lists",
    "read_json",
    "read_npz",
    "read_pair_lists",
    "read_pickles",
    "user_groups",
]
