"""The trainer: the recorded batch's loss and gradients, rates, order of rows and sample answers."""

import json
import logging

import numpy as np
import pytest
import torch
from support.models import kept_features, logits_around, make_attentive
from support.recorded import GRADIENTS, authors_loss, recorded_inputs, recorded_labels
from support.rows import save_rows
from transformers import (
    GenerationConfig,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from emma_hf import EmmaError, EmmaForConditionalGeneration, EmmaProcessor
from emma_hf.data import ConversationDataset, DataCollator
from emma_hf.model.chat_template_emma import SYSTEM_PROMPT
from emma_hf.model.compat_emma import TRANSFORMERS_5
from emma_hf.training import EmmaTrainer, ModalityLengthSampler, SampleAnswersCallback, prepare


def arguments(folder, **kwargs) -> TrainingArguments:
    defaults = {"per_device_train_batch_size": 8, "max_steps": 1, "save_strategy": "no", "disable_tqdm": True}
    return TrainingArguments(
        output_dir=str(folder), report_to="none", logging_steps=1, use_cpu=True, **{**defaults, **kwargs}
    )


@pytest.fixture
def rows(tmp_path, processor, reference):
    return ConversationDataset(save_rows(tmp_path / "rows.json"), processor, reference / "images")


class Gradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.of = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.core
@pytest.mark.parametrize("kind", [Trainer, EmmaTrainer])
@pytest.mark.parametrize("rows_at_once", [3, 1])
def test_the_recorded_batch_has_the_recorded_loss_and_gradients(
    converted, processor, cases, tmp_path, kind, rows_at_once
):
    inputs, labels = recorded_inputs(cases, "train"), recorded_labels(cases)
    items = []
    for row, length in enumerate(inputs["attention_mask"].sum(-1).tolist()):
        item = {"input_ids": inputs["input_ids"][row, :length], "labels": labels[row, :length]}
        item |= {name: inputs[name][row : row + 1] for name in ("pixel_values", "instruction_input_ids")}
        items.append(item)
    model = EmmaForConditionalGeneration.from_pretrained(converted, dtype=torch.float32)
    gradients = Gradients()

    def over_their_vocabulary(outputs, labels, num_items_in_batch):
        return authors_loss(outputs.logits, labels) * (labels != -100).sum() / num_items_in_batch

    trainer = kind(
        model=model,
        # Rows one by one, accumulated, are the same batch.
        args=arguments(
            tmp_path,
            per_device_train_batch_size=rows_at_once,
            gradient_accumulation_steps=3 // rows_at_once,
            max_grad_norm=0.0,
            remove_unused_columns=False,
        ),
        train_dataset=items,
        data_collator=DataCollator(processor),
        compute_loss_func=over_their_vocabulary,
        callbacks=[gradients],
    )
    assert abs(trainer.train().training_loss - cases["train.loss"].item()) < 1e-4
    for theirs, ours in GRADIENTS.items():
        expected = cases[f"train.grad|{theirs}"]
        actual = gradients.of[ours][: expected.shape[0]]
        assert (actual - expected).norm() <= 1e-3 * expected.norm(), theirs


@pytest.mark.core
@pytest.mark.parametrize("kind", [Trainer, EmmaTrainer])
def test_fewer_visual_tokens_train_the_rows_of_those_that_are_chosen(trainable, reference, tmp_path, kind):
    processor = EmmaProcessor.from_pretrained(trainable, visual_tokens=2)
    rows = ConversationDataset(save_rows(tmp_path / "rows.json"), processor, reference / "images")
    collate = DataCollator(processor)
    batch = collate([rows[index] for index in range(8)])
    # All tokens are computed, and their gradients are those of the ones that the prompts hold.
    whole = EmmaForConditionalGeneration.from_pretrained(trainable, dtype=torch.float32)
    logits = logits_around(whole, batch, kept_features(whole, batch, 2))
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    loss.backward()
    gradients = Gradients()
    trainer = kind(
        model=EmmaForConditionalGeneration.from_pretrained(trainable, visual_tokens=2, dtype=torch.float32),
        args=arguments(tmp_path, max_grad_norm=0.0, remove_unused_columns=False),
        train_dataset=[rows[index] for index in range(8)],
        data_collator=collate,
        callbacks=[gradients],
    )
    assert trainer.train().training_loss == pytest.approx(loss.item(), rel=1e-4)
    name = "model.modality_adaptation.visual_alignment.weight"
    expected, found = whole.get_parameter(name).grad, gradients.of[name]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-3)
    learned = found.abs().sum(1) > 0
    assert torch.equal(learned, expected.abs().sum(1) > 0)
    assert 2 < learned.sum() < 16


