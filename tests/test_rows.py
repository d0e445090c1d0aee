"""Rows of generation: taken out, put elsewhere or saved, they go on as if alone."""

import functools
import json
import os
import subprocess
import sys
from dataclasses import replace

import jax
import keras
import numpy as np
import pytest
from conftest import make_lm, shared_lm
from keras import ops

from keras_kvcache import EncoderDecoderLM, samplers
from keras_kvcache.caches import (
    Rolling,
    RollingCache,
    insert_rows,
    join_rows,
    load_caches,
    reset_rows,
    save_caches,
    take_rows,
)
from keras_kvcache.generation import (
    NO_TOKEN,
    StepFunctions,
    extend,
    load_rows,
    save_rows,
)

RNG = np.random.default_rng(11)
PROMPTS = [RNG.integers(0, 101, n).tolist() for n in (23, 5, 37)]
OTHERS = [RNG.integers(0, 101, n).tolist() for n in (13, 2)]

CACHES = {
    "static": None,
    "dense": {"layout": "dense"},
    "bfloat16": "bfloat16",
    "int8": "int8",
    "int4": "int4",
    "rolling": Rolling(17),
    "sinks": Rolling(17, sinks=3),
    "rolling_int4": {"kind": Rolling(17), "codec": "int4"},
}


@functools.cache
def small_lm():
    return make_lm(num_layers=1)


def written(rows):
    """Prompt and answer of each row, lists of ids."""
    pairs = zip(np.asarray(rows.tokens), np.asarray(rows.index), strict=True)
    return [tokens[: index + 1].tolist() for tokens, index in pairs]


def new_tokens(tokens):
    return [row[row != NO_TOKEN].tolist() for row in tokens]


def options(name, sampler):
    return dict(max_new_tokens=41, seed=5, sampler=sampler, cache=CACHES[name])


# The others show their codecs and layouts one by one.
SELDOM = ("int4", "rolling_int4", "bfloat16", "dense")
CASES = [
    pytest.param(name, "random", marks=[pytest.mark.slow] * (name in SELDOM))
    for name in CACHES
] + [("static", None), pytest.param("int4", None, marks=pytest.mark.slow)]


@pytest.mark.parametrize("name, sampler", CASES)
def test_a_row_goes_on_in_another_batch_and_place(name, sampler):
    generator = small_lm().generator
    whole = generator.generate(PROMPTS, **options(name, sampler))
    assert len({*map(tuple, whole)}) == 3
    rows, tokens = generator.decode(
        generator.start(PROMPTS, **options(name, sampler)), 7, sampler
    )
    assert written(rows) == [row[: len(row) - 33] for row in whole]
    taken = take_rows(rows, [1])
    others = generator.start(OTHERS, **{**options(name, sampler), "seed": 6})
    others, _ = generator.decode(others, 3, sampler)
    mixed = insert_rows(others, taken, 1)
    alone, _ = generator.decode(taken, 33, sampler)
    mixed, tokens = generator.decode(mixed, 64, sampler)
    assert written(alone) == [whole[1]]
    assert written(mixed)[1] == whole[1]
    assert new_tokens(tokens)[1] == whole[1][-33:]
    assert np.asarray(mixed.done).all()
    # What was taken out of them changes nothing for the others.
    rows, _ = generator.decode(rows, 64, sampler)
    assert written(rows) == whole


def test_rows_of_two_batches_are_joined_in_any_order():
    generator = small_lm().generator
    arguments = options("static", "random")
    first, second = (
        generator.generate(prompts, **arguments) for prompts in (PROMPTS, OTHERS)
    )
    started = [generator.start(prompts, **arguments) for prompts in (PROMPTS, OTHERS)]
    started[0], _ = generator.decode(started[0], 11, "random")
    rows = take_rows(join_rows(started), [4, 2, 0, 3, 1])
    rows, _ = generator.decode(rows, 64, "random")
    both = first + second
    assert written(rows) == [both[row] for row in (4, 2, 0, 3, 1)]


