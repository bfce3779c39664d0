"""The `emma-hf` command: answers go to standard output, everything else to standard error."""

import argparse
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from .. import EMMA_TINY, __version__
from ..model.errors_emma import EmmaError

MODEL_HELP = "folder or Hub id (default: emma-tiny, which knows drawn shapes)"
IMAGE_HELP = "path, URL, data URL, or - for standard input"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status: 0, or 2 after an error that the user can mend."""
    args, rest = _parser().parse_known_args(argv)
    if args.run is _train:
        args.arguments = rest
    elif rest:
        _parser().error(f"unrecognized arguments: {' '.join(rest)}")
    # Imported late, so that `--help` and mistakes in the arguments answer at once.
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from safetensors import SafetensorError

    try:
        args.run(args)
    except (ValueError, OSError, ImportError, SafetensorError, HFValidationError, HfHubHTTPError) as error:
        print(f"emma-hf: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="emma-hf", description="EMMA: questions about pictures.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the versions that run, and exit")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    convert = commands.add_parser("convert", help="turn the authors' checkpoint into a Hub folder, or back")
    convert.add_argument(
        "source",
        nargs="?",
        metavar="SOURCE",
        help="folder or Hub id of the authors' checkpoint, or with --reverse of ours (default: the released one)",
    )
    convert.add_argument("output", metavar="OUTPUT", help="folder to write; it must not exist")
    convert.add_argument("--clip", help="folder or Hub id of the CLIP checkpoint (default: what the config names)")
    convert.add_argument("--dtype", help="dtype of every tensor, such as bfloat16 (default: as it is)")
    convert.add_argument("--max-shard-size", default="5GB", help="largest weight file, such as 2GB (default: 5GB)")
    convert.add_argument("--quantization", metavar="BITS", help="4bit or 8bit: write a folder that loads quantized")
    convert.add_argument("--reverse", action="store_true", help="write the authors' layout")
    convert.set_defaults(run=_convert)

    export = commands.add_parser("export", help="write a model's complete Hub repository to a folder, or check one")
    export.add_argument("model", metavar="MODEL", help="folder or Hub id, or emma-tiny; what --check looks at")
    export.add_argument("folder", nargs="?", metavar="FOLDER", help="folder to write; it must not exist")
    export.add_argument("--check", action="store_true", help="write nothing: check every file of MODEL, ask it once")
    export.add_argument("--repo-id", metavar="ORG/NAME", help="name on the Hub, for the card")
    export.add_argument(
        "--example", nargs=2, action="append", default=[], metavar=("PICTURE", "QUESTION"), help="one for the widget"
    )
    export.add_argument("--evaluation", metavar="FILE", help="evaluation.json of `emma-hf tiny evaluate`, for the card")
    export.add_argument("--max-shard-size", help="largest weight file, such as 2GB (default: files as they are)")
    export.add_argument("--revision", help="with --check: branch, tag or commit (default: the main branch)")
    export.add_argument("--trust-remote-code", action="store_true", help="with --check: run code that is not ours, too")
    export.set_defaults(run=_export)

    push = commands.add_parser("push", help="upload a model's complete Hub repository (the token is HF_TOKEN's)")
    push.add_argument("model", metavar="MODEL", help="folder of `emma-hf export`, folder or Hub id, or emma-tiny")
    push.add_argument("repo_id", metavar="ORG/NAME", help="repository; it is created if it does not exist")
    push.add_argument("--private", action="store_true", help="create it as private")
    push.add_argument("--revision", help="branch to push to; it must exist (default: the main branch)")
    push.add_argument("--force", action="store_true", help="replace another model, with all of its files")
    push.add_argument("--message", help="of the commit")
    push.set_defaults(run=_push)

    ask = commands.add_parser("ask", help="answer a question about one picture or several")
    _add_model_arguments(ask)
    ask.add_argument("--image", action="append", default=[], metavar="IMAGE", help=f"one more picture: {IMAGE_HELP}")
    ask.add_argument(
        "--question", action="append", default=[], metavar="QUESTION", help="one more question about the same pictures"
    )
    ask.add_argument("inputs", nargs="+", metavar="IMAGE QUESTION", help=f"picture ({IMAGE_HELP}) and question")
    ask.set_defaults(run=_ask)

    serve = commands.add_parser("serve", help="answer OpenAI-style chat requests over HTTP (Transformers 5)")
    serve.add_argument("model", nargs="?", default=str(EMMA_TINY), metavar="MODEL", help=MODEL_HELP)
    _add_loading_arguments(serve)
    serve.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)"
    )
    serve.add_argument("--port", type=int, default=8000, help="0 takes any free one (default: 8000)")
    serve.add_argument("--name", help="under which clients ask for the model (default: MODEL, of a path its last part)")
    serve.add_argument("--max-megabytes", type=float, default=32, help="largest request (default: 32)")
    serve.add_argument("--max-megapixels", type=float, default=36, help="largest picture (default: 36)")
    serve.add_argument(
        "--remote-pictures", action="store_true", help="fetch http(s) URLs of clients; only where nothing is to protect"
    )
    serve.set_defaults(run=_serve)

    train = commands.add_parser(
        "train", help="fine-tune on rows in LLaVA's format (`--help` lists the arguments of the script)", add_help=False
    )
    train.set_defaults(run=_train)

    tiny = commands.add_parser("tiny", help="emma-tiny: draw its scenes, train it, measure it")
    parts = tiny.add_subparsers(required=True, metavar="PART")
    scene = parts.add_parser("draw", help="draw a scene that emma-tiny can answer questions about")
    scene.add_argument("output", metavar="PICTURE", help="file to write; its ending decides the format")
    scene.add_argument("--seed", type=int, default=0, help="which scene (default: 0)")
    scene.add_argument("--side", type=int, default=336, help="width and height in pixels (default: 336)")
    scene.set_defaults(run=_draw_scene)
    training = parts.add_parser("train", help="train it from nothing; a run that was stopped goes on")
    training.add_argument("output", metavar="OUTPUT", help="folder of all phases")
    training.add_argument("--seed", type=int, default=0, help="of the weights and the data (default: 0)")
    training.add_argument("--smoke", action="store_true", help="a few steps of each phase")
    training.add_argument("--compile", action="store_true", help="faster; needs a C++ compiler")
    training.set_defaults(run=_train_tiny)
    evaluation = parts.add_parser("evaluate", help="ask fresh questions and count the right answers")
    evaluation.add_argument(
        "--model", default=str(EMMA_TINY), help="folder of an emma-tiny (default: the one that ships)"
    )
    evaluation.add_argument("--questions", type=int, default=5000, help="how many (default: 5000)")
    evaluation.add_argument("--captions", type=int, default=500, help="how many (default: 500)")
    evaluation.add_argument("--seed", type=int, default=0, help="of the questions (default: 0)")
    evaluation.add_argument("--output", help="folder for the table, the picture and every answer")
    evaluation.set_defaults(run=_evaluate_tiny)

    chat = commands.add_parser("chat", help="talk about one picture or several; an empty line ends it")
    _add_model_arguments(chat)
    chat.add_argument("image", nargs="+", metavar="IMAGE", help="path, URL or data URL")
    chat.set_defaults(run=_chat)
    return parser


class _Version(argparse.Action):
    """Prints the versions from the installed packages' metadata, without importing torch, which takes seconds."""

    def __call__(self, parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        from packaging.requirements import Requirement

        transformers = metadata.version("transformers")
        wanted = [Requirement(line) for line in metadata.requires("emma-hf") or ()]
        (limits,) = [each.specifier for each in wanted if each.name == "transformers" and not each.marker]
        (cap,) = [limit for limit in limits if limit.operator == "<"]
        newer = not cap.contains(transformers, prereleases=True)
        print(f"emma-hf {__version__}")
        print(f"transformers {transformers}{f' (newer than emma-hf is tested on, {cap}: update emma-hf)' * newer}")
        print(f"torch {metadata.version('torch')}")
        parser.exit()


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=str(EMMA_TINY), help=MODEL_HELP)
    _add_loading_arguments(parser)
    parser.add_argument("--max-new-tokens", type=int, default=512, help="longest answer in tokens (default: 512)")
    parser.add_argument("--instruction", help="text that guides the visual tokens (default: from the question)")


