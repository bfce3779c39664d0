"""Draw the architecture of EMMA, with the released model's sizes.

python scripts/draw_architecture.py docs/architecture.png
"""

import argparse

from emma_hf import EmmaConfig
from emma_hf.training.plots import figure_class

FROZEN, TRAINED, NEW, DATA = "#dfe6ee", "#f7e3bf", "#cfe8cf", "#ffffff"
EDGE, NEW_EDGE, TEXT = "#44546a", "#2f7d32", "#1d2733"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", help="image to write")
    args = parser.parse_args(argv)

    config = EmmaConfig()
    vision, instruction, language = config.vision_config, config.instruction_config, config.text_config
    tokens, length = config.image_seq_length, config.instruction_seq_length
    projection = instruction.hidden_size * vision.hidden_size + vision.hidden_size
    alignment = tokens * (tokens + length) + tokens

    figure = figure_class()(figsize=(12, 5.4))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, 120)
    axes.set_ylim(0, 54)
    axes.set_axis_off()

    # Background of the module that EMMA adds.
    box(axes, 48.5, 6.5, 33, 42, "", "#eef7ee", NEW_EDGE, style="--")
    axes.text(65, 46, "modality adaptation", ha="center", va="center", fontsize=12, weight="bold", color=NEW_EDGE)
    axes.text(
        65, 43.2, f"what EMMA adds: {projection + alignment:,} weights", ha="center", va="center", fontsize=9.5,
        color=NEW_EDGE,
    )  # fmt: skip

    box(axes, 2, 30, 12, 9, f"picture\n{vision.image_size} × {vision.image_size}", DATA)
    box(axes, 2, 12, 12, 9, "question\n“Who is this?”", DATA)
    box(axes, 20, 29, 16, 11, "CLIP vision tower\nViT-L/14, its last\nlayer but one", FROZEN)
    box(axes, 20, 11, 16, 11, f"CLIP text encoder\n{length} tokens, its last\nlayer but one", FROZEN)
    box(axes, 50, 11, 14, 11, "instruction\nprojection\nGELU(H Wpᵀ + bp)", NEW, NEW_EDGE)
    box(axes, 67, 20, 13, 21, "visual\nalignment\n\nWa [V ; P] + ba\n\nmixes tokens,\nnot channels", NEW, NEW_EDGE)
    box(axes, 89.5, 25, 9.5, 11, "projector\nas in\nLLaVA-1.5", TRAINED)
    box(axes, 106.5, 9, 12, 33, "language\nmodel\n\nVicuna-7B\nv1.5", TRAINED)

    arrow(axes, (14, 34.5), (20, 34.5))
    arrow(axes, (14, 16.5), (20, 16.5))
    arrow(axes, (36, 34.5), (67, 34.5), f"V   {tokens} × {vision.hidden_size}", at=0.2)
    arrow(axes, (36, 16.5), (50, 16.5), f"H   {length} × {instruction.hidden_size}", at=0.42)
    arrow(axes, (64, 16.5), (65.6, 16.5), head=False)
    arrow(axes, (65.6, 16.5), (65.6, 26), head=False)
    arrow(axes, (65.6, 26), (67, 26))
    axes.text(65.2, 23.6, f"P   {length} × {vision.hidden_size}", ha="right", va="center", fontsize=9, color=TEXT)
    arrow(axes, (80, 30.5), (89.5, 30.5))
    axes.text(85.3, 32.2, "F", ha="center", va="center", fontsize=9, color=TEXT)
    axes.text(85.3, 28.8, f"{tokens} ×\n{vision.hidden_size}", ha="center", va="top", fontsize=8, color=TEXT)
    arrow(axes, (99, 30.5), (106.5, 30.5))
    axes.text(102.5, 32.2, "Z", ha="center", va="center", fontsize=9, color=TEXT)
    axes.text(102.5, 28.8, f"{tokens} ×\n{language.hidden_size}", ha="center", va="top", fontsize=8, color=TEXT)
    # The language model reads the question as well.
    arrow(axes, (8, 12), (8, 3.2), head=False)
    arrow(axes, (8, 3.2), (112.5, 3.2), head=False)
    arrow(axes, (112.5, 3.2), (112.5, 9))
    axes.text(26, 4.6, "the whole prompt, as words", ha="left", va="center", fontsize=9, color=TEXT)
    arrow(axes, (112.5, 42), (112.5, 48.5))
    axes.text(112.5, 50.3, "answer", ha="center", va="center", fontsize=10.5, weight="bold", color=TEXT)

    for x, color, edge, name in (
        (3, FROZEN, EDGE, "always frozen"),
        (18, NEW, NEW_EDGE, "new"),
        (26.5, TRAINED, EDGE, "as in LLaVA-1.5"),
    ):
        box(axes, x, 48.6, 2.6, 2.2, "", color, edge)
        axes.text(x + 3.6, 49.7, name, ha="left", va="center", fontsize=9, color=TEXT)
    figure.savefig(args.output, dpi=110, metadata={"Software": None})


def box(axes, x, y, width, height, text, color, edge=EDGE, style="-") -> None:
    """A rounded box with its lower left corner at (x, y)."""
    from matplotlib.patches import FancyBboxPatch

    shape = FancyBboxPatch(
        (x, y), width, height, boxstyle="round,pad=0,rounding_size=1.1", facecolor=color, edgecolor=edge,
        linewidth=1.3, linestyle=style,
    )  # fmt: skip
    axes.add_patch(shape)
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9.5, color=TEXT, linespacing=1.35)


def arrow(axes, start, end, text="", at=0.5, head=True) -> None:
    """A line from `start` to `end`, with text above it."""
    style = {"arrowstyle": "-|>" if head else "-", "color": EDGE, "linewidth": 1.4, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", xy=end, xytext=start, arrowprops=style)
    if text:
        x = start[0] + at * (end[0] - start[0])
        axes.text(x, start[1] + 1.5, text, ha="center", va="center", fontsize=9, color=TEXT)


if __name__ == "__main__":
    main()