@pytest.mark.jax_only
def test_functions_and_draws_of_ones_own_do_not_see_a_rows_place():
    def draw(logits, seed):
        assert tuple(logits.shape) == (1, 101) and tuple(seed.shape) == (2,)
        return samplers.categorical(logits, seed)

    generator = small_lm().generator
    for sampler in (draw, samplers.chain((samplers.keep_top_k, 7), draw=draw)):
        sampler = samplers.get(sampler)
        arguments = {**options("static", sampler), "max_new_tokens": 13}
        whole = generator.generate(PROMPTS, **arguments)
        rows = take_rows(generator.start(PROMPTS, **arguments), [2, 0])
        rows, _ = generator.decode(rows, 64, sampler)
        assert written(rows) == [whole[2], whole[0]]


SCRIPT = """
import json, sys
import numpy as np
from keras_kvcache import DecoderLM
from keras_kvcache.generation import load_rows
folder, names = sys.argv[1], json.loads(sys.argv[2])
lm, answers = DecoderLM.from_preset(folder + "/lm"), {}
for name in names:
    rows = load_rows(f"{folder}/{name}", lm)
    rows, _ = lm.generator.decode(rows, 64, "random")
    (tokens,), (index,) = np.asarray(rows.tokens), np.asarray(rows.index)
    answers[name] = tokens[: index + 1].tolist()
print(json.dumps(answers))
"""


def test_a_row_goes_on_in_a_new_process(tmp_path):
    lm = small_lm()
    lm.save_to_preset(tmp_path / "lm")
    expected = {}
    for name in CACHES:
        expected[name] = lm.generate(PROMPTS, **options(name, "random"))[2]
        rows = lm.generator.start(PROMPTS, **options(name, "random"))
        rows, _ = lm.generator.decode(rows, 9, "random")
        save_rows(tmp_path / name, take_rows(rows, [2]), lm)
    arguments = [str(tmp_path), json.dumps(list(CACHES))]
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        env={**os.environ},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == expected


def test_files_of_rows_and_of_caches_are_told_apart(tmp_path):
    lm = small_lm()
    rows = lm.generator.start(PROMPTS, max_new_tokens=5)
    save_rows(tmp_path / "rows", rows, lm)
    with pytest.raises(
        ValueError, match="must hold caches.*Received: a file of 'rows'"
    ):
        load_caches(tmp_path / "rows")
    with pytest.raises(ValueError, match="`model` must be the one"):
        load_rows(tmp_path / "rows", make_lm("gpt2", num_layers=1))
    save_caches(tmp_path / "caches", rows.cache, 23, lm)
    with pytest.raises(ValueError, match="must hold rows, as `load_rows`"):
        load_rows(tmp_path / "caches", lm)
    with pytest.raises(TypeError, match="`rows` must be `Rows`. Received: tuple"):
        save_rows(tmp_path / "rows", rows.cache, lm)
    assert written(load_rows(tmp_path / "rows", lm)) == written(rows)


@pytest.mark.jax_only
@pytest.mark.parametrize("codec", ["bfloat16", "float16"])
def test_models_and_generators_make_one_kind_of_cache(codec, tmp_path):
    """On a CPU, too, where narrow floats are held as bits; and files have it."""
    import jax

    lm = small_lm()
    made = [
        lm.init_cache(2, 61, codec=codec),
        lm.generator.init_cache(2, 61, codec=codec),
    ]
    save_caches(tmp_path / "caches", made[1], 7)
    made.append(load_caches(tmp_path / "caches")[0])
    forms = [jax.tree_util.tree_structure(tree) for tree in made]
    assert forms[0] == forms[1] == forms[2]


EXTENDED = [("llama", "head_major"), ("llama", "dense"), ("windowed", "head_major")]


@pytest.mark.parametrize("kind, layout", EXTENDED)
@pytest.mark.parametrize("sizes", [(11, 5), (1, 3)])
def test_extend_in_pieces_gives_the_logits_of_one_pass(kind, layout, sizes):
    """Rows begin at different places, and some bring nothing now and then."""
    lm, lengths = shared_lm(kind), np.array([29, 17, 23])
    texts = RNG.integers(0, 101, (3, 29))
    expected = ops.convert_to_numpy(lm(texts))
    functions = StepFunctions(lm.hidden_with_cache, lm.logits)
    cache, index = lm.init_cache(3, 61, layout=layout), np.zeros(3, "int32")
    assert isinstance(cache[0], RollingCache) == (kind == "windowed")
    seen = np.zeros((3, 29), bool)
    for call in range(100):
        size = sizes[call % 2]
        counts = np.minimum(RNG.integers(0, size + 1, 3), lengths - index)
        token_ids = np.full((3, size), 77, "int32")
        for row, count in enumerate(counts):
            token_ids[row, :count] = texts[row, index[row] :][:count]
        tensors = map(ops.convert_to_tensor, (token_ids, index, counts.astype("int32")))
        cache, logits = extend(functions, cache, *tensors)
        index = (index + counts).astype("int32")
        for row in np.flatnonzero(counts):
            seen[row, index[row] - 1] = True
            right = expected[row, index[row] - 1]
            close = ops.convert_to_numpy(logits)[row]
            scale = 1e-5 * abs(expected).max()
            np.testing.assert_allclose(close, right, rtol=1e-5, atol=scale)
        if (index == lengths).all():
            break
    assert (index == lengths).all() and len({*seen.sum(axis=1)}) > 1


