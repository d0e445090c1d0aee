"""How long from starting Python to the first token?

Every start is a new process, timed from before it is made: import, the model, and the
first token of a prompt of 32 tokens with room for 1024 more, compiled and run. Compiled
programs, our kernel among them, are kept in a folder (`JAX_COMPILATION_CACHE_DIR`,
`KERAS_KVCACHE_HOME`), empty for the first of two starts; the second finds what the
first one compiled. Nothing is downloaded, and files
come from the operating system's memory.

keras-hub can't stop after the first token or stream it, so it gets a prompt that leaves
room for one token. As it runs the padding of a short prompt too, that takes as long.
All its tokens are made in one program. We have one program for the prompt and one for
the rest, which is compiled when the first token is out: `second token s` is what the
second token takes beyond `in all s`.

keras-hub's Llama can't read SmolLM2's GGUF file and has random weights. We are there
with random weights, and with the file, which takes reading and dequantizing.
"""

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import harness

SMOLLM2 = dict(
    vocabulary_size=49152,
    num_layers=30,
    num_query_heads=9,
    num_key_value_heads=3,
    hidden_dim=576,
    intermediate_dim=1536,
    tie_word_embeddings=True,
)
TINY = {**SMOLLM2, "vocabulary_size": 211, "num_layers": 2, "intermediate_dim": 64}
LONGEST = 8192
PROMPT, ROOM = list(range(1, 33)), 1024
STARTS = ("first", "second")


def main():
    options = harness.read_arguments("Times starts, from nothing to the first token.")
    report = harness.Report("cold_start", options)
    with tempfile.TemporaryDirectory() as folder:
        contenders = make_contenders(options.quick, folder)
        starts = {(name, start): [] for name in contenders for start in STARTS}
        for round_ in range(1 if options.quick else 3):
            for name in list(contenders)[:: 1 if round_ % 2 == 0 else -1]:
                programs = tempfile.mkdtemp(dir=folder)
                for start in STARTS:
                    seconds = time_start(*contenders[name], programs)
                    starts[name, start].append(seconds)
    for (name, start), rounds in starts.items():
        medians = {
            stage: statistics.median(seconds[stage] for seconds in rounds)
            for stage in rounds[0]
        }
        report.add(contender=name, start=start, **medians)
    report.finish()


def make_contenders(quick, folder):
    """A dictionary from names to the function that a new process calls, and on what."""
    sizes = TINY if quick else SMOLLM2
    contenders = {"keras-kvcache, random weights": (run_keras_kvcache, sizes)}
    preset = make_tiny_preset(f"{folder}/preset") if quick else find_smollm2()
    if preset is not None:
        contenders["keras-kvcache"] = run_keras_kvcache, preset
    if importlib.util.find_spec("keras_hub") is None:
        print("keras-hub is left out: no module keras_hub")
    else:
        contenders["keras-hub, random weights"] = run_keras_hub, sizes
    return contenders


def make_tiny_preset(folder):
    from keras_kvcache import DecoderLM

    DecoderLM(**TINY, max_sequence_length=LONGEST).save_to_preset(folder)
    return folder


def find_smollm2():
    """The model's file, downloaded if need be; `None` if it can't be."""
    from keras_kvcache.loaders import DownloadError, fetch

    try:
        return str(fetch("smollm2_135m_instruct"))
    except DownloadError as error:
        print(f"SmolLM2's weights are left out: {error}")
        return None


def time_start(function, argument, programs):
    """Calls a function of this file in a new process.

    Args:
        function: It returns the names of its stages with the times of their ends.
        argument: Its argument.
        programs: Folder of compiled programs.

    Returns:
        A dictionary of the seconds that each stage took, and in all.
    """
    environment = {
        **os.environ,
        "KERAS_BACKEND": "jax",
        "JAX_COMPILATION_CACHE_DIR": programs,
        "KERAS_KVCACHE_HOME": programs,
        # As `python -m keras_kvcache` has it. By default JAX keeps few programs.
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    call = f"cold_start.{function.__name__}({argument!r})"
    begin = time.time()
    process = subprocess.run(
        [sys.executable, "-c", f"import cold_start; {call}"],
        cwd=Path(__file__).parent,
        env=environment,
        capture_output=True,
        text=True,
    )
    if process.returncode != 0:
        raise SystemExit(f"{call} failed:\n{process.stderr}")
    ends = json.loads(process.stdout.splitlines()[-1])
    seconds, last = {}, begin
    for stage in ("import", "model", "first token"):
        seconds[f"{stage} s"] = ends[stage] - last
        last = ends[stage]
    seconds["in all s"] = last - begin
    if "second token" in ends:
        seconds["second token s"] = ends["second token"] - last
    return seconds


def run_keras_kvcache(model):
    """Prints when each stage ended, for a preset's path or a model's sizes."""
    ends = {}
    from keras_kvcache import DecoderLM

    ends["import"] = time.time()
    if isinstance(model, str):
        lm = DecoderLM.from_preset(model)
    else:
        lm = DecoderLM(**model, max_sequence_length=LONGEST)
    ends["model"] = time.time()
    stream = lm.stream(PROMPT, max_new_tokens=ROOM, stop_token_ids=None)
    next(stream)
    ends["first token"] = time.time()
    next(stream)
    ends["second token"] = time.time()
    print(json.dumps(ends))


def run_keras_hub(sizes):
    """Prints when each stage ended."""
    ends = {}
    import keras_hub
    import numpy as np

    ends["import"] = time.time()
    backbone = keras_hub.models.LlamaBackbone(**sizes)
    lm = keras_hub.models.LlamaCausalLM(backbone, preprocessor=None)
    lm.compile(sampler="greedy")
    ends["model"] = time.time()
    length = len(PROMPT) + ROOM
    token_ids = np.resize(PROMPT, (1, length))
    padding_mask = np.arange(length)[None] < length - 1
    inputs = {"token_ids": token_ids, "padding_mask": padding_mask}
    lm.generate(inputs, stop_token_ids=None)
    ends["first token"] = time.time()
    print(json.dumps(ends))


if __name__ == "__main__":
    main()
