"""Questions with lettered options: ScienceQA, MMBench and MuirBench, and what their tasks share."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from ...model.errors_emma import EmmaError
from .answers import LETTERS, first_line, lettered, option_lines, parse_letter
from .base import Figure, ImageSource, Sample, ScoredRow, Task
from .files import Row, image_of_base64, image_of_bytes, read_json, read_objects, read_parquet, read_table

LETTER = "\nAnswer with the option's letter from the given choices directly."
LETTER_CN = "\n请直接回答选项字母。"
_SCIENCE_SENTENCE = re.compile(r"The answer is ([A-Z]).")


class LetterTask(Task):
    """A task whose target is the letter of an option; `extra["options"]` has the text of each letter."""

    max_new_tokens = 128
    constants: tuple[str, ...] = ("A",)

    def parse(self, answer: str, sample: Sample) -> str | None:
        return parse_letter(answer, sample.extra["options"])

    def score(self, parsed: str | None, sample: Sample) -> float:
        return float(parsed == sample.target)


def exact_figures(rows: Sequence[ScoredRow]) -> dict[str, Figure]:
    """The accuracy of a script that takes an answer for right where it is the target, character by character."""
    return {"accuracy": Figure.of_hits(row.answer.strip() == row.sample.target for row in rows)}


def paste(images: Sequence[Callable[[], Image.Image]]) -> Callable[[], Image.Image]:
    """Several images side by side, at the top of a black image: `paste_images` of the authors' code."""

    def pasted() -> Image.Image:
        opened = [image().convert("RGB") for image in images]
        whole = Image.new("RGB", (sum(image.width for image in opened), max(image.height for image in opened)))
        left = 0
        for image in opened:
            whole.paste(image, (left, 0))
            left += image.width
        return whole

    return pasted


class ScienceQA(LetterTask):
    """ScienceQA: the test questions that have an image."""

    name, title = "scienceqa", "ScienceQA (test, questions with an image)"
    source = "https://scienceqa.github.io/#download"
    files = {"problems.json": source, "pid_splits.json": source, "test/": f"test.zip of {source}"}
    authors_rule = 'An answer must be the letter, "B. ..." or "The answer is B."; an option\'s text or "(B)" is wrong.'

    def read(self, folder: Path) -> list[Sample]:
        problems = read_objects(folder / "problems.json")
        splits = read_json(folder / "pid_splits.json")
        samples = []
        for identity in splits.get("test", []) if isinstance(splits, dict) else []:
            if identity not in problems:
                raise EmmaError(f"{folder / 'problems.json'} has no problem {identity}, which pid_splits.json names.")
            row = problems[identity]
            if row.optional("image"):
                samples.append(self.sample(folder, identity, row))
        return samples

    def sample(self, folder: Path, identity: str, row: Row) -> Sample:
        options = lettered([str(choice) for choice in row.get("choices", list)])
        target = row.get("answer", int)
        if not 0 <= target < len(options):
            raise EmmaError(f"{row.where}: `answer` must be the index of one of {len(options)} choices: got {target}.")
        question, hint = row.text("question"), row.optional("hint")
        prompt = f"{f'Context: {hint}' + chr(10) if hint else ''}{question}\n{option_lines(options)}{LETTER}"
        image = folder / "test" / identity / row.text("image")
        extra = {"options": options}
        kind = row.optional("subject")
        return Sample(identity, (image,), prompt, question, first_line(prompt), LETTERS[target], kind, extra)

    def authors_figures(self, rows: Sequence[ScoredRow]) -> dict[str, Figure]:
        return {"accuracy": Figure.of_hits(_science_letter(row.answer.strip()) == row.sample.target for row in rows)}


def _science_letter(answer: str) -> str | None:
    """The letter that LLaVA's script for ScienceQA reads."""
    if answer in tuple("ABCDE"):
        return answer
    if len(answer) >= 3 and answer[0] in "ABCDE" and answer[1:3] == ". ":
        return answer[0]
    named = _SCIENCE_SENTENCE.findall(answer)
    return named[0] if len(named) == 1 else None


