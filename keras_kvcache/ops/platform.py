"""What suits the platform that a program will run on."""

import keras


def is_accelerator():
    """Whether JAX is the backend and runs programs on something other than a CPU."""
    if keras.backend.backend() != "jax":
        return False
    import jax

    return jax.default_backend() != "cpu"


def is_jax_on_cpu():
    """Whether JAX is the backend and runs programs on a CPU."""
    return keras.backend.backend() == "jax" and not is_accelerator()


def is_tpu():
    """Whether JAX is the backend and runs programs on a TPU."""
    if keras.backend.backend() != "jax":
        return False
    import jax

    return jax.default_backend() == "tpu"


def preferred_dtype():
    """The dtype policy that a published model is decoded in unless told otherwise.

    An accelerator computes in bfloat16 at least as fast as it reads, so that half the
    bytes take half the time. XLA's products of bfloat16 on a CPU are several times
    slower than those of float32.

    Returns:
        `"bfloat16"` on an accelerator under JAX; else Keras' own policy, as ever if
        that was set to something other than float32.
    """
    policy = keras.config.dtype_policy().name
    return "bfloat16" if policy == "float32" and is_accelerator() else policy
