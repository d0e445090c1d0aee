"""Families of models: one file each, found by looking into their folder."""

import json
import sys
from pathlib import Path

import family_cases
import numpy as np
import pytest
from gguf_files import PRIMES, metadata, random_tensors, write

import keras_kvcache
from keras_kvcache import families
from keras_kvcache.families import all_families
from keras_kvcache.loaders import read_gguf, read_hugging_face

PACKAGE = Path(keras_kvcache.__file__).parent


def test_there_are_families():
    assert {"llama", "gemma", "t5", "whisper"} <= set(all_families())
    assert "llama_like" not in all_families()


@pytest.mark.parametrize("name", all_families())
def test_each_way_to_read_a_family_is_tested(name):
    """By the cases that the tests of the loaders and of keras-hub run through."""
    family, module = all_families()[name], family_cases.modules().get(name)
    assert module, f"tests/family_cases/{name}.py must be there"

    def begins(*tables):
        cases = [
            case for table in tables for case in getattr(module, table, {}).items()
        ]
        return {begin for _, (begin, _) in cases}

    classes = [set(one.architectures) for one in family.hugging_face]
    tested = {
        f"{begin}{end}"
        for begin in begins("TRANSFORMERS")
        for end in ("ForCausalLM", "LMHeadModel")
    }
    assert all(names & tested for names in classes)
    backbones = {one.backbone for one in family.keras_hub}
    assert backbones == {f"{begin}Backbone" for begin in begins("HUB", "HUB_PAIRS")}
    assert set(family.refused) == {
        f"{begin}Backbone" for begin in begins("HUB_REFUSED")
    }
    architectures = {one.architecture for one in family.gguf}
    assert architectures == set(getattr(module, "GGUF", {}))


def test_names_are_of_one_family_only():
    names = [
        name
        for family in all_families().values()
        for name in (
            *(one.model_type for one in family.hugging_face),
            *(f"{one.architecture} of GGUF" for one in family.gguf),
            *(one.backbone for one in family.keras_hub),
            *family.refused,
        )
    ]
    assert len(names) == len(set(names))


def test_nothing_else_names_a_family():
    names = set()
    for family in all_families().values():
        names |= {name for one in family.hugging_face for name in one.architectures}
        names |= {one.backbone for one in family.keras_hub} | set(family.refused)
    assert {"LlamaForCausalLM", "T5Backbone", "WhisperBackbone"} <= names
    found = [
        (path.name, name)
        for path in PACKAGE.rglob("*.py")
        if path.parent.name != "families"
        for name in names
        if name in path.read_text(encoding="utf-8")
    ]
    assert not found


TOY = """
from dataclasses import replace

from keras_kvcache.families import llama_like
from keras_kvcache.families.family import Family, Gguf, HuggingFace


def _read(fields):
    config = llama_like.read_fields(fields, default_theta=503.0)
    return config, replace(llama_like.TENSORS, block="toys.{}")


def _read_keys(keys):
    parts = dict.fromkeys(["attention/query", "attention/key"], "attn_qkv")
    parts |= {"attention/value": "attn_qkv", "feedforward/router": "ffn_gate_inp"}
    for ours, theirs in (("gate", "gate"), ("intermediate", "up"), ("output", "down")):
        parts[f"feedforward/experts/{ours}_kernel"] = f"ffn_{theirs}_exps.weight"
    dense = {
        part: name
        for part, name in llama_like.GGUF_PARTS.items()
        if not part.startswith("feedforward/")
    }
    options = {"attention_bias": True, "num_experts": 5, "num_experts_per_token": 2}
    return llama_like.read_keys(keys) | options, replace(
        llama_like.GGUF_TENSORS, parts={**dense, **parts}, interleaved=True
    )


FAMILY = Family(
    "Toy",
    hugging_face=(HuggingFace("toy", ("ToyForCausalLM",), _read),),
    gguf=(Gguf("toy", _read_keys),),
)
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A folder with a family that the package doesn't have, on the path of families."""
    folder = tmp_path / "more"
    folder.mkdir()
    (folder / "toy.py").write_text(TOY)
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(folder)])
    all_families.cache_clear()
    yield
    all_families.cache_clear()
    sys.modules.pop("keras_kvcache.families.toy", None)


