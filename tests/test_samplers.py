"""Samplers, against NumPy references that sort."""

import sys

import keras
import numpy as np
import pytest
from keras import ops

from keras_kvcache import samplers
from keras_kvcache.samplers import draws

BACKEND = keras.backend.backend()
jax_only = pytest.mark.skipif(BACKEND != "jax", reason="jit and vmap are JAX's")

# Primes, so that no two axes can be mistaken for each other.
B, V = 3, 101


def make_logits(dtype="float32", batch=B, vocab=V, seed=0):
    """Random logits of a dtype, as a tensor and as the float32 values it holds."""
    values = np.random.default_rng(seed).normal(size=(batch, vocab)) * 3
    tensor = ops.cast(ops.convert_to_tensor(values.astype("float32")), dtype)
    return tensor, to_numpy(ops.cast(tensor, "float32"))


def to_numpy(tensor):
    return np.array(ops.convert_to_numpy(tensor))


if BACKEND == "jax":
    import jax

    # Outside jit JAX would compile a filter's loop at every call.
    filter_tokens = jax.jit(lambda keep, *args: keep(*args), static_argnums=0)
    sample = jax.jit(lambda sampler, logits, words: sampler(logits, words))
else:

    def filter_tokens(keep, logits, parameter):
        return keep(logits, parameter)

    def sample(sampler, logits, words):
        return sampler(logits, words)


def apply(keep, logits, parameter):
    return to_numpy(filter_tokens(keep, logits, parameter))


def draw(sampler, logits, seed):
    """Draws as NumPy ids, with the seed as the two words a decode loop gives."""
    words = (seed, 0) if isinstance(seed, int) else seed
    return to_numpy(sample(sampler, logits, np.array(words, "uint32")))


def softmax(row):
    weights = np.exp(row.astype("float64") - row.max())
    return weights / weights.sum()


def top_k_reference(row, k):
    threshold = np.sort(row)[::-1][min(int(k), row.size) - 1]
    return np.where(row >= threshold, row, -np.inf)


def top_p_reference(row, p):
    order = np.argsort(-row, kind="stable")
    reached = np.nonzero(np.cumsum(softmax(row)[order]) >= p)[0]
    threshold = row[order[reached[0]]]
    return np.where(row >= threshold, row, -np.inf)


def min_p_reference(row, p):
    probabilities = softmax(row)
    return np.where(probabilities >= p * probabilities.max(), row, -np.inf)


FILTERS = [
    (samplers.keep_top_k, top_k_reference, (1, 2, 7, 50, V - 1, V, V + 1, 10**9)),
    (samplers.keep_top_p, top_p_reference, (1e-6, 0.1, 0.5, 0.9, 0.99)),
    (samplers.keep_min_p, min_p_reference, (0.0, 1e-3, 0.05, 0.3, 0.99)),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("keep", "reference", "parameters"), FILTERS)
def test_filter_matches_sorting(keep, reference, parameters, dtype):
    # bfloat16 has 8 bits of mantissa, so that 101 logits hold many ties.
    tensor, values = make_logits(dtype)
    for parameter in parameters:
        got = apply(keep, tensor, parameter)
        assert got.dtype == np.float32
        expected = np.stack([reference(row, parameter) for row in values])
        np.testing.assert_array_equal(got, expected, err_msg=f"{parameter=}")


@pytest.mark.parametrize(("keep", "reference", "parameters"), FILTERS)
def test_filter_leaves_dropped_tokens_dropped(keep, reference, parameters):
    _, values = make_logits()
    values[:, ::2] = -np.inf
    for parameter in parameters:
        got = apply(keep, ops.convert_to_tensor(values), parameter)
        expected = np.stack([reference(row, parameter) for row in values])
        np.testing.assert_array_equal(got, expected, err_msg=f"{parameter=}")


@pytest.mark.parametrize(
    ("keep", "parameter"),
    [
        (samplers.keep_top_k, 0),
        (samplers.keep_top_k, -3),
        (samplers.keep_top_p, 0.0),
        (samplers.keep_top_p, -1.0),
        (samplers.keep_min_p, 1.0),
        (samplers.keep_min_p, 7.0),
    ],
)
def test_most_likely_token_always_stays(keep, parameter):
    tensor, values = make_logits()
    got = apply(keep, tensor, parameter)
    np.testing.assert_array_equal(np.isfinite(got).sum(-1), np.ones(B))
    np.testing.assert_array_equal(got.argmax(-1), values.argmax(-1))


