"""Noticing that weights were changed in place."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from perilune.nn import MoBAttention

Fingerprint = tuple[object, ...]


class WeightsWatch:
    """Compares what a model computes with now and what it did when it was looked at last.

    It sees assignments, optimizer steps and `load_state_dict`, which count up a tensor's version, and what MoBA layers
    read. Writing through `.data` counts nothing up.
    """

    def __init__(self, model: nn.Module) -> None:
        """Take a first look."""
        self._model = model
        self._mobas: Sequence[MoBAttention] = [m for m in model.modules() if isinstance(m, MoBAttention)]
        self._seen = self._fingerprint()

    def has_changed(self) -> bool:
        """Whether there were changes since the last look, which this is."""
        now = self._fingerprint()
        is_other, self._seen = now != self._seen, now
        return is_other

    def _fingerprint(self) -> Fingerprint:
        tensors = [*self._model.parameters(), *self._model.buffers()]
        versions = tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)
        return (*versions, *(moba.mode for moba in self._mobas))
