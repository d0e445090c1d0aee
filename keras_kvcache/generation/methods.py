"""`generate` and `stream` as methods of a model."""


class GenerateMethods:
    """Gives a model the methods of its `generator`, a `Generator`."""

    def generate(
        self,
        inputs,
        max_length=None,
        max_new_tokens=None,
        stop_token_ids="auto",
        strip_prompt=False,
        sampler=None,
        seed=None,
        cache=None,
    ):
        """Continues prompts; see `keras_kvcache.Generator.generate`."""
        return self.generator.generate(
            inputs,
            max_length=max_length,
            max_new_tokens=max_new_tokens,
            stop_token_ids=stop_token_ids,
            strip_prompt=strip_prompt,
            sampler=sampler,
            seed=seed,
            cache=cache,
        )

    def stream(
        self,
        inputs,
        max_length=None,
        max_new_tokens=None,
        stop_token_ids="auto",
        sampler=None,
        seed=None,
        cache=None,
    ):
        """Continues prompts piece by piece; see `keras_kvcache.Generator.stream`."""
        return self.generator.stream(
            inputs,
            max_length=max_length,
            max_new_tokens=max_new_tokens,
            stop_token_ids=stop_token_ids,
            sampler=sampler,
            seed=seed,
            cache=cache,
        )
