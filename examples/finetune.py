# /// script
# requires-python = ">=3.11"
# dependencies = ["emma-hf[train]"]
# ///
"""Fine-tune EMMA on rows in LLaVA's format with Transformers' `Trainer`: a script to copy and edit.

    python examples/finetune.py emma-7b rows.json emma-lora --image-folder images

It trains a LoRA adapter of the language model with the projector and the modality adaptation, and writes the merged
model, which loads as any EMMA. `emma-hf train` does the same with every option of `TrainingArguments`, resumes
interrupted runs, and trains on many processes.
"""

import argparse

import torch
from transformers import Trainer, TrainingArguments

from emma_hf import EMMA_TINY, EmmaForConditionalGeneration, EmmaProcessor
from emma_hf.data import ConversationDataset, DataCollator
from emma_hf.training import STAGES, prepare

STAGE = "lora"  # or "pretrain", "finetune"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help=f"folder or Hub id of a converted model, such as {EMMA_TINY}")
    parser.add_argument("rows", help="JSON or JSONL file of rows")
    parser.add_argument("output", help="folder to write")
    parser.add_argument("--image-folder", help="folder of the rows' images (default: that of the rows)")
    parser.add_argument("--epochs", type=float, default=1.0, help="passes over the rows (default: 1)")
    parser.add_argument("--batch-size", type=int, default=8, help="rows per step and process (default: 8)")
    args = parser.parse_args(arguments)

    processor = EmmaProcessor.from_pretrained(args.model)
    # The weights stay in float32; `bf16=True` below computes in bfloat16.
    model = EmmaForConditionalGeneration.from_pretrained(args.model, dtype=torch.float32)
    model = prepare(model, STAGE, lora_r=16, lora_alpha=32)
    rows = ConversationDataset(args.rows, processor, args.image_folder, template=STAGES[STAGE].template)

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=args.output,
            per_device_train_batch_size=args.batch_size,
            num_train_epochs=args.epochs,
            bf16=torch.cuda.is_available(),
            logging_steps=1,
            # The columns of these rows are not the arguments of `forward`: the collator makes those.
            remove_unused_columns=False,
            report_to="none",
            **STAGES[STAGE].training_arguments(),
        ),
        train_dataset=rows,
        data_collator=DataCollator(processor),
        processing_class=processor,
    )
    trainer.train()

    trained = trainer.accelerator.unwrap_model(trainer.model)
    if STAGE == "lora":
        trained = trained.merge_and_unload()
    trained.save_pretrained(args.output)
    processor.save_pretrained(args.output)


if __name__ == "__main__":
    main()
