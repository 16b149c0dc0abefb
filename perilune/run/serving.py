"""Serving a model: loading it, and answering until the process is told to stop."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import torch

from perilune.engine import Engine, EngineService
from perilune.errors import DataError
from perilune.run.serving_models import KNOWN_MODELS, load_served

if TYPE_CHECKING:
    from perilune.run.serving_models import TextModel
    from perilune.serve.openai import ServedModel

logger = logging.getLogger(__name__)
_RESULT = TypeVar("_RESULT")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
UNKNOWN_CONTEXT = 8192
"""Tokens of context of a model that does not say how many it can take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """How a model is served."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 8000
    """Port to listen on; 0 for any that is free."""
    stage: str | None = None
    """Of a run, whose model; None for the last."""
    name: str | None = None
    """What clients call the model; None for what it is called by itself."""
    keys: Sequence[str] = ()
    """API keys; without any all may ask."""
    max_batch: int = 32
    """Answers that are written at a time."""
    max_waiting: int = 128
    """Further ones that wait for their turn."""
    max_context: int | None = None
    """Most tokens of prompt plus answer; None for what the model can take."""
    max_tokens: int = 2048
    """Longest answer where a request names no limit."""
    temperature: float | None = None
    """Where a request names none; None for what the checkpoint says, else 0.7."""
    top_p: float | None = None
    """Likewise, else 1."""
    cache_gib: float | None = None
    """Memory of the cache; None for 0.8 of what a GPU has left, or a quarter of a machine's, at most 2 GiB."""
    timeout_s: float = 600.0
    """Longest time for an answer."""
    drain_timeout_s: float = 600.0
    """Longest time that the end waits for answers."""
    device: str = "cpu"
    """Where the model is computed."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the parameters; None for the checkpoint's."""
    threads: int | None = None
    """Of the arithmetic on a CPU; None for all cores."""
    has_page: bool = True
    """Whether the chat page is at `/`."""


def serve_model(
    model: str | Path, options: ServeOptions | None = None, *, on_ready: Callable[[str], None] | None = None
) -> None:
    """Answer requests to a model as the OpenAI API does, until SIGTERM or Ctrl-C; accepted ones are finished first.

    Args:
        model: a run directory, a directory of a checkpoint, a GGUF file, or a known name such as `smollm2`.
        options: how.
        on_ready: called with the service's address once it can answer.

    Raises:
        EngineError: the extra `serve` is not installed, the address cannot be listened on, or a limit is out of range.
        DataError: there is no such model, or no such device.
        CheckpointError: the model's files are damaged.
    """
    from perilune.serve import listen, run_app
    from perilune.serve.drain import Drain
    from perilune.serve.openai import ServerSettings, openai_app
    from perilune.serve.page import page_router

    options = options or ServeOptions()
    with listen(options.host, options.port) as listener:
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        served = _in_a_thread_that_ends(lambda: prepare(model, options))
        drain = Drain(options.drain_timeout_s)
        app = openai_app(
            served,
            settings=ServerSettings(keys=options.keys, timeout_s=options.timeout_s),
            drain=drain,
            routers=[page_router(served, needs_key=bool(options.keys))] if options.has_page else (),
        )
        run_app(app, listener, on_ready=on_ready, drain=drain)


def _in_a_thread_that_ends(work: Callable[[], _RESULT]) -> _RESULT:
    """Return what `work` does.

    Every thread that has computed keeps workers of its own, and where those of all threads are more than the cores,
    OpenMP lets them sleep between two operations instead of waiting: a fifth of the time of a step of 32 rows. Loading
    must therefore leave none behind beside the engine's.
    """
    done: list[_RESULT] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(work())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="perilune-load", daemon=True)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return done[0]


def prepare(model: str | Path, options: ServeOptions) -> ServedModel:
    """Load a model and put an engine behind it; errors are as of `serve_model`."""
    from perilune.serve.openai import Grammars, ServedModel

    try:
        device = torch.device(options.device)
    except RuntimeError as error:
        raise DataError(f"--device: {options.device!r} is no device; it must be like cpu, cuda or cuda:1") from error
    dtype = None if options.dtype is None else DTYPES[options.dtype]
    loaded = load_served(model, stage=options.stage, dtype=dtype, device=device)
    limit = context_limit(loaded, options.max_context)
    engine = Engine(
        loaded.model,
        max_batch=options.max_batch,
        context_limit=limit,
        vocab_size=loaded.tokenizer.vocab_size,
        cache_bytes=cache_bytes(device, options.cache_gib),
    )
    if engine.options.max_batch < options.max_batch or engine.options.context_limit != limit:
        logger.warning(
            "the cache has room for %d answers at a time and %s tokens of context; --cache-gib gives it more",
            engine.options.max_batch,
            engine.options.context_limit,
        )
    engine.warm_up()
    return ServedModel(
        name=options.name or (str(model) if str(model) in KNOWN_MODELS else Path(model).resolve().stem),
        service=EngineService(engine, max_waiting=options.max_waiting),
        tokenizer=loaded.tokenizer,
        template=loaded.template,
        grammars=Grammars(loaded.tokenizer),
        context_limit=engine.options.context_limit,
        max_answer_tokens=options.max_tokens,
        temperature=loaded.temperature if options.temperature is None else options.temperature,
        top_p=loaded.top_p if options.top_p is None else options.top_p,
    )


def context_limit(loaded: TextModel, wanted: int | None) -> int:
    """Return most tokens of prompt plus answer.

    Raises:
        DataError: more are wanted than the model can take.
    """
    most = loaded.details.max_positions
    if wanted is not None and most is not None and wanted > most:
        raise DataError(f"--max-context: {loaded.title} can take {most} tokens, not {wanted}")
    return wanted or most or UNKNOWN_CONTEXT


def cache_bytes(device: torch.device, wanted_gib: float | None) -> int:
    """Return bytes to set aside for the cache once the model is loaded."""
    if wanted_gib is not None:
        return int(wanted_gib * 2**30)
    if device.type == "cuda":
        return int(0.8 * torch.cuda.mem_get_info(device)[0])
    return min(2 * 2**30, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") // 4)
