"""The platform that a program will run on, and what suits it."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras


@dataclass(frozen=True)
class Platform:
    """The properties of a platform that the package's decisions depend on.

    Attributes:
        kernel: Which kernel of the package attends, `"cpu"` or `"gpu"`; `None` where
            XLA or another backend attends alone.
        calls_native: Whether programs can call the package's C++: XLA can't cut a call
            into parts for several devices.
        multiplies_narrow: Whether products of bfloat16 and float16 are as fast as those
            of float32. On a CPU they are several times slower.
        stores_bits: Whether narrow floats are stored as whole numbers of their bits, as
            XLA widens all of an array of them on a CPU to write or read a part.
        fuses_float16: Whether the backend's fused attention multiplies float16. JAX's
            asks for products that only GPUs have.
        doubles_row_of_slots, doubles_row_of_weights: Whether one row is multiplied with
            slots, or with weights, as two that are alike. For one row XLA doesn't use a
            TPU's matrix units, and multiplies with weights number by number on a GPU.
        scatters: Whether a scatter writes rows in place: under JAX, but on a TPU.
        loops_writes: Whether a loop writes rows in place where a scatter copies.
        has_float64: Whether the backend has float64; in JAX `jax_enable_x64` has to be
            set.
    """

    kernel: str | None = None
    calls_native: bool = False
    multiplies_narrow: bool = False
    stores_bits: bool = False
    fuses_float16: bool = True
    doubles_row_of_slots: bool = False
    doubles_row_of_weights: bool = False
    scatters: bool = False
    loops_writes: bool = False
    has_float64: bool = True


def current_platform() -> Platform:
    """The `Platform` that programs are traced for or run on now."""
    if keras.backend.backend() != "jax":
        return Platform()
    import jax

    platform, triton = jax.default_backend(), has_triton()
    on_tpu = platform == "tpu"
    calls_native = platform == "cpu" and jax.device_count() == 1
    return Platform(
        kernel="gpu" if triton else "cpu" if calls_native else None,
        calls_native=calls_native,
        multiplies_narrow=platform != "cpu",
        stores_bits=platform == "cpu",
        fuses_float16=platform == "gpu",
        doubles_row_of_slots=on_tpu,
        doubles_row_of_weights=on_tpu or triton,
        scatters=not on_tpu,
        loops_writes=on_tpu,
        has_float64=jax.config.jax_enable_x64,
    )


def is_accelerator() -> bool:
    """Whether JAX is the backend and runs programs on something other than a CPU."""
    if keras.backend.backend() != "jax":
        return False
    import jax

    return jax.default_backend() != "cpu"


def is_jax_on_cpu() -> bool:
    """Whether JAX is the backend and runs programs on a CPU."""
    return keras.backend.backend() == "jax" and not is_accelerator()


def has_triton() -> bool:
    """Whether JAX is the backend and compiles Triton's kernels for what it runs on.

    That is a single NVIDIA GPU, Ampere (A100) or later. In a JAX without Triton, which
    is announced, XLA attends.
    """
    if keras.backend.backend() != "jax" or keras.distribution.distribution():
        return False
    import jax

    if jax.default_backend() != "gpu":
        return False
    device = jax.devices()[0]
    if "cuda" not in device.client.platform_version:
        return False
    is_there = importlib.util.find_spec("jax.experimental.pallas.triton")
    return float(device.compute_capability) >= 8 and is_there is not None


def cpu_features() -> frozenset[str]:
    """The instructions that the processor has, as far as the system names them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return frozenset()
    features = (line for line in lines if line.startswith(("flags", "Features")))
    return frozenset(next(features, "").partition(":")[2].split())


def compiler_options() -> dict[str, Any] | None:
    """XLA's options for programs that decode, for `jax.jit`.

    On a CPU a product of one row is a loop in vectors of 256 bits unless XLA is told
    otherwise. In vectors of 512 bits, on processors that have them, it reads weights of
    a few megabytes at the memory's speed, not at four fifths of it.

    Returns:
        A dictionary, or `None`.
    """
    if is_jax_on_cpu() and "avx512f" in cpu_features():
        return {"xla_cpu_prefer_vector_width": 512}
    return None


def preferred_dtype() -> str:
    """The default dtype policy of a published model that is decoded.

    An accelerator computes in bfloat16 at least as fast as it reads, so that half the
    bytes take half the time. XLA's products of bfloat16 on a CPU are several times
    slower than those of float32.

    Returns:
        `"bfloat16"` on an accelerator under JAX; else Keras' own policy,
        also where that was set to something other than float32.
    """
    policy = keras.config.dtype_policy().name
    return "bfloat16" if policy == "float32" and is_accelerator() else policy
