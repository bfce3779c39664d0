"""Questions with free answers: VQAv2, OKVQA, VizWiz and TextVQA (ten people's answers each) and GQA (one)."""

from collections.abc import Sequence
from pathlib import Path

from ...model.errors_emma import EmmaError
from .answers import process_answer
from .base import Figure, Sample, ScoredRow, Task
from .files import Row, read_list, read_object, read_objects

SHORT = "\nAnswer the question using a single word or phrase."
SHORT_OR_UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'." + SHORT
COCO_IMAGES = "COCO 2014 val images, http://images.cocodataset.org/zips/val2014.zip"


def soft_accuracy(answer: str, people: Sequence[str]) -> float:
    """VQA's accuracy: min(n / 3, 1) with n the number of people who agree, averaged over leaving each of them out.

    Args:
        answer: the processed answer.
        people: the processed answers of people, ten of them.
    """
    agree = sum(person == answer for person in people)
    without_one_of_them = min(1.0, max(0, agree - 1) / 3)
    without_another = min(1.0, agree / 3)
    return (agree * without_one_of_them + (len(people) - agree) * without_another) / len(people)


class FreeAnswers(Task):
    """A task whose answers are scored by the soft accuracy against people's answers."""

    def parse(self, answer: str, sample: Sample) -> str | None:
        return process_answer(answer) if answer.strip() else None

    def score(self, parsed: str | None, sample: Sample) -> float:
        return 0.0 if parsed is None else soft_accuracy(parsed, sample.target)


def free_sample(
    row: Row, identity: str, image: Path, texts: tuple[str, str], people: list[str], kind: str = ""
) -> Sample:
    """The sample of a question and of what follows it in the prompt.

    Raises:
        EmmaError: nobody has answered the question.
    """
    if not people:
        raise EmmaError(f"{row.where} must have answers of people: got none.")
    question, rest = texts
    answers = [process_answer(answer) for answer in people]
    return Sample(identity, (image,), question + rest, question, question.split("\n")[0], answers, kind)


class CocoQuestions(FreeAnswers):
    """VQAv2 and OKVQA: a file of questions, one of annotations, and COCO's images."""

    def __init__(self, name: str, title: str, files: tuple[str, str], source: str, kind: str, authors_rule: str):
        self.name, self.title, self.authors_rule = name, title, authors_rule
        self.questions, self.annotations = files
        self.kind = kind
        self.files = {**dict.fromkeys(files, source), "val2014/": COCO_IMAGES}
        self.constants = ("yes", "no") if name == "vqav2" else ()

    def read(self, folder: Path) -> list[Sample]:
        file = read_object(folder / self.annotations)
        annotations = {row.text("question_id"): row for row in file.rows("annotations")}
        # OKVQA's file says what its codes of categories mean.
        names = file.values.get("question_types", {})
        samples = []
        for row in read_object(folder / self.questions).rows("questions"):
            identity = row.text("question_id")
            if identity not in annotations:
                raise EmmaError(f"{row.where}: {folder / self.annotations} has no annotation of question {identity}.")
            annotation = annotations[identity]
            image = folder / "val2014" / f"COCO_val2014_{row.get('image_id', int):012d}.jpg"
            people = [answer.text("answer") for answer in annotation.rows("answers")]
            kind = annotation.optional(self.kind)
            samples.append(
                free_sample(row, identity, image, (row.text("question"), SHORT), people, names.get(kind, kind))
            )
        return samples


class VizWiz(FreeAnswers):
    """VizWiz: photographs and questions of blind people, many of which cannot be answered."""

    name, title = "vizwiz", "VizWiz (val)"
    files = {
        "val.json": "Annotations.zip of https://vizwiz.org/tasks-and-datasets/vqa/",
        "val/": "val.zip of https://vizwiz.org/tasks-and-datasets/vqa/",
    }
    authors_rule = "Writes the answers to the test set for VizWiz's server; the paper's figure is of that set."
    constants = ("unanswerable",)

    def read(self, folder: Path) -> list[Sample]:
        samples = []
        for row in read_list(folder / "val.json"):
            image = row.text("image")
            people = [answer.text("answer") for answer in row.rows("answers")]
            # In this case LLaVA's file and lmms-eval ask the question.
            texts = (row.text("question").capitalize(), SHORT_OR_UNANSWERABLE)
            kind = row.optional("answer_type")
            samples.append(free_sample(row, Path(image).stem, folder / "val" / image, texts, people, kind))
        return samples

    def figures(self, rows: Sequence[ScoredRow]) -> dict[str, Figure]:
        figures = super().figures(rows)
        figures['answers "unanswerable"'] = Figure.of_hits(row.parsed == "unanswerable" for row in rows)
        return figures


