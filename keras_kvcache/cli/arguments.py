"""The command line's arguments, read and checked without Keras."""

import argparse
import importlib.util
import math
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from keras_kvcache import __version__
from keras_kvcache.cli.terminal import is_text
from keras_kvcache.known_names import CODED, DTYPES, KINDS, known_presets

DEFAULT_MODEL = "smollm2_135m_instruct"
POLICIES = (*DTYPES, "float64", "mixed_bfloat16", "mixed_float16")
CODECS = (*DTYPES, *CODED)
# Dividing by less could overflow; 0 stands for the likeliest token.
_LEAST_TEMPERATURE = 1e-6


def parse(arguments: Sequence[str] | None) -> dict[str, Any]:
    """Reads the arguments of the command line.

    Args:
        arguments: List of strings; `None` for those of the process.

    Returns:
        A dictionary: the name of the command as `"command"`, and its options.
    """
    return vars(_parser().parse_args(arguments))


class _Parser(argparse.ArgumentParser):
    """Begins an error with the option: "--top-k must be 1 or more"."""

    def error(self, message):
        super().error(re.sub(r"^argument (\S+): ", r"\1 ", message))


def _parser():
    parser = _Parser(
        prog="keras-kvcache", description="Text from a language model, on Keras."
    )
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")

    generate = subparsers.add_parser("generate", help="answer a prompt")
    generate.add_argument(
        "prompt", type=_prompt, help="the prompt; - reads it from standard input"
    )
    generate.add_argument(
        "--raw",
        action="store_true",
        help="continue the prompt as it is, without the model's chat template",
    )
    _add_model(generate)
    _add_generation(generate)

    chat = subparsers.add_parser("chat", help="talk, turn by turn")
    chat.add_argument(
        "--system", type=_text, metavar="TEXT", help="what the model is told first"
    )
    _add_model(chat)
    _add_generation(chat)

    info = subparsers.add_parser("info", help="show a model's shape and cache size")
    info.add_argument("model", type=_model, help=_model_help())
    info.add_argument(
        "--batch-size", type=_integer(1), default=1, metavar="B", help="rows (1)"
    )
    info.add_argument(
        "--length",
        type=_integer(1),
        metavar="S",
        help="tokens (the model's longest sequence)",
    )
    return parser


def _add_model(parser):
    parser.add_argument(
        "--model", type=_model, default=DEFAULT_MODEL, help=_model_help()
    )
    parser.add_argument(
        "--dtype", type=_dtype, metavar="DTYPE", help=f"one of {', '.join(POLICIES)}"
    )


def _model_help():
    names = ", ".join(known_presets())
    return (
        f"a name ({names}), a .gguf file, a Hugging Face folder with safetensors, a "
        "preset folder, or what keras-hub loads: gpt2_base_en, hf://USER/MODEL"
    )


def _add_generation(parser):
    parser.add_argument(
        "--max-new-tokens",
        type=_integer(1),
        default=256,
        metavar="T",
        help="the longest answer, in tokens (%(default)s)",
    )
    parser.add_argument(
        "--temperature",
        type=_temperature,
        metavar="X",
        help="0 takes the likeliest token (1 if another option filters, else 0)",
    )
    parser.add_argument("--top-k", type=_integer(1), metavar="K", help="keep K tokens")
    parser.add_argument(
        "--top-p",
        type=_number("a number above 0, at most 1", lambda p: 0 < p <= 1),
        metavar="P",
        help="keep a mass of P",
    )
    parser.add_argument(
        "--min-p",
        type=_number("a number from 0 to 1", lambda p: 0 <= p <= 1),
        metavar="P",
        help="keep P times the likeliest's",
    )
    parser.add_argument(
        "--cache",
        type=_cache,
        metavar="NAME",
        help=f"the codec of keys and values ({', '.join(CODECS)}), or the tokens to "
        "keep: static keeps all; rolling:W the last W; rolling those of each layer's "
        "sliding window, for models where all layers have one; auto the same where a "
        "layer has one, and all elsewhere",
    )
    parser.add_argument(
        "--seed", type=_integer(None), metavar="N", help="repeatable sampling"
    )


def _received(rule, text):
    # A long text would hide the rule.
    short = text if len(text) <= 60 else f"{text[:60]}…"
    return argparse.ArgumentTypeError(f"must be {rule}. Received: {short!r}")


def _integer(least):
    """A type of argparse's: integers from `least` on, or all of them."""
    rule = "an integer" if least is None else f"{least} or more"

    def read(text):
        try:
            value = int(text)
        except ValueError:
            raise _received("an integer", text) from None
        if least is not None and value < least:
            raise argparse.ArgumentTypeError(f"must be {rule}. Received: {value}")
        return value

    return read


def _number(rule, is_allowed):
    """A type of argparse's: numbers that a rule allows."""

    def read(text):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not is_allowed(value):
            raise argparse.ArgumentTypeError(f"must be {rule}. Received: {text[:60]}")
        return value

    return read


_temperature = _number(
    f"0 or a number from {_LEAST_TEMPERATURE} on",
    lambda value: value == 0 or _LEAST_TEMPERATURE <= value < math.inf,
)


def _dtype(text):
    if text not in POLICIES:
        raise _received(f"one of {', '.join(POLICIES)}", text)
    return text


def _cache(text):
    kind, colon, window = text.partition(":")
    if text in (*CODECS, *KINDS):
        return text
    if kind == "rolling" and colon and window.isdecimal() and int(window) > 0:
        return text
    names = ", ".join((*CODECS, *KINDS))
    raise _received(f"one of {names}, or rolling:W with W tokens, 1 or more", text)


def _prompt(text):
    if not text:
        raise argparse.ArgumentTypeError("must not be an empty prompt. Received: ''")
    return _text(text)


def _text(text):
    if not is_text(text):
        raise argparse.ArgumentTypeError(
            f"must be valid {sys.getfilesystemencoding()}. Received: "
            f"{os.fsencode(text)[:60]!r}"
        )
    return text


def _model(text):
    """A model's name or path, checked as far as that goes without Keras."""
    path = Path(text).expanduser()
    if path.is_dir() and not (path / "config.json").exists():
        raise argparse.ArgumentTypeError(
            f"must, if a folder, have a config.json; {text} has none"
        )
    if path.exists() or text in known_presets():
        return text
    if path.suffix == ".gguf" or text.startswith((".", "~", os.sep)):
        raise argparse.ArgumentTypeError(
            f"must, if a path, be that of a file or folder; {text} is absent"
        )
    if importlib.util.find_spec("keras_hub") is None:
        raise _received(
            f"{', '.join(known_presets())}, or the path of a .gguf file or of a folder;"
            " other names are keras-hub's, which isn't installed",
            text,
        )
    return text
