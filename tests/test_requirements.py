"""What pip is told that the package needs."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
OLDEST = ROOT / ".ci" / "oldest.txt"
# Each brings the other of its own version.
PAIRS = {"jaxlib": "jax"}


def lower_bounds():
    """By name, of what users install: the versions that are still allowed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    required = [*project["dependencies"], *extras["hub"], *extras["test"]]
    for requirement in map(Requirement, required):
        for bound in requirement.specifier:
            if bound.operator == ">=":
                yield requirement.name, bound.version


def test_lower_bounds_are_those_that_are_tested():
    if not OLDEST.exists():
        pytest.skip("only a clone of the repository has the versions to test")
    lines = OLDEST.read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    bounds = dict(lower_bounds())
    for name, version in pins.items():
        bound = bounds[PAIRS.get(name, name)]
        # 3.15 is also 3.15.0.
        assert version in (bound, bound + ".0"), name
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {Requirement(text).name for text in project["dependencies"]}
    assert needed <= pins.keys()
