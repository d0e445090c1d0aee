"""The weights of a Hugging Face folder: its safetensors files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from keras_kvcache.errors import quoted, shortened
from keras_kvcache.loaders.json_file import read_json

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_DTYPES = ("F32", "BF16", "F16")


class TensorFiles:
    """The tensors in a folder's safetensors files.

    Only the headers are read at first. The format and why it needs no trust:
    https://github.com/huggingface/safetensors.

    Args:
        folder: It has `model.safetensors`, or several files and an index.

    Attributes:
        shapes: For each tensor, by name, its shape.

    Raises:
        FileNotFoundError: A file is absent.
        ValueError: A file is damaged or cut short, or the index doesn't fit.
    """

    def __init__(self, folder: Path):
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._paths: dict[str, Path] = {}
        index = _read_index(folder)
        for file_name in dict.fromkeys(index.values()) if index else (WEIGHTS_FILE,):
            self._read_header(folder / file_name)
        for name, file_name in index.items():
            if self._paths.get(name) != folder / file_name:
                raise ValueError(
                    f"{file_name} must hold the tensor {quoted(name)}, as "
                    f"{INDEX_FILE} says."
                )

    def _read_header(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} must be there, as {INDEX_FILE} names it. Received: no file"
            )
        with _open(path) as file:
            for name in file.keys():
                if name in self._paths:
                    raise ValueError(
                        f"The tensor {quoted(name)} must be in one file only. "
                        f"Received: {self._paths[name].name} and {path.name}"
                    )
                entry = file.get_slice(name)
                if entry.get_dtype() not in _DTYPES:
                    raise ValueError(
                        f"The tensor {quoted(name)} must be stored as one of "
                        f"{', '.join(_DTYPES)}. Received: {entry.get_dtype()}"
                    )
                self.shapes[name] = tuple(entry.get_shape())
                self._paths[name] = path

    def read(self, name: str, part: tuple[int, int, int] | None = None) -> np.ndarray:
        """A tensor, widened to float32.

        Args:
            name: Of the tensor.
            part: An axis, 0 or 1, and from where to where on it; `None` for all.

        Raises:
            ValueError: The file has changed since it was opened first.
        """
        axis, begin, end = part or (0, 0, self.shapes[name][0])
        slices = (slice(None),) * axis + (slice(begin, end),)
        from safetensors import SafetensorError

        try:
            with _open(self._paths[name]) as file:
                return np.asarray(file.get_slice(name)[slices]).astype("float32")
        except (SafetensorError, FileNotFoundError) as error:
            raise ValueError(
                f"{self._paths[name]} has changed since it was opened: "
                f"{shortened(error, 500)}"
            ) from error


def _read_index(folder: Path) -> dict[str, str]:
    """Maps tensors to files by the index; empty where there is only one file."""
    if (folder / WEIGHTS_FILE).exists():
        return {}
    if not (folder / INDEX_FILE).exists():
        found = sorted(path.name for path in folder.glob("*.bin"))
        pickled = (
            f". It has {', '.join(found[:3])}: a pickle, which may run any code when "
            "it is read, so it isn't. `save_pretrained` of the model in transformers "
            "writes safetensors"
        )
        raise FileNotFoundError(
            f"`preset`, if a Hugging Face folder, must have a {WEIGHTS_FILE} or a "
            f"{INDEX_FILE}. Received: {folder}, which has neither"
            f"{pickled if found else ''}"
        )
    places = read_json(folder / INDEX_FILE).get("weight_map")
    if (
        not isinstance(places, dict)
        or not places
        or not all(isinstance(place, str) for place in places.values())
    ):
        raise ValueError(f"{INDEX_FILE} must have a `weight_map` of file names.")
    for place in places.values():
        if Path(place).name != place:
            raise ValueError(
                f"{INDEX_FILE} must name files in its own folder. Received: "
                f"{quoted(place)}"
            )
    return places


def _open(path: Path):
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="np")
    except SafetensorError as error:
        raise ValueError(
            f"{path.name} is damaged or cut short: {shortened(error, 500)}"
        ) from error
