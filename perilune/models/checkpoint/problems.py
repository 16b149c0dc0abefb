"""One message for everything that is wrong with a checkpoint's tensors."""

from __future__ import annotations

from dataclasses import dataclass, field

from perilune.errors import CheckpointError

MAX_LISTED = 10
"""How many tensors of a kind the message names; it counts the others."""


@dataclass(slots=True)
class Problems:
    """What was found so far, a line for each tensor."""

    missing: list[str] = field(default_factory=list)
    """Tensors that are needed and not there."""
    unexpected: list[str] = field(default_factory=list)
    """Tensors that are there and unknown."""
    misshaped: list[str] = field(default_factory=list)
    """Tensors of another shape, with both shapes."""
    damaged: list[str] = field(default_factory=list)
    """Quantized tensors without the scales that they need."""

    def raise_any(self, where: str) -> None:
        """Raise if there are problems.

        Raises:
            CheckpointError: naming all of them, by kind, the first ten of each.
        """
        kinds = {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "of another shape": self.misshaped,
            "not readable": self.damaged,
        }
        found = {kind: names for kind, names in kinds.items() if names}
        if not found:
            return
        counts = ", ".join(f"{len(names)} {kind}" for kind, names in found.items())
        lines = [f"{where}: its tensors do not fit its config.json: {counts}"]
        for kind, names in found.items():
            more = f" ... and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
            lines.append(f"{kind}: {'; '.join(names[:MAX_LISTED])}{more}")
        raise CheckpointError("\n".join(lines))
