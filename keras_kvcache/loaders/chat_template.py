"""The place that chat templates had before there was a folder for tokenizers."""

from keras_kvcache.tokenizers.chat_template import render_chat_template

__all__ = ["render_chat_template"]
