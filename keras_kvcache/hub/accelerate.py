"""keras-hub's models, decoding through this package."""

import sys
from typing import Any

import jax
import keras
import numpy as np
from keras import ops

from keras_kvcache.attention.positions import FAR
from keras_kvcache.generation import StepFunctions, extend
from keras_kvcache.generation.buckets import chunk_sizes
from keras_kvcache.hub import check_quantization, share
from keras_kvcache.hub.beam_search import search_beams
from keras_kvcache.models.encoder_decoder_inputs import read_encoder_inputs
from keras_kvcache.models.encoder_decoder_lm import EncoderDecoderLM
from keras_kvcache.samplers.hub import chooses_stepwise
from keras_kvcache.samplers.hub_beams import is_hub_beams
from keras_kvcache.samplers.hub_draws import next_seed, stepwise_sampler

# The methods of a keras-hub model that an `Acceleration` stands in for.
HOOKS = ("make_generate_function", "generate_step")


def accelerate(causal_lm: Any) -> "Acceleration":
    """Lets a keras-hub model's own `generate` decode through this package.

    The object stays what it is, with its preprocessor, its `compile(sampler=...)` and
    the arguments of its `generate`. Its layers are used as they are, so what `fit`,
    LoRA, `quantize` or `load_weights` does, before or after, is seen by the next
    `generate`. Samplers that choose token by token, and beam search, are compiled into
    this package's loop. Any other that searches, as contrastive search does, or a class
    of your own with a `__call__`, can't be taken apart: its own loop calls one step of
    this package's for each token.

    ```python
    causal_lm = keras_hub.models.CausalLM.from_preset("gpt2_base_en")
    keras_kvcache.accelerate(causal_lm)
    causal_lm.generate("Keras is", max_length=64)
    ```

    Args:
        causal_lm: A `keras_hub.models.CausalLM`, which a
            `keras_hub.models.Seq2SeqLM` is too, of a family that
            `keras_kvcache.from_keras_hub` knows.

    Returns:
        An `Acceleration`, whose `restore()` gives the model its own decoding back;
        so does the end of a `with` block around it, of the outermost if there are
        several. For a model that is accelerated already it's the one that it has.

    Raises:
        TypeError: `causal_lm` isn't a `keras_hub.models.CausalLM`; a backbone has no
            `generate`.
        ValueError: It can't be decoded here; the message says why.
    """
    return accelerated_by(causal_lm) or Acceleration(causal_lm)


