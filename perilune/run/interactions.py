"""What all stages of a recommender's run share: the interactions, read and split once and kept in the run directory."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

from perilune.errors import DataError
from perilune.files import write_atomic
from perilune.recsys import (
    EventLog,
    InteractionData,
    funnel,
    k_core,
    keep_all,
    leave_last_out,
    load_data,
    read_inter,
    read_item_lists,
    read_json,
    read_log,
    read_npz,
    read_pair_lists,
    read_pickles,
    read_ratings,
    save_data,
    temporal,
)
from perilune.report import Progress
from perilune.run.directory import RunDirectory
from perilune.run.recommender_config import (
    FilesSource,
    FunnelSource,
    InteractionSource,
    LastOutSplit,
    LogSource,
    NoSplit,
    RatingsSource,
    RecommenderRecipe,
    SplitConfig,
    TemporalSplit,
    split_of,
)

INTERACTIONS = "interactions.npz"
"""Name in the run's data of what models learn from and are judged by."""
CATEGORIES = "categories.json"
"""Of the categories of items, where a log has them."""
SOURCE = "source.json"
"""Of what the above were made of."""


def check_source(source: InteractionSource, directory: RunDirectory) -> None:
    """Check that what a recipe reads exists and is what the run began with, so that it is told before anything is made.

    Raises:
        DataError: it does not, or is not.
    """
    if isinstance(source, FilesSource):
        if not Path(source.directory).is_dir():
            raise DataError(f"interactions.directory: {source.directory} is not a directory")
    elif not isinstance(source, FunnelSource) and not Path(source.path).is_file():
        raise DataError(f"interactions.path: {source.path} is not a file")
    if not isinstance(source, FunnelSource):  # whose settings are in the recipe, which the run compares key by key
        _check_unchanged(source, directory)


def prepare_interactions(recipe: RecommenderRecipe, directory: RunDirectory, progress: Progress) -> InteractionData:
    """Read what an earlier stage prepared, or prepare it.

    Raises:
        DataError: the source is unusable or has changed, the prepared file is damaged, or nobody has a test item; the
            message names the file, or the key.
    """
    path = directory.data(INTERACTIONS)
    if path.is_file():
        _check_unchanged(recipe.interactions, directory)
        return load_data(path)
    progress.note("reading interactions")
    hashes = fingerprint(recipe.interactions)
    data, log = _read(recipe.interactions, recipe.data_seed)
    data = judged(data, recipe)
    _check_test(data, recipe)
    progress.note(describe(data, log))
    if log is not None and log.categories:
        write_atomic(directory.data(CATEGORIES), json.dumps(_categories(log, data)) + "\n")
    write_atomic(directory.data(SOURCE), json.dumps({"sha256": hashes, **_left_out(log)}, indent=2) + "\n")
    save_data(data, path)  # last: its presence says that everything is there
    return load_data(path)


def fingerprint(source: InteractionSource) -> dict[str, str]:
    """Return SHA-256 sums of a source by file, or of the settings of one that is made up."""
    if isinstance(source, FunnelSource):
        return {"funnel": sha256(repr(source.funnel).encode()).hexdigest()}
    found = {}
    for path in _files_of(source):
        if path.is_file():
            state = path.stat()
            found[str(path)] = _sum_of(path, state.st_size, state.st_mtime_ns)
    return found


def read_source(source: InteractionSource, seed: int) -> InteractionData:
    """Read a recipe's source and split it.

    Raises:
        DataError: it is not what it should be; the message names file and line.
    """
    return _read(source, seed)[0]


def load_categories(directory: RunDirectory) -> dict[int | str, str]:
    """Return the categories of items that a run's log had, by what items are called; none where it had no such column.

    Raises:
        DataError: the file is damaged.
    """
    path = directory.data(CATEGORIES)
    try:
        return dict(json.loads(path.read_bytes())) if path.is_file() else {}
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}); choose another --run-dir and run the recipe again") from error


def judged(data: InteractionData, recipe: RecommenderRecipe) -> InteractionData:
    """Number items by chance, hold out a validation set, and take out what the protocol hides."""
    protocol = recipe.protocol
    if protocol.permute:
        data = data.permuted(recipe.data_seed)
    if protocol.validation:
        data = data.hold_out(recipe.data_seed)
    return data.clean() if protocol.aux == "clean" else data


def describe(data: InteractionData, log: EventLog | None = None) -> str:
    """Say in a line how large data are, and what of their log is not in them."""
    counts = ", ".join(f"{name} {len(pairs):,}" for name, pairs in data.behaviors.items())
    held_out = f"{int((data.test >= 0).sum()):,} test items"
    if data.validation is not None:
        held_out += f", {int((data.validation >= 0).sum()):,} for validation"
    rows = ", ".join(f"{count:,} {why}" for why, count in _left_out(log).items() if count)
    left_out = f"; rows left out: {rows}" if rows else ""
    return f"{data.num_users:,} users, {data.num_items:,} items; {counts}; {held_out}{left_out}"


