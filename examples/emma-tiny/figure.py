"""Draw fresh scenes with questions and what emma-tiny answers: the picture in the README.

python examples/emma-tiny/figure.py figure.png
"""

import sys

from matplotlib.figure import Figure

from emma_hf import EmmaForConditionalGeneration, EmmaProcessor
from emma_hf.cli import TINY
from emma_hf.scenes import ENDING, Chance, Scene, draw, questions
from emma_hf.tiny_evaluation import answers, is_right
from emma_hf.tiny_training import TEST_SEEDS

SCENES, QUESTIONS = 3, 5


def main(path: str, seed: int = 41) -> None:
    processor, model = EmmaProcessor.from_pretrained(TINY), EmmaForConditionalGeneration.from_pretrained(TINY).eval()
    scenes = [Scene.random(TEST_SEEDS - 1 - seed - place) for place in range(SCENES)]
    figure = Figure(figsize=(10, 5.2), layout="constrained")
    for axes, scene in zip(figure.subplots(1, SCENES), scenes):
        asked = Chance(scene.seed).several(questions(scene, Chance(scene.seed)), QUESTIONS)
        said = answers(model, processor, [(scene, question.text) for question in asked])
        axes.imshow(draw(scene, 336))
        axes.set_axis_off()
        for line, (question, answer) in enumerate(zip(asked, said)):
            text = f"{question.text.removesuffix(ENDING)}  {answer}"
            colour = "#202020" if is_right(answer, question.answer) else "#c03030"
            axes.text(0, -0.07 * (line + 1), text, transform=axes.transAxes, color=colour, fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(sys.argv[1])
