"""Where each weight of the decoder is among the tensors of a model's files.

A family says what it calls its tensors; from that and the decoder's arguments follow,
for every weight of the decoder by its name, the `Source` that it is read from.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any


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
        twin: Another tensor that, if the file has it, must equal this one; or `None`.
        interleaved: Of a query or key projection, whose rotary pairs lie side by side,
            its heads, head size and how many components of a head are rotated; else
            `None`.
    """

    tensors: tuple[str, ...]
    stored: tuple[int, ...]
    shape: tuple[int, ...]
    transposed: bool = False
    part: tuple[int, int, int] | None = None
    twin: str | None = None
    interleaved: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class TensorNames:
    """The names that a family gives its tensors, mostly without `.weight` and `.bias`.

    Attributes:
        token_embedding, final_norm: Of the layers around the blocks.
        block: Of a block, with `{}` in the place of its number.
        parts: For each layer of a `DecoderBlock`, by its path, its name within a
            block; or several names, of which the first that exists is used. Layers of
            one name lie in one tensor, one after the other. Kernels of experts are
            named whole, with `{}` in the place of an expert's number if there is one
            tensor an expert.
        prefix: What the names begin with, but for the language head's. Files of a
            model without its language head leave it out.
        lm_head: Of the language head, if it isn't the token embedding.
        position_table: Of the learned positions, or `None`.
        position_offset: Rows of that table that stand for no position and come first.
        inputs_first: Whether kernels are stored as `(inputs, outputs)`.
        interleaved: Whether the two components of a rotary pair lie side by side in
            the rows of query and key projections, `(2j, 2j + 1)`. The decoder pairs
            `j` with `j + rotary_dim / 2`.
        zero_biases: Layers, as in `parts`, that have no bias in the file but one in
            the decoder, because one option switches several; theirs is zero.
        ignored: Pattern of tensors that are no weights and follow from the config.
    """

    token_embedding: str
    final_norm: str
    block: str
    parts: Mapping[str, str | tuple[str, ...]]
    prefix: str = ""
    lm_head: str = "lm_head"
    position_table: str | None = None
    position_offset: int = 0
    inputs_first: bool = False
    interleaved: bool = False
    zero_biases: Collection[str] = field(default=())
    ignored: str = ""


def weight_sources(
    config: Mapping[str, Any], names: TensorNames, tensors: Collection[str]
) -> dict[str, Source]:
    """Maps the decoder's weights to the tensors of a model.

    Args:
        config: Arguments of `DecoderLM`.
        names: Of the family's tensors.
        tensors: The names in the files.

    Returns:
        A source for each weight, by its path in the decoder.
    """
    return _Sources(config, names, tensors).read()


