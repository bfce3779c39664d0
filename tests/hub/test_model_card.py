"""The cards: what the Hub's own library can check of them, and that every figure has one source."""

import json
import re
import runpy
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from PIL import Image
from support.models import tiny_config

from emma_hf import EMMA_TINY, EmmaConfig
from emma_hf.hub.model_card import TEMPLATE, check_card, is_released_shape, read_evaluation, render_card

ROOT = Path(__file__).parents[2]
EVALUATION = EMMA_TINY / "evaluation.json"
# The paper's figures, in the order of its tables. AMBER's figures for attributes and relations were computed against the
# next question's truth: a leaderboard must not read them.
PAPER = [89.42, 56.03, 73.14, 56.01, 68.57, 66.44, 60.15, 35.44, 25.1, 32.0, 26.15, 37.34, 94.50, 66.13]
AMBER_ATTRIBUTE, AMBER_RELATION = 26.15, 37.34
SECTIONS = [
    "Architecture", "Use", "Training data and procedure", "Figures of the paper", "Does the instruction help?",
    "Intended use", "Limits", "Bias and risks", "Licenses", "Environmental cost", "Citation",
]  # fmt: skip


@pytest.fixture
def source(tmp_path) -> Path:
    """A model's folder without a card of its own."""
    return tmp_path


def test_the_card_of_the_released_model(source):
    card, linked = render_card(source, EmmaConfig(), "me/my-emma")
    check_card(card)
    data = card.data.to_dict()
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "image-text-to-text")
    assert data["license"] == "other"
    assert data["license_name"]
    assert data["license_link"].startswith("https://")
    assert "openai/clip-vit-large-patch14-336" in data["base_model"]
    assert len(data["base_model"]) == 3
    assert "liuhaotian/LLaVA-Pretrain" in data["datasets"]
    assert re.findall(r"^## (.+)$", card.text, re.MULTILINE) == SECTIONS
    # Its examples name the repository that it lies in.
    assert 'model="me/my-emma"' in card.text
    assert "org/emma-7b" not in card.text
    assert "<!--" not in card.text
    assert linked == {"docs/architecture.png": TEMPLATE / "docs" / "architecture.png"}


def test_the_card_at_the_root_is_the_template_rendered_for_the_released_model(tmp_path):
    runpy.run_path(str(ROOT / "scripts" / "render_model_card.py"))["main"]([str(tmp_path / "MODEL_CARD.md")])
    rendered, shown = ModelCard.load(tmp_path / "MODEL_CARD.md"), ModelCard.load(ROOT / "MODEL_CARD.md")
    assert rendered.text == shown.text
    # The two lines of the Hub's library order the keys of the YAML differently.
    assert rendered.data.to_dict() == shown.data.to_dict()


def test_the_papers_figures_are_cited_as_the_papers(source):
    card, _ = render_card(source, EmmaConfig(), "emma-7b")
    name, results = model_index_to_eval_results(card.data.to_dict()["model-index"])
    assert name == "emma-7b"
    assert [result.metric_value for result in results] == [
        figure for figure in PAPER if figure not in (AMBER_ATTRIBUTE, AMBER_RELATION)
    ]
    for result in results:
        assert result.source_url == "https://arxiv.org/abs/2410.02080"
        assert "not measured here" in result.source_name
        assert not result.verified
    # The tables of the text hold the same numbers in the same order.
    section = card.text.split("## Figures of the paper")[1].split("\n## ")[0]
    cells = [cell.strip() for line in section.splitlines() if line.startswith("|") for cell in line.split("|")]
    assert [float(cell) for cell in cells if re.fullmatch(r"[\d.]+", cell)] == PAPER


