"""Small vocabularies, as the metadata of GGUF files."""

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def alphabet():
    """GPT-2's spelling of the 256 bytes, in the order of the bytes."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    letters = {byte: chr(byte) for byte in shown}
    letters |= {byte: chr(256 + index) for index, byte in enumerate(hidden)}
    return [letters[byte] for byte in range(256)]


# One id a byte, so that merges show and nothing else does.
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2", "12 3", "123 4"]
SPECIAL = {"<|start|>": CONTROL, "<|im_end|>": CONTROL, "<think>": USER_DEFINED}


def byte_level(**changes):
    tokens = alphabet() + [merge.replace(" ", "") for merge in MERGES] + list(SPECIAL)
    values = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": [NORMAL] * (len(tokens) - 3) + list(SPECIAL.values()),
        "merges": MERGES,
        "bos_token_id": tokens.index("<|start|>"),
        "eos_token_id": tokens.index("<|im_end|>"),
    } | changes
    return {f"tokenizer.ggml.{k}": v for k, v in values.items() if v is not None}


BOS, EOS, THINK = 264, 265, 266


def sentence_piece(**changes):
    """Digits, letters and their unions as a trained vocabulary would score them."""
    pieces = ["▁", "a", "b", "c", "ab", "bc", "abc", "▁a", "▁ab", "ca", "cab", "▁▁"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *bytes_, *pieces, "[INST]"]
    scores = [0.0] * 259 + [-9.0, -9.0, -9.0, -9.0, -2.0, -1.0, -4.0, -3.0, -7.0]
    scores += [-5.0, -6.0, -8.0, 0.0]
    kinds = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(pieces)
    values = {
        "model": "llama",
        "tokens": tokens,
        "scores": scores,
        "token_type": [*kinds, USER_DEFINED],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "add_bos_token": False,
    } | changes
    return {f"tokenizer.ggml.{k}": v for k, v in values.items() if v is not None}
