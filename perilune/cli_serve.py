"""`perilune serve`: a model behind the OpenAI API."""

from __future__ import annotations

import ipaddress
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

KEY_VARIABLE = "PERILUNE_API_KEY"
"""An API key, where no file of them is named."""

Dtype = Annotated[
    Literal["float32", "bfloat16"] | None, typer.Option(help="Of the parameters; the checkpoint's by default.")
]


def serve(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A run, a checkpoint's directory, a .gguf file, or smollm2.")
    ],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every one.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for any that is free.")] = 8000,
    stage: Annotated[str | None, typer.Option(help="Of a run, the stage whose model to use; the last one.")] = None,
    name: Annotated[str | None, typer.Option(help="What clients call the model; its own name by default.")] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help=f"API keys, one a line; ${KEY_VARIABLE} without it; else all may ask.")
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Answers that are written at a time.")] = 32,
    max_waiting: Annotated[int, typer.Option(min=0, help="Further ones that wait; beside them 429.")] = 128,
    max_context: Annotated[
        int | None, typer.Option(min=2, help="Most tokens of prompt plus answer; what the model can take by default.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer where a request names no limit.")] = 2048,
    temperature: Annotated[
        float | None, typer.Option(min=0, max=2, help="Where a request names none; the checkpoint's, else 0.7.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0.001, max=1, help="Where a request names none; the checkpoint's, else 1.")
    ] = None,
    cache_gib: Annotated[
        float | None,
        typer.Option(min=0.001, help="Memory of the cache; by default most of a GPU's, on a CPU at most 2."),
    ] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that an answer may take.")] = 600.0,
    drain_timeout: Annotated[float, typer.Option(min=0.0, help="Seconds that the end waits for answers.")] = 600.0,
    device: Annotated[str, typer.Option(help="Where the model is computed: cpu, cuda, cuda:1.")] = "cpu",
    dtype: Dtype = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads on a CPU; all cores by default.")] = None,
    page: Annotated[bool, typer.Option(help="Have the chat page at /.")] = True,
) -> None:
    """Serve a model behind the OpenAI API, with a chat page; /docs describes it."""
    from perilune.run import ServeOptions, serve_model

    keys = _keys(api_key_file)

    def tell(address: str) -> None:
        if not keys and not _is_loopback(host):
            print("warning: anybody who reaches this address may ask; --api-key-file limits that", file=sys.stderr)
        what = f"chat at {address}  " if page else ""
        print(f"{what}API at {address}/v1  docs at {address}/docs  Ctrl-C ends.", file=sys.stderr, flush=True)

    options = ServeOptions(
        host=host, port=port, stage=stage, name=name, keys=keys, max_batch=max_batch, max_waiting=max_waiting,
        max_context=max_context, max_tokens=max_tokens, temperature=temperature, top_p=top_p, cache_gib=cache_gib,
        timeout_s=timeout, drain_timeout_s=drain_timeout, device=device, dtype=dtype, threads=threads, has_page=page,
    )  # fmt: skip
    serve_model(model, options, on_ready=tell)


def _keys(path: Path | None) -> list[str]:
    from perilune.serve.openai.keys import check_keys, read_keys

    if path is not None:
        return read_keys(path)
    key = os.environ.get(KEY_VARIABLE)
    if key is None:
        return []
    check_keys([key], f"${KEY_VARIABLE}")
    return [key]


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