def test_a_model_of_another_shape_is_not_called_the_released_one(source):
    assert is_released_shape(EmmaConfig())
    assert not is_released_shape(tiny_config())
    card, _ = render_card(source, tiny_config(), "me/small")
    check_card(card)
    data = card.data.to_dict()
    assert data.keys().isdisjoint({"model-index", "base_model", "datasets", "license", "license_name", "license_link"})
    assert re.search(r"^# small$", card.text, re.MULTILINE)
    assert not any(str(number) in card.text for number in PAPER[:9])


def test_the_figures_of_emma_tiny_are_those_of_its_evaluation():
    card, _ = render_card(EMMA_TINY, EmmaConfig.from_pretrained(EMMA_TINY), "org/emma-tiny")
    check_card(card)
    _, results = model_index_to_eval_results(card.data.to_dict()["model-index"])
    recorded = json.loads(EVALUATION.read_text())
    found = {(result.metric_type, result.dataset_config): result.metric_value for result in results}
    shares = {("accuracy", name): count["share"] for name, count in recorded["accuracy"].items()}
    shares |= {("rate", name): count["share"] for name, count in recorded["captions"].items()}
    shares["f1", "yes/no"] = recorded["yes_no"]["f1"]
    assert found.keys() == shares.keys()
    assert all(abs(found[key] - shares[key]) <= 5e-5 for key in shares)
    # They stand nowhere else in its metadata, so that a new evaluation changes them all.
    assert "model-index" not in ModelCard.load(EMMA_TINY / "README.md").data.to_dict()


def test_the_widget_shows_picture_question_and_answer(source):
    card, _ = render_card(source, EmmaConfig(), "emma-7b", examples=[("widget/a.png", "What?", "A hat.")])
    check_card(card)
    (example,) = card.data.to_dict()["widget"]
    assert example == {"src": "widget/a.png", "text": "What?", "output": {"text": "A hat."}}


def test_metadata_of_the_users_own_card_stays(source):
    (source / "README.md").write_text(
        "---\nlicense: mit\ntags: [mine]\npipeline_tag: visual-question-answering\n---\n# My\n"
    )
    card, _ = render_card(source, EmmaConfig(), "me/mine")
    data = card.data.to_dict()
    assert data["license"] == "mit"
    assert data["pipeline_tag"] == "visual-question-answering"
    assert data["tags"][0] == "mine"
    assert "emma" in data["tags"]
    assert data["library_name"] == "transformers"
    assert card.text.strip() == "# My"


def test_a_card_may_link_to_its_folder_and_must_be_utf_8(source):
    (source / "notes.md").write_text("Notes.")
    (source / "README.md").write_text("# My\n\n[files](./), [here](.) and [notes](./notes.md)\n")
    _, files = render_card(source, EmmaConfig(), "me/mine")
    assert files == {"notes.md": source / "notes.md"}
    (source / "README.md").write_bytes(b"# Caf\xe9")
    with pytest.raises(ValueError, match="README.md must be text in UTF-8"):
        render_card(source, EmmaConfig(), "me/mine")


def test_what_is_no_evaluation_is_refused(source):
    (source / "wrong.json").write_text('{"accuracy": {"all": 3}}')
    with pytest.raises(ValueError, match="must be the evaluation.json that `emma-hf tiny evaluate --output` writes"):
        read_evaluation(source / "wrong.json")
    (source / "wrong.json").rename(source / "evaluation.json")
    with pytest.raises(ValueError, match="rename this one where it lies beside the weights"):
        render_card(source, EmmaConfig(), "emma-7b")


def test_the_figure_of_the_architecture(tmp_path):
    runpy.run_path(str(ROOT / "scripts" / "draw_architecture.py"))["main"]([str(tmp_path / "figure.png")])
    with Image.open(tmp_path / "figure.png") as figure, Image.open(ROOT / "docs" / "architecture.png") as shown:
        assert figure.size == shown.size == (1320, 594)
    # The documents show the figure that every repository gets.
    assert (ROOT / "docs" / "architecture.png").read_bytes() == (TEMPLATE / "docs" / "architecture.png").read_bytes()
