"""Cache entries and the cache that holds them."""

import pytest
import torch

from perilune.nn import HybridCache, StateEntry, TokenEntry
from perilune.ops.layout import SequenceLayout


def token_entry(lengths: tuple[int, ...], start: float = 0.0) -> TokenEntry:
    """Row n holds n + 0.01 t in one buffer and the negative pair in another."""
    entry = TokenEntry(len(lengths), [(1,), (2, 1)], "cpu", torch.float64)
    layout = SequenceLayout.from_lengths(lengths)
    values = start + layout.sequence_ids + 0.01 * layout.positions
    entry.extend(layout, values[:, None], -values[:, None, None].expand(-1, 2, 1))
    return entry


def rows_of(entry: TokenEntry) -> list[list[float]]:
    layout, (values, negative) = entry.packed()
    assert torch.equal(negative, -values[:, None].expand(-1, 2, 1))
    return [[round(x, 4) for x in part.flatten().tolist()] for part in values.split(list(layout.lengths))]


def make_cache(lengths: tuple[int, ...]) -> HybridCache:
    state = StateEntry(memory=torch.arange(len(lengths), dtype=torch.float64)[:, None].expand(-1, 3).clone())
    return HybridCache([state, token_entry(lengths)], torch.tensor(lengths))


def test_tokens_are_kept_in_order_across_growth():
    entry = token_entry((3, 0, 70))
    for t in range(100):
        value = 10.0 + t
        entry.push(torch.full((3, 1), value), torch.full((3, 2, 1), -value))
    entry.extend(SequenceLayout.from_lengths([0, 2, 0]), torch.ones(2, 1), -torch.ones(2, 2, 1))
    rows = rows_of(entry)
    assert [len(row) for row in rows] == [103, 102, 170]
    assert rows[0][:4] == [0.0, 0.01, 0.02, 10.0]
    assert rows[1][-3:] == [109.0, 1.0, 1.0]
    assert rows[2][69:71] == [2.69, 10.0]


def test_lengths_are_known_on_the_host():
    entry = token_entry((3, 0, 70))

    def known(entry: TokenEntry) -> bool:
        return list(entry.host_lengths) == entry.lengths.tolist()

    assert known(entry)
    assert known(entry.select(torch.tensor([2, 1, 2])))
    assert known(entry.clone())
    entry.push(torch.zeros(3, 1), torch.zeros(3, 2, 1))
    assert known(entry)
    entry.append(token_entry((2,)))
    assert known(entry)
    entry.assign(2, token_entry((90,)))
    assert known(entry)
    entry.reorder(torch.tensor([2, 0]))
    assert known(entry)
    entry.truncate(torch.tensor([5, 4]))
    assert known(entry)
    assert entry.max_length == 5


def test_push_returns_views_of_what_is_held():
    entry = token_entry((2, 4))
    entry.push(torch.tensor([[7.0], [8.0]]), -torch.tensor([[7.0], [8.0]])[:, None].expand(2, 2, 1))
    values, _ = entry.views()
    assert values.shape == (2, 5, 1)
    assert entry.lengths.tolist() == [3, 5]
    assert values[0, 2] == 7
    assert values[1, 4] == 8


def test_unused_places_are_finite():
    entry = token_entry((1, 90))
    entry.reorder(torch.tensor([0, 1, 0]))
    entry.append(token_entry((2,)))
    entry.push(torch.zeros(4, 1), torch.zeros(4, 2, 1))
    values, _ = entry.views()
    assert torch.isfinite(values).all()


def test_reorder_drops_repeats_and_permutes():
    cache = make_cache((2, 5, 3))
    expected = rows_of(cache.entries[1])
    cache.reorder(torch.tensor([2, 0, 2, 2]))
    assert rows_of(cache.entries[1]) == [expected[i] for i in (2, 0, 2, 2)]
    assert cache.entries[0]["memory"][:, 0].tolist() == [2, 0, 2, 2]
    assert cache.lengths.tolist() == [3, 2, 3, 3]
    assert cache.get_seq_length() == 3
    assert cache.get_seq_length(1) == 2


def test_repeated_rows_share_no_memory():
    cache = make_cache((2, 5))
    cache.reorder(torch.tensor([0, 0]))
    cache.entries[0]["memory"][0] = 9
    cache.entries[1].push(torch.tensor([[1.0], [2.0]]), -torch.tensor([[1.0], [2.0]])[:, None].expand(2, 2, 1))
    assert cache.entries[0]["memory"][1, 0] == 0
    assert rows_of(cache.entries[1]) == [[0.0, 0.01, 1.0], [0.0, 0.01, 2.0]]


def test_fork_adds_a_copy():
    cache = make_cache((2, 5))
    assert cache.fork(1) == 2
    assert cache.num_sequences == 3
    assert rows_of(cache.entries[1])[2] == rows_of(cache.entries[1])[1]


def test_snapshot_survives_and_restores():
    cache = make_cache((2, 5))
    snapshot = cache.snapshot(1)
    before = rows_of(cache.entries[1])[1]
    for _ in range(80):
        cache.entries[1].push(torch.zeros(2, 1), torch.zeros(2, 2, 1))
    cache.entries[0]["memory"] = torch.full((2, 3), 7.0)
    cache.lengths = cache.lengths + 80
    for row in (1, 0):
        cache.restore(row, snapshot)
        assert rows_of(cache.entries[1])[row] == before
        assert cache.entries[0]["memory"][row, 0] == 1
        assert cache.get_seq_length(row) == 5
    assert snapshot.lengths.tolist() == [5]
    assert cache.entries[1].max_length == 5


