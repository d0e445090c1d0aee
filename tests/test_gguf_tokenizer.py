"""Tokenizers built from GGUF metadata: splitting, merging, special tokens."""

import numpy as np
import pytest
from vocabularies import BOS, EOS, NORMAL, THINK, byte_level, sentence_piece

from keras_kvcache.loaders.gguf_tokenizer import build_tokenizer

# Byte-level BPE.


def test_merges_apply_in_their_order():
    tokenizer = build_tokenizer(byte_level())
    tokens = byte_level()["tokenizer.ggml.tokens"]
    assert [tokens[i] for i in tokenizer.encode("hello world")] == [
        *("hello", "Ġw", "o", "r", "l", "d")
    ]


@pytest.mark.parametrize("text", ["", "hello", "héllo 😀 \n\t\r\n  x", "\u0000\u00ad"])
def test_byte_level_text_survives(text):
    tokenizer = build_tokenizer(byte_level())
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "it's 12345!? ok", ["it", "'s", "Ġ12345", "!?", "Ġok"]),
        ("gpt-2", "IT'S", ["IT", "'", "S"]),
        ("gpt-2", "a \n\n b", ["a", "ĠĊĊ", "Ġb"]),
        ("smollm", "it's 123!?", ["it", "'s", "Ġ", "1", "2", "3", "!?"]),
        # A number is whatever Unicode says: ½ and Ⅷ stand alone too.
        ("smollm", "x ½Ⅷ", ["x", "Ġ", "Â½", "âħ§"]),
        ("llama-bpe", "IT'S 12345!?\n\nx", ["IT", "'S", "Ġ", "123", "45", "!?ĊĊ", "x"]),
        ("llama-bpe", "a.b\tc  d", ["a", ".b", "ĉc", "Ġ", "Ġd"]),
        ("qwen2", "IT'S 123!?\n", ["IT", "'S", "Ġ", "1", "2", "3", "!?Ċ"]),
        ("default", "a, b=12345", ["a", ",", "Ġb", "=", "123", "45"]),
    ],
)
def test_text_is_split_by_the_rule_the_file_names(pre, text, pieces):
    backend = build_tokenizer(byte_level(pre=pre))._backend
    found = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    assert found == pieces


def test_a_file_that_names_no_rule_has_the_default_one():
    text = "a, b=12345 c's"
    unnamed, default = (
        build_tokenizer(byte_level(pre=pre)) for pre in (None, "default")
    )
    assert unnamed.encode(text) == default.encode(text)
    assert unnamed.encode(text) != build_tokenizer(byte_level()).encode(text)


def test_llama3_takes_a_known_word_whole():
    """No merge leads to "world", which is a token."""
    tokens = byte_level()["tokenizer.ggml.tokens"]
    changes = {"tokens": [*tokens, "world"], "token_type": None}
    assert build_tokenizer(byte_level(pre="llama-bpe", **changes)).encode("world") == [
        BOS,
        len(tokens),
    ]
    assert len(build_tokenizer(byte_level(**changes)).encode("world")) == 5


def test_qwen_composes_characters():
    tokenizer = build_tokenizer(byte_level(pre="qwen2"))
    assert tokenizer.decode(tokenizer.encode("e\u0301")) == "\u00e9"


# Special tokens, whichever the model.


def test_special_tokens_are_found_in_the_text():
    tokenizer = build_tokenizer(byte_level())
    ids = tokenizer.encode("<|start|>hello<think>hello<|im_end|>")
    assert ids == [BOS, 259, THINK, 259, EOS]
    # What the author defined is text; control tokens are not.
    assert tokenizer.decode(ids) == "hello<think>hello"
    assert tokenizer.decode(ids, skip_special_tokens=False) == (
        "<|start|>hello<think>hello<|im_end|>"
    )


def test_bos_and_eos_are_added_when_the_file_says_so_and_never_twice():
    plain = build_tokenizer(byte_level())
    both = build_tokenizer(byte_level(add_bos_token=True, add_eos_token=True))
    assert plain.encode("hello") == [259]
    assert both.encode("hello") == [BOS, 259, EOS]
    assert both.encode("<|start|>hello<|im_end|>") == [BOS, 259, EOS]
    assert both.encode("") == [BOS, EOS]


def test_bos_where_the_file_is_silent():
    assert build_tokenizer(sentence_piece(add_bos_token=None)).add_bos
    assert build_tokenizer(byte_level(pre="llama-bpe")).add_bos
    assert not build_tokenizer(byte_level()).add_bos


def test_stop_tokens_are_eos_and_whatever_ends_a_turn():
    assert build_tokenizer(byte_level()).stop_token_ids == (EOS,)
    changes = {"eos_token_id": 0, "eot_token_id": 7, "eom_token_id": 0}
    tokenizer = build_tokenizer(byte_level(**changes))
    assert tokenizer.stop_token_ids == (0, 7, EOS)
    # A name alone doesn't make a token one that ends a turn.
    plain = build_tokenizer(byte_level(token_type=None, eos_token_id=None))
    assert plain.stop_token_ids == ()