def test_top_p_of_one_keeps_every_possible_token():
    # 60 below the best is a probability of 1e-26: lost in any float32 sum that
    # also holds the best, still above 0 by itself.
    row = np.array([[0.0, -60.0, -1.0, -np.inf, -30.0]], "float32")
    got = apply(samplers.keep_top_p, ops.convert_to_tensor(row), 1.0)
    np.testing.assert_array_equal(got, row)


def test_ties_at_the_threshold_are_all_kept():
    row = np.array([[2.0, 1.0, 1.0, 1.0, 0.5, -1.0, -1.0]], "float32")
    tensor = ops.convert_to_tensor(row)
    kept = np.array([[True, True, True, True, False, False, False]])
    for keep, parameter in ((samplers.keep_top_k, 2), (samplers.keep_top_p, 0.6)):
        got = apply(keep, tensor, parameter)
        np.testing.assert_array_equal(np.isfinite(got), kept)


def test_top_k_is_exact_over_the_whole_range_of_floats():
    # Both zeros are one value; the bits of neighbours differ by one.
    edges = [0.0, -0.0, 1.0, np.nextafter(np.float32(1), np.float32(2)), np.inf]
    edges += [3.4e38, 1e-30, -1e-30, -1.0, -3.4e38, -np.inf]
    row = np.array(edges, "float32")
    for k in range(1, row.size + 1):
        got = apply(samplers.keep_top_k, ops.convert_to_tensor(row[None]), k)
        np.testing.assert_array_equal(got[0], top_k_reference(row, k), err_msg=f"{k=}")


def test_one_parameter_a_row():
    tensor, values = make_logits()
    for keep, reference, parameters in FILTERS:
        per_row = np.array(parameters[1 : 1 + B], "float32")
        got = apply(keep, tensor, ops.convert_to_tensor(per_row[:, None]))
        rows = zip(values, parameters[1:], strict=False)
        expected = np.stack([reference(row, parameter) for row, parameter in rows])
        np.testing.assert_array_equal(got, expected)


def test_temperature_divides_in_float32():
    tensor, values = make_logits("bfloat16")
    got = to_numpy(samplers.scale_temperature(tensor, 0.7))
    np.testing.assert_allclose(got, values / np.float32(0.7), rtol=1e-6)


def test_threefry_known_answers():
    # The test vectors published with the Random123 library: key, counter, words.
    vectors = [
        ([0, 0], [0, 0], [0x6B200159, 0x99BA4EFE]),
        ([2**32 - 1] * 2, [2**32 - 1] * 2, [0x1CB996FC, 0xBB002BE7]),
        (
            [0x13198A2E, 0x03707344],
            [0x243F6A88, 0x85A308D3],
            [0xC4923A9C, 0x483DF7A0],
        ),
    ]
    for key, counter, expected in vectors:
        words = draws.threefry(draws.seed_words(key), draws.seed_words(counter))
        got = [int(to_numpy(word)) % 2**32 for word in words]
        assert got == expected


def test_gumbel_noise_is_finite_and_gumbel():
    values = to_numpy(draws.gumbel(5, 7, 30011)).astype("float64")
    assert np.isfinite(values).all()
    assert np.unique(values).size > 0.99 * values.size
    # Mean, variance and two quantiles of the standard Gumbel distribution, each
    # within 4 standard errors of 210,077 values.
    assert values.mean() == pytest.approx(0.5772, abs=0.012)
    assert values.var() == pytest.approx(np.pi**2 / 6, abs=0.04)
    for x in (-1.0, 3.0):
        assert (values <= x).mean() == pytest.approx(np.exp(-np.exp(-x)), abs=0.004)


def chi_square(ids, probabilities):
    counts = np.bincount(ids, minlength=probabilities.size)
    expected = probabilities * ids.size
    assert counts[expected == 0].sum() == 0
    possible = expected > 0
    return ((counts - expected)[possible] ** 2 / expected[possible]).sum()


