"""The page of a run as one text: with a server behind it, or with a run's data in it and nothing behind it."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

SCRIPTS = ("fold.js", "rows.js", "panels.js", "main.js")


@cache
def script() -> str:
    """Return the page's script."""
    static = files("perilune.agents.views") / "static"
    return "\n".join((static / name).read_text(encoding="utf-8") for name in SCRIPTS)


@cache
def style() -> str:
    """Return the page's style sheet, in the reports' colors."""
    from perilune.report.style import PALETTE

    return _render("view.css.j2", palette=PALETTE)


def served_page(run_id: str, base: str) -> str:
    """Return a run's page that asks a server for what it shows.

    Args:
        run_id: the run.
        base: relative address of the list of runs, ending in a slash.
    """
    data = as_json({"run_id": run_id, "base": base})
    return _render("view.html.j2", run_id=run_id, base=base, data=data, policy="", style="", script="")


def whole_page(
    run_id: str, events: Sequence[Mapping[str, Any]], transcripts: Mapping[str, Sequence[Mapping[str, Any]]]
) -> str:
    """Return a run's page that stands alone.

    Args:
        run_id: the run.
        events: from `model.lean`.
        transcripts: by agent, from `transcript.entry_dicts`.
    """
    # Placed between tags as they are, so the hashes of the policy are those of exactly these texts.
    code, css = script(), style()
    policy = (
        f"default-src 'none'; script-src '{_hash(code)}'; style-src '{_hash(css)}'; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )
    data = as_json({"run_id": run_id, "base": "", "events": events, "transcripts": transcripts})
    return _render("view.html.j2", run_id=run_id, base="", data=data, policy=policy, style=css, script=code)


def runs_page(runs: Sequence[Mapping[str, Any]], *, is_live: bool, places: str) -> str:
    """Return the list of runs.

    Args:
        runs: run_id, state, task, model, begun and events of each.
        is_live: whether any is under way, so that the page loads itself again now and then.
        places: where runs are looked for.
    """
    return _render("runs.html.j2", runs=runs, is_live=is_live, places=places)


def as_json(value: Any) -> str:
    """Return JSON in ASCII that may stand inside a script element, whatever texts are in it."""
    text = json.dumps(value, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _render(name: str, **values: Any) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(loader=PackageLoader("perilune.agents.views"), autoescape=True, undefined=StrictUndefined)
    return environment.get_template(name).render(**values)
