"""The commands, once their arguments are read."""

import contextlib
import os
import sys
from typing import Any

import keras

from keras_kvcache import loaders, samplers
from keras_kvcache.caches import CODECS, DTYPES, Rolling, Static
from keras_kvcache.caches.kinds import read_options
from keras_kvcache.cli.interrupt import Interrupt, interrupt_raises
from keras_kvcache.cli.terminal import Notices, check_input, prepare_streams
from keras_kvcache.cli.timing import AnswerClock
from keras_kvcache.loaders import DownloadError, fetch, known_presets
from keras_kvcache.models import DecoderLM
from keras_kvcache.models.preset_kinds import is_of_keras_hub
from keras_kvcache.runtime.cache_folder import HOW_TO_MOVE, cache_folder
from keras_kvcache.runtime.platform import preferred_dtype


def run(name: str, **options: Any) -> int:
    """Runs a command; errors and Ctrl-C end it with a line and a status.

    Args:
        name: Of one of the functions below.
        **options: Its arguments.

    Returns:
        The exit status.
    """
    notices = Notices()
    try:
        prepare_streams()
        with notices.shown():
            _keep_compiled_programs(notices)
            _COMMANDS[name](notices=notices, **options)
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
        print(
            f"keras-kvcache: error: {_as_typed(str(error), options)}", file=sys.stderr
        )
        return 1
    return 0


def generate(
    prompt: str,
    model: str,
    raw: bool,
    dtype: str | None,
    cache: str | None,
    notices: Notices,
    **options: Any,
) -> None:
    """Answers one prompt on standard output, as the text appears."""
    if prompt == "-":
        prompt = check_input(sys.stdin.read())
        if not prompt:
            raise ValueError("Standard input must hold a prompt. Received: ''")
    answer = _Answerer(model, dtype, cache, notices, options)
    if not raw and answer.chat_template is not None:
        prompt = answer.render([{"role": "user", "content": prompt}])
    answer.print(prompt)


def chat(
    model: str,
    system: str | None,
    dtype: str | None,
    cache: str | None,
    notices: Notices,
    **options: Any,
) -> None:
    """Talks turn by turn until the end of input, Ctrl-D or Ctrl-C at the prompt.

    Ctrl-C within an answer ends that answer. What the model's context has no room for
    is dropped, the oldest turn first.
    """
    answer = _Answerer(model, dtype, cache, notices, options)
    if answer.chat_template is None:
        raise ValueError(
            f"`model` must have a chat template to talk; {model} has none."
        )
    messages = [] if system is None else [{"role": "system", "content": system}]
    print("An empty line, Ctrl-D or Ctrl-C ends the talk.", file=sys.stderr)
    while turn := _read_turn():
        try:
            check_input(turn)
            told = answer.fit([*messages, {"role": "user", "content": turn}])
        except ValueError as error:
            print(f"[{error}]", file=sys.stderr)
            continue
        if len(told) <= len(messages):
            print(
                "[The model's context is full: it forgets what came first.]",
                file=sys.stderr,
            )
        text = answer.print(answer.render(told), goes_on_after_interrupt=True)
        messages = [*told, {"role": "assistant", "content": text}]


