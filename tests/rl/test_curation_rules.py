import pytest

from perilune.rl.curation_rules import exclusion_reason, normalized_question, wilson_interval


def test_wilson_interval_matches_the_published_example():
    low, high = wilson_interval(1, 10)
    assert (round(low, 3), round(high, 3)) == (0.018, 0.404)


@pytest.mark.parametrize(("correct", "total"), [(0, 1), (0, 10), (10, 10), (5, 10), (999, 1000)])
def test_wilson_interval_holds_the_rate_and_stays_in_range(correct, total):
    low, high = wilson_interval(correct, total)
    assert 0 <= low <= correct / total <= high <= 1


@pytest.mark.parametrize(("correct", "total"), [(1, 0), (-1, 3), (4, 3)])
def test_wilson_interval_refuses_impossible_counts(correct, total):
    with pytest.raises(ValueError, match=f"got {correct} of {total}"):
        wilson_interval(correct, total)


@pytest.mark.parametrize(
    ("question", "answer", "reason"),
    [
        ("What is 2 + 3?", "5", None),
        ("Which is largest? (A) 1 (B) 2 (C) 3", "3", "choice"),
        ("Pick one:\nA. red\nB. blue", "blue", "choice"),
        ("Is 7 prime?", "yes", "choice"),
        ("Is 7 prime?", "True", "choice"),
        ("Which option?", "(C)", "choice"),
        ("Prove that there are infinitely many primes.", "...", "proof"),
        ("Show that 2 is even.", "2", "proof"),
        ("A) is a strange way to begin. What is 1 + 1?", "2", None),
        ("How do you improve 3 x 4?", "12", None),
        ("Let a be 1 and b be 2. What is a + b?", "3", None),
    ],
)
def test_false_positive_prone_problems_are_recognized(question, answer, reason):
    assert exclusion_reason(question, answer) == reason


def test_questions_that_differ_in_space_and_case_are_equal():
    assert normalized_question("  What is\n 2+2? ") == normalized_question("what IS 2+2?")
