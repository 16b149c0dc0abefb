"""A recipe with every kind of stage that takes seconds, and what two of its runs must have in common."""

import hashlib
import json
from pathlib import Path

import tomli_w

from perilune.report import read_metrics

_ROLLOUT = {"group_size": 4, "prompts_per_iteration": 4, "max_response_tokens": 6}
_RL = {"iterations": 5, "checkpoint_interval": 1, "rollout": _ROLLOUT}
_RESPONSES = {"problems": 10, "samples": 4, "max_response_tokens": 6}
_FIVE_STEPS = {"steps": 5, "checkpoint_interval": 1}

STAGES = {
    "pretrain": {"kind": "pretrain", "context": 32, "windows": 4, "train": {**_FIVE_STEPS, "eval_interval": 2}},
    "sft": {
        "kind": "sft",
        "examples": 64,
        "batch_tokens": 256,
        "train": {"steps": 20, "checkpoint_interval": 1, "optimizer": {"lr": 2e-2, "adamw_lr": 1e-2}},
    },
    "curate": {
        "kind": "curate",
        "problems": 10,
        "curation": {
            "passes": 4,
            "guess_n": 0,
            "max_response_tokens": 6,
            "drop_at_or_above": 1.1,
            "file_problems": 4,
        },
    },
    "rl": {"kind": "rl", "prompts": "curate", "rl": {**_RL, "eval_interval": 2}},
    "shorter": {"kind": "l2s_rl", "prompts": "curate", "length_fraction": 0.5, "rl": _RL},
    "merge": {"kind": "l2s_merge", "start_from": "rl", "short": "sft", "long_share": 0.25},
    "reject": {"kind": "l2s_rejection", "start_from": "sft", **_RESPONSES, "batch_tokens": 64, "train": _FIVE_STEPS},
    "prefer": {"kind": "l2s_dpo", "start_from": "sft", **_RESPONSES, "batch_tokens": 128, "train": _FIVE_STEPS},
}
"""One stage of each kind that reads text. Answers are one digit, which a few steps of SFT guess often enough."""

RECIPE = {
    "name": "tiny",
    "threads": 1,
    "tokenizer": {"vocab_size": 280, "train_bytes": 20_000},
    "corpus": {"kind": "embedded", "packages": [], "held_out_fraction": 0.1, "max_train_bytes": 60_000},
    "model": {"preset": "smoke", "vocab_size": 280},
    "tasks": [{"name": "count_bits", "style": "direct"}],
    "evaluation": {
        "problems": 2,
        "samples": 1,
        "max_response_tokens": 6,
        "text_bytes": 1000,
        "context": 32,
        "transcripts": 2,
    },
}


def write_recipe(path: Path, *stages: str, **tables: object) -> Path:
    """Write a recipe of the named stages (all without names), `tables` replacing those of the same name."""
    tree = {**RECIPE, "stages": {name: STAGES[name] for name in stages or STAGES}, **tables}
    path.write_text(tomli_w.dumps(tree))
    return path


def fingerprint(directory: Path) -> dict[str, str]:
    """Return the hash of every file below a directory, the lock aside."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def computed_files(directory: Path) -> dict[str, str]:
    """Return the hashes of what a run computed: weights, optimizer states, prepared data, prompts, transcripts."""
    kept = (".safetensors", ".npy", "tokenizer.json", "corpus.json", ".jsonl")
    found = fingerprint(directory)
    return {name: digest for name, digest in found.items() if name.endswith(kept) and name != "metrics.jsonl"}


def computed_metrics(directory: Path) -> list[tuple[str, int, dict[str, str]]]:
    """Return the metrics of a run without its timings; as text, so that NaN equals NaN."""
    return [
        (record.stage, record.step, {name: repr(value) for name, value in record.values.items() if not _is_time(name)})
        for record in read_metrics(directory / "metrics.jsonl")
    ]


def computed_results(directory: Path) -> dict[str, object]:
    """Return the results of a run's stages without timings and memory."""
    results = {path.stem: json.loads(path.read_bytes()) for path in sorted((directory / "results").glob("*.json"))}
    for result in results.values():
        result["numbers"] = {name: value for name, value in result["numbers"].items() if not _is_time(name)}
        for name in ("time_s", "tokens_per_s", "peak_memory_bytes"):
            del result[name]
    return results


def _is_time(name: str) -> bool:
    return name.endswith("_s") or name == "flop_utilization"
