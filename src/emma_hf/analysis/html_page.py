"""The report as one HTML page that needs no other file."""

import base64
import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
       color: #1f2328; background: #ffffff; }
img { max-width: 100%; height: auto; }
table { border-collapse: collapse; font-size: 0.9em; }
th, td { border-bottom: 1px solid #8c959f; padding: 0.25rem 0.75rem; text-align: right; }
th:first-child, td:first-child { text-align: left; }
.verdict { font-size: 1.15em; border-left: 4px solid #0072b2; padding-left: 1rem; }
.scroll { overflow-x: auto; }
@media (prefers-color-scheme: dark) { body { color: #e6edf3; background: #0d1117; } }
"""

# Heading, what the figure shows with its control, and what must not be concluded from it.
TEXTS = {
    "counterfactuals": (
        "What the model answers when another text is the instruction",
        "Image and prompt stay the same; only what the instruction encoder reads is replaced, or the text term of F "
        "by its mean over the questions or by nothing. Each row is compared with itself. If the own instruction is no "
        "better than another question's, an empty one and a constant one, the answers do not need it.",
        "A gain over a model without the text term is no evidence that the question is read: a constant can bring it, "
        "which is what the mean text term and the constant instruction show.",
    ),
    "terms": (
        "The terms of the fused features",
        "F = Wv V + Wt P + ba (and a learned offset, where the model has one), exactly. The text term is split into "
        "its mean over the questions, which is the same for every question, and the rest, the only part that can tell "
        "questions apart.",
        "A large text term is no sign that the question matters; a small question-dependent part does not exclude it.",
    ),
    "weights": (
        "The weights of the alignment, and what they add",
        "Above: the visual columns where they lie in the image, and the share of text in each output token's row. "
        "Below: the text columns by position, alone, and times the size of the token that they multiply, with the "
        "part of it that varies with the question. The start token and most of the padding are constants.",
        "Norms of weights do not show use: a column can be large and its token the same for every question.",
    ),
    "gates": (
        "Where image and question can act together",
        "Left: the variance of the visual tokens over all pairs of images and questions; only what image and question "
        "do together can be a choice of the question's. Right: how far the gates of the projector's activation move "
        "when another question is asked about the same image.",
        "Gates that turn show that the question can choose, not that it chooses what helps.",
    ),
    "mutual_information": (
        "Mutual information and cosine with the answer",
        "As in the authors' script, whose answer vector is the start token, the same for every answer; beside it the "
        "mean over the answer's tokens. The controls: shuffled answers (hollow), F with another question and with the "
        "mean text, and the image's features mixed without text.",
        "A rise from V to F that F also shows with another question's instruction, or with shuffled answers, has "
        "nothing to do with the question or the answer.",
    ),
    "instruction_length": (
        "Long instructions",
        "Words that say nothing are put before the question in the instruction alone, until the question is cut off "
        "at the instruction's last token; the language model reads the question as before.",
        "A model that does not use its instruction cannot suffer from a long one: accuracy that stays says something "
        "about long instructions only where the counterfactuals show a gain.",
    ),
}
EXAMPLE = (
    "One image, one question",
    "Where this question moved the visual tokens from their mean over the questions, the same image with another "
    "question at the same scale, and how far the visual tokens move when one token of the instruction is left out.",
    "A map that another question shows as well is the map of the image, not of the question.",
)


def page(result: Mapping[str, Any], files: Mapping[str, Mapping[str, Path]]) -> str:
    """The page of a result of `analyze` and its figures, by name and theme as `draw_all` returns them."""
    sections = [f"<p class='verdict'>{html.escape(' '.join(result['verdict']))}</p>", _facts(result), _table(result)]
    for name, themes in files.items():
        title, shows, not_shown = TEXTS.get(name, EXAMPLE)
        sections.append(
            f"<h2>{html.escape(title)}</h2>{_picture(themes, title)}<p>{html.escape(shows)}</p>"
            f"<p><b>Not to be concluded:</b> {html.escape(not_shown)}</p>"
        )
    sections.append(_cut(result))
    if result["left_out"]:
        rows = "".join(
            f"<li>{html.escape(name)}: {html.escape(reason)}</li>" for name, reason in result["left_out"].items()
        )
        sections.append(f"<h2>Left out</h2><ul>{rows}</ul>")
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>What the instruction does</title><style>{STYLE}</style></head><body>"
        f"<h1>What the instruction does</h1>{''.join(sections)}</body></html>\n"
    )


def _facts(result: Mapping[str, Any]) -> str:
    model, rows = result["model"], result["rows"]
    text = (
        f"{len(rows)} questions about images. The model has {model['visual_tokens']} visual and "
        f"{model['instruction_tokens']} instruction tokens and computes in {model['dtype']}"
        f"{', its language model quantized' if model['quantized'] else ''}. All numbers are in analysis.json."
    )
    return f"<p>{html.escape(text)}</p>"


def _table(result: Mapping[str, Any]) -> str:
    conditions = result["counterfactuals"]["conditions"]
    known = all("accuracy" in figures for figures in conditions.values())
    heads = ["instruction", *(["right", "own less this (points)"] if known else []), "answers that differ"]
    lines = ["".join(f"<th>{head}</th>" for head in heads)]
    for name, figures in conditions.items():
        cells = [html.escape(name)]
        if known:
            gain = figures["gain"]
            cells += [
                _share(figures["accuracy"]),
                f"{100 * gain['difference']:+.1f} ({100 * gain['low']:+.1f} to {100 * gain['high']:+.1f})",
            ]
        cells.append(f"{figures['changed']['right']} of {figures['changed']['of']}")
        lines.append("".join(f"<td>{cell}</td>" for cell in cells))
    rows = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<div class='scroll'><table>{rows}</table></div><p>In parentheses: 95% intervals.</p>"


def _share(figures: Mapping[str, float]) -> str:
    return f"{figures['share']:.1%} ({figures['low']:.1%} to {figures['high']:.1%})"


def _picture(themes: Mapping[str, Path], title: str) -> str:
    light, dark = (
        f"data:image/png;base64,{base64.b64encode(themes[theme].read_bytes()).decode()}" for theme in ("light", "dark")
    )
    return (
        f"<picture><source srcset='{dark}' media='(prefers-color-scheme: dark)'>"
        f"<img src='{light}' alt='{html.escape(title, quote=True)}'></picture>"
    )


def _cut(result: Mapping[str, Any]) -> str:
    cut = result["instruction_length"]["cut"]
    length = result["model"]["instruction_length"]
    if not cut:
        return f"<p>No instruction of these questions is longer than {length} tokens.</p>"
    rows = "".join(f"<li>row {each['row']}: {html.escape(each['words'])}</li>" for each in cut[:20])
    return f"<p>{len(cut)} instructions are longer than {length} tokens; cut off is:</p><ul>{rows}</ul>"


__all__ = ["page"]