def _add_loading_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="such as cpu or cuda (default: the fastest there is)")
    parser.add_argument("--dtype", default="auto", help="dtype of the computation (default: as stored)")
    parser.add_argument("--quantization", metavar="BITS", help="4bit or 8bit: smaller weights (default: as stored)")


def _convert(args: argparse.Namespace) -> None:
    from ..conversion.converter import DEFAULT_SOURCE, convert, reverse

    options: dict[str, Any] = {"dtype": args.dtype, "max_shard_size": args.max_shard_size}
    if args.reverse:
        if args.source is None:
            raise EmmaError("`--reverse` needs a SOURCE, a folder or Hub id of a converted model: got none.")
        if args.clip is not None:
            raise EmmaError("`--clip` names a source of weights; with `--reverse` CLIP is written, not read. Drop it.")
        if args.quantization is not None:
            raise EmmaError("The authors' layout has no quantized form: drop `--quantization` or `--reverse`.")
        reverse(args.source, args.output, **options)
    else:
        source = args.source or DEFAULT_SOURCE
        convert(source, args.output, clip=args.clip, quantization=args.quantization, **options)
    print(f"wrote {args.output}", file=sys.stderr)


def _export(args: argparse.Namespace) -> None:
    if args.check:
        from ..hub.verification import check

        if args.folder is not None:
            raise EmmaError(f"`--check` takes MODEL alone and writes nothing: got {args.folder!r} besides. Drop it.")
        report = check(args.model, args.revision, trust_remote_code=args.trust_remote_code)
        print(report.table(), end="")
        if report.failures:
            raise EmmaError(f"{args.model}: {len(report.failures)} of {len(report.rows)} checks failed; see the table.")
        return
    from ..hub.repository import export

    if args.folder is None or args.revision is not None or args.trust_remote_code:
        raise EmmaError("`export` takes MODEL FOLDER; `--revision` and `--trust-remote-code` belong to `--check`.")
    export(args.model, args.folder, args.repo_id, args.example, args.evaluation, args.max_shard_size)
    print(f"wrote {args.folder}", file=sys.stderr)


