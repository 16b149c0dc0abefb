"""Event logs: what is read of a file is the same in every format and order, and what is wrong is named by its line."""

import gzip
from datetime import UTC, datetime

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perilune.errors import DataError
from perilune.recsys import EventLog, LogColumns, RatingColumns, read_inter, read_log, read_ratings

pl = pytest.importorskip("polars", reason="polars is not installed")

BEHAVIORS = ("view", "buy")
TEXT = "user,item,behavior,time\n7,b,view,100\n10,a,buy,300\n7,b,view,90\n7,b,buy,200\n10,b,view,250\n"
EXPECTED = {(7, "b", "view", 90), (7, "b", "buy", 200), (10, "a", "buy", 300), (10, "b", "view", 250)}


def events(log):
    times = [None] * len(log) if log.times is None else log.times.tolist()
    names = [log.behaviors[code] for code in log.behavior]
    return set(zip(log.user_ids[log.users].tolist(), log.item_ids[log.items].tolist(), names, times, strict=True))


def read(tmp_path, text, name="log.csv", **options):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_log(path, **{"behaviors": BEHAVIORS, **options})


@pytest.mark.parametrize("name", ["log.csv", "log.csv.gz", "log.tsv", "log.tsv.gz", "log.parquet"])
def test_a_log_is_the_same_in_every_format(tmp_path, name):
    if name == "log.parquet":
        pl.read_csv(TEXT.encode()).write_parquet(tmp_path / name)
        log = read_log(tmp_path / name, behaviors=BEHAVIORS)
    else:
        data = (TEXT.replace(",", "\t") if "tsv" in name else TEXT).encode()
        log = read(tmp_path, gzip.compress(data) if name.endswith("gz") else data, name)
    assert events(log) == EXPECTED
    assert (log.duplicates, log.unknown, log.behaviors) == (1, 0, BEHAVIORS)
    assert log.user_ids.tolist() == [7, 10]  # as numbers, not as text
    assert [log.user_ids.dtype, log.users.dtype, log.items.dtype] == [np.int64, np.int32, np.int32]
    assert [log.behavior.dtype, log.times.dtype] == [np.int16, np.int64]


ROWS = st.lists(
    st.tuples(st.integers(0, 3), st.sampled_from("abc"), st.sampled_from(BEHAVIORS), st.integers(0, 50)), min_size=1
)


@given(ROWS, st.randoms())
def test_order_and_repetition_of_rows_change_nothing(tmp_path_factory, rows, random):
    directory = tmp_path_factory.mktemp("log")

    def log_of(rows):
        return read(directory, "user,item,behavior,time\n" + "".join(",".join(map(str, row)) + "\n" for row in rows))

    first, other = log_of(rows), log_of(random.sample(rows * 2, 2 * len(rows)))
    expected = {}
    for *key, time in rows:
        expected[tuple(key)] = min(time, expected.get(tuple(key), time))
    assert events(first) == {(*key, time) for key, time in expected.items()}
    assert first.duplicates == len(rows) - len(first)
    for name in ("users", "items", "behavior", "times", "user_ids", "item_ids"):
        assert np.array_equal(getattr(first, name), getattr(other, name))
    again = EventLog.of(
        *(getattr(first, name) for name in ("users", "items", "behavior", "times")),
        user_ids=first.user_ids,
        item_ids=first.item_ids,
        behaviors=first.behaviors,
    )
    assert again.duplicates == 0
    assert events(again) == events(first)


def test_columns_are_what_they_are_called_and_others_are_not_read(tmp_path):
    text = "junk,who,what,event,n\nx,1,2,pv,1\n\n,1,3,order,5\nz,2,2,pv,1\n\n"
    columns = LogColumns(user="who", item="what", behavior="event", time="", count="n")
    log = read(tmp_path, text, columns=columns, event_map={"pv": "view", "order": "buy"})
    assert events(log) == {(1, 2, "view", None), (1, 3, "buy", None), (2, 2, "view", None)}
    assert log.times is None


