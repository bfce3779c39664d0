"""Training data: rows in files, what they mean, and batches of them."""

from .datasets import ChatDataset, ConversationDataset, DataCollator, encode_conversation

__all__ = ["ChatDataset", "ConversationDataset", "DataCollator", "encode_conversation"]
