"""Initializers for several weights of one layer."""


def clone_initializer(initializer):
    """A copy: a Keras initializer gives the same values whenever it is called."""
    return initializer.__class__.from_config(initializer.get_config())
