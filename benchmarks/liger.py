"""A training step with Liger's kernels against the plain one: the released model's widths, few layers, on CUDA.

Both train the same language model, projector and modality adaptation on the same batch; the towers are small and
frozen, so that they hide nothing. Losses and gradients are compared first, in float32 with one layer and then in the
dtype that is measured. Steps (forward, backward, AdamW) then alternate in one process; peak memory is the allocator's,
in turns too. Without a CUDA device there is nothing to measure.

    python benchmarks/liger.py [--rows 4] [--words 448] [--layers 4] [--runs 20]
"""

import argparse
import statistics
from functools import partial

import torch
from measure import Report, in_turns, ratio
from transformers import CLIPTextConfig, CLIPVisionConfig
from transformers.models.llama import modeling_llama

from emma_hf import EmmaConfig, EmmaForConditionalGeneration
from emma_hf.training import prepare

TEXT = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}
TEXT |= {"vocab_size": 32001, "max_position_embeddings": 4096}
CLIP = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGE, TOKENS = 32000, 576
PLAIN_ROTARY = modeling_llama.apply_rotary_pos_emb


def build(layers: int, dtype: torch.dtype, liger: bool) -> torch.nn.Module:
    from emma_hf.integrations.liger import apply_liger_kernel_to_emma

    torch.manual_seed(0)
    config = EmmaConfig(
        vision_config=CLIPVisionConfig(**CLIP, image_size=336, patch_size=14),
        instruction_config=CLIPTextConfig(**CLIP, vocab_size=49408, max_position_embeddings=77),
        text_config={**TEXT, "num_hidden_layers": layers},
        image_token_index=IMAGE,
    )
    torch.set_default_dtype(dtype)
    with torch.device("cuda"):
        model = prepare(EmmaForConditionalGeneration(config), "finetune").train()
    torch.set_default_dtype(torch.float32)
    modeling_llama.apply_rotary_pos_emb = PLAIN_ROTARY
    if liger:
        apply_liger_kernel_to_emma(model)
    # All Llama models share one rotary function; each run puts its own in place.
    model.rotary = modeling_llama.apply_rotary_pos_emb
    return model


def loss_of(model: torch.nn.Module, batch: dict) -> torch.Tensor:
    modeling_llama.apply_rotary_pos_emb = model.rotary
    return model(**batch).loss


def batch_of(rows: int, words: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    some = torch.randint(3, IMAGE, (rows, words), generator=generator)
    ids = torch.cat([some[:, :8], torch.full((rows, TOKENS), IMAGE), some[:, 8:]], dim=1)
    labels = ids.clone()
    labels[:, : TOKENS + words // 2] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    batch["pixel_values"] = torch.randn(rows, 3, 336, 336, generator=generator).to(dtype)
    batch["instruction_input_ids"] = torch.randint(1, 49000, (rows, 77), generator=generator)
    return {name: value.cuda() for name, value in batch.items()}


def gradients(model: torch.nn.Module, batch: dict) -> tuple[float, dict[str, torch.Tensor]]:
    loss = loss_of(model, batch)
    loss.backward()
    found = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.item(), found


def verify(layers: int, rows: int, words: int, dtype: torch.dtype, bound: float) -> float:
    """The largest relative difference of a loss or a gradient between the two, at most `bound`."""
    batch = batch_of(rows, words, dtype)
    results = []
    for liger in (False, True):
        results.append(gradients(build(layers, dtype, liger), batch))
        torch.cuda.empty_cache()
    (plain, expected), (fused, found) = results
    if expected.keys() != found.keys():
        raise SystemExit("The gradients are not of the same weights; no time is worth printing.")
    apart = {n: ((found[n].float() - g.float()).norm() / g.float().norm()).item() for n, g in expected.items()}
    apart["loss"] = abs(plain - fused) / plain
    worst = max(apart, key=apart.__getitem__)
    if not apart[worst] <= bound:
        raise SystemExit(f"{worst} differs by {apart[worst]:.2e}, more than {bound:.0e}; no time is worth printing.")
    return apart[worst]


class Step:
    def __init__(self, layers: int, dtype: torch.dtype, liger: bool, batch: dict) -> None:
        self.model, self.batch = build(layers, dtype, liger), batch
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5, foreach=False)

    def __call__(self) -> None:
        loss_of(self.model, self.batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def peak(step: Step) -> tuple[float, float]:
    """Bytes at the peak of one step: with the weights and the optimizer of this model, and above them."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    above = torch.cuda.max_memory_allocated() - before
    held = sum(p.nbytes for p in step.model.parameters())
    held += sum(t.nbytes for state in step.optimizer.state.values() for t in state.values() if t.is_cuda)
    return float(held + above), float(above)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8], help="rows in the batch")
    parser.add_argument("--words", type=int, default=448, help="text tokens of a row, half of them learned")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--runs", type=int, default=20, help="rounds of both")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("There is no CUDA device: nothing to measure.")
        return
    device, dtype = torch.device("cuda"), torch.bfloat16
    exact = verify(1, 1, 64, torch.float32, 1e-3)
    rounded = verify(args.layers, 1, args.words, dtype, 0.1)
    report = Report("liger", device)
    print(f"Largest relative difference of loss and gradients: {exact:.1e} in float32, {rounded:.1e} in bfloat16.\n")
    for rows in args.rows:
        batch = batch_of(rows, args.words, dtype)
        steps = {name: Step(args.layers, dtype, name == "liger", batch) for name in ("plain", "liger")}
        times = in_turns({name: partial(step) for name, step in steps.items()}, args.runs, device, f"{rows} rows")
        peaks = [{name: peak(step) for name, step in steps.items()} for _ in range(5)]
        sizes = {name: [each[name] for each in peaks] for name in steps}
        whole, above = (
            ratio([size[place] for size in sizes["liger"]], [size[place] for size in sizes["plain"]])
            for place in (0, 1)
        )
        report.add(
            rows=rows,
            **{"plain s": statistics.median(times["plain"]), "liger s": statistics.median(times["liger"])},
            **{"time": ratio(times["liger"], times["plain"])},
            **{"plain GB": statistics.median(size[0] for size in sizes["plain"]) / 1e9},
            **{"peak, weights and AdamW included": whole, "peak of the step above them": above},
        )
        del steps
        torch.cuda.empty_cache()
    report.print_table()


if __name__ == "__main__":
    main()
