"""The figures that were printed for EMMA-7B and LLaVA-1.5-7B, and what is known of how they were made.

None was measured with this package.
"""

from dataclasses import dataclass

# Of every printed figure in a report.
MARK = "printed in the paper, not measured here"
SOURCES = (
    "EMMA-7B: arXiv 2410.02080. LLaVA-1.5-7B: arXiv 2310.03744 and the model zoo of its repository; those of MathVista "
    "and FOIL are EMMA's paper's, that of AMBER is AMBER's."
)


@dataclass(frozen=True)
class Published:
    """Printed figures of one benchmark, in percent.

    Attributes:
        benchmark: as the paper names it.
        task: the task of this package; its variants have names that begin with it.
        emma: EMMA-7B's, or None where its paper has none that is known here.
        llava: LLaVA-1.5-7B's, or None.
        figure: the figure of the task's summary that is nearest; empty where none can be compared.
        made: what is known of how it was made.
    """

    benchmark: str
    task: str
    emma: float | None = None
    llava: float | None = None
    figure: str = "accuracy"
    made: str = ""


_TRAINED = "The instruction data holds training rows of this benchmark."
_SERVER = f"On the test server's split. {_TRAINED}"
_MMBENCH = "Whether it is the mean over rotations or CircularEval, and who reads the letters, is not printed."
_AMBER = (
    "The released script compares each answer with the next question's truth: on AMBER's files it gives a "
    "perfect model {perfect}."
)

PUBLISHED = (
    Published("VQAv2", "vqav2", 89.42, 78.5, made=_SERVER),
    Published("VizWiz", "vizwiz", 56.03, 50.0, made=_SERVER),
    Published("SQA-I", "scienceqa", 73.14, 66.8, made=_TRAINED),
    Published("GQA", "gqa", 56.01, 62.0, made=_TRAINED),
    Published("OKVQA", "okvqa", 68.57, made=f"The repository has no script for it. {_TRAINED}"),
    Published("TextVQA", "textvqa", llava=58.2, made="LLaVA's prompt holds the OCR tokens of the image."),
    Published("MMB-EN", "mmbench-en", 66.44, 64.3, "circular accuracy", made=_MMBENCH),
    Published("MMB-CN", "mmbench-cn", 60.15, 58.3, "circular accuracy", made=_MMBENCH),
    Published("MMMU", "mmmu", 35.44, made="By the exact letter, so that open questions are nearly never right."),
    Published(
        "MathVista",
        "mathvista",
        25.1,
        21.1,
        figure="",
        made="The released script shows the model no image, takes one of five hints as the instruction, and looks for "
        "the truth anywhere in the answer.",
    ),
    Published("MuirBench", "muirbench", 32.0, made="Several images are pasted into one."),
    Published("POPE", "pope", llava=85.9, figure='F1 of "yes"', made="The mean F1 of the three samplings."),
    Published("AMBER attribute", "amber-discriminative", 26.15, figure="", made=_AMBER.format(perfect="0.0")),
    Published("AMBER relation", "amber-discriminative", 37.34, figure="", made=_AMBER.format(perfect="21.9")),
    Published(
        "AMBER existence",
        "amber-discriminative",
        94.50,
        figure="",
        made="The answer to all of its questions is no, so that a model that always says no has 100.",
    ),
    Published(
        "AMBER, all yes/no",
        "amber-discriminative",
        llava=72.0,
        made="The accuracy on AMBER's own page, by AMBER's script.",
    ),
    Published(
        "FOIL",
        "foil",
        66.13,
        50.08,
        figure="",
        made="On a selection of rows that was not published, in a random order without a seed; by its code these are "
        "rows that a model had wrong, which biases against it. The instruction is one sentence for all questions.",
    ),
)


__all__ = ["MARK", "PUBLISHED", "SOURCES", "Published"]
