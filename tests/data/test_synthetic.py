import pytest
import torch

from perilune.data import (
    IGNORE_INDEX,
    CopiesConfig,
    NeedleConfig,
    PalindromeConfig,
    RecallConfig,
    StackConfig,
    SyntheticSource,
    synthetic_batch,
)

PALINDROME = PalindromeConfig(length=9, num_symbols=5)
RECALL = RecallConfig(num_pairs=4, num_queries=6, num_keys=7, num_values=3)
STACK = StackConfig(num_operations=40, num_stacks=3, num_elements=5, max_depth=2)
COPIES = CopiesConfig(length=200, num_symbols=7, min_span=3, max_span=5)
NEEDLE = NeedleConfig(length=40, num_needles=3, value_length=2, num_symbols=11)
ALL = [PALINDROME, RECALL, STACK, COPIES, NEEDLE]


@pytest.mark.parametrize("config", ALL)
def test_shapes_and_vocabulary(config) -> None:
    batch = synthetic_batch(config, 16, seed=3)
    assert batch.tokens.shape == batch.targets.shape == (16 * config.length,)
    assert batch.cu_seqlens.tolist() == [i * config.length for i in range(17)]
    assert batch.tokens.min() >= 0
    assert batch.tokens.max() == config.vocab_size - 1
    assert batch.targets.max() < config.vocab_size


@pytest.mark.parametrize("config", ALL)
def test_batches_depend_on_seed_and_step_alone(config) -> None:
    make = lambda seed: SyntheticSource(config, sequences=4, seed=seed, micro_steps=2)  # noqa: E731
    assert torch.equal(make(1).batch(3, 1).tokens, make(1).draw(7).tokens)
    assert not torch.equal(make(1).batch(0, 0).tokens, make(2).batch(0, 0).tokens)
    assert not torch.equal(make(1).batch(0, 0).tokens, make(1).batch(0, 1).tokens)
    evaluation = make(1).evaluation_batch(4)
    assert torch.equal(evaluation.tokens, make(1).evaluation_batch(4).tokens)
    assert all(not torch.equal(evaluation.tokens, make(1).draw(i).tokens) for i in range(20))


def test_palindrome_trains_the_mirrored_half_alone() -> None:
    batch = synthetic_batch(PALINDROME, 5, seed=0)
    for tokens, targets in zip(batch.tokens.view(5, 9).tolist(), batch.targets.view(5, 9).tolist(), strict=True):
        half = tokens[:4]
        assert tokens == [*half, 5, *half[::-1]]
        assert targets == [IGNORE_INDEX] * 5 + [half[2], half[1], half[0]] + [IGNORE_INDEX]


def test_recall_asks_for_values_of_known_keys() -> None:
    batch = synthetic_batch(RECALL, 8, seed=0)
    shape = (8, RECALL.length)
    for tokens, targets in zip(batch.tokens.view(shape).tolist(), batch.targets.view(shape).tolist(), strict=True):
        memory = dict(zip(tokens[0:8:2], tokens[1:8:2], strict=True))
        assert len(memory) == 4
        assert tokens[8] == RECALL.vocab_size - 1
        assert targets[:9] == [IGNORE_INDEX] * 9
        assert targets[9:] == [memory[key] for key in tokens[9:]]
        assert all(7 <= value < 10 for value in memory.values())


def test_stack_replays() -> None:
    batch = synthetic_batch(STACK, 8, seed=0)
    shape = (8, STACK.num_operations, 3)
    pops = 0
    for operations, targets in zip(batch.tokens.view(shape).tolist(), batch.targets.view(shape).tolist(), strict=True):
        stacks: dict[int, list[int]] = {}
        for (marker, stack, element), target in zip(operations, targets, strict=True):
            held = stacks.setdefault(stack - 5, [])
            if marker == 8:
                held.append(element)
                assert len(held) <= 2
                assert target == [IGNORE_INDEX] * 3
            else:
                pops += 1
                assert marker == 9
                assert held.pop() == element
                assert target == [IGNORE_INDEX, element, IGNORE_INDEX]
        assert set(stacks) <= {0, 1, 2}
    assert pops > 8 * 10


