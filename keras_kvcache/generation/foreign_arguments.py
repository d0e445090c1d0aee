"""Advice on arguments that `generate` has in other packages: what to write instead.

The names are those of transformers, keras-hub, mlx-lm, llama.cpp's Python package and
OpenAI's interface.
"""

from keras_kvcache.errors import for_all

_SETTINGS = {"temp": "temperature"} | {
    name: name for name in ("temperature", "top_k", "top_p", "min_p")
}
_INPUTS = "it is the first argument, `inputs`"
_NEW_TOKENS = "write `max_new_tokens`"
_STOP_IDS = "write `stop_token_ids`, an id or ids that end a row"
_CACHE = (
    'write `cache`: a codec ("bfloat16", "int8", "int4"), a kind ("static", "rolling")'
    " or a dictionary"
)


def _sampler(given):
    """One sampler with all the settings that were given."""
    settings = []
    for name, value in given.items():
        if name in _SETTINGS:
            shown = f"{value!r}" if isinstance(value, (int, float)) else "…"
            settings.append(f"{_SETTINGS[name]}={shown}")
    settings = ", ".join(settings or ["temperature=0.7"])
    return (
        f"write `sampler=samplers.make({settings})`, with "
        "`from keras_kvcache import samplers`"
    )


# By the name that users type; a text follows "`generate` has no argument `name`: ".
ADVICE = {
    **for_all(" ".join(_SETTINGS), _sampler),
    **for_all(
        "do_sample sampling",
        'the likeliest token is taken unless a `sampler` is given, such as "random" or '
        "`samplers.top_p(0.9, temperature=0.7)`",
    ),
    **for_all(
        "typical_p epsilon_cutoff eta_cutoff tfs_z mirostat_mode xtc_probability "
        "penalty_alpha",
        "there is no such filter yet; write one as a function "
        "`(logits, parameter) -> logits` and give "
        "`sampler=samplers.chain((function, parameter))`",
    ),
    **for_all(
        "repetition_penalty repeat_penalty presence_penalty frequency_penalty "
        "no_repeat_ngram_size encoder_repetition_penalty",
        "there is no penalty yet; write a sampler with a state, which may hold the "
        "tokens before (docs/generation.md shows one)",
    ),
    **for_all(
        "logits_processor logits_processors logits_warper logit_bias bad_words_ids "
        "suppress_tokens prefix_allowed_tokens_fn",
        "what changes logits is a function `(logits, parameter) -> logits` in "
        "`sampler=samplers.chain((function, parameter), …)`, or a sampler with a state "
        "where it needs the tokens before",
    ),
    **for_all(
        "num_beams num_beam_groups beam_size early_stopping length_penalty "
        "diversity_penalty",
        "beam search isn't there yet; of keras-hub's models it runs by "
        "`keras_kvcache.accelerate` with keras-hub's own `BeamSampler`",
    ),
    **for_all(
        "num_return_sequences n best_of num_samples",
        "give the prompt as often as there are to be answers, `inputs=[prompt] * 3`, "
        'and a sampler that draws, such as `sampler="random"`',
    ),
    **for_all(
        "stop stop_strings stop_sequences stop_words",
        "texts that end an answer aren't there yet; give ids, `stop_token_ids=[…]`, or "
        "leave the loop over `stream(…)` where the text has come",
    ),
    **for_all(
        "eos_token_id eos_token_ids eos_id end_token_id end_id stop_token stop_tokens "
        "stop_ids stop_id",
        _STOP_IDS,
    ),
    **for_all("ignore_eos", "write `stop_token_ids=None` for no token that ends a row"),
    "stopping_criteria": "leave the loop over `stream(…)` where it is to end",
    **for_all(
        "max_tokens max_completion_tokens max_output_tokens max_gen_len n_predict "
        "num_predict num_tokens n_tokens new_tokens",
        _NEW_TOKENS,
    ),
    **for_all(
        "max_len max_seq_len max_sequence_length sequence_length length",
        "write `max_length`, the most tokens of prompt and answer together, or "
        "`max_new_tokens`",
    ),
    **for_all(
        "min_length min_new_tokens min_tokens",
        "a least length isn't there yet; `stop_token_ids=None` goes on to "
        "`max_new_tokens`",
    ),
    **for_all(
        "prompt prompts text texts text_inputs input_ids token_ids input x prompt_ids "
        "query content",
        _INPUTS,
    ),
    **for_all(
        "messages chat conversation",
        _INPUTS + ", which may be a list of messages; the chat template is applied",
    ),
    **for_all(
        "tools documents chat_template chat_template_kwargs add_generation_prompt "
        "continue_final_message enable_thinking",
        "give what the model's `tokenizer.apply_chat_template(messages, …)` makes of "
        "it as `inputs`",
    ),
    **for_all(
        "attention_mask padding_mask",
        "lists of ids of any lengths need none; arrays that are padded on the right "
        'come as `inputs={"token_ids": …, "padding_mask": …}`',
    ),
    **for_all(
        "pad_token_id pad_id padding padding_side",
        "nothing is to be padded: prompts are lists of any lengths, and so are answers",
    ),
    **for_all(
        "inputs_embeds decoder_input_ids images pixel_values audio",
        "this isn't there yet; `inputs` are texts, messages or token ids",
    ),
    **for_all(
        "stream streamer streaming callback",
        "iterate over `stream(…)`, a method beside `generate` that gives text as it "
        "comes",
    ),
    "use_cache": "a cache is always used; `cache` says which kind",
    **for_all(
        "cache_implementation cache_config cache_type kv_cache kv_bits kv_group_size "
        "quantized_kv_start cache_dtype",
        _CACHE,
    ),
    **for_all(
        "max_kv_size window sliding_window",
        "write `cache=caches.Rolling(window=…)`, with `from keras_kvcache import "
        "caches`",
    ),
    **for_all(
        "past_key_values prompt_cache cache_update_index",
        "a call begins with empty caches; `start` and `decode` of the model's "
        "`generator` go on from rows that are kept, and `call_with_cache` of the model "
        "from a cache",
    ),
    **for_all(
        "prefill prefill_step_size prefill_chunk_size n_batch",
        "prompts run in chunks by themselves",
    ),
    "batch_size": "give a list of prompts; all of them run together",
    **for_all(
        "assistant_model draft_model num_draft_tokens prompt_lookup_num_tokens",
        "guessing tokens ahead isn't there yet",
    ),
    **for_all(
        "return_dict_in_generate output_scores output_logits output_attentions "
        "output_hidden_states logprobs top_logprobs",
        "only tokens or text come back; logits come from `call_with_cache` of the "
        "model, or from calling it",
    ),
    **for_all(
        "return_full_text echo strip_inputs",
        "`strip_prompt=True` leaves the prompt out of the answer, and `stream` always "
        "does",
    ),
    "strip_prompt": "what streams is the new text only",
    **for_all("random_seed generator rng random_state", "write `seed`, an integer"),
    **for_all(
        "generation_config",
        "its entries are arguments: `max_new_tokens`, `stop_token_ids`, `sampler`",
    ),
    "tokenizer": "it is an attribute of the model, `model.tokenizer`",
    **for_all(
        "response_format grammar",
        "an answer can't be held to a grammar yet",
    ),
    **for_all(
        "skip_special_tokens return_tensors",
        "give ids as `inputs` to get ids; text comes without special tokens",
    ),
}
