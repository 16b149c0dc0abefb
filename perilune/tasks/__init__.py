"""Verifiable tasks: problems, verifiers and scripted teachers."""

from perilune.tasks.answers import AnswerFormat, Extraction, extract_answer, render_answer
from perilune.tasks.base import SPLITS, Problem, Reward, Split, Style, Task, Trace, encode_trace
from perilune.tasks.config import TaskConfig
from perilune.tasks.mixture import TASKS, TaskMixture, build_task
from perilune.tasks.teacher import MARKERS, behaviors_of

__all__ = [
    "MARKERS",
    "SPLITS",
    "TASKS",
    "AnswerFormat",
    "Extraction",
    "Problem",
    "Reward",
    "Split",
    "Style",
    "Task",
    "TaskConfig",
    "TaskMixture",
    "Trace",
    "behaviors_of",
    "build_task",
    "encode_trace",
    "extract_answer",
    "render_answer",
]
