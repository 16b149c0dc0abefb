"""From problems to the prompts of reinforcement learning: what is too easy, guessable or not verifiable is dropped.

Work goes on in parts of `file_problems` problems; each finished part is a file, so a killed curation resumes there.

Source: Kimi k1.5, section 2.1 (RL prompt set curation).
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from perilune.engine import Completion, Request, SamplingParams
from perilune.errors import DataError
from perilune.files import write_atomic
from perilune.rl.config import CurationConfig
from perilune.rl.curation_rules import exclusion_reason, normalized_question, wilson_interval
from perilune.rl.rollout import Prompt, RolloutEngine
from perilune.rl.scoring import CORRECT_THRESHOLD, Scorer, safe_score
from perilune.seeding import derive_seed

_LOG = logging.getLogger(__name__)

PROMPTS_NAME = "prompts.jsonl"
MANIFEST_NAME = "manifest.json"
_FORMAT = "perilune.curation/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A problem that may become a prompt."""

    prompt: Prompt
    """What the policy sees and the verifier needs."""
    question: str
    """Text of the problem, for patterns and duplicates."""
    answer: str
    """The right answer."""
    guess_prefix: tuple[int, ...]
    """Tokens that force an answer without reasoning, put after the prompt (an empty thought)."""
    must_accept: tuple[tuple[int, ...], ...]
    """Responses with the right answer, in every style that the verifier should read."""
    must_refuse: tuple[tuple[int, ...], ...]
    """Responses without an answer, or with another problem's."""
    tags: tuple[str, ...] = ()
    """Domain, source, grade and the like, for the balance report."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CuratedPrompt:
    """A candidate's measurements and what became of it."""

    id: str
    """The prompt's id."""
    removed: str | None = None
    """The rule that dropped it, None if it is kept."""
    pool: str | None = None
    """`main`, or `hard_zero` if no sample solved it."""
    num_samples: int = 0
    """Samples behind the pass rate."""
    num_correct: int = 0
    """Right ones among them."""
    interval: tuple[float, float] | None = None
    """95 % Wilson interval of the pass rate."""
    num_guesses: int = 0
    """Guesses without reasoning that were made."""
    is_guessed: bool = False
    """Whether one of them was right."""

    @property
    def pass_rate(self) -> float | None:
        """Share of right samples, None if none was drawn."""
        return self.num_correct / self.num_samples if self.num_samples else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Curation:
    """The result of a curation."""

    prompts: tuple[Prompt, ...]
    """Kept prompts with their pass rates."""
    manifest: Mapping[str, Any]
    """Counts per rule and tag, settings, model."""


