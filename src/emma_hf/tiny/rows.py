"""What emma-tiny's two stages learn from: vision features of scenes, and the questions and answers about each."""

import itertools
import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch.utils.data import Dataset
from tqdm import tqdm

from ..data.collator import DataCollator
from ..data.conversations import IGNORE_INDEX, encode_conversation
from ..model.instruction_emma import encode_instruction, training_instruction
from ..model.modeling_emma import EmmaForConditionalGeneration
from ..model.processing_emma import EmmaProcessor
from .drawing import draw
from .questions import ENDING, Question, ask, captioned
from .scenes import Chance, Scene

# The seeds of a purpose are its own: no test scene was ever trained on.
CLIP_SEEDS, TRAIN_SEEDS, TEST_SEEDS = 1_000_000_000, 2_000_000_000, 3_000_000_000
# How often each family is asked: most what needs most questions. Few scenes allow one that compares two things.
TRAINED_FAMILIES = {
    "same": 12, "told": 6, "alike": 8, "both": 5,
    "count": 36, "position": 8, "side": 8, "left": 2, "above": 1, "place": 2, "places": 2,
    "shape": 7, "existence": 6, "size": 5, "colour": 5,
}  # fmt: skip
ASKED_FAMILIES = tuple(family for family, times in TRAINED_FAMILIES.items() for _ in range(times))
# Shares of the counts that are asked for: there are few kinds of which a picture shows three things and more.
KEPT_COUNTS = {"0": 0.4, "1": 0.5, "2": 0.8}
# The first pictures show two things at most, and the first rows are about them alone.
EASY_PICTURES, EASY_ROWS = 0.3, 0.25
# Steps of this share of all pictures meet each equally often, and neighbours are as different as any two.
STRIDE = (math.sqrt(5) - 1) / 2
# Tokens of a row of the second stage: questions about one picture side by side, until it is full. What is learned from
# is the answers, and a picture costs more than twenty of them. The rows of every sixth step ask one question, as
# `emma-hf ask` does: only there is the question that is answered the one that guides the visual tokens. In the rows of
# every other sixth the questions follow each other, as in a chat, but answers can be copied from earlier ones.
ROW_TOKENS, SINGLE_STEPS, CHAT_STEPS = 256, 6, 6
# Of the questions with the ending that asks for a word so many keep it: it takes a third of their tokens.
ENDINGS = 0.25
# So many questions are captions instead: they say everything at once, which is most worth at first.
CAPTIONS_AT_FIRST, CAPTIONS = 0.1, 0.04


def training_scene(index: int, pictures: int) -> Scene:
    """What is on a picture of both stages."""
    return Scene.random(TRAIN_SEEDS + index, most=2 if index < EASY_PICTURES * pictures else 6)


