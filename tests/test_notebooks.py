"""The notebooks keep their form, and they run."""

import ast
import importlib.util
import os
import re
import sys
import tomllib
from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NEED_REAL_MODEL = {"inside_the_cache", "quickstart"}

MOST_CELLS = 25
MOST_BYTES = 400_000
INSTALLS = "    %pip install -q {packages}"
# They come with the package, which needs them itself.
NEEDED_BY_PACKAGE = {"jax", "keras", "numpy"}
# How a path begins that only one machine has; parts of a URL are none.
MACHINE_PATH = re.compile(
    r"(?<![\w.:/-])/(?:root|home|Users|tmp|work|mnt|opt|usr|var|etc|private|content)/"
    r"|\b[A-Za-z]:\\"
    r"|file://"
)

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook):
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def texts(notebook):
    """All that a reader sees as text: sources and outputs."""
    yield from (cell.source for cell in notebook.cells)
    for output in outputs(notebook):
        yield output.get("text", "")
        for kind, content in output.get("data", {}).items():
            if not kind.startswith("image/"):
                yield str(content)


def test_there_are_notebooks():
    assert {path.stem for path in NOTEBOOKS} >= NEED_REAL_MODEL


@each_notebook
def test_is_short_and_small(path):
    assert len(read(path).cells) <= MOST_CELLS
    assert path.stat().st_size <= MOST_BYTES


def install_cell(path):
    return code_cells(read(path))[0].source


def imports(notebook):
    """Top-level names of what is imported anywhere."""
    for cell in code_cells(notebook):
        source = re.sub(r"^\s+%.*$", "    pass", cell.source, flags=re.MULTILINE)
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                yield from (alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield node.module.split(".")[0]


def run_install_cell(path, monkeypatch, absent):
    """What its install cell gives pip where some packages are absent."""
    found = importlib.util.find_spec

    def find(name, *arguments):
        return None if name in absent else found("json", *arguments)

    installed = []
    source = install_cell(path)
    assert source.count(INSTALLS) == 1
    source = source.replace(INSTALLS, "    installed.append(packages)")
    monkeypatch.setenv("KERAS_BACKEND", "tensorflow")
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", find)
        exec(source, {"installed": installed})
    assert os.environ["KERAS_BACKEND"] == "jax"
    return installed


@each_notebook
def test_first_code_cell_chooses_the_backend_and_installs(path):
    first, *others = (cell.source for cell in code_cells(read(path)))
    assert not re.search(r"^\s*(import|from) (keras|jax)", first, re.MULTILINE)
    assert not any("pip install" in source for source in others)


@each_notebook
def test_no_address_is_named_that_nobody_has(path):
    """The package is on no index, and no repository of it is public."""
    assert not any(re.search(r"git\+|github\.", text) for text in texts(read(path)))


@each_notebook
def test_all_that_is_imported_is_installed(path, monkeypatch):
    needed = set(imports(read(path))) - sys.stdlib_module_names - NEEDED_BY_PACKAGE
    assert needed >= {"keras_kvcache", "matplotlib"}
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = extras["optional-dependencies"]
    bounds = {
        re.match(r"[\w-]+", package)[0].replace("-", "_"): package
        for package in (*extras["hub"], *extras["notebooks"])
    }
    monkeypatch.chdir(ROOT / "notebooks")
    assert run_install_cell(path, monkeypatch, absent=set()) == []
    for name in needed - {"keras_kvcache"}:
        # Also where the package is there already.
        installed = run_install_cell(path, monkeypatch, absent={name})
        assert installed == [f'"{bounds[name]}"']
    (installed,) = run_install_cell(path, monkeypatch, absent=needed)
    others = [f'"{bounds[name]}"' for name in sorted(needed - {"keras_kvcache"})]
    assert installed.split(" ") == [f'"{ROOT}"', *others]


@each_notebook
def test_the_package_comes_from_the_clone_around_or_beside(path, monkeypatch, tmp_path):
    absent = {"keras_kvcache"}
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="`notebooks` of a clone.*beside it"):
        run_install_cell(path, monkeypatch, absent)
    package = tmp_path / "keras-kvcache" / "keras_kvcache"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    assert run_install_cell(path, monkeypatch, absent) == [f'"{package.parent}"']


@each_notebook
def test_was_saved_after_one_clean_run(path):
    notebook = read(path)
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))
    assert outputs(notebook), "its outputs must be kept"
    for output in outputs(notebook):
        assert output.output_type != "error"
        assert output.get("name") != "stderr", output.text
        # What moves the cursor, such as a progress bar, is junk when saved.
        assert not re.search(r"[\r\x08\x1b]", output.get("text", ""))


@each_notebook
def test_keeps_its_figures_as_pictures(path):
    for cell in code_cells(read(path)):
        if "plt.show()" in cell.source:
            kinds = [kind for output in cell.outputs for kind in output.get("data", {})]
            assert "image/png" in kinds


@each_notebook
def test_names_no_path_of_a_machine(path):
    for text in texts(read(path)):
        assert not MACHINE_PATH.search(text)


@pytest.mark.parametrize(
    "text", ["saved to /home/me/x", "'/tmp/x'", r"C:\x", "file:///x"]
)
def test_machine_paths_are_found(text):
    assert MACHINE_PATH.search(text)


@pytest.mark.parametrize("text", ["https://a.org/home/x", "a/b", "B·K/2", "work/x"])
def test_other_slashes_are_no_machine_paths(text):
    assert not MACHINE_PATH.search(text)


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(
            path,
            id=path.stem,
            marks=pytest.mark.real_model if path.stem in NEED_REAL_MODEL else (),
        )
        for path in NOTEBOOKS
    ],
)
def test_runs(path, request, tmp_path, monkeypatch):
    """In a fresh kernel of this Python, with this checkout of the package."""
    if path.stem in NEED_REAL_MODEL:
        request.getfixturevalue("smollm2_path")
    search_path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(search_path))
    # Neither a kernel nor start-up files of the user who runs the tests.
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    # The notebook chooses its backend itself.
    monkeypatch.setenv("KERAS_BACKEND", "tensorflow")

    notebook = read(path)
    same_python = f"import sys\nassert sys.executable == {sys.executable!r}"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(same_python))
    folder = tmp_path / "folder"
    folder.mkdir()
    nbclient.NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=600,
        resources={"metadata": {"path": str(folder)}},
    ).execute()
    assert not any(folder.iterdir()), "a notebook must leave nothing behind"
