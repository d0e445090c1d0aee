"""The same model run by several libraries, as contenders with one method.

All contenders get the same weights and prompt token ids, decode greedily in float32
with all cores and return when the new ids are known. llama.cpp is the exception: it
runs the weights of the GGUF file quantized as they are. A contender that can't run
here is left out with a line that says so; those that should agree are checked to.
"""

import abc
import functools
import importlib.util
import itertools
import os

import numpy as np

from keras_kvcache.generation.buckets import capacity_for

CORES = len(os.sched_getaffinity(0))


class Contender(abc.ABC):
    """A library that runs a `Subject`; `name` and `needs` belong to the class."""

    needs = ()  # modules
    exact = True  # whether it must choose the tokens that the others choose

    @abc.abstractmethod
    def generate(self, prompts, new_tokens, capacity):
        """Decodes greedily.

        Args:
            prompts: Lists of token ids, one a row.
            new_tokens: How many ids to add to each.
            capacity: Room for prompt and new tokens, in slots. What grows as it
                needs to ignores it; what has few sizes takes the next one.

        Returns:
            Lists of the new ids.
        """

    def first_token(self, prompt, capacity):
        """Runs a prompt and makes one token, with room for `capacity` tokens."""
        self.generate([prompt], 1, capacity)

    def many_tokens(self, prompt, new_tokens, capacity):
        """Does what `first_token` does, and decodes `new_tokens` more."""
        self.generate([prompt], 1 + new_tokens, capacity)


class Ours(Contender):
    name = "keras-kvcache"

    def __init__(self, subject):
        self.lm = subject.lm

    def generate(self, prompts, new_tokens, capacity):
        self.lm.room = capacity
        return self.lm.generate(
            prompts, max_new_tokens=new_tokens, stop_token_ids=None, strip_prompt=True
        )


class HandWrittenJax(Contender):
    """One row only."""

    name = "hand-written JAX"
    needs = ("jax_loop",)

    def __init__(self, subject):
        from jax_loop import HandWritten

        self.loop = functools.lru_cache(1)(
            lambda capacity: HandWritten(subject.lm, capacity)
        )
        self.limit = subject.lm.max_sequence_length

    def generate(self, prompts, new_tokens, capacity):
        (prompt,) = prompts
        loop = self.loop(capacity_for(capacity, self.limit))
        return [loop.generate(prompt, new_tokens)]


class KerasHub(Contender):
    """It runs the padding as if it were prompt, and always fills `capacity`."""

    name = "keras-hub"
    needs = ("keras_hub",)

    def __init__(self, subject):
        from peer_models import hub_model

        self.model = hub_model(subject.lm)

    def generate(self, prompts, new_tokens, capacity):
        token_ids = np.zeros((len(prompts), capacity), "int32")
        mask = np.zeros((len(prompts), capacity), bool)
        for row, prompt in enumerate(prompts):
            token_ids[row, : len(prompt)] = prompt
            mask[row, : len(prompt)] = True
        inputs = {"token_ids": token_ids, "padding_mask": mask}
        answers = self.model.generate(inputs, stop_token_ids=None)["token_ids"]
        return [
            answer[len(prompt) : len(prompt) + new_tokens].tolist()
            for prompt, answer in zip(prompts, answers, strict=True)
        ]

    def first_token(self, prompt, capacity):
        """Its cost: a prompt that leaves room for one token runs as many slots."""
        self.many_tokens(prompt, 0, capacity)

    def many_tokens(self, prompt, new_tokens, capacity):
        """Ends where `capacity` does: a step costs the same at every position."""
        self.generate([np.resize(prompt, capacity - 1 - new_tokens)], 1, capacity)


class Transformers(Contender):
    name = "transformers"
    needs = ("transformers", "torch")

    def __init__(self, subject):
        from peer_models import torch_model

        self.model = torch_model(subject.lm, CORES)

    def make_cache(self, capacity):
        return None  # One that grows.

    def generate(self, prompts, new_tokens, capacity):
        import torch

        width = max(map(len, prompts))
        token_ids = [[0] * (width - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        with torch.inference_mode():
            answers = self.model.generate(
                torch.tensor(token_ids, device=self.model.device),
                attention_mask=torch.tensor(mask, device=self.model.device),
                max_new_tokens=new_tokens,
                do_sample=False,
                past_key_values=self.make_cache(capacity),
            )
        return answers[:, width:].tolist()


class TransformersStatic(Transformers):
    """With a cache of fixed size; transformers compiles for it on GPUs only."""

    name = "transformers, static cache"

    def __init__(self, subject):
        super().__init__(subject)
        self.caches = {}

    def make_cache(self, capacity):
        """The same cache each time: compiled programs are bound to its memory."""
        from transformers import StaticCache

        if capacity not in self.caches:
            self.caches[capacity] = StaticCache(
                self.model.config, max_cache_len=capacity
            )
        else:
            self.caches[capacity].reset()
        return self.caches[capacity]


class LlamaCpp(Contender):
    """One row only. Its cache holds float16."""

    name = "llama.cpp, Q4_1 weights"
    needs = ("llama_cpp",)
    exact = False

    def __init__(self, subject):
        from llama_cpp import Llama

        self.llm = Llama(
            str(subject.gguf),
            n_ctx=subject.lm.max_sequence_length,
            n_threads=CORES,
            n_threads_batch=CORES,
            verbose=False,
        )

    def generate(self, prompts, new_tokens, capacity):
        (prompt,) = prompts
        self.llm.reset()  # It would reuse what it knows of the prompt.
        tokens = self.llm.generate(prompt, temp=0.0)
        return [list(itertools.islice(tokens, new_tokens))]


ALL = (Ours, HandWrittenJax, KerasHub, Transformers, TransformersStatic, LlamaCpp)


def missing_modules(kind):
    """Names of the modules that a kind of contender needs and that aren't here."""
    return [name for name in kind.needs if not importlib.util.find_spec(name)]


def make_contenders(subject, kinds=ALL, lengths=(24,)):
    """The contenders that can run a subject, by name, checked to agree.

    Args:
        subject: A `Subject`.
        kinds: Classes of contenders.
        lengths: Lengths of the prompts, one a row, that the check is made with.

    Returns:
        A dictionary from names to contenders.
    """
    contenders = {}
    for kind in kinds:
        if missing := missing_modules(kind):
            print(f"{kind.name} is left out: no module {', '.join(missing)}")
        elif kind is LlamaCpp and subject.gguf is None:
            print(f"{kind.name} is left out: {subject.name} has no GGUF file")
        else:
            contenders[kind.name] = kind(subject)
    check_agreement(subject, contenders, lengths)
    return contenders


def check_agreement(subject, contenders, lengths, new_tokens=16):
    """Ends the benchmark unless all exact contenders give the same tokens."""
    prompts = [subject.prompt(length, seed=length) for length in lengths]
    capacity = max(lengths) + new_tokens + 1
    answers = {
        name: contender.generate(prompts, new_tokens, capacity)
        for name, contender in contenders.items()
        if contender.exact
    }
    expected, *others = answers.values()
    if any(answer != expected for answer in others):
        listed = "\n".join(f"{name}: {answer}" for name, answer in answers.items())
        raise SystemExit(f"{subject.name}: the contenders disagree\n{listed}")
    print(f"{subject.name}: {len(answers)} contenders agree on {new_tokens} tokens")