@pytest.fixture
def mixed(rows):
    """Rows with and without an image, of different lengths."""
    return [rows[index] for index in (0, 7, 3, 6)]


def next_token_loss(logits, labels, epsilon: float) -> torch.Tensor:
    """Label smoothing by its definition: a share `epsilon` of each label is spread evenly over the vocabulary."""
    log_probabilities = logits[:, :-1].float().log_softmax(-1)
    labels = labels[:, 1:]
    target = torch.nn.functional.one_hot(labels.clamp(min=0), logits.shape[-1]).float()
    target = (1 - epsilon) * target + epsilon / logits.shape[-1]
    return -((target * log_probabilities).sum(-1) * (labels != -100)).sum() / (labels != -100).sum()


@pytest.mark.parametrize("trainer_class", [Trainer, EmmaTrainer])
@pytest.mark.parametrize("stage", ["finetune", "lora"])
@pytest.mark.parametrize("epsilon", [1e-9, 0.3])
def test_label_smoothing_is_of_the_next_token(trainable, processor, mixed, tmp_path, trainer_class, stage, epsilon):
    model = prepare(EmmaForConditionalGeneration.from_pretrained(trainable), stage, lora_r=2, lora_dropout=0.0)
    collate = DataCollator(processor)
    batch = collate(mixed)
    with torch.no_grad():
        outputs = model.eval()(**batch)
    expected = next_token_loss(outputs.logits, batch["labels"], epsilon)
    if epsilon < 0.1:
        torch.testing.assert_close(expected, outputs.loss)
    # 4.57 itself does not divide a smoothed loss by the accumulated batch; `EmmaTrainer` does.
    steps = 2 if trainer_class is EmmaTrainer or TRANSFORMERS_5 else 1
    trainer = trainer_class(
        model=model,
        args=arguments(
            tmp_path, label_smoothing_factor=epsilon, per_device_train_batch_size=4 // steps,
            gradient_accumulation_steps=steps, per_device_eval_batch_size=4, learning_rate=0.0, remove_unused_columns=False,
        ),
        train_dataset=mixed,
        eval_dataset=mixed,
        data_collator=collate,
    )  # fmt: skip
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-4)
    # The log has four decimals on 4.57.
    assert trainer.train().training_loss == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("trainer_class", [Trainer, EmmaTrainer])
def test_predictions_over_rows_with_and_without_images(trainable, processor, mixed, tmp_path, trainer_class):
    model = EmmaForConditionalGeneration.from_pretrained(trainable).eval()
    collate, seen = DataCollator(processor), []

    def accuracy(prediction) -> dict[str, float]:
        seen.append(prediction)
        hits = prediction.predictions.argmax(-1)[:, :-1] == prediction.label_ids[:, 1:]
        return {"accuracy": hits[prediction.label_ids[:, 1:] != -100].mean().item()}

    trainer = trainer_class(
        model=model,
        args=arguments(tmp_path, per_device_eval_batch_size=1, remove_unused_columns=False),
        eval_dataset=mixed,
        data_collator=collate,
        compute_metrics=accuracy,
    )
    prediction = trainer.predict(mixed)
    # The logits alone, and no image features: one array, padded with -100.
    assert isinstance(prediction.predictions, np.ndarray)
    assert prediction.predictions.shape[0] == len(mixed)
    for row, item in enumerate(mixed):
        with torch.no_grad():
            logits = model(**collate([item])).logits[0].numpy()
        np.testing.assert_allclose(prediction.predictions[row, : len(logits)], logits, atol=1e-4)
        assert (prediction.predictions[row, len(logits) :] == -100).all()
    assert trainer.evaluate()["eval_accuracy"] == prediction.metrics["test_accuracy"]
    assert len(seen) == 2


def test_a_step_without_images_in_the_first_stage_changes_nothing(trainable, processor, mixed, tmp_path):
    model = prepare(EmmaForConditionalGeneration.from_pretrained(trainable), "pretrain")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = EmmaTrainer(
        model=model,
        args=arguments(tmp_path, learning_rate=1.0),
        train_dataset=[item for item in mixed if "pixel_values" not in item],
        data_collator=DataCollator(processor),
    )
    with torch.no_grad():
        expected = model(**DataCollator(processor)([item for item in mixed if "pixel_values" not in item])).loss
    assert trainer.train().training_loss == pytest.approx(expected.item(), rel=1e-4)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_the_optimizer_has_both_rates_and_decays_no_bias(trainable, processor, rows, tmp_path):
    model = prepare(EmmaForConditionalGeneration.from_pretrained(trainable), "finetune")
    args = arguments(tmp_path, learning_rate=1e-3, weight_decay=0.1)
    trainer = EmmaTrainer(model=model, args=args, train_dataset=rows, projector_learning_rate=1e-4)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = trainer.create_optimizer()
    seen = {}
    for group in optimizer.param_groups:
        seen.update({names[id(parameter)]: (group["lr"], group["weight_decay"]) for parameter in group["params"]})
    assert set(seen) == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert seen["model.multi_modal_projector.linear_1.weight"] == (1e-4, 0.1)
    assert seen["model.modality_adaptation.visual_alignment.bias"] == (1e-4, 0.0)
    assert seen["lm_head.weight"] == (1e-3, 0.1)
    assert seen["model.language_model.norm.weight"] == (1e-3, 0.0)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert EmmaTrainer(model=model, args=args).create_optimizer().param_groups[0]["lr"] == 1e-3


