import pytest
import torch

from perilune.engine import RepetitionRule, find_repetition

RULE = RepetitionRule()


def repeats(tokens, rule=RULE):
    row = torch.tensor([[*tokens, 9, 9, 9]])
    return bool(find_repetition(row, torch.tensor([len(tokens)]), rule)[0])


def counting(n):
    """ "1, 2, 3, ..." with a token per digit."""
    return [ord(c) for i in range(n) for c in f"{i}, "]


SENTENCE = list(range(100, 120))


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([5] * 64, True),
        ([5] * 63, False),
        ([5] * 40, False),
        (SENTENCE * 4, True),
        (SENTENCE * 3, False),
        (SENTENCE * 4 + [1], False),
        ([1, 2, 3] + SENTENCE * 4, True),
        (SENTENCE[3:] + SENTENCE * 3 + SENTENCE[:3], True),
        ([1, 2] * 32, True),
        (counting(80), False),
        (list(range(64)) * 4, True),
        (list(range(65)) * 4, False),
        ([], False),
        ([1], False),
    ],
)
def test_loops_are_found_and_lists_are_not(tokens, expected):
    assert repeats(tokens) is expected


def test_rows_are_judged_by_themselves():
    rows = torch.zeros(3, 100, dtype=torch.int64)
    rows[1] = torch.arange(100)
    assert find_repetition(rows, torch.tensor([100, 100, 10]), RULE).tolist() == [True, False, False]
    assert find_repetition(rows[:0], torch.tensor([], dtype=torch.int64), RULE).tolist() == []


def test_rule_matches_a_search_over_all_suffixes():
    rule = RepetitionRule(max_period=5, min_repeats_short=3, min_repeats=2, min_span=8)
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        tokens = torch.randint(
            0, 2, (int(torch.randint(1, 24, (1,), generator=generator)),), generator=generator
        ).tolist()
        expected = False
        for period in range(1, 6):
            for count in range(3 if period <= 4 else 2, len(tokens) // period + 1):
                suffix = tokens[-period * count :]
                expected |= period * count >= 8 and suffix == suffix[:period] * count
        assert repeats(tokens, rule) is expected, tokens


@pytest.mark.parametrize("field", ["max_period", "min_span", "interval", "min_repeats"])
def test_bad_rules_are_refused(field):
    with pytest.raises(ValueError, match=field):
        RepetitionRule(**{field: 0})
