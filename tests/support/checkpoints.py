"""The weights of a folder, and changes to the authors' checkpoint."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from emma_hf.conversion import convert
from emma_hf.conversion.instruction_vocabulary import BPE_NAME


def weights(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def converted_from(authors: Path, output: Path, **kwargs) -> Path:
    return convert(authors, output, clip=authors / "clip", progress=False, **kwargs)


def edit(path: Path, **changes) -> None:
    """Change the values of a JSON file; `...` removes one."""
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))


# The authors' other layouts, as their training script writes them.


def whole_tower(authors: Path) -> dict[str, torch.Tensor]:
    """`vision_tower.state_dict()`: both CLIP towers, here at other values than CLIP's, and the fusion weights."""
    towers = {"vision_model.": "vision_tower.", "text_model.": "text_encoder."}
    tower = {
        f"{prefix}{name}": value + 1
        for name, value in weights(authors / "clip").items()
        for kind, prefix in towers.items()
        if name.startswith(kind)
    }
    fusion = torch.load(authors / "vision_tower.bin", weights_only=True)
    return tower | {name.removeprefix("model.vision_tower."): value for name, value in fusion.items()}


def split_off_stage_one(authors: Path, folder: Path, base: Path, model_type: str = "llama") -> None:
    """Write what stage 1 saves to `folder`, and to `base` the language model with its tokenizer as Transformers does."""
    folder.mkdir()
    base.mkdir()
    tensors = weights(authors)
    projector = {name: value for name, value in tensors.items() if name.startswith("model.mm_projector.")}
    language_model = {
        name: value for name, value in tensors.items() if not name.startswith(("model.mm_projector.", "model.vision_"))
    }
    torch.save(projector, folder / "mm_projector.bin")
    torch.save(whole_tower(authors), folder / "vision_tower.bin")
    shutil.copy(authors / "config.json", folder)
    shutil.copytree(authors / "clip", folder / "clip")
    # Their training saves no instruction vocabulary; CLIP has it.
    shutil.copy(authors / BPE_NAME, folder / "clip")
    save_file(language_model, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((authors / "config.json").read_text())
    config = {name: value for name, value in config.items() if not name.startswith(("mm_", "use_mm", "tokenizer_"))}
    (base / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt"):
        if (authors / name).is_file():
            shutil.copy(authors / name, base)


def split_off_lora(authors: Path, folder: Path, base: Path, **kwargs) -> PreTrainedModel:
    """Write what a LoRA run saves to `folder` and its base model to `base`. Returns the language model of PEFT's merge.

    Args:
        kwargs: of `LoraConfig`.
    """
    from peft import LoraConfig, get_peft_model

    split_off_stage_one(authors, folder, base)
    projector = torch.load(folder / "mm_projector.bin", weights_only=True)
    (folder / "mm_projector.bin").unlink()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": targets, "task_type": "CAUSAL_LM", **kwargs})
    model = get_peft_model(model, config)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    lora = {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}
    model.save_pretrained(folder, state_dict=lora)
    fusion = {
        f"model.vision_tower.{name}": value for name, value in whole_tower(authors).items() if "tower" not in name
    }
    fusion = {name: value for name, value in fusion.items() if "encoder" not in name}
    trained = {f"base_model.model.{name}": value for name, value in (projector | fusion).items()}
    torch.save(trained, folder / "non_lora_trainables.bin")
    return model.merge_and_unload()


def exchange_language_model_for_qwen2(authors: Path) -> Qwen2ForCausalLM:
    """Make an authors' checkpoint of Qwen2 of one of Llama, with its byte-level tokenizer. Returns the language model."""
    projector = {name: value for name, value in weights(authors).items() if name.startswith("model.mm_projector.")}
    for path in [*authors.glob("model*"), *authors.glob("*token*")]:
        path.unlink()
    # The embedding has more rows than the tokenizer has tokens, as Qwen2's has.
    config = json.loads((authors / "config.json").read_text())
    config |= {"model_type": "llava_qwen2", "vocab_size": 510, "bos_token_id": None, "eos_token_id": None}
    (authors / "config.json").write_text(json.dumps(config))
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**{name: config[name] for name in names}, vocab_size=510, rms_norm_eps=1e-5))
    model = model.half().eval()
    save_file(dict(model.state_dict()) | projector, authors / "model.safetensors", metadata={"format": "pt"})
    bpe = ByteLevelBPETokenizer()
    texts = ["What color is the star? It's red.\n", "USER: ASSISTANT: 12 + 345 = 357", "Größe, 模型 und naïve Wörter"]
    bpe.train_from_iterator(texts * 10, vocab_size=500, min_frequency=1)
    bpe.save_model(str(authors))
    values = {"tokenizer_class": "Qwen2Tokenizer", "model_max_length": 32768, "eos_token": "<|im_end|>"}
    values |= {"pad_token": "<|endoftext|>", "unk_token": None, "bos_token": None, "errors": "replace"}
    values["added_tokens_decoder"] = {
        str(bpe.get_vocab_size() + index): {
            "content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
            "special": True,
        }
        for index, token in enumerate(["<|endoftext|>", "<|im_end|>"])
    }  # fmt: skip
    (authors / "tokenizer_config.json").write_text(json.dumps(values))
    return model.float()
