"""Folders that transformers writes: each family against transformers itself."""

import json
import shutil

import keras
import numpy as np
import pytest
import safetensors
from family_cases import collect

from keras_kvcache import DecoderLM, cli
from keras_kvcache.loaders import hugging_face_files, read_hugging_face

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors.torch")

CASES = collect("TRANSFORMERS")
# Of these the logits are compared, no tokens: they differ from another in a detail.
DETAILS = collect("DETAILS")
IDS = np.random.default_rng(11).integers(1, 101, (3, 29))
PROMPT = IDS[0, :5].tolist()


def make_model(case):
    """A transformers model with random weights, large enough for varied answers."""
    family, options = CASES[case]
    names = {"GPT2": "GPT2LMHeadModel"}
    config_class = {"Gemma3": "Gemma3TextConfig"}.get(family, f"{family}Config")
    config = getattr(transformers, config_class)(**options)
    # The only ones of their implementations that have soft caps and any width.
    config._attn_implementation = config._experts_implementation = "eager"
    model_class = getattr(transformers, names.get(family, f"{family}ForCausalLM"))
    model = model_class(config).eval()
    rng = np.random.default_rng(7)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = rng.normal(size=tuple(weight.shape), scale=0.2)
            # Scaled up and tied, larger ones would only ever repeat a token.
            is_small = "Gemma" in family and "embed" in name
            noise = torch.from_numpy(0.1 * noise if is_small else noise)
            # Scales begin at 1. Matrices begin anew in each run: put others there.
            weight.copy_(noise + weight if weight.ndim == 1 else noise)
    return model


def save(model, folder, **options):
    model.save_pretrained(folder, **options)
    return folder


def logits_of(model, ids):
    with torch.no_grad():
        return model(torch.from_numpy(np.asarray(ids))).logits.numpy()


def assert_greedy(model, answer, begin):
    """Every token from `begin` on is the likeliest one after those before it."""
    likeliest = logits_of(model, [answer])[0].argmax(-1)
    assert answer[begin:] == likeliest[begin - 1 : -1].tolist()
    assert len(set(answer[begin:])) > 2, "the model says too little to compare"


def assert_same_logits(lm, model):
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(lm(IDS)), logits_of(model, IDS), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("case", CASES)
def test_a_family_gives_the_logits_and_tokens_of_transformers(case, tmp_path):
    model = make_model(case)
    lm = DecoderLM.from_preset(save(model, tmp_path), dtype="float32")
    assert_same_logits(lm, model)
    if case in DETAILS:
        return
    answer = lm.generate(PROMPT, max_new_tokens=24)
    assert len(answer) == 29
    assert_greedy(model, answer, 5)


