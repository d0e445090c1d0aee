"""SmolLM2 against transformers on the same file.

What transformers said is recorded by data/make_smollm2_reference.py.
"""

from pathlib import Path

import numpy as np
import pytest
from conftest import make_lm
from keras import ops

pytestmark = pytest.mark.real_model

REFERENCE = np.load(Path(__file__).with_name("data") / "smollm2_reference.npz")
PROMPTS = [REFERENCE[f"prompt_{number}"].tolist() for number in range(5)]
ANSWERS = [REFERENCE[f"answer_{number}"].tolist() for number in range(5)]
QUESTION = "What is the capital of France? Then write one sentence about it."


def test_greedy_tokens_equal_those_of_transformers(smollm2):
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        assert len(answer) == 64
        ours = smollm2.generate(
            prompt, max_new_tokens=64, stop_token_ids=None, strip_prompt=True
        )
        assert ours == answer


@pytest.mark.slow
def test_ragged_rows_equal_those_of_transformers(smollm2):
    assert len({len(prompt) for prompt in PROMPTS}) > 2
    ours = smollm2.generate(
        PROMPTS, max_new_tokens=64, stop_token_ids=None, strip_prompt=True
    )
    assert ours == ANSWERS


def test_logits_equal_those_of_transformers(smollm2):
    expected = REFERENCE["logits"]
    logits = ops.convert_to_numpy(smollm2(np.array([PROMPTS[0]])))[0, :, ::97]
    assert expected.std() > 1
    np.testing.assert_allclose(logits, expected, atol=1e-3)
    cache = smollm2.init_cache(1, 31)
    cached, _, _ = smollm2.call_with_cache(np.array([PROMPTS[0]]), cache, 0)
    cached = ops.convert_to_numpy(cached)[0, :, ::97]
    np.testing.assert_allclose(cached, expected, atol=1e-3)


def test_text_in_text_out_through_the_chat_template(smollm2):
    prompt = smollm2.tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}]
    )
    answer = smollm2.generate(prompt, max_new_tokens=40, strip_prompt=True)
    assert answer == "The capital of France is Paris."
    assert smollm2.generate(prompt, max_new_tokens=40) == prompt + answer
    assert smollm2.generate([prompt], max_new_tokens=40, strip_prompt=True) == [answer]
    pieces = list(smollm2.stream(prompt, max_new_tokens=40))
    assert len(pieces) > 4
    assert "".join(pieces) == answer


def test_characters_of_several_tokens_are_streamed_whole(smollm2):
    text = "Tokens: 🦊 → 東京 naïve 🇫🇷 👩‍🚀"
    ids = smollm2.tokenizer.encode(text)
    assert len(ids) > len(text)
    small = make_lm(
        vocabulary_size=smollm2.vocabulary_size,
        num_layers=1,
        tokenizer=smollm2.tokenizer,
    )

    def recite(logits, seed):
        """The tokens of the text, one a step."""
        return ops.take(ops.convert_to_tensor([*ids, 0], "int32"), seed[1])[None]

    stream = small.stream("Say:", max_new_tokens=len(ids), sampler=recite)
    pieces = list(stream)
    assert stream.token_ids == [ids]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_preset_folder_gives_the_same_model(smollm2, tmp_path):
    smollm2.save_to_preset(tmp_path / "copy")
    copy = type(smollm2).from_preset(tmp_path / "copy")
    assert copy.tokenizer.chat_template == smollm2.tokenizer.chat_template
    assert copy.tokenizer.encode(QUESTION) == smollm2.tokenizer.encode(QUESTION)
    assert copy.tokenizer.stop_token_ids == smollm2.tokenizer.stop_token_ids
    for ours, theirs in zip(copy.weights, smollm2.weights, strict=True):
        np.testing.assert_array_equal(
            ops.convert_to_numpy(ours), ops.convert_to_numpy(theirs)
        )
