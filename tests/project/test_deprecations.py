"""Nothing that this package does uses a name that the running Transformers deprecates."""

import json

import pytest
from support.processes import run_python
from support.rows import save_rows

# In another process, which listens before anything of Transformers is imported: it says most of this through its
# logger, and once.
LISTEN = """
import json, logging, re, sys, traceback, warnings

said = []

def record(message):
    stack = "".join(traceback.format_stack()[-12:-2])
    # Before 5.20, Transformers' own pipelines hand any model's `generate` both.
    of_the_pipeline = message.startswith("Passing `generation_config`") and "/transformers/pipelines/" in stack
    if re.search("deprecat|will be removed|FutureWarning", message, re.IGNORECASE) and not of_the_pipeline:
        said.append(f"{message}\\n{stack}")

class Listener(logging.Handler):
    def emit(self, entry):
        record(entry.getMessage())

for name in ("", "transformers"):
    logging.getLogger(name).addHandler(Listener())
warnings.simplefilter("always")
warnings.showwarning = lambda message, category, *where: record(f"{category.__name__}: {message}")
# torch's own, while it imports a part of itself.
warnings.filterwarnings("ignore", "`torch.jit.script", module=r"torch\\.")
"""
USE = """
rows, pictures = sys.argv[1:]
import importlib.util, io
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments, pipeline
from transformers.utils.logging import get_logger
from emma_hf import EMMA_TINY
from emma_hf.cli import main
from emma_hf.data import ConversationDataset, DataCollator
from emma_hf.hub import export
from emma_hf.tiny.drawing import draw
from emma_hf.tiny.scenes import Scene
from emma_hf.training import EmmaTrainer, prepare, stage_of

scene = draw(Scene.random(0))
content = [{"type": "image", "image": scene}, {"type": "text", "text": "How many things are there?"}]
chat = [{"role": "user", "content": content}]

processor = AutoProcessor.from_pretrained(EMMA_TINY)
model = AutoModelForImageTextToText.from_pretrained(EMMA_TINY, dtype=torch.float32).eval()
inputs = processor.apply_chat_template(
    chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
outputs = model(**inputs, labels=inputs["input_ids"], output_hidden_states=True, output_attentions=True)
outputs.to_tuple()
for kind in ({"return_dict_in_generate": True}, {"num_beams": 2}, {"do_sample": True}, {"use_cache": False}):
    model.generate(**inputs, max_new_tokens=3, **kind)
prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
processor(images=scene, text=prompt, return_mm_token_type_ids=True, padding="max_length", max_length=300)

# The second turn goes on from the cache of the first.
scene.save("scene.png")
sys.stdin = io.StringIO("How many things are there?\\nIs there a star?\\n\\n")
assert main(["chat", "--max-new-tokens", "3", "scene.png"]) == 0

pipe = pipeline("image-text-to-text", model=model, processor=processor)
pipe(text=chat, generate_kwargs={"max_new_tokens": 2})

folder = export("emma-tiny", "exported")
spec = importlib.util.spec_from_file_location("handler", folder / "handler.py")
handler = importlib.util.module_from_spec(spec)
spec.loader.exec_module(handler)
handler.EndpointHandler(str(folder))({"inputs": {"image": scene, "question": "Is there a star?"}})

dataset = ConversationDataset(rows, processor, image_folder=pictures)
activation = hasattr(TrainingArguments, "activation_checkpointing")
prepare(model, "finetune")
for kind in (Trainer, EmmaTrainer):
    arguments = TrainingArguments(
        "trained",
        **{
            **stage_of("finetune").training_arguments(),
            "activation_checkpointing" if activation else "gradient_checkpointing": True,
        },
        max_steps=1, save_steps=1, per_device_train_batch_size=2, use_cpu=True, report_to=[],
        dataloader_pin_memory=False, remove_unused_columns=False,
    )
    kind(model=model, args=arguments, train_dataset=dataset, data_collator=DataCollator(processor)).train()
model.save_pretrained("trained")
processor.save_pretrained("trained")

heard = list(said)
# That nothing was said means something, since these are heard.
warnings.warn("deprecated, by a warning", FutureWarning)
get_logger("transformers.any").warning_once("deprecated, by a logger")
# Where the environment says CI, Transformers' logger hands its messages to the root logger too: heard twice.
print(json.dumps([heard, sorted({message.splitlines()[0] for message in said[len(heard):]})]))
"""


@pytest.mark.core
def test_no_deprecated_name_is_used(tmp_path, reference):
    rows = save_rows(tmp_path / "rows.json")
    done = run_python(
        LISTEN + USE, rows, reference / "images", cwd=tmp_path, HF_MODULES_CACHE=str(tmp_path / "modules")
    )
    assert done.returncode == 0, done.stderr
    heard, controls = json.loads(done.stdout.splitlines()[-1])
    assert heard == [], "\n\n".join(heard)
    assert controls == ["FutureWarning: deprecated, by a warning", "deprecated, by a logger"]
