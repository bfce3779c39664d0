"""The modality adaptation alone, at the released model's sizes in bfloat16: kernels against plain PyTorch, on CUDA.

Output and gradients are first compared with float64. Then both run in turn, each time with a cold cache; two
neighbouring runs give one ratio. "Called" is a call from Python, "graph" the replay of a CUDA graph, in which only the
GPU's work counts. The limit is the larger of bytes over the bandwidth and operations over the rate of a large product,
both measured here. Without a CUDA device the comparison runs in Triton's interpreter, and there is nothing to measure.

    python benchmarks/adaptation.py [--batches 1 2 4 8 16 32 64] [--pairs 50]
"""

import argparse
import os
import statistics

import torch

if not torch.cuda.is_available():
    # Read when triton is imported, which the package does.
    os.environ["TRITON_INTERPRET"] = "1"

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
    """Milliseconds of one run on the GPU, in a cold cache."""

    def __init__(self) -> None:
        self.flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, function) -> float:
        self.flush.zero_()
        self.start.record()
        function()
        self.end.record()
        torch.cuda.synchronize()
        return self.start.elapsed_time(self.end)


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


def measured_limits(timer: Timer) -> tuple[float, float]:
    """Bytes and operations in a millisecond: of a large copy, and of a large bfloat16 product."""
    source, matrix = (torch.randn(shape, device="cuda").bfloat16() for shape in ((1 << 29,), (8192, 8192)))
    target = torch.empty_like(source)
    copy = statistics.median(timer(lambda: target.copy_(source)) for _ in range(20))
    product = statistics.median(timer(lambda: matrix @ matrix) for _ in range(20))
    return 2 * source.nbytes / copy, 2 * 8192**3 / product


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


def quartiles(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64], help="images")
    parser.add_argument("--pairs", type=int, default=50, help="neighbouring runs per row (default: 50)")
    args = parser.parse_args()
    if fused.triton is None:
        raise SystemExit('The kernels need the package triton: pip install "emma-hf[kernels]".')
    if not torch.cuda.is_available():
        ratio = verify(2, "cpu", (40, 9, 48, 20))
        print(f"Triton's interpreter: errors of the kernels are at most {ratio:.2f} times eager's, against float64.")
        print("There is no CUDA device, so there is nothing to measure.")
        return
    timer = Timer()
    bandwidth, rate = measured_limits(timer)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {fused.triton.__version__}, bfloat16")
    print(f"Measured limits: {bandwidth / 1e9:.2f} TB/s, {rate / 1e9:.0f} TFLOP/s; {args.pairs} pairs per row.")
    print("Ratio: eager's time over the kernels', median [lower, upper quartile].\n")
    print("| images | what | how | eager | kernels | times faster | limit over kernels | error over eager's |")
    print("|---|---|---|---|---|---|---|---|")
    for images in args.batches:
        error = verify(images, "cuda")
        eager, ours = (Adaptation(operations, images, "cuda") for operations in (EAGER, TRITON))
        for what, backward in (("forward", False), ("forward and backward", True)):
            runs = [side.both if backward else torch.no_grad()(side.forward) for side in (eager, ours)]
            needed, operations = work(images, backward)
            limit = max(needed / bandwidth, operations / rate)
            for how in ("called", "graph"):
                functions = [captured(run) for run in runs] if how == "graph" else runs
                times = []
                for index in range(args.pairs + 5):
                    # Which one goes first changes, so that no order is favoured; the first five pairs warm up.
                    pair = {place: timer(functions[place]) for place in ((0, 1) if index % 2 else (1, 0))}
                    times.append((pair[0], pair[1]))
                slow, fast = (statistics.median(column) for column in zip(*times[5:]))
                ratio = quartiles([plain / kernels for plain, kernels in times[5:]])
                print(
                    f"| {images} | {what} | {how} | {slow * 1e3:.0f} us | {fast * 1e3:.0f} us | {ratio} "
                    f"| {limit / fast:.0%} | {error:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
