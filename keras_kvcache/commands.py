"""What the command line does, once its arguments are read."""

import contextlib
import os
import sys
import time

import keras

from keras_kvcache import samplers
from keras_kvcache.cache_folder import cache_folder
from keras_kvcache.caches import CODECS, DTYPES, Static
from keras_kvcache.interrupt import Interrupt, interrupt_raises
from keras_kvcache.loaders import DownloadError, fetch, known_presets
from keras_kvcache.models import DecoderLM
from keras_kvcache.models.presets import is_of_keras_hub


def run(command, **options):
    """Runs a command; errors and Ctrl-C end it with a line and a status.

    Args:
        command: One of the functions below.
        **options: Its arguments.

    Returns:
        The exit status.
    """
    try:
        _keep_compiled_programs()
        command(**options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output has seen enough. Python would complain once
        # more when it closes standard output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, TypeError, OSError, ImportError, DownloadError) as error:
        print(f"keras-kvcache: error: {error}", file=sys.stderr)
        return 1
    return 0


def generate(prompt, model, raw, dtype, cache, max_new_tokens, seed, **sampling):
    """Answers one prompt on standard output, as the text appears."""
    sampler = _sampler(**sampling)
    if prompt == "-":
        prompt = sys.stdin.read()
    if not prompt:
        raise ValueError("`prompt` must not be an empty prompt. Received: ''")
    lm = _load(model, dtype)
    if not raw and _chat_template(lm) is not None:
        prompt = lm.tokenizer.apply_chat_template([{"role": "user", "content": prompt}])
    _print_stream(
        lm,
        prompt,
        max_new_tokens=max_new_tokens,
        sampler=sampler,
        seed=seed,
        cache=cache,
    )


def chat(model, system, dtype, cache, max_new_tokens, seed, **sampling):
    """Talks turn by turn until the end of input, Ctrl-D or Ctrl-C at the prompt.

    Ctrl-C within an answer ends that answer.
    """
    sampler = _sampler(**sampling)
    lm = _load(model, dtype)
    if _chat_template(lm) is None:
        raise ValueError(
            f"`model` must have a chat template to talk; {model} has none."
        )
    messages = [] if system is None else [{"role": "system", "content": system}]
    print("An empty line, Ctrl-D or Ctrl-C ends the talk.", file=sys.stderr)
    while turn := _read_turn():
        messages.append({"role": "user", "content": turn})
        answer = _print_stream(
            lm,
            lm.tokenizer.apply_chat_template(messages),
            max_new_tokens=max_new_tokens,
            sampler=sampler,
            seed=seed,
            cache=cache,
            goes_on_after_interrupt=True,
        )
        messages.append({"role": "assistant", "content": answer})


def info(model, batch_size, length):
    """Prints a model's shape and what its caches would take."""
    _fetch(model)
    # Weights without values: their shapes suffice, and the model needn't fit.
    # keras-hub's models need theirs to be made.
    scope = keras.StatelessScope(initialize_variables=False)
    with contextlib.nullcontext() if is_of_keras_hub(model) else scope:
        lm = DecoderLM.from_preset(model, load_weights=False)
    windows = sorted({block.sliding_window for block in lm.blocks} - {None})
    length = lm.max_sequence_length if length is None else length
    rows = {
        "model": model,
        "parameters": f"{lm.count_params():,}",
        "vocabulary V": f"{lm.vocabulary_size:,}",
        "layers L": lm.num_layers,
        "query heads N": lm.num_query_heads,
        "key/value heads K": lm.num_key_value_heads,
        "head size H": lm.head_dim,
        "width D": lm.hidden_dim,
        "feed-forward width": lm.intermediate_dim,
        "longest sequence": f"{lm.max_sequence_length:,}",
        "sliding window W": ", ".join(map(str, windows)) or "none",
    }
    for name, value in rows.items():
        print(f"{name:<20}{value}")
    print(f"\n{f'bytes of caches for {batch_size} x {length:,} tokens':<44}", end="")
    print(f"{'a token':>12}{'a row':>18}{'in all':>18}")
    kinds = [Static.name, *(["auto"] if windows else [])]
    for kind in kinds:
        for codec in (*DTYPES, *CODECS):
            size = lm.cache_bytes(batch_size, length, kind=kind, codec=codec)
            label = "rolling where layers slide" if kind == "auto" else kind
            print(
                f"  {label + ', ' + codec:<42}{size.per_token:>12,.0f}"
                f"{size.per_row:>18,}{size.total:>18,}"
            )


def _keep_compiled_programs():
    """Lets a second start find what the first one compiled."""
    if keras.backend.backend() != "jax" or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    import jax

    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "programs"))
    # Loading costs less than compiling, for the shortest of a model's programs, too.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def _fetch(model):
    """Downloads a model that is known by name; Ctrl-C leaves nothing unfinished."""
    if model in known_presets() and not os.path.exists(model):
        with interrupt_raises():
            fetch(model)


def _load(model, dtype):
    _fetch(model)
    lm = DecoderLM.from_preset(model, **({} if dtype is None else {"dtype": dtype}))
    if lm.tokenizer is None:
        raise ValueError(f"`model` must have a tokenizer; {model} has none.")
    return lm


def _chat_template(lm):
    """The model's template, or `None`: keras-hub's tokenizers have no such thing."""
    return getattr(lm.tokenizer, "chat_template", None)


def _sampler(temperature, **filters):
    """The likeliest token, unless a temperature or a filter asks for a draw."""
    if temperature is None:
        is_drawn = any(parameter is not None for parameter in filters.values())
        temperature = 1.0 if is_drawn else 0.0
    return samplers.make(temperature, **filters)


def _read_turn():
    """The next line of the talk, or an empty string at its end."""
    try:
        with interrupt_raises():
            return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return ""


def _print_stream(lm, prompt, goes_on_after_interrupt=False, **options):
    """Prints an answer as it comes, then its timing on standard error."""
    begin = time.perf_counter()
    first = None
    stream = lm.stream(prompt, **options)
    pieces = []
    with Interrupt(is_noted=goes_on_after_interrupt) as interrupt:
        for piece in stream:
            first = first or time.perf_counter()
            pieces.append(piece)
            print(piece, end="", flush=True)
            if interrupt.came:
                break
    end = time.perf_counter()
    print(flush=True)
    count = len(stream.token_ids[0])
    timing = f"{count} tokens"
    if first is not None:
        timing = f"first token after {first - begin:.2f} s, {timing}"
    if count > 1:
        timing += f", {(count - 1) / (end - first):.1f} tokens/s after it"
    print(f"[{timing}]", file=sys.stderr)
    return "".join(pieces)