def test_what_is_no_behavior_is_refused_or_dropped_unseen(tmp_path):
    text = TEXT + "9,,scroll,never\n8,c,fav,1\n"
    with pytest.raises(
        DataError, match=r"log\.csv: line 7: column 'behavior' must be one of 'view', 'buy' .* 'scroll'"
    ):
        read(tmp_path, text)
    with pytest.raises(DataError, match=r"line 8: column 'behavior' must be one of .*, got 'fav'"):
        read(tmp_path, text, event_map={"scroll": ""})
    for options in ({"on_unknown": "drop"}, {"event_map": {"scroll": "", "fav": ""}}):
        log = read(tmp_path, text, **options)
        assert events(log) == EXPECTED
        assert log.unknown == 2
    log = read(tmp_path, text + "8,c,wish,2\n", event_map={"fav": "view"}, on_unknown="drop")
    assert events(log) == EXPECTED | {(8, "c", "view", 1)}
    with pytest.raises(DataError, match="event_map has 'x' as 'cart', which is none of the behaviors 'view', 'buy'"):
        read(tmp_path, text, event_map={"x": "cart"})
    for names in ((), ("buy", "buy"), ("", "buy")):
        with pytest.raises(DataError, match="behaviors must be named once each, the target last"):
            read(tmp_path, text, behaviors=names)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (",a,view,1", r"line 7: column 'user' must name somebody or something, got nothing"),
        ('"",a,view,1', r"line 7: column 'user' must name somebody or something, got ''"),
        ("7,NaN,view,1", r"line 7: column 'item' must name somebody or something, got 'NaN'"),
        ("7,a,,1", r"line 7: column 'behavior' must be one of 'view', 'buy'.*, got nothing"),
        ("7,a,view,", r"line 7: column 'time' must be a time.*, got nothing"),
        ("7,a,view,nan", r"line 7: column 'time' must be a time.*, got 'nan'"),
        ("7,a,view,inf", r"line 7: column 'time' must be a time.*, got 'inf'"),
        ("7,a,view,2024-02-30", r"line 7: column 'time' must be a time.*, got '2024-02-30'"),
        ("7,a,view", r"line 7: column 'time' must be a time.*, got nothing"),
        ("7,a,view,1,5", "found more fields"),
        ("7,a,view,x\n,a,view,1", r"line 7: column 'time'"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path, row, words):
    with pytest.raises(DataError, match=r"log\.csv: .*" + words):
        read(tmp_path, TEXT + row + "\n")


@pytest.mark.parametrize("count", ["0", "-1", "nan", "", "x"])
def test_a_count_is_positive(tmp_path, count):
    text = f"user,item,behavior,n\n1,2,view,2\n1,3,buy,{count}\n"
    with pytest.raises(DataError, match=r"line 3: column 'n' must be a positive number, got "):
        read(tmp_path, text, columns=LogColumns(time="", count="n"))


def test_files_that_are_no_logs_are_named(tmp_path):
    with pytest.raises(DataError, match=r"log\.csv: line 1 has no column 'time'; there are 'user', 'item', 'behavior'"):
        read(tmp_path, "user,item,behavior\n1,2,view\n")
    for column in ("user", "item", "behavior"):
        with pytest.raises(DataError, match=rf"line 1 has no column '{column}'; there are"):
            read(tmp_path, TEXT.replace(column, "x", 1))
    with pytest.raises(DataError, match=r"log\.csv: an empty log: no rows"):
        read(tmp_path, "user,item,behavior,time\n")
    with pytest.raises(DataError, match=r"an empty log: none of its 5 rows has a behavior that is asked for"):
        read(tmp_path, TEXT, behaviors=("cart",), on_unknown="drop")
    with pytest.raises(DataError, match=r"log\.csv: empty"):
        read(tmp_path, "")
    with pytest.raises(DataError, match=r"log\.csv: .*utf-8"):
        read(tmp_path, TEXT.encode() + b"\xff,a,view,1\n")
    with pytest.raises(DataError, match=r"log\.csv\.gz: unexpected end"):
        read(tmp_path, gzip.compress(TEXT.encode() * 50)[:-9], "log.csv.gz")
    with pytest.raises(DataError, match=r"log\.parquet: .*PAR1"):
        read(tmp_path, TEXT, "log.parquet")
    with pytest.raises(DataError, match=r"none\.csv: No such file"):
        read_log(tmp_path / "none.csv", behaviors=BEHAVIORS)


