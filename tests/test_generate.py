"""Generation against a loop that runs the whole sequence again for every token."""

import keras
import numpy as np
import pytest
from conftest import MODELS, make_lm, shared_lm
from keras import ops

from keras_kvcache import Generator, samplers

RNG = np.random.default_rng(7)
PROMPTS = [RNG.integers(0, 101, n).tolist() for n in (23, 5, 41, 1)]


def greedy_by_rerunning(lm, prompt, new_tokens):
    ids = list(prompt)
    for _ in range(new_tokens):
        # Padded to one length, so that JAX compiles once; what comes later
        # can't be attended.
        padded = np.zeros((1, 97), "int32")
        padded[0, : len(ids)] = ids
        logits = ops.convert_to_numpy(lm(padded))[0, len(ids) - 1]
        ids.append(int(logits.argmax()))
    return ids


def test_the_models_do_not_repeat_themselves():
    """Else equal answers would show nothing."""
    answers = [
        shared_lm(kind).generate(PROMPTS[0], max_new_tokens=37) for kind in MODELS
    ]
    assert all(len(set(answer[-37:])) > 7 for answer in answers)


@pytest.mark.parametrize("number", [0, 3])
def test_greedy_equals_rerunning_the_whole_sequence(lm, number):
    expected = greedy_by_rerunning(lm, PROMPTS[number], 37)
    assert lm.generate(PROMPTS[number], max_new_tokens=37) == expected


def test_ragged_rows_equal_each_prompt_alone(lm):
    together = lm.generate(PROMPTS, max_new_tokens=31)
    alone = [lm.generate(prompt, max_new_tokens=31) for prompt in PROMPTS]
    assert together == alone


def test_a_row_does_not_depend_on_its_mates_when_sampling():
    lm = shared_lm()
    sampler = samplers.random(0.8)
    few = lm.generate(PROMPTS[:2], max_new_tokens=19, sampler=sampler, seed=5)
    many = lm.generate(PROMPTS, max_new_tokens=19, sampler=sampler, seed=5)
    assert many[:2] == few


def test_rows_stop_on_their_own():
    lm = shared_lm()
    free = lm.generate(PROMPTS, max_new_tokens=29, strip_prompt=True)
    stop = free[0][3]
    stopped = lm.generate(
        PROMPTS, max_new_tokens=29, strip_prompt=True, stop_token_ids=[stop]
    )
    for row, whole in zip(stopped, free, strict=True):
        end = whole.index(stop) + 1 if stop in whole else len(whole)
        assert row == whole[:end]
    assert len(stopped[0]) <= 4


def test_stream_gives_what_generate_gives(lm):
    whole = lm.generate(PROMPTS, max_new_tokens=17, strip_prompt=True)
    stream = lm.stream(PROMPTS, max_new_tokens=17)
    rows = [[] for _ in PROMPTS]
    for pieces in stream:
        assert len(pieces) == len(PROMPTS)
        assert all(len(piece) <= 1 for piece in pieces)
        for row, piece in zip(rows, pieces, strict=True):
            row.extend(piece)
    assert rows == whole == stream.token_ids


def test_lengths_and_limits_of_both_kinds():
    lm = shared_lm()
    assert len(lm.generate([1, 2, 3], max_new_tokens=1)) == 4
    assert len(lm.generate([1, 2, 3], max_length=11)) == 11
    assert len(lm.generate([1, 2, 3], max_length=11, max_new_tokens=2)) == 5
    assert len(lm.generate([1, 2, 3], max_length=5, max_new_tokens=20)) == 5
    rows = lm.generate([[1, 2, 3], [4, 5, 6, 7, 8]], max_length=9)
    assert [len(row) for row in rows] == [9, 9]


def test_generation_fills_the_whole_context_and_no_more():
    lm = make_lm(max_sequence_length=67)
    assert lm.generate(PROMPTS[0]) == greedy_by_rerunning(lm, PROMPTS[0], 67 - 23)
    with pytest.raises(ValueError, match="context of 67 tokens.*prompt of 67"):
        lm.generate(list(range(67)))


def test_prompts_longer_than_a_chunk_and_a_segment():
    lm = shared_lm()
    prompt = RNG.integers(0, 101, 577).tolist()
    logits = ops.convert_to_numpy(lm(np.array([prompt])))[0, -1]
    assert lm.generate(prompt, max_new_tokens=1)[-1] == logits.argmax()
    both = lm.generate([prompt, PROMPTS[1]], max_new_tokens=13)
    assert both[1] == lm.generate(PROMPTS[1], max_new_tokens=13)
    assert both[0] == lm.generate(prompt, max_new_tokens=13)


