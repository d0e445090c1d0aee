"""The tokenizer of a model whose tokenizer files can't be read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Files of tokenizers that were saved without a `tokenizer.json`.
_OLDER_FILES = (
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tekken.json",
)


class UnreadTokenizer:
    """Stands for a tokenizer whose files aren't read: it has its stop ids, no text.

    Args:
        folder: Of the model.
        files: The names of the tokenizer's files.
        stop_token_ids: The ids after which generation should stop.
    """

    def __init__(
        self,
        folder: str | Path,
        files: Sequence[str],
        stop_token_ids: Sequence[int] = (),
    ):
        self._folder, self._files = folder, tuple(files)
        self._reason = (
            f"Text needs the tokenizer's `tokenizer.json`; {folder} has "
            f"{', '.join(files)}, which aren't read. transformers makes one: "
            "`AutoTokenizer.from_pretrained(folder).save_pretrained(folder)`. "
            "Token ids work without"
        )
        self.stop_token_ids = tuple(stop_token_ids)

    def encode(self, text: str) -> list[int]:
        """Refuses.

        Raises:
            ValueError: Always; the message names the files.
        """
        raise ValueError(f"{self._reason}. Received: text")

    def decode(self, ids: Sequence[int]) -> str:
        """Refuses.

        Raises:
            ValueError: Always; the message names the files.
        """
        raise ValueError(f"{self._reason}. Received: ids to be decoded")

    @property
    def chat_template(self) -> str:
        """Refuses.

        Raises:
            ValueError: Always; the message names the files.
        """
        raise ValueError(f"{self._reason}. Received: a chat")

    def get_config(self) -> dict[str, Any]:
        """Constructor arguments; of the folder only its name."""
        return {
            "folder": Path(self._folder).name,
            "files": list(self._files),
            "stop_token_ids": list(self.stop_token_ids),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> UnreadTokenizer:
        """The tokenizer that `get_config` describes."""
        return cls(**config)


def find_older_files(folder: Path) -> list[str]:
    """The names of the files of a tokenizer that has no `tokenizer.json`."""
    named = [name for name in _OLDER_FILES if (folder / name).exists()]
    return named + sorted(path.name for path in folder.glob("*.tiktoken"))