MOMENT = int(datetime(2024, 5, 31, 23, 59, 58, tzinfo=UTC).timestamp())


@pytest.mark.parametrize(
    "text",
    [
        f"{MOMENT}",
        f"{MOMENT}.75",
        f"{MOMENT}123",
        f"{MOMENT}123456",
        f"{MOMENT}123456789",
        f"{MOMENT / 1e9}e9",
        "2024-05-31T23:59:58",
        "2024-05-31 23:59:58.9",
        "2024-05-31T23:59:58Z",
        "2024-06-01T01:59:58+02:00",
    ],
)
def test_times_are_seconds_in_whatever_form(tmp_path, text):
    log = read(tmp_path, f"user,item,behavior,time\n1,1,view,{text}\n1,1,buy,2024-01-01\n1,2,buy,2024-01-01 00:01\n")
    day = int(datetime(2024, 1, 1, tzinfo=UTC).timestamp())
    assert events(log) == {(1, 1, "view", MOMENT), (1, 1, "buy", day), (1, 2, "buy", day + 60)}


def parquet(tmp_path, **columns):
    rows = {"user": ["u", "v"], "item": [1, 2], "behavior": ["view", "buy"], "time": [1, 2], **columns}
    pl.DataFrame(rows).write_parquet(tmp_path / "log.parquet")
    return read_log(tmp_path / "log.parquet", behaviors=BEHAVIORS)


def test_parquet_has_types_and_rows(tmp_path):
    moment = datetime(2024, 5, 31, 23, 59, 58)
    for times in (pl.Series([moment] * 2), pl.Series([moment] * 2).dt.replace_time_zone("UTC"), [MOMENT * 1000.0] * 2):
        assert parquet(tmp_path, time=times).times.tolist() == [MOMENT] * 2
    assert parquet(tmp_path, user=[3.0, 4.0]).user_ids.tolist() == [3, 4]
    assert parquet(tmp_path, user=pl.Series(["x", "y"], dtype=pl.Categorical)).user_ids.tolist() == ["x", "y"]
    for column, values, words in (
        ("user", [1.0, 0.5], "row 2: column 'user' must name somebody or something, got 0.5"),
        ("item", [float("nan"), 1.0], "row 1: column 'item' must name somebody or something, got nan"),
        ("item", [1, None], "row 2: column 'item' must name .* got nothing"),
        ("time", [1.0, float("nan")], "row 2: column 'time' must be a time.*, got nan"),
        ("time", [moment, None], "row 2: column 'time' must be a time.*, got nothing"),
        ("time", [[1], [2]], r"column 'time' is of type List\(Int64\), where times"),
        ("user", [True, False], "column 'user' is of type Boolean, where text or whole numbers"),
    ):
        with pytest.raises(DataError, match=r"log\.parquet: .*" + words):
            parquet(tmp_path, **{column: values})


def test_ids_are_text_where_one_is_no_whole_number(tmp_path):
    log = read(tmp_path, TEXT + "007,b,view,1\n-3,é,buy,5\n")
    assert log.user_ids.tolist() == ["-3", "007", "10", "7"]
    assert log.user_ids.dtype.kind == "U"
    assert log.item_ids.tolist() == ["a", "b", "é"]


def test_recboles_files(tmp_path):
    path = tmp_path / "shop.inter"
    header = "user_id:token\titem_id:token\tbehavior:token\ttimestamp:float\n"
    path.write_text(header + "7\tb\tview\t90.5\n7\tb\tbuy\t200\n10\ta\tbuy\t300\n10\tb\tview\t250.0\n")
    assert events(read_inter(path, behaviors=BEHAVIORS)) == EXPECTED
    columns = LogColumns(user="user_id", item="item_id", behavior="behavior", time="")
    assert read_inter(path, behaviors=BEHAVIORS, columns=columns).times is None
    path.write_text(header + "7\tb\tview\t90\n7\tb\ttip\t90\n")
    with pytest.raises(DataError, match=r"shop\.inter: line 3: column 'behavior' must be one of .* got 'tip'"):
        read_inter(path, behaviors=BEHAVIORS)
    path.write_text(header.replace(":float", ""))
    with pytest.raises(DataError, match=r"shop\.inter: line 1: column 'timestamp' must be named like 'user_id:token'"):
        read_inter(path, behaviors=BEHAVIORS)


