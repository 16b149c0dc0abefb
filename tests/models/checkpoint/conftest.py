"""Models of every family, and directories of them that a test may damage."""

import pytest

from perilune.models import save
from tests.models.checkpoint.tiny import CONFIGS, tiny_model


@pytest.fixture(scope="module")
def models():
    return {name: tiny_model(config) for name, config in CONFIGS.items()}


@pytest.fixture
def written(models, tmp_path):
    """Write a model as one file; returns its directory and a function that edits its tensors."""

    def write(name, **options):
        path = tmp_path / name
        save(models[name], path, **options)
        return path

    return write
