"""The command line, as a user meets it."""

import io
import os
import re
import signal
import socket
import subprocess
import sys
import time
import warnings

import jax
import keras
import pytest
from gguf_files import PRIMES, metadata, random_tensors, write

from keras_kvcache import DecoderLM, cli
from keras_kvcache.caches import Rolling, Static, get_codec
from keras_kvcache.caches.kinds import read_options
from keras_kvcache.cli import arguments, commands, interrupt, timing


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model with a tokenizer and a chat template."""
    values = metadata(**PRIMES) | {
        "tokenizer.chat_template": "{% for message in messages %}"
        "{{ message.content }}{% endfor %}"
    }
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    return str(write(path, values, random_tensors(PRIMES)))


@pytest.fixture(autouse=True)
def cache_home(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_KVCACHE_HOME", str(tmp_path))


def run(*arguments, stdin=""):
    return subprocess.run(
        [sys.executable, "-m", "keras_kvcache", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
    )


def test_generate_reads_standard_input_and_repeats_with_a_seed(
    model, monkeypatch, capsys
):
    options = ["--model", model, "--max-new-tokens", "12", "--temperature", "1.5"]
    options += ["--top-k", "20", "--top-p", "0.95", "--min-p", "0.01"]
    answers = []
    for seed in ("1", "1", "2"):
        typed = io.TextIOWrapper(io.BytesIO(b"abc"), encoding="utf-8")
        monkeypatch.setattr(sys, "stdin", typed)
        assert cli.main(["generate", "-", "--seed", seed, *options]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != answers[2]


def test_chat_takes_turns_until_the_input_ends(model):
    """Also where a terminal knows ASCII only, from the typed to the shown."""
    result = run_bytes(
        *("chat", "--model", model, "--max-new-tokens", "5"),
        stdin=b"ab\ncd\n",
        PYTHONIOENCODING="ascii",
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(b"> ") == 3
    assert result.stderr.count(b"tokens/s") == 2


def test_info_shows_shape_and_cache_size(model, capsys):
    arguments = ["info", model, "--batch-size", "2", "--length", "37"]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert re.search(r"layers L +2\n", printed)
    assert re.search(r"key/value heads K +3\n", printed)
    # Two layers, keys and values, three heads of size 10, four bytes each.
    assert re.search(r"static, float32 +480 +17,760 +35,520\n", printed)
    assert re.search(r"static, bfloat16 +240 +8,880 +17,760\n", printed)
    # One byte each, and four of a scale.
    assert re.search(r"static, int8 +168 +6,216 +12,432\n", printed)
    assert "int4" in printed and "rolling" not in printed


def test_info_of_a_known_model_downloads_nothing(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise AssertionError("something was fetched")

    monkeypatch.setattr("keras_kvcache.loaders.fetch", fail)
    monkeypatch.setattr("keras_kvcache.cli.commands.fetch", fail)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["info", cli.DEFAULT_MODEL, "--length", "37"]) == 0
    printed = capsys.readouterr().out
    # Of the model's own table: 49,152 tokens, 30 layers, 9 heads, 3 of keys and values.
    assert re.search(r"parameters +134,515,008\n", printed)
    assert re.search(r"longest sequence +8,192\n", printed)
    # 30 layers, keys and values, three heads of size 64, four bytes each.
    assert re.search(r"static, float32 +46,080 +1,704,960 +1,704,960\n", printed)
    assert not list(tmp_path.glob("**/*.gguf"))


def test_info_shows_each_layer_where_they_differ(tmp_path, capsys):
    lm = DecoderLM(
        *(11, 3, 5, 30, 13),
        num_key_value_heads=5,
        layer_options=[{}, {"num_key_value_heads": 1, "head_dim": 8}, {}],
    )
    lm.save_to_preset(tmp_path / "model")
    assert cli.main(["info", str(tmp_path / "model"), "--length", "37"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"query heads N +5\n", printed)
    assert re.search(r"key/value heads K +5, 1, 5\n", printed)
    assert re.search(r"head size H +6, 8, 6\n", printed)


def test_info_shows_rolling_caches_where_layers_slide(tmp_path, capsys):
    lm = DecoderLM(
        vocabulary_size=11,
        num_layers=3,
        num_query_heads=5,
        hidden_dim=30,
        intermediate_dim=13,
        sliding_window=7,
        sliding_window_pattern=3,
    )
    lm.save_to_preset(tmp_path / "model")
    model = str(tmp_path / "model")
    assert cli.main(["info", model, "--batch-size", "2", "--length", "37"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"sliding window W +7\n", printed)
    # Three layers of 37 slots; keys and values of five heads of six numbers.
    assert re.search(r"static, float32 +720 +26,640 +53,280\n", printed)
    # The two that slide have 7 slots each, and where a row ends in four bytes.
    allocated = sum(cache.nbytes for cache in lm.init_cache(2, 37))
    assert allocated == 2 * ((37 + 7 + 7) * 240 + 2 * 4)
    assert re.search(r"slide, float32 +720 +12,248 +24,496\n", printed)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["generate", "ab", "--model", "nope"], "'nope'"),
        (["generate", "a" * 99, "--model", "MODEL"], "prompt must .* context of 41"),
        (["info", "nope"], "model must .*'nope'"),
        (
            ["generate", "ab", "--model", "MODEL", "--cache", "rolling"],
            "--cache must be rolling:W",
        ),
    ],
)
def test_errors_are_one_line_and_a_status(model, arguments, message, capsys):
    arguments = [model if argument == "MODEL" else argument for argument in arguments]
    assert cli.main(arguments) == 1
    captured = capsys.readouterr()
    assert re.search(message, captured.err)
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("keras-kvcache: error: ")
    assert not re.search("`(preset|inputs|cache|kind|codec)`", captured.err)


WRONG_ARGUMENTS = [
    (["generate", ""], "prompt must not be an empty prompt. Received: ''"),
    (["generate", "\udcff"], r"prompt must be valid utf-8. Received: b'\xff'"),
    (
        ["chat", "--system", "a\udc80"],
        r"--system must be valid utf-8. Received: b'a\x80'",
    ),
    (
        ["generate", "ab", "--max-new-tokens", "-3"],
        "--max-new-tokens must be 1 or more. Received: -3",
    ),
    (
        ["chat", "--max-new-tokens", "0"],
        "--max-new-tokens must be 1 or more. Received: 0",
    ),
    (
        ["generate", "ab", "--max-new-tokens", "2.5"],
        "--max-new-tokens must be an integer. Received: '2.5'",
    ),
    (
        ["generate", "ab", "--temperature", "-1"],
        "--temperature must be 0 or a number from 1e-06 on. Received: -1",
    ),
    (
        ["generate", "ab", "--temperature", "nan"],
        "--temperature must be 0 or a number from 1e-06 on. Received: nan",
    ),
    (["generate", "ab", "--top-k", "0"], "--top-k must be 1 or more. Received: 0"),
    (
        ["generate", "ab", "--top-p", "2"],
        "--top-p must be a number above 0, at most 1. Received: 2",
    ),
    (
        ["generate", "ab", "--top-p", "0"],
        "--top-p must be a number above 0, at most 1. Received: 0",
    ),
    (
        ["generate", "ab", "--min-p", "-0.1"],
        "--min-p must be a number from 0 to 1. Received: -0.1",
    ),
    (["generate", "ab", "--seed", "x"], "--seed must be an integer. Received: 'x'"),
    (["generate", "ab", "--dtype", "float7"], "--dtype must be one of float32, "),
    (["generate", "ab", "--cache", "int7"], "--cache must be one of float32, "),
    (["generate", "ab", "--cache", "rolling:0"], "Received: 'rolling:0'"),
    (["generate", "ab", "--cache", "static:9"], "Received: 'static:9'"),
    (
        ["generate", "ab", "--model", "nope.gguf"],
        "--model must, if a path, be that of a file or folder; nope.gguf is absent",
    ),
    (
        ["info", "./nope"],
        "model must, if a path, be that of a file or folder; ./nope is absent",
    ),
    (["info", "."], "model must, if a folder, have a config.json; . has none"),
    (
        ["info", "gpt2_base_en", "--batch-size", "0"],
        "--batch-size must be 1 or more. Received: 0",
    ),
    (
        ["info", "gpt2_base_en", "--length", "0"],
        "--length must be 1 or more. Received: 0",
    ),
]


@pytest.mark.parametrize("arguments, message", WRONG_ARGUMENTS)
def test_a_wrong_argument_is_named_as_it_was_typed(
    arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"keras-kvcache {arguments[0]}: error: ")
    assert message in error


def test_names_of_other_loaders_need_keras_hub(monkeypatch, capsys):
    monkeypatch.setattr(arguments.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        cli.main(["info", "gpt2_base_en"])
    assert "keras-hub's, which isn't installed" in capsys.readouterr().err


@pytest.mark.parametrize(
    "typed",
    [["--help"], ["--version"], ["generate", "-h"], ["generate", "a", "--top-k", "0"]],
)
def test_what_needs_no_model_imports_neither_keras_nor_jax(typed):
    code = """
