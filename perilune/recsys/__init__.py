"""Multi-behavior recommendation: CIGF on interaction logs, honestly evaluated, and used.

data        pairs of each behavior, held-out purchases, the protocols "open" and "clean", validation
pickles     sparse matrices out of pickles that run nothing
sources     the field's formats
logs        event logs, RecBole's files and ratings, through tables that refuse a bad row by its line
splits      k-core, leave-last-out, the protocol "temporal"
synthetic   a shop's funnel made up, and graphs of any size
storage     data in one file, and their hash
cigf        the model; decoders: MESI and the heads it is compared with; factor_models: MF, LightGCN, MBGCN
fit         training; sampling: its batches; subgraphs: parts of large graphs; extend: new users and items
evaluation  where held-out purchases rank, exact about ties; several: the same for several items a user
baselines   popularity and the rule of evidence; item_knn: the nearest neighbors of what a user has
analysis    groups, intervals, concentration; conflict: whether tasks pull representations apart
recommend   items for users and for their events, with reasons; retrieval: candidates; export: files
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
from perilune.recsys.cigf import CIGF
from perilune.recsys.config import CIGFConfig, FactorConfig, FitConfig, MBGCNConfig, RecommenderConfig, SubgraphConfig
from perilune.recsys.conflict import ConflictReport, gradient_conflict
from perilune.recsys.data import NONE, InteractionData, Interactions, from_behaviors
from perilune.recsys.evaluation import Protocol, Ranker, Ranks, Scorer, Ties, rank_held_out
from perilune.recsys.export import export_top_k
from perilune.recsys.extend import Extension, warm_start
from perilune.recsys.factor_models import MBGCN, FactorModel
from perilune.recsys.fit import FitResult, fit
from perilune.recsys.graphs import build_graph
from perilune.recsys.item_knn import item_knn
from perilune.recsys.logs import EventLog, LogColumns, RatingColumns, read_inter, read_log, read_ratings
from perilune.recsys.models import build_recommender
from perilune.recsys.recommend import Reason, Recommendation, RecommendationEngine
from perilune.recsys.recommender import Recommender
from perilune.recsys.retrieval import CandidateIndex, recall
from perilune.recsys.several import ManyRanks, rank_many
from perilune.recsys.sources import read_item_lists, read_json, read_npz, read_pair_lists, read_pickles
from perilune.recsys.splits import k_core, keep_all, leave_last_out, temporal
from perilune.recsys.storage import data_hash, load_data, save_data
from perilune.recsys.synthetic import FunnelConfig, funnel, funnel_log, random_graph

__all__ = [
    "CIGF",
    "MBGCN",
    "NONE",
    "CIGFConfig",
    "CandidateIndex",
    "Concentration",
    "ConflictReport",
    "Difference",
    "Estimate",
    "EventLog",
    "Extension",
    "FactorConfig",
    "FactorModel",
    "FitConfig",
    "FitResult",
    "FunnelConfig",
    "InteractionData",
    "Interactions",
    "LogColumns",
    "MBGCNConfig",
    "ManyRanks",
    "Protocol",
    "Ranker",
    "Ranks",
    "RatingColumns",
    "Reason",
    "Recommendation",
    "RecommendationEngine",
    "Recommender",
    "RecommenderConfig",
    "Scorer",
    "SubgraphConfig",
    "Ties",
    "bootstrap",
    "build_graph",
    "build_recommender",
    "concentration",
    "data_hash",
    "evidence",
    "export_top_k",
    "fit",
    "from_behaviors",
    "funnel",
    "funnel_log",
    "gradient_conflict",
    "group_report",
    "item_groups",
    "item_knn",
    "k_core",
    "keep_all",
    "leave_last_out",
    "load_data",
    "paired_bootstrap",
    "popularity",
    "random_graph",
    "rank_held_out",
    "rank_many",
    "read_inter",
    "read_item_lists",
    "read_json",
    "read_log",
    "read_npz",
    "read_pair_lists",
    "read_pickles",
    "read_ratings",
    "recall",
    "save_data",
    "temporal",
    "user_groups",
    "warm_start",
]
