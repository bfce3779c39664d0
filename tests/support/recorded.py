"""The recorded outputs of the authors' implementation, in the form that our model takes."""

import torch

IMAGE_TOKENS = 16
AUTHORS_VOCABULARY = 700
# The authors' names of the weights whose gradients are recorded, and ours.
GRADIENTS = {
    "lm_head.weight": "lm_head.weight",
    "model.layers.0.self_attn.q_proj.weight": "model.language_model.layers.0.self_attn.q_proj.weight",
    "model.mm_projector.0.weight": "model.multi_modal_projector.linear_1.weight",
    "model.mm_projector.2.bias": "model.multi_modal_projector.linear_2.bias",
    "model.vision_tower.image_text_infusion.bias": "model.modality_adaptation.visual_alignment.bias",
    "model.vision_tower.image_text_infusion.weight": "model.modality_adaptation.visual_alignment.weight",
    "model.vision_tower.text_projection.bias": "model.modality_adaptation.instruction_projection.bias",
    "model.vision_tower.text_projection.weight": "model.modality_adaptation.instruction_projection.weight",
}


def recorded_inputs(cases: dict[str, torch.Tensor], name: str, image_id: int = 700) -> dict[str, torch.Tensor]:
    """Inputs of a recorded case, each -200 expanded to the placeholders of one image; padding is 0."""
    rows, masks = [], []
    ids = cases[f"{name}.input_ids"]
    mask = cases.get(f"{name}.attention_mask", torch.ones_like(ids))
    for row, kept in zip(ids.tolist(), mask.tolist()):
        expanded = []
        for token, keep in zip(row, kept):
            if keep:
                expanded += [image_id] * IMAGE_TOKENS if token == -200 else [token]
        rows.append(torch.tensor(expanded))
        masks.append(torch.ones(len(expanded), dtype=torch.long))
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(rows, batch_first=True),
        "attention_mask": pad(masks, batch_first=True),
        "pixel_values": cases[f"{name}.pixel_values"],
        "instruction_input_ids": cases[f"{name}.instruction_input_ids"],
    }


def authors_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Next-token cross-entropy over the authors' vocabulary, which has no row for `<image>`."""
    logits = logits[:, :-1, :AUTHORS_VOCABULARY].float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def recorded_labels(cases: dict[str, torch.Tensor]) -> torch.Tensor:
    """The recorded labels, with no loss on the placeholders that stand for an image."""
    rows = []
    masks = cases["train.attention_mask"]
    for ids, labels, mask in zip(cases["train.input_ids"], cases["train.labels"], masks):
        row = []
        for token, label, keep in zip(ids.tolist(), labels.tolist(), mask.tolist()):
            if keep:
                row += [-100] * 16 if token == -200 else [label]
        rows.append(torch.tensor(row))
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
