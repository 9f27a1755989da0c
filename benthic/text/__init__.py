"""Floor 1: text to tokens and back, chat templates. No torch."""

from benthic.text.chat_template import ChatTemplate
from benthic.text.detokenizer import Detokenizer
from benthic.text.tokenizer import Tokenizer
from benthic.text.training import train_tokenizer

__all__ = ["ChatTemplate", "Detokenizer", "Tokenizer", "train_tokenizer"]