def test_ratings_are_three_behaviors(tmp_path):
    rows = [(1, 5, 2, 10), (1, 6, 2.5, 20), (1, 7, 3.5, 30), (2, 5, 4, 40), (2, 6, 0.5, 50)]
    names = {5: "negative", 6: "neutral", 7: "neutral"}
    expected = {(1, item, names[item], time) for user, item, _, time in rows if user == 1}
    expected |= {(2, 5, "positive", 40), (2, 6, "negative", 50)}
    for name, separator, header in (
        ("r.csv", ",", "user,item,rating,time\n"),
        ("r.dat", "::", ""),
        ("u.data", "\t", ""),
    ):
        path = tmp_path / name
        path.write_text(header + "".join(separator.join(map(str, row)) + "\n" for row in rows))
        log = read_ratings(path, separator=separator, has_header=bool(header))
        assert events(log) == expected
        assert log.behaviors[-1] == "positive"
    strict = read_ratings(tmp_path / "r.csv", low=0.5, high=3, behaviors=("bad", "so", "good"))
    assert [strict.behaviors[code] for code in strict.behavior] == ["bad", "so", "so", "good", "good"]
    (tmp_path / "r.csv").write_text("u,i,stars\n1,2,5\n1,3,x\n")
    columns = RatingColumns(user="u", item="i", rating="stars", time="")
    with pytest.raises(DataError, match=r"r\.csv: line 3: column 'stars' must be a number, got 'x'"):
        read_ratings(tmp_path / "r.csv", columns=columns)
    with pytest.raises(DataError, match=r"r\.csv: line 1 has no column 'rating'"):
        read_ratings(tmp_path / "r.csv")
    with pytest.raises(DataError, match="low must be less than high, got 4 and 4"):
        read_ratings(tmp_path / "r.csv", low=4, high=4)
    (tmp_path / "u.data").write_text("1\t5\t3\t10\n1\t5\tnan\t10\n")
    with pytest.raises(DataError, match=r"u\.data: line 2: column 'rating' must be a number, got 'nan'"):
        read_ratings(tmp_path / "u.data", has_header=False)


def test_events_are_checked():
    codes = np.array([0, 1])
    names = {"user_ids": np.arange(2), "item_ids": np.arange(2), "behaviors": BEHAVIORS}
    with pytest.raises(DataError, match=r"item 2 of event 1 is not in \[0, 2\)"):
        EventLog.of(codes, codes * 2, codes, None, **names)
    with pytest.raises(DataError, match="2 users, 2 items and 2 behaviors, or times"):
        EventLog.of(codes, codes, codes, codes[:1], **names)


def test_without_polars_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "polars", None)
    with pytest.raises(DataError, match=r"pip install 'perilune\[recsys\]'"):
        read(tmp_path, TEXT)


def test_the_latest_category_of_an_item_counts(tmp_path):
    text = "user,item,behavior,time,sort\n" + "\n".join(
        [
            "1,7,view,30,shoes",
            "2,7,view,20,hats",
            "1,8,view,10,",
            "1,9,view,10,NaN",
            "2,9,buy,5,coats",
            "2,10,buy,5,b",
            "1,10,buy,5,a",
            "1,11,like,5,dropped",
        ]
    )
    log = read(tmp_path, text, columns=LogColumns(category="sort"), on_unknown="drop")
    assert log.categories == {7: "shoes", 9: "coats", 10: "b"}
    assert not read(tmp_path, text, on_unknown="drop").categories
    with pytest.raises(DataError, match="no column 'kind'"):
        read(tmp_path, text, columns=LogColumns(category="kind"))
