"""The command line: arguments in, a command called.

Neither this nor `arguments` imports Keras: wrong arguments are refused at once, and
Ctrl-C has its handler before the slow imports.
"""

import os
from collections.abc import Sequence

from keras_kvcache.cli.arguments import DEFAULT_MODEL, parse
from keras_kvcache.cli.interrupt import end_process, set_handler

__all__ = ["DEFAULT_MODEL", "main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: List of strings. `None` for those of the process, which Ctrl-C then
            ends.

    Returns:
        The exit status: 0, 1 after an error, 130 after Ctrl-C. Arguments that are
        wrong end the process with status 2.
    """
    if arguments is None:
        set_handler(end_process)
    options = parse(arguments)
    # keras-hub imports TensorFlow, whose notes would stand before an error.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from keras_kvcache.cli import commands

    return commands.run(options.pop("command"), **options)
