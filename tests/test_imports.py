"""What importing the package brings along."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest

import keras_kvcache

OPTIONAL = (
    "tensorflow",
    "keras_hub",
    "torch",
    "tokenizers",
    "gguf",
    "jinja2",
    "safetensors",
)


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


def test_importing_the_package_alone_imports_neither_keras_nor_jax():
    code = """
import sys
import keras_kvcache
assert not {"keras", "jax", "numpy"} & set(sys.modules)
assert {*keras_kvcache.__all__, "loaders", "attention"} <= set(dir(keras_kvcache))
assert keras_kvcache.caches.CacheSpec and "jax" in sys.modules
assert all(getattr(keras_kvcache, name) for name in keras_kvcache.__all__)
try:
    keras_kvcache.nothing
except AttributeError as error:
    assert "nothing" in str(error)
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "imports",
    [
        "import keras_kvcache, keras",
        "import keras, keras_kvcache",
        "from keras_kvcache.caches import CacheSpec; import keras",
        "import importlib.util, keras_kvcache; importlib.util.find_spec('keras')\n"
        "import keras",
    ],
)
def test_keras_finds_the_classes_of_a_file(tmp_path, imports):
    """Nothing of the models or layers is named by the program that loads it."""
    lm = keras_kvcache.DecoderLM(7, 1, 2, 8, 5)
    lm(np.array([[1, 2]]))
    lm.save(tmp_path / "lm.keras")
    code = f"""
{imports}
lm = keras.saving.load_model({str(tmp_path / "lm.keras")!r})
assert type(lm).__name__ == "DecoderLM"
"""
    result = run_python(code, KERAS_BACKEND=keras.backend.backend())
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