class NoRepeats:
    """Takes the likeliest token that a row doesn't have yet, its prompt included."""

    def start(self, rows):
        tokens = np.asarray(rows.tokens)
        return {"seen": (tokens[:, :, None] == np.arange(101)).any(axis=1)}

    def __call__(self, logits, state, key):
        logits = ops.where(state["seen"], -np.inf, ops.cast(logits, "float32"))
        ids = ops.argmax(logits, axis=-1)
        taken = ops.equal(ids[:, None], ops.arange(101)[None, :])
        return ids, {"seen": ops.logical_or(state["seen"], taken)}


def no_repeats_by_rerunning(lm, prompt, count):
    ids = list(prompt)
    for _ in range(count):
        padded = np.zeros((1, 97), "int32")
        padded[0, : len(ids)] = ids
        logits = np.array(ops.convert_to_numpy(lm(padded))[0, len(ids) - 1])
        logits[ids] = -np.inf
        ids.append(int(logits.argmax()))
    return ids


def test_a_sampler_with_state_sees_the_prompt_and_moves_with_its_row(tmp_path):
    lm, sampler = small_lm(), samplers.get(NoRepeats())
    prompts = [[3, 1, 4], [1, 5, 9, 2, 6]]
    expected = [no_repeats_by_rerunning(lm, prompt, 29) for prompt in prompts]
    assert expected != [lm.generate(prompt, max_new_tokens=29) for prompt in prompts]
    arguments = dict(max_new_tokens=29, sampler=sampler)
    assert lm.generate(prompts, **arguments) == expected
    rows, _ = lm.generator.decode(lm.generator.start(prompts, **arguments), 6, sampler)
    save_rows(tmp_path / "rows", take_rows(rows, [1, 0]))
    rows = load_rows(tmp_path / "rows")
    rows, _ = lm.generator.decode(rows, 64, sampler)
    assert written(rows) == expected[::-1]


class Beams:
    """Beam search over the rows of one prompt, which all have the same tokens."""

    moves_rows = True

    def start(self, rows):
        count = rows.index.shape[0]
        return np.array([0.0] + [-1e9] * (count - 1), "float32")

    def __call__(self, logits, state, key):
        count, vocabulary = logits.shape
        scores = ops.log_softmax(ops.cast(logits, "float32")) + state[:, None]
        best, places = ops.top_k(ops.reshape(scores, (-1,)), count)
        places = ops.cast(places, "int32")
        return places % vocabulary, best, places // vocabulary


def beams_by_rerunning(lm, prompt, beams, count):
    held = [(0.0, list(prompt))]
    for _ in range(count):
        padded = np.zeros((len(held), 61), "int32")
        for row, (_, ids) in enumerate(held):
            padded[row, : len(ids)] = ids
        logits = ops.convert_to_numpy(lm(padded)).astype("float64")
        longer = []
        for (score, ids), row in zip(held, logits[:, len(held[0][1]) - 1], strict=True):
            row = row - row.max()
            row = row - np.log(np.exp(row).sum())
            longer += [(score + row[token], [*ids, token]) for token in range(101)]
        held = sorted(longer, key=lambda pair: -pair[0])[:beams]
    return [ids for _, ids in held]


