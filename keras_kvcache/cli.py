"""The command line: arguments in, a command called."""

import argparse
import sys

from keras_kvcache import __version__, commands
from keras_kvcache.loaders import known_presets

DEFAULT_MODEL = "smollm2_135m_instruct"


def main(arguments=None):
    """Runs the command line.

    Args:
        arguments: List of strings; `None` for those of the process.

    Returns:
        The exit status: 0, 1 after an error, 130 after Ctrl-C.
    """
    options = vars(_parser().parse_args(arguments))
    command = options.pop("command")
    return commands.run(command, **options)


def _parser():
    parser = argparse.ArgumentParser(
        prog="keras-kvcache", description="Text from a language model, on Keras."
    )
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")

    generate = subparsers.add_parser("generate", help="answer a prompt")
    generate.add_argument("prompt", help="the prompt; - reads it from standard input")
    generate.add_argument(
        "--raw",
        action="store_true",
        help="continue the prompt as it is, without the model's chat template",
    )
    _add_model(generate)
    _add_generation(generate)
    generate.set_defaults(command=commands.generate)

    chat = subparsers.add_parser("chat", help="talk, turn by turn")
    chat.add_argument("--system", metavar="TEXT", help="what the model is told first")
    _add_model(chat)
    _add_generation(chat)
    chat.set_defaults(command=commands.chat)

    info = subparsers.add_parser("info", help="show a model's shape and cache size")
    info.add_argument("model", help=_model_help())
    info.add_argument("--batch-size", type=int, default=1, metavar="B")
    info.add_argument(
        "--length", type=int, metavar="S", help="tokens (the model's longest sequence)"
    )
    info.set_defaults(command=commands.info)
    return parser


def _add_model(parser):
    parser.add_argument("--model", default=DEFAULT_MODEL, help=_model_help())
    parser.add_argument(
        "--dtype", metavar="DTYPE", help="dtype policy, such as float32 or bfloat16"
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
        type=int,
        default=256,
        metavar="T",
        help="the longest answer, in tokens (%(default)s)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        metavar="X",
        help="0 takes the likeliest token (1 if another option filters, else 0)",
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="keep K tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="keep a mass of P")
    parser.add_argument(
        "--min-p", type=float, metavar="P", help="keep P times the likeliest's"
    )
    parser.add_argument(
        "--cache",
        metavar="NAME",
        help="a codec (float32, bfloat16, int8, int4) or a kind (static, rolling)",
    )
    parser.add_argument("--seed", type=int, metavar="N", help="repeatable sampling")


if __name__ == "__main__":
    sys.exit(main())
