"""Making a model of keras-hub's into one of ours, with the same weights."""

import inspect
import sys
from typing import Any

from keras_kvcache.families import all_families, keras_hub_families
from keras_kvcache.hub.encoder_decoder import share_encoder_decoder
from keras_kvcache.hub.hub_tokenizer import HubTokenizer
from keras_kvcache.hub.parts import block_parts, model_parts
from keras_kvcache.models.decoder_lm import DecoderLM
from keras_kvcache.models.encoder_decoder_lm import EncoderDecoderLM
from keras_kvcache.models.own_copy import QUANTIZATIONS

# Of a model with rotary positions, which doesn't say how far it was trained.
DEFAULT_SEQUENCE_LENGTH = 8192
# Of how a task of keras-hub's decodes. What is written down anew may do anything.
METHODS = (
    "call_with_cache",
    "call_decoder_with_cache",
    "generate_step",
    "make_generate_function",
)
# Arguments of all families' backbones that are read here, or of training alone. One
# that is new to keras-hub may change numbers in ways that nobody here has heard of.
OPTIONS = frozenset(
    """
    dropout dtype hidden_dim intermediate_dim layer_norm_epsilon max_sequence_length
    name num_heads num_key_value_heads num_layers num_query_heads trainable
    vocabulary_size
    """.split()
)


def _naming_families(function):
    """Fills the families that there are into the docstring of a function."""
    known = [family for family in all_families().values() if family.keras_hub]
    if function.__doc__ is not None:
        function.__doc__ = function.__doc__.format(
            families=", ".join(family.name for family in known),
            backbones=" or ".join(_backbones_without_task()),
        )
    return function


def _backbones_without_task():
    """Names of backbones that keras-hub has no `CausalLM` for."""
    return [name for name, one in keras_hub_families().items() if not one.has_task]


@_naming_families
def from_keras_hub(
    causal_lm: Any, max_sequence_length: int | None = None
) -> DecoderLM | EncoderDecoderLM:
    """A model of ours that has the very weights of a keras-hub model.

    Both models share their layers: nothing is copied, and what `fit`, LoRA,
    `quantize` or `load_weights` does to one is seen by the other.

    Args:
        causal_lm: A `keras_hub.models.CausalLM` of one of the families
            {families};
            where keras-hub has no such class, the backbone itself: {backbones}.
        max_sequence_length: The most positions; `None` for what the model says,
            or 8192 if it doesn't. It takes no memory by itself.

    Returns:
        A `DecoderLM`, with the tokenizer of the keras-hub model if there is one.
        Its `save`, `save_weights` and `save_to_preset` write a `DecoderLM` with
        weights of its own. Of an encoder-decoder an `EncoderDecoderLM`, which isn't
        saved: the keras-hub model is.

    Raises:
        TypeError: `causal_lm` is none of these classes.
        ValueError: Its family is unknown, it has what can't be decoded here, it's
            quantized in a way that can't be shared, or `max_sequence_length` goes
            past what it knows.
    """
    return make_shared(DecoderLM, causal_lm, max_sequence_length)


def make_shared(
    cls: type[DecoderLM], causal_lm: Any, max_sequence_length: int | None
) -> DecoderLM | EncoderDecoderLM:
    """`from_keras_hub`, for a model of a class derived from `DecoderLM`.

    Args:
        cls: The class, which takes the arguments of `DecoderLM`.
        causal_lm, max_sequence_length: As in `from_keras_hub`.
    """
    backbone = getattr(causal_lm, "backbone", causal_lm)
    if max_sequence_length is None:
        named = getattr(backbone, "max_sequence_length", None)
        model = share(causal_lm, named or DEFAULT_SEQUENCE_LENGTH, cls)
    else:
        model = share(causal_lm, max_sequence_length, cls)
        if model.max_sequence_length < max_sequence_length:
            raise ValueError(
                "`max_sequence_length` must be at most the positions that the model "
                f"knows, {model.max_sequence_length}. Received: {max_sequence_length}"
            )
    return model


def share(
    causal_lm: Any, max_sequence_length: int, cls: type[DecoderLM] = DecoderLM
) -> DecoderLM | EncoderDecoderLM:
    """`from_keras_hub`, with an end of the positions for models that name none.

    Args:
        causal_lm: As in `from_keras_hub`.
        max_sequence_length: The most positions, where the model doesn't know fewer.
        cls: Class of the model, if it isn't an encoder-decoder.
    """
    backbone = _backbone_of(causal_lm)
    check_quantization(backbone)
    kind = type(backbone).__name__
    family = keras_hub_families()[kind]
    if family.has_encoder:
        if cls is not DecoderLM:
            raise ValueError(
                f"`{cls.__name__}` must be loaded from a model without an encoder. "
                f"Received: a {kind}"
            )
        policy = _plain_policy(backbone.dtype_policy)
        model = share_encoder_decoder(family, causal_lm, max_sequence_length, policy)
        _check_shared(model, causal_lm)
        return model
    blocks = [block_parts(family, block) for block in backbone.transformer_layers]
    sizes = dict(
        vocabulary_size=backbone.vocabulary_size,
        num_layers=len(blocks),
        hidden_dim=backbone.hidden_dim,
        intermediate_dim=backbone.intermediate_dim,
        dropout=backbone.dropout,
        max_sequence_length=max_sequence_length,
        **_heads(backbone),
    )
    options = family.options(backbone)
    has_last_position = "max_sequence_length" in options
    options["max_sequence_length"] = min(
        max_sequence_length, options.get("max_sequence_length", max_sequence_length)
    )
    parts = dict(
        token_embedding=backbone.token_embedding,
        final_norm=backbone.layer_norm,
        **model_parts(family, backbone),
        **{f"block_{i}": block for i, block in enumerate(blocks)},
    )
    preprocessor = causal_lm.preprocessor
    model = cls(
        **{**sizes, **_told_by_parts(blocks[0]), **_ends(backbone), **options},
        has_last_position=has_last_position,
        parts=parts,
        tokenizer=None
        if preprocessor is None
        else HubTokenizer(preprocessor, family.end_of_turn),
        dtype=_plain_policy(backbone.dtype_policy),
        name=causal_lm.name,
    )
    _check_shared(model, causal_lm)
    return model


