"""Ray itself: whether it is there, and a cluster of this machine alone."""

from __future__ import annotations

import contextlib
import importlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from perilune.errors import PeriluneError, missing_extra

_STORE_BYTES = 10**8
_BUSY_S = 0.3
_ROUNDS = 5


def import_ray() -> ModuleType:
    """Return the module.

    Raises:
        PeriluneError: Ray is not installed.
    """
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise missing_extra(PeriluneError, "sub-agents as Ray tasks need", error.name, "scale") from error
    return ray


def connected_ray() -> ModuleType:
    """Return the module, with a cluster behind it.

    Raises:
        PeriluneError: Ray is not installed, or this program is not connected to a cluster.
    """
    ray = import_ray()
    if not ray.is_initialized():
        raise PeriluneError(
            "sub-agents as Ray tasks need a cluster: connect to one with ray.init(address=...), or use local_cluster()"
        )
    return ray


@contextmanager
def local_cluster(cpus: int = 2, *, processes: int = 0) -> Iterator[None]:
    """Run a Ray cluster of this machine alone while the context lasts; of a program that is connected, use its cluster.

    Args:
        cpus: how many Ray is to count. As many processes are kept when they have nothing to do.
        processes: how many to start beforehand, so that the first tasks need not wait for them.

    Raises:
        PeriluneError: Ray is not installed.
    """
    ray = import_ray()
    if ray.is_initialized():
        yield
        return
    ray.init(
        address="local",
        num_cpus=cpus,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=_STORE_BYTES,
        _system_config={"worker_maximum_startup_concurrency": max(cpus, 2)},
    )
    try:
        _start_processes(ray, processes)
        yield
    finally:
        ray.shutdown()


def _start_processes(ray: ModuleType, count: int) -> None:
    """Have so many processes loaded with what tasks need; a free one may take two of the calls, hence the rounds."""
    task = ray.remote(num_cpus=1)(_warm_up)
    for _ in range(_ROUNDS):
        if len(set(ray.get([task.remote() for _ in range(count)]))) == count:
            return


def _warm_up() -> int:
    for name in ("perilune.agents.scale.worker", "perilune.agents.client.http", "aiohttp", "orjson", "jsonschema"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    time.sleep(_BUSY_S)
    return os.getpid()
