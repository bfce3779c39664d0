"""AMBER: hallucinations in yes-or-no answers and in descriptions."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

from ...model.errors_emma import EmmaError, MissingPackageError
from .base import Figure, Sample, ScoredRow, Task
from .files import Row, read_json, read_list, read_words
from .yes_no import YesNoTask, class_figures, of_kind

SOURCE = "https://github.com/junyangwang0410/AMBER"
IMAGES = f"the images that the README of {SOURCE} links to"
ANNOTATIONS = "data/annotations.json"
DESCRIPTIONS = "descriptions"
EXTRA = "pip install 'emma-hf[evaluation]'"


def read_annotations(folder: Path) -> list[Row]:
    """AMBER's annotations; the one of id n is element n - 1.

    Raises:
        EmmaError: an element has another id.
    """
    rows = read_list(folder / ANNOTATIONS)
    for number, row in enumerate(rows, 1):
        if row.get("id", int) != number:
            raise EmmaError(f"{row.where} must have the id {number}: got {row.values['id']}.")
    return rows


def annotation_of(query: Row, annotations: Sequence[Row]) -> Row:
    """The annotation of a query."""
    number = query.get("id", int)
    if not 1 <= number <= len(annotations):
        raise EmmaError(f"{query.where}: {ANNOTATIONS} has no annotation {number}, only 1 to {len(annotations)}.")
    return annotations[number - 1]


class AmberDiscriminative(YesNoTask):
    """AMBER's yes-or-no questions on existence, attributes and relations."""

    name, title = "amber-discriminative", "AMBER (yes or no)"
    dimensions = ("existence", "attribute", "relation")
    files = {
        **{f"data/query/query_discriminative-{dimension}.json": SOURCE for dimension in dimensions},
        ANNOTATIONS: SOURCE,
        "image/": IMAGES,
    }
    authors_rule = (
        "Compares each answer exactly with the truth of the next question and never counts the last one as right; "
        "on the relations it ends with an error at the last question."
    )

    def read(self, folder: Path) -> list[Sample]:
        annotations = read_annotations(folder)
        samples = []
        for dimension in self.dimensions:
            for query in read_list(folder / f"data/query/query_discriminative-{dimension}.json"):
                question, number = query.text("query"), query.text("id")
                target = annotation_of(query, annotations).one_of("truth", ("yes", "no"))
                # What the authors' script compares with: element n instead of n - 1, which the last question lacks.
                following = annotations[int(number)] if int(number) < len(annotations) else None
                extra = {"next truth": following.text("truth") if following else None}
                image = folder / "image" / query.text("image")
                prompt = f"{question}\nAnswer with yes or no"
                samples.append(Sample(number, (image,), prompt, question, question, target, dimension, extra))
        return samples

    def figures(self, rows: Sequence[ScoredRow]) -> dict[str, Figure]:
        figures = class_figures(rows, "no")
        for dimension in self.dimensions:
            of_dimension = of_kind(rows, dimension)
            figures |= class_figures(of_dimension, "no", f", {dimension}") if of_dimension else {}
        return figures

    def compared(self, figures: Mapping[str, Figure]) -> list[str]:
        return [name for name in figures if name.startswith(("accuracy", "F1"))]

    def authors_figures(self, rows: Sequence[ScoredRow]) -> dict[str, Figure]:
        figures = {}
        for dimension in self.dimensions:
            counted = [row for row in of_kind(rows, dimension) if row.sample.extra["next truth"] is not None]
            hits = [row.answer.strip().lower() == row.sample.extra["next truth"] for row in counted]
            if hits:
                figures[f"accuracy, {dimension}"] = Figure.of_hits([*hits[:-1], False])
        return figures


class Language(Protocol):
    """What AMBER's metric asks about English words."""

    def nouns(self, text: str) -> list[str]:
        """The nouns of a text in their order, in the singular."""

    def similar(self, first: str, second: str) -> bool:
        """Whether two words mean nearly the same."""