def _left_out(log: EventLog | None) -> dict[str, int]:
    return {} if log is None else {"repeated": log.duplicates, "of other behaviors": log.unknown}


def _read(source: InteractionSource, seed: int) -> tuple[InteractionData, EventLog | None]:
    """Data of a source, and the log of which they were made, if there is one."""
    match source:
        case FunnelSource():
            return funnel(source.funnel), None
        case FilesSource():
            return _read_files(source), None
        case LogSource():
            read = read_log if source.kind == "log" else read_inter
            columns = {} if source.columns is None else {"columns": source.columns}
            log = read(
                Path(source.path),
                behaviors=source.behaviors,
                event_map=source.event_map,
                on_unknown=source.on_unknown,
                **columns,
            )
        case RatingsSource():
            log = read_ratings(
                Path(source.path),
                columns=source.columns,
                low=source.low,
                high=source.high,
                separator=source.separator,
                has_header=source.has_header,
            )
    config = source.split
    if config.core_users or config.core_items:
        log = k_core(log, users=config.core_users, items=config.core_items, on=config.core_on)
    return _split(log, config, seed), log


def _split(log: EventLog, config: SplitConfig, seed: int) -> InteractionData:
    match config:
        case NoSplit():
            return keep_all(log)
        case LastOutSplit():
            return leave_last_out(log, min_target=config.min_target, seed=seed)
        case TemporalSplit():
            return temporal(log, quantile=config.quantile, cutoff=config.cutoff, per=config.per, seed=seed)


def _check_test(data: InteractionData, recipe: RecommenderRecipe) -> None:
    """Check that there is something to judge by, unless the recipe asks for nothing.

    Raises:
        DataError: there is not; the message says what decides it.
    """
    if (data.test >= 0).any():
        return
    split = split_of(recipe.interactions)
    match split:
        case NoSplit():
            return
        case LastOutSplit():
            why = f"no user has interactions.split.min_target = {split.min_target} purchases or more"
        case TemporalSplit():
            why = f"there is no purchase from interactions.split.cutoff = {split.cutoff} on"
        case None:
            why = "the source holds nothing out"
    advice = "" if split is None else '; change that, or train without being judged by interactions.split.kind = "none"'
    raise DataError(f"nobody has a test item: {why}{advice}")


def _check_unchanged(source: InteractionSource, directory: RunDirectory) -> None:
    """Check that files are those of which a run's data were made.

    Raises:
        DataError: one is not, or the record is damaged.
    """
    record = directory.data(SOURCE)
    if not record.is_file() or not directory.data(INTERACTIONS).is_file():
        return
    try:
        known = dict(json.loads(record.read_bytes())["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{record} is damaged ({error}); choose another --run-dir") from error
    for name, found in fingerprint(source).items():
        if known.get(name, found) != found:
            raise DataError(
                f"{name} has changed since the run in {directory.path} began, whose models and numbers are of what it "
                "held then; choose another --run-dir for what it holds now (warm_start goes on from what was learned), "
                "or put the old file back"
            )


def _files_of(source: FilesSource | LogSource | RatingsSource) -> list[Path]:
    if not isinstance(source, FilesSource):
        return [Path(source.path)]
    directory = Path(source.directory)
    if source.kind == "pickles":
        is_official = (directory / "tst_int").exists()
        names = [f"trn_{name}" if is_official else f"train_mat_{name}.pkl" for name in source.behaviors]
        return [directory / name for name in (*names, "tst_int" if is_official else "test_mat.pkl")]
    ending, test = {"npz": ("npz", "test.npy"), "json": ("json", "test.json")}.get(source.kind, ("txt", "test.txt"))
    return [directory / name for name in (*(f"{name}.{ending}" for name in source.behaviors), source.test or test)]


@lru_cache
def _sum_of(path: Path, size: int, changed_ns: int) -> str:
    """SHA-256 of a file; size and time tell whether it is the one that was read before, as by a sweep's other runs."""
    del size, changed_ns
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def _categories(log: EventLog, data: InteractionData) -> dict[str, str]:
    """Categories of the items that the data have."""
    assert data.item_ids is not None  # logs have names
    return {str(item): log.categories[item] for item in data.item_ids.tolist() if item in log.categories}


def _read_files(source: FilesSource) -> InteractionData:
    directory = Path(source.directory)
    options: dict[str, Any] = {"on_repeated": source.on_repeated}
    test = options if source.test is None else {**options, "test": source.test}
    if source.kind == "npz":
        return read_npz(directory, source.behaviors, with_times=source.with_times, **test)
    if source.kind == "pickles":
        return read_pickles(directory, source.behaviors, with_times=source.with_times, **options)
    if source.kind == "pair_lists":
        return read_pair_lists(directory, source.behaviors, one_based=source.one_based, **test)
    read: Callable[..., InteractionData] = read_item_lists if source.kind == "item_lists" else read_json
    return read(directory, source.behaviors, **test)
