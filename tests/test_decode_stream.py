"""What is streamed, joined, is the text of the whole, however its tokens are parted."""

import functools
import os
import subprocess

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops
from llama_cpp_vocabularies import NAMES as NAMES_OF_LLAMA_CPP
from llama_cpp_vocabularies import fetch_vocabularies
from tokenizers import AddedToken, Regex, decoders, models
from vocabularies import alphabet, byte_level, sentence_piece

from keras_kvcache import DecoderLM
from keras_kvcache.loaders.gguf_header import read_header
from keras_kvcache.loaders.gguf_tokenizer import build_tokenizer
from keras_kvcache.tokenizers import Tokenizer
from keras_kvcache.tokenizers.detokenizer import Detokenizer, WindowedStream, new_text

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = ["hello", "world", "##ing", ".", "##.", "do", "not", "n't", ",", "#", "##", "é"]
PIECES = [
    "▁",
    "▁▁",
    "a",
    "▁a",
    "b",
    "▁b▁",
    "a▁▁b",
    "é",
    "▁日本",
    "<0x41",
    "\ufffd",
    " ",
]
ENDED = ["he", "llo</w>", "</w>", "</w></w>", "a</w>b", "<", "/w>", "</", "é"]
SPEECH = ["<pad>", "|", "h", "e", "l", "o", "'", "|'", "<pad>|", " n't", "."]
SPECIAL = ["</s>", "<|end|>"]
DEFINED = ["<think>", "<0x42>", "éé", " ▁"]

llama = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]


def metaspace(scheme):
    return decoders.Metaspace(prepend_scheme=scheme)


# Each kind of decoder that the library has, and how models put them together.
DECODERS = {
    "byte level": (alphabet() + ["ĠðŁ", "âĢ", "日", "é日"], decoders.ByteLevel()),
    "llama": (
        BYTES + PIECES,
        decoders.Sequence([*llama, decoders.Strip(content=" ", left=1)]),
    ),
    "gemma": (BYTES + PIECES, decoders.Sequence(llama)),
    "strip twice": (
        BYTES + PIECES,
        decoders.Sequence([*llama, decoders.Strip(content=" ", left=2)]),
    ),
    "strip each": (PIECES, decoders.Strip(content="▁", left=1, right=0)),
    "bytes alone": (BYTES + PIECES, decoders.ByteFallback()),
    "metaspace": (PIECES, metaspace("always")),
    "metaspace first": (PIECES, metaspace("first")),
    "metaspace never": (PIECES, metaspace("never")),
    "metaspace and bytes": (
        BYTES + PIECES,
        decoders.Sequence([decoders.ByteFallback(), metaspace("always")]),
    ),
    "word pieces": (WORDS, decoders.WordPiece()),
    "word pieces as they are": (WORDS, decoders.WordPiece(cleanup=False)),
    "word ends": (ENDED, decoders.BPEDecoder()),
    "speech": (SPEECH, decoders.CTC()),
    "regular expression": (PIECES, decoders.Replace(Regex("▁+"), "_")),
    "byte level, word ends": (
        alphabet() + ENDED,
        decoders.Sequence([decoders.ByteLevel(), decoders.Replace("</w>", " ")]),
    ),
    "fused, overlapping": (
        ["a", "b", "ab", "aa", "ba"],
        decoders.Sequence([decoders.Fuse(), decoders.Replace("aab", "-")]),
    ),
    "nested": (
        PIECES,
        decoders.Sequence([decoders.Sequence([llama[0]]), decoders.Fuse()]),
    ),
    "none": (WORDS, None),
}


def make_tokenizer(tokens, decoder, special=SPECIAL, defined=DEFINED):
    ids = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    backend = tokenizers.Tokenizer(models.WordLevel(ids, unk_token=next(iter(ids))))
    if decoder is not None:
        backend.decoder = decoder
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    backend.add_tokens(defined)
    return Tokenizer(backend)


