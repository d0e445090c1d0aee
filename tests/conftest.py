"""Fixtures that several test files share."""

import pytest


@pytest.fixture(scope="session")
def smollm2_path():
    """The SmolLM2 model file, downloaded on first use."""
    from keras_kvcache.loaders import fetch

    return fetch("smollm2_135m_instruct")