# The longer prompt runs in two chunks.
@pytest.mark.parametrize(
    "name, length", [("static", 5), ("static", 37), ("int8", 5), ("rolling", 5)]
)
def test_a_sampler_with_parents_reorders_rows(name, length):
    """All that a row has read goes with it: cache, tokens and index."""
    lm = make_lm(num_layers=1)
    sampler, prompt = samplers.get(Beams()), [3, 1, 4, 1, 5, *range(7, 39)][:length]
    cache = {"static": None, "int8": "int8", "rolling": Rolling(31)}[name]
    arguments = dict(max_new_tokens=13, sampler=sampler, cache=cache)
    rows = lm.generator.start([prompt] * 3, **arguments)
    rows, _ = lm.generator.decode(rows, 64, sampler)
    answers = written(rows)
    assert len({*map(tuple, answers)}) == 3
    assert lm.generate([prompt] * 3, **arguments) == answers
    with pytest.raises(ValueError, match="`sampler` must leave rows in their places"):
        lm.stream([prompt] * 3, **arguments)
    if name == "int8":
        # What was read of these tokens alone; steps and chunks round alike.
        ids = np.array(answers)[:, :-1]
        _, _, expected = lm.call_with_cache(ids, lm.init_cache(3, 64, codec="int8"), 0)
        pairs = zip(rows.cache, expected, strict=True)
        for caches in pairs:
            held, fresh = (
                ops.convert_to_numpy(cache.to_dense())[:, :, : ids.shape[1]]
                for cache in caches
            )
            np.testing.assert_allclose(held, fresh, rtol=0, atol=0.05)
    else:
        assert answers == beams_by_rerunning(lm, prompt, 3, 13)
        # To search is worth it here.
        if length == 5:
            assert answers[0] != lm.generate(prompt, max_new_tokens=13)


@pytest.mark.parametrize("state", [[], (), {}, {"a": [np.ones(2, "float32")]}], ids=str)
def test_states_come_back_as_they_were(state, tmp_path):
    rows = small_lm().generator.start([[3, 1], [4, 1]], max_new_tokens=5)
    rows = replace(rows, sampler=state)
    save_rows(tmp_path / "rows", rows)
    loaded = load_rows(tmp_path / "rows").sampler
    jax.tree_util.tree_map(np.testing.assert_array_equal, loaded, state)


def test_states_that_files_can_not_hold_are_refused(tmp_path):
    rows = small_lm().generator.start([[3, 1], [4, 1]], max_new_tokens=5)
    rows = replace(rows, sampler={0: np.arange(2)})
    with pytest.raises(TypeError, match=r"must be strings.*Received: \[0\]"):
        save_rows(tmp_path / "rows", rows)
    assert not (tmp_path / "rows").exists()


def test_a_search_ends_rows_itself():
    """By `NO_TOKEN`: the row keeps what it has, and the others go on."""

    class Ending(Beams):
        def start(self, rows):
            return np.zeros(rows.index.shape[0], "int32")

        def __call__(self, logits, state, key):
            places = ops.arange(3, dtype="int32")
            is_over = ops.logical_and(places == 1, state >= 4)
            ids = ops.where(is_over, NO_TOKEN, ops.cast(ops.argmax(logits, 1), "int32"))
            return ids, state + 1, places

    lm, prompts = small_lm(), [[3, 1, 4], [1, 5], [9, 2]]
    expected = [lm.generate(prompt, max_new_tokens=9) for prompt in prompts]
    expected[1] = expected[1][:6]
    assert lm.generate(prompts, max_new_tokens=9, sampler=Ending()) == expected


def test_parents_are_announced():
    class Undeclared(Beams):
        moves_rows = False

    with pytest.raises(ValueError, match="`moves_rows`.*3 values.*=False"):
        small_lm().generate([[3, 1]] * 3, max_new_tokens=2, sampler=Undeclared())


@pytest.mark.parametrize("verb", ["join", "insert"])
def test_rows_of_different_capacities_are_refused_by_name(verb):
    generator = small_lm().generator
    small, large = (
        generator.start([[3, 1, 4]], max_new_tokens=count) for count in (5, 300)
    )
    with pytest.raises(ValueError, match="same capacity.*Received: 512 slots for 256"):
        join_rows([small, large]) if verb == "join" else insert_rows(small, large, 0)