def test_dictionaries_of_arrays_as_in_keras_hub():
    lm = shared_lm()
    ids = np.zeros((2, 13), "int64")
    mask = np.zeros((2, 13), "int32")
    for row, length in enumerate((4, 7)):
        ids[row, :length] = PROMPTS[0][:length]
        mask[row, :length] = 1
    answer = lm.generate({"token_ids": ids, "padding_mask": mask})
    assert isinstance(answer["token_ids"], np.ndarray)
    assert answer["token_ids"].shape == (2, 13)
    assert answer["padding_mask"].all()
    for row, length in enumerate((4, 7)):
        alone = lm.generate(PROMPTS[0][:length], max_length=13)
        assert answer["token_ids"][row].tolist() == alone
    stop = answer["token_ids"][0, 6]
    stopped = lm.generate(
        {"token_ids": ids[:1], "padding_mask": mask[:1]}, stop_token_ids=(int(stop),)
    )
    assert stopped["padding_mask"][0].sum() <= 7


def test_full_rows_of_arrays_stay_as_they_are():
    lm = shared_lm()
    ids = np.array([PROMPTS[0][:7], [*PROMPTS[1], 0, 0]])
    mask = ids > 0
    mask[0] = True
    answer = lm.generate({"token_ids": ids, "padding_mask": mask})
    assert answer["token_ids"][0].tolist() == PROMPTS[0][:7]
    assert answer["token_ids"][1].tolist() == lm.generate(PROMPTS[1], max_length=7)
    full = {"token_ids": ids[:1], "padding_mask": mask[:1]}
    assert lm.generate(full)["token_ids"].tolist() == ids[:1].tolist()


def test_numbers_of_any_kind():
    lm = make_lm(num_layers=1)
    expected = lm.generate([1, 2], max_new_tokens=3, seed=5)
    assert expected == lm.generate(
        [np.int64(1), np.int32(2)],
        max_new_tokens=np.int64(3),
        seed=np.uint8(5),
        stop_token_ids=np.array([100]),
    )
    assert len(lm.generate([1, 2], max_length=9, max_new_tokens=2**63)) == 9
    assert lm.generate([1, 2], max_new_tokens=3, seed=-1, sampler="random")


def test_seeds():
    lm = shared_lm()

    def answer(seed):
        sampler = samplers.top_p(0.95, temperature=0.9)
        return lm.generate(PROMPTS[0], max_new_tokens=23, sampler=sampler, seed=seed)

    assert answer(3) == answer(3)
    assert len({tuple(answer(seed)) for seed in range(5)}) == 5
    assert answer(None) != answer(None)
    keras.utils.set_random_seed(11)
    first = answer(None)
    keras.utils.set_random_seed(11)
    assert answer(None) == first


def test_compile_sets_the_default_sampler():
    lm = make_lm()
    greedy = lm.generate(PROMPTS[0], max_new_tokens=19)
    lm.compile(sampler=samplers.random(1.5))
    assert lm.generate(PROMPTS[0], max_new_tokens=19, seed=1) != greedy
    assert lm.generate(PROMPTS[0], max_new_tokens=19, sampler="greedy") == greedy


def test_generation_sees_weights_as_they_are():
    lm = make_lm()
    before = lm.generate(PROMPTS[0], max_new_tokens=11)
    for weight in lm.weights:
        weight.assign(ops.flip(weight, axis=0))
    after = lm.generate(PROMPTS[0], max_new_tokens=11)
    assert after != before
    assert after == greedy_by_rerunning(lm, PROMPTS[0], 11)


