"""Training data: rows in files, what they mean, and batches of them."""

from .collator import DataCollator
from .conversations import encode_conversation
from .datasets import ChatDataset, ConversationDataset

__all__ = ["ChatDataset", "ConversationDataset", "DataCollator", "encode_conversation"]
