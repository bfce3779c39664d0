"""Training rows and test questions of the replication, the same for all arms."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm

from ...data.conversations import IGNORE_INDEX, encode_conversation
from ...model.instruction_emma import encode_instruction
from ...model.processing_emma import EmmaProcessor
from ..questions import ENDING, QUESTION_FAMILIES, Question, ask, ask_all
from ..rows import TEST_SEEDS, training_scene
from ..scenes import Scene, SeededRandom
from .arms import Arm

# The test's scenes lie behind those of fifty evaluations of emma-tiny.
TEST_SCENES = TEST_SEEDS + 500_000_000
# The family of questions about the smallest thing of a scene.
SMALLEST = "smallest"


@dataclass(frozen=True)
class Encoded:
    """A question in tokens.

    Args:
        before: ids before the picture, the same for every question.
        question: ids of the question alone.
        after: ids behind the picture: question, answer, end of sequence.
        answer: index in `after` at which the answer begins.
        instruction: ids for the instruction encoder, (instruction length,).
    """

    before: list[int]
    question: list[int]
    after: list[int]
    answer: int
    instruction: list[int]


def training_question(images: int, families: Sequence[str], rng: SeededRandom) -> tuple[int, Question]:
    """The index of a random training image, and a question of a random family about it."""
    while True:
        image = rng.integer(0, images - 1)
        question = ask(training_scene(image, images), rng, rng.choice(families))
        # Not every image allows every family.
        if question is not None:
            return image, replace(question, text=question.text.removesuffix(ENDING))


def smallest_question(scene: Scene, rng: SeededRandom) -> Question | None:
    """A question about the color or the shape of the smallest thing, or None where no words mean it alone."""
    smallest = min(scene.things, key=lambda thing: thing.radius)
    choices = [
        (family, names)
        for family in ("colour", "shape")
        for names, thing in scene.references
        if thing is smallest and family not in names
    ]
    if not choices or len(scene.things) == 1:
        return None
    family, names = rng.choice(choices)
    words = [getattr(smallest, name) for name in names] + ([] if "shape" in names else ["thing"])
    text = rng.choice(QUESTION_FAMILIES[family].wordings).format(first=" ".join(words))
    return Question(text, getattr(smallest, family).capitalize(), SMALLEST)


def questions_of_test(scenes: int, families: Sequence[str]) -> list[tuple[int, Question]]:
    """Index of the scene and question: one of each family that a scene allows, and one about its smallest thing."""
    questions = []
    for index in range(scenes):
        scene, rng = Scene.random(TEST_SCENES + index), SeededRandom((TEST_SCENES + index) << 32)
        asked = [
            replace(each, text=each.text.removesuffix(ENDING))
            for each in ask_all(scene, rng)
            if each.family in families
        ]
        smallest = smallest_question(scene, rng)
        questions += [(index, question) for question in [*asked, *([smallest] if smallest else [])]]
    return questions


def encode(question: Question, processor: EmmaProcessor) -> Encoded:
    """A question and its answer in tokens."""
    messages = [{"from": "human", "value": f"<image>\n{question.text}"}, {"from": "gpt", "value": question.answer}]
    input_ids, labels = encode_conversation(processor, messages, "vicuna_v1")
    start = input_ids.index(processor.image_token_id)
    end = start + processor.image_seq_length
    answer = next(index for index, label in enumerate(labels) if label != IGNORE_INDEX)
    return Encoded(
        input_ids[:start],
        processor.tokenizer(f" {question.text}\n", add_special_tokens=False)["input_ids"],
        input_ids[end:],
        answer - end,
        encode_instruction(processor.instruction_tokenizer, question.text),
    )


@dataclass
class TrainingRows:
    """The rows of one seed: images in their order, and their questions.

    Args:
        images: index of each row's image.
        asked: index in `encoded` of each row's question.
        others: for each row the row whose instruction it has in the arm with shuffled instructions.
        encoded: the questions, each once.
    """

    images: list[int]
    asked: list[int]
    others: list[int]
    encoded: list[Encoded]

    def questions(self, rows: Iterable[int]) -> list[Encoded]:
        """The questions of some rows."""
        return [self.encoded[self.asked[row]] for row in rows]

    @classmethod
    def make(
        cls, seed: int, rows: int, images: int, families: Sequence[str], processor: EmmaProcessor
    ) -> "TrainingRows":
        """The rows of a seed."""
        chosen, asked = [], []
        places: dict[Question, int] = {}
        for index in tqdm(range(rows), desc="questions", delay=2):
            image, question = training_question(images, families, SeededRandom((seed << 40) + index))
            chosen.append(image)
            asked.append(places.setdefault(question, len(places)))
        others = SeededRandom((seed << 40) - 1).sample(range(rows), rows)
        return cls(chosen, asked, others, [encode(question, processor) for question in places])


def collate(
    encoded: Sequence[Encoded], arm: Arm, tokens: int, processor: EmmaProcessor, shared: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prompts and answers, padded at their ends.

    Args:
        encoded: questions.
        arm: whether the question also stands before the picture.
        tokens: visual tokens.
        processor: names the tokens of the picture and of the padding.
        shared: how many of the tokens before the picture are kept, which are the same in every prompt.

    Returns:
        `input_ids`, `attention_mask`, `is_image` and `labels`, each (rows, tokens).
    """
    rows, labels = [], []
    for each in encoded:
        before = [*each.before[:shared], *(each.question if arm.question_first else [])]
        row = [*before, *[processor.image_token_id] * tokens, *each.after]
        start = len(row) - len(each.after) + each.answer
        rows.append(row)
        labels.append([IGNORE_INDEX] * start + row[start:])
    length = max(map(len, rows))
    pad = processor.tokenizer.pad_token_id
    input_ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows])
    attention_mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    targets = torch.tensor([row + [IGNORE_INDEX] * (length - len(row)) for row in labels])
    is_image = (input_ids == processor.image_token_id) & attention_mask.bool()
    return input_ids, attention_mask, is_image, targets


def instruction_ids(text: str, processor: EmmaProcessor) -> list[int]:
    """Ids of an instruction, (instruction length,)."""
    return encode_instruction(processor.instruction_tokenizer, text)


def end_tokens(instructions: torch.Tensor, processor: EmmaProcessor) -> torch.Tensor:
    """Index of the first end token of each row of ids (rows, instruction length)."""
    return (instructions == processor.instruction_tokenizer.eos_token_id).int().argmax(-1)