def test_draws_follow_the_distribution_across_rows():
    row = np.array([0.3, -1.0, 2.0, -np.inf, 1.0, 0.0, 1.5], "float32")
    logits = ops.convert_to_tensor(np.tile(row, (20011, 1)))
    ids = draw(samplers.random(0.7), logits, 11)
    assert ids.dtype == np.int32
    # 5 degrees of freedom: above 30 once in 70,000 seeds.
    assert chi_square(ids, softmax(row / 0.7)) < 30
    ids = draw(samplers.top_k(3, temperature=0.7), logits, 12)
    assert chi_square(ids, softmax(top_k_reference(row, 3) / 0.7)) < 25


@jax_only
def test_draws_of_consecutive_steps_are_independent():
    row = np.array([[0.3, -1.0, 2.0, 1.0, 0.0]], "float32")
    sampler = samplers.random()
    steps = np.arange(40009, dtype="uint32")
    seeds = np.stack([np.full_like(steps, 7), steps], axis=-1)
    ids = np.array(jax.jit(jax.vmap(lambda seed: sampler(row, seed)))(seeds))[:, 0]
    probabilities = softmax(row[0])
    # 24 degrees of freedom: above 70 once in 200,000 seeds.
    pairs = ids[:-1] * 5 + ids[1:]
    assert chi_square(pairs, np.outer(probabilities, probabilities).ravel()) < 70


def test_a_row_does_not_see_the_others():
    sampler = samplers.make(temperature=0.9, top_k=41, top_p=0.95, min_p=0.01)
    two, seven = make_logits(batch=2)[1], make_logits(batch=7, seed=1)[1]
    seven[:2] = two
    for step in range(5):
        ids_of_two = draw(sampler, ops.convert_to_tensor(two), (3, step))
        ids_of_seven = draw(sampler, ops.convert_to_tensor(seven), (3, step))
        np.testing.assert_array_equal(ids_of_two, ids_of_seven[:2])


def test_equal_rows_draw_differently():
    logits = ops.zeros((31, V))
    assert np.unique(draw(samplers.random(), logits, 0)).size > 15


def test_seed_decides_the_draw():
    logits = ops.zeros((31, V))
    sampler = samplers.random()

    def ids(seed):
        return tuple(to_numpy(sampler(logits, seed)))

    assert ids(3) == ids(3) == ids((3, 0)) == ids(np.array([3, 0], "uint32"))
    # Steps, seeds, negative and wide ones. (8, 0) against (7, 1) is the pair
    # that Keras' generator for PyTorch can't tell apart.
    seeds = [3, 4, (3, 1), (4, 1), (7, 1), (8, 0), -1, 2**33 + 3, 2**32 - 1, (1, 3)]
    assert len({ids(seed) for seed in seeds}) == len(seeds)


def test_a_seed_of_the_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"`seed` must be .*\(3,\)"):
        samplers.random()(ops.zeros((2, 5)), (1, 2, 3))


def test_greedy_takes_the_first_of_the_most_likely():
    row = np.array([[0.0, 2.0, 1.0, 2.0, -np.inf]], "float32")
    ids = samplers.greedy()(ops.convert_to_tensor(row), 0)
    assert keras.backend.standardize_dtype(ids.dtype) == "int32"
    assert to_numpy(ids).tolist() == [1]


def test_a_nearly_zero_temperature_is_greedy():
    tensor, values = make_logits()
    ids = draw(samplers.random(1e-6), tensor, 0)
    np.testing.assert_array_equal(ids, values.argmax(-1))


def test_filters_run_in_order():
    # Top-p sees the probabilities among the tokens that top-k kept: 0.5 / 0.8.
    row = np.log(np.array([[0.5, 0.3, 0.2]], "float32"))
    logits = ops.convert_to_tensor(np.tile(row, (997, 1)))
    ids = draw(samplers.make(top_k=2, top_p=0.6), logits, 0)
    assert set(ids) == {0}
    both = samplers.chain((samplers.keep_top_p, 0.6), (samplers.keep_top_k, 2))
    assert set(draw(both, logits, 0)) == {0, 1}