def info(model: str, batch_size: int, length: int | None, **_: Any) -> None:
    """Prints a model's shape and the bytes of its caches."""
    lm = _load_shape(model)
    windows = sorted({block.sliding_window for block in lm.blocks} - {None})
    length = lm.max_sequence_length if length is None else length
    rows = {
        "model": model,
        "parameters": f"{lm.count_params():,}",
        "vocabulary V": f"{lm.vocabulary_size:,}",
        "layers L": lm.num_layers,
        "query heads N": _of_layers(lm, "num_query_heads"),
        "key/value heads K": _of_layers(lm, "num_key_value_heads"),
        "head size H": _of_layers(lm, "head_dim"),
        "width D": lm.hidden_dim,
        "feed-forward width": _of_layers(lm, "intermediate_dim"),
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


def _of_layers(lm, name):
    """A size of all layers, or of each from the first on where they differ."""
    sizes = [getattr(layer, name) for layer in lm.config.layers]
    return sizes[0] if len(set(sizes)) == 1 else ", ".join(map(str, sizes))


_COMMANDS = {"generate": generate, "chat": chat, "info": info}


def _as_typed(message, options):
    """Renames Python's arguments in an error to the options that were typed."""
    names = {
        "preset": "model",
        "inputs": "prompt",
        "kind": "cache",
        "codec": "cache",
        **{name: name for name in options},
    }
    positional = {"prompt"} if "prompt" in options else {"model"}
    for argument, name in names.items():
        option = name if name in positional else f"--{name.replace('_', '-')}"
        message = message.replace(f"`{argument}`", option)
    return message


def _keep_compiled_programs(notices):
    """Keeps compiled programs in the cache folder, for the next start."""
    if keras.backend.backend() != "jax" or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    import jax

    folder = cache_folder() / "programs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        is_usable = os.access(folder, os.W_OK)
    except OSError:
        is_usable = False
    if not is_usable:
        notices.add(
            f"Compiled programs can't be kept for the next start in {folder}. "
            f"{HOW_TO_MOVE}"
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # Loading costs less than compiling, for the shortest of a model's programs, too.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def _is_to_be_fetched(model):
    return model in known_presets() and not os.path.exists(model)


def _load(model, dtype):
    if _is_to_be_fetched(model):
        # An exception on Ctrl-C lets `fetch` remove unfinished files.
        with interrupt_raises():
            fetch(model)
    lm = DecoderLM.from_preset(model, **({} if dtype is None else {"dtype": dtype}))
    if lm.tokenizer is None:
        raise ValueError(f"`model` must have a tokenizer; {model} has none.")
    return lm


def _load_shape(model):
    """The model without values of its weights, so that it needn't fit into memory.

    A model that is known by name isn't downloaded for this.
    """
    # keras-hub's models need their weights to be made.
    is_hub = not _is_to_be_fetched(model) and is_of_keras_hub(model)
    scope = keras.StatelessScope(initialize_variables=False)
    with contextlib.nullcontext() if is_hub else scope:
        if _is_to_be_fetched(model):
            config = loaders.get_preset(model).config
            return DecoderLM(**config, dtype=preferred_dtype())
        return DecoderLM.from_preset(model, load_weights=False)


def _check_rolling(model):
    """Refuses `rolling` for a model with layers without a window."""
    if any(block.sliding_window is None for block in _load_shape(model).blocks):
        raise ValueError(
            "`cache` must be rolling:W, with how many tokens to keep, such as "
            f"rolling:1024, as {model} has layers without a sliding window. Received: "
            "rolling"
        )


class _Answerer:
    """Prints a model's answers as they come.

    Args:
        model, dtype, cache: As typed.
        notices: `Notices`.
        options: The other options of the command line.
    """

    def __init__(self, model, dtype, cache, notices, options):
        options = dict(options)
        limits = {name: options.pop(name) for name in ("max_new_tokens", "seed")}
        self._options = {"sampler": _sampler(**options), "cache": cache, **limits}
        if cache == "rolling":
            _check_rolling(model)
        elif cache is not None and cache.startswith("rolling:"):
            self._options["cache"] = Rolling(int(cache.partition(":")[2]))
        self._notices = notices
        self._lm = _load(model, dtype)

    @property
    def chat_template(self):
        """The template, or `None`, as of keras-hub's tokenizers."""
        return getattr(self._lm.tokenizer, "chat_template", None)

    def render(self, messages):
        """Renders messages by the model's chat template."""
        return self._lm.tokenizer.apply_chat_template(messages)

    def fit(self, messages):
        """Drops the oldest turns until the messages fit into the model's context."""
        if self._lm.is_endless(**read_options(self._options["cache"])):
            return messages
        context = self._lm.max_sequence_length
        return _drop_oldest_turns(
            messages,
            lambda messages: len(self._lm.tokenizer.encode(self.render(messages))),
            context,
            room=min(self._options["max_new_tokens"], context // 4),
        )

    def print(self, prompt, goes_on_after_interrupt=False):
        """Prints an answer, then its timing on standard error.

        Returns:
            The answer.
        """
        clock, pieces = AnswerClock(), []
        stream = self._lm.stream(prompt, **self._options)
        with (
            self._notices.held_back(),
            clock.compiling,
            Interrupt(is_noted=goes_on_after_interrupt) as interrupt,
        ):
            for piece in stream:
                clock.piece()
                pieces.append(piece)
                print(piece, end="", flush=True)
                if interrupt.was_received:
                    break
            clock.end()
            print(flush=True)
        print(f"[{clock.describe(len(stream.token_ids[0]))}]", file=sys.stderr)
        return "".join(pieces)


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


def _drop_oldest_turns(messages, count_tokens, context, room):
    """Drops the oldest turns of a chat until the rest fits into the context.

    Args:
        messages: Perhaps a system message, which is always kept, then pairs of a
            user's and an assistant's, and a user's as the last.
        count_tokens: Function of messages that gives their number of tokens.
        context: Most tokens of messages and answer together.
        room: Tokens to leave to the answer while there are turns to drop; in all
            cases one is left.

    Returns:
        A list of messages.

    Raises:
        ValueError: The last turn alone leaves no room.
    """
    first = 1 if messages[0]["role"] == "system" else 0
    kept = list(messages)
    while (length := count_tokens(kept)) + room > context and len(kept) > first + 1:
        del kept[first : first + 2]
    if length >= context:
        raise ValueError(
            f"This turn must leave room in the model's context of {context} tokens. "
            f"Received: {length} tokens; it is left out of the talk."
        )
    return kept