import sys
from keras_kvcache import cli
try:
    cli.main(sys.argv[1:])
finally:
    heavy = {"keras", "jax", "numpy", "tokenizers", "gguf"} & set(sys.modules)
    assert not heavy, heavy
"""
    result = subprocess.run(
        [sys.executable, "-c", code, *typed], capture_output=True, text=True
    )
    assert result.returncode == (2 if "0" in typed else 0), result.stderr
    assert "AssertionError" not in result.stderr


def test_what_may_be_typed_is_what_there_is():
    for name in arguments.CODECS:
        assert read_options(name) == {"codec": name}
        assert get_codec(name).name == name
    for name in arguments.KINDS:
        assert read_options(name) == {"kind": name}
    assert {Static.name, Rolling.name} < {*arguments.KINDS}
    for name in arguments.POLICIES:
        assert keras.dtype_policies.get(name).name == name


def test_usage_errors_exit_with_two():
    for typed in ([], ["generate"], ["generate", "a", "--top-k", "x"], ["sing"]):
        with pytest.raises(SystemExit) as exit_:
            cli.main(typed)
        assert exit_.value.code == 2


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """Where several processes find what the first of them compiled."""
    return {"JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("programs"))}


@pytest.fixture
def own_programs(monkeypatch):
    """Lets child processes choose for themselves where compiled programs are kept."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")