def _backbone_of(causal_lm):
    """The backbone of a model that can be decoded here."""
    hub = sys.modules.get("keras_hub")
    families, alone = keras_hub_families(), _backbones_without_task()
    if hub is not None and isinstance(causal_lm, hub.models.CausalLM):
        backbone = causal_lm.backbone
    elif hub is not None and any(
        isinstance(causal_lm, getattr(hub.models, name)) for name in alone
    ):
        backbone = causal_lm
    else:
        raise TypeError(
            "`causal_lm` must be a `keras_hub.models.CausalLM` or a "
            f"{' or a '.join(f'`keras_hub.models.{name}`' for name in alone)}. "
            f"Received: {type(causal_lm).__name__}"
        )
    # A class of one's own may do anything, so no subclass passes for its base.
    kind, name = type(backbone), type(backbone).__name__
    is_theirs = kind is getattr(hub.models, name, None)
    if not is_theirs or name not in families:
        refused = [family.refused for family in all_families().values()]
        reasons = {key: why for one in refused for key, why in one.items()}
        raise ValueError(
            "`causal_lm` must have a backbone of one of the families "
            f"{', '.join(families)}. Received: a {type(causal_lm).__name__} with a "
            f"{name}{reasons.get(name, '') if is_theirs else ''}"
        )
    _check_methods(hub, causal_lm)
    _check_options(backbone, families[name].knows)
    return backbone


def _check_methods(hub, causal_lm):
    """Refuses a class that decodes in another way than the one it's derived from."""
    own = type(causal_lm)
    base = next(c for c in own.__mro__ if getattr(hub.models, c.__name__, None) is c)
    for name in METHODS:
        if getattr(own, name, None) is not getattr(base, name, None):
            raise ValueError(
                f"`causal_lm` must decode as a {base.__name__} does. Received: a "
                f"{own.__name__} with a `{name}` of its own"
            )


def _check_options(backbone, knows):
    """Refuses what a later keras-hub has and this package never heard of."""
    defaults = inspect.signature(type(backbone).__init__).parameters
    for name, value in backbone.get_config().items():
        if name in OPTIONS or name in knows or name not in defaults:
            continue
        if value != defaults[name].default:
            raise ValueError(
                "`causal_lm` must have a backbone whose options are known here, or as "
                f"they are by default. Received: a {type(backbone).__name__} with "
                f"{name}={value!r}"
            )


def check_quantization(backbone: Any) -> None:
    """Refuses a backbone with layers that are quantized in a way not tried here.

    Args:
        backbone: A `keras_hub.models.Backbone`.

    Raises:
        ValueError: The mode of a layer isn't in `QUANTIZATIONS`.
    """
    for layer in backbone._flatten_layers():
        mode = getattr(layer, "quantization_mode", None)
        if mode not in QUANTIZATIONS:
            raise ValueError(
                "`causal_lm` must be quantized in no other mode than "
                f"{', '.join(map(str, QUANTIZATIONS[1:]))}. Received: "
                f"quantization_mode={mode!r} of {layer.path}"
            )


def _heads(backbone):
    heads = getattr(backbone, "num_query_heads", None) or backbone.num_heads
    return dict(
        num_query_heads=heads,
        num_key_value_heads=getattr(backbone, "num_key_value_heads", heads),
        head_dim=backbone.hidden_dim // heads,
    )


def _told_by_parts(block):
    """Options that a block's parts tell, the same in all blocks."""
    attention, query_norm = block["attention"], block.get("query_norm")
    return dict(
        use_bias=attention["output_dense"].bias is not None,
        attention_bias=attention["query_dense"].bias is not None,
        layer_norm_epsilon=block["attention_norm"].epsilon,
        query_key_norm=query_norm is not None,
        query_key_norm_epsilon=None if query_norm is None else query_norm.epsilon,
        use_post_attention_norm="post_attention_norm" in block,
        use_post_ffw_norm="post_ffw_norm" in block,
    )


def _ends(backbone):
    """Options of what stands before and after the blocks."""
    return dict(
        tie_word_embeddings=backbone.token_embedding.tie_weights,
        final_logit_soft_cap=backbone.token_embedding.logit_soft_cap,
        final_norm_epsilon=backbone.layer_norm.epsilon,
    )


def _plain_policy(policy):
    """A backbone's dtype policy without quantization, which its layers know of."""
    policy = getattr(policy, "default_policy", policy)
    return policy.name.split("_from_")[-1]


def _check_shared(model, causal_lm):
    """Refuses a model with a weight that isn't one of keras-hub's."""
    theirs = {id(variable) for variable in causal_lm.variables}
    own = [weight.path for weight in model.weights if id(weight) not in theirs]
    if own:
        raise ValueError(
            "`causal_lm` must have all weights of its family. Received: a "
            f"{type(causal_lm).__name__} that lacks {', '.join(own[:5])}"
        )