def _push(args: argparse.Namespace) -> None:
    from ..hub.upload import push

    address = push(args.model, args.repo_id, args.private, args.revision, args.force, args.message)
    print(address)


def _serve(args: argparse.Namespace) -> None:
    from ..model.processing_emma import EmmaProcessor
    from ..serving.requests import Limits
    from ..serving.server import listen, serve

    if args.max_megabytes <= 0 or args.max_megapixels <= 0:
        raise EmmaError(
            f"`--max-megabytes` and `--max-megapixels` must be above 0: got {args.max_megabytes:g} and "
            f"{args.max_megapixels:g}."
        )
    limits = Limits(int(args.max_megabytes * 2**20), int(args.max_megapixels * 1e6), args.remote_pictures)
    name = args.name or (Path(args.model).resolve().name if Path(args.model).exists() else args.model)
    device = _device(args)
    # A port in use is told before the weights are read.
    with listen(args.host, args.port) as listener:
        processor = EmmaProcessor.from_pretrained(args.model)
        serve(_load(args, device), processor, name, listener, limits)


def _train(args: argparse.Namespace) -> None:
    from ..training.finetune import main

    main(args.arguments)


def _draw_scene(args: argparse.Namespace) -> None:
    from ..tiny.drawing import draw
    from ..tiny.questions import caption
    from ..tiny.scenes import Scene

    if args.side < 16:
        raise EmmaError(f"`--side` must be at least 16 pixels: got {args.side}.")
    scene = Scene.random(args.seed)
    draw(scene, args.side).save(args.output)
    print(f"wrote {args.output}: {caption(scene)}", file=sys.stderr)


def _train_tiny(args: argparse.Namespace) -> None:
    from ..tiny.recipe import SMOKE, Budget
    from ..tiny.training import train_tiny

    folder = train_tiny(args.output, SMOKE if args.smoke else Budget(), args.seed, args.compile)
    print(f"wrote {folder}", file=sys.stderr)


def _evaluate_tiny(args: argparse.Namespace) -> None:
    from ..tiny.evaluation import evaluate_tiny, table

    if args.questions < 1 or args.captions < 0:
        raise EmmaError(
            f"`--questions` must be at least 1 and `--captions` at least 0: got {args.questions} and {args.captions}."
        )
    result = evaluate_tiny(args.model, args.questions, args.captions, args.seed, args.output)
    print(table(result), end="")


def _ask(args: argparse.Namespace) -> None:
    *first, question = args.inputs
    images = [*first, *args.image]
    if len(first) > 1 or not images:
        raise EmmaError(
            f"`ask` takes IMAGE QUESTION, and one `--image` for each further picture: got {len(args.inputs)} words "
            f"and {len(args.image)} `--image`. Quote the question."
        )
    chat = _Chat(args, [_read(image) for image in images])
    if args.question:
        chat.encode_images()
    for asked in (question, *args.question):
        chat.start_over()
        chat.answer(asked)


