"""keras-hub's presets by name, handle and folder."""

import sys

import keras
import numpy as np
import pytest
from hub_cases import hub, hub_generate, make_hub_lm, make_reader, prompts

from keras_kvcache import DecoderLM, cli
from keras_kvcache.loaders import DownloadError


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    make_reader().save_to_preset(str(folder))
    return folder


def test_a_folder_of_keras_hub_with_its_tokenizer(gpt2_folder):
    theirs = hub.models.CausalLM.from_preset(str(gpt2_folder))
    theirs.compile(sampler="greedy")
    lm = DecoderLM.from_preset(gpt2_folder)
    prompt = "on the moon"
    expected = theirs.generate(prompt, max_length=31)
    assert lm.generate(prompt, max_length=31) == expected
    assert expected.startswith(prompt) and len(expected) > len(prompt) + 3


@pytest.mark.slow
def test_tokens_of_another_family(tmp_path):
    theirs = make_hub_lm("llama")
    theirs.save_to_preset(str(tmp_path))
    lm = DecoderLM.from_preset(str(tmp_path), tokenizer=None, max_sequence_length=61)
    assert lm.max_sequence_length == 61
    inputs = prompts([5], 29)
    expected = hub_generate(theirs, inputs)["token_ids"][0].tolist()
    assert lm.generate(inputs["token_ids"][0, :5].tolist(), max_length=29) == expected


def test_what_can_be_changed(gpt2_folder):
    lm = DecoderLM.from_preset(
        gpt2_folder, dtype="bfloat16", tokenizer="mine", max_sequence_length=113
    )
    assert (lm.compute_dtype, lm.tokenizer) == ("bfloat16", "mine")
    random = DecoderLM.from_preset(gpt2_folder, load_weights=False, dtype=None)
    assert random.compute_dtype == "float32"
    weights = [
        keras.ops.convert_to_numpy(model.token_embedding.embeddings).astype("float32")
        for model in (lm, random)
    ]
    assert not np.allclose(*weights, atol=0.05)
    # The class of such a model makes the others as `DecoderLM` does.
    assert type(type(lm).from_preset(gpt2_folder)) is type(lm)
    with pytest.raises(ValueError, match="can be changed. Received: dropout, name"):
        DecoderLM.from_preset(gpt2_folder, dropout=0.1, name="x")
    with pytest.raises(ValueError, match="`max_sequence_length`.*113. Received: 114"):
        DecoderLM.from_preset(gpt2_folder, max_sequence_length=114)


class Own(DecoderLM):
    """A class of a user's own."""


def test_a_subclass_shares_layers_too_and_its_folder_has_its_own(gpt2_folder, tmp_path):
    shared = Own.from_preset(gpt2_folder, tokenizer=None)
    lm = DecoderLM.from_preset(gpt2_folder, tokenizer=None)
    shared.save_to_preset(tmp_path)
    own = Own.from_preset(tmp_path)
    assert type(shared) is type(own) is Own
    ids = np.array([[1, 2, 3]])
    expected, *answers = (
        keras.ops.convert_to_numpy(model(ids)) for model in (lm, shared, own)
    )
    for answer in answers:
        np.testing.assert_allclose(answer, expected, atol=1e-5)


def test_a_subclass_is_no_encoder_decoder(tmp_path):
    backbone = hub.models.BartBackbone(31, 1, 2, 6, 10, max_sequence_length=23)
    hub.models.BartSeq2SeqLM(backbone, preprocessor=None).save_to_preset(str(tmp_path))
    with pytest.raises(ValueError, match="`Own` must be.*Received: a BartBackbone"):
        Own.from_preset(tmp_path, tokenizer=None)


def test_a_backbone_without_a_tokenizer(tmp_path):
    make_hub_lm("gpt2").backbone.save_to_preset(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="keras-hub can't load.*tokenizer"):
        DecoderLM.from_preset(tmp_path)
    assert DecoderLM.from_preset(tmp_path, tokenizer=None).tokenizer is None


