from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perilune.tasks.wide_table import (
    Column,
    normalized,
    parse_table,
    render_table,
    score_table,
    to_number,
    wide_table_task,
)
from perilune.tasks.wide_table.scoring import is_right

COLUMNS = (Column(name="Key"), Column(name="Color"), Column(name="Size m", kind="number", tolerance=0.01))
GOLD = (("A", "red", "10"), ("B", "green", "20"), ("C", "blue", "30"))
HEADER = [column.name for column in COLUMNS]

cells = st.text(st.characters(exclude_characters="*_`"), max_size=12)  # emphasis around a cell is taken off


def score(rows, header=HEADER, gold=GOLD):
    return score_table(render_table(header, rows), COLUMNS, gold)


def test_the_worked_example():
    found = score([("A", "red", "10"), ("B", "green", "99"), ("D", "blue", "30")])
    assert found.precision == found.recall == found.f1 == pytest.approx(5 / 9)
    assert found.row_precision == found.row_recall == found.row_f1 == pytest.approx(1 / 3)
    assert not found.success


@pytest.mark.parametrize(
    ("rows", "precision", "recall", "row_f1", "success"),
    [
        (GOLD, 1, 1, 1, True),
        (GOLD[:2], 1, 6 / 9, 2 * 2 / 5, False),
        ((*GOLD, ("D", "x", "1")), 9 / 12, 1, 2 * 3 / 7, False),
        ((*GOLD, GOLD[0]), 1, 1, 1, True),
        ((("a ", "RED", "10.05"), *GOLD[1:]), 1, 1, 1, True),
        ((("A", "red", "11"), ("A", "red", "10"), *GOLD[1:]), 8 / 9, 8 / 9, 2 / 3, False),
        ([(key, "?", "?") for key in "ABC"], 3 / 9, 3 / 9, 0, False),
        ([("X", "red", "10")], 0, 0, 0, False),
        ([], 0, 0, 0, False),
    ],
    ids=[
        "all",
        "one missing",
        "one too many",
        "double",
        "spelling",
        "first of doubles",
        "keys",
        "wrong key",
        "no rows",
    ],
)
def test_tables_made_by_hand(rows, precision, recall, row_f1, success):
    found = score(rows)
    assert found.precision == pytest.approx(precision)
    assert found.recall == pytest.approx(recall)
    assert found.row_f1 == pytest.approx(row_f1)
    assert found.f1 == pytest.approx(2 * precision * recall / (precision + recall) if precision else 0)
    assert found.success is success
    assert found.problem is None


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ("", "no markdown table"),
        ("A is red.", "no markdown table"),
        (render_table(["Key", "Color"], [("A", "red")]), "missing: Size m"),
        (render_table([*HEADER, "Note"], [("A", "red", "10", "!")]), "too many: Note"),
        (render_table([*HEADER, "key"], [("A", "red", "10", "A")]), "'key' is there twice"),
    ],
)
def test_wrong_columns_and_no_table_give_nothing_and_say_why(answer, problem):
    found = score_table(answer, COLUMNS, GOLD)
    assert problem in (found.problem or "")
    assert found.f1 == found.row_f1 == found.precision == found.recall == 0
    assert not found.success


def test_names_of_columns_are_compared_without_case_spaces_and_punctuation():
    assert score(GOLD, header=["KEY", " color:", "**size (m)**"]).success


def test_true_rows_of_one_key_count_once():
    assert score(GOLD, gold=(*GOLD, ("a", "black", "1"))).success


def test_several_columns_can_be_the_key():
    columns = (Column(name="City"), Column(name="Country"), Column(name="Size"))
    gold = (("Victoria", "Canada", "1"), ("Victoria", "Chile", "2"))
    answer = render_table(["Size", "Country", "City"], [("1", "Canada", "victoria"), ("1", "Chile", "Victoria")])
    found = score_table(answer, columns, gold, keys=2)
    assert found.f1 == pytest.approx(5 / 6)
    assert found.row_f1 == 0.5