def test_keras_hub_samplers():
    hub = pytest.importorskip("keras_hub")
    lm = shared_lm()
    greedy = lm.generate(PROMPTS[:2], max_new_tokens=13)
    sampler = hub.samplers.GreedySampler()
    assert lm.generate(PROMPTS[:2], max_new_tokens=13, sampler=sampler) == greedy
    sampler = hub.samplers.TopKSampler(k=7, seed=2)
    first = lm.generate(PROMPTS[0], max_new_tokens=13, sampler=sampler, seed=4)
    assert first == lm.generate(PROMPTS[0], max_new_tokens=13, sampler=sampler, seed=4)
    with pytest.raises(ValueError, match="BeamSampler"):
        lm.generate(PROMPTS[0], sampler=hub.samplers.BeamSampler())


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(inputs=[]), ValueError, "at least one prompt"),
        (dict(inputs=[[]]), ValueError, "empty prompt"),
        (dict(inputs=[[1], []]), ValueError, "empty prompt"),
        (dict(inputs=[1, 101]), ValueError, "vocabulary size, 101. Received: 101"),
        (dict(inputs=[-1, 2]), ValueError, "Received: -1"),
        (dict(inputs=[1.5, 2.0]), TypeError, "Received a row of type float"),
        (dict(inputs=[[1.5, 2.0]]), TypeError, "integer token ids"),
        (dict(inputs=7), TypeError, "Received: int"),
        (dict(inputs="hello"), ValueError, "there is a tokenizer"),
        (dict(inputs=["a", [1]]), TypeError, "all strings or all rows"),
        (dict(inputs={"token_ids": [[1]]}), ValueError, "'padding_mask'"),
        (
            dict(inputs={"token_ids": [[1, 2]], "padding_mask": [[1]]}),
            ValueError,
            "one shape",
        ),
        (
            dict(inputs={"token_ids": [[1, 2]], "padding_mask": [[0, 1]]}),
            ValueError,
            "padded on the right",
        ),
        (
            dict(inputs={"token_ids": [[1, 2]], "padding_mask": [[0, 0]]}),
            ValueError,
            "empty prompt",
        ),
        (dict(max_new_tokens=0), ValueError, "`max_new_tokens` must be positive.*0"),
        (dict(max_new_tokens=-3), ValueError, "Received: -3"),
        (dict(max_new_tokens=2.5), TypeError, "`max_new_tokens` must be an integer"),
        (dict(max_length=3), ValueError, "`max_length` counts the prompt too"),
        (dict(max_length=0), ValueError, "`max_length` must be positive"),
        (dict(sampler="beam"), ValueError, "`sampler` must be one of.*'beam'"),
        (dict(sampler=3), TypeError, "`sampler`"),
        (dict(seed=1.5), TypeError, "`seed` must be an integer"),
        (dict(stop_token_ids="end"), TypeError, "`stop_token_ids`"),
        (dict(stop_token_ids=[1.5]), TypeError, "`stop_token_ids`"),
        (dict(stop_token_ids=2.0), TypeError, "`stop_token_ids`"),
        (dict(stop_token_ids=[2**40]), TypeError, "`stop_token_ids`"),
        (
            dict(sampler=lambda logits, seed: logits),
            ValueError,
            "`sampler` must give one token id a row",
        ),
        (dict(inputs=list(range(100)) * 7), ValueError, "context of 613 tokens"),
        (dict(cache="int2"), ValueError, "`cache` must be one of.*'int2'"),
        (dict(cache=np.ones(3)), ValueError, "`cache` must be one of.*array"),
        (dict(cache={"kinds": "static"}), ValueError, "`cache` may have.*'kinds'"),
    ],
)
def test_bad_input_is_refused_by_name(arguments, error, message):
    lm = make_lm(num_layers=1)
    with pytest.raises(error, match=message):
        lm.generate(**{"inputs": [1, 2, 3], **arguments})
    with pytest.raises(error, match=message):
        list(lm.stream(**{"inputs": [1, 2, 3], **arguments}))


def test_models_without_limits_need_one():
    lm = make_lm(num_layers=1)
    endless = Generator(
        lm,
        lambda ids, cache, index: lm.call_with_cache(ids, cache, index)[::2],
        lm.init_cache,
    )
    with pytest.raises(ValueError, match="`max_length` or `max_new_tokens`"):
        endless.generate([1, 2])
    assert endless.generate([1, 2], max_new_tokens=5) == lm.generate(
        [1, 2], max_new_tokens=5
    )


class Letters:
    """A tokenizer whose ids are a text's code points, less `first`."""

    stop_token_ids = ()

    def __init__(self, first):
        self.first = ord(first)

    def encode(self, text):
        return [ord(letter) - self.first for letter in text.strip()]

    def decode(self, ids):
        return "".join(chr(token + self.first) for token in ids)


def test_the_tokenizer_that_a_model_has_now_counts():
    lm = make_lm("gpt2")
    lm.compile()
    for first in "0A":
        lm.tokenizer = Letters(first)
        ids = lm.tokenizer.encode("GO")
        right = lm.tokenizer.decode(lm.generate(ids, max_new_tokens=7))
        assert lm.generate("GO", max_new_tokens=7) == right
        assert "GO" + "".join(lm.stream("GO", max_new_tokens=7)) == right
    lm.tokenizer = None
    with pytest.raises(ValueError, match="set the model's `tokenizer`"):
        lm.generate("GO", max_new_tokens=7)


def test_a_text_must_have_ids_that_the_model_knows():
    lm = make_lm("gpt2", tokenizer=Letters("0"))
    with pytest.raises(ValueError, match="size, 101. Received: 185, of 'dé'"):
        lm.generate("dé", max_new_tokens=3)
    with pytest.raises(ValueError, match="gives no ids for. Received: ' '"):
        lm.generate(" ", max_new_tokens=3)