def test_chain_takes_any_filter():
    def ban(logits, token):
        return ops.where(ops.arange(ops.shape(logits)[1]) == token, -np.inf, logits)

    tensor, values = make_logits()
    banned = int(values[0].argmax())
    sampler = samplers.chain((ban, banned), draw=samplers.most_likely)
    values[:, banned] = -np.inf
    np.testing.assert_array_equal(draw(sampler, tensor, 0), values.argmax(-1))


@jax_only
def test_new_parameters_compile_nothing():
    traces = []

    @jax.jit
    def step(sampler, logits, seed):
        traces.append(sampler)
        return sampler(logits, seed)

    logits = make_logits()[0]
    for i in range(10):
        settings = dict(top_k=1 + i, top_p=0.5 + i / 20, min_p=i / 100)
        step(samplers.make(0.5 + i / 10, **settings), logits, np.uint32([i, 2 * i]))
    # An int, a NumPy number and a float are one and the same parameter.
    for one in (1, 1.0, np.float64(1), np.int32(1)):
        sampler = samplers.make(one, top_k=one, top_p=one, min_p=one)
        step(sampler, logits, np.uint32([1, 2]))
    assert len(traces) == 1


@jax_only
def test_parameters_may_be_traced():
    logits = make_logits()[0]

    @jax.jit
    def step(temperature, k, p):
        return samplers.make(temperature, top_k=k, top_p=p, min_p=p)(logits, 3)

    expected = samplers.make(0.7, top_k=11, top_p=0.3, min_p=0.3)(logits, 3)
    np.testing.assert_array_equal(step(0.7, 11, 0.3), expected)


def test_make_runs_only_what_is_asked_for():
    assert samplers.make(temperature=0) == samplers.greedy()
    assert samplers.make(0.0, top_k=5, top_p=0.5) == samplers.greedy()
    assert samplers.make() == samplers.random()
    assert samplers.make(0.5, top_k=7) == samplers.top_k(7, temperature=0.5)
    assert samplers.make(2, 7, 0.5) == samplers.top_p(0.5, temperature=2, k=7)
    assert samplers.make(min_p=0.2) == samplers.min_p(0.2)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: samplers.random(0), r"`temperature` .*greedy\(\).* Received: 0$"),
        (lambda: samplers.random(-1.0), "`temperature` .* Received: -1.0"),
        (lambda: samplers.make(float("nan")), "`temperature` .* Received: nan"),
        (lambda: samplers.make("0.7"), "`temperature` .* Received: '0.7'"),
        (lambda: samplers.top_k(0), "`k` .*from 1 on. Received: 0"),
        (lambda: samplers.top_k(2.5), "`k` .* Received: 2.5"),
        (lambda: samplers.make(top_k=0), "`top_k` .* Received: 0"),
        (lambda: samplers.make(0, top_k=-1), "`top_k` .* Received: -1"),
        (lambda: samplers.top_p(0.0), "`p` .* Received: 0.0"),
        (lambda: samplers.top_p(0.5, k=0), "`k` .* Received: 0"),
        (lambda: samplers.make(top_p=1.5), "`top_p` .* Received: 1.5"),
        (lambda: samplers.min_p(1.5), "`p` .*from 0 to 1. Received: 1.5"),
        (lambda: samplers.make(min_p=-0.1), "`min_p` .* Received: -0.1"),
    ],
)
def test_parameters_out_of_range_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_get_by_name():
    assert samplers.get(None) == samplers.greedy()
    for name in ("greedy", "random", "top_k", "top_p", "min_p"):
        assert samplers.get(name) == getattr(samplers, name)()


def test_get_passes_samplers_and_functions_through():
    sampler = samplers.top_k(3)
    assert samplers.get(sampler) is sampler

    def second(logits, seed):
        return ops.full((ops.shape(logits)[0],), 2, dtype="int32")

    got = samplers.get(second)
    assert draw(got, make_logits()[0], 0).tolist() == [2] * B


@jax_only
def test_whatever_get_returns_can_be_an_argument_of_jit():
    step = jax.jit(lambda sampler, logits: sampler(logits, 0))
    sampler = samplers.get(lambda logits, seed: ops.argmin(logits, axis=-1))
    tensor, values = make_logits()
    np.testing.assert_array_equal(step(sampler, tensor), values.argmin(-1))


