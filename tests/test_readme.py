"""The README and the guides: their code runs, their links lead somewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
GUIDES = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, *GUIDES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
TEXTS = {path: path.read_text(encoding="utf-8") for path in PAGES}

MOST_LINES = 200
# `shell` is what the tests run, `console` what a reader may type.
LANGUAGES = {"python", "shell", "console", "text"}
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
LINK = re.compile(r"\]\(([^)]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.M)

each_page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)


def blocks(path, language):
    return [block for block in BLOCK.finditer(TEXTS[path]) if block[1] == language]


def program(path, chosen):
    """Some blocks of a page, at the lines that they have there, so that errors tell."""
    lines = ""
    for block in chosen:
        before = TEXTS[path].count("\n", 0, block.start(2))
        lines += "\n" * (before - lines.count("\n")) + block[2]
    return lines


def programs():
    """A block of the README runs alone, as it may be copied alone.

    Those of a guide run one after the other, as they are read, and share a model.
    """
    for path in (README, *GUIDES):
        found = blocks(path, "python")
        groups = [[block] for block in found] if path == README else [found]
        for group in filter(None, groups):
            code = program(path, group)
            line = len(code) - len(code.lstrip("\n")) + 1
            marks = [pytest.mark.real_model] * ("smollm2" in code)
            marks += [pytest.mark.slow] * (path != README)
            yield pytest.param(code, id=f"{path.name}:{line}", marks=marks)


def test_the_readme_is_short_and_has_blocks_of_both_kinds():
    assert len(TEXTS[README].splitlines()) <= MOST_LINES
    assert len(blocks(README, "python")) >= 4
    assert len(blocks(README, "shell")) == 2 and all(commands())


@each_page
def test_every_block_has_a_language_that_is_known(path):
    fences = re.findall("^```", TEXTS[path], re.M)
    languages = [block[1] for block in BLOCK.finditer(TEXTS[path])]
    assert len(fences) == 2 * len(languages)
    assert set(languages) <= LANGUAGES
    assert path == README or "shell" not in languages


@pytest.mark.jax_only
@pytest.mark.parametrize("code", list(programs()))
def test_python_runs(code, tmp_path):
    environment = {
        name: value for name, value in os.environ.items() if name != "KERAS_BACKEND"
    }
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


def commands():
    """Of the first: what installs, and what runs then."""
    first, second = (block[2] for block in blocks(README, "shell"))
    install, run = first.strip().split(" && ")
    # These two are run by whoever tests a clean checkout.
    assert re.fullmatch(r"pip install \S+", install)
    assert re.match(r'pip install -e "\.\[test\]" && pytest\b', second)
    return install, run


@pytest.mark.slow
@pytest.mark.real_model
def test_the_first_command_runs(smollm2_path):
    """What follows the installation, in the environment that is there."""
    _, run = commands()
    command = re.sub("^python", sys.executable, run)
    result = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.split()) > 3
    assert "tokens/s" in result.stderr


def anchor(heading):
    """How a link names a heading: in lower case, without punctuation."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def targets(path):
    """Pairs of a file and a heading's name, maybe empty, of links that aren't URLs."""
    for link in LINK.findall(TEXTS[path]):
        if "://" not in link:
            name, _, heading = link.partition("#")
            yield (path.parent / name).resolve() if name else path, heading


@each_page
def test_links_lead_somewhere(path):
    for target, heading in targets(path):
        assert target.exists(), target
        assert target.is_relative_to(ROOT)
        if heading:
            assert heading in map(anchor, HEADING.findall(TEXTS[target])), heading


# By its path in the repository, or in one of these folders.
FILE = re.compile(r"`([\w./]+\.(?:py|cc|ipynb))`")
FOLDERS = ("", "keras_kvcache", "benchmarks")


@each_page
def test_files_that_are_named_are_there(path):
    for name in FILE.findall(TEXTS[path]):
        assert any((ROOT / folder / name).exists() for folder in FOLDERS), name


def test_the_readme_leads_to_every_page():
    assert {target for target, _ in targets(README)} >= set(PAGES) - {README}
