"""A cache in NumPy that keeps all: what a query sees follows from where both stand."""

import numpy as np
from reference_codecs import int4_of_group


class ReferenceCache:
    """Lists of `(key, value)` by position, row by row: as they came, and coded."""

    def __init__(
        self, rows, code, group=None, window=None, sinks=0, code_group=int4_of_group
    ):
        self.exact, self.coded = [[[] for _ in range(rows)] for _ in range(2)]
        self.code, self.group, self.window, self.sinks = code, group, window, sinks
        self.code_group = code_group

    def write(self, row, index, keys, values):
        del self.exact[row][index:], self.coded[row][index:]
        for key, value in zip(keys, values, strict=True):
            self.exact[row].append((key, value))
            key = self.code(key) if self.group is None else key
            self.coded[row].append((key, self.code(value)))

    def code_groups(self, row, index):
        """Codes keys, if in groups, where entries from `index` on made one full."""
        entries, size = self.coded[row], self.group or len(self.coded[row]) + 1
        for start in range(index // size * size, len(entries) - size + 1, size):
            keys, values = zip(*entries[start : start + size], strict=True)
            keys = self.code_group(np.array(keys))
            entries[start : start + size] = zip(keys, values, strict=True)

    def attend(self, row, queries, positions=None, scale=1.0):
        """Queries `(T, N, H)` at positions `(T, 1)`; without these they see all."""
        entries = self.exact[row][: self.sinks] + self.coded[row][self.sinks :]
        group = queries.shape[1] // len(entries[0][0])
        keys, values = (np.repeat(x, group, axis=1) for x in zip(*entries, strict=True))
        slots = np.arange(len(keys))
        behind = np.zeros((len(queries), 1)) if positions is None else positions - slots
        near = (behind < (self.window or np.inf)) | (slots < self.sinks)
        scores = np.einsum("tnh,snh->nts", queries, keys, dtype="float64") * scale
        weights = np.exp(scores - scores.max()) * (near & (behind >= 0))
        return np.einsum(
            "nts,snh->tnh", weights / weights.sum(-1, keepdims=True), values
        )