def test_copies_go_on_with_an_earlier_part() -> None:
    config = CopiesConfig(length=400, num_symbols=50_000, min_span=4, max_span=9)
    batch = synthetic_batch(config, 8, seed=0)
    distances: list[int] = []
    for tokens, targets in zip(batch.tokens.view(8, 400).tolist(), batch.targets.view(8, 400).tolist(), strict=True):
        assert all(target in (IGNORE_INDEX, following) for target, following in zip(targets, tokens[1:], strict=False))
        starts = [t for t in range(1, 400) if targets[t] != IGNORE_INDEX and targets[t - 1] == IGNORE_INDEX]
        for start in starts:
            assert start >= 18
            earlier = [u for u in range(start) if tokens[u : u + 2] == [tokens[start], targets[start]]]
            assert earlier, "a copy has an original"
            distances.append(start - earlier[-1])
    share = float((batch.targets != IGNORE_INDEX).float().mean())
    assert 0.4 < share < 0.7
    assert min(distances) < 10
    # the nearest original may be a copy itself
    assert sum(distance > 100 for distance in distances) >= 20


def test_needles_are_hidden_once_and_asked_for_at_the_end() -> None:
    batch = synthetic_batch(NEEDLE, 200, seed=0)
    orders = set()
    for tokens, targets in zip(batch.tokens.view(200, 40).tolist(), batch.targets.view(200, 40).tolist(), strict=True):
        keys = tokens[32::3]
        assert len(set(keys)) == 3
        assert targets[:32] == [IGNORE_INDEX] * 32
        hidden = [tokens.index(key) for key in keys]
        # one key token in each hidden needle and in each question, the last of which lacks the end of its value
        assert [tokens.count(key) for key in keys] == [2, 2, 2]
        for question, (key, start) in enumerate(zip(keys, hidden, strict=True)):
            assert start + 2 < 32
            values = tokens[start + 1 : start + 3]
            at = 32 + 3 * question
            assert tokens[at] == key
            assert targets[at : at + 3] == [*values, IGNORE_INDEX][: 40 - at]
            assert tokens[at + 1] == values[0]
        orders.add(tuple(sorted(range(3), key=hidden.__getitem__)))
    assert len(orders) == 6, "needles are asked for in every order"


def test_a_needle_is_anywhere_in_the_hay() -> None:
    config = NeedleConfig(length=30, num_symbols=12)
    tokens = synthetic_batch(config, 4200, seed=0).tokens.view(-1, 30)
    starts = (tokens[:, :-4] == tokens[:, -4, None]).long().argmax(1)
    counts = torch.bincount(starts, minlength=22)
    assert counts.shape == (22,), "31 tokens with the last value, less needle and question, and the place behind"
    assert counts.min() > 140  # 191 expected, deviation 14
    assert counts.max() < 245


def test_needles_may_fill_the_string() -> None:
    tokens = synthetic_batch(NeedleConfig(length=23, num_needles=4, value_length=2, num_symbols=6), 8, seed=0).tokens
    for row in tokens.view(8, 23).tolist():
        needles = {tuple(row[start : start + 3]) for start in range(0, 12, 3)}
        assert {tuple(row[start : start + 3]) for start in range(12, 21, 3)} < needles


@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        (PalindromeConfig, {"length": 8}, "length must be odd"),
        (PalindromeConfig, {"num_symbols": 1}, "num_symbols must be at least 2, got 1"),
        (RecallConfig, {"num_pairs": 65}, "num_keys must be at least 65, got 64"),
        (StackConfig, {"max_depth": 0}, "max_depth must be at least 1"),
        (CopiesConfig, {"max_span": 7}, "max_span must be at least 8, got 7"),
        (CopiesConfig, {"length": 95}, "length must be at least 96, got 95"),
        (NeedleConfig, {"num_needles": 0}, "num_needles must be at least 1, got 0"),
        (NeedleConfig, {"num_needles": 255}, "num_symbols must be at least 257, got 256"),
        (NeedleConfig, {"num_needles": 4, "length": 38}, "length must be at least 39, got 38"),
        (CopiesConfig, {"copy_share": 0.0}, r"copy_share must be in \(0, 1\], got 0.0"),
    ],
)
def test_config_ranges_are_checked(config, options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config(**options)


def test_source_sizes_are_checked() -> None:
    with pytest.raises(ValueError, match="sequences must be at least 1"):
        SyntheticSource(PALINDROME, sequences=0, seed=0)