@pytest.mark.jax_only
@pytest.mark.parametrize(
    "platform, policy, expected",
    [
        ("cpu", "float32", "float32"),
        ("tpu", "float32", "bfloat16"),
        ("tpu", "float16", "float16"),
        ("tpu", "mixed_bfloat16", "mixed_bfloat16"),
    ],
)
def test_the_dtype_suits_the_platform(
    platform, policy, expected, tmp_path, monkeypatch
):
    """Unless Keras was told of another, whatever the file's is."""
    save(make_model("llama"), tmp_path)
    monkeypatch.setattr("jax.default_backend", lambda: platform)
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        lm = DecoderLM.from_preset(tmp_path, load_weights=False)
    finally:
        keras.config.set_dtype_policy(before)
    assert lm.dtype_policy.name == expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_shards_of_half_precision(dtype, tmp_path):
    model = make_model("llama").to(getattr(torch, dtype))
    save(model, tmp_path, max_shard_size="40kB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    lm = DecoderLM.from_preset(tmp_path, dtype="float32")
    model = type(model).from_pretrained(tmp_path, dtype=torch.float32)
    assert_same_logits(lm, model)


def rewrite(folder, change):
    """Changes the tensors of a folder's one file."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_names_that_older_versions_and_bare_models_have(tmp_path):
    model = make_model("gpt2")
    save(model.transformer, tmp_path)  # without "transformer." before each name

    def add_tables(tensors):
        tensors["h.0.attn.bias"] = np.ones((1, 1, 113, 113), "float32")
        tensors["h.0.attn.masked_bias"] = np.ones((1,), "float32")

    rewrite(tmp_path, add_tables)
    assert_same_logits(DecoderLM.from_preset(tmp_path, dtype="float32"), model)


def test_experts_in_one_tensor(tmp_path):
    model = make_model("mixtral")
    save(model, tmp_path)

    def join(tensors):
        for name in [name for name in tensors if "block_sparse_moe" in name]:
            del tensors[name]
        for name, value in model.state_dict().items():
            if ".mlp." in name:
                tensors[name] = value.numpy()

    rewrite(tmp_path, join)
    assert_same_logits(DecoderLM.from_preset(tmp_path, dtype="float32"), model)


def test_a_tied_head_may_be_stored_but_not_differ(tmp_path):
    model = make_model("qwen2_by_layer")
    save(model, tmp_path)

    def store_head(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    rewrite(tmp_path, store_head)
    assert_same_logits(DecoderLM.from_preset(tmp_path, dtype="float32"), model)

    def change_head(tensors):
        tensors["lm_head.weight"][5, 7] += 1

    rewrite(tmp_path, change_head)
    with pytest.raises(ValueError, match="`tie_word_embeddings`.*lm_head.weight"):
        DecoderLM.from_preset(tmp_path)


@pytest.mark.parametrize("family", ["qwen2_by_layer", "gpt2", "gemma2"])
def test_a_tied_table_may_be_stored_as_the_head(family, tmp_path):
    model = make_model(family)
    save(model, tmp_path)
    safetensors.torch.save_model(model, str(tmp_path / "model.safetensors"))
    with safetensors.safe_open(tmp_path / "model.safetensors", "np") as file:
        names = set(file.keys())
    assert "lm_head.weight" in names
    assert not any("embed_tokens" in name or "wte" in name for name in names)
    assert_same_logits(DecoderLM.from_preset(tmp_path, dtype="float32"), model)

    rewrite(tmp_path, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ValueError, match="hasn't: .*(embed_tokens|wte).weight"):
        DecoderLM.from_preset(tmp_path)


def test_an_untied_head_is_no_table(llama):
    config = json.loads((llama / "config.json").read_text())
    assert not config["tie_word_embeddings"]
    rewrite(llama, lambda tensors: tensors.pop("model.embed_tokens.weight"))
    with pytest.raises(ValueError, match="hasn't: model.embed_tokens.weight"):
        DecoderLM.from_preset(llama)


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    return save(make_model("llama"), tmp_path_factory.mktemp("llama"))


@pytest.fixture
def llama(llama_folder, tmp_path):
    """A folder to spoil."""
    return shutil.copytree(llama_folder, tmp_path / "llama")


Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(Q_PROJ), f"must have these tensors, but hasn't: {Q_PROJ}"),
        (
            lambda t: t.update({"model.layers.1.self_attn.q_proj.bias": t[Q_PROJ]}),
            "no place for: model.layers.1.self_attn.q_proj.bias",
        ),
        (
            lambda t: t.update({Q_PROJ: t[Q_PROJ][:-1]}),
            r"q_proj.weight' must have shape \(84, 84\). Received: \(83, 84\)",
        ),
        (
            lambda t: t.update({Q_PROJ: t[Q_PROJ].astype("int8")}),
            "must be stored as one of F32, BF16, F16. Received: I8",
        ),
    ],
)
def test_other_tensors_are_refused(llama, change, message):
    rewrite(llama, change)
    with pytest.raises(ValueError, match=f"(?s)llama can't be loaded: .*{message}"):
        DecoderLM.from_preset(llama)


@pytest.mark.parametrize("kept", [0, 5, 1000, -8])
def test_a_file_cut_short_is_refused(llama, kept):
    path = llama / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="model.safetensors is damaged or cut short"):
        DecoderLM.from_preset(llama)


def test_a_missing_shard_is_refused(tmp_path):
    save(make_model("llama"), tmp_path, max_shard_size="40kB")
    index = tmp_path / "model.safetensors.index.json"
    first, second = sorted(tmp_path.glob("*.safetensors"))[:2]
    whole, text = first.read_bytes(), index.read_text()
    first.write_bytes(second.read_bytes())
    with pytest.raises(ValueError, match="must be in one file only"):
        DecoderLM.from_preset(tmp_path)
    first.unlink()
    with pytest.raises(FileNotFoundError, match=first.name):
        DecoderLM.from_preset(tmp_path)
    first.write_bytes(whole)
    places = json.loads(text)["weight_map"]
    for changed, message in (
        ({**places, "more": first.name}, "must hold the tensor 'more'"),
        ({"more": "../x.safetensors"}, "its own folder. Received: '../x.safetensors'"),
        ({"more": 5}, "must have a `weight_map`"),
    ):
        index.write_text(json.dumps({"weight_map": changed}))
        with pytest.raises(ValueError, match=message):
            DecoderLM.from_preset(tmp_path)
    index.write_text("{")
    with pytest.raises(ValueError, match="index.json must be JSON"):
        DecoderLM.from_preset(tmp_path)


def test_a_pickle_is_not_read(llama):
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    with pytest.raises(
        FileNotFoundError, match="has neither. It has pytorch_.*: a pickle"
    ):
        DecoderLM.from_preset(llama)
    (llama / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match="has neither$"):
        DecoderLM.from_preset(llama)


def test_a_file_that_changes_while_it_is_read(llama):
    weights = read_hugging_face(llama).weights
    (llama / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="damaged"):
        weights["token_embedding/embeddings"]()
    (llama / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="has changed since it was opened"):
        weights["token_embedding/embeddings"]()


def test_weights_wait_to_be_asked_for(llama, monkeypatch):
    files, read = hugging_face_files.TensorFiles, []
    original = files.read
    monkeypatch.setattr(
        files, "read", lambda self, *a: read.append(a[0]) or original(self, *a)
    )
    checkpoint = read_hugging_face(llama)
    assert not read and checkpoint.tokenizer is None
    kernel = checkpoint.weights["block_1/attention/query/kernel"]()
    assert kernel.dtype == "float32" and kernel.shape == (84, 6, 14)
    assert read == [Q_PROJ]


def test_a_subclass_and_other_arguments(llama):
    class Own(DecoderLM):
        pass

    lm = Own.from_preset(llama, max_sequence_length=37, name="own", tokenizer="mine")
    assert type(lm) is Own
    assert (lm.max_sequence_length, lm.name, lm.tokenizer) == (37, "own", "mine")
    with pytest.raises(ValueError, match="block_2"):
        DecoderLM.from_preset(llama, num_layers=3)


def test_info_of_a_folder_needs_no_weights(llama, capsys):
    (llama / "model.safetensors").unlink()
    assert cli.main(["info", str(llama), "--length", "37"]) == 0
    assert "key/value heads K   2" in capsys.readouterr().out
    assert cli.main(["generate", "x", "--model", str(llama)]) == 1
    assert "must have a model.safetensors" in capsys.readouterr().err


def test_goes_on_as_a_preset_of_our_own(llama):
    lm = DecoderLM.from_preset(llama, dtype="float32")
    lm.save_to_preset(llama)  # over the one it came from
    copy = DecoderLM.from_preset(llama)
    logits = [keras.ops.convert_to_numpy(model(IDS)) for model in (lm, copy)]
    np.testing.assert_array_equal(*logits)
    assert copy.rope_frequency_factors == lm.rope_frequency_factors
