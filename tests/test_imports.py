"""What importing the package brings along."""

import os
import subprocess
import sys

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
