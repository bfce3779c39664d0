"""The part of vLLM's plug-in that reads prompts, and the engine itself where vLLM is installed."""

import re
import subprocess
import sys

import pytest
from support.models import save_listening
from support.processes import OFFLINE

from emma_hf import EmmaProcessor
from emma_hf.integrations.vllm_plugin import only_missing, register, with_instructions

SYSTEM = "A chat between a curious user and an artificial intelligence assistant. "


def ids(processor, text: str, expanded: bool = False) -> list[int]:
    """Ids as vLLM makes them: of the whole text at once, a picture one placeholder unless `expanded`."""
    tokens = processor.tokenizer(text)["input_ids"]
    length = processor.image_seq_length if expanded else 1
    return [copy for token in tokens for copy in [token] * (length if token == processor.image_token_id else 1)]


@pytest.mark.parametrize("visual_tokens", [None, 5])
@pytest.mark.parametrize("expanded", [False, True], ids=["placeholder", "expanded"])
def test_the_instruction_is_read_from_the_prompt(converted, expanded, visual_tokens):
    processor = EmmaProcessor.from_pretrained(converted, visual_tokens=visual_tokens)

    def instructions(text: str, images: int) -> list[str]:
        return with_instructions({}, ids(processor, text, expanded), images, processor)["instructions"]

    first = f"{SYSTEM}USER: <image>\nWho is this?\nAnswer briefly. ASSISTANT:"
    assert instructions(first, 1) == ["Who is this?"]
    assert instructions(f"{first} A man.</s>USER: And the hat? ASSISTANT:", 1) == ["Who is this?"]
    assert instructions(f"{SYSTEM}USER: <image>\n<image>\nWhat changed? ASSISTANT:", 2) == ["What changed?"] * 2


def test_instructions_of_the_user_s_own_win(processor):
    prompt = ids(processor, f"{SYSTEM}USER: <image>\n<image>\nWhat changed? ASSISTANT:")
    for given in ("the hat", ["the hat", "the hat"]):
        options = with_instructions({"instructions": given, "do_pad": True}, prompt, 2, processor)
        assert options == {"instructions": ["the hat", "the hat"], "do_pad": True}
    with pytest.raises(ValueError, match="one for each of 2 pictures: got \\['the hat'\\]"):
        with_instructions({"instructions": ["the hat"]}, prompt, 2, processor)
    assert with_instructions({"do_pad": True}, prompt, 0, processor) == {"do_pad": True}


def test_pictures_that_a_cache_holds_take_no_instruction():
    options = {"instructions": ["a", "b", "c"], "do_pad": True}
    assert only_missing(options, [True, False, True]) == {"instructions": ["b"], "do_pad": True}
    assert options["instructions"] == ["a", "b", "c"]


def test_without_vllm_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(
        ImportError, match=re.escape("`emma_hf.integrations.vllm_plugin` is for vLLM, which cannot be imported")
    ):
        register()


ENGINE = """
import os, sys
os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0")
import torch
from vllm import LLM, SamplingParams
from emma_hf import EmmaForConditionalGeneration, EmmaProcessor
from emma_hf.tiny.scenes import Scene
from emma_hf.tiny.drawing import draw

if __name__ == "__main__":
    processor = EmmaProcessor.from_pretrained(sys.argv[1])
    model = EmmaForConditionalGeneration.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
    questions = ["How many things are there?", "Describe the picture.", "Is there a red circle?"]
    one, two, three = (draw(Scene.random(seed), 96) for seed in (1, 2, 3))
    # Pictures, question, and instruction where it is not the question. The third time every cache holds the picture.
    cases = [([picture], question, None) for picture in (one, two, one) for question in questions]
    # The same words about the same picture, with another instruction.
    cases.append(([one], questions[1], "red"))
    # Two pictures; of the second two the caches hold one, of the last two both.
    cases += [(pair, questions[1], None) for pair in ([one, two], [one, three], [two, three])]

    def prompt_of(pictures, question):
        content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": question}]
        return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def generated(pictures, question, instruction):
        text = prompt_of(pictures, question)
        inputs = processor(images=pictures, text=text, instructions=instruction or question, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        return inputs["input_ids"][0].tolist(), tokens[0, inputs["input_ids"].shape[1] :].tolist()

    # Before the engine starts, which changes classes of Transformers for its whole process.
    expected = [generated(*case) for case in cases]
    assert len({tuple(tokens) for _, tokens in expected}) > 4

    engine = LLM(
        sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=512, max_num_seqs=4,
        enable_prefix_caching=True, limit_mm_per_prompt={"image": 2},
    )
    greedy = SamplingParams(temperature=0, max_tokens=24)
    for (pictures, question, instruction), wanted in zip(cases, expected):
        # vLLM writes the begin-of-sequence token itself.
        request = {"prompt": prompt_of(pictures, question).removeprefix("<s>"), "multi_modal_data": {"image": pictures}}
        if instruction:
            request["mm_processor_kwargs"] = {"instructions": instruction}
        output = engine.generate(request, greedy, use_tqdm=False)[0]
        found = list(output.prompt_token_ids), list(output.outputs[0].token_ids)
        assert found == wanted, (question, instruction, len(pictures), found, wanted)
    # The way of `vllm serve`: messages, rendered by vLLM.
    for question, wanted in zip(questions, expected):
        content = [{"type": "image_pil", "image_pil": one}, {"type": "text", "text": question}]
        output = engine.chat([{"role": "user", "content": content}], greedy, use_tqdm=False)[0]
        assert (list(output.prompt_token_ids), list(output.outputs[0].token_ids)) == wanted, question
    print("the same tokens")
"""


@pytest.mark.slow
@pytest.mark.parametrize("visual_tokens", [None, 16])
def test_vllm_answers_as_generate_does_with_every_cache_on(tmp_path, visual_tokens):
    pytest.importorskip("vllm", reason="needs vLLM, in an environment of its own")
    script = tmp_path / "engine.py"
    script.write_text(ENGINE)
    done = subprocess.run(
        [sys.executable, script, save_listening(tmp_path / "model", visual_tokens)],
        capture_output=True,
        text=True,
        env=OFFLINE,
        timeout=1800,
    )
    assert done.stdout.strip().endswith("the same tokens"), done.stderr[-3000:]
