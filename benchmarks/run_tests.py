"""Runs the tests of the kernel or of programs for GPUs, a row for each that fails.

On a GPU they run for real. If no test passes, that is a failure, except where there is
neither a GPU nor a plugin of JAX that compiles for one: there the tests of programs are
skipped.
"""

import os
import sys
from pathlib import Path

import harness

TESTS = Path(__file__).resolve().parent.parent / "tests"
FILES = {"kernel": "test_kernels_gpu.py", "programs": "test_gpu_programs.py"}
QUICK = {
    "kernel": "unlike_forms or nan or NVIDIA or (numpy and heads1 and 64)",
    "programs": "prefill or (decode_loop and 1-2 and int8)",
}
WORKERS = min(8, len(os.sched_getaffinity(0)))


class Rows:
    """A pytest plugin that counts outcomes and adds a row for each failure."""

    def __init__(self, report):
        self._report = report
        self.counts = dict(passed=0, failed=0, skipped=0)

    def pytest_runtest_logreport(self, report):
        if report.failed:
            lines = [x for x in str(report.longrepr).splitlines() if x.startswith("E ")]
            said = " ".join(lines or str(report.longrepr).splitlines()[-1:])
            self._report.add(test=report.nodeid, failed=said[:500])
        if report.when == "call" or report.failed or report.skipped:
            self.counts[report.outcome] += 1


def main():
    options = harness.read_arguments("Runs tests on this device.", tests=FILES)
    # The tests' processes share the device's memory, so none may take all of it.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    import jax
    import pytest

    report = harness.Report(f"{options.tests}_tests", options)
    rows = Rows(report)
    file = str(TESTS / FILES[options.tests])
    arguments = ["-q", "-p", "no:cacheprovider", "-n", str(WORKERS), file]
    # Other pytest plugins that the machine has may interfere.
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    arguments += ["-p", "xdist"]
    if options.quick:
        arguments += ["-k", QUICK[options.tests]]
    code = pytest.main(arguments, plugins=[rows])
    on_gpu = jax.default_backend() == "gpu"
    counts = rows.counts
    if options.tests == "programs" and not on_gpu and not counts["passed"]:
        if counts["skipped"] and not counts["failed"]:
            report.add(skipped="no GPU, and no plugin of JAX's for one")
            return
    left_out = counts.pop("skipped")
    report.add(**counts, left_out=left_out, **{"for real": on_gpu}, exit=int(code))
    report.finish()
    sys.exit(0 if code == 0 and counts["passed"] else 1)


if __name__ == "__main__":
    main()
