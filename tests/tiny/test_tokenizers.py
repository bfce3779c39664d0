"""The two tokenizers that emma-tiny learns from its world."""

import re

from emma_hf import EMMA_TINY, EmmaProcessor
from emma_hf.model.instruction_emma import encode_instruction
from emma_hf.tiny.drawing import draw
from emma_hf.tiny.questions import ENDING
from emma_hf.tiny.scenes import Scene


def test_the_tokenizers_know_the_words_of_the_world(untrained):
    processor, model = untrained
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == model.config.image_token_index == 600
    question = "How many red circles are there?" + ENDING
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert re.fullmatch(r"<s>A chat between .* USER: <image>\nHow .* ASSISTANT:", prompt, re.DOTALL)
    ids = processor(images=draw(Scene.random(0)), text=prompt)["input_ids"][0]
    assert ids.count(600) == 64
    assert len(ids) < 136
    text = "A small red star, the 3 hearts? Yes."
    assert processor.tokenizer.decode(processor.tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    instruction = encode_instruction(processor.instruction_tokenizer, "What colour is the star?")
    assert processor.instruction_tokenizer.convert_ids_to_tokens(instruction)[:7] == [
        "<start_of_text>", "what</w>", "colour</w>", "is</w>", "the</w>", "star</w>", "?</w>",
    ]  # fmt: skip


def test_they_are_those_of_the_shipped_weights(untrained):
    learned, shipped = untrained[0], EmmaProcessor.from_pretrained(EMMA_TINY)
    for name in ("tokenizer", "instruction_tokenizer"):
        assert getattr(learned, name).get_vocab() == getattr(shipped, name).get_vocab()
