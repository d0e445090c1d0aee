"""The command line, as a user meets it."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
from gguf_files import PRIMES, metadata, random_tensors, write

from keras_kvcache import cli


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
    assert re.search(r"a token +480 bytes", printed)
    assert f"{2 * 37 * 480:,} bytes" in printed
    assert cli.main([*arguments, "--cache-dtype", "bfloat16"]) == 0
    assert f"{37 * 480:,} bytes" in capsys.readouterr().out


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
        (["info", "MODEL", "--cache-dtype", "int7"], "int7"),
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


def start(command, *arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "keras_kvcache", command, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
    )


@pytest.mark.real_model
@pytest.mark.parametrize("characters", [0, 1, 40])
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
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in errors and b"Exception" not in errors


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
    kept = {path.name for path in (tmp_path / "programs").iterdir()}
    assert kept
    # A second start compiles nothing new of a size worth keeping.
    assert run(*arguments).returncode == 0
    assert {path.name for path in (tmp_path / "programs").iterdir()} == kept
