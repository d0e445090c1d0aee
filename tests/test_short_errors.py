"""Errors stay short, whatever a stranger's file says."""

import json
import struct

import numpy as np
import pytest
from safetensors.numpy import save_file

from keras_kvcache import DecoderLM
from keras_kvcache.caches import load_caches
from keras_kvcache.errors import quoted, shortened
from keras_kvcache.tokenizers.chat_template import render_chat_template

LONG = "tokenizer" * 100_000
LLAMA = dict(
    model_type="llama",
    vocab_size=61,
    hidden_size=20,
    intermediate_size=13,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=113,
)


def hugging_face(folder, config=(), tensors=(), index=None):
    (folder / "config.json").write_text(json.dumps({**LLAMA, **dict(config)}))
    if index is None:
        save_file(dict(tensors), folder / "model.safetensors")
    else:
        path = folder / "model.safetensors.index.json"
        path.write_text(json.dumps({"weight_map": index}))
    DecoderLM.from_preset(folder)


def own_preset(folder, described):
    (folder / "config.json").write_text(json.dumps(described))
    DecoderLM.from_preset(folder, load_weights=False)


def gguf(folder, key, kind, value):
    key = key.encode()
    body = struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
    (folder / "model.gguf").write_bytes(head + body + bytes(64))
    DecoderLM.from_preset(folder / "model.gguf")


def text(value):
    return struct.pack("<Q", len(value)) + value.encode()


def caches(folder, metadata):
    save_file({LONG[:50_000]: np.zeros(2)}, folder / "caches", metadata)
    load_caches(folder / "caches")


def template(folder, text):
    (folder / "template").write_text(text)
    render_chat_template(
        text, [], bos_token="", eos_token="", add_generation_prompt=True
    )


NAMES = {LONG[:50_000]: np.zeros((2, 3), "float32")}
CASES = {
    "a key of a GGUF file": (gguf, LONG, 99, b""),
    "a value of a GGUF file": (gguf, "general.architecture", 8, text(LONG)),
    "a type of a Hugging Face model": (hugging_face, {"model_type": LONG}),
    "an activation": (hugging_face, {"hidden_act": LONG}),
    "a size": (hugging_face, {"vocab_size": LONG}),
    "a list": (hugging_face, {"layer_types": [LONG] * 50}),
    "rope": (hugging_face, {"rope_scaling": {"rope_type": LONG, "factor": 2.0}}),
    "many layers": (hugging_face, {"layer_types": list(range(100_000))}),
    "names of tensors": (hugging_face, {}, NAMES),
    "an index": (hugging_face, {}, {}, {"a": f"../{LONG}"}),
    "an index's name": (hugging_face, {}, {}, {"a": LONG[:200]}),
    "keys of a config": (own_preset, {LONG: 1}),
    "a version": (own_preset, {"format_version": LONG, "config": {}}),
    "an argument": (own_preset, {"format_version": 1, "config": {LONG: 1}}),
    "a value": (
        own_preset,
        {"format_version": 1, "config": {"vocabulary_size": [LONG]}},
    ),
    "metadata of caches": (caches, {LONG: "1"}),
    "version of caches": (caches, {"keras_kvcache.caches": LONG}),
    "an undefined name": (template, "{{ " + LONG + " + 1 }}"),
    "an error of the template": (template, "{{ raise_exception('" + LONG + "') }}"),
    "syntax": (template, "{% " + LONG + " %}"),
}


@pytest.mark.parametrize("case", CASES)
def test_an_error_stays_short(case, tmp_path):
    make, *arguments = CASES[case]
    with pytest.raises((ValueError, OSError)) as caught:
        make(tmp_path, *arguments)
    assert len(str(caught.value).replace(str(tmp_path), "")) < 1000


def test_quotes():
    assert quoted("abc") == "'abc'" and quoted(5) == "5"
    assert shortened("abc" * 7) == "abc" * 7
    nested = [[[[LONG] * 100] * 100] * 100] * 100
    for value in (LONG, LONG.encode(), [LONG] * 999, {LONG: LONG}, nested, 10**200):
        assert len(quoted(value)) <= 80
    assert shortened(LONG).startswith("tokenizer")
    assert shortened(f"{LONG} end").endswith("end") and len(shortened(LONG)) == 80
