"""Training rows in LLaVA's format, with the authors' labels and instructions."""

import json
from array import array
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from ..model.errors_emma import EmmaError
from ..model.instruction_emma import PLACEHOLDER_ESCAPE, encode_instruction, training_instruction
from ..model.processing_emma import EmmaProcessor
from .conversations import ROLES, encode_conversation, message_in_llava_format, turns_of


class _TrainingDataset(Dataset):
    """Prepared training rows; where a row and its pictures come from, a subclass says."""

    def __init__(self, processor: EmmaProcessor, template: str, on_error: str) -> None:
        if template not in ("vicuna_v1", "plain"):
            raise EmmaError(f"`template` must be 'vicuna_v1' or 'plain': got {template!r}.")
        if on_error not in ("raise", "skip"):
            raise EmmaError(f"`on_error` must be 'raise' or 'skip': got {on_error!r}.")
        self.processor = processor
        self.template = template
        self.on_error = on_error
        # In shared memory, so that what a loader's worker skips is known here.
        self._skipped = torch.zeros(len(self), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        raise NotImplementedError

    def row(self, index: int) -> dict[str, Any]:
        """A row as it stands in its source."""
        raise NotImplementedError

    def _read(self, row: Any) -> tuple[list[dict[str, str]], list[Any]]:
        """Conversation and pictures of a row."""
        raise NotImplementedError

    def _name(self, index: int) -> str:
        return f"Row {index}"

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """`input_ids` and `labels` (tokens), `pixel_values` (pictures, 3, height, width) and `instruction_input_ids`
        (pictures, instruction_length); the last two only where the row has pictures.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"Row {index} of {len(self)}.")
        if self.on_error == "raise":
            return self._item(index % len(self))
        for step in range(len(self)):
            place = (index + step) % len(self)
            try:
                return self._item(place)
            except (ValueError, FileNotFoundError):
                self._skipped[place] = True
        raise EmmaError(f"Not one row can be learned from. {self._reason(index % len(self))}")

    def conversation(self, index: int) -> tuple[list[dict[str, str]], list[Any]]:
        """A row's messages, in LLaVA's format, and its pictures: paths or images.

        Raises:
            ValueError, FileNotFoundError: as reading the row as an item does.
        """
        try:
            return self._read(self.row(index))
        except (ValueError, FileNotFoundError) as error:
            raise _named(error, self._name(index)) from error

    def _item(self, index: int) -> dict[str, torch.Tensor]:
        conversation, pictures = self.conversation(index)
        try:
            return self._prepare(conversation, pictures)
        except (ValueError, FileNotFoundError) as error:
            raise _named(error, self._name(index)) from error

    def _prepare(self, conversation: list[dict[str, str]], pictures: list[Any]) -> dict[str, torch.Tensor]:
        processor = self.processor
        input_ids, labels = encode_conversation(processor, conversation, self.template)
        found = input_ids.count(processor.image_token_id) // processor.image_seq_length
        if found != len(pictures):
            raise EmmaError(
                f"Each `{processor.image_token}` in a row stands for one of its pictures: got {found} placeholders and "
                f"{len(pictures)} pictures."
            )
        item = {"input_ids": torch.tensor(input_ids), "labels": torch.tensor(labels)}
        if pictures:
            tokenizer, length = processor.instruction_tokenizer, processor.instruction_length
            spoken = [message for message in conversation if ROLES[message["from"]] != "system"]
            text = training_instruction(spoken, tokenizer, processor.image_token, length)
            ids = encode_instruction(tokenizer, text.replace(PLACEHOLDER_ESCAPE, ""), length)
            item["pixel_values"] = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
            item["instruction_input_ids"] = torch.tensor([ids] * len(pictures))
        return item

    def modality_lengths(self) -> np.ndarray:
        """Words of each row, int32 (rows,), negative where the row has no picture: what batches are grouped by.

        Computed once, in one pass that opens no picture.
        """
        if not hasattr(self, "_lengths"):
            row_of = self._rows_without_pictures()
            self._lengths: np.ndarray = np.zeros(len(self), dtype=np.int32)
            for index in tqdm(range(len(self)), desc="lengths of rows", delay=2):
                try:
                    conversation, pictures = self._read(row_of(index))
                    words = max(1, sum(len(text.split()) for _, text in turns_of(conversation)))
                except ValueError:
                    # Told, or skipped, when the row's turn comes.
                    words, pictures = 1, []
                self._lengths[index] = words if pictures else -words
        return self._lengths

    def _rows_without_pictures(self) -> Callable[[int], Any]:
        """How to get a row when nobody looks at its pictures."""
        return self.row

    @property
    def skipped_rows(self) -> list[int]:
        """Rows that `on_error="skip"` has left out so far, those that a loader's workers met included."""
        return self._skipped.nonzero().flatten().tolist()

    def skipped_report(self) -> str | None:
        """How many rows were left out, and why each of the first ten; None where none was."""
        rows = self.skipped_rows
        if not rows:
            return None
        reasons = [self._reason(row) for row in rows[:10]]
        more = [f"… and {len(rows) - 10} more."] if len(rows) > 10 else []
        return "\n".join([f"{len(rows)} of {len(self)} rows were skipped:", *reasons, *more])

    def _reason(self, index: int) -> str:
        try:
            self._item(index)
        except (ValueError, FileNotFoundError) as error:
            return str(error)
        return f"{self._name(index)}: it can be read now."


class ConversationDataset(_TrainingDataset):
    """Rows of a LLaVA-format file: `{"image": name or names, "conversations": [{"from": …, "value": …}, …]}`.

    The file is not kept in memory: two 64-bit offsets per row find it again.

    Args:
        data_path: a JSON file that holds a list of rows, or a JSONL file with a row a line.
        processor: its tokenizers and image processor prepare the rows.
        image_folder: where the rows' pictures lie. Default: beside `data_path`.
        template: `"vicuna_v1"`, the conversation, or `"plain"`, the first stage's pictures and caption.
        on_error: `"raise"`, or `"skip"`: the next good row takes the place of one that cannot be used;
            `skipped_report` names them.

    Raises:
        FileNotFoundError: no file, or (of a row) no picture.
        EmmaError: an unknown template, a file or row that is not in the format, pictures and placeholders of a row
            that differ in number, a row longer than the model's context, or without a word to learn from.
    """

    def __init__(
        self,
        data_path: str | Path,
        processor: EmmaProcessor,
        image_folder: str | Path | None = None,
        template: str = "vicuna_v1",
        on_error: str = "raise",
    ) -> None:
        self.path = Path(data_path)
        if not self.path.is_file():
            raise FileNotFoundError(f"There is no file of rows at {self.path}. Check the path.")
        self.image_folder = self.path.parent if image_folder is None else Path(image_folder)
        self.spans = _row_spans(self.path)
        super().__init__(processor, template, on_error)

    def __len__(self) -> int:
        return len(self.spans)

    def row(self, index: int) -> dict[str, Any]:
        """A row as it stands in the file."""
        start, end = self.spans[index]
        with open(self.path, "rb") as file:
            file.seek(start)
            return json.loads(file.read(end - start))

    def _name(self, index: int) -> str:
        return f"Row {index} of {self.path.name}"

    def _read(self, row: Any) -> tuple[list[dict[str, str]], list[Any]]:
        if not isinstance(row, dict) or not isinstance(row.get("conversations"), list):
            raise EmmaError("A row must be an object with a list of `conversations`.")
        names = row.get("image") or []
        names = names if isinstance(names, list) else [names]
        if not all(isinstance(name, str) for name in names):
            raise EmmaError(f"`image` must be the name of a picture, or a list of names: got {row['image']!r}.")
        return row["conversations"], [self.image_folder / name for name in names]


class ChatDataset(_TrainingDataset):
    """Rows of chat messages, such as a `datasets.Dataset`, with the labels and instructions of LLaVA's rows.

    A row is `{"messages": [{"role": …, "content": text or parts}, …]}`. A picture is a part `{"type": "image"}` that
    holds it (`image`, `url`, `path` or `base64`), or else the next of the row's `images`. Where no message says where
    the row's `images` belong, they open the first user turn, as TRL reads such rows.

    Args:
        rows: anything with a length and rows by number.
        processor: as for [`ConversationDataset`], like `template` and `on_error`.

    Raises:
        EmmaError: as [`ConversationDataset`]; rows without a length, such as a streamed dataset.
        FileNotFoundError: no picture at a path of a row.
    """

    def __init__(
        self, rows: Any, processor: EmmaProcessor, template: str = "vicuna_v1", on_error: str = "raise"
    ) -> None:
        if not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__"):
            raise EmmaError(
                f"`rows` must have a length and rows by number: got {type(rows).__name__}. Load the dataset without "
                "`streaming=True`."
            )
        self.rows = rows
        super().__init__(processor, template, on_error)

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> dict[str, Any]:
        """A row as it stands in `rows`."""
        return self.rows[index]

    def _rows_without_pictures(self) -> Callable[[int], Any]:
        # A `datasets.Dataset` decodes the pictures of each row that it gives; its Arrow view does not.
        if getattr(self.rows, "format", {"type": "none"})["type"] is not None:
            return self.row
        arrow = self.rows.with_format("arrow")
        return lambda index: arrow[index].to_pylist()[0]

    def _read(self, row: Any) -> tuple[list[dict[str, str]], list[Any]]:
        if not isinstance(row, Mapping) or not isinstance(row.get("messages"), list):
            raise EmmaError("A row must have a list of `messages`.")
        token = self.processor.image_token
        waiting = row.get("images") or row.get("image") or []
        waiting = list(waiting) if isinstance(waiting, (list, tuple)) else [waiting]
        conversation, pictures = [], []
        for message in row["messages"]:
            text, found = message_in_llava_format(message, token)
            for picture in found:
                if picture is None and not waiting:
                    raise EmmaError(
                        "Each picture part must hold its picture, or the row's `images` must: got fewer `images` than "
                        "parts."
                    )
                pictures.append(_picture(waiting.pop(0) if picture is None else picture))
            conversation.append({"from": message.get("role", ""), "value": text})
        if waiting and not any(token in message["value"] for message in conversation):
            for message in conversation:
                if message["from"] == "user":
                    message["value"] = f"{token}\n" * len(waiting) + message["value"]
                    break
        return conversation, pictures + [_picture(picture) for picture in waiting]


def _picture(picture: Any) -> Any:
    # What `datasets` gives for a picture that it does not decode.
    if isinstance(picture, Mapping):
        return picture["bytes"] if picture.get("bytes") is not None else picture["path"]
    return picture


def _named(error: Exception, name: str) -> Exception:
    kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
    return kind(f"{name}: {error}")


def _row_spans(path: Path) -> np.ndarray:
    """First and last byte of each row, int64 (rows, 2)."""
    spans = array("q")
    if path.suffix == ".jsonl":
        position = 0
        with open(path, "rb") as file:
            for line in file:
                if line.strip():
                    spans.extend((position, position + len(line)))
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
            spans.extend((offset, offset + size))
            offset, last, index = offset + size, end, end
    except (ValueError, IndexError) as error:
        raise EmmaError(f"{path} must hold a JSON list of rows ({error}). Is it complete?") from error
    return np.array(spans, dtype=np.int64).reshape(-1, 2)
