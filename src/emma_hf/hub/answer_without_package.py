"""Script that loads a model as a user without this package does, answers one question and prints a report as JSON.

python answer_without_package.py MODEL [REVISION]
"""

import json
import sys
from typing import Any

QUESTION = "What do you see?"


def main(source: str, revision: str | None = None) -> dict[str, Any]:
    """Load a model by the Auto classes, and answer in at most 16 tokens.

    Args:
        source: folder, or Hub id of a repository in the cache.
        revision: branch, tag or commit of a Hub id.

    Returns:
        The answer, its number of tokens, whether all logits are finite, the weights that were missing, unexpected or
        of another shape, and the version of Transformers.
    """
    import torch
    import transformers
    from PIL import Image, ImageDraw
    from transformers import AutoModelForImageTextToText, AutoProcessor

    options: dict[str, Any] = {"trust_remote_code": True}
    if revision is not None:
        options["revision"] = revision
    processor = AutoProcessor.from_pretrained(source, **options)
    model, info = AutoModelForImageTextToText.from_pretrained(source, dtype="auto", output_loading_info=True, **options)
    image = Image.new("RGB", (160, 120), "white")
    ImageDraw.Draw(image).ellipse((40, 20, 120, 100), fill="red")
    content = [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    ).to(model.device, model.dtype)
    outputs = model.eval().generate(
        **inputs, max_new_tokens=16, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    tokens = outputs.sequences[0, inputs["input_ids"].shape[1] :]
    return {
        "answer": processor.tokenizer.decode(tokens, skip_special_tokens=True).strip(),
        "tokens": len(tokens),
        "finite": all(bool(torch.isfinite(logits).all()) for logits in outputs.logits),
        "weights": sorted(
            str(name) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in info.get(kind, ())
        ),
        "transformers": transformers.__version__,
    }


if __name__ == "__main__":
    # Imports of the package fail as on a machine without it.
    sys.modules["emma_hf"] = None  # type: ignore[assignment]
    print(json.dumps(main(*sys.argv[1:])))
