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
from pathlib import Path
import numpy as np
import tensorflow as tf

for folder in map(Path, sys.argv[1:]):
    model = tf.saved_model.load(folder / "model")
    inputs = dict(np.load(folder / "inputs.npz"))
    inputs = {name: tf.constant(array) for name, array in inputs.items()}
    only = inputs.get("token_ids")
    outputs = model.serve(inputs if only is None else only).numpy()
    np.save(folder / "outputs.npy", outputs)
assert "keras_kvcache" not in sys.modules
"""


def plain():
    return make_lm(num_layers=2), {"token_ids": IDS}


def windowed():
    lm = make_lm(num_layers=2, position_embedding="learned", sliding_window=5)
    return lm, {"token_ids": IDS}


def encoder_decoder():
    ids = keras.Input((None,), dtype="int32", name="encoder_token_ids")
    embedded = keras.layers.Embedding(101, 14)(ids)
    encoder = keras.Model({"encoder_token_ids": ids}, embedded)
    lm = EncoderDecoderLM(encoder, 101, 1, 2, 14, 13, max_sequence_length=29)
    return lm, {"encoder_token_ids": IDS[:, :11], "decoder_token_ids": IDS[:, 11:]}


MODELS = [plain, windowed, encoder_decoder]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """Outputs of the exported models, and of the models themselves.

    A dictionary by model and whether it was called before its export. One process runs
    all, as starting TensorFlow takes longer than anything else here.
    """
    folders, expected = {}, {}
    for make in MODELS:
        lm, inputs = make()
        for is_called in (False, True):
            if is_called:
                expected[make] = lm(inputs["token_ids"] if len(inputs) == 1 else inputs)
                if make is not encoder_decoder:
                    lm.generate([5, 7], max_new_tokens=2)
            folder = tmp_path_factory.mktemp(make.__name__)
            lm.export(folder / "model", format="tf_saved_model", verbose=False)
            np.savez(folder / "inputs.npz", **inputs)
            folders[make, is_called] = folder
    command = [sys.executable, "-c", PROGRAM, *map(str, folders.values())]
    run = subprocess.run(command, capture_output=True, text=True)
    skip_if_too_new(run.stderr)
    assert run.returncode == 0, run.stderr
    return {
        (make, is_called): (np.load(folder / "outputs.npy"), expected[make])
        for (make, is_called), folder in folders.items()
    }


@pytest.mark.parametrize("is_called", [False, True])
@pytest.mark.parametrize("make", MODELS)
def test_exported_logits(make, is_called, outputs):
    exported, own = outputs[make, is_called]
    np.testing.assert_allclose(exported, ops.convert_to_numpy(own), atol=1e-4)
