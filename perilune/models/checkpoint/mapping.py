"""How the tensors of a released format make up ours.

A mapping is data: for each of our tensors the pieces it is made of, in order, each a tensor of the format. It is read
in both directions, so that import and export cannot disagree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from perilune.models.config import ModelConfig
from perilune.models.decoder import Decoder


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A tensor of a released format, which is a run of consecutive elements of one of ours."""

    name: str
    """The format's name for it."""
    shape: tuple[int, ...]
    """Shape it is written with."""
    start: int = 0
    """Position of its first element in our tensor, flattened."""
    also: tuple[tuple[int, ...], ...] = ()
    """Other shapes with the same elements that are read."""
    heads: int | None = None
    """If given, the first axis is so many heads whose rotary channels are stored as two halves, and not, as ours, as
    adjacent pairs."""
    is_linear: bool = False
    """Whether it is the weight of a linear layer, which a quantized checkpoint quantizes."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def to_ours(self, theirs: Tensor) -> Tensor:
        """Return its elements as ours has them, as a vector."""
        return theirs.reshape(-1) if self.heads is None else pair_halves(theirs, self.heads).reshape(-1)

    def to_theirs(self, ours: Tensor) -> Tensor:
        """Return a run of our elements as the tensor of the format."""
        theirs = ours.reshape(self.shape)
        return theirs if self.heads is None else halve_pairs(theirs, self.heads)


@dataclass(frozen=True, slots=True, kw_only=True)
class Binding:
    """What one of our tensors is made of."""

    ours: str
    """Name in a decoder's state."""
    shape: tuple[int, ...]
    """Its shape."""
    pieces: tuple[Piece, ...]
    """Back to back, from its first element to its last; the form that is written."""
    others: tuple[tuple[Piece, ...], ...] = ()
    """Other forms that are read."""


def pair_halves(x: Tensor, heads: int) -> Tensor:
    """Reorder each head's rows from [x_0 ... x_(n-1) y_0 ... y_(n-1)] to [x_0 y_0 x_1 y_1 ...].

    Rotary embedding turns channel pairs (x_i, y_i). Hugging Face's Llama keeps them half a head apart, our layers (and
    the checkpoints of DeepSeek) next to each other.

    Args:
        x: `[heads * 2n, ...]`.
        heads: number of heads along the first axis.
    """
    return x.reshape(heads, 2, -1, *x.shape[1:]).transpose(1, 2).reshape(x.shape)


def halve_pairs(x: Tensor, heads: int) -> Tensor:
    """Undo `pair_halves`."""
    return x.reshape(heads, -1, 2, *x.shape[1:]).transpose(1, 2).reshape(x.shape)


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a decoder's persistent tensors, in order, without building them."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in Decoder(config).state_dict().items()}


def float32_tensors(config: ModelConfig) -> frozenset[str]:
    """Return which of a decoder's tensors stay float32 whatever its dtype is."""
    with torch.device("meta"):
        state = Decoder(config).to(torch.bfloat16).state_dict()
    return frozenset(name for name, tensor in state.items() if tensor.dtype == torch.float32)


class MappingBuilder:
    """Collects bindings; shapes follow from the configuration."""

    def __init__(self, config: ModelConfig) -> None:
        """Prepare for the tensors of `config`."""
        self._shapes = tensor_shapes(config)
        self._bindings: dict[str, Binding] = {}

    def whole(
        self,
        ours: str,
        theirs: str,
        *,
        shape: tuple[int, ...] | None = None,
        also: tuple[tuple[int, ...], ...] = (),
        heads: int | None = None,
        is_linear: bool = False,
    ) -> None:
        """Bind one of our tensors to one of theirs.

        Args:
            ours: our name.
            theirs: their name.
            shape: theirs, if it is not ours.
            also: see `Piece`.
            heads: see `Piece`.
            is_linear: see `Piece`.
        """
        piece = Piece(name=theirs, shape=shape or self._shapes[ours], also=also, heads=heads, is_linear=is_linear)
        self._add(ours, (piece,))

    def linear(self, ours: str, theirs: str) -> None:
        """Bind the weight of a linear layer; both names are without `.weight`."""
        self.whole(f"{ours}.weight", f"{theirs}.weight", is_linear=True)

    def joined(self, ours: str, pieces: Sequence[Piece], *others: Sequence[Piece]) -> None:
        """Bind one of our tensors to several of theirs, back to back; `start` is filled in."""
        self._add(ours, _in_order(pieces), *(_in_order(form) for form in others))

    def gate_up(self, ours: str, gate: str, up: str) -> None:
        """Bind a fused gate and up projection to theirs apart."""
        rows, columns = self._shapes[f"{ours}.weight"]
        self.joined(
            f"{ours}.weight",
            [Piece(name=f"{name}.weight", shape=(rows // 2, columns), is_linear=True) for name in (gate, up)],
        )

    def mlp(self, ours: str, theirs: str) -> None:
        """Bind a dense feed-forward layer."""
        self.gate_up(f"{ours}.gate_up_proj", f"{theirs}.gate_proj", f"{theirs}.up_proj")
        self.linear(f"{ours}.down_proj", f"{theirs}.down_proj")

    def experts(self, ours: str, theirs: str, *, gate: str, up: str, down: str) -> None:
        """Bind stacked experts to theirs apart, or stacked as `gate_up_proj` and `down_proj`.

        Args:
            ours: our layer.
            theirs: prefix of the experts' numbers.
            gate: name of an expert's gate projection.
            up: of its up projection.
            down: of its down projection.
        """
        stacked = self._shapes[f"{ours}.w_gate_up"]
        count, rows, columns = stacked
        apart = [
            Piece(name=f"{theirs}.{expert}.{name}.weight", shape=(rows // 2, columns), is_linear=True)
            for expert in range(count)
            for name in (gate, up)
        ]
        self.joined(f"{ours}.w_gate_up", apart, [Piece(name=f"{theirs}.gate_up_proj", shape=stacked)])
        stacked = self._shapes[f"{ours}.w_down"]
        apart = [
            Piece(name=f"{theirs}.{expert}.{down}.weight", shape=stacked[1:], is_linear=True) for expert in range(count)
        ]
        self.joined(f"{ours}.w_down", apart, [Piece(name=f"{theirs}.down_proj", shape=stacked)])

    def has(self, ours: str) -> bool:
        """Return whether the decoder has a tensor of that name."""
        return ours in self._shapes

    def build(self) -> list[Binding]:
        """Return the bindings in the decoder's order.

        Raises:
            ValueError: a tensor of the decoder was not bound, or pieces do not fill it: a mistake in the format's file.
        """
        unbound = [name for name in self._shapes if name not in self._bindings]
        if unbound:
            raise ValueError(f"no mapping for {', '.join(unbound[:5])}")
        return [self._bindings[name] for name in self._shapes]

    def _add(self, ours: str, pieces: tuple[Piece, ...], *others: tuple[Piece, ...]) -> None:
        shape = self._shapes[ours]
        for form in (pieces, *others):
            if sum(piece.numel for piece in form) != math.prod(shape):
                raise ValueError(f"{form[0].name} and what follows does not fill {ours} of shape {shape}")
        self._bindings[ours] = Binding(ours=ours, shape=shape, pieces=pieces, others=others)


def _in_order(pieces: Sequence[Piece]) -> tuple[Piece, ...]:
    placed: list[Piece] = []
    start = 0
    for piece in pieces:
        placed.append(replace(piece, start=start))
        start += piece.numel
    return tuple(placed)
