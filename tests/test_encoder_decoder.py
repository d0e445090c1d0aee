"""Encoder-decoder models: encoded once, projected once, then decoded."""

import functools

import keras
import numpy as np
import pytest
from family_cases import collect
from keras import ops
from program_cases import made

from keras_kvcache import EncoderDecoderLM, accelerate, from_keras_hub, samplers
from keras_kvcache.caches import Rolling
from keras_kvcache.generation import make_program

hub = pytest.importorskip("keras_hub")

CASES = collect("HUB_PAIRS")
BART, WHISPER = CASES["bart"][1], CASES["whisper"][1]
V, MELS = BART["vocabulary_size"], WHISPER["num_mels"]
START = [3, 17, 29]


def randomize(model, kernels=0.1, tokens=0.3, positions=1.0):
    """Weights of such sizes that answers vary."""
    rng = np.random.default_rng(7)
    for weight in model.weights:
        noise, path = rng.normal(size=weight.shape), weight.path
        if path.endswith("embeddings"):
            weight.assign(noise * (positions if "position" in path else tokens))
        elif path.endswith("kernel"):
            weight.assign(kernels * noise)
        else:
            weight.assign(ops.convert_to_numpy(weight) + 0.05 * noise)


def make_bart(**options):
    backbone = hub.models.BartBackbone(**{**BART, **options})
    randomize(backbone)
    lm = hub.models.BartSeq2SeqLM(backbone=backbone, preprocessor=None)
    lm.compile(sampler="greedy")
    return lm


@functools.cache
def bart():
    """One for tests that leave it as it is, so that it compiles once."""
    return make_bart()


@functools.cache
def our_bart():
    return from_keras_hub(bart())


@functools.cache
def whisper():
    backbone = hub.models.WhisperBackbone(**WHISPER)
    randomize(backbone, kernels=0.3, tokens=0.1, positions=0.3)
    return backbone


@functools.cache
def our_whisper():
    return from_keras_hub(whisper())


def tokens(lengths, width, seed):
    """Right-padded ids and their mask."""
    mask = np.arange(width) < np.array(lengths)[:, None]
    ids = np.random.default_rng(seed).integers(3, V, mask.shape)
    return (ids * mask).astype("int32"), mask


def pairs(encoder_lengths, decoder_lengths, encoder_width=41, width=67, seed=11):
    ids, mask = tokens(encoder_lengths, encoder_width, seed)
    decoder_ids, decoder_mask = tokens(decoder_lengths, width, seed + 1)
    return dict(
        encoder_token_ids=ids,
        encoder_padding_mask=mask,
        decoder_token_ids=decoder_ids,
        decoder_padding_mask=decoder_mask,
    )


ONE = pairs([37], [3])
RAGGED = pairs([37, 11, 23], [3, 1, 2])


def features(rows=2, frames=83):
    return np.random.default_rng(5).normal(size=(rows, frames, MELS)).astype("float32")


def numpy(tensor):
    return ops.convert_to_numpy(tensor)


@functools.cache
def hub_decoder(backbone):
    """The backbone as a model that compiles once."""
    return keras.Model(backbone.input, backbone.output["decoder_sequence_output"])


def hub_logits(backbone, inputs):
    hidden = hub_decoder(backbone).predict_on_batch(inputs)
    return hidden @ numpy(backbone.token_embedding.embeddings).T


@functools.cache
def programs(model):
    """The two steps, compiled."""
    encode = make_program(model.encode, model)
    return encode, make_program(model.call_with_cache, model)


def cached_logits(model, inputs):
    """Logits of the decoder's tokens, first three at once, then one by one."""
    encode, step = programs(model)
    ids = inputs["decoder_token_ids"]
    cache = model.init_cache(*ids.shape), encode(inputs=dict(inputs))
    found = []
    for part in np.split(ids, range(3, ids.shape[1]), axis=1):
        index = np.int32(sum(logits.shape[1] for logits in found))
        logits, _, cache = step(token_ids=part, cache=cache, cache_update_index=index)
        found.append(numpy(logits))
    return np.concatenate(found, axis=1)


def check_same(ours, theirs):
    """Equal wherever an answer is; keras-hub goes on past a row's end."""
    mask = theirs["decoder_padding_mask"]
    np.testing.assert_array_equal(ours["decoder_padding_mask"], mask)
    ours, theirs = ours["decoder_token_ids"], theirs["decoder_token_ids"]
    np.testing.assert_array_equal(ours[mask], theirs[mask])


