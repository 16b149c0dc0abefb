import pytest

from perilune.errors import RecipeError
from perilune.run.schema import explain
from tests.run.local_recipe import LocalRecipe


def names(path):
    return [doc.name for doc in explain(LocalRecipe, path)]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("", ["name", "seed", "data", "model", "tasks", "stages", "sweep"]),
        ("model", ["width", "depth"]),
        ("stages.reward", ["kind", "start_from", "mode", "optim"]),
        ("stages.teach.optim", ["lr", "momentum", "betas"]),
        ("stages.anything.optim", ["lr", "momentum", "betas"]),
        ("stages.teach.steps", ["steps"]),
        ("stages.teach.source", ["kind", "shelf", "minutes"]),
    ],
)
def test_a_path_leads_to_its_keys(path, expected):
    assert list(dict.fromkeys(names(path))) == expected


def test_a_key_is_documented_with_type_default_and_text():
    docs = {doc.name: doc for doc in explain(LocalRecipe, "stages.teach")}
    assert docs["steps"].default is None
    assert (docs["steps"].type, docs["steps"].text) == ("int", "Optimizer steps.")
    assert docs["start_from"].type == "text or absent"
    assert docs["start_from"].default == "absent"
    assert docs["optim"].default == "its own defaults"
    assert docs["source"].type == 'table (kind = "books") or table (kind = "films")'
    momentum = explain(LocalRecipe, "stages.teach.optim.momentum")[0]
    assert momentum.text == "Momentum,\nin [0, 1)."
    assert explain(LocalRecipe, "stages.reward.mode")[0].type == '"mean" or "log_z"'
    assert explain(LocalRecipe, "stages.teach.optim.betas")[0].type == "list of float"


@pytest.mark.parametrize(
    ("path", "message"), [("modle", "did you mean model"), ("model.widht", "model has no key 'widht'")]
)
def test_a_path_that_leads_nowhere_is_refused(path, message):
    with pytest.raises(RecipeError, match=message):
        explain(LocalRecipe, path)