def write_hugging_face(folder):
    """A model of one layer, whose tensors are numbered by their names."""
    from safetensors.numpy import save_file

    folder.mkdir()
    D, N, K, H, F, V = (PRIMES[letter] for letter in "DNKHFV")
    sizes = dict(
        model_type="toy",
        vocab_size=V,
        hidden_size=D,
        intermediate_size=F,
        num_hidden_layers=1,
        num_attention_heads=N,
        num_key_value_heads=K,
        head_dim=H,
        max_position_embeddings=41,
        tie_word_embeddings=True,
    )
    (folder / "config.json").write_text(json.dumps(sizes))
    block, rng = "model.toys.0", np.random.default_rng(3)
    shapes = {
        "model.embed_tokens": (V, D),
        "model.norm": (D,),
        f"{block}.self_attn.q_proj": (N * H, D),
        f"{block}.self_attn.k_proj": (K * H, D),
        f"{block}.self_attn.v_proj": (K * H, D),
        f"{block}.self_attn.o_proj": (D, N * H),
        f"{block}.input_layernorm": (D,),
        f"{block}.post_attention_layernorm": (D,),
        f"{block}.mlp.gate_proj": (F, D),
        f"{block}.mlp.up_proj": (F, D),
        f"{block}.mlp.down_proj": (D, F),
    }
    tensors = {
        f"{name}.weight": rng.normal(size=shape).astype("float32")
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors")
    return tensors


def test_a_file_in_the_folder_is_a_family(toy, tmp_path):
    tensors = write_hugging_face(tmp_path / "model")
    checkpoint = read_hugging_face(tmp_path / "model")
    assert checkpoint.config["rope_max_wavelength"] == 503.0
    key = tensors["model.toys.0.self_attn.k_proj.weight"]
    np.testing.assert_array_equal(
        checkpoint.weights["block_0/attention/key/kernel"](),
        key.T.reshape(PRIMES["D"], PRIMES["K"], PRIMES["H"]),
    )


def test_a_family_is_gone_with_its_file(tmp_path):
    write_hugging_face(tmp_path / "model")
    with pytest.raises(ValueError, match="`model_type` must be one of .*'toy'"):
        read_hugging_face(tmp_path / "model")


def test_another_architecture_of_gguf_is_an_entry(toy, tmp_path):
    """With keys of its prefix, fused projections with biases, and experts."""
    D, N, K, H, F, E = *(PRIMES[letter] for letter in "DNKHF"), 5
    tensors, rng = {}, np.random.default_rng(7)
    for name, array in random_tensors(PRIMES).items():
        if not any(
            part in name for part in ("_q.", "_k.", "_v.", "gate", "up", "down")
        ):
            tensors[name] = array
    shapes = {
        "attn_qkv.weight": ((N + 2 * K) * H, D),
        "attn_qkv.bias": ((N + 2 * K) * H,),
        "ffn_gate_inp.weight": (E, D),
        "ffn_gate_exps.weight": (E, F, D),
        "ffn_up_exps.weight": (E, F, D),
        "ffn_down_exps.weight": (E, D, F),
    }
    for i in range(PRIMES["L"]):
        for name, shape in shapes.items():
            tensors[f"blk.{i}.{name}"] = rng.normal(size=shape).astype("float32")
    values = {
        key.replace("llama.", "toy.", 1): value
        for key, value in metadata(**PRIMES).items()
    }
    path = write(tmp_path / "toy.gguf", values, tensors, architecture="toy")
    checkpoint = read_gguf(path)
    assert checkpoint.config["attention_bias"] and checkpoint.config["head_dim"] == H
    block = {name: tensors[f"blk.1.{name}"] for name in shapes}
    kernel, bias = block["attn_qkv.weight"], block["attn_qkv.bias"]
    halves = [*range(0, H, 2), *range(1, H, 2)]
    expected = {
        "feedforward/router/kernel": block["ffn_gate_inp.weight"].T,
        "feedforward/experts/gate_kernel": block["ffn_gate_exps.weight"].swapaxes(1, 2),
        "feedforward/experts/output_kernel": block["ffn_down_exps.weight"].swapaxes(
            1, 2
        ),
    }
    begin = 0
    for name, heads, order in (
        ("query", N, halves),
        ("key", K, halves),
        ("value", K, range(H)),
    ):
        rows = slice(begin, begin + heads * H)
        part = kernel[rows].reshape(heads, H, D)[:, order]
        expected[f"attention/{name}/kernel"] = part.transpose(2, 0, 1)
        expected[f"attention/{name}/bias"] = bias[rows].reshape(heads, H)[:, order]
        begin += heads * H
    for name, array in expected.items():
        found = checkpoint.weights[f"block_1/{name}"]()
        np.testing.assert_array_equal(found, array, err_msg=name)
