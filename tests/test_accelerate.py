"""keras-hub's own objects, decoding through this package."""

import jax
import keras
import numpy as np
import pytest
from hub_cases import (
    hub,
    hub_generate,
    make_hub_lm,
    make_reader,
    prompts,
    shared_hub_lm,
)
from keras import ops

from keras_kvcache import accelerate
from keras_kvcache.samplers.hub_draws import stepwise_sampler

# Each way of sampling has programs of keras-hub's and of ours to compile.
pytestmark = pytest.mark.slow

hub_samplers = hub.samplers
INPUTS = prompts([9, 17], width=41)


def generate(lm, inputs=INPUTS, stop_token_ids=None):
    return lm.generate(dict(inputs), stop_token_ids=stop_token_ids)


def new_tokens(answer, inputs=INPUTS):
    return answer["token_ids"][~inputs["padding_mask"]]


def check_same(ours, theirs):
    """Equal wherever an answer is; keras-hub goes on past a row's end."""
    mask = theirs["padding_mask"]
    np.testing.assert_array_equal(ours["padding_mask"], mask)
    np.testing.assert_array_equal(ours["token_ids"][mask], theirs["token_ids"][mask])


@pytest.fixture
def llama():
    """A model that compiles once; its sampler and its decoding are put back."""
    lm = shared_hub_lm("llama")
    yield lm
    lm.compile(sampler="greedy")
    assert "make_generate_function" not in vars(lm)


@pytest.mark.parametrize(
    "make",
    [
        hub_samplers.GreedySampler,
        lambda: hub_samplers.BeamSampler(num_beams=3),
        lambda: hub_samplers.ContrastiveSampler(k=3, alpha=0.3),
    ],
    ids=["greedy", "beam", "contrastive"],
)
def test_same_tokens(llama, make):
    llama.compile(sampler=make())
    whole = generate(llama)
    stop_token_ids = tuple(whole["token_ids"][[0, 1], [23, 31]].tolist())
    ended = generate(llama, stop_token_ids=stop_token_ids)
    assert not ended["padding_mask"].all()
    with accelerate(llama):
        check_same(generate(llama), whole)
        check_same(generate(llama, stop_token_ids=stop_token_ids), ended)


@pytest.mark.parametrize("case", ["gpt2", "mistral"])
def test_same_beams_past_a_window(case):
    lm = make_hub_lm(case)
    lm.compile(sampler=hub_samplers.BeamSampler(num_beams=2))
    theirs = hub_generate(lm, INPUTS)
    with accelerate(lm):
        check_same(hub_generate(lm, INPUTS), theirs)


# A prompt of one token; a row that others reach; prompts read in two chunks.
@pytest.mark.parametrize(
    "lengths, width", [([1, 6], 19), ([11, 23, 7], 29), ([39, 37], 47)], ids=str
)
def test_same_beams_of_ragged_prompts(llama, lengths, width):
    llama.compile(sampler=hub_samplers.BeamSampler(num_beams=3, temperature=0.7))
    inputs = prompts(lengths, width)
    whole = generate(llama, inputs)
    # Not in the same step of all rows; one of them may be over at once.
    columns = np.minimum(np.array(lengths) + [3, 9, 5][: len(lengths)], width - 1)
    stops = [(int(i),) for i in whole["token_ids"][range(len(lengths)), columns]]
    stops += [sum(stops, ()), (int(inputs["token_ids"][0, -1]),)]
    expected = [generate(llama, inputs, ids) for ids in stops]
    assert len({answer["token_ids"].tobytes() for answer in expected}) > 1
    with accelerate(llama):
        check_same(generate(llama, inputs), whole)
        for ids, answer in zip(stops, expected, strict=True):
            ours = generate(llama, inputs, ids)
            check_same(ours, answer)
            # What stands past a row's end, the prompt's padding included, too.
            np.testing.assert_array_equal(ours["token_ids"], answer["token_ids"])


