"""`write_report`: a run directory in, one HTML file out."""

from __future__ import annotations

from pathlib import Path

from perilune.files import write_atomic
from perilune.report.html import Page, render_page
from perilune.report.rundata import REPORT_FILE, RunData, load_run


def write_report(run_directory: Path) -> Path:
    """Write `report.html` into a run directory from the files in it, finished or not.

    Args:
        run_directory: holds `recipe.toml`; what is missing of `results/`, `metrics.jsonl`, `samples/` and
            `machine.json` is left out of the report.

    Returns:
        Path of the report.

    Raises:
        DataError: it is not a run directory, or a file in it is damaged.
    """
    run = load_run(run_directory)
    path = run_directory / REPORT_FILE
    write_atomic(path, render_page(build_page(run)))
    return path


def build_page(run: RunData) -> Page:
    """Return the report's sections, those that the run can fill."""
    from perilune.report import recommender, sections

    builders = (
        sections.summary_section,
        recommender.comparison_section,
        sections.loss_section,
        sections.max_logits_section,
        sections.expert_section,
        sections.policy_section,
        recommender.recommender_section,
        sections.task_section,
        sections.transcript_section,
        sections.timing_section,
        sections.machine_section,
        sections.recipe_section,
    )
    made = [builder(run) for builder in builders]
    place = builders.index(recommender.recommender_section)
    made[place:place] = recommender.evaluation_sections(run)
    stages = ", ".join(result.stage for result in run.results) or "no stage finished yet"
    return Page(
        title=run.name, subtitle=f"Stages: {stages}", sections=[section for section in made if section is not None]
    )
