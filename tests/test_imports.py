"""What importing the package brings along, and which way its imports go."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import keras_kvcache

PACKAGE = Path(keras_kvcache.__file__).parent
OPTIONAL = ("tensorflow", "keras_hub", "torch", "tokenizers", "gguf", "jinja2")

# A module may import from floors below its own, and from its own folder.
FLOORS = {
    "ops": 0,
    "caches": 1,
    "samplers": 1,
    "layers": 2,
    "generation": 3,
    "loaders": 3,
    "models": 4,
    "commands": 5,
    "cli": 6,
    "__main__": 7,
    "__init__": 7,
}


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_import_brings_no_heavy_package():
    code = f"""
import os
os.environ.pop("KERAS_BACKEND", None)
import keras_kvcache, keras, sys
assert keras.backend.backend() == "jax"
loaded = [name for name in {OPTIONAL} if name in sys.modules]
assert not loaded, loaded
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_import_works_without_the_optional_packages():
    code = f"""
import sys
for name in (*{OPTIONAL}, "matplotlib", "tqdm"):
    sys.modules[name] = None  # what makes an import fail
import keras_kvcache
lm = keras_kvcache.DecoderLM(7, 1, 1, 4, 5)
assert len(lm.generate([1, 2], max_new_tokens=3)) == 5
"""
    result = run_python(code, KERAS_BACKEND="jax")
    assert result.returncode == 0, result.stderr


def test_matplotlib_is_loaded_by_keras_alone():
    code = """
import keras, sys
before = "matplotlib" in sys.modules
import keras_kvcache
assert ("matplotlib" in sys.modules) == before
"""
    result = run_python(code, KERAS_BACKEND="jax")
    assert result.returncode == 0, result.stderr


def test_a_backend_that_was_chosen_is_kept():
    code = "import keras_kvcache, keras; print(keras.backend.backend())"
    assert run_python(code, KERAS_BACKEND="tensorflow").stdout.strip() == "tensorflow"


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
    assert upward == ["cli.py imports __init__"]  # its version number


def test_files_stay_short():
    lines = {path: len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert max(lines.values()) <= 400, max(lines, key=lines.get)