class TextVQA(FreeAnswers):
    """TextVQA: questions about text in photographs, with or without the tokens that an OCR system read there."""

    source = "https://textvqa.org/dataset/"

    def __init__(self, ocr: bool):
        self.ocr = ocr
        self.name = "textvqa" if ocr else "textvqa-no-ocr"
        self.title = f"TextVQA (val, {'with' if ocr else 'without'} OCR tokens)"
        tokens = {"TextVQA_Rosetta_OCR_v0.2_val.json": self.source} if ocr else {}
        images = {"train_images/": f"train_val_images.zip of {self.source}"}
        self.files = {"TextVQA_0.5.1_val.json": self.source, **tokens, **images}
        self.authors_rule = "" if ocr else "The authors' prompt holds the OCR tokens, as the task textvqa does."

    def read(self, folder: Path) -> list[Sample]:
        tokens = {}
        if self.ocr:
            rows = read_object(folder / "TextVQA_Rosetta_OCR_v0.2_val.json").rows("data")
            tokens = {row.text("image_id"): ", ".join(map(str, row.get("ocr_tokens", list))) for row in rows}
        samples = []
        for row in read_object(folder / "TextVQA_0.5.1_val.json").rows("data"):
            image = row.text("image_id")
            people = [str(answer) for answer in row.get("answers", list)]
            reference = f"\nReference OCR token: {tokens.get(image, '')}" if self.ocr else ""
            # In this case LLaVA's file and lmms-eval ask the question.
            texts = (row.text("question").capitalize(), reference + SHORT)
            path = folder / "train_images" / f"{image}.jpg"
            samples.append(free_sample(row, row.text("question_id"), path, texts, people))
        return samples


class GQA(Task):
    """GQA: compositional questions with one right answer each."""

    name, title = "gqa", "GQA (testdev, balanced)"
    files = {
        "testdev_balanced_questions.json": "questions1.2.zip of https://cs.stanford.edu/people/dorarad/gqa/download.html",
        "images/": "images.zip of https://cs.stanford.edu/people/dorarad/gqa/download.html",
    }
    constants = ("yes", "no")

    def read(self, folder: Path) -> list[Sample]:
        samples = []
        for identity, row in read_objects(folder / "testdev_balanced_questions.json").items():
            question, answer = row.text("question"), row.text("answer").lower()
            image = folder / "images" / f"{row.text('imageId')}.jpg"
            kind = str(row.get("types", dict).get("structural", "")) if "types" in row.values else ""
            samples.append(Sample(identity, (image,), question + SHORT, question, question, answer, kind))
        return samples

    def parse(self, answer: str, sample: Sample) -> str | None:
        return answer.strip().rstrip(".").lower() or None

    def score(self, parsed: str | None, sample: Sample) -> float:
        return float(parsed == sample.target)


VQA_TASKS: tuple[Task, ...] = (
    CocoQuestions(
        "vqav2",
        "VQAv2 (val)",
        ("v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"),
        "https://visualqa.org/download.html",
        "answer_type",
        "Writes the answers to test-dev 2015 for the server of VQA; the paper's figure is of that set.",
    ),
    CocoQuestions(
        "okvqa",
        "OKVQA (val2014)",
        ("OpenEnded_mscoco_val2014_questions.json", "mscoco_val2014_annotations.json"),
        "https://okvqa.allenai.org/download.html",
        "question_type",
        "The authors published no script for OKVQA; this prompt is the usual one.",
    ),
    VizWiz(),
    TextVQA(ocr=True),
    TextVQA(ocr=False),
    GQA(),
)

__all__ = [
    "COCO_IMAGES",
    "GQA",
    "SHORT",
    "VQA_TASKS",
    "CocoQuestions",
    "FreeAnswers",
    "TextVQA",
    "VizWiz",
    "soft_accuracy",
]
