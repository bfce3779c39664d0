"""Draw what emma-tiny answers to the first fresh question of each family, right or wrong.

python scripts/draw_emma_tiny_answers.py docs/emma-tiny.png
"""

import argparse
import textwrap

from emma_hf import EMMA_TINY, EmmaForConditionalGeneration, EmmaProcessor
from emma_hf.evaluation.tasks.answers import is_right
from emma_hf.tiny.drawing import draw
from emma_hf.tiny.evaluation import answers, fresh_questions
from emma_hf.tiny.questions import FAMILIES
from emma_hf.training.plots import figure_class


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", help="image to write")
    parser.add_argument("--model", default=str(EMMA_TINY), help="folder of an emma-tiny (default: the packaged one)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the questions (default: 0)")
    args = parser.parse_args(argv)

    model = EmmaForConditionalGeneration.from_pretrained(args.model, dtype="auto").eval()
    questions = fresh_questions(len(FAMILIES), args.seed)
    predictions = answers(
        model, EmmaProcessor.from_pretrained(args.model), [(scene, question.text) for scene, question in questions]
    )

    figure = figure_class()(figsize=(11, 7), layout="constrained")
    for axes, (scene, question), text in zip(figure.subplots(2, len(FAMILIES) // 2).flat, questions, predictions):
        axes.imshow(draw(scene, 336))
        # Not switched off: the answer is the label of the axis, so that the layout keeps room for it.
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        title = question.text.splitlines()[0]
        correct = is_right(text, question.answer)
        label = text if correct else f"{text} (it is: {question.answer})"
        axes.set_title("\n".join(textwrap.wrap(title, 34)), fontsize=9)
        axes.set_xlabel(label, fontsize=11, weight="bold", color="#1c6b2f" if correct else "#a02020")
    figure.savefig(args.output, dpi=100)


if __name__ == "__main__":
    main()
