"""Small GGUF files to test with."""

import gguf
import numpy as np

TOKENS = ["<unk>", "<s>", "</s>"] + [chr(code) for code in range(97, 123)]
# A model whose sizes tell every axis from every other one; H must be even.
PRIMES = {"D": 13, "N": 6, "K": 3, "H": 10, "F": 17, "L": 2, "V": 29}
# Sizes that hold whole blocks of 32 along the axes that are quantized.
BLOCKS = {"D": 64, "N": 6, "K": 2, "H": 16, "F": 160, "L": 1, "V": 29}


def stored_shapes(D, N, K, H, F, L, V, tied=True):
    shapes = {"token_embd.weight": (V, D), "output_norm.weight": (D,)}
    if not tied:
        shapes["output.weight"] = (V, D)
    for i in range(L):
        shapes |= {
            f"blk.{i}.attn_norm.weight": (D,),
            f"blk.{i}.attn_q.weight": (N * H, D),
            f"blk.{i}.attn_k.weight": (K * H, D),
            f"blk.{i}.attn_v.weight": (K * H, D),
            f"blk.{i}.attn_output.weight": (D, N * H),
            f"blk.{i}.ffn_norm.weight": (D,),
            f"blk.{i}.ffn_gate.weight": (F, D),
            f"blk.{i}.ffn_up.weight": (F, D),
            f"blk.{i}.ffn_down.weight": (D, F),
        }
    return shapes


def metadata(D, N, K, H, F, L, V):
    return {
        "llama.block_count": L,
        "llama.context_length": 41,
        "llama.embedding_length": D,
        "llama.feed_forward_length": F,
        "llama.attention.head_count": N,
        "llama.attention.head_count_kv": K,
        "llama.attention.key_length": H,
        "llama.attention.value_length": H,
        "llama.rope.freq_base": 500.0,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.scores": [float(-i) for i in range(len(TOKENS))],
        "tokenizer.ggml.token_type": [2, 3, 3] + [1] * 26,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def write(path, values, tensors, architecture="llama"):
    """Writes a file; `tensors` holds arrays or (raw bytes, quantization)."""
    writer = gguf.GGUFWriter(path, architecture)
    add = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in values.items():
        add[type(value)](key, value)
    for name, tensor in tensors.items():
        raw, kind = tensor if isinstance(tensor, tuple) else (tensor, None)
        writer.add_tensor(name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_tensors(sizes, seed=0, **kwargs):
    rng = np.random.default_rng(seed)
    return {
        name: rng.standard_normal(shape).astype("float32")
        for name, shape in stored_shapes(**sizes, **kwargs).items()
    }


class SmallFile:
    """Writes the prime-sized model with changes; None removes a key or tensor."""

    def __init__(self, folder):
        self.path = folder / "small.gguf"

    def __call__(self, changes=(), tensor_changes=(), **kwargs):
        values = metadata(**PRIMES) | dict(changes)
        tensors = random_tensors(PRIMES) | dict(tensor_changes)
        return write(
            self.path,
            {key: value for key, value in values.items() if value is not None},
            {key: value for key, value in tensors.items() if value is not None},
            **kwargs,
        )