def curate(
    candidates: Sequence[Candidate],
    engine: RolloutEngine,
    scorer: Scorer,
    config: CurationConfig,
    directory: Path,
    *,
    stop_ids: tuple[int, ...],
    model_name: str,
    held_out: Iterable[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Curation:
    """Measure and filter `candidates`, writing `prompts.jsonl` and `manifest.json`.

    Rules in order: `duplicate`, `held_out`, `choice` and `proof`, `unverifiable`, `trivial`, `guessable`. A problem
    never solved is kept in the pool `hard_zero`. The result is a function of the arguments; parts that an earlier
    call finished under the same arguments are read back.

    Args:
        candidates: with unique ids.
        engine: holds the weights of the SFT model.
        scorer: judges responses.
        config: rules.
        directory: made if missing.
        stop_ids: tokens that end a response.
        model_name: fingerprint of the SFT model's weights.
        held_out: questions of evaluation sets, which must not be trained on.
        progress: called with (problems done, problems in all).

    Raises:
        DataError: nothing is left; the message counts what each rule removed.

    Source: Kimi k1.5, section 2.1 (pass rates by sampling, exclusion of guessable problems).
    """
    directory.mkdir(parents=True, exist_ok=True)
    repeated = _repeated(candidates, held_out)
    records: list[CuratedPrompt] = []
    for start in range(0, len(candidates), config.file_problems):
        part = candidates[start : start + config.file_problems]
        path = directory / f"part-{start // config.file_problems:05d}.jsonl"
        key = _fingerprint(part, config, model_name, [repeated.get(c.prompt.id) for c in part], stop_ids)
        known = _read_part(path, key)
        if known is None:
            known = _curate_part(part, repeated, engine, scorer, config, stop_ids)
            _write_part(path, key, known)
        records += known
        if progress is not None:
            progress(len(records), len(candidates))
    return _finish(candidates, records, config, directory, model_name)


def _repeated(candidates: Sequence[Candidate], held_out: Iterable[str]) -> dict[str, str]:
    """Ids to drop before anything is sampled: problems that occur earlier, or in an evaluation set."""
    evaluated = {normalized_question(question) for question in held_out}
    seen: set[str] = set()
    removed: dict[str, str] = {}
    for candidate in candidates:
        question = normalized_question(candidate.question)
        if question in seen:
            removed[candidate.prompt.id] = "duplicate"
        elif question in evaluated:
            removed[candidate.prompt.id] = "held_out"
        seen.add(question)
    return removed


def _curate_part(
    part: Sequence[Candidate],
    repeated: Mapping[str, str],
    engine: RolloutEngine,
    scorer: Scorer,
    config: CurationConfig,
    stop_ids: tuple[int, ...],
) -> list[CuratedPrompt]:
    reasons = {c.prompt.id: repeated.get(c.prompt.id) or _static_reason(c, scorer, config) for c in part}
    records = {c.prompt.id: CuratedPrompt(id=c.prompt.id, removed=reasons[c.prompt.id]) for c in part}
    left = [candidate for candidate in part if reasons[candidate.prompt.id] is None]
    for candidate, correct in zip(left, _count_correct(left, engine, scorer, config, stop_ids), strict=True):
        is_trivial = correct / config.passes >= config.drop_at_or_above
        records[candidate.prompt.id] = replace(
            records[candidate.prompt.id],
            num_samples=config.passes,
            num_correct=correct,
            interval=wilson_interval(correct, config.passes),
            removed="trivial" if is_trivial else None,
            pool=None if is_trivial else "main" if correct else "hard_zero",
        )
    left = [candidate for candidate in left if records[candidate.prompt.id].removed is None]
    if config.guess_n:
        for candidate, is_guessed in zip(left, _guess(left, engine, scorer, config, stop_ids), strict=True):
            record = replace(records[candidate.prompt.id], num_guesses=config.guess_n, is_guessed=is_guessed)
            dropped = replace(record, removed="guessable", pool=None)
            records[candidate.prompt.id] = dropped if is_guessed else record
    return [records[candidate.prompt.id] for candidate in part]


def _static_reason(candidate: Candidate, scorer: Scorer, config: CurationConfig) -> str | None:
    """Why a candidate is dropped before anything is sampled."""
    if not config.allow_choice and (reason := exclusion_reason(candidate.question, candidate.answer)):
        return reason
    if config.check_verifier:
        accepts = all(_is_right(scorer, candidate.prompt, response) for response in candidate.must_accept)
        refuses = not any(_is_right(scorer, candidate.prompt, response) for response in candidate.must_refuse)
        return None if accepts and refuses else "unverifiable"
    return None


def _count_correct(
    candidates: Sequence[Candidate],
    engine: RolloutEngine,
    scorer: Scorer,
    config: CurationConfig,
    stop_ids: tuple[int, ...],
) -> list[int]:
    """Right answers of each candidate among `passes` samples.

    Source: Kimi k1.5, section 2.1 (difficulty is the SFT model's pass rate over ten samples).
    """
    requests = [
        _request(c, (), config.passes, config.max_response_tokens, config, "pass", stop_ids) for c in candidates
    ]
    groups = _by_request(engine.generate(requests), requests)
    return [
        sum(
            sample.finish_reason == "eos" and _is_right(scorer, candidate.prompt, sample.token_ids)
            for sample in samples
        )
        for candidate, samples in zip(candidates, groups, strict=True)
    ]


def _guess(
    candidates: Sequence[Candidate],
    engine: RolloutEngine,
    scorer: Scorer,
    config: CurationConfig,
    stop_ids: tuple[int, ...],
) -> list[bool]:
    """Whether a candidate's answer is found within `guess_n` guesses without reasoning.

    Source: Kimi k1.5, section 2.1 (easy-to-hack prompts; N = 8).
    """
    requests = [
        _request(c, c.guess_prefix, config.guess_n, config.guess_tokens, config, "guess", stop_ids) for c in candidates
    ]
    groups = _by_request(engine.generate(requests), requests)
    return [
        any(
            sample.finish_reason == "eos"
            and _is_right(scorer, candidate.prompt, (*candidate.guess_prefix, *sample.token_ids))
            for sample in samples
        )
        for candidate, samples in zip(candidates, groups, strict=True)
    ]


def _request(
    candidate: Candidate,
    prefix: tuple[int, ...],
    num_samples: int,
    max_tokens: int,
    config: CurationConfig,
    purpose: str,
    stop_ids: tuple[int, ...],
) -> Request:
    return Request(
        prompt_ids=(*candidate.prompt.token_ids, *prefix),
        params=SamplingParams(
            max_new_tokens=max_tokens,
            temperature=config.temperature,
            seed=derive_seed(config.seed, "curate", purpose, candidate.prompt.id),
            stop_ids=stop_ids,
        ),
        num_samples=num_samples,
        id=candidate.prompt.id,
    )


def _by_request(completions: Sequence[Completion], requests: Sequence[Request]) -> list[list[Completion]]:
    by_id: dict[str, list[Completion]] = {request.id: [] for request in requests}
    for completion in completions:
        by_id[completion.request_id].append(completion)
    return list(by_id.values())


def _is_right(scorer: Scorer, prompt: Prompt, token_ids: Sequence[int]) -> bool:
    reward = safe_score(scorer, prompt, token_ids).reward
    return reward is not None and reward >= CORRECT_THRESHOLD


def _fingerprint(
    part: Sequence[Candidate],
    config: CurationConfig,
    model_name: str,
    repeated: Sequence[str | None],
    stop_ids: tuple[int, ...],
) -> str:
    content = [(c.prompt.id, c.prompt.token_ids, c.question, c.answer, c.guess_prefix) for c in part]
    return sha256(repr((content, asdict(config), model_name, list(repeated), stop_ids)).encode()).hexdigest()


def _write_part(path: Path, key: str, records: Sequence[CuratedPrompt]) -> None:
    lines = [json.dumps({"format": _FORMAT, "key": key}), *(json.dumps(asdict(record)) for record in records)]
    write_atomic(path, "\n".join(lines) + "\n")


def _read_part(path: Path, key: str) -> list[CuratedPrompt] | None:
    """Records of a part that was made by the same arguments, else None."""
    if not path.exists():
        return None
    try:
        header, *rows = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
        if header != {"format": _FORMAT, "key": key}:
            _LOG.warning("%s was made with other settings and is made again", path)
            return None
        return [_record(row) for row in rows]
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: is not a part of a curation ({error}); remove it to make it again") from error


def _record(row: Mapping[str, Any]) -> CuratedPrompt:
    interval = row["interval"]
    return CuratedPrompt(**{**row, "interval": None if interval is None else (interval[0], interval[1])})


def _finish(
    candidates: Sequence[Candidate],
    records: Sequence[CuratedPrompt],
    config: CurationConfig,
    directory: Path,
    model_name: str,
) -> Curation:
    removed = Counter(record.removed for record in records if record.removed is not None)
    kept = [(candidate, record) for candidate, record in zip(candidates, records, strict=True) if not record.removed]
    manifest = {
        "format": _FORMAT,
        "model": model_name,
        "settings": asdict(config),
        "candidates": len(candidates),
        "kept": len(kept),
        "removed": dict(sorted(removed.items())),
        "pools": dict(sorted(Counter(record.pool for _, record in kept).items())),
        "tags": dict(sorted(Counter(tag for candidate, _ in kept for tag in candidate.tags).items())),
        "guess_filter": "on" if config.guess_n else "off",
    }
    rows = [_prompt_row(candidate, record, config, model_name) for candidate, record in kept]
    write_atomic(directory / PROMPTS_NAME, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_atomic(directory / MANIFEST_NAME, json.dumps(manifest, indent=2) + "\n")
    if not kept:
        counts = ", ".join(f"{rule} {count}" for rule, count in sorted(removed.items())) or "no candidates"
        raise DataError(f"curation kept none of {len(candidates)} problems (removed: {counts}); relax a rule")
    prompts = tuple(replace(candidate.prompt, pass_rate=record.pass_rate) for candidate, record in kept)
    return Curation(prompts=prompts, manifest=manifest)


def _prompt_row(candidate: Candidate, record: CuratedPrompt, config: CurationConfig, model_name: str) -> dict[str, Any]:
    return {
        "id": candidate.prompt.id,
        "prompt": candidate.question,
        "answer": candidate.answer,
        "tags": list(candidate.tags),
        "pool": record.pool,
        "difficulty": {
            "n": record.num_samples,
            "k": record.num_correct,
            "interval": record.interval,
            "T": config.temperature,
            "seed": config.seed,
            "model": model_name,
        },
        "guess": {"n": record.num_guesses, "hit": record.is_guessed},
        "split": "train",
    }
