"""TRL trains EMMA as it is: supervised fine-tuning and preferences, paired or not, on pictures."""

import math

import pytest
import torch
from PIL import Image
from support.models import make_attentive

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


# Rows with one picture, none and two.
MIXED = {
    "What is this?": ["photo.jpg"],
    "Hello there": [],
    "Which of the two is wider, the first or the second?": ["wide.png", "tiny.png"],
    "Is it a palette?": ["palette.png"],
}
WHALE = "A blue whale."
ROWS = {
    "SFT": {
        "prompt": [chat("user", question) for question in MIXED],
        "completion": [chat("assistant", ANSWER)] * len(MIXED),
    },
    "DPO": {
        "prompt": [chat("user", question) for question in MIXED],
        "chosen": [chat("assistant", ANSWER)] * len(MIXED),
        "rejected": [chat("assistant", WHALE)] * len(MIXED),
    },
    "KTO": {
        "prompt": [chat("user", question) for question in MIXED],
        "completion": [chat("assistant", ANSWER), chat("assistant", WHALE)] * 2,
        "label": [True, False] * 2,
    },
}


def log_probabilities(model, processor, batch: dict, pictures: dict, instruction_of=lambda question: question):
    """Sum over the labels of each row of a batch, (rows,), with the pictures and the instruction of its question."""
    sums = []
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"].bool(), batch["labels"]):
        question = next(question for question in MIXED if question in processor.tokenizer.decode(ids[mask]))
        inputs = {"input_ids": ids[mask][None]}
        if images := pictures[question]:
            inputs |= processor.image_processor(images, return_tensors="pt")
            instruction = encode_instruction(processor.instruction_tokenizer, instruction_of(question))
            inputs["instruction_input_ids"] = torch.tensor([instruction] * len(images))
        with torch.no_grad():
            logits = model(**inputs).logits[0, :-1]
        labels = labels[mask][1:]
        rows = logits.log_softmax(-1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
        sums.append(rows[labels != -100].sum())
    return torch.stack(sums)


def logged(kind: str, batch: dict, sums: torch.Tensor, processor) -> dict[str, float]:
    """What TRL logs of log-probabilities (rows,): the mean loss of a label, or the means of good and bad answers."""
    if kind == "SFT":
        return {"loss": -sums.sum().item() / (batch["labels"][:, 1:] != -100).sum().item()}
    is_good = torch.tensor([ANSWER in processor.tokenizer.decode(ids) for ids in batch["input_ids"]])
    return {"logps/chosen": sums[is_good].mean().item(), "logps/rejected": sums[~is_good].mean().item()}


@pytest.mark.parametrize("kind", ROWS)
def test_what_is_logged_is_of_each_row_with_its_pictures_and_instruction(
    trainable, processor, reference, tmp_path, kind
):
    make_attentive(EmmaForConditionalGeneration.from_pretrained(trainable)).save_pretrained(tmp_path / "model")
    # The reference models come from there.
    initial, model = (EmmaForConditionalGeneration.from_pretrained(tmp_path / "model").eval() for _ in range(2))
    pictures = {
        question: [Image.open(reference / "images" / name).convert("RGB") for name in names]
        for question, names in MIXED.items()
    }
    batches = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: batches.append(kwargs) if torch.is_grad_enabled() else None, with_kwargs=True
    )
    args = getattr(trl, f"{kind}Config")(
        output_dir=str(tmp_path), per_device_train_batch_size=len(MIXED), max_steps=1, max_length=None, bf16=False,
        use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    trainer = getattr(trl, f"{kind}Trainer")(
        model=prepare(model, "finetune"), args=args, processing_class=processor,
        train_dataset=datasets.Dataset.from_dict({**ROWS[kind], "images": list(pictures.values())}),
    )  # fmt: skip
    trainer.train()
    (batch,), log = batches, trainer.state.log_history[0]
    # A trained model that is still its reference has the loss of no preference.
    assert log["loss"] == pytest.approx({"DPO": math.log(2), "KTO": 0.5}.get(kind, log["loss"]), abs=1e-4)
    expected = logged(kind, batch, log_probabilities(initial, processor, batch, pictures), processor)
    assert {name: log[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    swapped = {**pictures, "What is this?": pictures["Is it a palette?"]}
    for other in (
        log_probabilities(initial, processor, batch, swapped),
        log_probabilities(initial, processor, batch, pictures, lambda question: f"{question}?"),
    ):
        # With other pictures or instructions the good answers would have another probability.
        name, value = next(iter(logged(kind, batch, other, processor).items()))
        assert log[name] != pytest.approx(value, rel=1e-4)
