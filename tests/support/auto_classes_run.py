"""What users do with a folder through Transformers alone, for `test_auto_classes.py`.

    python auto_classes_run.py FOLDER CACHED OUTPUT

loads FOLDER, CACHED (a name in the offline cache) and what was saved anew in OUTPUT by every class and pipeline, where
the package cannot be imported, and prints the answers as JSON. `photo.jpg` lies where it runs.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline

# Before Transformers 5.20, `transformers` has a placeholder of that name without torchvision.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

CONTENT = [{"type": "image", "url": "photo.jpg"}, {"type": "text", "text": "Who is it?"}]
MESSAGES = [{"role": "user", "content": CONTENT}]
# 4.57 has no class of the second's name, 5 none of the third's.
CLASSES = [
    getattr(transformers, name)
    for name in ("AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModelForVision2Seq")
    if hasattr(transformers, name)
]
TASKS = ["image-text-to-text"] + ["any-to-any"] * hasattr(transformers, "AutoModelForMultimodalLM")


def answer(model, processor) -> list[int]:
    inputs = processor.apply_chat_template(
        MESSAGES, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return tokens[0, inputs["input_ids"].shape[1] :].tolist()


def answers_of_every_class(source, module: str, **options) -> list[list[int]]:
    """The answers through the two classes that have a head; all classes are those of the package `module`."""
    config, processor, image_processor, base = (
        cls.from_pretrained(source, **options) for cls in (AutoConfig, AutoProcessor, AutoImageProcessor, AutoModel)
    )
    models = [cls.from_pretrained(source, dtype=torch.float32, **options).eval() for cls in CLASSES]
    loaded = (config, processor, image_processor, base, *models)
    names = ["EmmaConfig", "EmmaProcessor", "EmmaImageProcessor", "EmmaModel"] + ["EmmaForConditionalGeneration"] * 2
    assert [type(value).__name__ for value in loaded] == names
    for value in loaded:
        assert type(value).__module__.startswith(module), type(value)
    return [answer(model, processor) for model in models]


def answers_of_the_pipeline(task: str, source, **options) -> list[str]:
    """Answers to messages, to a batch of them, and to a prompt."""
    pipe = pipeline(task, model=str(source), dtype=torch.float32, **options)
    settings = {"generate_kwargs": {"max_new_tokens": 8, "do_sample": False}, "return_full_text": False}
    rows = pipe(text=MESSAGES, **settings)
    rows += [row for (row,) in pipe(text=[MESSAGES, MESSAGES], batch_size=2, **settings)]
    prompt = pipe.processor.apply_chat_template(MESSAGES, add_generation_prompt=True)
    rows += pipe(images="photo.jpg", text=prompt, **settings)
    assert len(rows) == 4
    return [row["generated_text"] for row in rows]


def without_torchvision() -> None:
    """The pipeline any-to-any asks for torchvision whatever the model takes; pictures need none."""
    from transformers.pipelines import any_to_any

    any_to_any.requires_backends = lambda pipeline, backends: None


def main(folder: str, cached: str, output: Path) -> None:
    trust = {"trust_remote_code": True}
    if "any-to-any" in TASKS:
        without_torchvision()
    said = {source: answers_of_every_class(source, "transformers_modules", **trust) for source in (folder, cached)}
    said |= {task: answers_of_the_pipeline(task, folder, **trust) for task in TASKS}
    for source, target in ((folder, output / "a"), (output / "a", output / "b")):
        AutoModelForImageTextToText.from_pretrained(source, **trust).save_pretrained(target, max_shard_size="400KB")
        AutoProcessor.from_pretrained(source, **trust).save_pretrained(target)
    AutoModel.from_pretrained(output / "b", **trust).save_pretrained(output / "base")
    said["saved anew"] = answers_of_every_class(output / "b", "transformers_modules", **trust)
    print("SAID", json.dumps(said))


if __name__ == "__main__":
    sys.modules["emma_hf"] = None
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
