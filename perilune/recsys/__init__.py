"""Multi-behaviour recommendation (CIGF): so far its data, their evaluation and rules to compare with.

data        pairs of each behaviour, held-out purchases, the protocols "open" and "clean", validation
pickles     sparse matrices out of pickles that run nothing
sources     the field's formats
logs        event logs, RecBole's files and ratings, through tables that refuse a bad row by its line
splits      k-core, leave-last-out, the protocol "temporal"
synthetic   a shop's funnel made up, and graphs of any size
storage     data in one file, and their hash
evaluation  where held-out purchases rank, exact about ties
baselines   popularity, and the rule of evidence
"""

from perilune.recsys.baselines import evidence, popularity
from perilune.recsys.data import NONE, InteractionData, Interactions, from_behaviors
from perilune.recsys.evaluation import Ranks, rank_held_out
from perilune.recsys.logs import EventLog, LogColumns, RatingColumns, read_inter, read_log, read_ratings
from perilune.recsys.sources import read_item_lists, read_json, read_npz, read_pair_lists, read_pickles
from perilune.recsys.splits import k_core, leave_last_out, temporal
from perilune.recsys.storage import data_hash, load_data, save_data
from perilune.recsys.synthetic import FunnelConfig, funnel, funnel_log, random_graph

__all__ = [
    "NONE",
    "EventLog",
    "FunnelConfig",
    "InteractionData",
    "Interactions",
    "LogColumns",
    "Ranks",
    "RatingColumns",
    "data_hash",
    "evidence",
    "from_behaviors",
    "funnel",
    "funnel_log",
    "k_core",
    "leave_last_out",
    "load_data",
    "popularity",
    "random_graph",
    "rank_held_out",
    "read_inter",
    "read_item_lists",
    "read_json",
    "read_log",
    "read_npz",
    "read_pair_lists",
    "read_pickles",
    "read_ratings",
    "save_data",
    "temporal",
]
