"""Every block of code in the README runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^## (.+?)$|^```(\w+)\n(.*?)^```", README, re.M | re.S)


def code_blocks():
    heading = ""
    for title, language, code in BLOCKS:
        if title:
            heading = title
            continue
        marks = [pytest.mark.real_model] if "smollm2" in code else []
        yield pytest.param(language, code, id=f"{heading}-{language}", marks=marks)


def test_there_are_blocks_of_both_kinds():
    languages = [block.values[0] for block in code_blocks()]
    assert languages.count("python") >= 4
    assert languages.count("shell") == 2


@pytest.mark.jax_only
@pytest.mark.parametrize(
    "language, code",
    [block for block in code_blocks() if block.values[0] == "python"],
)
def test_python_block_runs(language, code, tmp_path):
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


@pytest.mark.real_model
def test_shell_commands_run(smollm2_path):
    """What follows the installation, in the environment that is there."""
    first, second = (code for _, language, code in BLOCKS if language == "shell")
    install, run = first.strip().split(" && ")
    assert install == "pip install ."
    assert second.strip() == 'pip install -e ".[test]" && pytest -n 2 --dist loadfile'
    command = re.sub("^python", sys.executable, run)
    result = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "light" in result.stdout
    assert "tokens/s" in result.stderr


def test_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\((.+?)\)", README) if "://" not in link]
    assert links
    assert all((ROOT / link).exists() for link in links)
