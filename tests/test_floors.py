"""Which way the package's imports go, and how long its files are."""

import ast
import graphlib
from pathlib import Path

import pytest

import keras_kvcache

PACKAGE = Path(keras_kvcache.__file__).parent

# A module may import from floors below its own, and from its own folder. Generation
# and loaders lie below the models: they know none, and a model offers both. All
# of these ask the families.
FLOORS = {
    "errors": -2,
    "known_names": -2,
    "registration": -2,
    "runtime": -1,
    "attention": 0,
    "tokenizers": 0,
    "caches": 1,
    "samplers": 1,
    "families": 2,
    "layers": 2,
    "generation": 3,
    "loaders": 3,
    "models": 4,
    "hub": 5,
    "cli": 6,
    "__main__": 7,
    "__init__": 7,
}


def imports_of(path):
    """The names under `keras_kvcache` that a module imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "keras_kvcache":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            if node.module.startswith("keras_kvcache."):
                yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("keras_kvcache."):
                    yield alias.name.split(".")[1]


def test_imports_go_downward_only():
    upward = []
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        home = parts[0]
        for name in imports_of(path):
            if name not in FLOORS:
                name = "__init__"
            if name != home and FLOORS[name] >= FLOORS[home]:
                upward.append(f"{path.name} imports {name}")
    assert upward == ["arguments.py imports __init__"]  # its version number


def imported_files(folder):
    """For each file of a package which of the others it imports, wherever in it.

    That a folder's `__init__` runs before its files doesn't count.
    """
    modules = {}
    for path in folder.rglob("*.py"):
        parts = path.relative_to(folder.parent).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    graph = {}
    for name, path in modules.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    found.add(whole if whole in modules else node.module)
            elif isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
        graph[name] = found & modules.keys()
    return graph


def test_no_files_import_each_other_in_a_circle():
    graph = imported_files(PACKAGE)
    assert "keras_kvcache.attention" in graph["keras_kvcache.models.decoder_lm"]
    graphlib.TopologicalSorter(graph).prepare()


def test_a_circle_would_be_found(tmp_path):
    """Also one within a folder, closed by an import within a function."""
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("from package.a import one")
    (package / "a.py").write_text("from package.b import two")
    (package / "b.py").write_text("two = 2")
    graphlib.TopologicalSorter(imported_files(package)).prepare()
    (package / "b.py").write_text("def f():\n    from package import a")
    with pytest.raises(graphlib.CycleError, match="package.a"):
        graphlib.TopologicalSorter(imported_files(package)).prepare()


def test_docstrings_begin_with_what_a_thing_is_or_does():
    paraphrases = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                text = ast.get_docstring(node) or ""
                if text.startswith(("What ", "See ")):
                    paraphrases.append(f"{path.name}: {text.splitlines()[0]}")
    assert not paraphrases


# Folders whose public signatures are annotated, and files beside them.
ANNOTATED = (
    "attention",
    "caches",
    "cli",
    "errors",
    "families",
    "generation",
    "hub",
    "known_names",
    "layers",
    "loaders",
    "models",
    "registration",
    "runtime",
    "samplers",
    "tokenizers",
)
# Methods that override Keras' own, which has their signatures.
OF_KERAS = {"build", "call", "compute_output_shape", "compute_output_spec"}
OF_KERAS |= {"from_config", "get_build_config", "get_config"}


def public_functions(tree):
    """A module's functions and the methods of its classes, without names of `_`.

    Triples of a name, the node and its arguments but for `self`.
    """
    for node in tree.body:
        inner = node.body if isinstance(node, ast.ClassDef) else [node]
        owner = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        for function in inner:
            is_function = isinstance(function, ast.FunctionDef)
            if is_function and not owner.startswith("_") and function.name[0] != "_":
                arguments = function.args
                decorators = map(ast.unparse, function.decorator_list)
                is_method = owner and "staticmethod" not in decorators
                given = [*arguments.posonlyargs, *arguments.args][bool(is_method) :]
                given += [*arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
                yield f"{owner}{function.name}", function, list(filter(None, given))


def unannotated(source):
    """Names of public functions of which a parameter or the result has no type."""
    return [
        name
        for name, function, arguments in public_functions(ast.parse(source))
        if function.name not in OF_KERAS
        and not (function.returns and all(each.annotation for each in arguments))
    ]


def test_public_signatures_are_annotated():
    found = []
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] in ANNOTATED:
            found += [f"{path.name}: {name}" for name in unannotated(path.read_text())]
    assert not found


def test_a_missing_annotation_would_be_found():
    source = """
def whole(a: int, *b: int, c: int = 3) -> int: ...
def no_result(a: int): ...
def no_parameter(a: int, *, c=3) -> int: ...
def _private(a): ...
class Public:
    def call(self, inputs): ...
    def method(self, a: int) -> int: ...
    def no_star(self, *a) -> int: ...
    @staticmethod
    def static(a) -> int: ...
class _Private:
    def method(self, a): ...
"""
    expected = ["no_result", "no_parameter", "Public.no_star", "Public.static"]
    assert unannotated(source) == expected


def test_files_stay_short():
    lines = {
        path: len(path.read_text(encoding="utf-8").splitlines())
        for path in PACKAGE.rglob("*")
        if path.suffix in (".py", ".cc", ".h")
    }
    assert {path.suffix for path in lines} == {".py", ".cc", ".h"}
    assert max(lines.values()) <= 400, max(lines, key=lines.get)
