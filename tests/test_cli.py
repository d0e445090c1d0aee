"""The command line, as a user meets it."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
from gguf_files import PRIMES, metadata, random_tensors, write

from keras_kvcache import DecoderLM, cli, interrupt


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


def test_generate_answers_on_standard_output(model):
    result = run("generate", "abc", "--model", model, "--max-new-tokens", "9")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
    assert re.search(
        r"\[first token after \d+\.\d\d s, \d+ tokens, \d+\.\d tokens/s after it\]",
        result.stderr,
    )


def test_generate_reads_standard_input_and_repeats_with_a_seed(model, capsys):
    options = ["--model", model, "--max-new-tokens", "12", "--temperature", "1.5"]
    options += ["--top-k", "20", "--top-p", "0.95", "--min-p", "0.01"]
    answers = []
    for seed in ("1", "1", "2"):
        result = run("generate", "-", "--seed", seed, *options, stdin="abc")
        answers.append(result.stdout)
    assert answers[0] == answers[1] != answers[2]


def test_chat_takes_turns_until_the_input_ends(model):
    result = run("chat", "--model", model, "--max-new-tokens", "5", stdin="ab\ncd\n")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("> ") == 3
    assert result.stderr.count("tokens/s") == 2


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
        (["generate", "ab", "--model", "nope.gguf"], "nope.gguf"),
        (["generate", "", "--model", "MODEL"], "empty prompt"),
        (["generate", "ab", "--model", "MODEL", "--max-new-tokens", "0"], "max_new"),
        (["generate", "ab", "--model", "MODEL", "--temperature", "-1"], "temperature"),
        (["generate", "ab", "--model", "MODEL", "--top-p", "2"], "top_p"),
        (["generate", "a" * 99, "--model", "MODEL"], "context of 41"),
        (["info", "nope"], "'nope'"),
        (["info", "MODEL", "--length", "0"], "capacity|max_length"),
        (["generate", "ab", "--model", "MODEL", "--cache", "int7"], "int7"),
        (["generate", "ab", "--model", "MODEL", "--cache", "rolling"], "rolling"),
    ],
)
def test_errors_are_one_line_and_a_status(model, arguments, message, capsys):
    arguments = [model if argument == "MODEL" else argument for argument in arguments]
    assert cli.main(arguments) == 1
    captured = capsys.readouterr()
    assert re.search(message, captured.err)
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("keras-kvcache: error: ")


def test_usage_errors_exit_with_two():
    for arguments in ([], ["generate"], ["generate", "a", "--top-k", "x"], ["sing"]):
        with pytest.raises(SystemExit) as exit_:
            cli.main(arguments)
        assert exit_.value.code == 2


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """Where several processes find what the first of them compiled."""
    return {"JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("programs"))}


@pytest.fixture(autouse=True)
def interruptible():
    """Lets child processes get Ctrl-C where this one was started to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def start(*arguments, python=("-m", "keras_kvcache"), **environment):
    return subprocess.Popen(
        [sys.executable, *python, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
    )


def assert_ends_interrupted(process):
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert b"Traceback" not in errors and b"Exception" not in errors


@pytest.fixture
def console_script(tmp_path):
    """What pip makes of the entry point."""
    path = tmp_path / "keras-kvcache"
    path.write_text("import sys; from keras_kvcache.cli import main; sys.exit(main())")
    return str(path)


# Something of Keras' imports from the first to the last, and the last of all.
@pytest.mark.parametrize(
    "module",
    ["numpy", "h5py", "keras.src", "keras_kvcache.layers", "keras_kvcache.cli"],
)
@pytest.mark.parametrize("is_script", [False, True])
def test_interrupt_while_importing(model, console_script, module, is_script):
    """An import that swallows `KeyboardInterrupt` once let generation run on."""
    program = [console_script] if is_script else ["-m", "keras_kvcache"]
    # Python says which import is done. The prompt never ends, nor does the process.
    process = start(
        *("generate", "-", "--model", model),
        python=["-X", "importtime", *program],
    )
    for line in process.stderr:
        if line.split(b"|")[-1].strip() == module.encode():
            break
    process.send_signal(signal.SIGINT)
    assert_ends_interrupted(process)


def test_interrupt_of_a_download_leaves_nothing(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as index:
        index.settimeout(60)
        environment = {
            "PIP_INDEX_URL": f"http://127.0.0.1:{index.getsockname()[1]}/",
            "PIP_CONFIG_FILE": os.devnull,
            "NO_PROXY": "127.0.0.1",
        }
        process = start("info", cli.DEFAULT_MODEL, **environment)
        pip, _ = index.accept()
        with pip:
            # It waits for an answer now.
            process.send_signal(signal.SIGINT)
            assert_ends_interrupted(process)
            pip.settimeout(60)
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
    output, errors = process.communicate(b"hello\n", timeout=60)
    assert process.returncode == 0, errors
    assert output == b"\n"
    assert b"Traceback" not in errors


@pytest.mark.parametrize(
    "is_command, argv, orig_argv",
    [
        (True, "-m generate ab", "python -m keras_kvcache generate ab"),
        (True, "-m", "python -X dev -mkeras_kvcache"),
        (True, "-m", "python -m keras_kvcache.cli"),
        (True, "/bin/keras-kvcache chat", "python /bin/keras-kvcache chat"),
        (True, "keras-kvcache.exe", "python keras-kvcache.exe"),
        (False, "-m", "python -m other"),
        (False, "-m keras_kvcache", "python -m other keras_kvcache"),
        (False, "-m", "python -m my_keras_kvcache"),
        (False, "-c keras_kvcache", "python -c keras_kvcache"),
        (False, "train.py -m keras_kvcache", "python train.py -m keras_kvcache"),
        (False, "-m a b c d", "python"),
        (False, "", "python"),
        (False, "", ""),
    ],
)
def test_who_is_the_command(monkeypatch, is_command, argv, orig_argv):
    monkeypatch.setattr(sys, "argv", argv.split())
    monkeypatch.setattr(sys, "orig_argv", orig_argv.split())
    assert interrupt.is_command() == is_command


KEEPS_HANDLER = """
import signal
import keras_kvcache
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
"""
IN_A_THREAD = """
import signal, sys, threading
sys.argv = ["keras-kvcache"]
def work():
    import keras_kvcache
thread = threading.Thread(target=work)
thread.start()
thread.join()
assert sys.modules["keras_kvcache"].DecoderLM
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
"""


@pytest.mark.parametrize(
    "python",
    [["-c", KEEPS_HANDLER], ["-m", "other"], ["-c", IN_A_THREAD]],
    ids=["import", "package that imports", "thread"],
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
    assert not noted.came
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_interrupt_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT)
    with interrupt.Interrupt(is_noted=True) as noted:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt), interrupt.interrupt_raises():
            signal.raise_signal(signal.SIGINT)
        assert noted.came
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.real_model
@pytest.mark.parametrize(
    "characters",
    [0, *(pytest.param(count, marks=pytest.mark.slow) for count in (1, 40))],
)
def test_interrupt_ends_generate(smollm2_path, tmp_path, programs, characters):
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
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("programs/*")) and time.monotonic() < deadline:
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
    output, errors = process.communicate(b"\n", timeout=60)
    assert process.returncode == 0, errors
    assert output.endswith(b"> ")
    assert b"tokens/s" in errors and b"Traceback" not in errors


def test_compiled_programs_are_kept(model, tmp_path):
    arguments = ("generate", "abc", "--model", model, "--max-new-tokens", "5")
    assert run(*arguments).returncode == 0
    kept = set((tmp_path / "programs").glob("jit_program-*"))
    assert len(kept) > 1
    assert run(*arguments).returncode == 0
    assert set((tmp_path / "programs").glob("jit_program-*")) == kept