def test_restore_into_a_shorter_cache_grows_it():
    long, short = make_cache((3, 100)), make_cache((1, 1))
    short.restore(0, long.snapshot(1))
    assert [len(row) for row in rows_of(short.entries[1])] == [100, 1]


def test_append_joins_rows():
    cache, other = make_cache((2, 5)), make_cache((100,))
    expected = rows_of(cache.entries[1]) + rows_of(other.entries[1])
    cache.append(other)
    assert rows_of(cache.entries[1]) == expected
    assert cache.lengths.tolist() == [2, 5, 100]
    assert cache.entries[0]["memory"][:, 0].tolist() == [0, 1, 0]


def test_truncation_takes_the_last_tokens_back():
    entry = token_entry((2, 70, 3))
    expected = rows_of(entry)
    entry.truncate(torch.tensor([2, 5, 0]))
    assert rows_of(entry) == [expected[0], expected[1][:5], []]
    assert entry.max_length == 5
    value = torch.full((3, 1), 7.0)
    entry.push(value, -value[:, None].expand(3, 2, 1))
    values, _ = entry.views()
    assert values.shape == (3, 6, 1)
    assert rows_of(entry) == [[*expected[0], 7], [*expected[1][:5], 7], [7]]


def test_truncation_keeps_layers_and_lengths_together():
    cache = HybridCache([token_entry((2, 5)), token_entry((2, 5))], torch.tensor([2, 5]))
    lengths = torch.tensor([1, 4])
    cache.truncate(lengths)
    lengths.zero_()
    assert cache.lengths.tolist() == [1, 4]
    assert [entry.lengths.tolist() for entry in cache.entries] == [[1, 4], [1, 4]]


def test_a_recurrent_state_cannot_go_back_and_no_layer_does():
    cache = HybridCache([token_entry((2, 5)), *make_cache((2, 5)).entries], torch.tensor([2, 5]))
    cache.truncate(torch.tensor([2, 5]))
    with pytest.raises(ValueError, match=r"a state \(memory\) cannot go back to fewer tokens; restore a snapshot"):
        cache.truncate(torch.tensor([2, 4]))
    assert [cache.entries[i].lengths.tolist() for i in (0, 2)] == [[2, 5], [2, 5]]
    assert cache.lengths.tolist() == [2, 5]


def test_clone_shares_no_memory():
    cache = make_cache((2, 5))
    copy = cache.clone()
    cache.entries[0]["memory"].fill_(5)
    cache.reorder(torch.tensor([1]))
    assert copy.num_sequences == 2
    assert copy.entries[0]["memory"][1, 0] == 1


def test_bytes_are_of_tokens_held():
    cache = make_cache((2, 5))
    assert cache.nbytes() == 7 * 3 * 8 + 2 * 3 * 8
    assert cache.nbytes(allocated=True) == 2 * 64 * 3 * 8 + 2 * 3 * 8
    assert make_cache(()).nbytes() == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c.reorder(torch.tensor([0, 2])), r"index must name rows in \[0, 2\)"),
        (lambda c: c.reorder(torch.tensor([-1])), r"index must name rows in \[0, 2\)"),
        (lambda c: c.reorder(torch.tensor([0.0])), "1-D int64"),
        (lambda c: c.fork(2), r"row must be in \[0, 2\), got 2"),
        (lambda c: c.snapshot(-1), r"row must be in \[0, 2\), got -1"),
        (lambda c: c.restore(0, make_cache((1, 1))), "a snapshot has one row, got 2"),
        (lambda c: c.append(HybridCache(c.entries[:1], c.lengths)), "must come from one model"),
        (lambda c: HybridCache(c.entries, torch.zeros(3)), "entry 0 has 2 rows, lengths has 3"),
        (lambda c: c.truncate(torch.tensor([2])), r"lengths must be \[2\] int64, got torch.int64 of shape \(1,\)"),
        (lambda c: c.truncate(torch.tensor([2.0, 5.0])), r"lengths must be \[2\] int64, got torch.float32"),
        (lambda c: c.truncate(torch.tensor([2, 6])), r"lengths must be in \[0, tokens seen\]"),
        (lambda c: c.truncate(torch.tensor([-1, 5])), r"lengths must be in \[0, tokens seen\]"),
        (lambda c: c.entries[1].truncate(torch.tensor([3, 5])), r"rows hold \[2, 5\] tokens and cannot be cut to"),
    ],
)
def test_wrong_use_is_refused_and_changes_nothing(call, message):
    cache = make_cache((2, 5))
    with pytest.raises(ValueError, match=message):
        call(cache)
    assert rows_of(cache.entries[1]) == rows_of(make_cache((2, 5)).entries[1])


def test_state_of_other_shape_is_refused():
    with pytest.raises(ValueError, match="state memory is"):
        make_cache((1,)).entries[0]["memory"] = torch.zeros(2, 3)
