"""Candidates for catalogs that are too large to be scored in full: the best items of each expert, from faiss.

MESI's scores are no inner products, as the gate depends on both sides; what each expert says is one. So every expert
has its own index, and so has their mixture under the gate that the user alone gives; the best of all are united, and
the model itself ranks the union. What that misses, `recall` tells.
An index is not saved: it is made from the tables when a service starts.
"""

# N nodes  I items  S slices of a representation  d width  b users

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from perilune.errors import DataError, missing_extra
from perilune.recsys.recommender import Recommender

if TYPE_CHECKING:
    from perilune.recsys.ids import Id
    from perilune.recsys.recommend import RecommendationEngine

Kind = Literal["flat", "ivf", "hnsw"]
"""`flat` scans all items; `ivf` scans the cells nearest to the user; `hnsw` walks a graph that takes long to make."""

PROBED = 1 / 4
"""Share of an ivf index's cells that are scanned at least."""
_PER_CELL = 39  # faiss warns below so many items for each cell
_NEIGHBORS = 32


class CandidateIndex:
    """One inner-product index for each kind of vector by which a model's items are searched."""

    def __init__(self, model: Recommender, indices: Sequence[Any], kind: Kind, per_expert: int) -> None:
        self.model, self.kind, self.per_expert = model, kind, per_expert
        self._indices = list(indices)
        self._faiss = _import_faiss()

    @classmethod
    def build(
        cls, model: Recommender, tables: Tensor, kind: Kind = "flat", per_expert: int = 200, seed: int = 0
    ) -> CandidateIndex:
        """Index the items' rows of a model's tables.

        Args:
            model: what the tables are of.
            tables: `[N, S, d]`.
            kind: of the indices.
            per_expert: candidates that each index gives, before items are left out.
            seed: of ivf's cells.

        Raises:
            DataError: the model's scores cannot be searched for, or faiss is not installed.
            ValueError: no such kind, or per_expert < 1.
        """
        if kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {kind!r}")
        if per_expert < 1:
            raise ValueError(f"per_expert must be >= 1, got {per_expert}")
        with torch.no_grad():
            keys = model.keys(tables[model.num_users :].detach())
        if not keys:
            raise DataError(
                "candidates need a decoder whose experts are inner products (mesi, bilinear, dot), or a model whose "
                "scores are; this one's items are all scored"
            )
        faiss = _import_faiss()
        indices = [_index(faiss, vectors.float().contiguous().cpu().numpy(), kind, seed) for vectors in keys]
        return cls(model, indices, kind, per_expert)

    @torch.no_grad()
    def search(self, x: Tensor, task: int, count: int | None = None) -> list[np.ndarray]:
        """Return the candidates of users, sorted item numbers for each.

        Args:
            x: `[b, S, d]`.
            task: behavior.
            count: candidates of each index; `per_expert` if None.
        """
        count = self.per_expert if count is None else count
        found = []
        for place, query in self.model.queries(x, task).items():
            index = self._indices[place]
            most = min(count, index.ntotal)
            _, items = index.search(query.float().cpu().numpy(), most, params=self._parameters(index, most))
            found.append(items)
        together = np.concatenate(found, 1)
        # An index that finds fewer than it was asked for fills up with -1.
        return [np.unique(items[items >= 0]) for items in together]

    def _parameters(self, index: Any, count: int) -> Any:
        """How far a search goes; given with it, so that threads do not meddle with each other's."""
        if isinstance(index, self._faiss.IndexHNSW):
            return self._faiss.SearchParametersHNSW(efSearch=2 * count)
        if isinstance(index, self._faiss.IndexIVF):
            least = PROBED * index.nlist
            needed = 4 * count * index.nlist / max(1, index.ntotal)
            return self._faiss.SearchParametersIVF(nprobe=min(index.nlist, math.ceil(max(least, needed))))
        return None


def recall(
    engine: RecommendationEngine,
    index: CandidateIndex,
    users: Sequence[Id],
    *,
    k: int = 10,
    sizes: Sequence[int] = (50, 100, 200, 400, 800),
    behavior: str | None = None,
) -> dict[int, float]:
    """Measure which share of the exact k best items is among the candidates, by how many each index gives.

    An exact score ranks candidates, so this is also the share of the k best that is in the answer. Nothing is left out,
    as the index does not know what will be.

    Args:
        engine: of the same tables.
        index: what is measured.
        users: as the data's source calls them.
        k: length of the answer.
        sizes: candidates of each index.
        behavior: what for; the target if None.
    """
    numbers = engine.user_ids.numbers(users)
    best, _, is_cold = engine.top_k(numbers, k=k, behavior=behavior, exclude=())
    best, numbers = best[~is_cold], numbers[~is_cold]
    if not len(numbers):
        raise DataError("none of these users has an event that the model learned from")
    x = engine.rows(numbers)
    task = engine.model.behaviors.index(behavior or engine.data.target_name)
    shares = {}
    for size in sizes:
        found = index.search(x, task, size)
        hits = [np.isin(wanted, items).sum() for wanted, items in zip(best, found, strict=True)]
        shares[size] = float(np.sum(hits) / (best >= 0).sum())
    return shares


def _index(faiss: Any, vectors: np.ndarray, kind: Kind, seed: int) -> Any:
    count, width = vectors.shape
    if kind == "hnsw":
        index = faiss.IndexHNSWFlat(width, _NEIGHBORS, faiss.METRIC_INNER_PRODUCT)
    elif kind == "ivf" and count >= _PER_CELL:
        cells = min(count // _PER_CELL, 1 << round(math.log2(math.sqrt(count))))
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, max(1, cells), faiss.METRIC_INNER_PRODUCT)
        index.cp.seed, index.cp.niter, index.cp.max_points_per_centroid = seed + 1, 10, 64
        index.train(vectors)
    else:
        index = faiss.IndexFlatIP(width)
    index.add(vectors)
    return index


def _import_faiss() -> Any:
    try:
        return importlib.import_module("faiss")
    except ImportError as error:
        raise missing_extra(DataError, "an index of candidates needs", "faiss-cpu", "recsys") from error
