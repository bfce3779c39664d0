"""Datasets of training rows, in LLaVA's format or as chat messages, with the authors' labels and instructions."""

from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from ..model.errors_emma import EmmaError
from ..model.instruction_emma import encode_instruction, training_instruction
from ..model.processing_emma import EmmaProcessor
from .conversations import ROLES, encode_conversation, refuse_keys, to_llava_format, to_turns
from .row_files import read_row, row_spans

# What other formats train on and this package does not.
UNSUPPORTED_COLUMNS = ("audio", "audios", "functions", "tools", "video", "videos")


class TrainingDataset(Dataset):
    """Tokenized and labeled training rows; a subclass says where the rows come from and how to read one."""

    def __init__(self, processor: EmmaProcessor, template: str, on_error: str) -> None:
        if template not in ("vicuna_v1", "plain"):
            raise EmmaError(f"`template` must be 'vicuna_v1' or 'plain': got {template!r}.")
        if on_error not in ("raise", "skip"):
            raise EmmaError(f"`on_error` must be 'raise' or 'skip': got {on_error!r}.")
        self.processor = processor
        self.template = template
        self.on_error = on_error
        # In shared memory, so that rows skipped by a loader's worker are known in this process.
        self._skipped = torch.zeros(len(self), dtype=torch.bool).share_memory_()
        self._lengths: np.ndarray | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    def row(self, index: int) -> dict[str, Any]:
        """A row as it stands in its source."""
        raise NotImplementedError

    def _read(self, row: Any) -> tuple[list[dict[str, str]], list[Any]]:
        """Messages in LLaVA's format, and images, of a row."""
        raise NotImplementedError

    def _name(self, index: int) -> str:
        return f"Row {index}"

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """One training row.

        Returns:
            `input_ids` and `labels` (tokens), and where the row has images `pixel_values` (images, 3, height, width)
            and `instruction_input_ids` (images, instruction_length).
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"Row {index} of {len(self)}.")
        if self.on_error == "raise":
            return self._item(index % len(self))
        for step in range(len(self)):
            position = (index + step) % len(self)
            try:
                return self._item(position)
            except (ValueError, OSError):
                self._skipped[position] = True
        raise EmmaError(f"Not one row can be learned from. {self._reason(index % len(self))}")

    def conversation(self, index: int) -> tuple[list[dict[str, str]], list[Any]]:
        """A row's messages, in LLaVA's format, and its images: paths or images.

        Raises:
            EmmaError, FileNotFoundError: as reading the row as an item does.
        """
        with self._row_named_in_errors(index):
            return self._read(self.row(index))

    def _item(self, index: int) -> dict[str, torch.Tensor]:
        conversation, images = self.conversation(index)
        with self._row_named_in_errors(index):
            return self._prepare(conversation, images)

    @contextmanager
    def _row_named_in_errors(self, index: int) -> Iterator[None]:
        try:
            yield
        except (ValueError, OSError) as error:
            error_type = FileNotFoundError if isinstance(error, FileNotFoundError) else EmmaError
            raise error_type(f"{self._name(index)}: {error}") from error

    def _prepare(self, conversation: list[dict[str, str]], images: list[Any]) -> dict[str, torch.Tensor]:
        processor = self.processor
        input_ids, labels = encode_conversation(processor, conversation, self.template)
        count = input_ids.count(processor.image_token_id) // processor.image_seq_length
        if count != len(images):
            raise EmmaError(
                f"Each `{processor.image_token}` in a row stands for one of its pictures: got {count} placeholders and "
                f"{len(images)} pictures."
            )
        item = {"input_ids": torch.tensor(input_ids), "labels": torch.tensor(labels)}
        if images:
            tokenizer, length = processor.instruction_tokenizer, processor.instruction_length
            spoken = [message for message in conversation if ROLES[message["from"]] != "system"]
            text = training_instruction(spoken, tokenizer, processor.image_token, length)
            ids = encode_instruction(tokenizer, text, length)
            item["pixel_values"] = processor.image_processor.encode_each(images)
            item["instruction_input_ids"] = torch.tensor([ids] * len(images))
        return item

    def modality_lengths(self) -> np.ndarray:
        """Number of words in each row, int32 (rows,), negative where the row has no image.

        [`~emma_hf.training.ModalityLengthSampler`] groups batches by it. Computed once, in one pass that opens no
        image.
        """
        if self._lengths is None:
            read_row = self._row_reader_without_images()
            lengths: np.ndarray = np.zeros(len(self), dtype=np.int32)
            for index in tqdm(range(len(self)), desc="lengths of rows", delay=2):
                try:
                    conversation, images = self._read(read_row(index))
                    words = max(1, sum(len(text.split()) for _, text in to_turns(conversation)))
                except (ValueError, OSError):
                    # The error is raised, or the row skipped, when the row is loaded.
                    words, images = 1, []
                lengths[index] = words if images else -words
            self._lengths = lengths
        return self._lengths

    def _row_reader_without_images(self) -> Callable[[int], Any]:
        """A function that reads a row without decoding its images."""
        return self.row

    @property
    def skipped_rows(self) -> list[int]:
        """Indices of the rows that `on_error="skip"` has left out so far, in this process and in a loader's workers."""
        return self._skipped.nonzero().flatten().tolist()

    def skipped_report(self) -> str | None:
        """The number of skipped rows and the reasons of the first ten, a line each; None if no row was skipped."""
        rows = self.skipped_rows
        if not rows:
            return None
        reasons = [self._reason(row) for row in rows[:10]]
        more = [f"… and {len(rows) - 10} more."] if len(rows) > 10 else []
        return "\n".join([f"{len(rows)} of {len(self)} rows were skipped:", *reasons, *more])

    def _reason(self, index: int) -> str:
        try:
            self._item(index)
        except (ValueError, OSError) as error:
            return str(error)
        return f"{self._name(index)}: it can be read now."