def _conversation(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    """Questions about one picture and their answers in LLaVA's format."""
    messages = []
    for number, (question, answer) in enumerate(turns):
        asked = question if number else "\n".join(filter(None, ("<image>", question)))
        messages += [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
    return messages


def _said(turns: list[Question]) -> list[tuple[str, str]]:
    return [(turn.text, turn.answer) for turn in turns]


class Rows(Dataset):
    """Rows of a stage: V of a picture, and what is said about it.

    Args:
        stage: `pretrain` (captions) or `finetune` (questions, and captions among them).
        features: V of the pictures, (pictures, visual tokens, width).
        processor: its tokenizers prepare the words.
        rows: how many.
        batch_size: of them in a step.
        seed: of the words.
    """

    def __init__(
        self, stage: str, features: np.ndarray, processor: EmmaProcessor, rows: int, batch_size: int, seed: int
    ) -> None:
        self.stage, self.features, self.processor = stage, features, processor
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self._encoded = cache(self._encode)
        # Tokens of system turn and picture.
        some_ids, _ = self._encode("?" if stage == "finetune" else "", "!")
        self.start = processor.image_seq_length + some_ids.index(processor.image_token_id)

    def __len__(self) -> int:
        return self.rows

    def picture(self, index: int) -> int:
        """Which picture a row is about: all take their turn."""
        easy = self.stage == "finetune" and index < EASY_ROWS * self.rows
        return int(index * STRIDE % 1 * max(1, round((EASY_PICTURES if easy else 1) * len(self.features))))

    def turns(self, index: int) -> list[Question]:
        """What is asked about the picture of a row."""
        scene = training_scene(self.picture(index), len(self.features))
        chance = Chance((self.seed << 40) + index)
        if self.stage == "pretrain":
            return [replace(captioned(scene, chance), text="")]
        turns: list[Question] = []
        used = 0
        while True:
            if chance.maybe(CAPTIONS_AT_FIRST if 5 * index < self.rows else CAPTIONS):
                turn = captioned(scene, chance)
            else:
                turn = self._question(scene, chance)
            if self.is_chat(index) and turns:
                used = len(self._encode_chat(_said([*turns, turn]))[0])
            else:
                used += len(self._encoded(turn.text, turn.answer)[0]) - (self.start if turns else 0)
            if used > ROW_TOKENS:
                return turns
            turns.append(turn)
            if index // self.batch_size % SINGLE_STEPS == SINGLE_STEPS - 1:
                return turns

    def is_chat(self, index: int) -> bool:
        """Whether the questions of a row follow each other and the later see the earlier."""
        return self.stage == "finetune" and index // self.batch_size % CHAT_STEPS == 0

    def _question(self, scene: Scene, chance: Chance) -> Question:
        while True:
            question = ask(scene, chance, chance.one(ASKED_FAMILIES))
            kept = KEPT_COUNTS.get(question.answer, 1) if question else 0
            if question and chance.maybe(kept):
                return question if chance.maybe(ENDINGS) else replace(question, text=question.text.removesuffix(ENDING))

    def _encode(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        """Ids and labels of one question about the picture."""
        return self._encode_chat([(question, answer)])

    def _encode_chat(self, turns: list[tuple[str, str]]) -> tuple[list[int], list[int]]:
        """Ids and labels of a conversation about the picture."""
        template = "vicuna_v1" if turns[0][0] else "plain"
        return encode_conversation(self.processor, _conversation(turns), template)

    def unshown(self, turn: Question) -> list[tuple[int, int]]:
        """Where in an answer's tokens its `unshown` answers go another way, and their token there."""
        # Answers are encoded alike behind every question, and are few.
        question = "?" if turn.text else ""
        input_ids, labels = self._encoded(question, turn.answer)
        first = next(place for place, label in enumerate(labels) if label != IGNORE_INDEX)
        found = []
        for answer in turn.unshown:
            other_ids, _ = self._encoded(question, answer)
            pairs = enumerate(zip(input_ids, other_ids, strict=False))
            place, other = next((place, other) for place, (mine, other) in pairs if mine != other)
            found.append((place - first, other))
        return found

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        turns = self.turns(index)
        chat = self.is_chat(index)
        parts = [self._encode_chat(_said(turns))] if chat else [self._encoded(turn.text, turn.answer) for turn in turns]
        input_ids: list[int] = []
        labels: list[int] = []
        positions: list[int] = []
        segments: list[int] = []
        for number, (ids, learned) in enumerate(parts):
            # System turn and picture are the beginning of every question and stand in the row once.
            start = self.start if number else 0
            input_ids += ids[start:]
            labels += learned[start:]
            positions += range(start, len(ids))
            segments += [number + 1 if place >= self.start else 0 for place in range(start, len(ids))]
        unshown = [-1] * len(labels)
        starts = (
            place
            for place, (before, label) in enumerate(itertools.pairwise([IGNORE_INDEX, *labels]))
            if before == IGNORE_INDEX != label
        )
        for start, turn in zip(starts, turns, strict=True):
            for offset, token in self.unshown(turn):
                unshown[start + offset] = token
        tokenizer = self.processor.instruction_tokenizer
        instruction = training_instruction(_conversation(_said(turns if chat else turns[:1])), tokenizer)
        features = torch.from_numpy(self.features[self.picture(index)].astype(np.float32))
        return {
            "input_ids": torch.tensor(input_ids),
            "labels": torch.tensor(labels),
            "unshown": torch.tensor(unshown),
            "position_ids": torch.tensor(positions),
            "segments": torch.tensor(segments),
            "vision_features": features[None],
            "instruction_input_ids": torch.tensor([encode_instruction(tokenizer, instruction)]),
        }


class SideBySide(DataCollator):
    """Batches whose rows hold several questions, none of which sees another.

    Rows are padded to one of few lengths, so that a compiled model is compiled for these and no more.
    """

    lengths = (136, ROW_TOKENS)

    def __call__(self, items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        batch = super().__call__(items)
        found = batch["input_ids"].shape[1]
        length = next((length for length in self.lengths if length >= found), found)

        def padded(rows: list[torch.Tensor], value: int) -> torch.Tensor:
            return torch.stack([torch.nn.functional.pad(row, (0, length - len(row)), value=value) for row in rows])

        batch["input_ids"] = padded(list(batch["input_ids"]), self.pad_token_id)
        batch["labels"] = padded(list(batch["labels"]), IGNORE_INDEX)
        batch["unshown"] = padded([item["unshown"] for item in items], -1)
        batch["position_ids"] = padded([item["position_ids"] for item in items], 0)
        # The beginning is seen by all; the padding sees the beginning, because a row that sees nothing is not a number.
        segments = padded([item["segments"] for item in items], -1)
        seen = (segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None])
        seen &= torch.ones(length, length, dtype=torch.bool).tril()
        batch["attention_mask"] = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[:, None]
        return batch


class Pictures(Dataset):
    """Pixels of the scenes that both stages train on."""

    def __init__(self, count: int, processor: EmmaProcessor) -> None:
        self.count, self.processor = count, processor

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        picture = draw(training_scene(index, self.count))
        return self.processor.image_processor(picture, return_tensors="pt")["pixel_values"][0]


def vision_features(
    model: EmmaForConditionalGeneration, processor: EmmaProcessor, count: int, path: Path
) -> np.ndarray:
    """V of the first pictures, float16 (count, visual tokens, width), computed once and kept in a file.

    Each process computes its part.
    """
    shape = (count, processor.image_seq_length, model.config.vision_config.hidden_size)
    processes, half_written = PartialState(), path.with_suffix(".part")
    processes.wait_for_everyone()
    if not path.is_file() or path.stat().st_size != 2 * np.prod(shape):
        if processes.is_main_process:
            np.memmap(half_written, np.float16, "w+", shape=shape)
        processes.wait_for_everyone()
        features: np.memmap[Any, Any] = np.memmap(half_written, np.float16, "r+", shape=shape)
        with processes.split_between_processes(list(range(count))) as part:
            pictures = torch.utils.data.Subset(Pictures(count, processor), part)
            start = part[0]
        for pixels in tqdm(
            torch.utils.data.DataLoader(pictures, batch_size=128, num_workers=1),
            desc="vision features",
            disable=not processes.is_main_process,
        ):
            with torch.no_grad():
                found = model.get_vision_features(pixels.to(model.device))
            features[start : start + len(found)] = found.cpu().numpy()
            start += len(found)
        features.flush()
        processes.wait_for_everyone()
        if processes.is_main_process:
            half_written.rename(path)
        processes.wait_for_everyone()
    return np.memmap(path, np.float16, "r", shape=shape)
