"""What a package index shows of the package."""

import email
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import tomllib
import types
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path.name for path in ROOT.glob("*.md")}
PAGES |= {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")}
TARGET = re.compile(r"\]\(([^)]*)\)")


def is_address(target):
    return target.startswith("https://")


@pytest.fixture
def description(monkeypatch):
    """What setup.py gives, without setuptools, which may not be there."""
    given = {}
    fake = types.SimpleNamespace(setup=given.update)
    monkeypatch.setitem(sys.modules, "setuptools", fake)
    runpy.run_path(str(ROOT / "setup.py"))
    assert given.pop("long_description_content_type") == "text/markdown"
    return given.pop("long_description")


def test_links_hold_where_there_is_no_repository(description):
    kept = [target for target in TARGET.findall(README) if is_address(target)]
    assert len(kept) < len(TARGET.findall(README)), "the README has links to files"
    assert TARGET.findall(description) == kept
    assert "![" not in description


def test_what_was_linked_is_named(description):
    for target in TARGET.findall(README):
        if not is_address(target) and not target.endswith(".png"):
            assert f"`{target}`" in description


def test_the_rest_of_the_readme_is_as_it_was(description):
    def prose(text):
        text = re.sub(r"!?\[[^\]]*\]\([^)]*\)|`[^`\n]+`", "", text)
        return text.split()

    assert prose(description) == prose(README)
    code = re.findall(r"^```.*?^```", README, re.M | re.S)
    assert re.findall(r"^```.*?^```", description, re.M | re.S) == code


def test_no_address_is_made_up():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "urls" not in project


def build(folder, call):
    """What a function of setuptools gives, called in a folder with little to build."""
    try:
        version = metadata.version("setuptools")
    except metadata.PackageNotFoundError:
        version = "0"
    if int(version.split(".")[0]) < 77:
        pytest.skip("builds need setuptools 77")
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE", *PAGES):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / "keras_kvcache").mkdir()
    (folder / "keras_kvcache" / "__init__.py").touch()
    (folder / "built").mkdir()
    code = f"from setuptools import build_meta; build_meta.{call}('built')"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_a_build_has_it(description, tmp_path):
    build(tmp_path, "prepare_metadata_for_build_wheel")
    (path,) = (tmp_path / "built").glob("*.dist-info/METADATA")
    made = email.message_from_string(path.read_text(encoding="utf-8"))
    assert made["Description-Content-Type"] == "text/markdown"
    assert made.get_payload().strip() == description.strip()
    assert made["Requires-Python"] == ">=3.11" and not made.get_all("Project-URL")


def test_the_source_distribution_has_every_page(tmp_path):
    build(tmp_path, "build_sdist")
    (path,) = (tmp_path / "built").glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= PAGES