@pytest.mark.parametrize(
    ("cell", "truth", "kind", "is_same"),
    [
        ("New  York", "new york", "text", True),
        ("1000", "1,000", "text", False),
        ("1,000", "1000", "number", True),
        ("1 000", "1000", "number", True),
        ("1009", "1000", "number", True),
        ("1011", "1000", "number", False),
        ("-20", "\u221220", "number", True),
        ("-20.1", "-20", "number", True),
        ("12%", "0.12", "number", True),
        ("12", "12%", "number", False),
        ("0", "0", "number", True),
        ("0.001", "0", "number", False),
        ("1e3", "1000", "number", True),
        ("1000 km", "1000", "number", False),
        ("nan", "1", "number", False),
        ("inf", "1e400", "number", False),
        ("", "1", "number", False),
        ("2024-01-31", "2024-01-01", "date", True),
        ("2024-02-01", "2024-01-01", "date", True),
        ("2024-02-02", "2024-01-01", "date", False),
        ("March 3, 2020", "2020-03-03", "date", True),
        ("3 Mar 2020", "2020-03-03", "date", True),
        ("March 2020", "2020-03-15", "date", True),
        ("soon", "2020-03-15", "date", False),
        ("https://www.example.org/a?b", "http://www.example.org", "url", True),
        ("WWW.example.org/a", "http://www.example.org:80/", "url", True),
        ("[site](https://www.example.org/x)", "www.example.org", "url", True),
        ("example.org", "www.example.org", "url", False),
        ("http://[", "www.example.org", "url", False),
        ("", "www.example.org", "url", False),
    ],
)
def test_cells_are_compared_as_their_kind_wants(cell, truth, kind, is_same):
    assert is_right(cell, truth, Column(name="x", kind=kind, tolerance=0.01)) is is_same


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), shuffle=st.randoms(use_true_random=False))
def test_the_order_of_rows_and_columns_changes_nothing(seed, shuffle):
    task = wide_table_task(seed % 30)
    rng = Random(seed)
    rows = [[cell if place == 0 or rng.random() < 0.8 else "?" for place, cell in enumerate(row)] for row in task.rows]
    rows = rows[: rng.randint(1, len(rows))]
    header = [column.name for column in task.columns]
    before = task.score(render_table(header, rows))
    order = list(range(len(header)))
    shuffle.shuffle(order)
    shuffle.shuffle(rows)
    after = task.score(render_table([header[at] for at in order], [[row[at] for at in order] for row in rows]))
    assert after == before


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 29), dropped=st.integers(0, 8))
def test_dropping_rows_lowers_recall_by_their_share(seed, dropped):
    task = wide_table_task(seed)
    kept = task.rows[: len(task.rows) - dropped]
    found = task.score(render_table([column.name for column in task.columns], kept))
    assert found.recall == pytest.approx(len(kept) / len(task.rows))
    assert found.row_recall == pytest.approx(len(kept) / len(task.rows))
    assert found.success is (dropped == 0)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(text=st.one_of(st.text(), st.text(st.sampled_from("|-:\\ \nKeyColorSizem1%,.e"), max_size=200)))
def test_no_text_makes_scoring_raise(text):
    for answer in (text, f"| Key | Color | Size m |\n|--|--|--|\n{text}"):
        found = score_table(answer, COLUMNS, GOLD)
        assert 0 <= found.f1 <= 1
        assert 0 <= found.row_f1 <= 1


@settings(max_examples=100, deadline=None, derandomize=True)
@given(cell=st.text(max_size=30), truth=st.text(max_size=30), kind=st.sampled_from(["text", "number", "date", "url"]))
def test_no_cell_makes_comparing_raise(cell, truth, kind):
    column = Column(name="x", kind=kind, tolerance=0.1)
    is_right(cell, truth, column)
    assert is_right(cell, cell, column)
    assert normalized(normalized(cell)) == normalized(cell)
    to_number(cell)


def test_a_megabyte_is_scored_in_no_time():
    for text in ("|" * 10**6, "| a " * 250_000, "-" * 10**6, "|-\n" * 300_000, "\\" * 10**6, "1" * 10**6, "*" * 10**6):
        score_table(text, COLUMNS, GOLD)
        score_table(f"| Key | Color | Size m |\n|--|--|--|\n| A | red | {text} |", COLUMNS, GOLD)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.tuples(cells, cells), max_size=5))
def test_a_table_written_is_read_again(rows):
    found = parse_table(f"Before.\n\n{render_table(['a', 'b'], rows)}\n\nAfter.")
    assert found is not None
    assert found.header == ("a", "b")
    assert list(found.rows) == [tuple(" ".join(cell.split()) for cell in row) for row in rows]


@pytest.mark.parametrize(
    ("text", "header", "rows"),
    [
        ("| a | b |\n|---|:-:|\n| 1 | 2 |", ("a", "b"), (("1", "2"),)),
        ("a | b\n--|--\n1 | 2", ("a", "b"), (("1", "2"),)),
        ("```markdown\n| a |\n|---|\n| 1 |\n```", ("a",), (("1",),)),
        ("| a | b |\n|---|---|\n| 1 |\n| 1 | 2 | 3 |", ("a", "b"), (("1", ""), ("1", "2"))),
        ("| a | b |\n|---|---|\n| x \\| y | **2** |", ("a", "b"), (("x | y", "2"),)),
        ("| a | b |\n|---|---|\n|  | 2 |", ("a", "b"), (("", "2"),)),
        ("| a |\n|---|\n| 1 |\n\ntext\n\n| b |\n|---|\n| 2 |", ("b",), (("2",),)),
        ("  | a | b |\n  | - | - |\n  | 1 | 2 |\r\n", ("a", "b"), (("1", "2"),)),
        ("| a | b |\n|---|---|", ("a", "b"), ()),
    ],
    ids=["plain", "bare", "fenced", "ragged", "escaped", "empty cell", "last of two", "indented", "no rows"],
)
def test_tables_are_found_in_text(text, header, rows):
    found = parse_table(text)
    assert found is not None
    assert found.header == header
    assert found.rows == rows


@pytest.mark.parametrize("text", ["", "| a | b |", "a\n---\nb", "| a | b |\n|---|\n| 1 | 2 |", "---\n---", "|\n|\n|"])
def test_other_text_is_no_table(text):
    assert parse_table(text) is None
