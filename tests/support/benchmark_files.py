"""A handful of rows of each benchmark in its own files, what knows their answers, and English without NLTK and spaCy."""

import base64
import csv
import io
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from emma_hf.evaluation.tasks import TASKS, Sample, Task
from emma_hf.evaluation.tasks.amber import Amber, AmberGenerative


class SplitWords:
    """Every word is a noun; words that begin with the same four letters are similar."""

    def nouns(self, text: str) -> list[str]:
        return text.lower().replace(".", " ").replace(",", " ").split()

    def similar(self, first: str, second: str) -> bool:
        return first[:4] == second[:4]


def task_of(name: str) -> Task:
    """The task of a name; those with AMBER's descriptions with `SplitWords`."""
    described = {"amber-generative": AmberGenerative, "amber": Amber}
    return described[name](SplitWords) if name in described else TASKS[name]


def write_benchmark(name: str, folder: Path) -> None:
    """Write the files of a task into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    WRITERS[name](folder)


def perfect_answer(sample: Sample) -> str:
    """The answer that is right, as a model would say it."""
    target = sample.target
    if isinstance(target, dict):
        return " ".join(target["truth"])
    return Counter(target).most_common(1)[0][0] if isinstance(target, list) else target


def encode_image(number: int, form: str = "PNG") -> bytes:
    """A small image, another for each number."""
    stream = io.BytesIO()
    Image.new("RGB", (24 + number % 5, 20), (40 * number % 256, 90, 255 - 25 * number % 256)).save(stream, form)
    return stream.getvalue()


def write_images(folder: Path, names: list[str]) -> None:
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_image(number, "PNG" if name.endswith("png") else "JPEG"))


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def people(*counts: tuple[str, int]) -> list[str]:
    return [answer for answer, count in counts for _ in range(count)]


def coco(number: int) -> str:
    return f"val2014/COCO_val2014_{number:012d}.jpg"


# What ten people said to each question; three colors have three votes at most.
VOTES = [
    people(("yes", 10)),
    people(("no", 9), ("yes", 1)),
    people(("2", 6), ("3", 4)),
    people(("red", 3), *((color, 1) for color in ("blue", "green", "pink", "gray", "black", "white", "brown"))),
]
QUESTIONS = ["Is it day?", "Is there a dog?", "How many cats are there?", "What color is the car?"]


def _coco_questions(folder: Path, questions: str, annotations: str, more: list[dict], names: dict) -> None:
    asked = [{"image_id": 100 + n, "question": q, "question_id": 1000 + n} for n, q in enumerate(QUESTIONS)]
    answered = [
        {
            "question_id": 1000 + n,
            "image_id": 100 + n,
            "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": i + 1} for i, a in enumerate(votes)],
            **more[n],
        }
        for n, votes in enumerate(VOTES)
    ]
    write_json(folder / questions, {"questions": asked})
    # The two files need not have the same order.
    write_json(folder / annotations, {"annotations": answered[::-1], **names})
    write_images(folder, [coco(100 + n) for n in range(4)])


def _vqav2(folder: Path) -> None:
    kinds = [{"answer_type": kind, "question_type": "is"} for kind in ("yes/no", "yes/no", "number", "other")]
    files = ("v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json")
    _coco_questions(folder, *files, kinds, {})


def _okvqa(folder: Path) -> None:
    kinds = [{"answer_type": "other", "question_type": kind} for kind in ("one", "one", "two", "two")]
    names = {"question_types": {"one": "Vehicles and Transportation", "two": "Brands, Companies and Products"}}
    files = ("OpenEnded_mscoco_val2014_questions.json", "mscoco_val2014_annotations.json")
    _coco_questions(folder, *files, kinds, names)


def _vizwiz(folder: Path) -> None:
    asked = ["What IS this?", "what color is this", "Is this milk", "Can you read it?"]
    votes = [
        people(("unanswerable", 10)),
        people(("red", 8), ("unanswerable", 2)),
        people(("yes", 10)),
        people(("no", 5), ("unanswerable", 5)),
    ]
    kinds = ["unanswerable", "other", "yes/no", "yes/no"]
    rows = [
        {
            "image": f"VizWiz_val_0000000{n}.jpg",
            "question": question,
            "answers": [{"answer": answer, "answer_confidence": "yes"} for answer in votes[n]],
            "answer_type": kinds[n],
            "answerable": int(kinds[n] != "unanswerable"),
        }
        for n, question in enumerate(asked)
    ]
    write_json(folder / "val.json", rows)
    write_images(folder, [f"val/{row['image']}" for row in rows])


def _textvqa(folder: Path) -> None:
    asked = ["what is the brand?", "what does it say?", "is it open?", "what is the number?"]
    votes = [people(("nokia", 10)), people(("no", 4), ("stop", 6)), people(("yes", 10)), people(("12", 10))]
    rows = [
        {"question_id": 34602 + n, "question": question, "image_id": f"003a8ae2ef43b90{n // 2}", "answers": votes[n]}
        for n, question in enumerate(asked)
    ]
    tokens = [
        {"image_id": f"003a8ae2ef43b90{n}", "ocr_tokens": words, "ocr_info": []}
        for n, words in enumerate([["NOKIA", "STOP"], []])
    ]
    write_json(folder / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": rows})
    write_json(folder / "TextVQA_Rosetta_OCR_v0.2_val.json", {"dataset_type": "val", "data": tokens})
    write_images(folder, [f"train_images/003a8ae2ef43b90{n}.jpg" for n in range(2)])


def _gqa(folder: Path) -> None:
    asked = [("Is it cloudy?", "yes", "verify"), ("Is it wet?", "no", "verify"), ("Is the bag red?", "no", "verify")]
    asked += [("Who is there?", "man", "query"), ("What is that?", "fire hydrant", "query")]
    rows = {
        f"20106861{n}": {
            "question": question,
            "answer": answer,
            "imageId": f"n16131{n}",
            "types": {"structural": kind, "semantic": "global", "detailed": "x"},
            "isBalanced": True,
        }
        for n, (question, answer, kind) in enumerate(asked)
    }
    write_json(folder / "testdev_balanced_questions.json", rows)
    write_images(folder, [f"images/n16131{n}.jpg" for n in range(5)])


def _scienceqa(folder: Path) -> None:
    def problem(question: str, choices: list[str], answer: int, image: str | None, hint: str, subject: str) -> dict:
        return {
            "question": question, "choices": choices, "answer": answer, "image": image, "hint": hint,
            "subject": subject, "split": "test", "task": "closed choice",
        }  # fmt: skip

    problems = {
        "4": problem("Which is farthest north?", ["Maine", "Ohio", "Iowa"], 0, "image.png", "", "social science"),
        "5": problem(
            "Which is a rock?", ["a bird", "granite"], 1, "image.png", "Look at it.\nTwice.", "natural science"
        ),
        "6": problem("Which word is a verb?", ["run", "dog"], 0, None, "", "language science"),
        "7": problem("What is it made of?", ["wood", "wool"], 1, "image.png", "", "natural science"),
        "8": problem("Where is it?", ["here", "there"], 0, "image.png", "", "social science"),
        "9": problem("A training question?", ["yes", "no"], 0, "image.png", "", "natural science"),
    }
    write_json(folder / "problems.json", problems)
    write_json(folder / "pid_splits.json", {"train": ["9"], "test": ["4", "5", "6", "7", "8"]})
    write_images(folder, [f"test/{pid}/image.png" for pid in "4578"])


def write_table(path: Path, delimiter: str, rows: list[dict]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def _mmbench(folder: Path, file: str, hint: str) -> None:
    def row(index: int, question: str, hint: str, options: list[str], answer: str, category: str) -> dict:
        letters = dict(zip("ABCD", [*options, "", "", ""]))
        image = base64.b64encode(encode_image(index % 9, "JPEG")).decode()
        return {
            "index": index, "question": question, "hint": hint, **letters, "answer": answer,
            "category": category, "image": image, "source": "made", "l2-category": category, "comment": "", "split": "dev",
        }  # fmt: skip

    rows = [
        row(241, "Which one is right?", hint, ["cat", "dog", "cow", "pig"], "A", "object_localization"),
        row(252, 'Which "color"?\tOr none?', "nan", ["red", "blue"], "B", "attribute_recognition"),
        # A rotation that the file holds itself.
        row(1000252, 'Which "color"?\tOr none?', "nan", ["blue", "red"], "A", "attribute_recognition"),
        row(258, "Where is it?", "", ["left", "right", "above"], "C", "object_localization"),
    ]
    write_table(folder / file, "\t", rows)


def write_parquet(path: Path, rows: list[dict]) -> None:
    import pyarrow
    from pyarrow.parquet import write_table as write_parquet_table

    path.parent.mkdir(parents=True, exist_ok=True)
    write_parquet_table(pyarrow.Table.from_pylist(rows), path)


def image_field(number: int) -> dict:
    return {"bytes": encode_image(number), "path": f"{number}.png"}


def _muirbench(folder: Path) -> None:
    def row(number: int, question: str, options: list[str], answer: str, images: int, task: str, relation: str) -> dict:
        return {
            "idx": f"{number}", "task": task, "image_relation": relation, "image_type": "Drone", "question": question,
            "options": options, "answer": answer, "image_list": [image_field(number + n) for n in range(images)],
            "counterpart_idx": "none",
        }  # fmt: skip

    rows = [
        row(
            1,
            "Do <image> and <image> match?",
            ["Yes", "No", "None of them"],
            "A",
            2,
            "Scene Understanding",
            "Ordered_Pages",
        ),
        row(2, "Which fits <image>?", ["<image>", "<image>"], "B", 3, "Image-Text Matching", "Partial Similarity"),
        row(3, "How many dogs are in all?", ["one", "two"], "B", 2, "Counting", "Partial Similarity"),
        row(4, "<image><image> Which is older?", ["first", "second"], "A", 2, "Scene Understanding", "Ordered_Pages"),
    ]
    write_parquet(folder / "data/test-00000-of-00001.parquet", rows)


def _mmmu(folder: Path) -> None:
    def row(subject: str, number: int, question: str, options: list[str], answer: str, images: int) -> dict:
        fields = {f"image_{n}": image_field(n) if n <= images else None for n in range(1, 8)}
        return {
            "id": f"validation_{subject}_{number}", "question": question, "options": repr(options), "answer": answer,
            "question_type": "multiple-choice" if options else "open", "subfield": "x", **fields,
        }  # fmt: skip

    art = [
        row("Art_Theory", 1, "Who painted <image 1>?", ["Monet", "Klimt", "Dürer"], "A", 1),
        row("Art_Theory", 2, "Compare <image 1> and <image 2>.", ["older", "newer"], "B", 2),
    ]
    mathematics = [
        row("Math", 1, "What is x in <image 1>?", [], "42", 1),
        row("Math", 2, "What is y in <image 1>?", [], "['1/3', '0.333']", 1),
    ]
    write_parquet(folder / "Art_Theory/validation-00000-of-00001.parquet", art)
    write_parquet(folder / "Math/validation-00000-of-00001.parquet", mathematics)


def _mathvista(folder: Path) -> None:
    def row(pid: int, question: str, answer: str, kind: str, **more: Any) -> dict:
        return {
            "pid": str(pid), "question": question, "image": f"images/{pid}.jpg", "choices": None, "unit": None,
            "precision": None, "answer": answer, "question_type": "free_form", "answer_type": kind,
            "metadata": {"task": "figure question answering", "language": "english"}, **more,
        }  # fmt: skip

    chosen = {"choices": ["3/11", "8/11", "6/11"], "question_type": "multi_choice"}
    second = {"choices": ["larger", "smaller"], "question_type": "multi_choice"}
    rows = [
        row(
            1,
            "What fraction is blue?",
            "3/11",
            "text",
            **chosen,
            query="Hint: Choose.\nQuestion: What fraction is blue?",
        ),
        row(2, "Which?", "smaller", "text", **second, metadata={"task": "geometry problem solving"}),
        row(3, "Which number is missing?", "14", "integer"),
        row(4, "How much does it cost?", "1.45", "float", precision=2.0, unit="$"),
        row(5, "Which two years?", "[2007, 2008]", "list"),
    ]
    write_json(folder / "annot_testmini.json", {row["pid"]: row for row in rows})
    write_images(folder, [row["image"] for row in rows])


def _mmvp(folder: Path) -> None:
    asked = [("Is the dog facing left?", "(a) Yes (b) No"), ("Is the door open?", "(a) Open (b) Closed")]
    rows = [
        {
            "Index": 2 * pair + half + 1,
            "Question": question,
            "Options": options,
            "Correct Answer": "(a)" if half else "(b)",
        }
        for pair, (question, options) in enumerate(asked)
        for half in range(2)
    ]
    # Two of the published labels that are wrong.
    tusks = "Does the elephant have long or short tusks?"
    options = "(a) Long tusks (b) Short tusks"
    rows += [{"Index": 99, "Question": tusks, "Options": options, "Correct Answer": "(a)"}]
    rows += [{"Index": 100, "Question": tusks, "Options": options, "Correct Answer": "(b)"}]
    write_table(folder / "Questions.csv", ",", rows)
    write_images(folder, [f"MMVP Images/{row['Index']}.jpg" for row in rows])


def _pope(folder: Path) -> None:
    for split, labels in (("random", "yn"), ("popular", "ynn"), ("adversarial", "ynyn")):
        rows = [
            {
                "question_id": n + 1,
                "image": Path(coco(310 + n)).name,
                "text": f"Is there a {split} thing in the image?",
                "label": "yes" if label == "y" else "no",
            }
            for n, label in enumerate(labels)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"coco_pope_{split}.json").write_text(lines, encoding="utf-8")
    write_images(folder, [coco(310 + n) for n in range(4)])


def _amber(folder: Path) -> None:
    said = [
        ("generative", ["sky", "person"], ["cloud", "dog"]),
        ("generative", ["beach"], ["bird"]),
        *((f"discriminative-attribute-{kind}", truth) for kind in ("state", "number") for truth in ("yes", "no")),
        *[("discriminative-hallucination", "no")] * 3,
        *[("discriminative-relation", "yes"), ("relation", "no"), ("relation", "no")],
    ]
    annotations = [
        {"id": n, "type": kind, "truth": truth, **({"hallu": rest[0]} if rest else {})}
        for n, (kind, truth, *rest) in enumerate(said, 1)
    ]
    queries = {"generative": range(1, 3), "discriminative-attribute": range(3, 7)}
    queries |= {"discriminative-existence": range(7, 10), "discriminative-relation": range(10, 13)}
    for name, numbers in queries.items():
        query = "Describe this image." if name == "generative" else "Is there a {} in this image?"
        rows = [{"id": n, "image": f"AMBER_{n % 2 + 1}.jpg", "query": query.format(f"thing {n}")} for n in numbers]
        write_json(folder / f"data/query/query_{name}.json", rows)
    write_json(folder / "data/annotations.json", annotations)
    related = {
        "sky": [],
        "person": ["man", "woman"],
        "cloud": [],
        "dog": [],
        "beach": ["sand"],
        "bird": [],
        "orange": [],
    }
    write_json(folder / "data/relation.json", related)
    (folder / "data/safe_words.txt").write_text("orange\nline\n", encoding="utf-8")
    write_images(folder, ["image/AMBER_1.jpg", "image/AMBER_2.jpg"])


def _foil(folder: Path) -> None:
    annotations = [
        {
            "image_id": 391895 + n, "id": 770 + n, "foil": foil, "caption": f"A {'cat' if foil else 'dog'} on chair {n}.",
            "target_word": "dog" if foil else "ORIG", "foil_word": "cat" if foil else "ORIG", "foil_id": n,
        }
        for n in range(3)
        for foil in (False, True)
    ]  # fmt: skip
    write_json(folder / "foilv1.0_test_2017.json", {"info": {}, "annotations": annotations, "images": []})
    write_images(folder, [coco(391895 + n) for n in range(3)])


WRITERS: dict[str, Callable[[Path], None]] = {
    "vqav2": _vqav2,
    "okvqa": _okvqa,
    "vizwiz": _vizwiz,
    "textvqa": _textvqa,
    "textvqa-no-ocr": _textvqa,
    "gqa": _gqa,
    "scienceqa": _scienceqa,
    "mmbench-en": lambda folder: _mmbench(folder, "mmbench_dev_20230712.tsv", "Look at it.\nTwice."),
    "mmbench-cn": lambda folder: _mmbench(folder, "mmbench_dev_cn_20231003.tsv", "请看图片。"),
    "muirbench": _muirbench,
    "muirbench-pasted": _muirbench,
    "mmmu": _mmmu,
    "mmmu-pasted": _mmmu,
    "mathvista": _mathvista,
    "mmvp": _mmvp,
    "pope": _pope,
    "amber-discriminative": _amber,
    "amber-generative": _amber,
    "amber": _amber,
    "foil": _foil,
}