class Acceleration:
    """A keras-hub model's decoding, replaced until `restore()`.

    Args:
        causal_lm: As in `accelerate`.

    Attributes:
        model: The `DecoderLM` or `EncoderDecoderLM` that has the model's layers.
    """

    def __init__(self, causal_lm: Any) -> None:
        hub = sys.modules.get("keras_hub")
        if hub is None or not isinstance(causal_lm, hub.models.CausalLM):
            raise TypeError(
                "`causal_lm` must be a `keras_hub.models.CausalLM`, which has the "
                f"`generate` to accelerate. Received: {type(causal_lm).__name__}"
            )
        # Where positions are rotary, keras-hub sets no end to them.
        self.model = share(causal_lm, FAR)
        self._has_encoder = isinstance(self.model, EncoderDecoderLM)
        prefix = "decoder_" if self._has_encoder else ""
        # What keras-hub calls the tokens, and the mask of those that are there.
        self._ids, self._mask = f"{prefix}token_ids", f"{prefix}padding_mask"
        self._causal_lm, self._blocks = causal_lm, 0
        self._install()

    def __repr__(self):
        state = "active" if accelerated_by(self._causal_lm) is self else "restored"
        return f"<Acceleration of {self._causal_lm!r}, {state}>"

    def _install(self):
        # keras-hub asks the first for a function that generates, and compiles the
        # second where the sampler brings its own loop.
        self._causal_lm.make_generate_function = self._make_generate_function
        self._causal_lm.generate_step = self._own_loop_step
        self._causal_lm.generate_function = None

    def restore(self) -> None:
        """Gives the model its own decoding back; a second time does nothing."""
        if accelerated_by(self._causal_lm) is self:
            for name in HOOKS:
                delattr(self._causal_lm, name)
            self._causal_lm.generate_function = None

    def __enter__(self) -> "Acceleration":
        self._blocks += 1
        self._install()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._blocks -= 1
        if self._blocks == 0:
            self.restore()

    def _make_generate_function(self):
        return self._generate

    def _generate(self, inputs, stop_token_ids=None):
        """Generates as keras-hub's compiled function does: arrays in, arrays out.

        Args:
            inputs: Dictionary of `"token_ids"` and `"padding_mask"`, arrays `(B, T)`
                padded on the right; of an encoder-decoder model that of its
                backbone's inputs.
            stop_token_ids: Ids that end a row, or `None`.

        Returns:
            A dictionary of token ids and padding mask, of the same keys and shapes.

        Raises:
            ValueError: There are more positions than the model knows, or it was
                quantized in a way that can't be shared.
        """
        if keras.backend.backend() == "jax":
            # A running `fit` holds the weights, as `weights_of` says.
            self._causal_lm.jax_state_sync()
        check_quantization(self._causal_lm.backbone)
        token_ids = ops.convert_to_numpy(inputs[self._ids])
        mask = ops.convert_to_numpy(inputs[self._mask]).astype(bool)
        encoder_inputs = {}
        if self._has_encoder:
            encoder_inputs = read_encoder_inputs(inputs, self.model)
        inputs = {**encoder_inputs, self._ids: token_ids, self._mask: mask}
        if token_ids.shape[1] > self.model.max_sequence_length:
            raise ValueError(
                "`inputs` must be no longer, `max_length` included, than the "
                f"{self.model.max_sequence_length} positions that the model knows. "
                f"Received: {token_ids.shape[1]}"
            )
        sampler = self._causal_lm.sampler
        if is_hub_beams(sampler):
            generator = self.model.generator
            if self._has_encoder:
                generator = self.model.generator_of(encoder_inputs)
            ids = search_beams(generator, sampler, token_ids, mask, stop_token_ids)
            return self._answer(ids, mask, stop_token_ids)
        if not chooses_stepwise(sampler):
            ids = self._run_own_loop(inputs, stop_token_ids)
            return self._answer(ids, mask, stop_token_ids)
        answer = self.model.generate(
            inputs,
            stop_token_ids=stop_token_ids,
            sampler=stepwise_sampler(sampler),
            seed=next_seed(sampler),
        )
        # Past a row's end stands what the preprocessor has padded with.
        answered = answer[self._mask]
        answer[self._ids] = np.where(answered, answer[self._ids], token_ids)
        return answer

    def _answer(self, token_ids, mask, stop_token_ids):
        """The answer of a search: its tokens, masked past the end of each row.

        Args:
            token_ids: int `(B, T)`.
            mask: bool `(B, T)`, `True` for the prompts.
            stop_token_ids: Ids that end a row, or `None`.
        """
        ends = np.logical_and(np.isin(token_ids, stop_token_ids or ()), ~mask)
        answered = np.cumsum(ends, axis=1) - ends == 0
        return {self._ids: token_ids, self._mask: answered}

    def _run_own_loop(self, inputs, stop_token_ids):
        """Token ids `(B, T)` by the sampler's own loop, which keras-hub compiles."""
        width = inputs[self._ids].shape[1]
        longest = int(inputs[self._mask].sum(axis=1).max())
        # The shape of the prompts is part of the program, so it's one of a few.
        prompt_ids = inputs[self._ids][:, : min(width, sum(chunk_sizes(longest)))]
        generate = type(self._causal_lm).make_generate_function(self._causal_lm)
        inputs = {**inputs, "prompt_ids": prompt_ids}
        answer = generate(inputs, stop_token_ids=stop_token_ids)
        return ops.convert_to_numpy(answer[self._ids])

    def _own_loop_step(self, inputs, stop_token_ids=None):
        """Runs the prompts, then the sampler, whose loop calls `extend` for each token.

        This is for samplers whose `__call__` isn't known here: what they search for is
        theirs alone.
        """
        prompt_ids, mask = inputs["prompt_ids"], inputs[self._mask]
        rows, width = ops.shape(inputs[self._ids])
        # The samplers' loops begin where the shortest prompt ends, and only a static
        # cache can go back by any number of positions.
        cache = self.model.init_cache(rows, width, kind="static")
        if self._has_encoder:
            cache = (cache, self.model.encode(inputs))
        hidden_states, cache = self.model.hidden_with_cache(prompt_ids, cache, 0)
        rest = width - ops.shape(prompt_ids)[1]
        # A sampler knows tensors whose first axis is the rows, and no caches.
        tensors, structure = jax.tree_util.tree_flatten(cache)
        functions = StepFunctions(
            self.model.hidden_with_cache,
            lambda hidden: (self.model.logits(hidden), hidden),
        )

        def next_token(prompt, tensors, index):
            cache = jax.tree_util.tree_unflatten(structure, tensors)
            token = ops.slice(prompt, [0, index - 1], [ops.shape(prompt)[0], 1])
            cache, (logits, hidden) = extend(functions, cache, token, index - 1)
            return logits, hidden, jax.tree_util.tree_leaves(cache)

        token_ids = self._causal_lm.sampler(
            next=next_token,
            prompt=inputs[self._ids],
            cache=tensors,
            index=ops.min(ops.sum(ops.cast(mask, "int32"), axis=-1)),
            mask=mask,
            stop_token_ids=stop_token_ids,
            hidden_states=ops.pad(hidden_states, [[0, 0], [0, rest], [0, 0]]),
            model=self._causal_lm,
        )
        return {self._ids: token_ids}


def accelerated_by(causal_lm: Any) -> "Acceleration | None":
    """The `Acceleration` of a model, or `None`."""
    holder = getattr(getattr(causal_lm, HOOKS[0], None), "__self__", None)
    return holder if isinstance(holder, Acceleration) else None
