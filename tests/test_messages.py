"""Messages go through the chat template, and the answer alone comes back."""

import functools

import pytest
from conftest import make_lm
from vocabularies import EOS, byte_level

from keras_kvcache.loaders.gguf_tokenizer import build_tokenizer

TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}: {{ m.content }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant: {% endif %}"
)
HELLO = [{"role": "user", "content": "hello w"}]
LONGER = [
    {"role": "system", "content": "12"},
    {"role": "user", "content": "1234 hello"},
    {"role": "assistant", "content": "ll"},
    {"role": "user", "content": "he"},
]


@functools.cache
def chatting_lm():
    tokenizer = build_tokenizer(byte_level(chat_template=None))
    tokenizer.chat_template = TEMPLATE
    return make_lm(vocabulary_size=269, num_layers=1, tokenizer=tokenizer)


def written(messages):
    """What the template is to make of messages, by hand."""
    turns = "".join(f"<|start|>{m['role']}: {m['content']}<|im_end|>" for m in messages)
    return turns + "<|start|>assistant: "


OPTIONS = dict(max_new_tokens=11, stop_token_ids=None)


@pytest.mark.parametrize("messages", [HELLO, tuple(LONGER)])
def test_messages_are_answered_by_the_new_text_alone(messages):
    lm = chatting_lm()
    whole = lm.generate(written(messages), **OPTIONS)
    assert whole.startswith(written(messages)) and whole != written(messages)
    answer = whole[len(written(messages)) :]
    assert lm.generate(messages, **OPTIONS) == answer
    assert lm.generate(messages, strip_prompt=True, **OPTIONS) == answer
    assert "".join(lm.stream(messages, **OPTIONS)) == answer


def test_conversations_of_any_lengths_run_together():
    lm = chatting_lm()
    alone = [lm.generate(messages, **OPTIONS) for messages in (HELLO, LONGER)]
    assert len(set(alone)) == 2
    assert lm.generate([HELLO, LONGER], **OPTIONS) == alone
    assert lm.generate([LONGER], **OPTIONS) == alone[1:]
    rows = ["", ""]
    for pieces in lm.stream([HELLO, LONGER], **OPTIONS):
        rows = [row + piece for row, piece in zip(rows, pieces, strict=True)]
    assert rows == alone


def test_an_answer_ends_where_the_tokenizer_says():
    lm = chatting_lm()
    assert EOS in lm.tokenizer.stop_token_ids
    stream = lm.stream(HELLO, **OPTIONS)
    "".join(stream)
    (ids,) = stream.token_ids
    lm.tokenizer.stop_token_ids, kept = (ids[4],), lm.tokenizer.stop_token_ids
    try:
        stopped = lm.stream(HELLO, max_new_tokens=11)
        "".join(stopped)
    finally:
        lm.tokenizer.stop_token_ids = kept
    assert stopped.token_ids == [ids[: ids.index(ids[4]) + 1]]


@pytest.mark.parametrize(
    "inputs, error, message",
    [
        ([HELLO, "hello"], TypeError, "all strings or all rows.*all lists of messages"),
        ([HELLO, [1, 2]], TypeError, "all strings or all rows.*all lists of messages"),
        ([HELLO, []], TypeError, "all strings or all rows.*all lists of messages"),
        (HELLO[0], ValueError, "in a list, even if there is but one"),
        ([{"content": "he"}], TypeError, "`messages`"),
    ],
)
def test_what_are_no_messages_is_refused_by_name(inputs, error, message):
    for method in (chatting_lm().generate, chatting_lm().stream):
        with pytest.raises(error, match=message):
            method(inputs, **OPTIONS)


def test_messages_need_a_chat_template():
    rule = "messages only if the model's tokenizer has a `chat_template`"
    lm = make_lm(vocabulary_size=269, num_layers=1)
    with pytest.raises(ValueError, match=f"{rule}.*no tokenizer"):
        lm.generate(HELLO, **OPTIONS)
    lm = make_lm(
        vocabulary_size=269, num_layers=1, tokenizer=build_tokenizer(byte_level())
    )
    with pytest.raises(ValueError, match=f"{rule}.*a tokenizer without one"):
        lm.generate([HELLO, LONGER], **OPTIONS)
