"""The other backends give the tokens that JAX gives.

Keras has one backend a process, so each of the others gets its own.
"""

import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import MODELS, shared_lm
from keras import ops

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [5, 3], [5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6]]

SCRIPT = """
import json, sys
import keras, numpy as np
import keras_kvcache
folder, prompts = sys.argv[1], json.loads(sys.argv[2])
lm = keras_kvcache.DecoderLM.from_preset(folder)
logits = keras.ops.convert_to_numpy(lm(np.array(prompts[:1])))
answer = {
    "backend": keras.backend.backend(),
    "logits": logits.tolist(),
    "rows": lm.generate(prompts, max_new_tokens=24),
    "streamed": list(lm.stream(prompts[0], max_new_tokens=6)),
    "sampled": lm.generate(prompts[0], max_new_tokens=9, sampler="top_p", seed=3),
}
print(json.dumps(answer))
"""


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    lm = shared_lm(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    lm.save_to_preset(folder)
    return lm, str(folder)


@pytest.mark.slow
@pytest.mark.jax_only
@pytest.mark.parametrize("backend", ["tensorflow", "torch"])
def test_equal_tokens(model, backend):
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} isn't installed")
    lm, folder = model
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, folder, json.dumps(PROMPTS)],
        env={**os.environ, "KERAS_BACKEND": backend},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    theirs = json.loads(result.stdout)
    assert theirs["backend"] == backend
    ours = ops.convert_to_numpy(lm(np.array(PROMPTS[:1])))
    np.testing.assert_allclose(theirs["logits"], ours, atol=1e-4)
    rows = lm.generate(PROMPTS, max_new_tokens=24)
    assert theirs["rows"] == rows
    assert [ids[0] for ids in theirs["streamed"]] == rows[0][8:14]
    assert theirs["sampled"] == lm.generate(
        PROMPTS[0], max_new_tokens=9, sampler="top_p", seed=3
    )