class _Sources:
    """Collects sources."""

    def __init__(self, config, names, tensors):
        self.config, self.names, self.tensors = config, names, tensors
        has_prefix = any(name.startswith(names.prefix) for name in tensors)
        self.prefix = names.prefix if has_prefix else ""
        self.found: dict[str, Source] = {}

    def read(self):
        config, names = self.config, self.names
        D, H = config["hidden_dim"], config["head_dim"]
        self.embedding()
        if names.position_table is not None:
            last = names.position_offset + config["max_sequence_length"]
            self.add(
                "position_embedding/embeddings",
                f"{self.prefix}{names.position_table}.weight",
                (last, D),
                (config["max_sequence_length"], D),
                part=(0, names.position_offset, last),
            )
        for index in range(config["num_layers"]):
            ours, block = f"block_{index}", self.prefix + names.block.format(index)
            chosen = {part: self.choose(block, part) for part in names.parts}
            ends: dict[str, int] = {}
            for part, theirs in chosen.items():
                if part.endswith("_norm"):
                    is_of_heads = part in ("query_norm", "key_norm")
                    self.norm(f"{ours}/{part}", theirs, H if is_of_heads else D)
                    continue
                inputs, outputs = self.axes(part)
                sharing = [other for other, name in chosen.items() if name == theirs]
                sizes = [math.prod(self.axes(other)[1]) for other in sharing]
                begin = ends.get(theirs, 0)
                ends[theirs] = begin + math.prod(outputs)
                fused = (begin, ends[theirs]) if len(sharing) > 1 else None
                add = self.experts if "/experts/" in part else self.dense
                add(ours, part, theirs, inputs, outputs, fused, sum(sizes))
        self.norm("final_norm", self.prefix + names.final_norm, D)
        return self.found

    def choose(self, block, part):
        """The name of a part in the files: the first of several that is there."""
        theirs = self.names.parts[part]
        several = [theirs] if isinstance(theirs, str) else theirs
        several = [f"{block}.{name}" for name in several]
        for name in several:
            first = name.format(0)
            if first in self.tensors or f"{first}.weight" in self.tensors:
                return name
        return several[-1]

    def axes(self, part):
        """The axes of a kernel: inputs and outputs."""
        config = self.config
        D, F, H = (config[n] for n in ("hidden_dim", "intermediate_dim", "head_dim"))
        N, K = config["num_query_heads"], config["num_key_value_heads"]
        return {
            "query": ((D,), (N, H)),
            "key": ((D,), (K, H)),
            "value": ((D,), (K, H)),
            "attention_output": ((N, H), (D,)),
            "gate": ((D,), (F,)),
            "intermediate": ((D,), (F,)),
            "output": ((F,), (D,)),
            "router": ((D,), (config.get("num_experts"),)),
        }[part.rpartition("/")[2].removesuffix("_kernel")]

    def add(self, ours, tensor, stored, shape=None, **how):
        """One weight that is one tensor, or a part of it, as in `Source`."""
        shape = stored if shape is None else shape
        self.found[ours] = Source((tensor,), stored, shape, **how)

    def embedding(self):
        """The token embedding, and the language head if it has its own weights."""
        V, D = self.config["vocabulary_size"], self.config["hidden_dim"]
        ours, head = "token_embedding/embeddings", f"{self.names.lm_head}.weight"
        table = f"{self.prefix}{self.names.token_embedding}.weight"
        if not self.config["tie_word_embeddings"]:
            self.add(ours, table, (V, D))
            ours = "token_embedding/reverse_embeddings"
            self.add(ours, head, (V, D), (D, V), transposed=True)
        elif table not in self.tensors and head in self.tensors:
            # Of two names for one tensor safetensors' `save_model` keeps the first.
            self.add(ours, head, (V, D))
        else:
            self.add(ours, table, (V, D), twin=head)

    def norm(self, ours, theirs, size):
        """A normalization over `size` components."""
        if self.config["normalization"] == "layer_norm":
            self.add(f"{ours}/gamma", f"{theirs}.weight", (size,))
            self.add(f"{ours}/beta", f"{theirs}.bias", (size,))
        else:
            self.add(f"{ours}/scale", f"{theirs}.weight", (size,))

    def dense(self, ours, part, theirs, inputs, outputs, fused, total):
        """A projection; if it's `fused`, from where to where in `total` outputs."""
        width, is_turned = math.prod(inputs), not self.names.inputs_first
        interleaved = None
        if self.names.interleaved and part in ("attention/query", "attention/key"):
            rotary_dim = self.config.get("rotary_dim") or self.config["head_dim"]
            interleaved = (*outputs, rotary_dim)
        self.add(
            f"{ours}/{part}/kernel",
            f"{theirs}.weight",
            (total, width) if is_turned else (width, total),
            inputs + outputs,
            transposed=is_turned,
            part=fused and (0 if is_turned else 1, *fused),
            interleaved=interleaved,
        )
        if not self.has_bias(part):
            return
        bias = f"{ours}/{part}/bias"
        if part in self.names.zero_biases:
            self.found[bias] = Source((), (), outputs)
        else:
            how = dict(part=fused and (0, *fused), interleaved=interleaved)
            self.add(bias, f"{theirs}.bias", (total,), outputs, **how)

    def has_bias(self, part):
        """Whether the decoder's projection has a bias."""
        everywhere = self.config["use_bias"]
        if part in ("attention/query", "attention/key", "attention/value"):
            in_attention = self.config.get("attention_bias")
            return everywhere if in_attention is None else in_attention
        return everywhere and part != "feedforward/router"

    def experts(self, ours, part, theirs, inputs, outputs, fused, total):
        """The kernels of all experts, stored one tensor an expert or all in one."""
        E, (width,) = self.config["num_experts"], inputs
        shape, ours = (E, *inputs, *outputs), f"{ours}/{part}"
        if "{}" in theirs:
            tensors = tuple(theirs.format(expert) for expert in range(E))
            self.found[ours] = Source(tensors, (total, width), shape, transposed=True)
        else:
            how = dict(transposed=True, part=fused and (1, *fused))
            self.add(ours, theirs, (E, total, width), shape, **how)