def generate(lm, inputs=RAGGED, stop_token_ids=None):
    return lm.generate(dict(inputs), stop_token_ids=stop_token_ids)


def test_bart_logits():
    inputs = pairs([17, 7, 11], [13] * 3, encoder_width=19, width=13)
    expected = hub_logits(bart().backbone, inputs)
    uncached = our_bart().predict_on_batch(inputs)
    for logits in (uncached, cached_logits(our_bart(), inputs)):
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)
    # The mask makes a difference, and what it hides makes none.
    seen = dict(inputs, encoder_padding_mask=np.ones((3, 19), bool))
    difference = abs(our_bart().predict_on_batch(seen) - expected)
    assert difference[0].max() > 0.1 and difference[1].max() > 0.1
    ids = np.where(inputs["encoder_padding_mask"], inputs["encoder_token_ids"], 5)
    other = cached_logits(our_bart(), dict(inputs, encoder_token_ids=ids))
    np.testing.assert_allclose(other, expected, rtol=0, atol=1e-4)


def test_positions_have_an_end():
    inputs = pairs([37], [114], width=114)
    with pytest.raises(ValueError, match="`decoder_token_ids`.*=113.*114 tokens"):
        our_bart()(inputs)


def test_encode_needs_all_inputs():
    inputs = without(ONE, "encoder_padding_mask")
    with pytest.raises(ValueError, match="`inputs`.*'encoder_padding_mask'.*Received"):
        our_bart().encode(inputs)


def test_whisper_logits():
    ids, mask = tokens([67] * 2, 67, 3)
    inputs = dict(
        encoder_features=features(), decoder_token_ids=ids, decoder_padding_mask=mask
    )
    expected = hub_logits(whisper(), inputs)
    uncached = our_whisper().predict_on_batch(inputs)
    for logits in (uncached, cached_logits(our_whisper(), inputs)):
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "inputs", [pytest.param(ONE, marks=pytest.mark.slow), RAGGED], ids=["one", "ragged"]
)
def test_bart_generates_keras_hubs_tokens(inputs):
    theirs = generate(bart(), inputs)
    ours = generate(our_bart(), inputs)
    check_same(ours, theirs)
    new = theirs["decoder_token_ids"][~inputs["decoder_padding_mask"]]
    assert new.size >= 64 and len(set(new.tolist())) > 8


def test_whisper_generates_the_tokens_of_an_uncached_loop():
    rows, width, sound = 2, len(START) + 64, features()
    ids, mask = tokens([width] * rows, width, 3)
    ids[:, : len(START)] = START
    for index in range(len(START), width):
        inputs = dict(
            encoder_features=sound, decoder_token_ids=ids, decoder_padding_mask=mask
        )
        ids[:, index] = hub_logits(whisper(), inputs)[:, index - 1].argmax(-1)
    assert len(set(ids.ravel().tolist())) > 8 and (ids[0] != ids[1]).any()
    inputs = dict(encoder_features=sound, decoder_token_ids=[START] * rows)
    answer = our_whisper().generate(inputs, max_new_tokens=64)
    np.testing.assert_array_equal(answer, ids)


@pytest.mark.parametrize("ours, theirs", [(our_bart, bart), (our_whisper, whisper)])
def test_weights_are_the_same_objects(ours, theirs):
    weights = [id(variable) for variable in ours().weights]
    assert sorted(weights) == sorted(id(variable) for variable in theirs().weights)


@pytest.mark.jax_only
def test_encodes_and_projects_once(monkeypatch):
    import jax

    model, counts = from_keras_hub(make_bart()), dict(encoder=0, keys=0, values=0)

    def count(name, layer):
        call = layer.call

        def counted(*args, **kwargs):
            # Whenever it's computed, also where that is in a compiled loop.
            jax.debug.callback(lambda: counts.update({name: counts[name] + 1}))
            return call(*args, **kwargs)

        monkeypatch.setattr(layer, "call", counted)

    count("encoder", model.encoder)
    count("keys", model.blocks[0].cross_attention.key_dense)
    count("values", model.blocks[0].cross_attention.value_dense)
    answer = generate(model, ONE)
    jax.effects_barrier()
    assert answer["decoder_padding_mask"].all()
    assert counts == dict(encoder=1, keys=1, values=1)


