"""Caches under `keras.distribution`: laid out over devices, and left there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

# Programs for eight devices take long to compile.
pytestmark = [pytest.mark.slow, pytest.mark.jax_only]

SCRIPT = Path(__file__).with_name("sharded_decoding.py")

# Over how many devices the arrays of 4 and of 3 rows are spread.
SPREAD = {"model": (2 * 4, 4), "undivided": (1, 1), "data": (1, 1)}

# Numbers that the keys of three rows have in a whole segment: more than what devices
# must tell each other, such as masks, scores and what is looked up in the embedding.
SEGMENT = 3 * 256 * 4 * 8


@pytest.mark.parametrize("distribution", SPREAD)
def test_decoding_on_eight_devices(distribution):
    finished = subprocess.run(
        [sys.executable, SCRIPT, distribution], capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    seen = json.loads(finished.stdout.splitlines()[-1])
    assert len(seen) == 5
    for case, found in seen.items():
        assert found["equal"], case
        for rows, spread in zip(("4", "3"), SPREAD[distribution], strict=True):
            assert found[rows]["spread"] == spread, (case, rows)
            assert found[rows]["keeps_layout"], (case, rows)
            if spread > 1:
                assert found[rows]["gathered"] < SEGMENT, (case, rows)
