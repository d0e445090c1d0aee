"""The record that each family of models fills in.

A file of this folder with a `FAMILY` is a family: all that its files and its keras-hub
backbone mean, in the words of `DecoderConfig`. Each source is optional, and may have
several entries where versions of a family are named apart.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from keras_kvcache.families.fields import Fields
from keras_kvcache.families.gguf_keys import Keys
from keras_kvcache.families.tensors import TensorNames


@dataclass(frozen=True)
class HuggingFace:
    """How folders that transformers writes are read.

    Attributes:
        model_type: Value of `model_type` in `config.json`.
        architectures: Names that `architectures` in `config.json` may have.
        read: Function of the config's fields that gives JSON-able arguments of
            `DecoderLM`, and the names of the tensors. Defaults are those of the
            family's config class in transformers: older files, and fields that all
            configs share, leave out what equals them. Rates of dropout aren't taken
            over: a model is loaded as it answers, not as it was trained. It raises
            `ValueError` for what the decoder doesn't do.
    """

    model_type: str
    architectures: tuple[str, ...]
    read: Callable[[Fields], tuple[dict[str, Any], TensorNames]]


@dataclass(frozen=True)
class Gguf:
    """How GGUF files are read.

    Attributes:
        architecture: Value of `general.architecture`, which is also the prefix of the
            keys.
        read: Function of the keys that gives JSON-able arguments of `DecoderLM`, and
            the names of the tensors. Norms that are stored with an offset of 1 added
            are plain `rms_norm`. It raises `ValueError` for what the decoder doesn't
            do.
    """

    architecture: str
    read: Callable[[Keys], tuple[dict[str, Any], TensorNames]]


@dataclass(frozen=True)
class KerasHub:
    """How a keras-hub model is read.

    Sizes that all backbones name alike, and options that the parts tell by themselves,
    such as biases and epsilons, are read without it.

    Attributes:
        backbone: Name of its class in `keras_hub.models`.
        options: Function of a backbone that gives arguments of `DecoderLM`, or of
            `EncoderDecoderLM`. It raises `ValueError` for what these don't do.
        block_parts: Function of a block of the backbone that gives the layers of
            keras-hub that `DecoderBlock(parts=…)` is to compute with.
        model_parts: Function of a backbone that gives the layers before and after the
            blocks, other than `token_embedding` and a decoder's `layer_norm`.
        knows: The arguments of the backbone that `options` and the parts account for,
            or that make a difference to training alone, beyond those of all families.
            A model with any other argument that isn't at its default is refused.
        end_of_turn: A second token, beside the end-of-text token, that ends an answer.
        has_encoder: Whether it's an encoder-decoder.
        has_task: Whether keras-hub has a `CausalLM` class for it.
    """

    backbone: str
    options: Callable[[Any], dict[str, Any]]
    block_parts: Callable[[Any], dict[str, Any]]
    model_parts: Callable[[Any], dict[str, Any]] = lambda backbone: {}
    knows: Collection[str] = ()
    end_of_turn: str | None = None
    has_encoder: bool = False
    has_task: bool = True


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        name: For people.
        hugging_face, gguf, keras_hub: How its files and models are read.
        refused: Backbones of keras-hub that look as if they were known, each with the
            reason why they aren't, written as the end of an error's sentence.
    """

    name: str
    hugging_face: tuple[HuggingFace, ...] = ()
    gguf: tuple[Gguf, ...] = ()
    keras_hub: tuple[KerasHub, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)


def classes(name: str) -> tuple[str, str]:
    """The classes of transformers with and without a language head."""
    return (f"{name}ForCausalLM", f"{name}Model")