@functools.cache
def tokenizer_of(name):
    if name in DECODERS:
        return make_tokenizer(*DECODERS[name])
    return build_tokenizer(GGUF[name])


GGUF = {
    "of a file, byte level": byte_level(),
    "of a file, pieces": sentence_piece(),
    "of a file, pieces without a space": sentence_piece(add_space_prefix=False),
}
NAMES = [*DECODERS, *GGUF]


def in_parts(stream, ids, cuts):
    """The text of a stream that is given `ids` in parts."""
    edges = [0, *sorted(cut for cut in cuts if cut <= len(ids)), len(ids)]
    parts = [ids[i:j] for i, j in zip(edges, edges[1:], strict=False)]
    return "".join(stream.push(part) for part in parts) + stream.flush()


def check(tokenizer, ids, cuts):
    """A stream in parts, behind every prompt that `ids` may begin with."""
    for skip in (True, False):
        whole = tokenizer.decode(ids, skip)
        assert in_parts(tokenizer.decode_stream(skip), ids, cuts) == whole
    whole = tokenizer.decode(ids)
    for split in range(len(ids) + 1):
        prompt, new = ids[:split], ids[split:]
        streamed = in_parts(Detokenizer(tokenizer, prompt), new, cuts)
        assert streamed == new_text(tokenizer, prompt, new), (prompt, new)
        shown = tokenizer.decode(prompt)
        if whole.startswith(shown):
            assert shown + streamed == whole, (prompt, new)


def random_ids(tokenizer, count, seed):
    """Ids that are likely to be bytes of the same character."""
    generator = np.random.default_rng(seed)
    size = tokenizer.vocabulary_size
    ids = generator.integers(0, size + 2, count)
    text = "a🎉é日本\ufffd ok"
    spelled = tokenizer.encode(text) or [0]
    at = generator.integers(0, count)
    keep = int(generator.integers(1, len(spelled) + 1))
    return [*ids[:at].tolist(), *spelled[:keep], *ids[at:].tolist()]


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_tokens_in_any_parts(name, data):
    tokenizer = tokenizer_of(name)
    token_ids = st.integers(0, tokenizer.vocabulary_size + 1)
    # Bytes beyond ASCII, which would seldom stand side by side.
    letters = [tokenizer._backend.token_to_id(token) for token in alphabet()[128:]]
    bytes_ = [tokenizer._backend.token_to_id(token) for token in BYTES[128:]]
    rare = [token for token in letters + bytes_ if token is not None]
    if rare:
        token_ids = token_ids | st.sampled_from(rare)
    ids = data.draw(st.lists(token_ids, max_size=12))
    cuts = data.draw(st.lists(st.integers(0, 12), max_size=5))
    check(tokenizer, ids, cuts)


TEXTS = [
    "🎉🎉🎉🎉 ok",
    "日本語 🎉 naïve",
    "a\ufffd\ufffd",
    "\ufffd🎉\ufffdb",
    " a  b ",
    "👩\u200d👩\u200d👧\ufe0f",
]


@pytest.mark.parametrize("name", ["byte level", "llama", "gemma", *GGUF])
@pytest.mark.parametrize("text", TEXTS)
def test_characters_that_are_spelled_in_bytes(name, text):
    """Every token on its own, behind each of them, and with one byte too many."""
    tokenizer = tokenizer_of(name)
    pieces = {token: index for token, index in tokenizer._backend.get_vocab().items()}
    spelling = alphabet() if "byte level" in name else BYTES
    ids = [pieces[spelling[byte]] for byte in text.encode()]
    assert tokenizer.decode(ids).lstrip() == text.lstrip()
    for row in (ids, [*ids, pieces[spelling[0xF0]]], [*ids, pieces[spelling[0xFF]]]):
        check(tokenizer, row, range(len(row)))


