"""Numbers of 64 and 16 bits, JAX's switches, and weights that training holds."""

import json
import os
import subprocess
import sys

import attention_cases as cases
import keras
import numpy as np
import pytest
import reference

from keras_kvcache import DecoderLM
from keras_kvcache.caches import CacheSpec

V = 61
PROMPTS = [[5, 3, 8, 1], [7] * 37, [2]]


def make_lm(**options):
    keras.utils.set_random_seed(1)
    return DecoderLM(
        vocabulary_size=V,
        num_layers=2,
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=40,
        intermediate_dim=41,
        max_sequence_length=127,
        kernel_initializer=keras.initializers.RandomNormal(stddev=0.3),
        **options,
    )


@pytest.fixture
def with_float64():
    """Numbers of 64 bits, which JAX has only if asked for them."""
    if keras.backend.backend() != "jax":
        yield
        return
    import jax

    jax.config.update("jax_enable_x64", True)
    jax.clear_caches()
    yield
    jax.config.update("jax_enable_x64", False)
    jax.clear_caches()


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_float64_is_exact_through_a_cache(layout, with_float64):
    layer, rules = cases.make_kind(
        "everything",
        dtype="float64",
        rotary_embedding=cases.rotary_layer(
            rotary_dim=10, scaling_factor=1.7, dtype="float64"
        ),
        query_norm=None,  # Keras' own round to float32.
        key_norm=None,
    )
    x = keras.ops.convert_to_tensor(cases.noise(2, 7, cases.D, dtype="float64"))
    expected, _ = reference.multi_head_attention(
        layer, cases.numpy(x), cases.numpy(x), causal=True, **rules
    )
    spec = CacheSpec(2, 17, 3, 14, codec="float64", layout=layout)
    cache, outputs = spec.allocate(), []
    for first, end in ((0, 5), (5, 6), (6, 7)):
        part = x[:, first:end]
        output, cache = layer(
            part, part, cache=cache, cache_update_index=first, use_causal_mask=True
        )
        outputs.append(cases.numpy(output))
    whole = cases.numpy(layer(x, x, use_causal_mask=True))
    for got in (np.concatenate(outputs, axis=1), whole):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)


@pytest.mark.jax_only
def test_float64_that_jax_does_not_have_is_float32_with_a_warning():
    import jax

    with pytest.warns(UserWarning, match="float64.*jax_enable_x64"):
        lm = make_lm(dtype="float64")
    assert keras.layers.Dense(3, dtype="float64").compute_dtype == lm.compute_dtype
    assert {str(weight.value.dtype) for weight in lm.weights} == {"float32"}
    arrays = jax.tree_util.tree_leaves(lm.init_cache(1, 17))
    assert {str(array.dtype) for array in arrays} == {"float32"}
    answer = lm.generate(PROMPTS, max_new_tokens=7, stop_token_ids=None)
    assert answer == make_lm().generate(PROMPTS, max_new_tokens=7, stop_token_ids=None)


class Generates(keras.callbacks.Callback):
    """Generates by the model's name, not by `self.model`, which Keras looks after."""

    def __init__(self, lm, when):
        super().__init__()
        self.lm, self.answers = lm, []
        setattr(self, when, self.generate)

    def generate(self, *arguments, **logs):
        row = self.lm.generate([1, 2, 3], max_new_tokens=3)
        pieces = list(self.lm.stream([1, 2, 3], max_new_tokens=3))
        assert row == [1, 2, 3] + [token for piece in pieces for token in piece]
        self.answers.append(row)


@pytest.mark.parametrize(
    "when",
    [
        "on_train_batch_begin",
        "on_train_batch_end",
        "on_epoch_begin",
        "on_epoch_end",
        "on_train_end",
    ],
)
def test_generating_within_fit_takes_the_weights_that_training_holds(when):
    ids = np.random.default_rng(0).integers(0, V, (12, 9))

    def fit(lm, *callbacks):
        lm.compile(keras.optimizers.Adam(0.02))
        history = lm.fit(
            ids[:, :-1],
            ids[:, 1:],
            epochs=2,
            batch_size=4,
            shuffle=False,
            verbose=0,
            callbacks=callbacks,
        )
        return history.history

    plain, lm = make_lm(), make_lm()
    callback = Generates(lm, when)
    assert fit(plain) == fit(lm, callback)
    for ours, theirs in zip(lm.weights, plain.weights, strict=True):
        np.testing.assert_array_equal(cases.numpy(ours), cases.numpy(theirs))
    if when.endswith("end"):
        assert callback.answers[-1] == lm.generate([1, 2, 3], max_new_tokens=3)
        # What was there before the first step isn't what is there after the last.
        is_last_only = when == "on_train_end"
        assert is_last_only or callback.answers[0] != callback.answers[-1]


