"""The vocabularies that llama.cpp is tested with, as files.

They lie in a source archive of llama-cpp-python's, of 77 MB, which takes pip some
seconds. pip asks a package's build backend for its name and version before it keeps an
archive; the true one would be downloaded, too, so a module of its name answers.
"""

import os
import subprocess
import sys
import tarfile

import filelock

from keras_kvcache.runtime.cache_folder import cache_folder

DISTRIBUTION, VERSION = "llama_cpp_python", "0.3.36"
BEGINNING = f"{DISTRIBUTION}-{VERSION}/vendor/llama.cpp/models/ggml-vocab-"
NAMES = [
    "aquila",
    "baichuan",
    "bert-bge",
    "command-r",
    "deepseek-coder",
    "deepseek-llm",
    "falcon",
    "gemma-4",
    "gpt-2",
    "gpt-neox",
    "llama-bpe",
    "llama-spm",
    "mpt",
    "nomic-bert-moe",
    "phi-3",
    "qwen2",
    "qwen35",
    "refact",
    "starcoder",
]
BACKEND = f'''
from pathlib import Path

def prepare_metadata_for_build_wheel(folder, config_settings=None):
    name = "{DISTRIBUTION}-{VERSION}.dist-info"
    text = "Metadata-Version: 2.1\\nName: {DISTRIBUTION}\\nVersion: {VERSION}\\n"
    path = Path(folder, name, "METADATA")
    path.parent.mkdir()
    path.write_text(text)
    return name
'''


def fetch_vocabularies():
    """A folder of `NAME.gguf` for each of `NAMES`, downloaded on first use.

    Raises:
        subprocess.CalledProcessError: pip can't download the archive.
    """
    folder = cache_folder() / f"{DISTRIBUTION}-{VERSION}"
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / ".lock"):
        # The archive is there until all of it is unpacked.
        if any(folder.glob("*.tar.gz")) or not any(folder.glob("*.gguf")):
            archive = _download(folder)
            _unpack(archive, folder)
            archive.unlink()
    return folder


def _download(folder):
    backend = folder / "backend" / "scikit_build_core" / "build.py"
    backend.parent.mkdir(parents=True, exist_ok=True)
    backend.write_text(BACKEND)
    requirement = f"{DISTRIBUTION}=={VERSION}"
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "download", requirement, "--no-deps"),
            *("--no-binary", DISTRIBUTION, "--no-build-isolation", "--no-input"),
            *("--dest", str(folder), "--progress-bar", "off"),
        ],
        env=os.environ | {"PYTHONPATH": str(backend.parent.parent)},
        check=True,
    )
    (archive,) = folder.glob("*.tar.gz")
    return archive


def _unpack(archive, folder):
    with tarfile.open(archive) as files:
        for file in files:
            if file.name.startswith(BEGINNING) and file.name.endswith(".gguf"):
                name = file.name.removeprefix(BEGINNING)
                (folder / name).write_bytes(files.extractfile(file).read())
    found = sorted(path.stem for path in folder.glob("*.gguf"))
    assert found == NAMES, found