@pytest.mark.jax_only
@pytest.mark.parametrize("batch_size", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_decode_loop_holds_no_copy_of_what_is_encoded(batch_size):
    import jax

    # Heads so large that a slot's entries outweigh its scores.
    sizes = dict(num_heads=2, hidden_dim=74, max_sequence_length=4099)
    model = from_keras_hub(make_bart(**sizes))
    inputs = pairs([4099] * batch_size, [1] * batch_size, encoder_width=4099)
    encoded = jax.eval_shape(model.encode, inputs)
    own = model.init_cache(batch_size, 256)
    program = model.generator.lower((own, encoded)).compile()
    cross = sum(cache.nbytes for cache in encoded.caches)
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= cross
    assert memory.temp_size_in_bytes < 0.2 * cross / model.num_layers
    large = batch_size * model.hidden_dim * 255 + 1
    operations = ("copy", "transpose", "concatenate", "broadcast")
    found = made(program, operations, large)
    assert not [shape for _, shape in found if str(V) not in shape.split(",")]
    # Encoded keys and values that a program does turn around would be found.
    turn = jax.jit(
        lambda tree: jax.tree_util.tree_map(lambda x: x.swapaxes(-1, -2), tree)
    )
    assert made(turn.lower(encoded.caches).compile(), operations, large)


@pytest.mark.parametrize(
    "cache", ["float32", "int8", "int4", {"layout": "dense"}, Rolling(131)], ids=str
)
@pytest.mark.slow
def test_every_cache(cache):
    """Exact ones give the same answer; a codec is the encoded keys' and values' too."""
    inputs = dict(encoder_features=features(), decoder_token_ids=[START, START[:1]])
    ours = our_whisper()
    answer = ours.generate(inputs, max_new_tokens=23, cache=cache)
    assert [len(row) for row in answer] == [26, 24]
    if cache not in ("int8", "int4"):
        assert answer == ours.generate(inputs, max_new_tokens=23)
        return
    exact, coded = ours.encode(inputs), ours.encode(inputs, codec=cache)
    own, ids = ours.init_cache(2, 3), np.array([START] * 2)
    exact_logits, coded_logits = (
        numpy(ours.call_with_cache(ids, (own, encoded), 0)[0])
        for encoded in (exact, coded)
    )
    assert coded.caches[0].nbytes < exact.caches[0].nbytes
    error = abs(coded_logits - exact_logits).max() / abs(exact_logits).max()
    assert 0 < error < {"int8": 0.03, "int4": 0.3}[cache]


def test_seeds_and_streams():
    inputs = dict(encoder_features=features(), decoder_token_ids=[START] * 2)
    for sampler in (samplers.top_k(4), samplers.top_p(0.9)):
        answers = [
            our_whisper().generate(
                inputs, max_new_tokens=17, sampler=sampler, seed=seed
            )
            for seed in (3, 3, 4)
        ]
        assert answers[0] == answers[1] != answers[2]
    stream = our_whisper().stream(inputs, max_new_tokens=17, sampler=sampler, seed=4)
    rows = [sum(parts, START) for parts in zip(*stream, strict=True)]
    assert rows == answers[2]


def test_one_program_for_many_lengths():
    """Padding that all rows have is left out, down to a few widths."""
    model = from_keras_hub(make_bart())
    short = pairs([7], [3], encoder_width=41)
    wide = pairs([7], [3], encoder_width=101)
    wide["encoder_token_ids"][:, :7] = short["encoder_token_ids"][:, :7]
    for name in ("decoder_token_ids", "decoder_padding_mask"):
        wide[name] = short[name]
    encode, shapes = model.encoder.call, set()
    model.encoder.call = lambda inputs, **options: (
        shapes.add(tuple(inputs["encoder_token_ids"].shape))
        or encode(inputs, **options)
    )
    answer = generate(model, short)
    check_same(generate(model, wide), answer)
    # On JAX it's called where it is traced, and that was once.
    assert shapes == {(1, 32)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        hub.samplers.GreedySampler,
        lambda: hub.samplers.BeamSampler(num_beams=3),
        lambda: hub.samplers.ContrastiveSampler(k=3, alpha=0.3),
    ],
    ids=["greedy", "beam", "contrastive"],
)
def test_accelerated_tokens(make):
    lm = bart()
    lm.compile(sampler=make())
    whole = generate(lm)
    stop_token_ids = tuple(whole["decoder_token_ids"][[0, 1, 2], [23, 31, 37]].tolist())
    ended = generate(lm, stop_token_ids=stop_token_ids)
    assert not ended["decoder_padding_mask"].all()
    before = set(vars(lm))
    with accelerate(lm) as acceleration:
        assert accelerate(lm) is acceleration
        assert type(lm) is hub.models.BartSeq2SeqLM
        check_same(generate(lm), whole)
        check_same(generate(lm, stop_token_ids=stop_token_ids), ended)
    assert set(vars(lm)) == before
    check_same(generate(lm), whole)
    lm.compile(sampler="greedy")


