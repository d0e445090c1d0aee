"""One row where JAX says that it runs on a GPU or TPU: projected as two."""

import attention_cases as cases
import numpy as np
import pytest
from conftest import make_lm

from keras_kvcache.layers.projections import project

pytestmark = pytest.mark.jax_only

DENSE = {"layout": "dense"}


@pytest.mark.parametrize("platform", ["on_gpu", "on_tpu"])
@pytest.mark.parametrize(
    "shape, feature_axes, rows",
    [
        ((7,), 1, 7),
        ((1, 7), 1, 2),
        ((1, 1, 7), 1, 2),
        ((1, 1, 3, 5), 2, 2),
        ((3, 1, 7), 1, 3),
        ((1, 3, 7), 1, 1),
        ((1, 1, 3, 5), 1, 1),
    ],
)
def test_only_one_row_is_doubled(shape, feature_axes, rows, platform, request):
    request.getfixturevalue(platform)
    shapes = []

    def triple(inputs):
        shapes.append(inputs.shape)
        return 3 * inputs

    inputs = cases.noise(*shape)
    outputs = project(triple, inputs, feature_axes)
    np.testing.assert_allclose(cases.numpy(outputs), 3 * inputs, rtol=1e-6)
    assert shapes == [(rows, *shape[1:])]


@pytest.mark.parametrize(
    "kind, options, prompts",
    [
        ("llama", {"cache": "int8"}, 1),
        ("gpt2", {}, 1),
        ("windowed", {"cache": DENSE}, 3),
    ],
)
def test_tokens_are_the_same_as_traced_for_a_tpu(kind, options, prompts, request):
    """Here the programs run on a CPU: their arithmetic is compared, not their speed."""
    prompts = [[5, 3, 11, 2, 7], [13, 2], [17, 19, 23]][:prompts]
    options = {"max_new_tokens": 13, **options}
    lm = make_lm(kind, num_layers=2, dtype="float32")
    expected = lm.generate(prompts, **options)
    request.getfixturevalue("on_tpu")
    lm = make_lm(kind, num_layers=2, dtype="float32")
    generated = lm.generate(prompts, **options)
    assert list(map(list, generated)) == list(map(list, expected))
