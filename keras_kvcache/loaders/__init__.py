"""Models from files and by name, as plain data."""

from keras_kvcache.known_names import PRESETS, Preset, get_preset, known_presets
from keras_kvcache.loaders.checkpoint import Checkpoint
from keras_kvcache.loaders.download import DownloadError, fetch
from keras_kvcache.loaders.gguf import read_gguf
from keras_kvcache.loaders.hugging_face import read_hugging_face
from keras_kvcache.loaders.json_file import read_json
from keras_kvcache.loaders.progress import progress_bar

__all__ = [
    "PRESETS",
    "Checkpoint",
    "DownloadError",
    "Preset",
    "fetch",
    "get_preset",
    "known_presets",
    "progress_bar",
    "read_gguf",
    "read_hugging_face",
    "read_json",
]
