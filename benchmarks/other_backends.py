"""What does a token cost on PyTorch and on TensorFlow?

SmolLM2 at batch 1 under the backend that `KERAS_BACKEND` names, against transformers
on PyTorch and against keras-hub's `generate` on TensorFlow, with as many threads as
`THREADS` says (all cores if it isn't set). Each backend and number of threads has its
own file of rows; times are differences, as in `generation.py`.
"""

import os

import harness
import keras
import peers
import subjects
from generation import Case, time_tokens

KINDS = {
    "torch": (peers.Ours, peers.Transformers),
    "tensorflow": (peers.Ours, peers.KerasHub),
}
CASE, QUICK_CASE = Case.tight(200, 32), Case.tight(24, 16)


def main():
    options = harness.read_arguments("Times a token on PyTorch or TensorFlow.")
    backend, threads = keras.backend.backend(), int(os.environ.get("THREADS", 0))
    threads = threads or peers.CORES
    report = harness.Report(f"other_backends-{backend}-{threads}", options)
    subject = subjects.smollm2(options.quick)
    contenders = peers.make_contenders(subject, KINDS[backend])
    limit_threads(backend, threads)
    case = QUICK_CASE if options.quick else CASE
    per_token, first = time_tokens(subject, contenders, case, 2 if options.quick else 5)
    for name in contenders:
        report.add(
            model=subject.name,
            backend=backend,
            threads=threads,
            contender=name,
            fill=case.fill,
            capacity=case.capacity,
            **{"ms per token": 1e3 * per_token[name]},
            **{"times ours": per_token[name] / per_token[peers.Ours.name]},
            **{"first token, ms": 1e3 * first[name]},
        )
    report.finish()


def limit_threads(backend, threads):
    """Sets PyTorch's threads; TensorFlow takes them from its environment."""
    if backend == "torch":
        import torch

        torch.set_num_threads(threads)


if __name__ == "__main__":
    if "THREADS" in os.environ:
        # Read when TensorFlow is first used.
        for kind in ("INTRAOP", "INTEROP"):
            os.environ[f"TF_NUM_{kind}_THREADS"] = os.environ["THREADS"]
    main()
