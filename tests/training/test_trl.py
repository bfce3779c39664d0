"""TRL trains EMMA as it is: supervised fine-tuning and preferences on pictures."""

import pytest
import torch
from PIL import Image

from emma_hf import EmmaForConditionalGeneration
from emma_hf.data import ChatDataset
from emma_hf.model.compat_emma import TRANSFORMERS_5
from emma_hf.model.instruction_emma import encode_instruction
from emma_hf.training.stages import FUSION_MODULES, prepare

datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")

PICTURES = ["photo.jpg", "palette.png", "tall_gray.png", "tiny.png"]
QUESTIONS = [f"What is picture {number}?" for number in range(len(PICTURES))]
# A word that would stand out among the words of an instruction.
ANSWER = "Zebra."


def chat(role: str, text: str) -> list[dict]:
    return [{"role": role, "content": text}]


@pytest.fixture
def pictures(reference):
    return [[Image.open(reference / "images" / name).convert("RGB")] for name in PICTURES]


def train(kind, config, trainable, folder, processor, rows, pictures, **options) -> list[dict]:
    """Train two steps, see that what should move has moved, and return the batches that reached the model."""
    model = prepare(EmmaForConditionalGeneration.from_pretrained(trainable), "finetune")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    batches = []
    model.register_forward_pre_hook(lambda _, args, kwargs: batches.append(kwargs), with_kwargs=True)
    args = config(
        output_dir=str(folder),
        per_device_train_batch_size=len(PICTURES),
        max_steps=2,
        learning_rate=1e-3,
        max_length=None,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )
    data = datasets.Dataset.from_dict({**rows, "images": pictures})
    kind(model=model, args=args, train_dataset=data, processing_class=processor).train()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    fusion = {name for name in before if any(f".{module}." in name for module in FUSION_MODULES)}
    assert fusion
    assert fusion <= moved
    return batches


def asked(batch: dict, processor) -> list[str]:
    """The question of each row of a batch, whose instruction was that question and nothing else."""
    questions = []
    for ids, instruction in zip(batch["input_ids"], batch["instruction_input_ids"], strict=True):
        text = processor.tokenizer.decode(ids)
        question = next(question for question in QUESTIONS if question in text)
        assert ANSWER in text or "whale" in text
        expected = encode_instruction(processor.instruction_tokenizer, question)
        assert instruction.tolist() == expected
        questions.append(question)
    return questions


def test_supervised_on_messages(trainable, processor, pictures, tmp_path):
    rows = {"messages": [chat("user", question) + chat("assistant", ANSWER) for question in QUESTIONS]}
    # 4.57 finds no assistant turns in a batch with pictures, which TRL refuses.
    only = {"assistant_only_loss": True} if TRANSFORMERS_5 else {}
    batches = train(trl.SFTTrainer, trl.SFTConfig, trainable, tmp_path, processor, rows, pictures, **only)
    dataset = ChatDataset(datasets.Dataset.from_dict({**rows, "images": pictures}), processor)
    ours = {QUESTIONS[index]: dataset[index] for index in range(len(dataset))}
    seen = asked(batches[0], processor)
    assert sorted(seen) == QUESTIONS
    for question, ids, labels, pixels in zip(
        seen, *(batches[0][name] for name in ("input_ids", "labels", "pixel_values")), strict=True
    ):
        assert torch.equal(ids, ours[question]["input_ids"])
        assert torch.equal(pixels, ours[question]["pixel_values"][0])
        if only:
            assert torch.equal(labels, ours[question]["labels"])


def test_supervised_on_prompts_and_completions(trainable, processor, pictures, tmp_path):
    prompts = [chat("user", question) for question in QUESTIONS]
    rows = {"prompt": prompts, "completion": [chat("assistant", ANSWER)] * len(prompts)}
    batches = train(trl.SFTTrainer, trl.SFTConfig, trainable, tmp_path, processor, rows, pictures)
    assert sorted(asked(batches[0], processor)) == QUESTIONS
    for labels in batches[0]["labels"]:
        assert processor.tokenizer.decode(labels[labels != -100]).split() == [f"{ANSWER}</s>"]


def test_preferences(trainable, processor, pictures, tmp_path):
    prompts = [chat("user", question) for question in QUESTIONS]
    chosen, rejected = [chat("assistant", ANSWER)] * len(prompts), [chat("assistant", "A blue whale.")] * len(prompts)
    rows = {"prompt": prompts, "chosen": chosen, "rejected": rejected}
    batches = train(trl.DPOTrainer, trl.DPOConfig, trainable, tmp_path, processor, rows, pictures)
    # Chosen and rejected answers of a row share its picture and its instruction.
    seen = asked(batches[0], processor)
    assert seen[: len(PICTURES)] == seen[len(PICTURES) :]
    assert sorted(set(seen)) == QUESTIONS
    pixels = batches[0]["pixel_values"]
    assert torch.equal(pixels[: len(PICTURES)], pixels[len(PICTURES) :])
