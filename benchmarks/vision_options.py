"""The vision path on a CPU: where its time goes, and what options gain, each in turns with the plain path.

CLIP's ViT-L/14-336 and the projector of the 7B model, random weights, one image with an instruction. An option that is
exact is compared with the plain path first; of the others the difference is printed, and emma-tiny's answers to the
same fresh questions. Options in int8 need torchao, compiled ones a C++ compiler; what is missing is left out.

    python benchmarks/vision_options.py [--runs 7] [--dtypes float32 bfloat16] [--questions 500] [--output FOLDER]
"""

import copy
import importlib.util
import shutil
from collections import Counter
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from common import Report, argument_parser, emma_config, in_turns, matmul_rate, ratio
from torch import nn
from torch.profiler import ProfilerActivity, profile
from vision import operations, verify

from emma_hf import EMMA_TINY, EmmaForConditionalGeneration, EmmaProcessor
from emma_hf.tiny.evaluation import answers, fresh_questions, is_right

# Operations by what they are part of; the first prefix that fits decides.
KINDS = {
    "linear layers": ("aten::addmm", "aten::mm", "aten::bmm", "mkldnn::_linear", "aten::_mkldnn_linear"),
    "patch embedding": ("aten::mkldnn_convolution", "aten::convolution", "aten::_convolution"),
    "attention": ("aten::_scaled_dot_product",),
    "norms": ("aten::native_layer_norm",),
    "activations": ("aten::sigmoid", "aten::gelu", "aten::mul"),
}


def kind_of(operation: str) -> str:
    return next((kind for kind, starts in KINDS.items() if operation.startswith(starts)), "everything else")


def shares_of_time(run: Callable[[], object]) -> dict[str, float]:
    """Share of the processor's time by kind of operation."""
    run()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        run()
    times: Counter[str] = Counter()
    for event in recorded.key_averages():
        times[kind_of(event.key)] += event.self_cpu_time_total
    return {kind: time / sum(times.values()) for kind, time in times.most_common()}


def in_int8(tower: nn.Module) -> nn.Module:
    """A copy of a tower whose linear layers compute in int8, the scales of the activations found for each token."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    tower = copy.deepcopy(tower)
    quantize_(tower, Int8DynamicActivationInt8WeightConfig())
    return tower


def compiled(tower: nn.Module) -> nn.Module:
    tower = copy.deepcopy(tower)
    tower.compile()
    return tower


def options_of(tower: nn.Module) -> dict[str, nn.Module]:
    """The tower under each option that can run here; the first is the plain one."""
    options = {"plain": tower, "weights of the patch embedding channels last": copy.deepcopy(tower)}
    for module in options["weights of the patch embedding channels last"].modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)
    has_compiler = shutil.which("c++") is not None
    if has_compiler:
        options["tower compiled"] = compiled(tower)
    if importlib.util.find_spec("torchao"):
        options["tower in int8"] = in_int8(tower)
        if has_compiler:
            options["tower in int8, compiled"] = compiled(options["tower in int8"])
    return options


def features(emma: EmmaForConditionalGeneration, tower: nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Visual tokens with this vision tower."""
    emma.model.vision_tower = tower
    return emma.get_image_features(*inputs).pooler_output


def measure_options(report: Report, name: str, runs: int) -> None:
    dtype = getattr(torch, name)
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    # As wide as the 7B model; what follows the projector is not run.
    emma = EmmaForConditionalGeneration(
        emma_config("7b", vocab_size=101, intermediate_size=64, num_hidden_layers=1)
    ).eval()
    torch.set_default_dtype(torch.float32)
    inputs = torch.randn(1, 3, 336, 336, dtype=dtype), torch.randint(1, 49000, (1, 77))
    towers = options_of(emma.model.vision_tower)
    calls = {option: partial(features, emma, tower, inputs) for option, tower in towers.items()}
    for kind, share in shares_of_time(calls["plain"]).items():
        report.add("Where the time goes", dtype=name, operations=kind, share=share)
    expected = calls["plain"]()
    differences = {}
    for option, call in calls.items():
        found = call()
        differences[option] = ((found - expected).abs().max() / expected.abs().max()).item()
        if "int8" not in option:
            verify(option, found, expected)
    times = in_turns(calls, runs, name)
    rate = matmul_rate(torch.device("cpu"), dtype)
    for option in calls:
        report.add(
            "Options",
            dtype=name,
            option=option,
            **{"s": median(times[option]), "times faster than plain": ratio(times["plain"], times[option])},
            **{"of the matmul rate": sum(operations()) / median(times[option]) / rate},
            **{"largest difference, of the largest": differences[option]},
        )


def measure_answers(report: Report, count: int) -> None:
    """emma-tiny's right answers with its vision tower as it is and in int8, to the same questions."""
    processor = EmmaProcessor.from_pretrained(EMMA_TINY)
    model = EmmaForConditionalGeneration.from_pretrained(EMMA_TINY, dtype=torch.float32).eval()
    asked = fresh_questions(count, seed=23)
    right = {}
    for option, tower in (("plain", model.model.vision_tower), ("tower in int8", in_int8(model.model.vision_tower))):
        model.model.vision_tower = tower
        given = answers(model, processor, [(scene, question.text) for scene, question in asked])
        right[option] = [is_right(text, question.answer) for text, (_, question) in zip(given, asked)]
    for option, each in right.items():
        lost, won = (sum(a > b for a, b in zip(*pair)) for pair in ((right["plain"], each), (each, right["plain"])))
        report.add("emma-tiny's answers", option=option, questions=count, right=sum(each), **{"lost": lost, "won": won})


@torch.no_grad()
def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--runs", type=int, default=7, help="rounds (default: 7)")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--questions", type=int, default=500, help="questions to emma-tiny (default: 500)")
    args = parser.parse_args()
    report = Report("vision_options", args)
    for name in args.dtypes:
        measure_options(report, name, args.runs)
    if importlib.util.find_spec("torchao"):
        measure_answers(report, args.questions)
    report.save()


if __name__ == "__main__":
    main()
