"""Kernels for attention through caches: C++ for CPUs, Triton for GPUs."""
