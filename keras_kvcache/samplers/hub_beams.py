"""keras-hub's beam search as a sampler that moves rows."""

import dataclasses
import functools
from typing import Any

import jax
from keras import ops

from keras_kvcache.samplers.hub import hub_samplers
from keras_kvcache.samplers.stateful import NO_TOKEN


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["stop_token_ids"],
    meta_fields=["sampler"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class HubBeams:
    """Steps of a `keras_hub.samplers.BeamSampler`, with exactly its scores.

    `num_beams` rows, one behind the other, are the beams of one prompt. As in keras-hub
    all prompts begin where the shortest ends: in the others the beams read on in the
    prompt, and what they would have chosen there counts in their scores. All end
    together, once every beam has had a stop id; a beam that had one goes on until then.

    Attributes:
        sampler: The `keras_hub.samplers.BeamSampler`. Its settings are constants of the
            compiled program.
        stop_token_ids: int32 `(any,)`, filled up with `NO_TOKEN`.
    """

    sampler: Any
    stop_token_ids: Any

    moves_rows = True

    def start(self, rows: Any) -> dict[str, Any]:
        """The state of beams that have chosen nothing.

        Args:
            rows: `keras_kvcache.generation.Rows`, of which `tokens` begin with whole
                prompts and what they are padded with, and `index` is the position of
                each prompt's last token.

        Returns:
            A dictionary of arrays whose axis 0 is the rows: the sum `score` of the
            logarithms of probabilities, the `position` of the next token,
            `has_stopped`, and the prompts, of `length` tokens, which stay.
        """
        beams, length = self.sampler.num_beams, rows.index + 1
        # At first all beams are alike, and only one of them is continued.
        is_first = ops.arange(length.shape[0]) % beams == 0
        return dict(
            score=ops.cast(ops.where(is_first, 0.0, -1e9), "float32"),
            position=ops.full_like(length, ops.min(length)),
            has_stopped=ops.zeros_like(length, dtype="bool"),
            length=ops.convert_to_tensor(length),
            prompt=ops.convert_to_tensor(rows.tokens),
        )

    def __call__(
        self, logits: Any, state: dict[str, Any], key: Any
    ) -> tuple[Any, dict[str, Any], Any]:
        """The next token of each beam, and the beam that it continues.

        Args:
            logits: float `(B · num_beams, V)`.
            state: As `start` gives it.
            key: Not used: nothing is drawn.

        Returns:
            `(ids, state, parents)`; `NO_TOKEN` for all once the search is over.
        """
        prompt, position = state["prompt"], state["position"]
        beams, vocabulary = self.sampler.num_beams, logits.shape[-1]
        scores = ops.log(self.sampler.compute_probabilities(logits))
        scores = scores + state["score"][:, None]
        score, places = ops.top_k(
            ops.reshape(scores, (-1, beams * vocabulary)), beams, sorted=False
        )
        places = ops.cast(places, "int32")
        first_rows = ops.arange(places.shape[0], dtype="int32")[:, None] * beams
        parents = ops.reshape(places // vocabulary + first_rows, (-1,))
        ids = ops.reshape(places % vocabulary, (-1,))
        given = ops.take_along_axis(prompt, position[:, None], axis=1)[:, 0]
        is_given = position < state["length"]
        ids = ops.where(is_given, given, ids)
        stops = ops.logical_and(self._is_stop(ids), ops.logical_not(is_given))
        has_stopped = ops.take(state["has_stopped"], parents, axis=0)
        # The answer is what was best when the last beam had its stop id.
        is_over = ops.all(self._has_stop(state))
        moved = dict(
            state,
            score=ops.where(is_over, state["score"], ops.reshape(score, (-1,))),
            position=position + 1,
            has_stopped=ops.logical_or(has_stopped, stops),
        )
        places = ops.arange(parents.shape[0], dtype="int32")
        parents = ops.where(is_over, places, parents)
        return ops.where(is_over, NO_TOKEN, ids), moved, parents

    def _has_stop(self, state):
        """bool `(B · num_beams,)`: whether beams have a stop id.

        keras-hub finds them in padding, too, until a token takes its place.
        """
        prompt = state["prompt"]
        columns = ops.arange(prompt.shape[1], dtype="int32")
        first = ops.maximum(state["length"], state["position"])
        in_padding = ops.logical_and(columns >= first[:, None], self._is_stop(prompt))
        return ops.logical_or(state["has_stopped"], ops.any(in_padding, axis=1))

    def _is_stop(self, ids):
        """Whether ids are among the stop ids; `NO_TOKEN` never is."""
        is_stop = ops.any(ids[..., None] == self.stop_token_ids, axis=-1)
        return ops.logical_and(is_stop, ids != NO_TOKEN)


def is_hub_beams(value: Any) -> bool:
    """Whether `value` searches as `keras_hub.samplers.BeamSampler` does."""
    known = hub_samplers()
    return known is not None and type(value).__call__ is known.BeamSampler.__call__
