"""Recipes, the run directory, and the stages in order: the only part of perilune that reads files of configuration."""

from perilune.run.chat import ChatSession, open_chat
from perilune.run.config import Recipe, presets
from perilune.run.directory import RunDirectory
from perilune.run.evaluation import evaluate_run
from perilune.run.launch import describe_preset, load, preset_names, run_recipe
from perilune.run.loading import LoadedModel, load_model, read_recipe
from perilune.run.pipeline import RunSummary, StageContext, check_stages, run_pipeline
from perilune.run.recipe import LoadedRecipe, build_recipe, dump_recipe, load_recipe
from perilune.run.routing import RecallView, RoutingView, draw_routing, measure_recall
from perilune.run.schema import FieldDoc, explain
from perilune.run.stages import STAGES
from perilune.run.sweep import plan_sweep, run_sweep

__all__ = [
    "STAGES",
    "ChatSession",
    "FieldDoc",
    "LoadedModel",
    "LoadedRecipe",
    "RecallView",
    "Recipe",
    "RoutingView",
    "RunDirectory",
    "RunSummary",
    "StageContext",
    "build_recipe",
    "check_stages",
    "describe_preset",
    "draw_routing",
    "dump_recipe",
    "evaluate_run",
    "explain",
    "load",
    "load_model",
    "load_recipe",
    "measure_recall",
    "open_chat",
    "plan_sweep",
    "preset_names",
    "presets",
    "read_recipe",
    "run_pipeline",
    "run_recipe",
    "run_sweep",
]
