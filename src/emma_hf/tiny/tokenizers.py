"""emma-tiny's tokenizers, learned from questions about scenes and their answers."""

import gzip
import json
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

from ..conversion.instruction_vocabulary import BPE_NAME, load_instruction_tokenizer
from ..conversion.tokenizers import prompt_tokenizer
from ..model.chat_template_emma import SYSTEM_PROMPT
from ..model.image_processing_emma import EmmaImageProcessor
from ..model.processing_emma import EmmaProcessor
from ..storage.folders import new_folder
from .questions import ask_all, caption, caption_question
from .recipe import INSTRUCTION_MERGES, PROMPT_VOCABULARY, SIDE, VISUAL_TOKENS
from .rows import TRAIN_SEEDS
from .scenes import Scene, SeededRandom


def _texts(count: int) -> Iterator[tuple[str, str]]:
    """Questions and answers of every family, in all wordings, about `count` scenes."""
    for seed in range(TRAIN_SEEDS - count, TRAIN_SEEDS):
        scene, rng = Scene.random(seed), SeededRandom(seed)
        yield caption_question(rng), caption(scene)
        for held_out in (False, True):
            for question in ask_all(scene, rng, held_out):
                yield question.text, question.answer


def tiny_processor(folder: Path) -> EmmaProcessor:
    """The processor with its own two tokenizers, read from the folder or else learned and saved there."""
    if not folder.is_dir():
        texts = list(_texts(2000))
        with new_folder(folder) as new:
            processor = EmmaProcessor(
                EmmaImageProcessor(size=SIDE, crop_size=SIDE),
                _learn_prompt_tokenizer(
                    [f"{SYSTEM_PROMPT} USER: \n{question} ASSISTANT: {answer}" for question, answer in texts], new
                ),
                _learn_instruction_tokenizer([text for pair in texts for text in pair], new),
                image_seq_length=VISUAL_TOKENS,
            )
            processor.save_pretrained(new)
    return EmmaProcessor.from_pretrained(folder)


def _learn_instruction_tokenizer(texts: list[str], folder: Path) -> Any:
    """Byte-pair merges in CLIP's format: lower case, `</w>` at the end of a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(vocab_size=2000, end_of_word_suffix="</w>", show_progress=False)
    learner.train_from_iterator([text.lower() for text in texts], trainer)
    merges = [" ".join(pair) for pair in json.loads(learner.to_str())["model"]["merges"]][:INSTRUCTION_MERGES]
    path = folder / BPE_NAME
    path.write_bytes(gzip.compress("\n".join(["#version: 0.2", *merges]).encode(), mtime=0))
    return load_instruction_tokenizer(path)


def _learn_prompt_tokenizer(texts: list[str], folder: Path) -> Any:
    """A sentencepiece model with Llama's settings."""
    import sentencepiece

    model = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=PROMPT_VOCABULARY,
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    values = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "pad_token": "<unk>", "unk_token": "<unk>"}
    values |= {"bos_token": "<s>", "eos_token": "</s>", "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return prompt_tokenizer(folder, {}, PROMPT_VOCABULARY)
