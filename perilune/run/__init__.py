"""Recipes, the run directory, and the stages in order: the only part of perilune that reads files of configuration."""

from perilune.run.chat import ChatSession, open_chat
from perilune.run.config import Recipe, presets
from perilune.run.converting import convert_model
from perilune.run.directory import RunDirectory
from perilune.run.evaluation import evaluate_run
from perilune.run.interactions import prepare_interactions
from perilune.run.launch import describe_preset, load, preset_names, run_recipe
from perilune.run.loading import LoadedModel, load_model, read_recipe
from perilune.run.pipeline import RunSummary, StageContext, check_stages, run_pipeline
from perilune.run.recipe import LoadedRecipe, build_recipe, dump_recipe, load_recipe
from perilune.run.recommender_config import RecommenderRecipe
from perilune.run.recommending import (
    RecommenderEvaluation,
    TrainedRecommender,
    conflicts,
    evaluate_recommender,
    export_recommendations,
    load_ablation,
    load_recommender,
    recommend,
    report_evaluation,
    serve_recommender,
)
from perilune.run.routing import RecallView, RoutingView, draw_routing, measure_recall
from perilune.run.schema import FieldDoc, explain
from perilune.run.serving import ServeOptions, serve_model
from perilune.run.serving_models import KNOWN_MODELS, TextModel, find_model, load_served, read_text_parts
from perilune.run.stages import STAGES
from perilune.run.swarm_config import SwarmRecipe
from perilune.run.swarm_recorded import recorded_recipe
from perilune.run.swarming import load_swarm, open_swarm
from perilune.run.sweep import plan_sweep, run_sweep

__all__ = [
    "KNOWN_MODELS",
    "STAGES",
    "ChatSession",
    "FieldDoc",
    "LoadedModel",
    "LoadedRecipe",
    "RecallView",
    "Recipe",
    "RecommenderEvaluation",
    "RecommenderRecipe",
    "RoutingView",
    "RunDirectory",
    "RunSummary",
    "ServeOptions",
    "StageContext",
    "SwarmRecipe",
    "TextModel",
    "TrainedRecommender",
    "build_recipe",
    "check_stages",
    "conflicts",
    "convert_model",
    "describe_preset",
    "draw_routing",
    "dump_recipe",
    "evaluate_recommender",
    "evaluate_run",
    "explain",
    "export_recommendations",
    "find_model",
    "load",
    "load_ablation",
    "load_model",
    "load_recipe",
    "load_recommender",
    "load_served",
    "load_swarm",
    "measure_recall",
    "open_chat",
    "open_swarm",
    "plan_sweep",
    "prepare_interactions",
    "preset_names",
    "presets",
    "read_recipe",
    "read_text_parts",
    "recommend",
    "recorded_recipe",
    "report_evaluation",
    "run_pipeline",
    "run_recipe",
    "run_sweep",
    "serve_model",
    "serve_recommender",
]
