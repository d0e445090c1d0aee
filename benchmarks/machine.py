"""What is this machine: its device, its software, and how fast it reads and multiplies?

The two speeds bound those of all else: reading, by summing a large array, and
multiplying, by the product of two square matrices, in bfloat16 on an accelerator and in
float32 on a CPU.
"""

import subprocess
import sys

import harness

import keras_kvcache  # noqa: F401  # isort: skip  # First: it chooses JAX.
import jax
import jax.numpy as jnp

from keras_kvcache.runtime.platform import has_triton


def main():
    options = harness.read_arguments("Describes the machine.")
    report = harness.Report("machine", options)
    device = jax.devices()[0]
    on_cpu = device.platform == "cpu"
    report.add(
        kind=device.device_kind,
        platform=" ".join(device.client.platform_version.split()),
        **{"compute capability": getattr(device, "compute_capability", None)},
        driver=read_driver(),
        **{"GB of memory": memory_of(device)},
        **{"kernel by Triton": has_triton()},
        python=sys.version.split()[0],
        jax=jax.__version__,
    )
    read_memory = harness.MemoryReader(options.quick)
    size = 256 if options.quick or on_cpu else 8192
    dtype = "float32" if on_cpu else "bfloat16"
    matrix = jax.random.normal(jax.random.key(0), (size, size), dtype)
    multiply = jax.jit(lambda x: x @ x)
    seconds = harness.median_seconds(
        {"read": read_memory, "multiply": lambda: multiply(matrix).block_until_ready()},
        5,
    )
    report.add(
        **{"GB/s read": read_memory.nbytes / seconds["read"] / 1e9},
        **{"TFLOP/s": 2 * size**3 / seconds["multiply"] / 1e12},
        dtype=str(jnp.dtype(dtype)),
    )
    report.finish()


def memory_of(device):
    """Gigabytes that JAX may take, as far as it says."""
    stats = device.memory_stats() or {}
    return stats.get("bytes_limit", 0) / 1e9


def read_driver():
    """Name, driver and memory of NVIDIA's GPUs, as their own tool says."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total"]
    try:
        done = subprocess.run(
            [*command, "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


if __name__ == "__main__":
    main()
