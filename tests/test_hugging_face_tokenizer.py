"""Tokenizers of Hugging Face folders."""

import json

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors
from vocabularies import MERGES, alphabet

from keras_kvcache.loaders import read_hugging_face
from keras_kvcache.loaders.hugging_face_tokenizer import read_tokenizer
from keras_kvcache.tokenizers import Tokenizer

SPECIAL = ["<|start|>", "<|im_end|>", "<|eot|>"]
START, END, TURN = range(264, 267)
TEXTS = ["", "hello world 1234", "<|start|>hello", "a<|im_end|>\n b é ✓"]


def make_backend(before=None, after=None):
    tokens = alphabet() + [merge.replace(" ", "") for merge in MERGES]
    ids = {token: index for index, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(
        models.BPE(ids, [tuple(merge.split(" ")) for merge in MERGES])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    if before or after:
        template = " ".join(filter(None, (before, "$A", after)))
        used = [(t, backend.token_to_id(t)) for t in (before, after) if t]
        backend.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=used
        )
    return backend


@pytest.fixture
def write(tmp_path):
    """Writes a tokenizer's files; `config` becomes `tokenizer_config.json`."""

    def write(backend=None, config=None, generation=None, **files):
        (backend or make_backend()).save(str(tmp_path / "tokenizer.json"))
        for name, values in (
            ("tokenizer_config", config),
            ("generation_config", generation),
            *files.items(),
        ):
            if values is not None:
                (tmp_path / f"{name}.json").write_text(json.dumps(values))
        return tmp_path

    return write


NAMED = dict(bos_token="<|start|>", eos_token="<|im_end|>")


@pytest.mark.parametrize(
    "before, after, config, added",
    [
        (None, None, NAMED, ([], [])),
        ("<|start|>", None, NAMED, ([START], [])),
        ("<|start|>", "<|im_end|>", NAMED, ([START], [END])),
        ("<|start|>", None, dict(bos_token={"content": "<|start|>"}), ([START], [])),
        ("<|start|>", "<|im_end|>", {}, ([START], [END])),
    ],
)
def test_what_is_added_to_a_text(write, before, after, config, added):
    folder = write(make_backend(before, after), config)
    tokenizer = read_tokenizer(folder, {})
    bare = make_backend()
    for text in TEXTS:
        ids = bare.encode(text).ids
        begin = [] if ids[:1] == added[0] else added[0]
        assert tokenizer.encode(text) == begin + ids + added[1]
        assert tokenizer.decode(ids) == bare.decode(ids)


@pytest.mark.parametrize("before", [None, "<|start|>"])
@pytest.mark.parametrize("add_bos", [None, True, False])
def test_encodes_as_transformers_does(write, before, add_bos):
    transformers = pytest.importorskip("transformers")
    config = dict(NAMED, tokenizer_class="PreTrainedTokenizerFast")
    if add_bos is not None:
        config["add_bos_token"] = add_bos
    folder = write(make_backend(before), config)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = read_tokenizer(folder, {})
    for text in ("", "hello world 1234", "a<|im_end|>\n b é ✓"):
        assert ours.encode(text) == theirs(text)["input_ids"]


def test_ids_that_only_the_model_names(write):
    model = dict(bos_token_id=START, eos_token_id=[END, TURN])
    tokenizer = read_tokenizer(write(), model)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (START, END)
    assert tokenizer.stop_token_ids == (END, TURN)
    absent = read_tokenizer(write(config=dict(bos_token=None)), model)
    assert absent.bos_token_id is None
    # GPT-2's ids, in a model of a smaller vocabulary.
    beyond = read_tokenizer(
        write(config={}), dict(bos_token_id=50256, eos_token_id=50256)
    )
    assert (beyond.bos_token_id, beyond.stop_token_ids) == (None, ())
    older = read_tokenizer(write(config={}, special_tokens_map=NAMED), {})
    assert (older.bos_token_id, older.eos_token_id) == (START, END)


@pytest.mark.parametrize(
    "generation, stops",
    [
        (dict(eos_token_id=TURN), (TURN, END)),
        (dict(eos_token_id=[TURN, END, TURN]), (TURN, END)),
        (dict(eos_token_id=None), (END,)),
        ({}, (START, END)),
    ],
)
def test_what_generation_stops_at(write, generation, stops):
    folder = write(None, NAMED, generation)
    assert read_tokenizer(folder, dict(eos_token_id=START)).stop_token_ids == stops


@pytest.mark.parametrize(
    "template, expected",
    [
        ("{{ bos_token }}x", "<|start|>x"),
        ([dict(name="tools", template="x")], "x"),
        ([dict(name="t", template="x"), dict(name="default", template="y")], "y"),
    ],
)
def test_chat_templates(write, template, expected):
    folder = write(None, dict(NAMED, chat_template=template))
    assert read_tokenizer(folder, {}).apply_chat_template([]) == expected
    (folder / "chat_template.jinja").write_text("in a file")
    assert read_tokenizer(folder, {}).apply_chat_template([]) == "in a file"


def test_several_templates(write):
    named = [dict(name=n, template=n) for n in ("default", "tool_use", "rag")]
    tokenizer = read_tokenizer(write(None, dict(NAMED, chat_template=named)), {})
    assert tokenizer.apply_chat_template([]) == "default"
    assert tokenizer.apply_chat_template([], tools=[]) == "tool_use"
    assert tokenizer.apply_chat_template([], chat_template="rag") == "rag"
    assert tokenizer.apply_chat_template([], chat_template="x{{ y }}", y=1) == "x1"
    folder = write(None, dict(NAMED, chat_template=[named[2], named[1]]))
    with pytest.raises(ValueError, match="none is 'default': 'rag, tool_use'"):
        read_tokenizer(folder, {}).apply_chat_template([])
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("filed")
    (folder / "chat_template.jinja").write_text("first")
    filed = read_tokenizer(folder, {})
    assert filed.apply_chat_template([]) == "first"
    assert filed.apply_chat_template([], tools=[]) == "filed"


def test_conversations_as_transformers_has_them(write):
    transformers = pytest.importorskip("transformers")
    template = (
        "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ m.x }}{% endfor %}"
        "{{ pad_token }}{{ unk_token }}{{ sep_token }}{{ image_token }}{{ style }}"
    )
    config = dict(
        NAMED,
        pad_token="<|eot|>",
        sep_token={"content": "<|im_end|>", "__type": "AddedToken"},
        image_token="<|start|>",
        chat_template=template,
        tokenizer_class="PreTrainedTokenizerFast",
    )
    folder = write(None, config)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = read_tokenizer(folder, {})
    ours.save(folder / "saved")
    for tokenizer in (ours, Tokenizer.load(folder / "saved")):
        for message in ({"role": "user", "content": "a", "x": None}, CALL):
            # transformers writes "None" before its 5.23, and drops it since then.
            said = [{key: said for key, said in message.items() if said is not None}]
            arguments = dict(tokenize=False, style="plain", pad_token="<|start|>")
            for options in (arguments, dict(tokenize=False)):
                text = tokenizer.apply_chat_template([message], **options)
                assert text == theirs.apply_chat_template(said, **options)
            ids = theirs.apply_chat_template(said, return_dict=False)
            assert tokenizer.apply_chat_template([message], tokenize=True) == ids
    with pytest.raises(TypeError, match="Received: return_tensors"):
        ours.apply_chat_template([CALL], return_tensors="np")


CALL = {"role": "assistant", "content": None, "tool_calls": [{"type": "function"}]}


@pytest.mark.parametrize("end_of_text, end", [(256, 300), (260, 300), (311, 257)])
def test_vocabularies_with_gaps(write, end_of_text, end):
    ids = {token: index for index, token in enumerate(alphabet())}
    ids |= {"<|endoftext|>": end_of_text, "<|end|>": end}
    backend = tokenizers.Tokenizer(models.BPE(ids, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>", "<|end|>"])
    generation = dict(eos_token_id=[end, end_of_text, 317, 331])
    folder = write(backend, dict(eos_token="<|endoftext|>"), generation)
    tokenizer = read_tokenizer(folder, {"vocab_size": 331})
    # The model may sample 317, which no token has; it has no 331.
    assert tokenizer.stop_token_ids == (end, end_of_text, 317)
    assert tokenizer.eos_token_id == end_of_text
    assert tokenizer.vocabulary_size == max(end_of_text, end) + 1
    assert tokenizer.encode("a<|end|>") == [97, end]
    assert tokenizer.decode([97, end, 98, 299, 317]) == "ab"
    tokenizer.save(folder / "saved")
    loaded = Tokenizer.load(folder / "saved")
    assert loaded.stop_token_ids == tokenizer.stop_token_ids


def test_long_texts_are_not_cut_nor_short_ones_padded(write):
    backend = make_backend()
    backend.enable_truncation(3)
    backend.enable_padding(length=3)
    tokenizer = read_tokenizer(write(backend), {})
    assert len(tokenizer.encode("a" * 50)) == 50
    assert len(tokenizer.encode("a")) == 1


@pytest.mark.parametrize(
    "before, config, generation, message",
    [
        (None, dict(bos_token="<|no|>"), None, "`bos_token`.*'<|no|>'"),
        (None, dict(eos_token=5), None, "`eos_token`.*5"),
        ("<|eot|>", NAMED, None, f"the `bos_token`, id {START}, .*adds .{TURN}"),
        (None, {}, dict(eos_token_id="x"), "`eos_token_id` must be an id.*'x'"),
        (None, dict(chat_template=5), None, "`chat_template`.*int"),
    ],
)
def test_what_makes_no_sense_is_refused(write, before, config, generation, message):
    folder = write(make_backend(before), config, generation)
    with pytest.raises(ValueError, match=message):
        read_tokenizer(folder, {})


@pytest.mark.parametrize(
    "name", ["tokenizer", "tokenizer_config", "generation_config", "special_tokens_map"]
)
def test_damaged_files_are_refused(write, name):
    folder = write()
    config = dict(
        model_type="gpt2", vocab_size=9, n_embd=4, n_head=2, n_layer=1, n_positions=5
    )
    (folder / "config.json").write_text(json.dumps(config))
    assert read_hugging_face(folder, load_weights=False).tokenizer.encode("a") == [97]
    (folder / f"{name}.json").write_text('{"a": ')
    with pytest.raises(ValueError, match=f"can't be loaded: .*{name}.json"):
        read_hugging_face(folder, load_weights=False)
    assert read_hugging_face(folder, False, load_tokenizer=False).tokenizer is None


@pytest.mark.parametrize("names", [["tokenizer.model"], ["vocab.json", "merges.txt"]])
def test_older_files_are_named_where_text_is_asked_for(tmp_path, names):
    assert read_tokenizer(tmp_path, {}) is None
    for name in names:
        (tmp_path / name).write_bytes(b"")
    model = dict(vocab_size=331, eos_token_id=[317, 331])
    tokenizer = read_tokenizer(tmp_path, model)
    assert tokenizer.stop_token_ids == (317,)
    for ask in (
        lambda: tokenizer.encode("a"),
        lambda: tokenizer.decode([1]),
        lambda: tokenizer.chat_template,
    ):
        with pytest.raises(ValueError, match=f"tokenizer.json.*{', '.join(names)}"):
            ask()
