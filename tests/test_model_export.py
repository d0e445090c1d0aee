"""Exported models, run by TensorFlow alone."""

import subprocess
import sys

import keras
import numpy as np
import pytest
from conftest import make_lm, skip_if_too_new
from keras import ops

from keras_kvcache import EncoderDecoderLM

pytest.importorskip("tensorflow")
pytestmark = pytest.mark.skipif(
    keras.backend.backend() == "torch", reason="Keras exports to other formats there"
)

IDS = np.random.default_rng(3).integers(0, 101, (3, 17)).astype("int32")
# In a process of its own, which does without this package.
PROGRAM = """
import sys
import numpy as np
import tensorflow as tf

folder, inputs, outputs = sys.argv[1:]
model = tf.saved_model.load(folder)
inputs = dict(np.load(inputs))
inputs = {name: tf.constant(array) for name, array in inputs.items()}
only = inputs.get("token_ids")
np.save(outputs, model.serve(inputs if only is None else only).numpy())
assert "keras_kvcache" not in sys.modules
"""


def run_alone(folder, inputs):
    np.savez(folder / "inputs.npz", **inputs)
    paths = [folder / "model", folder / "inputs.npz", folder / "outputs.npy"]
    command = [sys.executable, "-c", PROGRAM, *map(str, paths)]
    run = subprocess.run(command, capture_output=True, text=True)
    skip_if_too_new(run.stderr)
    assert run.returncode == 0, run.stderr
    return np.load(folder / "outputs.npy")


@pytest.mark.parametrize("is_called", [False, True])
@pytest.mark.parametrize(
    "options", [{}, dict(position_embedding="learned", sliding_window=5)]
)
def test_exported_logits(tmp_path, options, is_called):
    lm = make_lm(num_layers=2, **options)
    if is_called:
        lm(IDS[:2, :5])
        lm.generate([5, 7], max_new_tokens=2)
    lm.export(tmp_path / "model", format="tf_saved_model", verbose=False)
    logits = run_alone(tmp_path, {"token_ids": IDS})
    np.testing.assert_allclose(logits, ops.convert_to_numpy(lm(IDS)), atol=1e-4)


def test_an_exported_encoder_decoder(tmp_path):
    ids = keras.Input((None,), dtype="int32", name="encoder_token_ids")
    embedded = keras.layers.Embedding(101, 14)(ids)
    encoder = keras.Model({"encoder_token_ids": ids}, embedded)
    lm = EncoderDecoderLM(encoder, 101, 1, 2, 14, 13, max_sequence_length=29)
    lm.export(tmp_path / "model", format="tf_saved_model", verbose=False)
    inputs = {"encoder_token_ids": IDS[:, :11], "decoder_token_ids": IDS[:, 11:]}
    logits = run_alone(tmp_path, inputs)
    np.testing.assert_allclose(logits, ops.convert_to_numpy(lm(inputs)), atol=1e-4)
