"""Muon and MuonClip, sorting parameters into groups, and learning-rate schedules."""

from perilune.optim.config import OptimizerConfig, ScheduleConfig, build_optimizer
from perilune.optim.groups import parameter_groups
from perilune.optim.muon import Muon
from perilune.optim.muonclip import MuonClip
from perilune.optim.qk_clip import ClipStats, QKClip, qk_clip_specs
from perilune.optim.schedule import Phase, StaircaseSchedule, WSDSchedule, set_lr

__all__ = [
    "ClipStats",
    "Muon",
    "MuonClip",
    "OptimizerConfig",
    "Phase",
    "QKClip",
    "ScheduleConfig",
    "StaircaseSchedule",
    "WSDSchedule",
    "build_optimizer",
    "parameter_groups",
    "qk_clip_specs",
    "set_lr",
]
