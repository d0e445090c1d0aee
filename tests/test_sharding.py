"""Caches under `keras.distribution`: laid out over devices, and left there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

# Programs for eight devices take long to compile.
pytestmark = [pytest.mark.slow, pytest.mark.jax_only]

SCRIPT = Path(__file__).with_name("sharded_decoding.py")

# Over how many devices the arrays of 8 and of 3 rows are spread.
SPREAD = {"model": (2 * 4, 4), "undivided": (1, 1), "data": (8, 1)}


@pytest.mark.parametrize("distribution", SPREAD)
def test_decoding_on_eight_devices(distribution):
    """Devices tell each other less than what one of them has of a segment's keys."""
    finished = subprocess.run(
        [sys.executable, SCRIPT, distribution], capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    seen = json.loads(finished.stdout.splitlines()[-1])
    assert len(seen) == 5
    for case, found in seen.items():
        assert found["equal"], case
        for rows, spread in zip(("8", "3"), SPREAD[distribution], strict=True):
            one = found[rows]
            assert one["spread"] == spread, (case, rows)
            assert one["keeps_layout"], (case, rows)
            assert one["verbs_keep_layout"], (case, rows)
            assert one["gathered"] < one["shard"], (case, rows)
            if spread > 1:
                assert one["gathered on purpose"] > one["shard"], (case, rows)
