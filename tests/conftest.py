"""Fixtures shared by all tests: the recorded outputs of the authors' implementation, and models made from them."""

import copy
import json
import os
from pathlib import Path

# Nothing in the tests may reach for the network; the variable is read on import.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from safetensors.torch import load_file
from support.models import save_trainable

import emma_hf
from emma_hf.conversion import convert

TESTS = Path(__file__).parent
REFERENCE = TESTS / "fixtures" / "reference"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What travels with the weights, and what prepares its batches, is tested on every supported Transformers."""
    for item in items:
        if item.path.relative_to(TESTS).parts[0] in ("model", "data"):
            item.add_marker("core")


@pytest.fixture(scope="session")
def reference() -> Path:
    """Folder of the recorded outputs; its README says what each file holds."""
    return REFERENCE


@pytest.fixture(scope="session")
def cases() -> dict[str, torch.Tensor]:
    """Recorded inputs and outputs, by `case.name`."""
    return load_file(REFERENCE / "cases.safetensors")


@pytest.fixture(scope="session")
def prompts() -> dict:
    """Recorded cases in words: their prompts and instructions."""
    return json.loads((REFERENCE / "cases.json").read_text())["cases"]


@pytest.fixture(scope="session")
def converted(tmp_path_factory) -> Path:
    """The authors' reference checkpoint, converted."""
    output = tmp_path_factory.mktemp("models") / "emma-random"
    return convert(REFERENCE / "original", output, clip=REFERENCE / "original" / "clip", progress=False)


@pytest.fixture(scope="session")
def model(converted):
    """The converted checkpoint in float32. Shared: a test that changes it makes its own."""
    return emma_hf.EmmaForConditionalGeneration.from_pretrained(converted, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def processor(converted):
    return emma_hf.EmmaProcessor.from_pretrained(converted)


@pytest.fixture(scope="session")
def renamed(processor):
    """A processor whose placeholder is `<pic>` and whose end of a sequence is `<end>`."""
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.add_tokens(["<pic>"], special_tokens=True)
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    return emma_hf.EmmaProcessor(
        processor.image_processor,
        tokenizer,
        processor.instruction_tokenizer,
        chat_template=processor.chat_template.replace("<image>", "<pic>"),
        image_token="<pic>",
        image_seq_length=processor.image_seq_length,
    )


@pytest.fixture
def photo() -> Path:
    return REFERENCE / "images" / "photo.jpg"


@pytest.fixture(scope="session")
def trainable(tmp_path_factory, processor):
    """Folder of a model of width 64 with random weights, which can be trained, and of its processor."""
    return save_trainable(tmp_path_factory.mktemp("models") / "trainable", processor)


@pytest.fixture(scope="session")
def untrained(tmp_path_factory):
    """emma-tiny's processor, and EMMA around towers at random."""
    # Here, because the environment of the chat page has no tools for training.
    from emma_hf.tiny.clip import clip_model
    from emma_hf.tiny.training import untrained_tiny

    folder = tmp_path_factory.mktemp("tiny")
    processor = emma_hf.EmmaProcessor.from_pretrained(emma_hf.EMMA_TINY)
    clip_model(processor, seed=0).save_pretrained(folder / "clip")
    return processor, untrained_tiny(folder / "clip", processor, seed=0).eval()
