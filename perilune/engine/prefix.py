"""Which beginnings of texts are in the cache: a tree of full pages by hash, with states of recurrent layers at some.

A page can be reused by another text with the same beginning, but recurrent layers can only go on from a state that
covers exactly the tokens of the pages. So for models with such layers a beginning counts when its state was kept, and
it may then also end inside a page (a `tail`). With the state is kept what the model made of the last token (`hidden`),
so that the very same text needs nothing to be computed; else one token at least has to be.

Source: Kimi Linear, section 5.6 (prefix caching of hybrids); hash chains as in PagedAttention (2309.06180).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np
from torch import Tensor

from perilune.engine.pages import Pool


@dataclass(slots=True, eq=False)
class _Node:
    """A beginning that ends with page `page`."""

    key: bytes
    parent: _Node | None
    page: int
    length: int
    slot: int | None = None
    hidden: Tensor | None = None
    children: int = 0
    tails: list[_Node] = field(default_factory=list["_Node"])
    tail: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """A known beginning of a text."""

    length: int
    """Its tokens."""
    pages: tuple[int, ...]
    """Their pages; the last may hold more tokens than count."""
    slot: int | None
    """State after them, for models with recurrent layers."""
    hidden: Tensor | None
    """`[d]`, what the model made of the last of them, where that was kept."""


NO_MATCH = Match(length=0, pages=(), slot=None, hidden=None)


class PrefixCache:
    """Holds pages and states of beginnings until they are evicted, the longest unused first.

    In the order of use what builds on a beginning always comes before it, so that ends of texts are evicted first.
    """

    def __init__(self, pages: Pool, slots: Pool | None, block_size: int) -> None:
        """Share the pools with running sequences.

        Args:
            pages: of `block_size` tokens.
            slots: of states; None for models without recurrent layers.
            block_size: B.
        """
        self._pages, self._slots, self._block_size = pages, slots, block_size
        self._root = _Node(b"", None, -1, 0)
        self._nodes: OrderedDict[bytes, _Node] = OrderedDict()
        self.num_tokens = 0
        """Tokens of the pages it holds."""
        self._kept: OrderedDict[bytes, _Node] = OrderedDict()

    @property
    def num_pages(self) -> int:
        """Pages it holds."""
        return len(self._nodes)

    @property
    def num_slots(self) -> int:
        """States it holds."""
        return len(self._kept)

    def match(self, tokens: Sequence[int], limit: int, multiple: int = 1) -> Match:
        """Find the longest known beginning of `tokens`; the whole of them only if it has a `hidden`.

        Args:
            tokens: a text.
            limit: most tokens wanted.
            multiple: the beginning's length must be a multiple of it.

        Returns:
            It; nothing is held for the caller, who does so before evicting anything.
        """
        path = self._path(np.asarray(tokens, dtype=np.int64), limit)
        depth = len(path)
        while depth:
            node = path[depth - 1]
            tail = self._longest_tail(node, tokens, limit) if multiple == 1 else None
            if tail is not None:
                path[depth:] = [tail]
                break
            is_resumable = (self._slots is None or node.slot is not None) and _is_enough(node, tokens)
            if node.length and node.length % multiple == 0 and is_resumable:
                del path[depth:]
                break
            depth -= 1
        if not depth:
            return NO_MATCH
        for node in reversed(path[1:]):
            self._touch(node)
        last = path[-1]
        return Match(
            length=last.length, pages=tuple(node.page for node in path[1:]), slot=last.slot, hidden=last.hidden
        )

    def insert(
        self,
        tokens: Sequence[int],
        pages: Sequence[int],
        length: int,
        take_slot: Callable[[], int] | None = None,
        hidden: Tensor | None = None,
    ) -> int | None:
        """Keep the beginning of `length` tokens.

        Args:
            tokens: a text, at least `length` tokens.
            pages: of its tokens in order; each is held once more if it is new here.
            length: for models without recurrent layers only full pages are kept of it.
            take_slot: for others, gives a held slot for the state after `length` tokens, which belongs to the cache
                from then on; called if that state is not known. None to keep full pages alone.
            hidden: `[d]`, what the model made of the last of them; kept with the state.

        Returns:
            The slot, which the caller has to fill, if one was taken.
        """
        values = np.asarray(tokens[:length], dtype=np.int64)
        path = [self._root]
        for block in range(length // self._block_size):
            key = self._key(path[-1].key, values[block * self._block_size : (block + 1) * self._block_size])
            path.append(self._child(key, path[-1], pages[block], (block + 1) * self._block_size, ()))
        slot = None
        if self._slots is not None and take_slot is not None and length:
            rest, node = length % self._block_size, path[-1]
            key = self._key(node.key, values[length - rest :]) if rest else node.key
            known = self._nodes.get(key)
            if known is None or known.slot is None:
                slot = take_slot()  # may evict tails, so a new one is added only now
            if rest:
                tail = tuple(values[length - rest :].tolist())
                path.append(self._child(key, node, pages[length // self._block_size], length, tail))
            self._keep_state(path[-1], slot, hidden)
        for node in reversed(path[1:]):
            self._touch(node)
        return slot

    def evict_pages(self, count: int, least: int) -> bool:
        """Free up to `count` pages of the longest unused beginnings that nobody reads.

        Args:
            count: pages to free.
            least: unless as many could be freed, which may be more, nothing changes.

        Returns:
            Whether so many could be.
        """
        if least > len(self._nodes):
            return False
        plan, used, children = list[_Node](), list[_Node](), dict[_Node, int]()
        for node in self._nodes.values():
            if len(plan) >= max(count, least):
                break
            if children.get(node, node.children) or self._pages.owners(node.page) > 1:
                used.append(node)
                continue
            plan.append(node)
            if node.parent is not None:
                children[node.parent] = children.get(node.parent, node.parent.children) - 1
        if len(plan) < least:
            return False
        for node in plan[:count]:
            self._remove(node)
        # somebody reads them or what builds on them; looking at them again each time would be slow
        for node in sorted(_with_parents(used), key=lambda node: node.length, reverse=True):
            self._nodes.move_to_end(node.key)
        return True

    def has_evictable_slot(self) -> bool:
        """Whether `evict_slot` would free one."""
        return self._oldest_state() is not None

    def evict_slot(self) -> bool:
        """Free the longest unused state that nobody is about to copy; False if there is none."""
        node = self._oldest_state()
        if node is None:
            return False
        self._drop_slot(node)
        if node.tail:
            self._remove(node)
        return True

    def clear(self) -> None:
        """Forget everything."""
        while self._nodes:
            for node in [node for node in self._nodes.values() if node.children == 0]:
                self._remove(node)

    def _path(self, values: np.ndarray, limit: int) -> list[_Node]:
        """The root and the known full pages from it."""
        path = [self._root]
        for start in range(0, limit - self._block_size + 1, self._block_size):
            node = self._nodes.get(self._key(path[-1].key, values[start : start + self._block_size]))
            if node is None:
                break
            path.append(node)
        return path

    def _longest_tail(self, node: _Node, tokens: Sequence[int], limit: int) -> _Node | None:
        fitting = [
            tail
            for tail in node.tails
            if tail.slot is not None
            and tail.length <= limit
            and _is_enough(tail, tokens)
            and tuple(tokens[node.length : tail.length]) == tail.tail
        ]
        return max(fitting, key=lambda tail: tail.length, default=None)

    def _child(self, key: bytes, parent: _Node, page: int, length: int, tail: tuple[int, ...]) -> _Node:
        node = self._nodes.get(key)
        if node is None:
            node = self._nodes[key] = _Node(key, parent, self._pages.share(page), length, tail=tail)
            parent.children += 1
            self.num_tokens += len(tail) or self._block_size
            if tail:
                parent.tails.append(node)
        return node

    def _keep_state(self, node: _Node, slot: int | None, hidden: Tensor | None) -> None:
        if slot is not None:
            node.slot = slot
            self._kept[node.key] = node
        if hidden is not None:
            node.hidden = hidden

    def _oldest_state(self) -> _Node | None:
        for node in self._kept.values():
            if self._slots is not None and node.slot is not None and self._slots.owners(node.slot) == 1:
                return node
        return None

    def _touch(self, node: _Node) -> None:
        self._nodes.move_to_end(node.key)
        if node.slot is not None:
            self._kept.move_to_end(node.key)

    def _drop_slot(self, node: _Node) -> None:
        if node.slot is not None and self._slots is not None:
            self._slots.release(node.slot)
            del self._kept[node.key]
            node.slot = node.hidden = None

    def _remove(self, node: _Node) -> None:
        self._drop_slot(node)
        self._pages.release(node.page)
        del self._nodes[node.key]
        self.num_tokens -= len(node.tail) or self._block_size
        if node.parent is not None:
            node.parent.children -= 1
            if node.tail:
                node.parent.tails.remove(node)

    def _key(self, parent: bytes, tokens: np.ndarray) -> bytes:
        return blake2b(parent + tokens.tobytes(), digest_size=16).digest()


def _is_enough(node: _Node, tokens: Sequence[int]) -> bool:
    """Whether a text can go on from there: a token is left to compute, or what comes of the last one is known."""
    return node.length < len(tokens) or node.hidden is not None


def _with_parents(nodes: Iterable[_Node]) -> set[_Node]:
    """Nodes and all that they build on, without the root."""
    found = set[_Node]()
    for node in nodes:
        while node.parent is not None and node not in found:
            found.add(node)
            node = node.parent
    return found