def _chat(args: argparse.Namespace) -> None:
    if "-" in args.image:
        raise EmmaError("`chat` reads what you say from standard input, so no picture can come from there: got `-`.")
    chat = _Chat(args, list(args.image))
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline().strip()
        if not line:
            return
        chat.answer(line)


def _device(args: argparse.Namespace) -> str:
    """The device that was asked for, or the fastest, after the arguments of loading were checked."""
    import torch

    if args.dtype not in ("auto", "float32", "float16", "bfloat16"):
        raise EmmaError(f"`--dtype` must be auto, float32, float16 or bfloat16: got {args.dtype!r}.")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise EmmaError(f"`--device` must be a device of this machine: got {device!r} ({error}).") from error
    return device


def _load(args: argparse.Namespace, device: str) -> Any:
    from ..model.modeling_emma import EmmaForConditionalGeneration
    from ..model.quantization_emma import bitsandbytes_config

    options: dict[str, Any] = {}
    if args.quantization is not None:
        options = {"quantization_config": bitsandbytes_config(args.quantization), "device_map": {"": device}}
    model = EmmaForConditionalGeneration.from_pretrained(args.model, dtype=args.dtype, **options)
    # Quantized weights are put where they belong while they are read.
    return (model if getattr(model, "is_quantized", False) else model.to(device)).eval()


def _read(image: str) -> str | bytes:
    return sys.stdin.buffer.read() if image == "-" else image


class _Chat:
    """A conversation about pictures that keeps its cache from turn to turn."""

    def __init__(self, args: argparse.Namespace, images: list[str | bytes]) -> None:
        from ..model.processing_emma import EmmaProcessor

        if args.max_new_tokens < 1:
            raise EmmaError(f"`--max-new-tokens` must be at least 1: got {args.max_new_tokens}.")
        device = _device(args)
        self.args = args
        self.start_over()
        self.encoding: Any = None
        self.processor = EmmaProcessor.from_pretrained(args.model)
        # Read the pictures before the weights: a wrong path is told at once.
        self.images = self.processor.image_processor.fetch_images(images)
        self.model = _load(args, device)

    def start_over(self) -> None:
        """Forget what was said."""
        self.cache = None
        self.cached_ids: list[int] = []
        self.messages: list[dict[str, Any]] = []

    def encode_images(self) -> None:
        """Encode the pictures once, for all questions that follow."""
        pixels = self.processor.image_processor(self.images, return_tensors="pt")["pixel_values"]
        self.encoding = self.model.encode_image(pixels.to(self.model.device, self.model.dtype))

    def answer(self, question: str) -> None:
        """Stream the answer to one question, and remember both."""
        from transformers import TextStreamer

        from ..model.compat_emma import CACHE_NAME

        pictures = [] if self.messages else [{"type": "image"}] * len(self.images)
        self.messages.append({"role": "user", "content": [*pictures, {"type": "text", "text": question}]})
        inputs = self._inputs()
        ids = inputs["input_ids"][0].tolist()
        if self.cache is not None:
            # What the template makes of an answer can differ from what was generated: keep what is common.
            surplus = len(self.cached_ids) - _common_prefix(self.cached_ids, ids[:-1])
            if surplus:
                self.cache.crop(-surplus)
        outputs = self.model.generate(
            **inputs,
            **{CACHE_NAME: self.cache},
            max_new_tokens=self.args.max_new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            streamer=TextStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True),
        )
        sequence = outputs.sequences[0].tolist()
        self.cache, self.cached_ids = outputs[CACHE_NAME], sequence[:-1]
        text = self.processor.tokenizer.decode(sequence[len(ids) :], skip_special_tokens=True).strip()
        self.messages.append({"role": "assistant", "content": [{"type": "text", "text": text}]})

    def _inputs(self) -> Any:
        prompt = self.processor.apply_chat_template(self.messages, add_generation_prompt=True)
        inputs = self.processor(
            images=self.images, text=prompt, instructions=self.args.instruction, return_tensors="pt"
        )
        inputs = inputs.to(self.model.device, self.model.dtype)
        if self.encoding is not None:
            del inputs["pixel_values"]
            inputs["image_features"] = self.encoding.image_features(inputs.pop("instruction_input_ids"))
        return inputs


def _common_prefix(first: list[int], second: list[int]) -> int:
    length = 0
    for left, right in zip(first, second):
        if left != right:
            break
        length += 1
    return length