@pytest.mark.parametrize("name", ["byte level", "llama"])
def test_text_comes_as_soon_as_it_is_certain(name):
    tokenizer = tokenizer_of(name)
    stream = tokenizer.decode_stream()
    a, b = (tokenizer._backend.token_to_id(token) for token in "ab")
    spelling = alphabet() if name == "byte level" else BYTES
    party = [tokenizer._backend.token_to_id(spelling[i]) for i in "🎉".encode()]
    assert [stream.push([a]), stream.push([b])] == ["a", "b"]
    assert [stream.push([i]) for i in party[:3]] == ["", "", ""]
    # In the library's reading of byte tokens the next may still make them invalid.
    rest = {"byte level": ["🎉", "a"], "llama": ["", "🎉a"]}[name]
    assert [stream.push(party[3:]), stream.push([a])] == rest
    assert stream.flush() == ""


def test_a_special_token_within_a_character_is_skipped():
    tokenizer = tokenizer_of("llama")
    token = tokenizer._backend.token_to_id
    ids = [token(BYTES[i]) for i in "🎉".encode()]
    ids = [*ids[:2], token("</s>"), *ids[2:], token("</s>")]
    check(tokenizer, ids, range(len(ids)))
    assert tokenizer.decode(ids) == "🎉"


def test_a_prompt_that_ends_in_a_space_which_its_decoder_writes_before_words():
    tokenizer = tokenizer_of("word pieces")
    hello, world = (tokenizer._backend.token_to_id(t) for t in ("hello", "world"))
    for prompt, new in (("hello", " world"), ("hello ", "world"), ("x", " world")):
        assert new_text(tokenizer, [hello], [world], prompt) == new
        assert in_parts(Detokenizer(tokenizer, [hello], prompt), [world], []) == new


@pytest.mark.parametrize("is_foreign", [False, True])
@pytest.mark.parametrize(
    "prompt, answer",
    [("a", "🎉🎉🎉🎉 ok"), ("a 🎉🎉", "aok"), ("a\ufffd", "\ufffdb"), ("<s>", "a")],
)
def test_models_answer_in_the_text_of_the_whole(prompt, answer, is_foreign):
    tokenizer = tokenizer_of("of a file, pieces")
    # What the tokenizer puts before a text isn't before what continues one.
    new = tokenizer.encode("a" + answer)[1:] if answer != "a" else [260]
    table = np.array(new, "int32")
    lm = DecoderLM(
        vocabulary_size=tokenizer.vocabulary_size,
        num_layers=1,
        num_query_heads=2,
        hidden_dim=8,
        intermediate_dim=8,
        max_sequence_length=64,
        tokenizer=Foreign(tokenizer) if is_foreign else tokenizer,
    )

    def sampler(logits, seed):
        token = ops.take(ops.convert_to_tensor(table), ops.cast(seed[1], "int32"))
        return ops.broadcast_to(token, ops.shape(logits)[:1])

    options = dict(max_new_tokens=len(new), stop_token_ids=None, sampler=sampler)
    assert lm.generate(prompt, **options) == prompt + answer
    assert lm.generate(prompt, strip_prompt=True, **options) == answer
    assert "".join(lm.stream(prompt, **options)) == answer


class Foreign:
    """A tokenizer that only encodes and decodes, as users have them."""

    def __init__(self, tokenizer):
        self.longest = 0
        self._tokenizer = tokenizer

    def encode(self, text):
        return self._tokenizer.encode(text)

    def decode(self, ids):
        assert all(type(token) is int for token in ids)
        self.longest = max(self.longest, len(ids))
        return self._tokenizer.decode(ids)


def valid_rows(tokenizer, count):
    """Rows of real text, tokens that spell no character left out."""
    generator = np.random.default_rng(5)
    words = ["a", "b", " ", "🎉", "é", "日本", "hello", "world", "\n", "ab abc", "🎉🎉"]
    for _ in range(count):
        text = "".join(generator.choice(words, generator.integers(1, 90)))
        yield tokenizer.encode(text)


