"""Who is served when: prompts that come while others are answered, and a cache that is full."""

import pytest

from tests.engine.test_engine_cache import BLOCK, make_decoder, make_engine, request, text, tight_engine


@pytest.fixture(scope="module")
def hybrid():
    return make_decoder("kda and mla")


def test_a_long_prompt_does_not_stall_running_rows(hybrid):
    engine = make_engine(hybrid, max_tokens_mixed=16)
    first = engine.add(request(text(4), max_new_tokens=60))
    engine.step()
    engine.add(request(text(200), max_new_tokens=1))
    decoded = []
    while engine.stats().waiting:
        decoded.append([o.key for o in engine.step()][:1] == [first])
    assert len(decoded) >= 200 / 16
    assert decoded.count(False) == 1  # the step that lets the prompt in


def test_who_comes_late_does_not_wait_for_a_token_of_others(hybrid):
    engine = make_engine(hybrid)
    running = [engine.add(request(text(4, i), max_new_tokens=40)) for i in range(3)]
    engine.step()
    for n in range(3):  # one after another, as fast as they can: the others still get a token in between
        late = engine.add(request(text(5, 9 + n), max_new_tokens=30))
        assert [o.key for o in engine.step()] == [late]
        running.append(late)
        assert sorted(o.key for o in engine.step()) == running


def test_while_more_wait_than_run_texts_come_first_but_not_for_ever(hybrid):
    engine = make_engine(hybrid, max_tokens_prefill=16, max_tokens_mixed=16, max_batch=16)
    first = engine.add(request(text(4), max_new_tokens=60))
    engine.step()
    for n in range(15):
        engine.add(request(text(16, n), max_new_tokens=60))
    decoded = []
    while engine.stats().waiting:
        decoded.append(first in [o.key for o in engine.step()])
    # four texts are let in before the rows go on; then fewer wait than run
    assert decoded[:6] == [False] * 4 + [True] + [False]
    assert all(sum(decoded[i : i + 5]) for i in range(len(decoded) - 4))
    assert decoded.count(False) >= 9


def test_no_step_passes_without_work_while_the_cache_is_full(hybrid):
    engine = tight_engine(hybrid, 12, max_batch=16)
    for n in range(14):
        engine.add(request(text(2 * BLOCK, n), max_new_tokens=2 * BLOCK))
    most = 0
    while engine.has_work:
        before = engine.stats()
        engine.step()
        after = engine.stats()
        most = max(most, after.waiting - after.running)
        assert (after.tokens, after.preemptions, after.waiting) != (before.tokens, before.preemptions, before.waiting)
    assert most > 5


def test_who_came_first_is_served_first(hybrid):
    engine = make_engine(hybrid, max_batch=2)
    keys = [engine.add(request(text(5, i), max_new_tokens=3)) for i in range(6)]
    ended = []
    while engine.has_work:
        ended += [output.key for output in engine.step() if output.completion]
    assert ended == keys
