import re

import pytest
from rich.console import Console

from perilune.errors import DataError
from perilune.report import write_any_report, write_comparison, write_sweep_index
from perilune.report.compare import comparison_table, comparison_tables, is_shared, mean_and_spread
from perilune.report.rundata import load_run
from tests.report.synthetic import write_run


@pytest.fixture
def sweep(tmp_path):
    names = {variant: [f"{variant}-seed{seed}" for seed in range(2)] for variant in ("kda", "mla")}
    for index, variant in enumerate(names):
        for seed in range(2):
            write_run(tmp_path / names[variant][seed], seed=seed, offset=index / 10, stages=("pretrain", "sft"))
    write_sweep_index(tmp_path, names)
    return tmp_path


def test_a_sweep_is_compared_stage_by_stage(sweep):
    text = write_any_report(sweep).read_text()
    titles = re.findall(r"<h2>(.*?)</h2>", text)
    assert titles == ["Stage pretrain", "Stage sft", "Accuracy and length", "Recipes"]
    assert "bands: standard deviation over seeds" in text
    assert "each variant" in text.lower()


def test_the_table_gives_mean_and_spread(sweep):
    runs = {"kda": [load_run(sweep / f"kda-seed{seed}") for seed in range(2)], "none": []}
    table = comparison_table("pretrain", runs)
    greedy = [100 * run.results[0].accuracy.greedy for run in runs["kda"]]
    row = dict(zip(table.header, table.rows[0], strict=True))
    assert row["accuracy greedy %"] == mean_and_spread(greedy)
    assert row["seeds"] == "2"
    assert len(table.rows) == 1  # what a variant has not done is no row


def test_a_terminal_that_is_narrow_shows_every_name_and_number(sweep):
    table = comparison_tables(sweep)[0]
    content = comparison_table(
        "pretrain", {v: [load_run(sweep / f"{v}-seed{n}") for n in range(2)] for v in ("kda", "mla")}
    )
    assert [column.header for column in table.columns] == ["variant", "kda", "mla"]
    console = Console(width=60, record=True)
    console.print(table)
    text = "".join(console.export_text().split())
    for title, *cells in zip(content.header, *content.rows, strict=True):
        if title in [str(cell) for cell in table.columns[0].cells]:
            assert all(part in text for cell in cells for part in cell.split())
    assert "…" not in text


def test_a_stage_that_was_run_once_for_all_is_one_row_and_one_point(tmp_path):
    names = {variant: [f"{variant}-seed{seed}" for seed in range(2)] for variant in ("kda", "mla")}
    for variant, children in names.items():
        for child in children:
            write_run(tmp_path / child, seed=0, stages=("pretrain",))
            write_run(tmp_path / f"own-{child}", seed=len(child) + ord(variant[0]), stages=("sft",))
            for kind in ("results", "samples"):
                for path in (tmp_path / f"own-{child}" / kind).iterdir():
                    path.rename(tmp_path / child / kind / path.name)
    write_sweep_index(tmp_path, names)
    variants = {variant: [load_run(tmp_path / child) for child in children] for variant, children in names.items()}
    assert is_shared("pretrain", variants)
    assert not is_shared("sft", variants)
    assert [row[0] for row in comparison_table("pretrain", variants).rows] == ["all (shared)"]
    assert [row[0] for row in comparison_table("sft", variants).rows] == ["kda", "mla"]
    assert [table.title for table in comparison_tables(tmp_path)] == ["Stage sft"]


def test_children_that_do_not_exist_yet_are_left_out(tmp_path):
    write_sweep_index(tmp_path, {"kda": ["kda-seed0", "kda-seed1"], "mla": ["mla-seed0"]})
    write_run(tmp_path / "kda-seed0", stages=("pretrain",))
    text = write_comparison(tmp_path).read_text()
    assert "one seed" in text


@pytest.mark.parametrize("content", [None, "{", '{"variants": 3}', "[]"])
def test_a_directory_that_is_no_sweep_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(DataError, match="sweep"):
        write_comparison(tmp_path)


@pytest.mark.parametrize(
    ("values", "text"),
    [([3.0, 3.0], "3 ± 0"), ([70.1, 71.9], "71.0 ± 1.3"), ([], "-"), ([100.0, 300.0], "200 ± 141")],
)
def test_spread_decides_the_digits(values, text):
    assert mean_and_spread(values) == text
