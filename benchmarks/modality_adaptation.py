"""The modality adaptation alone, at the released model's sizes in bfloat16: kernels against plain PyTorch, on CUDA.

Output and gradients are first compared with float64. Then both run in turns, each time with a cold cache; neighboring
runs give one ratio. "Called" is a call from Python, "graph" the replay of a CUDA graph, in which only the GPU's work
counts. The limit is the larger of bytes over the bandwidth and operations over the rate of a large product, both
measured here. Without a CUDA device the comparison runs in Triton's interpreter, and there is nothing to measure.

    python benchmarks/modality_adaptation.py [--images 1 2 4 8 16 32 64] [--runs 50] [--output FOLDER]
"""

import os
import statistics

import torch

if not torch.cuda.is_available():
    # Read when triton is imported, which the package does.
    os.environ["TRITON_INTERPRET"] = "1"

from common import Report, argument_parser, in_turns, matmul_rate, ratio

from emma_hf.model import fused_alignment as fused

VISUAL, INSTRUCTION, WIDTH, WIDTH_IN = 576, 77, 1024, 768
EAGER = (fused.instruction_projection_reference, fused.visual_alignment_reference)
TRITON = (fused.instruction_projection, fused.visual_alignment)
BYTES = 2


class Adaptation:
    """The operations on random operands; V and H need no gradient, since both CLIP towers are frozen."""

    def __init__(self, operations, images: int, device: str, sizes=(VISUAL, INSTRUCTION, WIDTH, WIDTH_IN)) -> None:
        visual, instruction, width, width_in = sizes
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int, scale: float = 1) -> torch.Tensor:
            return (torch.randn(shape, generator=generator) * scale).to(device, torch.bfloat16)

        self.project, self.align = operations
        self.v = normal(images, visual + 1, width)[:, 1:]
        self.h = normal(images, instruction, width_in)
        self.weights = [
            normal(width, width_in, scale=width_in**-0.5),
            normal(width),
            normal(visual, visual + instruction, scale=(visual + instruction) ** -0.5),
            normal(visual),
        ]
        self.upstream = normal(images, visual, width)

    def forward(self) -> list[torch.Tensor]:
        wp, bp, wa, ba = self.weights
        return [self.align(self.v, self.project(self.h, wp, bp), wa, ba)]

    def both(self) -> list[torch.Tensor]:
        leaves = [weight.requires_grad_() for weight in self.weights]
        (out,) = self.forward()
        return [out, *torch.autograd.grad(out, leaves, self.upstream)]

    def exact(self) -> list[torch.Tensor]:
        self.v, self.h, self.upstream = (tensor.double() for tensor in (self.v, self.h, self.upstream))
        self.weights = [weight.detach().double() for weight in self.weights]
        return self.both()


def verify(images: int, device: str, sizes=(VISUAL, INSTRUCTION, WIDTH, WIDTH_IN)) -> float:
    """The largest ratio of the kernels' error to eager's, of the output and the gradients, against float64."""
    eager, ours = (Adaptation(operations, images, device, sizes).both() for operations in (EAGER, TRITON))
    truth = Adaptation(EAGER, images, device, sizes).exact()
    ratios = [((b - exact).norm() / (a - exact).norm()).item() for a, b, exact in zip(eager, ours, truth)]
    if not max(ratios) <= 2:
        raise SystemExit(f"The errors of the kernels are {ratios} times eager's; no time is worth printing.")
    return max(ratios)


class Timer:
    """Seconds of one run on the GPU, in a cold cache."""

    def __init__(self) -> None:
        self.flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, function) -> float:
        self.flush.zero_()
        self.start.record()
        function()
        self.end.record()
        torch.cuda.synchronize()
        return self.start.elapsed_time(self.end) / 1e3


def captured(function):
    """The replay of a CUDA graph of `function`."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = function()
    # The graph writes into these, so they live as long as it does.
    graph.kept = kept
    return graph.replay


def copy_bandwidth(timer: Timer) -> float:
    """Bytes a second that a large copy reads and writes."""
    source = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / statistics.median(timer(lambda: target.copy_(source)) for _ in range(20))


def work(images: int, backward: bool) -> tuple[int, int]:
    """Fewest bytes and operations: each operand read once, each result written once, P kept between the two kernels."""
    v, h, p = VISUAL * WIDTH, INSTRUCTION * WIDTH_IN, INSTRUCTION * WIDTH
    weights = WIDTH * WIDTH_IN + VISUAL * (VISUAL + INSTRUCTION)
    projection = 2 * INSTRUCTION * WIDTH * WIDTH_IN
    alignment = 2 * VISUAL * (VISUAL + INSTRUCTION) * WIDTH
    numbers, operations = images * (2 * v + h + p) + weights, images * (projection + alignment)
    if backward:
        # The projection again and its weight's gradient; the alignment's, and P's.
        numbers += images * (2 * v + h + p) + 2 * weights
        operations += images * (2 * projection + alignment + 2 * INSTRUCTION * VISUAL * WIDTH)
    return BYTES * numbers, operations


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--images", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64], help="numbers of images")
    parser.add_argument("--runs", type=int, default=50, help="rounds per row (default: 50)")
    args = parser.parse_args()
    if fused.triton is None:
        raise SystemExit('The kernels need the package triton: pip install "emma-hf[kernels]".')
    if not torch.cuda.is_available():
        error = verify(2, "cpu", (40, 9, 48, 20))
        print(f"Triton's interpreter: errors of the kernels are at most {error:.2f} times eager's, against float64.")
        print("There is no CUDA device, so there is nothing to measure.")
        return
    timer = Timer()
    bandwidth, rate = copy_bandwidth(timer), matmul_rate(torch.device("cuda"), torch.bfloat16)
    report = Report("modality_adaptation", args)
    report.about["versions"]["Triton"] = fused.triton.__version__
    report.add("Limits", **{"bandwidth, TB/s": bandwidth / 1e12, "large product, TFLOP/s": rate / 1e12})
    for images in args.images:
        error = verify(images, "cuda")
        operands = {
            name: Adaptation(operations, images, "cuda") for name, operations in (("eager", EAGER), ("kernels", TRITON))
        }
        for what, backward in (("forward", False), ("forward and backward", True)):
            called = {name: side.both if backward else torch.no_grad()(side.forward) for name, side in operands.items()}
            graphs = {name: captured(function) for name, function in called.items()}
            needed, operations = work(images, backward)
            limit = max(needed / bandwidth, operations / rate)
            for how, functions in (("called", called), ("graph", graphs)):
                times = in_turns(functions, args.runs, f"{images} images, {what}", timer, warmup=5)
                slow, fast = (statistics.median(times[name]) for name in ("eager", "kernels"))
                report.add(
                    "Modality adaptation",
                    **{"images": images, "what": what, "how": how, "eager, us": slow * 1e6, "kernels, us": fast * 1e6},
                    **{"times faster": ratio(times["eager"], times["kernels"]), "limit / kernels": limit / fast},
                    **{"error / eager's": error},
                )
    report.save()


if __name__ == "__main__":
    main()