@pytest.mark.parametrize(
    ("identifier", "error", "message"),
    [
        ("beam", ValueError, "greedy, random, top_k, top_p, min_p.*'beam'"),
        (3, TypeError, "3 of type int"),
        (np.zeros(2), TypeError, "of type ndarray"),
        (samplers.greedy, TypeError, "of type function"),
        (samplers.Sampler, TypeError, "of type type"),
    ],
)
def test_get_refuses_what_is_no_sampler(identifier, error, message):
    with pytest.raises(error, match=message):
        samplers.get(identifier)


def hub_samplers():
    return pytest.importorskip("keras_hub").samplers


def test_hub_samplers_draw_what_they_should():
    keras_hub_samplers = hub_samplers()
    tensor, values = make_logits()
    greedy = samplers.get(keras_hub_samplers.GreedySampler())
    np.testing.assert_array_equal(draw(greedy, tensor, 0), values.argmax(-1))

    logits = ops.convert_to_tensor(np.tile(values[:1], (499, 1)))
    cases = [
        (keras_hub_samplers.RandomSampler(temperature=3.0), values[0]),
        (keras_hub_samplers.TopKSampler(k=7, seed=1), top_k_reference(values[0], 7)),
        (keras_hub_samplers.TopPSampler(p=0.9), top_p_reference(values[0], 0.9)),
    ]
    for inner, kept in cases:
        sampler = samplers.get(inner)
        states = [to_numpy(variable) for variable in inner.variables]
        ids = draw(sampler, logits, (5, 0))
        assert ids.dtype == np.int32
        assert 2 <= np.unique(ids).size
        assert set(ids) <= set(np.nonzero(np.isfinite(kept))[0])
        # Seeded per call, and the user's own sampler is as it was.
        np.testing.assert_array_equal(ids, draw(sampler, logits, (5, 0)))
        others = [draw(sampler, logits, seed) for seed in ((5, 1), (6, 0), (4, 1))]
        assert len({tuple(other) for other in [ids, *others]}) == 4
        for variable, state in zip(inner.variables, states, strict=True):
            np.testing.assert_array_equal(to_numpy(variable), state)


def test_own_subclass_of_a_hub_sampler_works_as_it_is():
    class TwoDraws(hub_samplers().Sampler):
        """Has two generators, whose noise must differ."""

        def __init__(self):
            super().__init__()
            self.first = keras.random.SeedGenerator(1)
            self.second = keras.random.SeedGenerator(1)

        def get_next_token(self, probabilities):
            shape = ops.shape(probabilities)
            first = keras.random.uniform(shape, seed=self.first)
            second = keras.random.uniform(shape, seed=self.second)
            # With equal noise everywhere this is token 0.
            return ops.argmax(ops.abs(first - second), axis=-1)

    sampler = samplers.get(TwoDraws())
    ids = draw(sampler, ops.zeros((B, V)), (2, 9))
    assert ids.min() >= 1


@jax_only
def test_hub_sampler_inside_jit():
    traces = []

    @jax.jit
    def step(sampler, logits, seed):
        traces.append(sampler)
        return sampler(logits, seed)

    inner = hub_samplers().TopKSampler(k=7)
    logits = make_logits()[0]
    for i in range(3):
        seed = np.uint32([5, i])
        ids = step(samplers.get(inner), logits, seed)
        np.testing.assert_array_equal(ids, samplers.get(inner)(logits, seed))
    assert len(traces) == 1


def test_hub_samplers_with_a_loop_of_their_own_are_refused():
    keras_hub_samplers = hub_samplers()
    for name in ("BeamSampler", "ContrastiveSampler"):
        with pytest.raises(ValueError, match=f"get_next_token.* Received: {name}"):
            samplers.get(getattr(keras_hub_samplers, name)())


def test_get_does_not_import_keras_hub(monkeypatch):
    monkeypatch.delitem(sys.modules, "keras_hub.samplers", raising=False)
    samplers.get(lambda logits, seed: None)
    assert "keras_hub.samplers" not in sys.modules
