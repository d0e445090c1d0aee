"""Times answers, and tells compilation from decoding."""

import math
import time

import keras

# Of JAX, for tracing, lowering and compiling or loading a program, and of our own C++.
_EVENTS = ("/jax/core/compile/", "/keras_kvcache/compile/")


class CompileClock:
    """A context manager that notes when JAX compiles programs."""

    def __init__(self):
        self._spans = []

    def __enter__(self):
        if keras.backend.backend() == "jax":
            import jax

            jax.monitoring.register_event_duration_secs_listener(self._note)
        return self

    def __exit__(self, *_):
        if keras.backend.backend() == "jax":
            import jax

            jax.monitoring.unregister_event_duration_listener(self._note)

    def _note(self, event, duration, **_):
        if event.startswith(_EVENTS):
            end = time.perf_counter()
            self._spans.append((end - duration, end))

    def seconds(self, since: float = -math.inf) -> float:
        """Seconds of compilation after a time, as `time.perf_counter` gives it."""
        # Spans lie within others: a function that is traced calls others.
        total, reached = 0.0, since
        for start, end in sorted(self._spans):
            total += max(0.0, end - max(start, reached))
            reached = max(reached, end)
        return total


class AnswerClock:
    """Measures an answer, from when it is made to `end()`.

    Attributes:
        compiling: A `CompileClock` to be entered around the answer.
    """

    def __init__(self):
        self.compiling = CompileClock()
        self._begin = time.perf_counter()
        self._first = self._end = None

    def piece(self) -> None:
        """Notes that a piece of the answer has come."""
        self._first = self._first or time.perf_counter()

    def end(self) -> None:
        """Notes that the answer has ended."""
        self._end = time.perf_counter()

    def describe(self, count: int) -> str:
        """A line about an answer of `count` tokens."""
        parts = []
        if self._first is not None:
            parts.append(f"first token after {self._first - self._begin:.2f} s")
        compiled = self.compiling.seconds()
        if compiled >= 0.005:
            parts.append(f"compiled in {compiled:.2f} s")
        parts.append(f"{count} tokens")
        if count > 1:
            later = self.compiling.seconds(since=self._first)
            decoding = max(self._end - self._first - later, 1e-9)
            parts.append(f"{(count - 1) / decoding:.1f} tokens/s after the first")
        return ", ".join(parts)
