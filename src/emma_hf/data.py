"""Training rows in LLaVA's format, with the authors' labels and instructions."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from .instruction_emma import encode_instruction, escape_placeholders, training_instruction
from .processing_emma import EmmaProcessor

IGNORED = -100
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)


class ConversationDataset(Dataset):
    """Rows of a LLaVA-format file: `{"image": name or names, "conversations": [{"from": …, "value": …}, …]}`.

    The file is not kept in memory: one 64-bit offset per row finds it again.

    Args:
        data_path: a JSON file that holds a list of rows, or a JSONL file with a row a line.
        processor: its tokenizers and image processor prepare the rows.
        image_folder: where the rows' pictures lie. Default: beside `data_path`.
        template: `"vicuna_v1"`, the conversation, or `"plain"`, the first stage's pictures and caption.

    Raises:
        FileNotFoundError: no file, or (of a row) no picture.
        ValueError: an unknown template, a file or row that is not in the format, pictures and placeholders of a row
            that differ in number, a row longer than the model's context, or without a word to learn from.
    """

    def __init__(
        self,
        data_path: str | Path,
        processor: EmmaProcessor,
        image_folder: str | Path | None = None,
        template: str = "vicuna_v1",
    ) -> None:
        if template not in ("vicuna_v1", "plain"):
            raise ValueError(f"`template` must be 'vicuna_v1' or 'plain': got {template!r}.")
        self.path = Path(data_path)
        if not self.path.is_file():
            raise FileNotFoundError(f"There is no file of rows at {self.path}. Check the path.")
        self.processor = processor
        self.image_folder = self.path.parent if image_folder is None else Path(image_folder)
        self.template = template
        self.spans = _row_spans(self.path)

    def __len__(self) -> int:
        return len(self.spans)

    def row(self, index: int) -> dict[str, Any]:
        """A row as it stands in the file."""
        start, end = self.spans[index]
        with open(self.path, "rb") as file:
            file.seek(start)
            return json.loads(file.read(end - start))

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """`input_ids` and `labels` (tokens), `pixel_values` (pictures, 3, height, width) and `instruction_input_ids`
        (pictures, instruction_length); the last two only where the row has pictures.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"Row {index} of {len(self)}.")
        row = self.row(index)
        try:
            return self._prepare(row)
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"Row {index % len(self)} of {self.path.name}: {error}") from error

    def _prepare(self, row: dict[str, Any]) -> dict[str, torch.Tensor]:
        if not isinstance(row, dict) or not isinstance(row.get("conversations"), list):
            raise ValueError("A row must be an object with a list of `conversations`.")
        conversation = row["conversations"]
        names = row.get("image") or []
        names = [names] if isinstance(names, str) else list(names)
        input_ids, labels = encode_conversation(self.processor, conversation, self.template)
        found = input_ids.count(self.processor.image_token_id) // self.processor.image_seq_length
        if found != len(names):
            raise ValueError(
                f"Each `{self.processor.image_token}` in a row stands for one of its pictures: got {found} "
                f"placeholders and {len(names)} pictures."
            )
        item = {"input_ids": torch.tensor(input_ids), "labels": torch.tensor(labels)}
        if names:
            paths = [self.image_folder / name for name in names]
            tokenizer, length = self.processor.instruction_tokenizer, self.processor.instruction_length
            text = training_instruction(conversation, tokenizer, self.processor.image_token, length)
            item["pixel_values"] = self.processor.image_processor(paths, return_tensors="pt")["pixel_values"]
            item["instruction_input_ids"] = torch.tensor([encode_instruction(tokenizer, text, length)] * len(paths))
        return item


