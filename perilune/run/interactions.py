"""What all stages of a recommender's run share: the interactions, read and split once and kept in the run directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from perilune.errors import DataError
from perilune.recsys import (
    EventLog,
    InteractionData,
    funnel,
    k_core,
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
    LogSource,
    RatingsSource,
    RecommenderRecipe,
    SplitConfig,
)

INTERACTIONS = "interactions.npz"
"""Name in the run's data."""


def check_source(recipe: RecommenderRecipe) -> None:
    """Check that what a recipe reads exists, so that a wrong name is told before anything is made.

    Raises:
        DataError: it does not.
    """
    source = recipe.interactions
    wanted = None
    if isinstance(source, FilesSource):
        wanted = Path(source.directory)
        if not wanted.is_dir():
            raise DataError(f"interactions.directory: {wanted} is not a directory")
    elif not isinstance(source, FunnelSource):
        wanted = Path(source.path)
        if not wanted.is_file():
            raise DataError(f"interactions.path: {wanted} is not a file")


def prepare_interactions(recipe: RecommenderRecipe, directory: RunDirectory, progress: Progress) -> InteractionData:
    """Read what an earlier stage prepared, or prepare it.

    Raises:
        DataError: the source is unusable, or the prepared file is damaged; the message names it.
    """
    path = directory.data(INTERACTIONS)
    if not path.is_file():
        progress.note("reading interactions")
        data = judged(read_source(recipe.interactions, recipe.data_seed), recipe)
        progress.note(describe(data))
        save_data(data, path)
    return load_data(path)


def read_source(source: InteractionSource, seed: int) -> InteractionData:
    """Read a recipe's source and split it.

    Raises:
        DataError: it is not what it should be; the message names file and line.
    """
    match source:
        case FunnelSource():
            return funnel(source.funnel)
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
            return _split(log, source.split, seed)
        case RatingsSource():
            log = read_ratings(
                Path(source.path),
                columns=source.columns,
                low=source.low,
                high=source.high,
                separator=source.separator,
                has_header=source.has_header,
            )
            return _split(log, source.split, seed)
        case FilesSource():
            return _read_files(source)


def judged(data: InteractionData, recipe: RecommenderRecipe) -> InteractionData:
    """Number items by chance, hold out a validation set, and take out what the protocol hides."""
    protocol = recipe.protocol
    if protocol.permute:
        data = data.permuted(recipe.data_seed)
    if protocol.validation:
        data = data.hold_out(recipe.data_seed)
    return data.clean() if protocol.aux == "clean" else data


def describe(data: InteractionData) -> str:
    """Say in a line how large data are."""
    counts = ", ".join(f"{name} {len(pairs):,}" for name, pairs in data.behaviors.items())
    held_out = f"{int((data.test >= 0).sum()):,} test items"
    if data.validation is not None:
        held_out += f", {int((data.validation >= 0).sum()):,} for validation"
    return f"{data.num_users:,} users, {data.num_items:,} items; {counts}; {held_out}"


def _split(log: EventLog, config: SplitConfig, seed: int) -> InteractionData:
    if config.core_users or config.core_items:
        log = k_core(log, users=config.core_users, items=config.core_items, on=config.core_on)
    if config.kind == "leave_last_out":
        return leave_last_out(log, min_target=config.min_target, seed=seed)
    return temporal(log, quantile=config.quantile, cutoff=config.cutoff, per=config.per, seed=seed)


def _read_files(source: FilesSource) -> InteractionData:
    directory, test = Path(source.directory), {} if source.test is None else {"test": source.test}
    if source.kind == "npz":
        return read_npz(directory, source.behaviors, with_times=source.with_times, **test)
    if source.kind == "pickles":
        return read_pickles(directory, source.behaviors, with_times=source.with_times)
    if source.kind == "pair_lists":
        return read_pair_lists(directory, source.behaviors, one_based=source.one_based, **test)
    read: Callable[..., InteractionData] = read_item_lists if source.kind == "item_lists" else read_json
    return read(directory, source.behaviors, **test)