@pytest.fixture(autouse=True)
def interruptible():
    """Lets child processes get Ctrl-C where this one was started to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


# Whoever waits so long hangs. It's no measure of how fast anything is.
HANGS = 600  # seconds


def start(*arguments, python=("-m", "keras_kvcache"), **environment):
    return subprocess.Popen(
        [sys.executable, *python, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
    )


def assert_ends_interrupted(process):
    _, errors = process.communicate(timeout=HANGS)
    assert process.returncode == 130, errors
    assert b"Traceback" not in errors and b"Exception" not in errors


@pytest.fixture
def console_script(tmp_path):
    """What pip makes of the entry point."""
    path = tmp_path / "keras-kvcache"
    path.write_text("import sys; from keras_kvcache.cli import main; sys.exit(main())")
    return str(path)


# Python runs it first: the interrupt comes as the module is looked for.
INTERRUPTS = """
import signal, sys

class Finder:
    def find_spec(name, path=None, target=None):
        if name == {module!r}:
            sys.meta_path.remove(Finder)
            print("now", flush=True)
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Finder)
"""


# Something of Keras' imports from the first to the last, and the last of all.
@pytest.mark.parametrize(
    "module, is_script",
    [
        ("numpy", False),
        ("h5py", True),
        ("keras.src.layers", False),
        ("keras_kvcache.layers", True),
        ("keras_kvcache.cli.commands", False),
    ],
)
def test_interrupt_while_importing(model, console_script, module, is_script, tmp_path):
    """An import that swallows `KeyboardInterrupt` once let generation run on."""
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTS.format(module=module))
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    # The prompt never ends, nor does a process that isn't interrupted.
    process = start(
        *("generate", "-", "--model", model),
        python=[console_script] if is_script else ["-m", "keras_kvcache"],
        PYTHONPATH=path,
    )
    assert process.stdout.readline() == b"now\n"
    assert_ends_interrupted(process)


def test_interrupt_of_a_download_leaves_nothing(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as index:
        index.settimeout(HANGS)
        environment = {
            "PIP_INDEX_URL": f"http://127.0.0.1:{index.getsockname()[1]}/",
            "PIP_CONFIG_FILE": os.devnull,
            "NO_PROXY": "127.0.0.1",
        }
        process = start("generate", "ab", **environment)
        pip, _ = index.accept()
        with pip:
            # It waits for an answer now.
            process.send_signal(signal.SIGINT)
            assert_ends_interrupted(process)
            pip.settimeout(HANGS)
            while pip.recv(1000):
                pass
    left = [path.name for path in (tmp_path / cli.DEFAULT_MODEL).iterdir()]
    assert left == [".lock"]


def test_interrupt_at_the_prompt_ends_the_talk(model):
    process = start("chat", "--model", model)
    assert process.stdout.read(2) == b"> "
    process.send_signal(signal.SIGINT)
    # The line is for a signal that came before Python began to read; it then acts as
    # soon as Python has read. Its mark is the line that the talk ends with.
    output, errors = process.communicate(b"hello\n", timeout=HANGS)
    assert process.returncode == 0, errors
    assert output == b"\n"
    assert b"Traceback" not in errors


KEEPS_HANDLER = """
import signal
import keras_kvcache
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
"""
CALLS_MAIN = """
import signal
from keras_kvcache import cli
assert cli.main(["info", "nope.txt"]) == 1
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
"""


@pytest.mark.parametrize(
    "python",
    [["-c", KEEPS_HANDLER], ["-m", "other"], ["-c", CALLS_MAIN]],
    ids=["import", "package that imports", "call"],
)
def test_a_program_keeps_its_interrupt_handler(tmp_path, python):
    package = tmp_path / "other"
    package.mkdir()
    # Python imports this one, too, while `sys.argv[0]` is "-m".
    (package / "__init__.py").write_text(KEEPS_HANDLER)
    (package / "__main__.py").write_text("")
    result = subprocess.run(
        [sys.executable, *python], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_an_interrupt_that_is_ignored_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interrupt.interrupt_raises(), interrupt.Interrupt(is_noted=True) as noted:
        signal.raise_signal(signal.SIGINT)
    assert not noted.was_received
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_interrupt_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT)
    with interrupt.Interrupt(is_noted=True) as noted:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt), interrupt.interrupt_raises():
            signal.raise_signal(signal.SIGINT)
        assert noted.was_received
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.real_model
@pytest.mark.parametrize(
    "characters",
    [0, *(pytest.param(count, marks=pytest.mark.slow) for count in (1, 40))],
)
def test_interrupt_ends_generate(
    smollm2_path, tmp_path, programs, own_programs, characters
):
    """Before the first token (while programs are compiled) and within the answer."""
    process = start(
        "generate",
        "Tell a long story.",
        *["--model", str(smollm2_path), "--max-new-tokens", "8000"],
        **(programs if characters else {}),
    )
    if characters:
        assert len(process.stdout.read(characters)) == characters
    else:
        # The first program that is kept shows that the compiler is at work.
        while not list(tmp_path.glob("programs/*")):
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert_ends_interrupted(process)


@pytest.mark.real_model
def test_interrupt_ends_an_answer_but_not_the_talk(smollm2_path, programs):
    process = start(
        "chat", "--model", str(smollm2_path), "--max-new-tokens", "8000", **programs
    )
    process.stdin.write(b"Tell me a very long story.\n")
    process.stdin.flush()
    assert len(process.stdout.read(30)) == 30
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(b"\n", timeout=HANGS)
    assert process.returncode == 0, errors
    assert output.endswith(b"> ")
    assert b"tokens/s" in errors and b"Traceback" not in errors


def run_bytes(*arguments, stdin=b"", **environment):
    return subprocess.run(
        [sys.executable, "-m", "keras_kvcache", *arguments],
        input=stdin,
        capture_output=True,
        env={**os.environ, **environment},
    )


class Echo:
    """A model that answers with given pieces."""

    def __init__(self, pieces, context=41):
        self.pieces, self.max_sequence_length = pieces, context
        self.tokenizer = self
        self.chat_template = "there is one"
        self.asked = []

    def apply_chat_template(self, messages):
        return "".join(f"{m['role'][0]}:{m['content']};" for m in messages)

    def encode(self, text):
        return list(text)

    def is_endless(self, **options):
        return False

    def stream(self, prompt, **options):
        self.asked.append(prompt)

        def pieces():
            for piece in self.pieces:
                if isinstance(piece, str):
                    yield piece
                else:
                    piece()

        stream = pieces()

        class Stream:
            token_ids = [[1] * len(self.pieces)]

            def __iter__(self):
                return stream

        return Stream()


@pytest.fixture
def echo(monkeypatch):
    """Gives the command line a model that answers with given pieces."""

    def give(*pieces, **options):
        lm = Echo(pieces, **options)
        monkeypatch.setattr(commands, "_load", lambda *_: lm)
        return lm

    return give


def test_output_replaces_what_it_cannot_show(echo, monkeypatch):
    echo("Gr\u00fc\u00dfe ", "\U0001f600 ", "\u4f60", "!")
    for encoding, shown in (
        ("ascii", b"Gr??e ? ?!\n"),
        ("cp1252", b"Gr\xfc\xdfe ? ?!\n"),
        ("utf-8", "Gr\u00fc\u00dfe \U0001f600 \u4f60!\n".encode()),
    ):
        written = io.BytesIO()
        out = io.TextIOWrapper(written, encoding=encoding, newline="")
        monkeypatch.setattr(sys, "stdout", out)
        assert cli.main(["generate", "ab"]) == 0
        assert written.getvalue() == shown


def test_standard_input_must_be_text(monkeypatch, echo, capsys):
    lm = echo("an answer")
    given = io.TextIOWrapper(io.BytesIO(b"ab \xff\xfe cd\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", given)
    assert cli.main(["generate", "-"]) == 1
    message = (
        "Standard input must be valid utf-8. Received: b'\\xff\\xfe cd\\n' after 3 "
    )
    assert message in capsys.readouterr().err
    assert not lm.asked


def test_empty_standard_input_is_no_prompt(monkeypatch, echo, capsys):
    lm = echo("an answer")
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert cli.main(["generate", "-"]) == 1
    assert "Standard input must hold a prompt" in capsys.readouterr().err
    assert not lm.asked


def test_an_argument_must_be_text():
    result = subprocess.run(
        [os.fsencode(sys.executable), b"-m", b"keras_kvcache", b"generate", b"a\xff"],
        capture_output=True,
    )
    assert result.returncode == 2
    assert rb"prompt must be valid utf-8. Received: b'a\xff'" in result.stderr


def talk(monkeypatch, *turns):
    turns = iter([*turns, ""])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(), "utf-8"))
    monkeypatch.setattr("builtins.input", lambda prompt: next(turns))


def test_a_talk_goes_on_past_the_context(echo, monkeypatch, capsys):
    """41 tokens, 10 of which are for the answer; a character is a token here."""
    lm = echo("answer")
    talk(monkeypatch, "first", "second", "third", "x" * 99, "\udcff", "fourth")
    assert cli.main(["chat", "--system", "sys", "--max-new-tokens", "99"]) == 0
    assert lm.asked == [
        "s:sys;u:first;",
        "s:sys;u:second;",
        "s:sys;u:third;",
        "s:sys;u:fourth;",
    ]
    errors = capsys.readouterr().err
    assert errors.count("it forgets what came first") == 3
    assert "context of 41 tokens. Received: 108 tokens; it is left out" in errors
    assert "Standard input must be valid" in errors


def test_a_talk_forgets_no_more_than_it_must(echo, monkeypatch, capsys):
    lm = echo("yes", context=60)
    talk(monkeypatch, "one", "two", "three", "four", "five")
    assert cli.main(["chat", "--max-new-tokens", "7"]) == 0
    assert lm.asked == [
        "u:one;",
        "u:one;a:yes;u:two;",
        "u:one;a:yes;u:two;a:yes;u:three;",
        "u:one;a:yes;u:two;a:yes;u:three;a:yes;u:four;",
        "u:two;a:yes;u:three;a:yes;u:four;a:yes;u:five;",
    ]
    assert capsys.readouterr().err.count("it forgets what came first") == 1


def test_a_talk_without_an_end_forgets_nothing(echo, monkeypatch):
    lm = echo("answer")
    lm.is_endless = lambda kind: isinstance(kind, Rolling) and kind.window == 7
    talk(monkeypatch, "first", "second " * 9)
    assert cli.main(["chat", "--cache", "rolling:7"]) == 0
    assert lm.asked[-1].startswith("u:first;a:answer;u:second")


def test_warnings_come_behind_the_answer_and_once(echo, capfd):
    def warn():
        for number in range(3):
            warnings.warn("the compiler\nfailed", stacklevel=1)
            text = f"Error writing persistent compilation cache entry for 'f{number}': "
            warnings.warn(f"{text}[Errno 28] No space left", stacklevel=1)

    echo("an ", warn, "answer")
    assert cli.main(["generate", "ab"]) == 0
    captured = capfd.readouterr()
    assert captured.out == "an answer\n"
    assert captured.err.splitlines()[:-1] == [
        "keras-kvcache: warning: the compiler failed",
        "keras-kvcache: warning: Compiled programs can't be kept for the next start: "
        "[Errno 28] No space left",
    ]


@pytest.mark.slow
def test_a_real_warning_of_the_compiler_is_a_line_of_its_own(model, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'error: no header' >&2; exit 1\n")
    compiler.chmod(0o755)
    result = run_bytes(
        *("generate", "abc", "--model", model, "--max-new-tokens", "9"),
        CXX=str(compiler),
    )
    assert result.returncode == 0
    lines = result.stderr.decode().splitlines()
    about = [line for line in lines if "no header" in line]
    assert about and len(about) == len(set(about))
    assert all(line.startswith("keras-kvcache: warning: ") for line in about)
    assert lines[-1].startswith("[first token after ")


@pytest.mark.slow
def test_a_folder_that_takes_no_programs_is_told_once(model, tmp_path, own_programs):
    home = tmp_path / "home"
    home.write_text("a file")
    result = run_bytes(
        *("generate", "abc", "--model", model, "--max-new-tokens", "9"),
        KERAS_KVCACHE_HOME=str(home),
    )
    assert result.returncode == 0, result.stderr
    errors = result.stderr.decode()
    assert errors.count("Compiled programs can't be kept") == 1
    assert "KERAS_KVCACHE_HOME names another folder" in errors
    assert "Traceback" not in errors


def test_timing_tells_compiling_from_decoding(monkeypatch):
    clock = timing.AnswerClock()
    now = 100.0
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    clock._begin = now
    with clock.compiling:
        # Traced in 2 s, of which 0.5 s for a function that it calls; compiled in 1 s.
        for end, duration in ((101.0, 0.5), (102.0, 2.0), (103.0, 1.0)):
            now = end
            jax.monitoring.record_event_duration_secs(
                "/jax/core/compile/backend_compile_duration", duration
            )
        now = 104.0
        clock.piece()
        now = 109.0
        jax.monitoring.record_event_duration_secs("/jax/core/compile/x", 4.0)
        jax.monitoring.record_event_duration_secs("/jax/other", 4.0)
        now = 114.0
        clock.piece()
        clock.end()
    jax.monitoring.record_event_duration_secs("/jax/core/compile/x", 50.0)
    # 10 s from the first token to the last, 4 of them compiling.
    assert clock.describe(31) == (
        "first token after 4.00 s, compiled in 7.00 s, 31 tokens, "
        "5.0 tokens/s after the first"
    )


def test_answers_come_on_standard_output_and_compiled_programs_are_kept(
    model, tmp_path, own_programs
):
    arguments = ("generate", "abc", "--model", model, "--max-new-tokens", "5")
    result = run(*arguments)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
    assert re.search(
        r"\[first token after \d+\.\d\d s, compiled in \d+\.\d\d s, \d+ tokens, "
        r"\d+\.\d tokens/s after the first\]",
        result.stderr,
    )
    kept = set((tmp_path / "programs").glob("jit_program-*"))
    assert len(kept) > 1
    assert run(*arguments).returncode == 0
    assert set((tmp_path / "programs").glob("jit_program-*")) == kept