class AmberLanguage:
    """Nouns by NLTK, similarity by the vectors of spaCy's `en_core_web_lg`, above 0.8: those of AMBER's own evaluation.

    Raises:
        MissingPackageError: NLTK, spaCy or their data are not installed.
    """

    def __init__(self) -> None:
        try:
            import nltk
            import spacy
        except ImportError as error:
            raise MissingPackageError(f"AMBER's descriptions need NLTK and spaCy ({error}): {EXTRA}.") from error
        self.nltk, lemmatizer = nltk, nltk.stem.WordNetLemmatizer()
        self.singular: Callable[[str], str] = lemmatizer.lemmatize
        try:
            self.nouns("A dog.")
        except LookupError as error:
            raise MissingPackageError(
                "AMBER's descriptions need NLTK's data: "
                "python -m nltk.downloader punkt_tab averaged_perceptron_tagger_eng wordnet."
            ) from error
        try:
            parse = spacy.load("en_core_web_lg")
        except OSError as error:
            raise MissingPackageError(
                "AMBER's descriptions need spaCy's vectors: python -m spacy download en_core_web_lg."
            ) from error
        word = cache(parse)
        self.compare: Callable[[str, str], float] = cache(lambda first, second: word(first).similarity(word(second)))

    def nouns(self, text: str) -> list[str]:
        tagged = self.nltk.pos_tag(self.nltk.word_tokenize(text))
        return [self.singular(word) for word, tag in tagged if tag.startswith("NN")]

    def similar(self, first: str, second: str) -> bool:
        return self.compare(first, second) > 0.8


@dataclass(frozen=True)
class Mentions:
    """What one description mentions."""

    nouns: int
    hallucinated: int
    covered: int
    expected: int


class AmberGenerative(Task):
    """AMBER's descriptions: which of the objects that they name are there, and which of those there they name.

    Args:
        language: what knows English; NLTK and spaCy by default, loaded when the task is.
    """

    name, title = "amber-generative", "AMBER (descriptions)"
    files = {
        "data/query/query_generative.json": SOURCE,
        ANNOTATIONS: SOURCE,
        "data/relation.json": SOURCE,
        "data/safe_words.txt": SOURCE,
        "image/": IMAGES,
    }
    max_new_tokens = 1024
    authors_rule = "Asks no description, but whether each object of the next image's lists is in the image."

    def __init__(self, language: Callable[[], Language] = AmberLanguage):
        self.language = cache(language)

    def read(self, folder: Path) -> list[Sample]:
        # Before hours of answers, not after them.
        self.language()
        annotations = read_annotations(folder)
        related = read_json(folder / "data/relation.json")
        if not isinstance(related, dict) or not all(isinstance(words, list) for words in related.values()):
            raise EmmaError(f"{folder / 'data/relation.json'} must give a list of words for each word.")
        vocabulary = frozenset([*related, *(word for words in related.values() for word in words)])
        harmless = frozenset(read_words(folder / "data/safe_words.txt"))
        shared = {"related": related, "vocabulary": vocabulary, "harmless": harmless}
        samples = []
        for query in read_list(folder / "data/query/query_generative.json"):
            annotation = annotation_of(query, annotations)
            target = {key: [str(word) for word in annotation.get(key, list)] for key in ("truth", "hallu")}
            question = query.text("query")
            image = folder / "image" / query.text("image")
            samples.append(
                Sample(query.text("id"), (image,), question, question, question, target, DESCRIPTIONS, shared)
            )
        return samples

    def parse(self, answer: str, sample: Sample) -> str | None:
        """The nouns of AMBER's vocabulary, with spaces between; `None` for an empty answer."""
        if not answer.strip():
            return None
        return " ".join(noun for noun in self.language().nouns(answer) if noun in sample.extra["vocabulary"])

    def score(self, parsed: str | None, sample: Sample) -> float:
        """The share of the nouns that are not hallucinated: 1 less CHAIR."""
        if parsed is None:
            return 0.0
        mentions, _ = self.mentions(parsed, sample)
        return 1 - mentions.hallucinated / mentions.nouns if mentions.nouns else 1.0

    def mentions(self, parsed: str | None, sample: Sample) -> tuple[Mentions, Mentions]:
        """What a description mentions of the objects that are there, and of those that people imagine there."""
        there, imagined = (_Objects(sample.target[key], sample.extra["related"]) for key in ("truth", "hallu"))
        nouns = (parsed or "").split()
        hallucinated = 0
        for noun in nouns:
            if noun in sample.extra["harmless"] or there.find(noun):
                continue
            imagined.find(noun)
            imagined.find_similar(noun, self.language().similar)
            if not there.find_similar(noun, self.language().similar):
                hallucinated += 1
        counts = (len(nouns), hallucinated)
        return Mentions(*counts, *there.counts()), Mentions(*counts, *imagined.counts())

    def figures(self, rows: Sequence[ScoredRow]) -> dict[str, Figure]:
        pairs = [self.mentions(row.parsed, row.sample) for row in rows]
        there = [pair[0] for pair in pairs]
        imagined = [pair[1] for pair in pairs]
        return {
            "CHAIR": Figure.of_ratio([one.hallucinated for one in there], [one.nouns for one in there]),
            "Cover": Figure.of_ratio([one.covered for one in there], [one.expected for one in there]),
            "Hal": Figure.of_hits(one.hallucinated > 0 for one in there),
            "Cog": Figure.of_ratio([one.covered for one in imagined], [one.expected for one in imagined]),
        }


