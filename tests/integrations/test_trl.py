"""GRPO and RLOO of TRL on rows with images: each image's instruction reaches the model."""

from copy import deepcopy

import pytest
import torch
from PIL import Image
from support.models import make_attentive

from emma_hf import EmmaError, EmmaForConditionalGeneration, EmmaProcessor
from emma_hf.integrations.trl import instruction_ids_of_prompts, read_instructions_from_prompts
from emma_hf.model.instruction_emma import encode_instruction
from emma_hf.training import prepare

datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")

# Questions, and the pictures that they are asked about.
ROWS = {
    "What is this?": ["photo.jpg"],
    "Hello there": [],
    "Which of the two is wider, the first or the second?": ["wide.png", "tiny.png"],
    "Is it a palette?": ["palette.png"],
}
TEMPERATURE = 0.7
TRAINERS = {"GRPO": (trl.GRPOTrainer, trl.GRPOConfig), "RLOO": (trl.RLOOTrainer, trl.RLOOConfig)}


@pytest.fixture
def pictures(reference):
    return {
        question: [Image.open(reference / "images" / name).convert("RGB") for name in names]
        for question, names in ROWS.items()
    }


def prompt_of(question: str, images: list) -> list[dict]:
    content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize(
    "messages",
    [
        ["<image>\nWhat is this?\nAnswer in one word."],
        ["<image>\n"],
        ["Between <image> two <image> pictures"],
        ["<image>\n", "It is a hat. USER: no", "  What   does ASSISTANT mean &amp; why — ça va 🙂?"],
        ["No picture", "Yes.", "<image>\nAnd now the word <<image> itself?"],
    ],
)
def test_the_ids_of_a_prompt_tell_its_instructions(processor, photo, messages):
    count = sum(text.count("<image>") for text in messages)
    chat = [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(messages)]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(
        images=[[photo] * count, []], text=[prompt, prompt.split("USER")[0] * 30], padding=True, return_tensors="pt"
    )
    ids = instruction_ids_of_prompts(processor, inputs["input_ids"], inputs["attention_mask"])
    assert torch.equal(ids, inputs["instruction_input_ids"])
    # Behind an answer, too.
    answer = processor.tokenizer(" A zebra, USER: zebra</s>", return_tensors="pt", add_special_tokens=False)
    alone = processor(images=[photo] * count, text=prompt, return_tensors="pt")["input_ids"]
    answered = torch.cat([alone, answer["input_ids"]], dim=1)
    assert torch.equal(instruction_ids_of_prompts(processor, answered), inputs["instruction_input_ids"])