def test_a_damaged_folder(gpt2_folder, tmp_path):
    make_reader().save_to_preset(str(tmp_path))
    (tmp_path / "model.weights.h5").write_bytes(b"")
    with pytest.raises(ValueError, match="keras-hub can't"):
        DecoderLM.from_preset(tmp_path)
    (tmp_path / "model.weights.h5").unlink()
    with pytest.raises(FileNotFoundError, match="keras-hub can't load.*model.weights"):
        DecoderLM.from_preset(tmp_path)


@pytest.mark.parametrize(
    "name, message",
    [
        ("smollm2_135m_instrct", "'smollm2_135m_instrct'; is it 'smollm2_135m_instru"),
        ("gpt2_base_em", "'gpt2_base_em'; is it 'gpt2_base_en'"),
        ("bert_base_en", "smollm2_135m_instruct,.*Received: 'bert_base_en'"),
        ("HuggingFaceTB/SmolLM2-135M", "say 'hf://HuggingFaceTB/SmolLM2-135M'"),
        ("falcon_refinedweb_1b_en", "one of the families .*GPT2Backbone.*'falcon_ref"),
        ("kaggle://x", "keras-hub can't load 'kaggle://x': Unexpected Kaggle preset"),
        ("foo://bar", "keras-hub can't load 'foo://bar': Unknown preset identifier"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ValueError, match=message):
        DecoderLM.from_preset(name)


class ConnectError(Exception):
    __module__ = "httpx"  # whose errors are no `OSError`


@pytest.mark.parametrize(
    "error, kind, message",
    [
        (OSError("no route"), DownloadError, "can't fetch 'gpt2_base_en': no route"),
        (ConnectError("no name"), DownloadError, "can't fetch.*no name"),
        (ValueError("no config.json"), ValueError, "can't load.*no config.json"),
        (ImportError("modelscope"), ImportError, "modelscope"),
        (ZeroDivisionError("ours"), ZeroDivisionError, "ours"),
    ],
)
def test_errors_of_fetching(error, kind, message, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(hub.models.CausalLM, "from_preset", fail)
    with pytest.raises(kind, match=message):
        DecoderLM.from_preset("gpt2_base_en")


def test_names_and_arguments_go_to_keras_hub(monkeypatch):
    calls = []

    def load(preset, **kwargs):
        calls.append((preset, kwargs))
        return make_hub_lm("gpt2")

    monkeypatch.setattr(hub.models.CausalLM, "from_preset", load)
    for name in ("gpt2_base_en", "hf://user/model", "kaggle://a/b/keras/c"):
        lm = DecoderLM.from_preset(name, load_weights=False, dtype="float16")
        assert lm.num_layers == 2
        assert calls.pop() == (name, dict(load_weights=False, dtype="float16"))


@pytest.mark.parametrize(
    "name, kind, message",
    [
        ("hf://user/model", ImportError, r"'hf://user/model'.*pip install.*\[hub\]"),
        ("gpt2_base_en", ValueError, r"smollm2_135m_.*pip install.*'gpt2_base_en'"),
        ("FOLDER", ImportError, r"keras-hub loads.*pip install"),
    ],
)
def test_without_keras_hub(name, kind, message, gpt2_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "keras_hub", None)
    with pytest.raises(kind, match=message):
        DecoderLM.from_preset(str(gpt2_folder) if name == "FOLDER" else name)


def test_the_command_line_takes_such_folders(gpt2_folder, capsys):
    folder = str(gpt2_folder)
    assert cli.main(["info", folder, "--length", "37"]) == 0
    assert "longest sequence    113" in capsys.readouterr().out
    prompt = ["generate", "on the", "--model", folder, "--max-new-tokens", "5"]
    assert cli.main(prompt) == 0
    assert capsys.readouterr().out.strip()
    assert cli.main(["chat", "--model", folder]) == 1
    assert "must have a chat template" in capsys.readouterr().err


def test_the_command_line_without_keras_hub(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "keras_hub", None)
    with pytest.raises(SystemExit) as ended:
        cli.main(["info", "hf://user/model"])
    assert ended.value.code == 2
    assert "keras-hub's, which isn't installed" in capsys.readouterr().err
