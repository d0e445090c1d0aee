"""keras-hub's models as models of this package, with their own weights."""

from keras_kvcache.models.hub.convert import from_keras_hub, share

__all__ = ["from_keras_hub", "share"]
