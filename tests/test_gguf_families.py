"""GGUF files of each architecture, against transformers' own reading of them."""

import keras
import numpy as np
import pytest
from family_cases import collect
from gguf_files import metadata, random_tensors, write

from keras_kvcache import DecoderLM

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from transformers import modeling_gguf_pytorch_utils  # noqa: E402

SIZES = {"D": 84, "N": 6, "K": 2, "H": 14, "F": 59, "L": 2, "V": 29}
# transformers reads no size of heads: it's D / N, or the default of its config.
HEAD_SIZES = {"qwen3": 128}


def write_case(path, architecture, tied):
    sizes = {**SIZES, "H": HEAD_SIZES.get(architecture, SIZES["H"])}
    values = {
        key.replace("llama.", f"{architecture}.", 1): value
        for key, value in metadata(**sizes).items()
    }
    if architecture not in HEAD_SIZES:
        for name in ("key_length", "value_length"):
            del values[f"{architecture}.attention.{name}"]
    tensors, rng = random_tensors(sizes, tied=tied), np.random.default_rng(5)
    for name, letters in collect("GGUF")[architecture].items():
        count = np.prod([sizes[letter] for letter in letters])
        for i in range(sizes["L"]):
            tensors[f"blk.{i}.{name}"] = rng.normal(size=count).astype("float32")
    tensors = {
        name: array if array.ndim == 1 else 0.3 * array
        for name, array in tensors.items()
    }
    write(path, values, tensors, architecture=architecture)


def read_by_transformers(path):
    """As `from_pretrained(gguf_file=…)`, which asks for one more package."""
    config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    read = modeling_gguf_pytorch_utils.load_gguf_checkpoint
    tensors = read(path, return_tensors=True, model_to_load=model)["tensors"]
    missing, extra = model.load_state_dict(tensors, strict=False)
    assert not extra and set(missing) <= {"lm_head.weight"}
    return model.eval()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", collect("GGUF"))
def test_an_architecture_gives_the_logits_of_transformers(architecture, tied, tmp_path):
    write_case(tmp_path / "model.gguf", architecture, tied)
    theirs = read_by_transformers(tmp_path / "model.gguf")
    lm = DecoderLM.from_preset(tmp_path / "model.gguf", dtype="float32")
    assert lm.config.tie_word_embeddings == tied
    ids = np.random.default_rng(11).integers(0, 29, (3, 23))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids)).logits.numpy()
    assert expected.std() > 0.5
    ours = keras.ops.convert_to_numpy(lm(ids))
    np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=1e-4)
