"""A training step with Liger's kernels against the plain one: the released model's widths, few layers, on CUDA.

Both train the same language model, projector and modality adaptation on the same batch; the towers are small and
frozen, so that the language model decides the time. Losses and gradients are compared first, in float32 with one layer
and then in the dtype that is measured. Steps (forward, backward, AdamW) then run in turns in one process, first timed
and then with the peak of the allocated memory read. Without a CUDA device there is nothing to measure.

    python benchmarks/liger.py [--rows 4] [--words 448] [--layers 4] [--runs 20] [--output FOLDER]
"""

from statistics import median

import torch
from common import Report, argument_parser, emma_config, in_turns, random_batch, ratio
from transformers.models.llama import modeling_llama

from emma_hf import EmmaForConditionalGeneration
from emma_hf.training import prepare

PLAIN_ROTARY = modeling_llama.apply_rotary_pos_emb
CUDA = torch.device("cuda")


def build(layers: int, dtype: torch.dtype, liger: bool) -> torch.nn.Module:
    from emma_hf.integrations.liger import apply_liger_kernel_to_emma

    torch.manual_seed(0)
    config = emma_config("7b", num_hidden_layers=layers)
    for tower in (config.vision_config, config.instruction_config):
        tower.update({"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2})
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


def gradients(model: torch.nn.Module, batch: dict) -> tuple[float, dict[str, torch.Tensor]]:
    loss = loss_of(model, batch)
    loss.backward()
    found = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.item(), found


def verify(layers: int, rows: int, words: int, dtype: torch.dtype, bound: float) -> float:
    """The largest relative difference of a loss or a gradient between the two, at most `bound`."""
    batch = random_batch(rows, words, dtype, CUDA)
    results = []
    for liger in (False, True):
        results.append(gradients(build(layers, dtype, liger), batch))
        torch.cuda.empty_cache()
    (plain, expected), (fused, found) = results
    if expected.keys() != found.keys():
        raise SystemExit("The gradients belong to different weights; no time is worth printing.")
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
    parser = argument_parser(__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8], help="rows in the batch")
    parser.add_argument("--words", type=int, default=448, help="text tokens of a row, half of them learned")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--runs", type=int, default=20, help="rounds of both (default: 20)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("There is no CUDA device: nothing to measure.")
        return
    dtype = torch.bfloat16
    report = Report("liger", args)
    for name, apart in (
        ("float32, one layer", verify(1, 1, 64, torch.float32, 1e-3)),
        ("bfloat16", verify(args.layers, 1, args.words, dtype, 0.1)),
    ):
        report.add("Largest relative difference of loss and gradients", dtype=name, difference=apart)
    for rows in args.rows:
        batch = random_batch(rows, args.words, dtype, CUDA)
        steps = {name: Step(args.layers, dtype, name == "liger", batch) for name in ("plain", "liger")}
        times = in_turns(steps, args.runs, f"{rows} rows")
        peaks = in_turns(steps, 5, f"memory, {rows} rows", peak)
        (whole, above), (plain_whole, plain_above) = (zip(*peaks[name]) for name in ("liger", "plain"))
        report.add(
            "Training step with Liger's kernels",
            rows=rows,
            **{"plain, s": median(times["plain"]), "Liger, s": median(times["liger"])},
            **{"time, Liger / plain": ratio(times["liger"], times["plain"]), "plain, GB": median(plain_whole) / 1e9},
            **{"peak, weights and AdamW included": ratio(whole, plain_whole)},
            **{"peak of the step above them": ratio(above, plain_above)},
        )
        del steps
        torch.cuda.empty_cache()
    report.save()


if __name__ == "__main__":
    main()