class MMBench(LetterTask):
    """MMBench: each question once for every rotation of its options, right where all rotations are (CircularEval)."""

    source = "https://github.com/open-compass/MMBench"
    authors_rule = "Prints the mean over rotations as well as the circular figure; both are given here."

    def __init__(self, name: str, title: str, file: str, letter: str):
        self.name, self.title, self.file, self.letter = name, title, file, letter
        self.files = {file: self.source}

    def read(self, folder: Path) -> list[Sample]:
        samples = []
        for row in read_table(folder / self.file, "\t"):
            # Numbers from a million on are rotations of a question that stands in the file too; all are made here.
            index = row.text("index")
            if not index.isdecimal():
                raise EmmaError(f"{row.where}: `index` must be a whole number: got {index!r:.80}.")
            if int(index) < 1_000_000:
                samples += self.rotations(row)
        return samples

    def rotations(self, row: Row) -> list[Sample]:
        texts = [row.optional(letter) for letter in "ABCD"]
        texts = texts[: texts.index("")] if "" in texts else texts
        answer = LETTERS.index(row.one_of("answer", LETTERS[: len(texts)]))
        question, hint = row.text("question"), row.optional("hint")
        image = image_of_base64(row, "image")
        samples = []
        for rotation in range(len(texts)):
            options = lettered(texts[rotation:] + texts[:rotation])
            asked = f"{hint}\n{question}" if hint else question
            prompt = f"{asked}\n{option_lines(options)}{self.letter}"
            target = LETTERS[(answer - rotation) % len(texts)]
            identity = f"{row.text('index')}-{rotation}"
            extra = {"options": options, "question": row.text("index"), "rotation": rotation}
            kind = row.optional("category")
            samples.append(Sample(identity, (image,), prompt, question, first_line(prompt), target, kind, extra))
        return samples

    def parse(self, answer: str, sample: Sample) -> str | None:
        return answer.strip() if answer.strip() in sample.extra["options"] else None

    def figures(self, rows: Sequence[ScoredRow]) -> dict[str, Figure]:
        questions: dict[str, list[ScoredRow]] = {}
        for row in rows:
            questions.setdefault(row.sample.extra["question"], []).append(row)
        # A limit can cut the last question's rotations short.
        whole = [group for group in questions.values() if len(group) == len(group[0].sample.extra["options"])]
        first = [row.score == 1 for row in rows if row.sample.extra["rotation"] == 0]
        return {
            "circular accuracy": Figure.of_hits(all(row.score == 1 for row in group) for group in whole),
            "accuracy over all rotations": Figure.of_hits(row.score == 1 for row in rows),
            "accuracy of the first order": Figure.of_hits(first),
        }


class MuirBench(LetterTask):
    """MuirBench: questions about several images, given one by one or, as in the paper, pasted into one."""

    source = "https://huggingface.co/datasets/MUIRBENCH/MUIRBENCH"
    files = {"data/test-*.parquet": source}

    def __init__(self, pasted: bool):
        self.pasted = pasted
        self.name = "muirbench-pasted" if pasted else "muirbench"
        self.title = f"MuirBench (test, {'images pasted into one' if pasted else 'several images'})"
        self.authors_rule = "An answer is right where it is the letter exactly." + (
            "" if pasted else " The images are pasted into one, as in the task muirbench-pasted."
        )

    def read(self, folder: Path) -> list[Sample]:
        return [self.sample(row) for row in read_parquet(folder, "data/test-*.parquet")]

    def sample(self, row: Row) -> Sample:
        options = [str(option) for option in row.get("options", list)]
        target = row.one_of("answer", LETTERS[: len(options)])
        images = [image_of_bytes(row, value) for value in row.get("image_list", list)]
        question = row.text("question")
        if self.pasted:
            before, mark, after = question.partition("<image>")
            question = before + mark + after.replace("<image>", "Right Image")
            marked = [place for place, option in enumerate(options) if "<image>" in option]
            options = [f"Image {marked.index(n) + 2}" if n in marked else option for n, option in enumerate(options)]
            letters = ", ".join(LETTERS[: len(options)])
            ending = f"\nAnswer with the option's letter {letters} directly ."
        else:
            ending = LETTER
        shown: tuple[ImageSource, ...] = (paste(images),) if self.pasted else tuple(images)
        prompt = f"{question}\n{option_lines(lettered(options))}{ending}"
        if prompt.count("<image>") != len(shown):
            # Then they all stand in front of the text, where nothing else says where.
            prompt = prompt.replace("<image>", "(image)")
        extra = {"options": lettered(options), "relation": row.optional("image_relation")}
        bare = row.text("question").replace("<image>", "").strip()
        return Sample(row.text("idx"), shown, prompt, bare, first_line(question), target, row.optional("task"), extra)

    def authors_figures(self, rows: Sequence[ScoredRow]) -> dict[str, Figure]:
        figures = exact_figures(rows)
        for relation in sorted({row.sample.extra["relation"] for row in rows}):
            of_relation = [row for row in rows if row.sample.extra["relation"] == relation]
            figures[f"accuracy, {relation}"] = exact_figures(of_relation)["accuracy"]
        return figures


CHOICE_TASKS: tuple[Task, ...] = (
    ScienceQA(),
    MMBench("mmbench-en", "MMBench (English, dev)", "mmbench_dev_20230712.tsv", LETTER),
    MMBench("mmbench-cn", "MMBench (Chinese, dev)", "mmbench_dev_cn_20231003.tsv", LETTER_CN),
    MuirBench(pasted=False),
    MuirBench(pasted=True),
)

__all__ = ["CHOICE_TASKS", "LETTER", "LetterTask", "MMBench", "MuirBench", "ScienceQA", "exact_figures", "paste"]
