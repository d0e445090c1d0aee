"""What several test modules use."""

import contextlib
import functools
import gc
import os
import tempfile
from types import SimpleNamespace

# Before any test module imports Keras, which would choose TensorFlow.
os.environ.setdefault("KERAS_BACKEND", "jax")

# Test modules and worker processes compile many programs alike: each is compiled once.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    programs = tempfile.TemporaryDirectory(prefix="compiled-for-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = programs.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

# PyTorch for CUDA imports it late, and once TensorFlow is there that kills the process.
with contextlib.suppress(ImportError):
    import triton as _  # noqa: F401

import jax
import keras
import pytest

from keras_kvcache import DecoderLM
from keras_kvcache.loaders import DownloadError, fetch
from keras_kvcache.runtime.platform import has_triton


def pytest_collection_modifyitems(items):
    """Skips what only compiled programs can show on the other backends."""
    if keras.backend.backend() == "jax":
        return
    skip = pytest.mark.skip(reason="about JAX programs")
    for item in items:
        if "jax_only" in item.keywords:
            item.add_marker(skip)


# What these compile runs for milliseconds, and what LLVM's passes save there they cost
# a hundred times. All that XLA does before them stays, and other modules, those about
# programs and real models among them, have all.
COMPILED_FAST = """config decoder_lm endless generate growth numbers own_models rows
    streams""".split()


@pytest.fixture(scope="module", autouse=True)
def compile_fast(request):
    """Leaves out XLA's passes that take long, for modules that run little."""
    name = request.module.__name__.rpartition(".")[2].removeprefix("test_")
    if keras.backend.backend() != "jax" or name not in COMPILED_FAST:
        yield
        return
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Drops a module's compiled programs: a process may hold only so many of them.

    XLA maps each into memory several times, and where Linux' `vm.max_map_count`
    (65,530) is reached, the next compilation ends in a segmentation fault.
    """
    yield
    if keras.backend.backend() == "jax":
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def without_compiler():
    """Leaves all to XLA, as where no C++ compiler is; called, it ends that."""
    with pytest.MonkeyPatch.context() as patch:

        def undo():
            patch.undo()
            jax.clear_caches()  # Attention that was traced stays as it was.

        jax.clear_caches()
        for user in ("runtime.channel", "attention.kernels.decode_attention"):
            patch.setattr(f"keras_kvcache.{user}.load_handler", lambda *_: None)
        yield undo
        undo()


@pytest.fixture
def fake_gpu(monkeypatch):
    """JAX says that it runs on this GPU of NVIDIA's, and what is traced is for it."""
    client = SimpleNamespace(platform_version="PJRT C API\ncuda 12090")
    device = SimpleNamespace(client=client, compute_capability="9.0")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda *names: [device])
    jax.clear_caches()
    yield device
    monkeypatch.undo()
    jax.clear_caches()


@pytest.fixture
def on_gpu(request):
    """What is traced is for a GPU of NVIDIA's: the one that is there, else a fake."""
    return None if has_triton() else request.getfixturevalue("fake_gpu")


@pytest.fixture
def on_tpu(monkeypatch):
    """JAX says that it runs on a TPU, and what is traced is for it."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    jax.clear_caches()
    yield
    monkeypatch.undo()
    jax.clear_caches()


@pytest.fixture(scope="session")
def smollm2_path():
    """The file of a real model, fetched on first use; needed where CI is set."""
    try:
        return fetch("smollm2_135m_instruct")
    except DownloadError as error:
        if "CI" in os.environ:
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def smollm2(smollm2_path):
    """A real model of 135 million parameters."""
    return DecoderLM.from_preset("smollm2_135m_instruct")


# TensorFlow's words where JAX writes in a newer format than it knows, for any model.
_TOO_NEW = "failed to deserialize portable artifact"


def skip_if_too_new(stderr):
    """Skips a test whose exported model this TensorFlow is too old to run."""
    if _TOO_NEW in stderr:
        pytest.skip("this TensorFlow is too old for what this JAX exports")


LLAMA_LIKE = dict(
    num_key_value_heads=2,
    hidden_dim=46,
    intermediate_dim=59,
    head_dim=14,
    tie_word_embeddings=False,
)
GPT2_LIKE = dict(
    hidden_dim=42,
    intermediate_dim=61,
    normalization="layer_norm",
    position_embedding="learned",
    activation="gelu_tanh",
    gated_feedforward=False,
    use_bias=True,
)
WINDOWED = dict(LLAMA_LIKE, sliding_window=11, tie_word_embeddings=True)
MODELS = {"llama": LLAMA_LIKE, "gpt2": GPT2_LIKE, "windowed": WINDOWED}


def make_lm(kind="llama", **options):
    """A small model whose random weights are large enough for varied answers."""
    keras.utils.set_random_seed(1)
    arguments = dict(
        vocabulary_size=101,
        num_layers=3,
        num_query_heads=6,
        max_sequence_length=613,
        kernel_initializer=keras.initializers.RandomNormal(stddev=0.4),
    )
    return DecoderLM(**{**arguments, **MODELS[kind], **options})


@functools.cache
def shared_lm(kind="llama"):
    """A small model for tests that leave it as it is, so that it compiles once."""
    return make_lm(kind)


@pytest.fixture(params=MODELS)
def lm(request):
    """A small model of each kind, shared."""
    return shared_lm(request.param)
