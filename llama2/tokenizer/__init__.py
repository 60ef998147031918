"""Text to token ids and back: SentencePiece BPE (§2.2) and the one chat template."""

from llama2.tokenizer.template import CHAT_TEMPLATE, encode_dialog, encode_prompt
from llama2.tokenizer.tokenizer import Tokenizer
from llama2.tokenizer.train import train

__all__ = ["CHAT_TEMPLATE", "Tokenizer", "encode_dialog", "encode_prompt", "train"]
