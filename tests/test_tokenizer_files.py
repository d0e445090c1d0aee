"""Models keep their tokenizer in every file, pickle and copy."""

import copy
import pickle
import warnings

import keras
import numpy as np
import pytest
from conftest import make_lm
from vocabularies import EOS, byte_level, sentence_piece

from keras_kvcache import DecoderLM, EncoderDecoderLM
from keras_kvcache.loaders.gguf_tokenizer import build_tokenizer
from keras_kvcache.tokenizers import Tokenizer, UnreadTokenizer

PROMPT = "hello 1234"


@keras.saving.register_keras_serializable(package="tests")
class Letters:
    """One token a letter; its letters are in its config, its end in a file."""

    stop_token_ids = ()

    def __init__(self, letters):
        self.letters = letters

    def encode(self, text):
        return [self.letters.index(letter) for letter in text]

    def decode(self, token_ids):
        return "".join(self.letters[token] for token in token_ids)

    def get_config(self):
        return {"letters": self.letters}

    @classmethod
    def from_config(cls, config):
        return cls(**config)

    def save_assets(self, directory):
        with open(f"{directory}/stop", "w") as file:
            file.write(",".join(map(str, self.stop_token_ids)))

    def load_assets(self, directory):
        with open(f"{directory}/stop") as file:
            self.stop_token_ids = tuple(map(int, file.read().split(",")))


class Unsaveable:
    """What a newcomer writes."""

    stop_token_ids = ()

    def encode(self, text):
        return [ord(letter) % 101 for letter in text]

    def decode(self, token_ids):
        return "".join(chr(97 + token % 26) for token in token_ids)


def by_keras(lm, folder):
    lm.save(folder / "lm.keras")
    return keras.saving.load_model(folder / "lm.keras")


def by_preset(lm, folder):
    lm.save_to_preset(folder / "preset")
    return DecoderLM.from_preset(folder / "preset")


def by_pickle(lm, folder):
    return pickle.loads(pickle.dumps(lm))


def by_copy(lm, folder):
    return copy.deepcopy(lm)


WAYS = pytest.mark.parametrize("way", [by_keras, by_preset, by_pickle, by_copy])


def make_writer(tokenizer):
    lm = make_lm(vocabulary_size=281, num_layers=1, tokenizer=tokenizer)
    lm.compile(sampler="greedy")
    return lm


@pytest.fixture(params=[byte_level, sentence_piece], scope="module")
def writer(request):
    template = {"tokenizer.chat_template": "<{{ messages[0].content }}>"}
    return make_writer(build_tokenizer(request.param() | template))


