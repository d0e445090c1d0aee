"""Tokenizers, streams of text, and chat templates."""

from keras_kvcache.tokenizers.chat_template import render_chat_template
from keras_kvcache.tokenizers.tokenizer import TOKENIZER_FILES, Tokenizer
from keras_kvcache.tokenizers.unread_tokenizer import UnreadTokenizer

__all__ = ["TOKENIZER_FILES", "Tokenizer", "UnreadTokenizer", "render_chat_template"]
