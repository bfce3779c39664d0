"""Nothing that this package does uses a name that the running Transformers deprecates."""

import pytest
from support.processes import run_python
from support.rows import save_rows

# Another process, because Transformers logs each of these warnings only once.
EVERYTHING = """
import importlib.util, sys, warnings
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainingArguments, pipeline
from emma_hf import EMMA_TINY
from emma_hf.data import ConversationDataset, DataCollator
from emma_hf.hub import export
from emma_hf.tiny.scenes import Scene
from emma_hf.tiny.drawing import draw
from emma_hf.training.trainer import EmmaTrainer
from emma_hf.training.stages import prepare, stage_of

warnings.filterwarnings("error", category=FutureWarning)
warnings.filterwarnings("error", category=DeprecationWarning)

scene = draw(Scene.random(0))
content = [{"type": "image", "image": scene}, {"type": "text", "text": "How many things are there?"}]
chat = [{"role": "user", "content": content}]

processor = AutoProcessor.from_pretrained(EMMA_TINY)
model = AutoModelForImageTextToText.from_pretrained(EMMA_TINY, dtype=torch.float32).eval()
inputs = processor.apply_chat_template(
    chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
model.generate(**inputs, max_new_tokens=4, return_dict_in_generate=True)
model.generate(**inputs, max_new_tokens=4, num_beams=2)
prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
processor(images=scene, text=prompt, return_mm_token_type_ids=True, padding="max_length", max_length=300)

pipe = pipeline("image-text-to-text", model=model, processor=processor)
pipe(text=chat, generate_kwargs={"max_new_tokens": 2})

folder = export("emma-tiny", "exported")
spec = importlib.util.spec_from_file_location("handler", folder / "handler.py")
handler = importlib.util.module_from_spec(spec)
spec.loader.exec_module(handler)
handler.EndpointHandler(str(folder))({"inputs": {"image": scene, "question": "Is there a star?"}})

rows = ConversationDataset(sys.argv[1], processor, image_folder=sys.argv[2])
kind = "activation" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient"
arguments = TrainingArguments(
    "trained",
    **{**stage_of("finetune").training_arguments(), f"{kind}_checkpointing": True},
    max_steps=1, per_device_train_batch_size=2, use_cpu=True, report_to=[], dataloader_pin_memory=False,
)
prepare(model, "finetune")
EmmaTrainer(model=model, args=arguments, train_dataset=rows, data_collator=DataCollator(processor)).train()
processor.save_pretrained("trained")
"""


@pytest.mark.core
def test_no_deprecated_name_is_used(tmp_path, reference):
    rows = save_rows(tmp_path / "rows.json")
    done = run_python(EVERYTHING, rows, reference / "images", cwd=tmp_path, HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert done.returncode == 0, done.stderr
    # Pipelines of older versions hand `generate` a configuration beside the keywords of their caller.
    others = ("/torch/", "Passing `generation_config` together with")
    told = [line for line in done.stderr.splitlines() if "deprecat" in line and not any(o in line for o in others)]
    assert not told, "\n".join(told)
