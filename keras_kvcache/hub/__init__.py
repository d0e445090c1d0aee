"""keras-hub's models as models of this package, with their own weights."""

from keras_kvcache.hub import preset_loader as _  # noqa: F401
from keras_kvcache.hub.sharing import check_quantization, from_keras_hub, share

__all__ = ["check_quantization", "from_keras_hub", "share"]