@pytest.mark.parametrize("name", ["byte level", *GGUF, "word pieces", "metaspace"])
def test_tokenizers_that_only_decode(name):
    """Their text is decoded in windows, which are exact for text that is valid."""
    tokenizer = tokenizer_of(name)
    foreign = Foreign(tokenizer)
    rows = list(valid_rows(tokenizer, 40))
    if name in ("word pieces", "metaspace"):
        generator = np.random.default_rng(7)
        rows = [generator.integers(0, 10, 200).tolist() for _ in range(20)]
    for ids in rows:
        assert in_parts(WindowedStream(foreign.decode), ids, range(999)) == (
            tokenizer.decode(ids)
        )
        for split in range(0, len(ids), 7):
            prompt, new = ids[:split], ids[split:]
            streamed = in_parts(Detokenizer(foreign, prompt), new, range(999))
            assert streamed == new_text(tokenizer, prompt, new), (prompt, new)


def test_a_window_does_not_grow_with_the_text():
    tokenizer = tokenizer_of("of a file, byte level")
    foreign = Foreign(tokenizer)
    stream = WindowedStream(foreign.decode)
    ids = tokenizer.encode("hello w 1234 🎉 " * 100)
    assert in_parts(stream, ids, range(len(ids))) == tokenizer.decode(ids)
    assert foreign.longest <= 2 * WindowedStream.LONGEST < len(ids)
    # Nor while nothing but bytes of no character comes.
    stream = WindowedStream(foreign.decode)
    pieces = [stream.push([0xFF]) for _ in range(1000)]
    assert foreign.longest <= 2 * WindowedStream.MOST_HELD
    assert "".join(pieces) + stream.flush() == "\ufffd" * 1000


def test_decoders_that_are_written_in_python():
    class Upper:
        def decode(self, tokens):
            return "".join(tokens).upper()

        def decode_chain(self, tokens):
            return [token.upper() for token in tokens]

    tokenizer = make_tokenizer(["a", "b", "c"], decoders.Decoder.custom(Upper()))
    assert tokenizer.decode_stream() is None
    assert in_parts(Detokenizer(tokenizer, [0]), [1, 2, 1], range(3)) == "BCB"


# llama.cpp's vocabularies.


@pytest.fixture(scope="module")
def llama_cpp_folder():
    try:
        return fetch_vocabularies()
    except subprocess.CalledProcessError as error:
        if "CI" in os.environ:
            raise
        pytest.skip(str(error))


def tokenizer_of_file(path):
    """As the loader builds it, or one that decodes alike where it refuses the kind."""
    metadata = read_header(path).metadata
    tokens = metadata["tokenizer.ggml.tokens"]
    kind = metadata["tokenizer.ggml.model"]
    if kind in ("gpt2", "llama"):
        try:
            return build_tokenizer(metadata)
        except ValueError as error:
            assert "the pre-tokenizer must be one of" in str(error)
            # How text is split matters to encoding alone.
            return build_tokenizer(metadata | {"tokenizer.ggml.pre": "gpt-2"})
    kinds = metadata["tokenizer.ggml.token_type"]
    special = [t for t, k in zip(tokens, kinds, strict=True) if k in (2, 3)]
    if kind == "bert":
        tokens = [t[1:] if t.startswith("▁") else f"##{t}" for t in tokens]
        return make_tokenizer(tokens, decoders.WordPiece(), special[:5], [])
    decoder = {"t5": metaspace("always"), "gemma4": decoders.Sequence(llama)}[kind]
    return make_tokenizer(tokens, decoder, special, [])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES_OF_LLAMA_CPP)
def test_the_vocabularies_of_llama_cpp(name, llama_cpp_folder):
    """Random tokens behind every prompt, for each vocabulary that llama.cpp tests."""
    tokenizer = tokenizer_of_file(llama_cpp_folder / f"{name}.gguf")
    for seed in range(200):
        ids = random_ids(tokenizer, 24, seed)
        generator = np.random.default_rng([7, seed])
        check(tokenizer, ids, generator.integers(0, len(ids), seed % 30))