class _Objects:
    """The objects of an annotation with their related words, and which of them were named."""

    def __init__(self, objects: Sequence[str], related: Mapping[str, list[str]]):
        synonyms = [(word, place) for place, name in enumerate(objects) for word in related.get(name, [])]
        # In AMBER's order: all related words, then the objects; the first word that fits decides which was named.
        self.words = [*synonyms, *((name, place) for place, name in enumerate(objects))]
        self.named: set[int] = set()
        self.expected = len(objects)

    def find(self, noun: str) -> bool:
        return self.find_similar(noun, lambda first, second: first == second)

    def find_similar(self, noun: str, similar: Callable[[str, str], bool]) -> bool:
        for word, place in self.words:
            if similar(noun, word):
                self.named.add(place)
                return True
        return False

    def counts(self) -> tuple[int, int]:
        return len(self.named), self.expected


def amber_score(descriptions: Mapping[str, Figure], answers: Mapping[str, Figure]) -> Figure:
    """AMBER's one figure: the mean of 1 - CHAIR and of the F1 of all yes-or-no questions, in [0, 1].

    Args:
        descriptions: the figures of `amber-generative`.
        answers: those of `amber-discriminative`.
    """
    chair, f1 = descriptions["CHAIR"], answers['F1 of "no"']
    value = (1 - chair.value + f1.value) / 2
    # Independent samples: half the root of the summed squares of the two half-widths, to either side.
    below = math.hypot(chair.high - chair.value, f1.value - f1.low) / 2
    above = math.hypot(chair.value - chair.low, f1.high - f1.value) / 2
    return Figure(value, max(0.0, value - below), min(1.0, value + above), chair.of + f1.of)


class Amber(Task):
    """Both of AMBER's tasks in one run, and its score of them.

    Args:
        language: as of [`AmberGenerative`].
    """

    name, title = "amber", "AMBER (yes or no, and descriptions)"
    max_new_tokens = AmberGenerative.max_new_tokens
    constants = AmberDiscriminative.constants
    files = {**AmberDiscriminative.files, **AmberGenerative.files}
    authors_rule = f"{AmberDiscriminative.authors_rule} {AmberGenerative.authors_rule}"

    def __init__(self, language: Callable[[], Language] = AmberLanguage):
        self.questions, self.descriptions = AmberDiscriminative(), AmberGenerative(language)

    def read(self, folder: Path) -> list[Sample]:
        return self.descriptions.read(folder) + self.questions.read(folder)

    def task_of(self, sample: Sample) -> Task:
        """The task that a sample is of."""
        return self.descriptions if sample.kind == DESCRIPTIONS else self.questions

    def parse(self, answer: str, sample: Sample) -> str | None:
        return self.task_of(sample).parse(answer, sample)

    def score(self, parsed: str | None, sample: Sample) -> float:
        return self.task_of(sample).score(parsed, sample)

    def figures(self, rows: Sequence[ScoredRow]) -> dict[str, Figure]:
        told = of_kind(rows, DESCRIPTIONS)
        said = [row for row in rows if row.sample.kind != DESCRIPTIONS]
        figures = {**self.questions.figures(said), **self.descriptions.figures(told)}
        # Of a run that was limited to one of the two there is none.
        return {"AMBER score": amber_score(figures, figures), **figures} if told and said else figures

    def compared(self, figures: Mapping[str, Figure]) -> list[str]:
        return self.questions.compared(figures)

    def authors_figures(self, rows: Sequence[ScoredRow]) -> dict[str, Figure]:
        return self.questions.authors_figures(rows)


AMBER_TASKS: tuple[Task, ...] = (AmberDiscriminative(), AmberGenerative(), Amber())

__all__ = ["AMBER_TASKS", "Amber", "AmberDiscriminative", "AmberGenerative", "AmberLanguage", "Language", "amber_score"]