# SentencePiece BPE.


def merge_by_score(text, score_of):
    """SentencePiece: join the best-scored neighbours, leftmost first."""
    symbols = list(text.replace(" ", "▁"))
    while True:
        unions = [a + b for a, b in zip(symbols, symbols[1:], strict=False)]
        best = max((score_of[u] for u in unions if u in score_of), default=None)
        if best is None:
            return symbols
        at = next(i for i, u in enumerate(unions) if score_of.get(u) == best)
        symbols[at : at + 2] = [unions[at]]


def test_sentence_piece_merges_the_best_score_first():
    values = sentence_piece(add_space_prefix=False)
    tokens = values["tokenizer.ggml.tokens"]
    kinds = values["tokenizer.ggml.token_type"]
    score_of = {
        token: score
        for token, score, kind in zip(
            tokens, values["tokenizer.ggml.scores"], kinds, strict=True
        )
        if kind == NORMAL
    }
    tokenizer = build_tokenizer(values)
    rng = np.random.default_rng(0)
    for _ in range(200):
        text = "".join(rng.choice(list("abc "), rng.integers(1, 17)))
        found = [tokens[i] for i in tokenizer.encode(text)]
        assert found == merge_by_score(text, score_of), text
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_hidden_space_begins_a_sentence_piece_text():
    tokenizer = build_tokenizer(sentence_piece())
    tokens = sentence_piece()["tokenizer.ggml.tokens"]
    ids = tokenizer.encode("a[INST]a")
    # Again after a token that isn't split, as the model's training had it.
    assert [tokens[i] for i in ids] == ["▁a", "[INST]", "▁a"]
    assert tokenizer.decode(tokenizer.encode("abc a")) == "abc a"
    assert tokenizer.decode(tokenizer.encode(" abc")) == " abc"


def test_characters_without_a_token_fall_back_to_bytes():
    tokenizer = build_tokenizer(sentence_piece(add_space_prefix=False))
    ids = tokenizer.encode("aé😀")
    assert ids == [260, *(3 + byte for byte in "é😀".encode())]
    assert tokenizer.decode(ids) == "aé😀"
    assert tokenizer.decode(ids[:2]) == "a\ufffd"
    # The name of a byte, written out, is not that byte.
    assert 3 + 0x0A not in tokenizer.encode("<0x0A>")


# Bad metadata.


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pre": "klingon"}, ["'klingon'", "smollm", "llama-bpe", "qwen2"]),
        ({"model": "t5"}, ["tokenizer.ggml.model", "'t5'"]),
        ({"model": None}, ["tokenizer.ggml.model", "without it"]),
        ({"tokens": None}, ["tokenizer.ggml.tokens", "without it"]),
        ({"tokens": []}, ["tokenizer.ggml.tokens"]),
        ({"tokens": [1, 2]}, ["tokenizer.ggml.tokens", "str"]),
        ({"tokens": ["a", "b", "a"]}, ["once", "2"]),
        ({"merges": None}, ["tokenizer.ggml.merges", "without it"]),
        ({"merges": ["h e", "hello"]}, ["merge", "'hello'"]),
        ({"merges": ["h zz"]}, ["merge", "'h zz'"]),
        ({"token_type": [1]}, ["tokenizer.ggml.token_type", "267", "1"]),
        ({"bos_token_id": 267}, ["bos_token_id", "267"]),
        ({"bos_token_id": "<s>"}, ["bos_token_id", "int"]),
        ({"bos_token_id": None, "add_bos_token": True}, ["add_bos", "None"]),
        ({"add_bos_token": 1}, ["add_bos_token", "bool"]),
    ],
)
def test_bad_metadata_is_named(changes, words):
    with pytest.raises(ValueError) as caught:
        build_tokenizer(byte_level(**changes))
    for word in words:
        assert word in str(caught.value)


def test_scores_must_be_there():
    with pytest.raises(ValueError, match=r"tokenizer\.ggml\.scores.*without it"):
        build_tokenizer(sentence_piece(scores=None))


def test_named_tokens_and_templates_of_a_file():
    values = byte_level(padding_token_id=265, seperator_token_id=266)
    key = "tokenizer.chat_template"
    values |= {key: "{{ pad_token }}{{ sep_token }}", f"{key}.tool_use": "{{ tools }}"}
    tokenizer = build_tokenizer(values)
    assert tokenizer.apply_chat_template([]) == "<|im_end|><think>"
    assert tokenizer.apply_chat_template([], tools=[]) == "[]"


def test_a_model_may_stop_at_an_id_that_no_token_has():
    values = byte_level(eos_token_id=271)
    assert build_tokenizer(values, vocabulary_size=272).stop_token_ids[0] == 271
    with pytest.raises(ValueError, match="one of 271 tokens. Received: 271"):
        build_tokenizer(values, vocabulary_size=271)