def test_words_and_bare_prompts_are_read_as_the_processor_reads_them(processor, photo):
    content = [{"type": "image"}, {"type": "text", "text": "What does <image> mean?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    # Padding and begin of sequence do not belong to a prompt without roles.
    inputs = processor(
        images=[[photo], [photo]], text=[prompt, "Bare words <image> here"], padding=True, padding_side="left",
        return_tensors="pt",
    )  # fmt: skip
    ids = instruction_ids_of_prompts(processor, inputs["input_ids"], inputs["attention_mask"])
    assert torch.equal(ids, inputs["instruction_input_ids"])


def trainer_of(kind: str, folder, model, processor, pictures, **options):
    trainer_class, config_class = TRAINERS[kind]
    rows = {"prompt": [[{"role": "user", "content": question}] for question in pictures]}
    args = config_class(
        output_dir=str(folder), per_device_train_batch_size=1, gradient_accumulation_steps=8, num_generations=2,
        max_completion_length=4, max_steps=1, learning_rate=1e-3, temperature=TEMPERATURE, logging_steps=1,
        use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True, **options,
    )  # fmt: skip

    def reward(completions, **kwargs) -> list[float]:
        return [float(len(set(completion[0]["content"]))) for completion in completions]

    return trainer_class(
        model=model, reward_funcs=reward, args=args, processing_class=processor,
        train_dataset=datasets.Dataset.from_dict({**rows, "images": list(pictures.values())}),
    )  # fmt: skip


def entropy(model, processor, batch: dict, pictures: dict, instruction_of=lambda question: question) -> float:
    """Mean entropy of the answers' tokens in a batch, each row with the images and the instruction of its question."""
    width = max(
        len(processor(images=images or None, text=processor.apply_chat_template(
            prompt_of(question, images), add_generation_prompt=True
        ))["input_ids"][0])
        for question, images in pictures.items()
    )  # fmt: skip
    entropies = []
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"].bool()):
        text = processor.tokenizer.decode(ids[mask])
        question = next(question for question in pictures if question in text)
        inputs = {"input_ids": ids[mask][None]}
        if images := pictures[question]:
            inputs |= processor.image_processor(images, return_tensors="pt")
            instruction = encode_instruction(processor.instruction_tokenizer, instruction_of(question))
            inputs["instruction_input_ids"] = torch.tensor([instruction] * len(images))
        with torch.no_grad():
            logits = model(**inputs).logits[0] / TEMPERATURE
        answer = int(mask[width:].sum())
        distribution = torch.distributions.Categorical(logits=logits[-answer - 1 : -1])
        entropies.append(distribution.entropy())
    return torch.cat(entropies).mean().item()


@pytest.mark.parametrize(("kind", "stage"), [("GRPO", "lora"), ("RLOO", "finetune")])
def test_the_model_reads_the_instruction_of_each_image(trainable, processor, pictures, tmp_path, kind, stage):
    model = make_attentive(EmmaForConditionalGeneration.from_pretrained(trainable))
    # RLOO loads its reference model from there.
    model.save_pretrained(tmp_path / "model")
    initial = EmmaForConditionalGeneration.from_pretrained(tmp_path / "model").eval()
    model = prepare(EmmaForConditionalGeneration.from_pretrained(tmp_path / "model"), stage, lora_r=2, lora_dropout=0.0)
    before = deepcopy(dict(model.named_parameters()))
    trainer = trainer_of(kind, tmp_path, model, processor, pictures)
    read_instructions_from_prompts(trainer)
    batches = []
    base = model.get_base_model() if stage == "lora" else model
    base.model.register_forward_pre_hook(
        lambda _, args, kwargs: batches.append(kwargs) if torch.is_grad_enabled() else None, with_kwargs=True
    )
    trainer.train()
    # Row by row, so that some batches have no image.
    assert len(batches) == 8
    log = trainer.state.log_history[0]
    of_rows = [entropy(initial, processor, batch, pictures) for batch in batches]
    assert log["entropy"] == pytest.approx(sum(of_rows) / 8, rel=1e-5)
    other = [entropy(initial, processor, batch, pictures, lambda question: "a hat") for batch in batches]
    assert log["entropy"] != pytest.approx(sum(other) / 8, rel=1e-4)
    if kind == "RLOO":
        # The reference model is given the same.
        assert abs(log["kl"]) < 1e-4
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert any("modality_adaptation" in name for name in moved)
    # What is saved is the processor that was given.
    trainer.save_model(str(tmp_path / "saved"))
    for path in tmp_path.glob("saved/*.json"):
        assert "_PromptProcessor" not in path.read_text()
    saved = EmmaProcessor.from_pretrained(tmp_path / "saved")
    image = pictures["What is this?"][0]
    assert "instruction_input_ids" in saved(images=image, text="USER: <image>\nWhat? ASSISTANT:")


def test_without_its_instructions_a_row_with_an_image_is_refused(trainable, processor, pictures, tmp_path):
    model = prepare(EmmaForConditionalGeneration.from_pretrained(trainable), "finetune")
    with pytest.raises(EmmaError, match="pass `instruction_input_ids`"):
        trainer_of("GRPO", tmp_path, model, processor, pictures).train()