class ConversationDataset(TrainingDataset):
    """Rows of a LLaVA-format file: `{"image": name or names, "conversations": [{"from": …, "value": …}, …]}`.

    The file is not kept in memory: two 64-bit offsets per row find it again. `images` may stand for `image`, and
    `system` for a system message at the beginning.

    Args:
        data_path: a JSON file that holds a list of rows, or JSON lines (`.jsonl`, `.ndjson`), one row a line.
        processor: its tokenizers and image processor prepare the rows.
        image_folder: folder of the rows' images. Default: the folder of `data_path`.
        template: `"vicuna_v1"`, the conversation, or `"plain"`, the first stage's images and caption.
        on_error: `"raise"`, or `"skip"`: the next good row takes the place of one that cannot be used;
            `skipped_report` names them.

    Raises:
        FileNotFoundError: no file, or (of a row) no image.
        EmmaError: an unknown template; a file or row that is not in this format; images and placeholders of a row that
            differ in number; a row longer than the model's context or without a label; videos, audio or tools.
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
        self.spans = row_spans(self.path)
        super().__init__(processor, template, on_error)

    def __len__(self) -> int:
        return len(self.spans)

    def row(self, index: int) -> dict[str, Any]:
        """A row as it stands in the file."""
        return read_row(self.path, *self.spans[index].tolist())

    def _name(self, index: int) -> str:
        return f"Row {index} of {self.path.name}"

    def _read(self, row: Any) -> tuple[list[dict[str, str]], list[Any]]:
        if not isinstance(row, dict) or not isinstance(row.get("conversations"), list):
            raise EmmaError("A row must be an object with a list of `conversations`.")
        refuse_keys(row, UNSUPPORTED_COLUMNS, "A row")
        names = _images_of(row)
        if not all(isinstance(name, str) for name in names):
            raise EmmaError(
                f"`image` must be the name of a picture, or a list of names: got {row.get('image') or row['images']!r}."
            )
        conversation = row["conversations"]
        if row.get("system"):
            conversation = [{"from": "system", "value": row["system"]}, *conversation]
        return conversation, [self.image_folder / name for name in names]


class ChatDataset(TrainingDataset):
    """Rows of chat messages, such as a `datasets.Dataset`, with the labels and instructions of LLaVA's rows.

    A row is `{"messages": [{"role": …, "content": text or parts}, …]}`. An image is a part `{"type": "image"}` that
    holds it (`image`, `url`, `path` or `base64`), or else the next of the row's `images`. If no message says where the
    row's `images` belong, they stand before the first user turn, as TRL reads such rows.

    Args:
        rows: an object with a length that is indexed by row number.
        processor: as for [`ConversationDataset`], like `template` and `on_error`.

    Raises:
        EmmaError: as [`ConversationDataset`]; rows without a length, such as a streamed dataset; an image that cannot
            be decoded.
        FileNotFoundError: no image at a path of a row.
    """

    def __init__(
        self, rows: Any, processor: EmmaProcessor, template: str = "vicuna_v1", on_error: str = "raise"
    ) -> None:
        if not isinstance(rows, Sized) or not hasattr(rows, "__getitem__"):
            raise EmmaError(
                f"`rows` must have a length and rows by number: got {type(rows).__name__}. Load the dataset without "
                "`streaming=True`."
            )
        self.rows: Any = rows
        super().__init__(processor, template, on_error)

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> dict[str, Any]:
        """A row as it stands in `rows`."""
        try:
            return self.rows[index]
        except (ValueError, FileNotFoundError):
            raise
        # A `datasets.Dataset` decodes the images of the row, and Pillow's decoders raise nearly anything.
        except Exception as error:
            raise EmmaError(f"It cannot be decoded ({type(error).__name__}: {error}). Repair or remove it.") from error

    def _row_reader_without_images(self) -> Callable[[int], Any]:
        # A `datasets.Dataset` decodes the images of each row that it returns; its Arrow view does not.
        if getattr(self.rows, "format", {"type": "none"})["type"] is not None:
            return self.row
        arrow = self.rows.with_format("arrow")
        if "Json(" not in repr(self.rows.features.get("messages")):
            return lambda index: arrow[index].to_pylist()[0]
        # Where the parts of messages differ in their keys, Arrow has them as text.
        messages = self.rows.select_columns("messages")
        return lambda index: {**arrow[index].to_pylist()[0], **messages[index]}

    def _read(self, row: Any) -> tuple[list[dict[str, str]], list[Any]]:
        if not isinstance(row, Mapping) or not isinstance(row.get("messages"), list):
            raise EmmaError("A row must have a list of `messages`.")
        refuse_keys(row, (*UNSUPPORTED_COLUMNS, "system"), "A row")
        token = self.processor.image_token
        unplaced = _images_of(row)
        conversation, images = [], []
        for message in row["messages"]:
            text, held = to_llava_format(message, token)
            for image in held:
                if image is None and not unplaced:
                    raise EmmaError(
                        "Each picture part must hold its picture, or the row's `images` must: got fewer `images` than "
                        "parts."
                    )
                images.append(_undecoded(unplaced.pop(0) if image is None else image))
            conversation.append({"from": message.get("role", ""), "value": text})
        if unplaced and not any(token in message["value"] for message in conversation):
            for message in conversation:
                if message["from"] == "user":
                    message["value"] = f"{token}\n" * len(unplaced) + message["value"]
                    break
        return conversation, images + [_undecoded(image) for image in unplaced]


def _images_of(row: Mapping[str, Any]) -> list[Any]:
    """The images of a row's `image` or `images` column."""
    if row.get("image") is not None and row.get("images") is not None:
        raise EmmaError("A row must have `image` or `images`: got both. Put all images into `images`.")
    images = row.get("image") or row.get("images") or []
    return list(images) if isinstance(images, (list, tuple)) else [images]


def _undecoded(image: Any) -> Any:
    """Bytes or path of an image column that `datasets` does not decode; any other image as it is."""
    if not isinstance(image, Mapping):
        return image
    source = image.get("bytes") if image.get("bytes") is not None else image.get("path")
    if source is None:
        raise EmmaError(f"An undecoded image needs `bytes` or a `path`: got {dict(image)}.")
    return source