def test_rows_of_different_capacities_are_resized_and_joined():
    generator, prompts = small_lm().generator, [[3, 1, 4], [1, 5]]
    whole = [
        small_lm().generate(prompt, max_new_tokens=count)
        for prompt, count in zip(prompts, (5, 300), strict=True)
    ]
    small, large = (
        generator.start([prompt], max_new_tokens=count)
        for prompt, count in zip(prompts, (5, 300), strict=True)
    )
    rows = join_rows([generator.resize(small, 512), large])
    rows, _ = generator.decode(rows, 299)
    assert written(rows) == whole
    with pytest.raises(ValueError, match="capacity=256"):
        generator.resize(rows, 256)  # 302 tokens are there


def test_rows_that_end_by_other_ids_are_refused_by_name():
    few, many = (
        small_lm().generator.start([[3, 1]], max_new_tokens=5, stop_token_ids=range(n))
        for n in (2, 9)
    )
    with pytest.raises(ValueError, match="stop_token_ids of shape"):
        join_rows([few, many])


def test_rows_go_on_with_the_sampler_that_they_began_with():
    generator = small_lm().generator
    plain = generator.start([[3, 1]], max_new_tokens=5)
    with pytest.raises(ValueError, match="`sampler` must be the one.*began"):
        generator.decode(plain, 2, sampler=NoRepeats())
    rows = generator.start([[3, 1]], max_new_tokens=5, sampler=NoRepeats())
    with pytest.raises(ValueError, match="`sampler` must be the one.*began"):
        generator.decode(rows, 2)


def test_a_state_may_have_an_array_twice():
    class Twice(NoRepeats):
        def start(self, rows):
            seen = ops.convert_to_tensor(super().start(rows)["seen"])
            return {"seen": seen, "same": seen}

        def __call__(self, logits, state, key):
            ids, other = super().__call__(logits, state, key)
            return ids, {**state, **other}

    answers = (
        small_lm().generate([[3, 1]], max_new_tokens=9, sampler=sampler)
        for sampler in (NoRepeats(), Twice())
    )
    assert next(answers) == next(answers)


def test_a_generator_extends_by_lists():
    lm = small_lm()
    cache, logits = lm.generator.extend(lm.init_cache(2, 61), [[3, 1], [4, 1]], [0, 0])
    right = ops.convert_to_numpy(lm(np.array([[3, 1], [4, 1]])))[:, -1]
    np.testing.assert_allclose(ops.convert_to_numpy(logits), right, atol=1e-5)


def test_a_row_that_was_emptied_is_over():
    generator = small_lm().generator
    rows = generator.start([[3, 1, 4], [1, 5]], **options("static", "random"))
    rows, tokens = generator.decode(reset_rows(rows, [0]), 3, "random")
    assert new_tokens(tokens)[0] == [] and len(new_tokens(tokens)[1]) == 3
    assert np.asarray(rows.done).tolist() == [True, False]


@pytest.mark.parametrize(
    "cache", ["float32", "bfloat16", pytest.param("int4", marks=pytest.mark.slow)]
)
def test_rows_of_an_encoder_decoder_take_what_was_encoded_along(cache, tmp_path):
    keras.utils.set_random_seed(3)
    sound = keras.Input((None, 7), name="encoder_sound")
    encoder = keras.Model({"encoder_sound": sound}, keras.layers.Dense(19)(sound))
    lm = EncoderDecoderLM(encoder, 101, 1, 6, 48, 59, max_sequence_length=613)
    for weight in lm.weights:  # large enough for varied answers
        if len(weight.shape) > 1:
            weight.assign(RNG.normal(0, 0.4, weight.shape))
    inputs = {
        "encoder_sound": RNG.normal(size=(3, 41, 7)).astype("float32"),
        "decoder_token_ids": [[3, 1, 4], [1, 5, 9, 2], [6]],
    }
    arguments = dict(max_new_tokens=31, cache=cache, sampler="random", seed=3)
    whole = lm.generate(inputs, **arguments)
    rows, _ = lm.generator.decode(lm.start(inputs, **arguments), 5, "random")
    save_rows(tmp_path / "rows", take_rows(rows, [2, 0]), lm)
    taken, _ = lm.generator.decode(load_rows(tmp_path / "rows", lm), 64, "random")
    assert written(taken) == [whole[2], whole[0]]
    assert whole[0][3:] != whole[2][1:]


def test_steps_are_refused_unless_positive():
    generator = small_lm().generator
    rows = generator.start(PROMPTS, max_new_tokens=5)
    for steps in (0, 2.5):
        with pytest.raises(ValueError, match="`steps` must be a positive integer"):
            generator.decode(rows, steps)
