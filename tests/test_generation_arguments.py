"""Arguments of `generate` and `stream`: documented, and foreign names explained."""

import functools
import inspect
import re

import pytest
from conftest import make_lm

from keras_kvcache import DecoderLM, EncoderDecoderLM, Generator, samplers
from keras_kvcache.generation.foreign_arguments import ADVICE

CLASSES = (DecoderLM, EncoderDecoderLM, Generator)


@functools.cache
def small_lm():
    return make_lm(num_layers=1)


def refusal(method="generate", **unknown):
    with pytest.raises(TypeError) as error:
        getattr(small_lm(), method)([1, 2, 3], **unknown)
    return str(error.value)


# What users of other packages type, and what they are to write.
INSTEAD = {
    "num_return_sequences": "[prompt] * 3",
    "n": "[prompt] * 3",
    "temperature": "sampler=samplers.make(temperature=",
    "temp": "sampler=samplers.make(temperature=",
    "top_k": "sampler=samplers.make(top_k=",
    "top_p": "sampler=samplers.make(top_p=",
    "min_p": "sampler=samplers.make(min_p=",
    "do_sample": "samplers.top_p(0.9, temperature=0.7)",
    "num_beams": "beam search isn't there yet",
    "repetition_penalty": "a sampler with a state",
    "logits_processor": "samplers.chain(",
    "stop": "`stop_token_ids=",
    "stop_strings": "`stop_token_ids=",
    "eos_token_id": "`stop_token_ids`",
    "pad_token_id": "nothing is to be padded",
    "max_tokens": "`max_new_tokens`",
    "max_gen_len": "`max_new_tokens`",
    "n_predict": "`max_new_tokens`",
    "max_new_token": "`max_new_tokens`",
    "max_lenght": "`max_length`",
    "stop_token_id": "`stop_token_ids`",
    "temprature": "`temperature`",
    "streamer": "`stream(",
    "stream": "`stream(",
    "use_cache": "`cache`",
    "kv_bits": "`cache`",
    "max_kv_size": "caches.Rolling(window=",
    "past_key_values": "call_with_cache",
    "prompt_cache": "call_with_cache",
    "attention_mask": '"padding_mask"',
    "input_ids": "`inputs`",
    "prompt": "`inputs`",
    "messages": "`inputs`",
    "tools": "tokenizer.apply_chat_template(messages",
    "prefill": "by themselves",
    "batch_size": "list of prompts",
    "return_dict_in_generate": "call_with_cache",
    "echo": "`strip_prompt=True`",
    "draft_model": "isn't there yet",
    "random_seed": "`seed`",
    "tokenizer": "`model.tokenizer`",
}


@pytest.mark.parametrize("name", INSTEAD)
def test_foreign_names_are_told_what_takes_their_place(name):
    for method in ("generate", "stream"):
        message = refusal(method, **{name: 1})
        assert message.startswith(f"`{method}` has no argument `{name}`: ")
        assert INSTEAD[name] in message
        assert "It takes inputs, max_length, max_new_tokens," in message
        assert message.endswith(f"Received: {name}=1")


@pytest.mark.parametrize(
    "settings, expected",
    [
        (dict(temperature=0.7), samplers.random(0.7)),
        (dict(temp=0.7, top_p=0.9), samplers.top_p(0.9, temperature=0.7)),
        (dict(temperature=0.5, top_k=7), samplers.top_k(7, temperature=0.5)),
        (dict(temperature=1.3, min_p=0.2), samplers.min_p(0.2, temperature=1.3)),
    ],
)
def test_settings_of_sampling_become_one_sampler(settings, expected):
    message = refusal(**settings)
    assert message.count("write ") == 1
    (code,) = re.findall(r"`sampler=(samplers\.\S+\(.*?\))`", message)
    assert eval(code, {"samplers": samplers}) == expected


def test_several_names_and_one_that_nobody_knows():
    message = refusal(max_tokens=5, stop="\n", zzz=[1])
    for part in ("no argument `max_tokens`: ", "no argument `stop`: "):
        assert part in message
    assert "; no argument `zzz`. It takes" in message
    assert message.endswith("Received: max_tokens=5, stop='\\n', zzz=[1]")


def test_a_long_value_is_shown_shortly():
    assert len(refusal(messages="x" * 10_000)) < 600


def test_what_a_stream_always_does():
    assert "new text only" in refusal("stream", strip_prompt=True)


@pytest.mark.parametrize("cls", CLASSES)
def test_advice_is_about_names_that_do_not_exist(cls):
    names = set(inspect.signature(cls.generate).parameters)
    assert names & set(ADVICE) == {"strip_prompt"}
    assert "strip_prompt" not in inspect.signature(cls.stream).parameters


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("method", ["generate", "stream"])
def test_each_argument_is_documented_where_users_look(cls, method):
    function = getattr(cls, method)
    signature = inspect.signature(function)
    names = list(signature.parameters)[1:]
    assert names[:3] == ["inputs", "max_length", "max_new_tokens"]
    assert {"stop_token_ids", "sampler", "seed", "cache"} <= set(names)
    documented = re.findall(r"^ {4}(\w+): ", inspect.getdoc(function), re.M)
    assert documented[: len(names)] == names
    for parameter in list(signature.parameters.values())[1:]:
        assert parameter.annotation is not parameter.empty
        assert parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    assert signature.return_annotation is not signature.empty


def test_encoder_decoders_explain_too_before_anything_runs():
    class Unbuilt(EncoderDecoderLM):
        def __init__(self):
            pass

    for method in ("generate", "stream"):
        with pytest.raises(TypeError, match="`max_new_tokens`.*Received: max_tokens=3"):
            getattr(EncoderDecoderLM, method)(object.__new__(Unbuilt), {}, max_tokens=3)
