"""Bookkeeping of the cache: nothing leaks, nothing is used twice, and no state meets other tokens than its own."""

from copy import deepcopy

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from perilune.engine.manager import CacheBudget, CacheManager
from perilune.engine.pages import Pool
from perilune.engine.prefix import NO_MATCH

BLOCK = 3
TEXTS = [[1] * 40, [1] * 7 + [2] * 33, [3, 4] * 20, [1] * 12 + [5] * 28]


def manager(num_pages=12, num_slots=4, has_states=True, keeps_prefixes=True):
    budget = CacheBudget(block_size=BLOCK, num_pages=num_pages, num_slots=num_slots, has_states=has_states)
    return CacheManager(budget, keeps_prefixes=keeps_prefixes)


class Machine(RuleBasedStateMachine):
    """Sequences with a model of memory: what each page and slot was last written with."""

    has_states = True
    num_pages = 12

    def __init__(self):
        super().__init__()
        self.manager = manager(self.num_pages, 4 if self.num_pages else None, self.has_states)
        self.live = []  # (holding, text, length written)
        self.memory = {}  # (page, place) -> tokens up to here
        self.states = {}  # slot -> tokens covered

    def flush(self):
        copies = self.manager.take_copies()
        for source, target in copies.pages:
            for place in range(BLOCK):
                self.memory[target, place] = self.memory.get((source, place))
        for source, target in copies.slots:
            self.states[target] = self.states[source]
        for slot in copies.cleared:
            self.states[slot] = ()

    def write(self, holding, text, start, end):
        for t in range(start, end):
            page = holding.pages[t // BLOCK]
            assert self.manager.pages.owners(page) == 1 or t % BLOCK == 0, "a shared page is written"
            self.memory[page, t % BLOCK] = tuple(text[: t + 1])

    @rule(
        text=st.sampled_from(TEXTS),
        length=st.integers(1, 20),
        limit=st.integers(0, 30),
        multiple=st.sampled_from([1, 1, BLOCK, 2 * BLOCK]),
    )
    def open(self, text, length, limit, multiple):
        before, match = self.kept(), deepcopy(self.manager).prefixes.match(text[:length], min(limit, length), multiple)
        opened = self.manager.open(text[:length], limit, multiple)
        if opened is None:
            assert self.kept() == before
            missing = -(-length // BLOCK) - len(match.pages) + (match.length < length and match.length % BLOCK > 0)
            pages, slots = self.most_free(match)
            assert pages < missing or slots == 0
            return
        holding, known, hidden = opened
        self.flush()
        assert hidden is None if known < length else hidden == text[:length]
        assert (known, hidden) == (match.length, match.hidden if match.length == length else None)
        assert known <= limit
        assert known % multiple == 0
        self.check(holding, text, known)
        if self.has_states:
            assert self.states[holding.slot] == tuple(text[:known])
        self.write(holding, text, known, length)
        if self.has_states:
            self.states[holding.slot] = tuple(text[:length])
        self.live.append((holding, text, length))

    @precondition(lambda self: self.live)
    @rule(data=st.data(), count=st.integers(1, 5))
    def grow(self, data, count):
        number = data.draw(st.integers(0, len(self.live) - 1))
        holding, text, length = self.live[number]
        before = list(holding.pages)
        kept = self.kept()
        if not self.manager.extend(holding, length, length + count):
            assert (holding.pages, self.kept()) == (before, kept)
            is_shared = length % BLOCK > 0 and self.manager.pages.owners(holding.pages[length // BLOCK]) > 1
            assert self.most_free(NO_MATCH)[0] < -(-(length + count) // BLOCK) - len(before) + is_shared
            return
        self.flush()
        self.check(holding, text, length)
        self.write(holding, text, length, length + count)
        self.live[number] = holding, text, length + count
        if self.has_states and holding.slot is not None:
            self.states[holding.slot] = tuple(text[: length + count])

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def fork(self, data):
        holding, text, length = data.draw(st.sampled_from(self.live))
        self.live.append((self.manager.fork(holding), text, length))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def remember(self, data):
        holding, text, length = data.draw(st.sampled_from(self.live))
        match, before = deepcopy(self.manager).prefixes.match([*text[:length], 0], length), self.kept()
        slot = self.manager.remember(text, holding, length, text[:length] if data.draw(st.booleans()) else None)
        if slot is not None:
            self.states[slot] = tuple(text[:length])
        elif self.has_states and match.length == length:
            assert self.kept() == before, "what is known was made room for"

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def close(self, data):
        number = data.draw(st.integers(0, len(self.live) - 1))
        self.manager.close(self.live.pop(number)[0])

    @rule()
    def weights_change(self):
        self.manager.prefixes.clear()

    def kept(self):
        """What the prefix cache has, in whatever order."""
        prefixes = self.manager.prefixes
        return {(key, node.page, node.slot) for key, node in prefixes._nodes.items()}, set(prefixes._kept)

    def most_free(self, match):
        """Places that could be had without `match`: a slow and obvious count."""
        manager = deepcopy(self.manager)
        prefixes, pages = manager.prefixes, manager.pages
        while True:
            ends = [node for node in prefixes._nodes.values() if not node.children and pages.owners(node.page) == 1]
            ends = [node for node in ends if node.page not in match.pages]
            if not ends:
                break
            prefixes._remove(ends[0])
        # states of beginnings that are in use can go as well
        slots = [node.slot for node in prefixes._kept.values() if node.slot != match.slot]
        return pages.free, manager.slots.free + len(slots)

    def check(self, holding, text, length):
        for t in range(length):
            assert self.memory[holding.pages[t // BLOCK], t % BLOCK] == tuple(text[: t + 1])

    @invariant()
    def sequences_keep_their_tokens(self):
        for holding, text, length in self.live:
            self.check(holding, text, length)

    @invariant()
    def owners_are_counted(self):
        pages = [page for holding, _, _ in self.live for page in set(holding.pages)]
        for page in set(pages):
            assert self.manager.pages.owners(page) >= pages.count(page)
        slots = [holding.slot for holding, _, _ in self.live if holding.slot is not None]
        assert len(slots) == len(set(slots))
        assert self.manager.slots.used == len(slots) + self.manager.prefixes.num_slots

    def teardown(self):
        for holding, _, _ in self.live:
            self.manager.close(holding)
        assert self.manager.is_clean
        self.manager.prefixes.clear()
        assert self.manager.used_pages == self.manager.slots.used == 0


class WithoutStates(Machine):
    has_states = False


class Growing(Machine):
    num_pages = None


FEW = settings(max_examples=25, stateful_step_count=25, deadline=None)
TestWithStates = Machine.TestCase
TestWithStates.settings = FEW
TestWithoutStates = WithoutStates.TestCase
TestWithoutStates.settings = FEW
TestGrowing = Growing.TestCase
TestGrowing.settings = FEW


def test_a_known_beginning_is_shared_and_the_rest_is_not():
    m = manager(has_states=False)
    first, known, _ = m.open([1] * 8, 99)
    assert known == 0
    m.remember([1] * 8, first, 8)
    second, known, _ = m.open([1] * 8 + [2], 99)
    assert known == 6
    assert second.pages[:2] == first.pages[:2]
    assert second.pages[2] != first.pages[2]


def test_without_a_state_pages_alone_are_no_hit():
    m = manager()
    first, *_ = m.open([1] * 8, 99)
    m.prefixes.insert([1] * 8, first.pages, 6)
    assert m.open([1] * 9, 99)[1] == 0
    assert m.remember([1] * 8, first, 6) is not None
    assert m.open([1] * 9, 99)[1] == 6


def test_a_beginning_that_ends_inside_a_page_is_copied_before_it_is_written():
    m = manager()
    first, *_ = m.open([1] * 8, 99)
    assert m.remember([1] * 8, first, 8) is not None
    second, known, _ = m.open([1] * 8 + [2], 99)
    assert known == 8
    assert m.take_copies().pages == [(first.pages[2], second.pages[2])]
    assert m.extend(first, 8, 9)  # the first sequence too: others may still want what it had
    assert m.prefixes.match([1] * 8 + [3], 8).pages[2] not in (first.pages[2], second.pages[2])


def test_the_longest_unused_goes_first_and_nothing_in_use():
    m = manager(num_pages=4, has_states=False)
    old, *_ = m.open([1] * 3, 99)
    m.remember([1] * 3, old, 3)
    m.close(old)
    used, *_ = m.open([2] * 3, 99)
    m.remember([2] * 3, used, 3)
    assert m.open([3] * 9, 99) is not None
    assert m.open([1] * 4, 99) is None
    assert m.prefixes.match([2] * 4, 3).length == 3
    assert m.prefixes.match([1] * 4, 3).length == 0


def test_what_cannot_be_had_empties_nothing():
    m = manager(num_pages=4, has_states=False)
    old, *_ = m.open([1] * 3, 99)
    m.remember([1] * 3, old, 3)
    m.close(old)
    assert m.open([2] * 40, 99) is None
    assert m.prefixes.match([1] * 4, 3).length == 3


def test_what_is_kept_for_nothing_but_looks_as_if_it_could_go_stays():
    m = manager(num_pages=6, has_states=False)
    used, *_ = m.open([1] * 9, 99)
    m.remember([1] * 9, used, 9)
    old, *_ = m.open([2] * 3, 99)
    m.remember([2] * 3, old, 3)
    m.close(old)
    assert m.open([3] * 12, 99) is None  # two are free and one can be; the three in use only seem to be spare
    assert m.prefixes.match([2] * 4, 3).length == 3
    assert m.open([3] * 9, 99, spare=1) is None  # enough for it, but not for those that run
    assert m.prefixes.match([2] * 4, 3).length == 3
    assert m.open([3] * 9, 99) is not None
    assert m.prefixes.match([2] * 4, 3).length == 0


def test_the_very_same_text_is_known_as_a_whole_with_what_the_model_made_of_it():
    m = manager(num_pages=20, num_slots=8)
    first, *_ = m.open([1] * 8, 99)
    hidden = torch.ones(2)
    assert m.remember([1] * 8, first, 8, hidden) is not None
    second, known, found = m.open([1] * 8, 99)
    assert (known, second.pages) == (8, first.pages)
    assert found is hidden
    assert m.take_copies().pages == []  # nothing is written yet
    assert m.open([1] * 8, 7)[1:] == (0, None)
    assert m.open([1] * 9, 99)[1:] == (8, None)
    m.prefixes.evict_slot()
    assert m.open([1] * 8, 99)[1:] == (0, None)


def test_a_state_without_that_does_not_serve_the_same_text_again_until_it_is_there():
    m = manager(num_pages=20, num_slots=8)
    first, *_ = m.open([1] * 6, 99)
    assert m.remember([1] * 6, first, 6) is not None
    assert m.open([1] * 6, 99)[1:] == (0, None)
    hidden = torch.ones(2)
    assert m.remember([1] * 6, first, 6, hidden) is None
    assert m.open([1] * 6, 99)[1] == 6
    assert m.remember([1] * 6, first, 6) is None
    assert m.open([1] * 6, 99)[2] is hidden


def test_the_state_that_a_text_goes_on_from_is_not_given_up_for_it():
    m = manager(num_slots=2)
    first, *_ = m.open([1] * 8, 99)
    assert m.remember([1] * 8, first, 8) is not None
    assert m.open([1] * 9, 99) is None  # the other slot is the first text's
    m.close(first)
    assert m.open([1] * 9, 99)[1] == 8
    with pytest.raises(ValueError, match="num_slots must be >= 2, got 1"):
        manager(num_slots=1)


def test_pages_that_are_not_finite_are_scrubbed_when_the_last_owner_leaves():
    m = manager(keeps_prefixes=False)
    first, *_ = m.open([1] * 4, 99)
    second = m.fork(first)
    pages = list(first.pages)
    m.close(first, scrub=True)
    assert m.take_copies().scrubbed == []
    m.close(second)
    assert m.take_copies().scrubbed == pages


def test_pools_that_grow_can_shrink_when_nothing_is_left():
    m = manager(num_pages=None, num_slots=None, keeps_prefixes=False)
    first, *_ = m.open([1] * 20, 99)
    m.close(first, scrub=True)
    m.shrink()
    assert (m.total_pages, m.slots.capacity) == (0, 0)
    assert m.take_copies().scrubbed == []
    assert m.open([1] * 20, 99) is not None


def test_a_pool_keeps_what_is_held_when_it_shrinks():
    pool = Pool(6)
    places = [pool.take() for _ in range(4)]
    pool.release(places[0])
    pool.release(places[3])
    pool.shrink()
    assert (pool.capacity, pool.free) == (3, 1)
    assert pool.take() == 0


def test_a_pool_gives_out_the_lowest_place_and_notices_misuse():
    pool = Pool(3)
    assert [pool.take() for _ in range(3)] == [0, 1, 2]
    with pytest.raises(IndexError, match="all 3 places are held"):
        pool.take()
    pool.share(1)
    assert not pool.release(1)
    assert pool.release(1)
    assert pool.release(0)
    assert pool.take() == 0
    with pytest.raises(ValueError, match="place 1 of 3 is held by nobody"):
        pool.release(1)
    with pytest.raises(ValueError, match="place 7"):
        pool.share(7)