@pytest.mark.parametrize(
    "policy", ["float16", pytest.param("mixed_float16", marks=pytest.mark.slow)]
)
def test_float16_is_trained_and_decoded(policy):
    """Keras' own layers can't attend in it on a CPU under JAX."""
    lm = make_lm(dtype=policy)
    ids = np.array(PROMPTS[:1] * 3)
    wide = make_lm()
    wide.set_weights([cases.numpy(weight) for weight in lm.weights])
    logits = cases.numpy(lm(ids))
    np.testing.assert_allclose(logits, cases.numpy(wide(ids)), rtol=0, atol=0.05)
    for cache in (None, "int8", {"layout": "dense"}):
        rows = lm.generate(PROMPTS, max_new_tokens=3, cache=cache)
        assert [len(row) for row in rows] == [7, 40, 4]
    lm.compile()
    history = lm.fit(ids[:, :-1], ids[:, 1:], verbose=0).history
    assert np.isfinite(history["loss"]).all()


SCRIPT = """
import json, sys
import jax
if sys.argv[1] != "none":
    name, value = sys.argv[1].split("=")
    jax.config.update(name, {"True": True}.get(value, value))
sys.path.insert(0, sys.argv[2])
import keras, keras_kvcache, numpy as np
from test_numbers import PROMPTS, make_lm
from keras_kvcache import samplers
from keras_kvcache.caches import Rolling
answers = []
windowed = make_lm(sliding_window=5, final_logit_soft_cap=3.0)
for lm, caches in (
    (make_lm(), (None, "int8", Rolling(31, 2))),
    (windowed, ("int4", {"layout": "dense"})),
):
    for cache in caches:
        rows = lm.generate(PROMPTS, max_new_tokens=5, cache=cache)
        added = [[] for _ in PROMPTS]
        for pieces in lm.stream(PROMPTS, max_new_tokens=5, cache=cache):
            for row, piece in zip(added, pieces, strict=True):
                row.extend(piece)
        assert rows == [p + a for p, a in zip(PROMPTS, added, strict=True)], cache
        answers.append(rows)
    sampler = samplers.top_p(0.9, 0.8, k=17)
    answers.append(lm.generate(PROMPTS, max_new_tokens=5, sampler=sampler, seed=3))
import keras_hub
backbone = keras_hub.models.GPT2Backbone(
    vocabulary_size=61, num_layers=1, num_heads=2, hidden_dim=34, intermediate_dim=41
)
causal_lm = keras_hub.models.GPT2CausalLM(backbone=backbone)
causal_lm.compile(sampler="greedy")
token_ids = np.array([[5, 7, 0, 0, 0, 0, 0], [3, 0, 0, 0, 0, 0, 0]])
inputs = {"token_ids": token_ids, "padding_mask": token_ids != 0}
with keras_kvcache.accelerate(causal_lm):
    answer = causal_lm.generate(inputs, stop_token_ids=None)
answers.append(answer["token_ids"].tolist())
print(json.dumps(answers))
"""


def answers_under(switch):
    """What a process in which JAX's switch is set generates."""
    folder = os.path.dirname(__file__)
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, switch, folder],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def plain_answers():
    return answers_under("none")


SWITCHES = [
    "jax_enable_x64=True",
    "jax_debug_nans=True",
    "jax_disable_jit=True",
    "jax_default_matmul_precision=bfloat16",
    "jax_default_matmul_precision=highest",
]


@pytest.mark.jax_only
@pytest.mark.slow
@pytest.mark.parametrize("switch", SWITCHES)
def test_the_main_paths_under_a_switch_of_jax(switch, plain_answers):
    assert answers_under(switch) == plain_answers
