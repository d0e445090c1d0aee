"""keras-hub's experts, called as ours are."""

from typing import Any

from keras_kvcache.layers.mixture_of_experts import Experts


class ExpertBank(Experts):
    """`Experts` with the kernels of a layer of keras-hub's, which asks all of them.

    Args:
        bank: `MixtralMoeExperts`, built.
    """

    def __init__(self, bank):
        super().__init__(
            bank.num_experts,
            bank.intermediate_dim,
            activation=bank.activation,
            dtype=bank.compute_dtype,
        )
        self.bank = bank
        self.built = True

    @property
    def gate_kernel(self) -> Any:
        """`(E, D, F)`."""
        return self.bank._expert_feedforward_gate_dense

    @property
    def intermediate_kernel(self) -> Any:
        """`(E, D, F)`."""
        return self.bank._expert_feedforward_intermediate_dense

    @property
    def output_kernel(self) -> Any:
        """`(E, F, D)`."""
        return self.bank._expert_feedforward_output_dense
