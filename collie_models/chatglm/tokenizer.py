"""The tokenizers of ChatGLM-6B (`load_tokenizer`) and of ChatGLM2-6B and ChatGLM3-6B (`load_tokenizer2`)."""

from __future__ import annotations

from collie_models.chatglm.tokenizer_v1 import ChatGLMTokenizer, load_tokenizer
from collie_models.chatglm.tokenizer_v2 import ChatGLM2Tokenizer, load_tokenizer2

__all__ = ["ChatGLM2Tokenizer", "ChatGLMTokenizer", "load_tokenizer", "load_tokenizer2"]
