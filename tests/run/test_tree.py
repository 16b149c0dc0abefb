import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perilune.errors import RecipeError
from perilune.run.tree import differences, expand_presets, flatten, merge, parse_overrides, read_tree, without_none


def test_a_recipe_is_laid_over_its_base(tmp_path):
    (tmp_path / "base.toml").write_text("seed = 1\n[model]\nwidth = 8\ndepth = 2\n[stages.a]\nlist = [1, 2]\n")
    (tmp_path / "own.toml").write_text('base = "base.toml"\n[model]\ndepth = 3\n[stages.a]\nlist = [3]\n')
    assert read_tree(tmp_path / "own.toml") == {
        "seed": 1,
        "model": {"width": 8, "depth": 3},
        "stages": {"a": {"list": [3]}},
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read the recipe: No such file"),
        (b"a = ", "not valid TOML"),
        (b"a = 1\na = 2\n", "not valid TOML"),
        (b"\xff\xfe", "not UTF-8 text"),
        (b"a = " + b"[" * 100_000, "nested too deeply"),
        (b"#" * ((1 << 20) + 1), "at most"),
        (b"base = 3\n", "base must be the path of one recipe"),
        (b'base = "missing.toml"\n', "missing.toml: cannot read"),
        (b'base = "twice.toml"\n', "may inherit from one that does not"),
    ],
)
def test_an_unusable_file_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "r.toml"
    (tmp_path / "twice.toml").write_text('base = "third.toml"\n')
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RecipeError, match=message) as caught:
        read_tree(path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("7", 7),
        ("true", True),
        ("['kda', 'mla']", ["kda", "mla"]),
        ('"quoted"', "quoted"),
        ("plain words", "plain words"),
        ("a=b", "a=b"),
        ("", ""),
        ("1\nother = 2", "1\nother = 2"),
        ("{x = 1}", {"x": 1}),
    ],
)
def test_the_right_side_of_an_override_is_toml_or_text(text, value):
    assert parse_overrides([f"a.b={text}"]) == {"a": {"b": value}}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["novalue"], r"must look like section\.key=value"),
        (["=3"], "must look like"),
        (["a..b=3"], "must look like"),
        (["a=1", "a=2"], "given twice"),
        (["a=1", "a.b=2"], "was given a value"),
    ],
)
def test_a_malformed_override_is_refused(overrides, message):
    with pytest.raises(RecipeError, match=message):
        parse_overrides(overrides)


PRESETS = {"model": {"small": {"width": 16, "kda": {"heads": 2, "dim": 4}}}}


def test_a_preset_is_laid_under_the_tables_own_keys():
    tree = {"name": "x", "model": {"preset": "small", "kda": {"dim": 8}}}
    assert expand_presets(tree, PRESETS)["model"] == {"width": 16, "kda": {"heads": 2, "dim": 8}}
    assert tree["model"]["preset"] == "small"


@pytest.mark.parametrize("tree", [{}, {"model": {"width": 3}}, {"model": 3}, {"other": {"preset": "small"}}])
def test_a_table_without_a_preset_is_left_alone(tree):
    assert expand_presets(tree, PRESETS) == tree


def test_an_unknown_preset_is_refused_with_a_guess():
    with pytest.raises(RecipeError, match=r"model\.preset must be one of small; got 'smal' \(did you mean small\?\)"):
        expand_presets({"model": {"preset": "smal"}}, PRESETS)


TREES = st.recursive(
    st.integers() | st.text() | st.lists(st.integers()),
    lambda inner: st.dictionaries(st.text("abc", min_size=1), inner, max_size=3),
    max_leaves=8,
).filter(lambda tree: isinstance(tree, dict))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(TREES, TREES)
def test_merging_keeps_every_leaf_of_the_upper_tree(lower, upper):
    merged = dict(flatten(merge(lower, upper)))
    assert all(merged[key] == value for key, value in flatten(upper) if value != {})


@settings(max_examples=25, deadline=None, derandomize=True)
@given(TREES)
def test_a_tree_does_not_differ_from_itself(tree):
    assert differences(tree, tree) == []
    assert merge(tree, tree) == tree


def test_differences_name_the_keys_on_both_sides():
    old, new = {"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 4}, "e": {}}
    assert differences(old, new) == [("a.c", 2, 4), ("d", 3, None), ("e", None, {})]


def test_none_is_left_out_and_tuples_become_lists(tmp_path):
    assert without_none({"a": None, "b": (1, (2,)), "c": {"d": None}, "e": tmp_path}) == {
        "b": [1, [2]],
        "c": {},
        "e": str(tmp_path),
    }


def test_a_table_of_another_kind_replaces_the_one_below() -> None:
    lower = {"task": {"kind": "palindrome", "length": 9}}
    assert merge(lower, {"task": {"kind": "mqar", "num_pairs": 2}}) == {"task": {"kind": "mqar", "num_pairs": 2}}
    assert merge(lower, {"task": {"kind": "palindrome", "num_symbols": 4}})["task"]["length"] == 9
