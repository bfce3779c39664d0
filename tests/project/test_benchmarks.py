"""The benchmarks' own arithmetic and reports, the page that is made from them, their runner, and short runs."""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from emma_hf import EMMA_TINY, EmmaForConditionalGeneration, EmmaProcessor
from emma_hf.model.instruction_emma import encode_instruction
from emma_hf.tiny.clip import CaptionedScenes, collate_groups
from emma_hf.tiny.drawing import draw
from emma_hf.tiny.recipe import has_fast_bfloat16
from emma_hf.tiny.scenes import Scene, Thing

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
RESULTS = sorted((BENCHMARKS / "results").glob("*.json"))
# A processor without bfloat16 takes an hour for what float32 does in minutes.
DTYPE = "bfloat16" if has_fast_bfloat16(torch.cpu.get_capabilities()) else "float32"


@pytest.fixture
def common(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import common

    return common


@pytest.fixture
def runner(common, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    import benchmarks.__main__ as runner

    return runner


def test_a_ratio_is_that_of_neighbors(common):
    # The machine slowed down tenfold between the rounds; the alternatives differ by 2 all the same.
    assert common.ratio([2.0, 20.0, 4.0, 40.0], [1.0, 10.0, 2.0, 20.0]) == (2.0, 2.0, 2.0)
    assert common.ratio([1.0, 2.0, 3.0], [1.0, 1.0, 1.0]) == (2.0, 1.0, 3.0)


def test_alternatives_run_in_turns_and_the_first_round_does_not_count(common):
    order = []

    def measure(name: str) -> int:
        order.append(name)
        return len(order)

    found = common.in_turns({"first": "a", "second": "b"}, 2, "", measure)
    assert order == list("abbaab")
    assert found == {"first": [4, 5], "second": [3, 6]}


def test_a_report_is_tables_json_and_plots(common, tmp_path, capsys):
    args = argparse.Namespace(output=tmp_path / "out", runs=3, dtypes=["float32"], compile=False)
    report = common.Report("some", args)
    for images in (1, 2):
        report.add("The path", dtype="float32", images=images, s=0.25, against=(1.0 * images, 0.9, 2.5), limit=None)
    report.save()
    report.plot("The path", "images", "against", "dtype")
    out = capsys.readouterr().out
    assert "**The path**\n\n| dtype | images | s | against | limit |\n|---|" in out
    assert "| float32 | 2 | 0.25 | 2 [0.9, 2.5] |  |" in out
    assert out.endswith("; `--runs 3 --dtypes float32`.\n")
    saved = json.loads((tmp_path / "out" / "some.json").read_text())
    assert saved["tables"]["The path"][1]["against"] == [2.0, 0.9, 2.5]
    assert saved["about"]["versions"]["torch"] == torch.__version__
    assert str(tmp_path) not in json.dumps(saved)
    assert (tmp_path / "out" / "some-the-path.png").stat().st_size > 5000


def test_the_documents_show_the_committed_results(runner):
    """What `python -m benchmarks --render` would write is there, and every result is shown once."""
    shown = []
    for page in sorted((ROOT / "docs").rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        assert runner.rendered(text) == text, f"{page.name}: run `python -m benchmarks --render`"
        shown += re.findall(r"<!-- results: (\w+) -->", text)
    assert sorted(shown) == [path.stem for path in RESULTS]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_result_says_how_it_came_to_be(path, runner):
    result = json.loads(path.read_text(encoding="utf-8"))
    about = result["about"]
    assert path.stem in runner.PARTS
    assert result["tables"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", about["date"])
    assert about["machine"]
    assert about["arguments"]
    assert {"torch", "Transformers"} <= about["versions"].keys()
    # Either measured by the script as it is, or transcribed from where it stood before.
    assert "emma-hf" in about["versions"] or about["note"].startswith("Transcribed from ")


def test_the_pair_has_the_same_weights_and_logits(common):
    # Small towers: those of the released model take a minute.
    config = common.emma_config("45m", num_hidden_layers=1)
    for tower in (config.vision_config, config.instruction_config):
        tower.update({"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2})
    emma, llava = common.build_pair(config, torch.float32, torch.device("cpu"))
    batch = common.random_batch(1, 16, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        ours, theirs = emma(**batch), llava(**common.for_llava(batch))
    torch.testing.assert_close(ours.logits, theirs.logits)
    assert ours.loss == theirs.loss
    assert torch.get_default_dtype() == torch.float32
    assert all(weight.device.type == "cpu" for weight in llava.parameters())


def test_a_process_of_its_own_imports_the_benchmarks_and_says_why_it_fails(common):
    assert int(common.run_python("import memory; print(memory.peak_resident())")) > 1e6
    with pytest.raises(SystemExit, match="ZeroDivisionError"):
        common.run_python("1 / 0")


def test_a_smaller_peak_is_seen_after_a_larger_one(common):
    code = """
import time, torch
from memory import sampled_peak
kept = []
def peak(megabytes):
    with sampled_peak() as found:
        pieces = [torch.ones(1 << 14) for _ in range(16 * megabytes)]
        # The C library gives freed memory back by itself only where nothing lies behind it.
        kept.append(torch.ones(1 << 14))
        time.sleep(0.1)
    return found[0] / (megabytes << 20)
assert 0.9 < peak(200) < 1.2
print(peak(50))
"""
    assert 0.9 < float(common.run_python(code)) < 1.2


def bench(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500)


def test_the_runner_names_its_parts(runner):
    done = bench("visoin")
    assert done.returncode == 2
    assert "unknown parts ['visoin']: choose from vision, language_model, modality_adaptation" in done.stderr
    assert f"  processor           {runner.PARTS['processor']}" in bench("--help").stdout
    others = {"__main__", "clip_projections", "common", "memory"}
    assert {path.stem for path in BENCHMARKS.glob("*.py")} - others == runner.PARTS.keys()


@pytest.mark.once
@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "arguments", "ratios"),
    [
        ("vision", ["--dtypes", DTYPE, "--images", "1", "--questions", "2"], {"Vision path": "EMMA / LLaVA", "Questions about one image": "`encode_image` / one question"}),
        ("language_model", ["--dtype", DTYPE, "--words", "64", "--rows", "1"], {"Prefill": "EMMA / LLaVA", "Decoding": "times faster than LLaVA"}),
    ],
)  # fmt: skip
def test_what_is_compared_with_llava_agrees_with_it(part, arguments, ratios, tmp_path):
    command = [sys.executable, str(BENCHMARKS / f"{part}.py"), "--runs", "2", "--output", str(tmp_path), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    tables = json.loads((tmp_path / f"{part}.json").read_text())["tables"]
    for table, column in ratios.items():
        assert tables[table]
        assert all(row[column][0] > 0 for row in tables[table])


def test_operations_have_a_kind(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from vision_options import kind_of

    names = ["aten::addmm", "aten::_scaled_dot_product_flash_attention_for_cpu", "aten::native_layer_norm", "aten::cat"]
    assert list(map(kind_of, names)) == ["linear layers", "attention", "norms", "everything else"]


@pytest.mark.once
@pytest.mark.slow
def test_the_released_geometry_is_measured_at_any_size(tmp_path):
    size = ["--size", "45m", "--layers", "1", "--towers", "small", "--vocabulary", "700", "--visual-tokens", "16", "4"]
    command = [
        sys.executable,
        str(BENCHMARKS / "released_geometry.py"),
        "--runs",
        "2",
        "--output",
        str(tmp_path),
        "--folder",
        str(tmp_path / "not" / "yet"),
        *size,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    # Made, and left empty.
    assert list((tmp_path / "not" / "yet").iterdir()) == []
    tables = json.loads((tmp_path / "released_geometry.json").read_text())["tables"]
    (parts,) = (rows for name, rows in tables.items() if name.startswith("A checkpoint with"))
    assert all(row["time, s"] > 0 for row in parts)
    whole, fewer, llava = tables["Visual tokens"]
    assert whole["prompt, tokens"] == llava["prompt, tokens"] == fewer["prompt, tokens"] + 12
    # A layer's keys and values: 512 numbers each, of two bytes.
    assert fewer["cache, MB"] == fewer["prompt, tokens"] * 2 * 512 * 2 / 1e6


@pytest.fixture(scope="module")
def fitted():
    """emma-tiny, its processor, and its CLIP with projections that were fitted to a few scenes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        from clip_projections import fit_projections

        model = EmmaForConditionalGeneration.from_pretrained(EMMA_TINY, dtype=torch.float32).eval()
        processor = EmmaProcessor.from_pretrained(EMMA_TINY)
        yield model, processor, fit_projections(model, processor, groups=8)


@pytest.mark.parametrize(("name", "sign"), [("relevance", -1), ("+cos", 1)])
def test_relevance_chooses_by_the_determinant(name, sign, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from token_selection import SELECTIONS, Encoded

    generator = torch.Generator().manual_seed(0)
    encoded = Encoded(torch.randn(3, 12, 16, generator=generator), *torch.randn(2, 3, 12, generator=generator))
    chosen = SELECTIONS[name](encoded, 10)
    for features, cosines, indices in zip(encoded.features.double(), encoded.cosine.double(), chosen.tolist()):
        cosines = sign * cosines
        weights = [max(1e-6, float((each - cosines.min()) / (cosines.max() - cosines.min()))) for each in cosines]

        def determinant(tokens, features=features, weights=weights):
            rows = torch.stack([weights[token] * features[token] / features[token].norm() for token in tokens])
            return float(torch.linalg.det(rows @ rows.T))

        expected = []
        while len(expected) < 10:
            left = [token for token in range(12) if token not in expected]
            expected.append(max(left, key=lambda token: determinant([*expected, token])))
        assert indices == sorted(expected)


def test_projections_are_fitted_by_the_loss_of_clip(fitted):
    """The loss of the pooled embeddings is that of Transformers' CLIP of the images and captions themselves."""
    from clip_projections import contrastive_loss, embed

    _, processor, clip = fitted
    scenes = CaptionedScenes(8, processor, seed=0)
    batch = collate_groups([scenes[index] for index in range(8)])
    groups = embed(clip, scenes, range(8))
    with torch.no_grad():
        torch.testing.assert_close(contrastive_loss(clip, groups), clip(**batch).loss)
    # Of 32 pairs, by chance 3.5 nats. The weights that the fit begins with depend on the version of Transformers.
    assert len(batch["input_ids"]) == 32
    assert contrastive_loss(clip, groups) < 1


def test_the_cosine_of_a_visual_token_to_a_text_is_by_the_towers_that_ship(fitted):
    from clip_projections import cosine_to_text

    model, processor, clip = fitted
    weights = load_file(EMMA_TINY / "model.safetensors")
    norms = {
        name: [weights[f"model.{name}.{part}"].float() for part in ("weight", "bias")]
        for name in ("vision_tower.vision_model.post_layernorm", "instruction_encoder.text_model.final_layer_norm")
    }
    vision_norm, text_norm = norms.values()
    pixels = processor.image_processor(draw(Scene.random(1)), return_tensors="pt")["pixel_values"]
    ids = torch.tensor([encode_instruction(processor.instruction_tokenizer, "What color is the star?")])
    with torch.no_grad():
        features = model.get_vision_features(pixels)
        found = cosine_to_text(clip, processor, features, ["What color is the star?"])
        text = model.model.instruction_encoder(ids, output_hidden_states=True).hidden_states[-1][0]
        end = text[ids[0].tolist().index(processor.instruction_tokenizer.eos_token_id)]
        text = clip.text_projection.weight @ torch.nn.functional.layer_norm(end, (128,), *text_norm)
        tokens = torch.nn.functional.layer_norm(features[0], (128,), *vision_norm) @ clip.visual_projection.weight.T
    expected = [float(token @ text / token.norm() / text.norm()) for token in tokens]
    torch.testing.assert_close(found, torch.tensor([expected]))


def test_where_the_tokens_of_a_thing_are(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from clip_projections import tokens_on

    def thing(shape: str, x: float, y: float, radius: float) -> Thing:
        return Thing(shape, "red", "small", "filled", x, y, radius, 0)

    scene = Scene(
        (thing("star", 3.5 / 8, 1.5 / 8, 0.13), thing("star", 0.9375, 0.9375, 0.09), thing("heart", 0.5, 0.5, 0.2))
    )
    there = tokens_on(scene, ("red", "star")).reshape(8, 8)
    assert there.nonzero().tolist() == [[0, 3], [1, 2], [1, 3], [1, 4], [2, 3], [7, 7]]


@pytest.mark.once
@pytest.mark.slow
def test_selections_are_compared_on_the_same_questions(tmp_path):
    arguments = ["--questions", "20", "--captions", "2", "--tokens", "8", "4", "--runs", "2", "--groups", "8"]
    command = [sys.executable, str(BENCHMARKS / "token_selection.py"), "--output", str(tmp_path), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    tables = json.loads((tmp_path / "token_selection.json").read_text())["tables"]
    names = ["diversity", "random", "attention", "both", "relevance", "+cos"]
    expected = [(64, "all"), *((kept, name) for kept in (8, 4) for name in names)]
    for table in ("Right answers, %", "Captions, %"):
        assert [(row["tokens"], row["selection"]) for row in tables[table]] == expected
    answers = tables["Right answers, %"]
    assert answers[0]["right"][0] > 80
    for row in answers[1:]:
        same = [each for each in answers if each["tokens"] == row["tokens"] and each["selection"] == "diversity"]
        if difference := row["more than diversity"]:
            assert difference[0] == pytest.approx(row["right"][0] - same[0]["right"][0])
    assert len(tables["CLIP's projections"]) == 5