@WAYS
def test_text_in_and_out_as_before(way, writer, tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*tokenizer.*")
        loaded = way(writer, tmp_path)
    expected = writer.generate(PROMPT, max_new_tokens=11)
    assert expected != PROMPT
    assert loaded.generate(PROMPT, max_new_tokens=11) == expected
    assert loaded.tokenizer is not writer.tokenizer
    for name in ("stop_token_ids", "vocabulary_size", "bos_token_id", "chat_template"):
        assert getattr(loaded.tokenizer, name) == getattr(writer.tokenizer, name)


@WAYS
def test_one_of_a_registered_class(way, tmp_path):
    lm = make_writer(Letters("abcdefgh" * 41))
    lm.tokenizer.stop_token_ids = (7, 11)
    lm.compile()
    loaded = way(lm, tmp_path)
    assert type(loaded.tokenizer) is Letters
    assert loaded.tokenizer.stop_token_ids == (7, 11)
    expected = lm.generate("bad", max_new_tokens=7)
    assert loaded.generate("bad", max_new_tokens=7) == expected


@pytest.mark.parametrize("way", [by_keras, by_preset])
def test_one_that_cannot_be_saved_is_named(way, tmp_path):
    lm = make_writer(Unsaveable())
    with pytest.warns(UserWarning, match="Unsaveable, isn't saved.*get_config"):
        loaded = way(lm, tmp_path)
    expected = lm.generate([5, 7], max_new_tokens=7)
    assert loaded.generate([5, 7], max_new_tokens=7) == expected
    with pytest.raises(ValueError, match="set the model's `tokenizer`"):
        loaded.generate("text")
    loaded.tokenizer = lm.tokenizer
    assert loaded.generate("text") == lm.generate("text")


@pytest.mark.parametrize("way", [by_pickle, by_copy])
def test_pickles_hold_any_tokenizer(way, tmp_path):
    lm = make_writer(Unsaveable())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*tokenizer.*")
        loaded = way(lm, tmp_path)
    assert type(loaded.tokenizer) is Unsaveable
    assert loaded.generate("text") == lm.generate("text")


def test_a_class_that_nobody_imported(tmp_path, monkeypatch):
    lm = make_writer(Letters("abcdefgh" * 41))
    lm.tokenizer.stop_token_ids = (7,)
    lm.save(tmp_path / "lm.keras")
    monkeypatch.delitem(keras.saving.get_custom_objects(), "tests>Letters")
    with pytest.warns(UserWarning, match="isn't loaded.*tests>Letters"):
        loaded = keras.saving.load_model(tmp_path / "lm.keras")
    assert loaded.tokenizer is None
    loaded.generate([5], max_new_tokens=2)


def test_models_without_a_tokenizer_stay_so(tmp_path):
    lm = make_lm(num_layers=1)
    for way in (by_keras, by_preset, by_pickle, by_copy):
        assert way(lm, tmp_path).tokenizer is None


def test_a_preset_leaves_nothing_of_an_earlier_tokenizer(tmp_path):
    letters = Letters("abcdefgh" * 41)
    letters.stop_token_ids = (7,)
    for tokenizer in (letters, build_tokenizer(byte_level()), letters, None):
        loaded = by_preset(make_writer(tokenizer), tmp_path)
        assert type(loaded.tokenizer) is type(tokenizer)
        names = {path.name for path in (tmp_path / "preset").iterdir()}
        assert len(names) == 2 + 2 * (tokenizer is not None)


@pytest.mark.parametrize("way", [pickle, copy])
def test_a_tokenizer_alone(way):
    tokenizer = build_tokenizer(byte_level())
    if way is pickle:
        other = pickle.loads(pickle.dumps(tokenizer))
    else:
        other = copy.deepcopy(tokenizer)
    assert type(other) is Tokenizer and other.stop_token_ids == (EOS,)
    ids = tokenizer.encode(f"{PROMPT}<think>é<|im_end|>")
    assert other.encode(f"{PROMPT}<think>é<|im_end|>") == ids
    assert other.decode(ids) == tokenizer.decode(ids)


@pytest.mark.parametrize("way", [by_keras, by_pickle, by_copy])
def test_an_encoder_decoder(way, tmp_path):
    ids = keras.Input((None,), dtype="int32", name="encoder_token_ids")
    encoder = keras.Model(
        {"encoder_token_ids": ids}, keras.layers.Embedding(281, 14)(ids)
    )
    tokenizer = build_tokenizer(byte_level())
    lm = EncoderDecoderLM(encoder, 281, 1, 2, 14, 13, tokenizer=tokenizer)
    loaded = way(lm, tmp_path)
    assert loaded.tokenizer.encode(PROMPT) == tokenizer.encode(PROMPT)
    pair = {
        "encoder_token_ids": np.array([[5, 7, 11]]),
        "decoder_token_ids": np.array([[1, 2]]),
    }
    expected = keras.ops.convert_to_numpy(lm(pair))
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(loaded(pair)), expected)


@WAYS
def test_one_of_keras_hub(way, tmp_path):
    pytest.importorskip("keras_hub")
    from hub_cases import make_reader

    from keras_kvcache import from_keras_hub

    lm = from_keras_hub(make_reader())
    loaded = way(lm, tmp_path)
    expected = lm.generate("on the moon", max_new_tokens=7)
    assert loaded.generate("on the moon", max_new_tokens=7) == expected
    assert loaded.tokenizer.stop_token_ids == lm.tokenizer.stop_token_ids


@WAYS
def test_a_tokenizer_that_is_not_read_stays_so(way, tmp_path):
    files = ["tokenizer.model"]
    lm = make_writer(UnreadTokenizer(tmp_path / "llama", files, [7, 11]))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*tokenizer.*")
        loaded = way(lm, tmp_path)
    assert loaded.tokenizer.stop_token_ids == (7, 11)
    for inputs in ("a", [{"role": "user", "content": "a"}]):
        with pytest.raises(ValueError, match="`tokenizer.json`.*has tokenizer.model"):
            loaded.generate(inputs, max_new_tokens=3)
    assert loaded.generate([5, 7], max_new_tokens=3)
