"""Where each weight of the decoder is in a Hugging Face model.

A layout is a function of the decoder's arguments that gives, for every weight of the
decoder by its name, the `Source` it is made of.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from keras_kvcache.errors import quoted
from keras_kvcache.loaders.hugging_face_files import TensorFiles

LM_HEAD = "lm_head.weight"
# Tables that older models stored beside their weights, and that follow from the
# config: rotary frequencies, GPT-2's causal mask and what it masks with.
_NOT_WEIGHTS = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|attn\.(bias|masked_bias))")


@dataclass(frozen=True)
class Source:
    """The tensors that one weight of the decoder is read from, and how.

    Attributes:
        tensors: Names in the files: one, several to be stacked, or none for a
            bias that the model doesn't have and the decoder has, which is zero.
        stored: The shape each of them must have.
        shape: The shape the decoder wants.
        transposed: Whether the last two axes change places.
        part: An axis, 0 or 1, and from where to where on it, of a tensor that
            holds several weights; else `None`.
        twin: A tensor that must equal it where it is stored, too, or `None`.
    """

    tensors: tuple[str, ...]
    stored: tuple[int, ...]
    shape: tuple[int, ...]
    transposed: bool = False
    part: tuple[int, int, int] | None = None
    twin: str | None = None


def read_source(files: TensorFiles, source: Source) -> np.ndarray:
    """One weight, float32, in the decoder's layout."""
    if not source.tensors:
        return np.zeros(source.shape, "float32")
    arrays = [files.read(name, source.part) for name in source.tensors]
    if source.twin in files.shapes and not np.array_equal(
        arrays[0], files.read(source.twin)
    ):
        raise ValueError(
            "`tie_word_embeddings` must be false for a model whose "
            f"{quoted(source.twin)} differs from {quoted(source.tensors[0])}. "
            "Received: true"
        )
    if source.transposed:
        arrays = [array.swapaxes(-1, -2) for array in arrays]
    array = np.stack(arrays) if len(arrays) > 1 else arrays[0]
    return array.reshape(source.shape)


def check_sources(files: TensorFiles, sources: dict[str, Source]) -> None:
    """Raises unless the files' tensors are exactly those the model is made of."""
    wanted = {
        name: source.stored for source in sources.values() for name in source.tensors
    }
    twins = {source.twin: source.stored for source in sources.values() if source.twin}
    wanted |= {name: shape for name, shape in twins.items() if name in files.shapes}
    _refuse("the model must have these tensors, but hasn't", wanted, files.shapes)
    extra = [name for name in files.shapes if not _NOT_WEIGHTS.fullmatch(name)]
    # One left over (a bias, an adapter) would change the model's answers, so it is
    # never skipped in silence.
    _refuse("it has tensors that the decoder has no place for", extra, wanted)
    for name, shape in wanted.items():
        if files.shapes[name] != shape:
            raise ValueError(
                f"tensor {quoted(name)} must have shape {shape}. Received: "
                f"{files.shapes[name]}"
            )


def _refuse(reason: str, names: Collection[str], known: Collection[str]) -> None:
    found = [name for name in names if name not in known]
    if found:
        more = f" and {len(found) - 6} more" if len(found) > 6 else ""
        raise ValueError(f"{reason}: {', '.join(found[:6])}{more}.")


class Layout:
    """Collects sources.

    Args:
        config: The decoder's arguments.
        names: The tensors in the files.
        prefix: What the names of a whole model's tensors begin with. Files of a
            model without its language head leave it out.

    Attributes:
        sources: By the names of the decoder's weights.
    """

    def __init__(self, config: dict[str, Any], names: Collection[str], prefix: str):
        self.config, self.names = config, names
        self.sources: dict[str, Source] = {}
        self._prefix = prefix if any(n.startswith(prefix) for n in names) else ""

    def named(self, tensor: str) -> str:
        """The name of a tensor in the files."""
        return self._prefix + tensor

    def add(self, name: str, tensor: str, stored: tuple[int, ...], shape=None, **how):
        """One weight that is one tensor, or a part of it, as in `Source`."""
        self.sources[name] = Source(
            (self.named(tensor),), stored, stored if shape is None else shape, **how
        )

    def embedding(self, tensor: str) -> None:
        """The token embedding, and the language head if it has its own weights."""
        V, D = self.config["vocabulary_size"], self.config["hidden_dim"]
        is_tied = self.config["tie_word_embeddings"]
        name, table = "token_embedding/embeddings", self.named(tensor)
        if is_tied and table not in self.names and LM_HEAD in self.names:
            # Of two names for one tensor safetensors' `save_model` keeps the first.
            self.sources[name] = Source((LM_HEAD,), (V, D), (V, D))
        else:
            self.add(name, tensor, (V, D), twin=LM_HEAD if is_tied else None)
        if not is_tied:
            self.sources["token_embedding/reverse_embeddings"] = Source(
                (LM_HEAD,), (V, D), (D, V), transposed=True
            )

    def norm(self, name: str, tensor: str, size: int | None = None) -> None:
        """A normalization over `size` components; `None` for the model's width."""
        shape = (size or self.config["hidden_dim"],)
        if self.config["normalization"] == "layer_norm":
            self.add(f"{name}/gamma", f"{tensor}.weight", shape)
            self.add(f"{name}/beta", f"{tensor}.bias", shape)
        else:
            self.add(f"{name}/scale", f"{tensor}.weight", shape)

    def dense(
        self,
        name: str,
        tensor: str,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        *,
        has_bias: bool = False,
        stores_bias: bool = True,
        fused: tuple[int, int] | None = None,
        inputs_first: bool = False,
    ) -> None:
        """A projection.

        Args:
            name: Of the layer in the decoder.
            tensor: Its name in the files, without `.weight`.
            inputs, outputs: The axes of its kernel.
            has_bias: Whether the decoder's layer has a bias.
            stores_bias: Whether the model has it, too; else it is zero.
            fused: For one of several in one tensor, where its outputs begin and
                how many outputs there are in all.
            inputs_first: Whether the stored kernel is `(inputs, outputs)`.
        """
        count, width = math.prod(outputs), math.prod(inputs)
        begin, total = fused or (0, count)

        def part(axis):
            return (axis, begin, begin + count) if fused else None

        self.add(
            f"{name}/kernel",
            f"{tensor}.weight",
            (width, total) if inputs_first else (total, width),
            inputs + outputs,
            transposed=not inputs_first,
            part=part(1 if inputs_first else 0),
        )
        if has_bias and stores_bias:
            self.add(f"{name}/bias", f"{tensor}.bias", (total,), outputs, part=part(0))
        elif has_bias:
            self.sources[f"{name}/bias"] = Source((), (), outputs)
