"""A bar while a model's weights are loaded, for who sits at a terminal."""

import io
import re

import numpy as np
import pytest
from conftest import make_lm

from keras_kvcache import DecoderLM
from keras_kvcache.loaders import progress
from keras_kvcache.models.presets import assign_weights, weight_name


class Terminal(io.StringIO):
    """Standard error that says whether somebody looks at it."""

    def __init__(self, is_terminal):
        super().__init__()
        self.isatty = lambda: is_terminal


def assign(lm, folder):
    """As from a GGUF file or a Hugging Face folder: weight by weight."""
    weights = {weight_name(w): (lambda w=w: w.numpy()) for w in lm.weights}
    assign_weights(make_lm(num_layers=2), weights)


def read_own_preset(lm, folder):
    lm.save_to_preset(folder)
    loaded = DecoderLM.from_preset(folder)
    for ours, theirs in zip(loaded.get_weights(), lm.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert not any("load_own_variables" in vars(block) for block in loaded.blocks)


@pytest.fixture(params=[assign, read_own_preset])
def load(request, monkeypatch, tmp_path):
    """Loads weights into a small model; gives what standard error shows."""

    def run(is_terminal, delay):
        terminal = Terminal(is_terminal)
        monkeypatch.setattr("sys.stderr", terminal)
        monkeypatch.setattr(progress, "_DELAY", delay)
        # Else tqdm shows no more than it thinks that a reader follows.
        monkeypatch.setattr(progress, "_BETWEEN", 0)
        request.param(make_lm(num_layers=2), tmp_path / "preset")
        return terminal.getvalue()

    return run


def test_a_terminal_sees_a_bar_that_goes_away(load):
    shown = load(is_terminal=True, delay=0)
    shares = [int(share) for share in re.findall(r"weights: +(\d+)%", shown)]
    assert shares[0] == 0 and shares == sorted(shares)
    assert len(set(shares)) >= 3 and 60 < shares[-1] <= 100
    assert shown.endswith("\r") and shown.rstrip("\r ").count("\n") == 0


def test_what_is_loaded_by_then_needs_no_bar(load):
    assert load(is_terminal=True, delay=1e6) == ""


def test_a_pipe_and_a_notebook_see_nothing(load):
    assert load(is_terminal=False, delay=0) == ""