class DataCollator:
    """Makes a batch of [`ConversationDataset`] items: padded at the right, pictures of all rows in one tensor.

    The number of pictures may differ from row to row; a batch without any has no `pixel_values`.
    """

    def __init__(self, processor: EmmaProcessor) -> None:
        self.pad_token_id = processor.tokenizer.pad_token_id
        if self.pad_token_id is None:
            raise ValueError("Padding needs a padding token: set `processor.tokenizer.pad_token`.")

    def __call__(self, items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask` and `labels` (batch, tokens), and the pictures and instructions of all rows."""
        pad = torch.nn.utils.rnn.pad_sequence
        ids = [item["input_ids"] for item in items]
        batch = {
            "input_ids": pad(ids, batch_first=True, padding_value=self.pad_token_id),
            "attention_mask": pad([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": pad([item["labels"] for item in items], batch_first=True, padding_value=IGNORED),
        }
        for name in ("pixel_values", "instruction_input_ids"):
            rows = [item[name] for item in items if name in item]
            if rows:
                batch[name] = torch.cat(rows)
        return batch


def encode_conversation(
    processor: EmmaProcessor, conversation: list[dict[str, str]], template: str = "vicuna_v1"
) -> tuple[list[int], list[int]]:
    """Ids and labels of a conversation; the loss is on the assistant's words and their end alone.

    Raises:
        ValueError: messages that do not alternate, a row longer than the tokenizer's `model_max_length`, or no label.
    """
    turns = _turns(conversation)
    pieces = _plain(turns, processor) if template == "plain" else _vicuna(turns, processor)
    text = "".join(piece for piece, _ in pieces)
    input_ids, spans = processor._encode_prompt(text, add_special_tokens=True)
    learned, position = [], 0
    for piece, learn in pieces:
        if learn:
            learned.append((position, position + len(piece)))
        position += len(piece)
    labels = [
        token if any(start < stop and end > begin for begin, stop in learned) and end > start else IGNORED
        for token, (start, end) in zip(input_ids, spans)
    ]
    limit = processor.tokenizer.model_max_length
    if len(input_ids) > limit:
        raise ValueError(
            f"A row must fit the model's context of {limit} tokens: it has {len(input_ids)}, {len(input_ids) - limit} "
            "too many. Shorten it, or raise `processor.tokenizer.model_max_length` if the model allows."
        )
    if all(label == IGNORED for label in labels):
        raise ValueError("A row needs words of the assistant to learn from: all its labels are -100.")
    return input_ids, labels


def _turns(conversation: list[dict[str, str]]) -> list[tuple[str, str]]:
    """Roles and texts, which alternate and begin with the user; an assistant turn that opens the row is dropped."""
    turns = []
    for message in conversation:
        role = ROLES.get(message.get("from", ""))
        if role is None or not isinstance(message.get("value"), str):
            raise ValueError(f"A message needs `from` (human or gpt) and `value`, a text: got {message}.")
        turns.append((role, message["value"]))
    if turns and turns[0][0] == "assistant":
        turns = turns[1:]
    roles = [role for role, _ in turns]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise ValueError(f"User and assistant must take turns, and the assistant must end the row: got {roles}.")
    return turns


def _vicuna(turns: list[tuple[str, str]], processor: EmmaProcessor) -> list[tuple[str, bool]]:
    token = processor.image_token
    pieces = [(SYSTEM, False)]
    for role, text in turns:
        if role == "user":
            count = text.count(token)
            # The authors' `preprocess_multimodal`: placeholders to the front, each on a line of its own.
            words = text.replace(token, "").strip() if count else text
            pieces.append((f"USER: {f'{token}{chr(10)}' * count}{words} ASSISTANT:", False))
        else:
            pieces.append((f" {escape_placeholders(text, token)}{processor.tokenizer.eos_token}", True))
    return pieces


def _plain(turns: list[tuple[str, str]], processor: EmmaProcessor) -> list[tuple[str, bool]]:
    token = processor.image_token
    if len(turns) != 2 or token not in turns[0][1]:
        raise ValueError(
            f"A row of the `plain` template is a picture and its caption: got {len(turns)} turns and "
            f"{turns[0][1].count(token)} placeholders in the first."
        )
    caption = escape_placeholders(turns[1][1], token)
    return [(token * turns[0][1].count(token), False), (f"{caption}\n", True)]


def _row_spans(path: Path) -> np.ndarray:
    """First and last byte of each row, int64 (rows, 2)."""
    spans: list[tuple[int, int]] = []
    if path.suffix == ".jsonl":
        position = 0
        with open(path, "rb") as file:
            for line in file:
                if line.strip():
                    spans.append((position, position + len(line)))
                position += len(line)
        return np.array(spans, dtype=np.int64).reshape(-1, 2)
    text = path.read_text(encoding="utf-8")
    decoder, index, offset, last = json.JSONDecoder(), 0, 0, 0
    try:
        index = text.index("[") + 1
        while True:
            while text[index] in " \t\r\n,":
                index += 1
            if text[index] == "]":
                break
            _, end = decoder.raw_decode(text, index)
            offset += len(text[last:index].encode())
            size = len(text[index:end].encode())
            spans.append((offset, offset + size))
            offset, last, index = offset + size, end, end
    except (ValueError, IndexError) as error:
        raise ValueError(f"{path} must hold a JSON list of rows ({error}). Is it complete?") from error
    return np.array(spans, dtype=np.int64).reshape(-1, 2)
