"""keras-hub's tokenizer, called as ours are."""

from collections.abc import Iterable
from typing import NoReturn

import keras
import numpy as np


@keras.saving.register_keras_serializable(package="keras_kvcache")
class HubTokenizer:
    """Encodes and decodes as `generate` of the keras-hub model does.

    Args:
        preprocessor: A `keras_hub.models.CausalLMPreprocessor`.
        end_of_turn: A token that ends an answer besides that of the end, if the
            vocabulary has it; `None` for no other.

    Attributes:
        stop_token_ids: Ids that end an answer.
    """

    def __init__(self, preprocessor, end_of_turn=None):
        self._preprocessor = preprocessor
        self._end_of_turn = end_of_turn

    def __repr__(self):
        tokenizer = self._preprocessor.tokenizer
        return (
            f"<{type(self).__name__} of a {type(tokenizer).__name__}, "
            f"vocabulary_size={tokenizer.vocabulary_size()}, "
            f"stop_token_ids={self.stop_token_ids}>"
        )

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Ids that end a text: those of keras-hub's `stop_token_ids="auto"`."""
        tokenizer = self._preprocessor.tokenizer
        ids = [tokenizer.end_token_id, getattr(tokenizer, "end_token2_id", None)]
        if self._end_of_turn is not None:
            token_id = tokenizer.token_to_id(self._end_of_turn)
            # What a vocabulary lacks has the id of the unknown.
            if tokenizer.id_to_token(token_id) == self._end_of_turn:
                ids.append(token_id)
        return tuple(token for token in ids if token is not None)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, the start token included if the model wants one."""
        length = 64
        while True:
            packed = self._preprocessor.generate_preprocess(
                [text], sequence_length=length
            )
            mask = keras.ops.convert_to_numpy(packed["padding_mask"])[0].astype(bool)
            if not mask.all():
                return keras.ops.convert_to_numpy(packed["token_ids"])[0][mask].tolist()
            # Full is cut short, perhaps.
            length *= 4

    def decode(self, token_ids: Iterable[int]) -> str:
        """Text of token ids, without special tokens."""
        token_ids = np.array([list(token_ids)], "int32")
        if not token_ids.size:
            return ""
        packed = {"token_ids": token_ids, "padding_mask": np.ones_like(token_ids, bool)}
        return self._preprocessor.generate_postprocess(packed)[0]

    def save_assets(self, directory: str) -> None:
        """Writes the vocabulary's files into a folder."""
        self._preprocessor.tokenizer.save_assets(directory)

    def load_assets(self, directory: str) -> None:
        """Reads what `save_assets` wrote."""
        self._preprocessor.tokenizer.load_assets(directory)

    def get_config(self):
        """Constructor arguments."""
        preprocessor = keras.saving.serialize_keras_object(self._preprocessor)
        return {"preprocessor": preprocessor, "end_of_turn": self._end_of_turn}

    @classmethod
    def from_config(cls, config):
        """The tokenizer that `get_config` describes, without its vocabulary."""
        preprocessor = keras.saving.deserialize_keras_object(config["preprocessor"])
        return cls(preprocessor, config["end_of_turn"])


@keras.saving.register_keras_serializable(package="keras_kvcache")
class HubPairTokenizer(HubTokenizer):
    """Encodes and decodes as `generate` of an encoder-decoder model does.

    Args:
        preprocessor: A `keras_hub.models.Seq2SeqLMPreprocessor`.
    """

    def encode(self, text: str) -> NoReturn:
        """Refuses: texts come in pairs.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "`inputs` must hold texts for the encoder and the decoder; see "
            f"`encode_pairs`. Received: {text!r}"
        )

    def encode_pairs(
        self, encoder_texts: list[str], decoder_texts: list[str]
    ) -> dict[str, np.ndarray]:
        """Arrays as `EncoderDecoderLM` takes them, the start tokens included.

        Args:
            encoder_texts, decoder_texts: Lists of as many strings.
        """
        packed = self._preprocessor.generate_preprocess(
            {"encoder_text": encoder_texts, "decoder_text": decoder_texts}
        )
        return {k: keras.ops.convert_to_numpy(v) for k, v in packed.items()}

    def decode(self, token_ids: Iterable[int]) -> str:
        """Text of token ids, without special tokens."""
        token_ids = np.array([list(token_ids)], "int32")
        if not token_ids.size:
            return ""
        mask = np.ones_like(token_ids, bool)
        packed = {"decoder_token_ids": token_ids, "decoder_padding_mask": mask}
        return self._preprocessor.generate_postprocess(packed)[0]