@pytest.mark.jax_only
def test_beams_run_in_our_loop_compiled_once(llama, monkeypatch):
    programs = []

    def count(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            programs.append(event)

    def refuse(*_, **__):
        raise AssertionError("keras-hub's own loop")

    llama.compile(sampler=hub_samplers.BeamSampler(num_beams=3))
    monkeypatch.setattr(hub_samplers.Sampler, "run_loop", refuse)
    with pytest.raises(AssertionError, match="keras-hub's own loop"):
        generate(llama)
    with accelerate(llama):
        generate(llama)
        jax.monitoring.register_event_duration_secs_listener(count)
        try:
            generate(llama, prompts([9, 19], width=41))
            generate(llama, prompts([31, 5], width=41), (3, 7))
            assert not programs
            generate(llama, prompts([9, 17, 5], width=41))
            assert programs
        finally:
            jax.monitoring.unregister_event_duration_listener(count)


def test_all_beams_have_no_place_in_an_answer(llama):
    llama.compile(sampler=hub_samplers.BeamSampler(3, return_all_beams=True))
    with pytest.raises(Exception, match="tuple|dimensions|a list containing"):
        generate(llama)
    with accelerate(llama), pytest.raises(TypeError, match="`sampler`.*all_beams=True"):
        generate(llama)


def test_a_search_of_ones_own(llama):
    """Its loop isn't known here, so it calls our steps."""

    class EveryOther(hub_samplers.Sampler):
        def __call__(self, next, prompt, cache, index, mask, **_):
            # The likeliest token at odd places, the likeliest but one at even ones.
            for place in range(17, prompt.shape[1]):
                logits, _, cache = next(prompt, cache, place)
                ids = ops.cast(ops.argsort(-logits)[:, place % 2], prompt.dtype)
                prompt = ops.slice_update(prompt, (0, place), ids[:, None])
            return prompt

    inputs = prompts([17, 17], width=23)
    llama.compile(sampler=EveryOther())
    theirs = generate(llama, inputs)
    with accelerate(llama):
        check_same(generate(llama, inputs), theirs)


@pytest.mark.parametrize(
    "sampler",
    [
        hub_samplers.TopKSampler(k=1),
        hub_samplers.TopPSampler(p=1e-4),
        hub_samplers.TopPSampler(p=1e-4, k=3),
        hub_samplers.TopPSampler(p=0.0),
        hub_samplers.RandomSampler(temperature=1e-4),
    ],
    ids=["top_k", "top_p", "top_p_of_k", "top_p_0", "cold"],
)
def test_one_token_left_to_draw_is_greedy(llama, sampler):
    with accelerate(llama):
        llama.compile(sampler="greedy")
        expected = generate(llama)["token_ids"]
        llama.compile(sampler=sampler)
        np.testing.assert_array_equal(generate(llama)["token_ids"], expected)


@pytest.mark.parametrize(
    "theirs",
    [
        hub_samplers.RandomSampler(temperature=1.7),
        hub_samplers.TopKSampler(k=5, temperature=0.6),
        hub_samplers.TopPSampler(p=0.8, temperature=1.4),
        hub_samplers.TopPSampler(p=0.8, k=7, temperature=1.4),
    ],
    ids=["random", "top_k", "top_p", "top_p_of_k"],
)
def test_draws_are_distributed_as_keras_hubs(theirs):
    draws = 20011  # so that a frequency is within 0.02 of its probability
    logits = 2 * np.random.default_rng(5).normal(size=13).astype("float32")
    logits = ops.convert_to_tensor(np.tile(logits, (draws, 1)))
    expected = theirs.get_next_token(theirs.compute_probabilities(logits))
    ours = stepwise_sampler(theirs)(logits, np.array([3, 5], "uint32"))
    frequencies = [
        np.bincount(ops.convert_to_numpy(tokens), minlength=13) / draws
        for tokens in (ours, expected)
    ]
    np.testing.assert_array_equal(*(f > 0 for f in frequencies))
    np.testing.assert_allclose(*frequencies, rtol=0, atol=0.02)


@pytest.mark.parametrize(
    "make",
    [
        lambda seed: hub_samplers.TopKSampler(k=4, seed=seed),
        lambda seed: hub_samplers.TopPSampler(p=0.9, k=4, seed=seed),
    ],
    ids=["top_k", "top_p_of_k"],
)
def test_draws(llama, make):
    """From the likeliest four, by a seed that moves on, as keras-hub's does."""
    answers = []
    with accelerate(llama):
        for seed in (3, 3, 4):
            llama.compile(sampler=make(seed))
            answers.append([new_tokens(generate(llama)) for _ in range(2)])
        answer = generate(llama)
    (first, second), again, (other, _) = answers
    np.testing.assert_array_equal(again, [first, second])
    assert (first != second).any() and (first != other).any()
    logits = ops.convert_to_numpy(
        llama({**answer, "padding_mask": answer["padding_mask"]})
    )
    likeliest = np.argsort(-logits, axis=-1)[:, :-1, :4]
    drawn = (likeliest == answer["token_ids"][:, 1:, None]).any(-1)
    assert drawn[~INPUTS["padding_mask"][:, 1:]].all()


def test_a_sampler_of_ones_own(llama):
    class Unlikeliest(hub_samplers.Sampler):
        def get_next_token(self, probabilities):
            return ops.argmin(probabilities, axis=-1)

    llama.compile(sampler=Unlikeliest())
    theirs = generate(llama)
    with accelerate(llama):
        check_same(generate(llama), theirs)


def test_samplers_change_while_accelerated(llama):
    with accelerate(llama):
        for sampler in ("greedy", "beam", "top_k", "beam", "greedy"):
            llama.compile(sampler=sampler)
            answer = generate(llama)
            assert answer["padding_mask"].all()
        accelerated = answer
    check_same(accelerated, generate(llama))


@pytest.fixture(scope="module")
def reader():
    return make_reader()


@pytest.mark.parametrize("sampler", ["greedy", "beam"])
def test_text(reader, sampler):
    reader.compile(sampler=sampler)
    calls = [
        dict(inputs=["some words", "go on"]),
        dict(inputs=["some words", "go on"], strip_prompt=True),
        dict(inputs="go on", max_length=23, stop_token_ids=(3, 17)),
        dict(inputs="go on", max_length=23, stop_token_ids=None),
    ]
    theirs = [reader.generate(**call) for call in calls]
    with accelerate(reader):
        assert [reader.generate(**call) for call in calls] == theirs


def test_datasets(llama):
    tf = pytest.importorskip("tensorflow")
    batches = tf.data.Dataset.from_tensor_slices(dict(INPUTS)).batch(1)
    with accelerate(llama):
        check_same(llama.generate(batches, stop_token_ids=None), generate(llama))


def test_restores(llama):
    kind, before = type(llama), set(vars(llama))
    acceleration = accelerate(llama)
    assert type(llama) is kind
    assert accelerate(llama) is acceleration
    acceleration.restore()
    acceleration.restore()
    assert set(vars(llama)) == before
    assert llama.make_generate_function.__func__ is kind.make_generate_function
    with pytest.raises(ZeroDivisionError), accelerate(llama) as inner:
        acceleration.restore()  # not its own any more
        assert accelerate(llama) is inner
        raise ZeroDivisionError
    assert set(vars(llama)) == before


def test_blocks_within_each_other(llama):
    with accelerate(llama) as outer:
        with accelerate(llama) as inner:
            assert inner is outer
        assert accelerate(llama) is outer
        outer.restore()
        with outer:
            assert accelerate(llama) is outer
    assert "generate_step" not in vars(llama)
    with outer:
        assert accelerate(llama) is outer


def test_what_changes_the_model_is_seen(tmp_path):
    """Training, LoRA, quantization and loading, without accelerating anew."""
    lm = make_hub_lm("qwen3", num_layers=1)
    lm.save_weights(tmp_path / "first.weights.h5")
    accelerate(lm)

    def check():
        accelerated = generate(lm)
        accelerate(lm).restore()
        check_same(accelerated, generate(lm))
        accelerate(lm)
        return new_tokens(accelerated)

    tokens = [check()]
    inputs = {"token_ids": INPUTS["token_ids"], "padding_mask": INPUTS["padding_mask"]}
    lm.compile(optimizer=keras.optimizers.Adam(0.03), sampler="greedy")
    lm.fit(inputs, np.roll(INPUTS["token_ids"], -1, 1), verbose=0)
    tokens.append(check())
    lm.load_weights(tmp_path / "first.weights.h5")
    np.testing.assert_array_equal(check(), tokens[0])
    lm.backbone.enable_lora(3)
    for weight in lm.backbone.trainable_weights:
        weight.assign(ops.convert_to_numpy(weight) + 0.1)
    tokens.append(check())
    for earlier, later in zip(tokens, tokens[1:], strict=False):
        assert (earlier != later).any()


@pytest.mark.parametrize("case, mode", [("gpt2", "int4"), ("gemma", "int8")])
def test_quantized_while_accelerated(case, mode):
    lm = make_hub_lm(case, num_layers=1)
    acceleration = accelerate(lm)
    exact = generate(lm)
    lm.quantize(mode)
    before = generate(lm)
    if mode == "int4":
        # Not one near tie that came out otherwise: int4 says something else.
        assert (new_tokens(before) != new_tokens(exact)).mean() > 0.3
    acceleration.restore()
    theirs = generate(lm)
    check_same(before, theirs)
    with accelerate(lm) as again:
        assert again is not acceleration
        check_same(generate(lm), theirs)


def test_lora_that_was_there_before():
    lm = make_hub_lm("llama", num_layers=1)
    exact = generate(lm)
    lm.backbone.enable_lora(3)
    for weight in lm.backbone.trainable_weights:
        weight.assign(ops.convert_to_numpy(weight) + 0.1)
    lm.generate_function = None
    theirs = generate(lm)
    assert (new_tokens(theirs) != new_tokens(exact)).any()
    with accelerate(lm):
        check_same(generate(lm), theirs)


def test_refusals():
    llama, phi3 = shared_hub_lm("llama"), shared_hub_lm("phi3_su")
    with pytest.raises(TypeError, match="`causal_lm`.*CausalLM.*Llama"):
        accelerate(llama.backbone)
    bloom = hub.models.BloomBackbone(11, 1, 2, 8, 16, max_sequence_length=7)
    with pytest.raises(ValueError, match="BloomBackbone"):
        accelerate(hub.models.BloomCausalLM(bloom))
    # Past the length of its pretraining Phi-3's factors don't go together.
    with accelerate(phi3):
        with pytest.raises(ValueError, match="`inputs`.*127 positions.*128"):
            generate(phi3, prompts([9], width=128))
