"""Multi-behaviour recommendation (CIGF): so far its data, their evaluation and rules to compare with.

data        pairs of each behaviour, held-out purchases, the protocols "open" and "clean", validation
pickles     sparse matrices out of pickles that run nothing
sources     the field's formats
evaluation  where held-out purchases rank, exact about ties
baselines   popularity, and the rule of evidence
several     the same for several held-out items of a user
item_knn    the nearest neighbors of what a user has
"""

from perilune.recsys.baselines import evidence, popularity
from perilune.recsys.data import NONE, InteractionData, Interactions, from_behaviors
from perilune.recsys.evaluation import Ranks, rank_held_out
from perilune.recsys.item_knn import item_knn
from perilune.recsys.several import ManyRanks, rank_many
from perilune.recsys.sources import read_item_lists, read_json, read_npz, read_pair_lists, read_pickles

__all__ = [
    "NONE",
    "InteractionData",
    "Interactions",
    "ManyRanks",
    "Ranks",
    "evidence",
    "from_behaviors",
    "item_knn",
    "popularity",
    "rank_held_out",
    "rank_many",
    "read_item_lists",
    "read_json",
    "read_npz",
    "read_pair_lists",
    "read_pickles",
]
