"""Answer a table of pictures and questions with Ray Data, on any number of workers and machines.

    python examples/batch_inference.py questions.csv answers.jsonl --model emma-7b --workers 4

The table (CSV, JSON lines or Parquet: a file, or a folder of such files) has the columns `image` and `question`.
Pictures are paths (beside the table, or in `--image-folder`), URLs, data URLs, and in Parquet also bytes. The answers
have the rows and columns of the table in its order, but no pictures as bytes, and the columns `answer` and `error`: of
a row that cannot be answered `error` says why, and the others are answered all the same. With `RAY_ADDRESS` it runs on
that cluster, whose machines must all reach the pictures and the model; leave a CPU free of workers there, to read the
table.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Read where Ray starts: nothing is reported to anybody.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import pyarrow
import ray
import torch
from PIL import Image
from pyarrow import csv, parquet

from emma_hf import EMMA_TINY
from emma_hf.inference import load_model
from emma_hf.model.instruction_emma import instructions_from_messages
from emma_hf.serving import Limits
from emma_hf.serving.images import decode_image, open_image, read_urls

# The table may hold images of strangers. Their URLs are fetched: who runs this chose the table.
LIMITS = Limits(remote_pictures=True)
READERS = {".csv": ray.data.read_csv, ".jsonl": ray.data.read_json, ".parquet": ray.data.read_parquet}


class Answerer:
    """One worker: the model, loaded once, and the answers to one batch of rows after the other."""

    def __init__(self, model: str, image_folder: str, max_new_tokens: int) -> None:
        self.model, self.processor = load_model(model)
        self.image_folder = Path(image_folder)
        self.max_new_tokens = max_new_tokens

    def __call__(self, batch: pyarrow.Table) -> pyarrow.Table:
        """The table with `answer` and `error`, each null where the other is not."""
        answers: list[str | None] = [None] * len(batch)
        errors: list[str | None] = [None] * len(batch)
        prepared = {}
        for place, row in enumerate(batch.select(["image", "question"]).to_pylist()):
            try:
                prepared[place] = self._prepare(row["image"], row["question"])
            except (ValueError, OSError) as error:
                errors[place] = str(error)
        if prepared:
            for place, answer in zip(prepared, self._answer(list(prepared.values()))):
                answers[place] = answer
        kinds = pyarrow.types
        pictures = (kinds.is_binary, kinds.is_large_binary, kinds.is_binary_view, kinds.is_struct)
        if any(is_kind(batch.schema.field("image").type) for is_kind in pictures):
            batch = batch.drop_columns(["image"])
        for name, values in (("answer", answers), ("error", errors)):
            batch = batch.append_column(name, pyarrow.array(values, pyarrow.string()))
        return batch

    def _prepare(self, image: Any, question: Any) -> dict[str, Any]:
        """The model's inputs of one row.

        Raises:
            ValueError: no picture, no question, a broken picture, too long a question.
            OSError: a path that cannot be read.
        """
        # `datasets` writes pictures so.
        if isinstance(image, dict):
            image = image.get("bytes") or image.get("path")
        if not image:
            raise ValueError("There is no picture: `image` is empty.")
        if not isinstance(question, str) or not question.strip():
            raise ValueError(f"`question` must be words: got {question!r}.")
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.strip()}]}
        # The instruction is the question itself: in a rendered prompt, a word of it could pass for a role.
        inputs = self.processor(
            images=[self._read_image(image)],
            text=self.processor.apply_chat_template([message], add_generation_prompt=True),
            instructions=instructions_from_messages([message]),
        )
        length = len(inputs["input_ids"][0])
        positions = self.model.config.position_count
        if length + self.max_new_tokens > positions:
            raise ValueError(
                f"Prompt and answer must fit into the model's {positions} tokens: got a prompt of {length}, and "
                f"{self.max_new_tokens} for the answer. Shorten the question, or lower `--max-new-tokens`."
            )
        return inputs

    def _read_image(self, image: str | bytes) -> Image.Image:
        """The image of a row, checked as those of strangers are."""
        source: bytes | Path
        if isinstance(image, bytes):
            source = image
        elif image.lower().startswith(("data:", "http://", "https://")):
            (source,) = read_urls([image], LIMITS)
        else:
            source = self.image_folder / image
            if not source.is_file():
                raise ValueError(f"There is no picture at {image[:200]!r}. Give a path, a URL or a data URL.")
        return decode_image(open_image(source, LIMITS))

    def _answer(self, rows: list[dict[str, Any]]) -> list[str]:
        tokenizer = self.processor.tokenizer
        # On the left, so that each answer follows its prompt.
        inputs = tokenizer.pad(
            {"input_ids": [row["input_ids"][0] for row in rows]}, padding_side="left", return_tensors="pt"
        )
        for name in ("pixel_values", "instruction_input_ids"):
            inputs[name] = torch.tensor([row[name][0] for row in rows])
        inputs = inputs.to(self.model.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        tokens = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        new = tokens[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


def answer_table(args: argparse.Namespace) -> tuple[int, int]:
    """Answer a table and write the result. Returns the numbers of rows and of errors among them.

    Raises:
        ValueError: a table of an unknown kind or without the columns.
        FileNotFoundError: no table there.
    """
    source, kind = Path(args.table).absolute(), kind_of(args.table)
    target = Path(args.output).absolute()
    if target.suffix not in WRITERS:
        raise ValueError(f"The answers must be one of {', '.join(WRITERS)}: got {args.output!r}.")
    # One CPU more than workers: where they have them all, nobody reads the table.
    local = {} if "RAY_ADDRESS" in os.environ else {"num_cpus": args.workers + 1, "include_dashboard": False}
    ray.init(log_to_driver=False, **local)
    try:
        # Batches in order and of one size: which questions are computed together does not hang on who is free.
        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        # An error that is no row's own, such as no memory, is told as it is.
        context.raise_original_map_exception = True
        # A folder may hold the pictures, too.
        table = READERS[kind](str(source), file_extensions=[kind[1:]])
        check_columns(table.schema())
        answered = table.repartition(target_num_rows_per_block=args.batch_size, strict=True).map_batches(
            Answerer,
            batch_size=None,
            batch_format="pyarrow",
            concurrency=args.workers,
            num_gpus=1 if ray.cluster_resources().get("GPU") else 0,
            fn_constructor_args=(
                str(Path(args.model).absolute()) if Path(args.model).is_dir() else args.model,
                str(Path(args.image_folder or (source if source.is_dir() else source.parent)).absolute()),
                args.max_new_tokens,
            ),
        )
        return write(answered.iter_batches(batch_size=None, batch_format="pyarrow"), target)
    finally:
        ray.shutdown()


def kind_of(table: str) -> str:
    """The ending that the files of a table have."""
    path = Path(table)
    if not path.exists():
        raise FileNotFoundError(f"There is no table at {table!r}.")
    endings = sorted({file.suffix for file in path.iterdir()} & READERS.keys()) if path.is_dir() else [path.suffix]
    if len(endings) != 1 or endings[0] not in READERS:
        raise ValueError(
            f"A table must be a file, or a folder of files, of one of the kinds {', '.join(READERS)}: got {table!r} "
            f"with {', '.join(endings) or 'none of them'}."
        )
    return endings[0]


def check_columns(schema: Any) -> None:
    names = [] if schema is None else schema.names
    if not {"image", "question"} <= set(names) or {"answer", "error"} & set(names):
        raise ValueError(
            "The table must have rows, the columns `image` and `question`, and no `answer` or `error` yet: got the "
            f"columns {names}."
        )


def write(batches: Iterator[pyarrow.Table], target: Path) -> tuple[int, int]:
    """Write batches to a file, which is there only when it is whole."""
    partial = target.with_name(f".{target.name}.partial")
    rows = errors = 0
    writer = None
    try:
        for batch in batches:
            writer = writer or WRITERS[target.suffix](partial, batch.schema)
            writer.write_table(batch)
            rows += len(batch)
            errors += len(batch) - batch.column("error").null_count
        if writer is not None:
            writer.close()
            os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return rows, errors


class JsonLinesWriter:
    """What pyarrow's writers do, for JSON lines, which it only reads."""

    def __init__(self, path: Path, schema: pyarrow.Schema) -> None:
        self._file = path.open("w", encoding="utf-8")

    def write_table(self, table: pyarrow.Table) -> None:
        self._file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in table.to_pylist())

    def close(self) -> None:
        self._file.close()


WRITERS: dict[str, Callable] = {".csv": csv.CSVWriter, ".jsonl": JsonLinesWriter, ".parquet": parquet.ParquetWriter}


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns the exit status: 0, or 2 after an error that the user can mend."""
    parser = argparse.ArgumentParser(description="Answer a table of pictures and questions.")
    parser.add_argument("table", help="CSV, JSON lines or Parquet with the columns image and question")
    parser.add_argument("output", help="file to write, of the same three kinds")
    parser.add_argument("--model", default=str(EMMA_TINY), help="folder or Hub id (default: emma-tiny)")
    parser.add_argument("--image-folder", help="of the pictures (default: the table's)")
    parser.add_argument("--workers", type=int, default=1, help="each with a model of its own (default: 1)")
    parser.add_argument("--batch-size", type=int, default=8, help="rows that are computed together (default: 8)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="longest answer in tokens (default: 128)")
    args = parser.parse_args(argv)
    for name in ("workers", "batch_size", "max_new_tokens"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1: got {getattr(args, name)}")
    try:
        rows, errors = answer_table(args)
    except (ValueError, OSError) as error:
        print(f"batch_inference: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.output}: {rows} rows, {errors} of them with an error", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