def test_sample_answers_of_a_row_with_an_image_in_a_later_turn(trainable, processor, reference, tmp_path):
    turns = ["Hello", "Hi.", "<image>\nWho?", "An officer."]
    conversation = [{"from": "gpt" if index % 2 else "human", "value": text} for index, text in enumerate(turns)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"image": "photo.jpg", "conversations": conversation}]))
    rows = ConversationDataset(path, processor, reference / "images")
    model = EmmaForConditionalGeneration.from_pretrained(trainable)
    trainer = EmmaTrainer(
        model=model, args=arguments(tmp_path), eval_dataset=rows, data_collator=DataCollator(processor),
        callbacks=[SampleAnswersCallback(rows, processor, max_new_tokens=2)],
    )  # fmt: skip
    trainer.evaluate()
    assert json.loads((tmp_path / "sample_answers.jsonl").read_text())["expected"] == "Hi."


def test_the_trainer_groups_rows_of_all_accumulated_steps(trainable, rows, tmp_path):
    model = prepare(EmmaForConditionalGeneration.from_pretrained(trainable), "pretrain")
    args = arguments(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, seed=7)
    sampler = EmmaTrainer(model=model, args=args, train_dataset=rows)._get_train_sampler()
    assert isinstance(sampler, ModalityLengthSampler)
    assert (sampler.batch_size, sampler.seed) == (4, 7)
    plain = EmmaTrainer(model=model, args=args, train_dataset=rows, group_by_modality=False)._get_train_sampler()
    assert isinstance(plain, torch.utils.data.RandomSampler)


def test_sample_answers_are_what_generate_says(trainable, processor, rows, tmp_path):
    model = EmmaForConditionalGeneration.from_pretrained(trainable).train()
    args = arguments(tmp_path, per_device_eval_batch_size=4, prediction_loss_only=True)
    trainer = EmmaTrainer(
        model=model, args=args, eval_dataset=rows, data_collator=DataCollator(processor), processing_class=processor
    )
    trainer.add_callback(SampleAnswersCallback(rows, processor, rows=9, max_new_tokens=5))
    for _ in range(2):
        trainer.evaluate()
    # The second evaluation of a step answers nothing anew.
    samples = [json.loads(line) for line in (tmp_path / "sample_answers.jsonl").read_text().splitlines()]
    assert [sample["row"] for sample in samples] == list(range(8))
    assert [sample["step"] for sample in samples] == [0] * 8
    assert samples[0]["expected"] == "It is photo."
    assert samples[7]["expected"] == "Good morning."
    for row, text in ((0, "USER: <image>\nWhat is picture 0? ASSISTANT:"), (7, "USER: Hello there ASSISTANT:")):
        _conversation, pictures = rows.conversation(row)
        system = (
            "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
            "detailed, and polite answers to the user's questions. "
        )
        inputs = processor(images=pictures or None, text=system + text, return_tensors="pt")
        tokens = model.eval().generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert samples[row]["answer"] == processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def test_what_was_skipped_is_reported_at_the_end(trainable, processor, reference, tmp_path, caplog):
    path = save_rows(tmp_path / "rows.json")
    path.write_text(path.read_text().replace("wide.png", "gone.png"))
    rows = ConversationDataset(path, processor, reference / "images", on_error="skip")
    model = prepare(EmmaForConditionalGeneration.from_pretrained(trainable), "finetune")
    trainer = EmmaTrainer(
        model=model, args=arguments(tmp_path / "out"), train_dataset=rows, data_collator=DataCollator(processor)
    )
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    trainer.train()
    logger.removeHandler(caplog.handler)
    assert "1 of 8 rows were skipped:\nRow 5 of rows.json: " in caplog.text
    assert "gone.png" in caplog.text