@pytest.mark.slow
def test_accelerated_draws():
    lm, answers = bart(), []
    with accelerate(lm):
        for seed in (3, 3, 4):
            lm.compile(sampler=hub.samplers.TopKSampler(k=4, seed=seed))
            answers.append([generate(lm)["decoder_token_ids"] for _ in range(2)])
    lm.compile(sampler="greedy")
    (first, second), again, (other, _) = answers
    np.testing.assert_array_equal(again, [first, second])
    assert (first != second).any() and (first != other).any()


@pytest.mark.slow
def test_what_changes_the_model_is_seen(tmp_path):
    """Training, LoRA and loading, without accelerating anew."""
    lm = make_bart(num_layers=1)
    lm.save_weights(tmp_path / "first.weights.h5")
    accelerate(lm)

    def check():
        accelerated = generate(lm)
        accelerate(lm).restore()
        check_same(accelerated, generate(lm))
        accelerate(lm)
        return accelerated["decoder_token_ids"]

    found = [check()]
    targets = np.roll(RAGGED["decoder_token_ids"], -1, 1)
    lm.compile(optimizer=keras.optimizers.Adam(0.03), sampler="greedy")
    lm.fit(dict(RAGGED), targets, verbose=0)
    found.append(check())
    lm.load_weights(tmp_path / "first.weights.h5")
    np.testing.assert_array_equal(check(), found[0])
    lm.backbone.enable_lora(3)
    for weight in lm.backbone.trainable_weights:
        weight.assign(numpy(weight) + 0.1)
    found.append(check())
    for earlier, later in zip(found, found[1:], strict=False):
        assert (earlier != later).any()


def make_reader():
    """A BART that reads and writes lower-case text."""
    letters = [chr(code) for code in range(97, 123)]
    specials = ["<s>", "<pad>", "</s>", "<mask>"]
    vocabulary = [*specials, "\u0120", *letters, "on", "\u0120s"]
    tokenizer = hub.models.BartTokenizer(
        vocabulary={token: i for i, token in enumerate(vocabulary)},
        merges=["o n", "\u0120 s"],
    )
    lm = make_bart(vocabulary_size=len(vocabulary))
    lm.preprocessor = hub.models.BartSeq2SeqLMPreprocessor(
        tokenizer, encoder_sequence_length=37, decoder_sequence_length=31
    )
    return lm


@pytest.mark.slow
def test_text():
    reader = make_reader()
    calls = [
        ["some words", "go on"],
        "go on",
        {"encoder_text": ["some words", "go on"], "decoder_text": ["so", "go on so"]},
    ]
    theirs = [reader.generate(call) for call in calls]
    ours = from_keras_hub(reader)
    assert ours.tokenizer.stop_token_ids == (2,)
    assert [ours.generate(call, max_length=31) for call in calls] == theirs
    new = ours.generate(calls[2], max_length=31, strip_prompt=True)
    assert ["so" + new[0], "go on so" + new[1]] == theirs[2]
    assert ours.generate({"encoder_text": "go on"}, max_length=31) == theirs[1]
    pieces = list(ours.stream(calls[2], max_length=31))
    assert ["".join(row) for row in zip(*pieces, strict=True)] == new
    with accelerate(reader):
        assert [reader.generate(call) for call in calls] == theirs


