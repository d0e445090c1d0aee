"""What suits the platform that a program will run on."""

import keras


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
    if policy == "float32" and keras.backend.backend() == "jax":
        import jax

        return policy if jax.default_backend() == "cpu" else "bfloat16"
    return policy