@pytest.fixture
def rows_of_many_kinds(tmp_path, processor, reference):
    """Rows with an image, without one, of two images in a turn, and of two turns with an image each."""
    turns = [
        (["photo.jpg"], ["<image>\nWhat is this?", "A person."]),
        ([], ["Hello there", "Good morning."]),
        (["wide.png", "photo.jpg"], ["<image>\n<image>\nWhich of the two is wider, the first or the second?", "One."]),
        (["tiny.png", "palette.png"], ["<image>\nWhat is it?", "A dot.", "<image>\nAnd this?", "Colors."]),
    ]
    rows = [
        {
            "image": images,
            "conversations": [{"from": "gpt" if i % 2 else "human", "value": text} for i, text in enumerate(texts)],
        }
        for images, texts in turns
    ]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    return ConversationDataset(path, processor, reference / "images")


def generated(model, processor, rows, index: int, **kwargs) -> list[int]:
    """Answer to the first question of a row, from a prompt that the processor makes of its words alone."""
    conversation, images = rows.conversation(index)
    question = conversation[0]["value"]
    prompt = f"{SYSTEM_PROMPT} USER: {question} ASSISTANT:"
    # In training the whole turn is the instruction, and of a row of several turns the shortest.
    words = min((message["value"].replace("<image>\n", "") for message in conversation[::2]), key=len)
    inputs = processor(
        images=images[: question.count("<image>")] or None, text=prompt, instructions=words, return_tensors="pt"
    )
    return model.generate(**inputs, **kwargs)[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.fixture
def attentive(trainable):
    return make_attentive(EmmaForConditionalGeneration.from_pretrained(trainable)).eval()


@pytest.mark.parametrize(("stage", "rows_at_once"), [("finetune", 1), ("lora", 4)])
def test_predicted_answers_are_what_generate_says(
    attentive, processor, rows_of_many_kinds, tmp_path, stage, rows_at_once
):
    rows = rows_of_many_kinds
    model = prepare(attentive, stage, lora_r=2).eval()
    free = [generated(model, processor, rows, index, max_new_tokens=7) for index in range(4)]
    # An answer that ends before the others do.
    end = free[0][2]
    config = GenerationConfig(eos_token_id=[2, end], pad_token_id=0, max_new_tokens=7, do_sample=False)
    expected = [generated(model, processor, rows, index, generation_config=config) for index in range(4)]
    assert len({tuple(answer) for answer in expected}) == 4
    assert 0 < expected[0].index(end) < 6

    def exact(prediction) -> dict[str, float]:
        return {"exact": float((prediction.predictions == seen.predictions).all())}

    trainer = EmmaTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(
            output_dir=str(tmp_path), predict_with_generate=True, generation_config=config, report_to="none",
            use_cpu=True, disable_tqdm=True, per_device_eval_batch_size=rows_at_once,
        ),
        eval_dataset=rows,
        data_collator=DataCollator(processor),
    )  # fmt: skip
    seen = trainer.predict(rows)
    for answer, ids in zip(expected, seen.predictions, strict=True):
        assert ids[ids != -100].tolist() == answer
        assert (ids[len(answer) :] == -100).all()
    labels = [processor.tokenizer.decode(ids[ids != -100]) for ids in seen.label_ids]
    assert labels == ["A person.</s>", "Good morning.</s>", "One.</s>", "A dot.</s>"]
    trainer.compute_metrics = exact
    metrics = trainer.evaluate()
    assert metrics["eval_exact"] == 1.0
    # The loss is that of every answer, as without generation.
    trainer.args.predict_with_generate, trainer.compute_metrics = False, None
    assert trainer.predict(rows).metrics["test_loss"] == metrics["eval_loss"] == seen.metrics["test_loss"]


def test_the_length_and_the_beams_of_answers_are_arguments(attentive, processor, rows_of_many_kinds, tmp_path):
    args = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path), predict_with_generate=True, generation_max_length=5, generation_num_beams=4,
        report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    answers = EmmaTrainer(model=attentive, args=args, data_collator=DataCollator(processor)).predict(rows_of_many_kinds)
    expected, greedy = (
        [
            generated(attentive, processor, rows_of_many_kinds, row, max_new_tokens=5, num_beams=beams)
            for row in range(4)
        ]
        for beams in (4, 1)
    )
    assert expected != greedy
    assert answers.predictions.tolist() == expected


def test_a_trainer_that_would_generate_behind_the_answers_is_refused(trainable, processor, mixed, tmp_path):
    args = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path), predict_with_generate=True, report_to="none", use_cpu=True, disable_tqdm=True
    )
    model = EmmaForConditionalGeneration.from_pretrained(trainable)
    trainer = Seq2SeqTrainer(model=model, args=args, data_collator=DataCollator(processor))
    with pytest.raises(EmmaError, match="holds its answer already: pass the prompt alone. .*EmmaTrainer"):
        trainer.predict(mixed)
