"""What objects say of themselves where a user prints them."""

import numpy as np
import pytest
from conftest import make_lm, shared_lm
from vocabularies import BOS, EOS, byte_level

from keras_kvcache import Generator, samplers
from keras_kvcache.loaders.gguf_tokenizer import build_tokenizer


def test_a_tokenizer_shows_its_size_its_special_ids_and_whether_it_can_chat():
    tokenizer = build_tokenizer(byte_level())
    shown = repr(tokenizer)
    assert shown.startswith("<Tokenizer vocabulary_size=267, ")
    assert f"bos_token_id={BOS}, eos_token_id={EOS}" in shown
    assert f"stop_token_ids={tokenizer.stop_token_ids}" in shown
    assert "without chat_template" in shown
    tokenizer.chat_template = "{{ messages }}" * 99
    assert "with chat_template" in repr(tokenizer) and len(repr(tokenizer)) < 200


@pytest.mark.parametrize(
    "sampler",
    [
        samplers.greedy(),
        samplers.random(0.7),
        samplers.top_k(7),
        samplers.top_p(0.9, temperature=0.7, k=5),
        samplers.min_p(0.2),
        samplers.make(0.5, top_k=3, top_p=0.25, min_p=0.125),
        samplers.make(0),
        samplers.chain((samplers.keep_top_p, 0.5), (samplers.keep_top_k, 3)),
        samplers.chain((samplers.scale_temperature, 2.0), draw=samplers.most_likely),
        samplers.chain(),
    ],
    ids=repr,
)
def test_a_sampler_shows_the_call_that_makes_it(sampler):
    assert eval(repr(sampler), {"samplers": samplers, **vars(samplers)}) == sampler


def test_a_sampler_shows_names_of_own_filters_and_shapes_of_tensors():
    def ban(logits, token):
        return logits

    assert repr(samplers.chain((ban, 5))) == "samplers.chain((ban, 5))"
    by_row = samplers.top_p(np.full((2, 1), 0.5, "float32"))
    assert "top_p=<tensor (2, 1) float32>" in repr(by_row)


def test_samplers_of_keras_hub_show_their_settings():
    hub = pytest.importorskip("keras_hub")
    shown = repr(samplers.get(hub.samplers.TopKSampler(k=7, temperature=0.5)))
    assert "TopKSampler(" in shown and "k=7" in shown and "temperature=0.5" in shown


def test_a_generator_and_a_stream_show_what_they_are_of():
    lm = make_lm(num_layers=1)
    shown = repr(lm.generator)
    assert shown.startswith(f"<Generator of {lm!r}, sampler=samplers.greedy(), ")
    assert "tokenizer=None" in shown and "max_sequence_length=613" in shown
    assert isinstance(lm.generator, Generator)
    stream = shared_lm().stream([[1, 2], [3]], max_new_tokens=5)
    assert repr(stream) == "<TextStream, new tokens up to now: 0, 0>"
    list(stream)
    assert repr(stream) == "<TextStream, new tokens up to now: 5, 5>"


def test_caches_show_sizes_and_no_arrays():
    for codec in ("float32", "int4"):
        (cache, *_) = make_lm(num_layers=1).init_cache(2, 64, codec=codec)
        assert repr(cache) == f"StaticCache(capacity=64, codec={codec})"


def test_an_acceleration_shows_its_model_and_whether_it_is_active():
    hub = pytest.importorskip("keras_hub")
    import keras_kvcache

    backbone = hub.models.GPT2Backbone(31, 1, 2, 6, 10, max_sequence_length=23)
    causal_lm = hub.models.GPT2CausalLM(backbone=backbone)
    acceleration = keras_kvcache.accelerate(causal_lm)
    assert repr(acceleration).endswith(", active>")
    assert "GPT2CausalLM" in repr(acceleration)
    acceleration.restore()
    assert repr(acceleration).endswith(", restored>")
