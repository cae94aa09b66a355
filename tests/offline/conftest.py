"""A stand-in Hub with tiny repositories, and a bundle that was filled from it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import recipe_parts
from hub_stand_in import StandInHub


@pytest.fixture(scope="session")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return recipe_parts.write_repositories(tmp_path_factory.mktemp("repositories"))


@pytest.fixture
def hub(repositories: dict[str, Path]) -> Iterator[StandInHub]:
    """The Hub, which this process asks while the test runs."""
    with StandInHub() as stand_in, recipe_parts.turned_to(stand_in.endpoint):
        recipe_parts.serve(stand_in, repositories)
        yield stand_in


@pytest.fixture(scope="session")
def filled(repositories: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the recipe, and `bundle` with what it needs and a pipeline; not to be changed."""
    folder = tmp_path_factory.mktemp("filled")
    recipe = recipe_parts.generator_recipe(folder)
    with StandInHub() as stand_in, recipe_parts.turned_to(stand_in.endpoint):
        recipe_parts.serve(stand_in, repositories)
        for name in (str(recipe), recipe_parts.PIPELINE, recipe_parts.DINO):
            recipe_parts.run_command(name, "--to", str(folder / "bundle"))
    return folder


@pytest.fixture
def bundle(filled: Path, tmp_path: Path) -> Path:
    """A copy of the bundle at another place."""
    return Path(shutil.copytree(filled / "bundle", tmp_path / "bundle", symlinks=False))
