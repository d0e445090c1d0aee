"""Small keras-hub models of each family, with what the family has switched on."""

import functools

import keras
import numpy as np
import pytest
from family_cases import collect
from family_cases.sizes import HUB_SIZES

hub = pytest.importorskip("keras_hub")

# By the name of a case: the family, as keras-hub's classes begin, and its arguments.
CASES = collect("HUB")


def make_hub_lm(case, **options):
    """A keras-hub model whose random weights are large enough for varied answers."""
    family, arguments = CASES[case]
    keras.utils.set_random_seed(7)
    backbone = getattr(hub.models, f"{family}Backbone")(**{**arguments, **options})
    rng = np.random.default_rng(7)
    for weight in backbone.weights:
        noise = 0.2 * rng.normal(size=weight.shape)
        if family.startswith("Gemma") and "embedding" in weight.path:
            # Scaled up and tied, larger ones would only ever repeat a token.
            weight.assign(0.1 * noise)
        else:
            weight.assign(keras.ops.convert_to_numpy(weight) + noise)
    lm = getattr(hub.models, f"{family}CausalLM")(backbone=backbone, preprocessor=None)
    lm.compile(sampler="greedy")
    return lm


@functools.cache
def shared_hub_lm(case):
    """One for tests that leave it as it is, so that it compiles once."""
    return make_hub_lm(case)


def prompts(lengths, width, seed=11):
    """Right-padded prompts in keras-hub's form."""
    rng = np.random.default_rng(seed)
    mask = np.arange(width) < np.array(lengths)[:, None]
    ids = rng.integers(1, HUB_SIZES["vocabulary_size"], mask.shape)
    return {"token_ids": (ids * mask).astype("int32"), "padding_mask": mask}


def hub_generate(lm, inputs, stop_token_ids=None):
    """Token ids and mask by keras-hub's own program, as NumPy arrays."""
    answer = lm.make_generate_function()(dict(inputs), stop_token_ids=stop_token_ids)
    return {
        name: keras.ops.convert_to_numpy(answer[name])
        for name in ("token_ids", "padding_mask")
    }


def make_reader():
    """A GPT-2 that reads and writes lower-case text."""
    letters = [chr(code) for code in range(97, 123)]
    # The end isn't token 0, with which keras-hub pads.
    tokens = ["\u0120", *letters, "on", "<|endoftext|>"]
    tokenizer = hub.models.GPT2Tokenizer(
        vocabulary={token: i for i, token in enumerate(tokens)}, merges=["o n"]
    )
    lm = make_hub_lm("gpt2", vocabulary_size=len(tokens))
    lm.preprocessor = hub.models.GPT2CausalLMPreprocessor(tokenizer, sequence_length=31)
    return lm