@pytest.mark.slow
def test_a_model_of_ones_own(tmp_path):
    sound = keras.Input((None, MELS), name="encoder_sound")
    encoder = keras.Model(
        {"encoder_sound": sound}, keras.layers.Dense(19, activation="tanh")(sound)
    )
    options = dict(num_key_value_heads=2, normalize_first=False, use_final_norm=False)
    model = EncoderDecoderLM(encoder, V, 1, 6, 42, 59, **options)
    randomize(model)
    inputs = dict(encoder_sound=features(), decoder_token_ids=tokens([7] * 2, 7, 1)[0])
    logits = model.predict_on_batch(inputs)
    np.testing.assert_allclose(cached_logits(model, inputs), logits, rtol=0, atol=1e-4)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    again = loaded.predict_on_batch(inputs)
    np.testing.assert_allclose(again, logits, rtol=0, atol=1e-5)
    with pytest.raises(TypeError, match="`encoder` must be a functional"):
        EncoderDecoderLM(keras.layers.Dense(3), V, 2, 6, 42, 59)


def without(inputs, *names):
    return {name: inputs[name] for name in inputs if name not in names}


@pytest.mark.parametrize(
    "inputs, error, message",
    [
        (3, TypeError, "`inputs` must be a string, .*Received: int"),
        ("a text", ValueError, "only if there is a tokenizer"),
        ([START], ValueError, "`inputs` must be texts"),
        (
            {"encoder_text": ["go", "on"], "decoder_text": "so"},
            ValueError,
            "as many for the decoder",
        ),
        (without(ONE, "encoder_token_ids"), ValueError, "keys.*'encoder_token_ids'"),
        (without(ONE, "decoder_token_ids"), ValueError, "have 'decoder_token_ids'"),
        (
            dict(ONE, decoder_token_ids=[START] * 2, decoder_padding_mask=None),
            ValueError,
            "as many rows.*Received: 2 and 1",
        ),
        (
            dict(ONE, encoder_padding_mask=np.zeros((1, 41))),
            ValueError,
            r"at least one position.*rows \[0\]",
        ),
        (
            dict(ONE, encoder_padding_mask=np.ones((1, 40))),
            ValueError,
            r"as many for all.*\(1, 40\)",
        ),
        (
            dict(ONE, encoder_token_ids=np.full((1, 41), V)),
            ValueError,
            f"vocabulary size, {V}. Received: {V}",
        ),
        (
            dict(ONE, encoder_token_ids=np.full((1, 41), 0.5)),
            TypeError,
            "integer token ids",
        ),
        (pairs([114], [3], encoder_width=114), ValueError, "at most the 113 pos"),
        (
            dict(ONE, decoder_token_ids=[[3] * 113], decoder_padding_mask=None),
            ValueError,
            "leave room for a new token.*113",
        ),
    ],
)
def test_bad_inputs(inputs, error, message):
    if isinstance(inputs, dict) and inputs.get("decoder_padding_mask", 1) is None:
        inputs = without(inputs, "decoder_padding_mask")
    with pytest.raises(error, match=message):
        our_bart().generate(inputs, stop_token_ids=None)


def test_other_models_are_refused():
    with pytest.raises(TypeError, match="`generate` to accel.*Received: WhisperBack"):
        accelerate(whisper())
    with pytest.raises(TypeError, match="WhisperBackbone`. Received: BartBackbone"):
        from_keras_hub(bart().backbone)
    with pytest.raises(ValueError, match="`max_sequence_length`.*113. Received: 114"):
        from_keras_hub(bart(), 114)

    class OtherBackbone(hub.models.WhisperBackbone):
        pass

    with pytest.raises(ValueError, match="BartBackbone, .*Received.*OtherBackbone"):
        from_keras_hub(OtherBackbone(**WHISPER))


@pytest.mark.skipif(not hasattr(hub.models, "T5Seq2SeqLM"), reason="newer keras-hub's")
def test_t5_is_refused():
    backbone = hub.models.T5Backbone(**collect("HUB_REFUSED")["t5"][1])
    with pytest.raises(ValueError, match="T5Backbone, whose relative positions are a"):
        from_keras_hub(hub.models.T5Seq2SeqLM(backbone, preprocessor=None))


def test_files_are_the_other_models(tmp_path):
    for name in ("save", "save_weights", "load_weights"):
        with pytest.raises(ValueError, match="keras-hub model|that model"):
            getattr(our_bart(), name)(tmp_path / "model.weights.h5")
