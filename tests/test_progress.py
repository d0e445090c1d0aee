"""A bar while a model's weights are loaded, for who sits at a terminal."""

import io

import pytest
from conftest import make_lm

from keras_kvcache.loaders import progress
from keras_kvcache.models.presets import assign_weights, weight_name


class Terminal(io.StringIO):
    """Standard error that says whether somebody looks at it."""

    def __init__(self, is_terminal):
        super().__init__()
        self.isatty = lambda: is_terminal


@pytest.fixture
def load(monkeypatch):
    """Loads weights into a small model; gives what standard error shows."""
    lm = make_lm(num_layers=2)
    weights = {weight_name(w): (lambda w=w: w.numpy() * 0 + 3) for w in lm.weights}

    def run(is_terminal, delay):
        terminal = Terminal(is_terminal)
        monkeypatch.setattr("sys.stderr", terminal)
        monkeypatch.setattr(progress, "_DELAY", delay)
        assign_weights(lm, weights)
        return terminal.getvalue()

    return run


def test_a_terminal_sees_a_bar_that_goes_away(load):
    shown = load(is_terminal=True, delay=0)
    assert "Loading weights:   0%" in shown
    assert shown.endswith("\r") and shown.rstrip("\r ").count("\n") == 0


def test_what_is_loaded_by_then_needs_no_bar(load):
    assert load(is_terminal=True, delay=1e6) == ""


def test_a_pipe_and_a_notebook_see_nothing(load):
    assert load(is_terminal=False, delay=0) == ""
