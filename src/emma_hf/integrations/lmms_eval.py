"""`lmms-eval --model emma`: EMMA for the benchmarks of lmms-eval, which finds it by its entry point."""

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image

from .. import EMMA_TINY
from ..inference import answer, load_model
from ..inference.answering import answer_by_instruction, user_messages
from ..inference.instruction_rules import RULES, instruction_by_rule, swap_instructions
from ..model.errors_emma import EmmaError, MissingPackageError

try:
    from lmms_eval.api.model import lmms
    from lmms_eval.models.registry_v2 import ModelManifest
except ImportError as error:
    raise MissingPackageError(
        f"`emma_hf.integrations.lmms_eval` is for lmms-eval, which cannot be imported here: {error}. Install it with "
        "`pip install lmms-eval`."
    ) from error

DEFAULT_MAX_NEW_TOKENS = 1024


def manifest() -> "ModelManifest":
    """What lmms-eval reads: the name and where the class is."""
    return ModelManifest(model_id="emma", simple_class_path=f"{__name__}.Emma")


class Emma(lmms):
    """Answers requests in batches, greedily unless a task asks for a temperature.

    lmms-eval has a task named `emma` of its own, which is another EMMA: a benchmark of reasoning.

    Args:
        pretrained: folder or Hub id. Default: emma-tiny.
        device: such as `cpu` or `cuda`. Default: the fastest, and under `accelerate launch` one for each process.
        dtype: of the computation; `auto` as stored.
        batch_size: questions at once.
        quantization: `4bit` or `8bit`.
        revision: of a Hub repository.
        visual_tokens: visual tokens to keep of each image; as stored if it is not given.
        instruction: which text the instruction encoder gets: `own` (the question up to its first line break, as in the
            authors' evaluation), `first_line`, `question` (the task's field of that name), `whole`, `swapped` (another
            question's of the task), `empty` or `constant`. The prompt stays.

    Raises:
        EmmaError: an argument that is not among these, or of a wrong value.
    """

    def __init__(
        self,
        pretrained: str = str(EMMA_TINY),
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        quantization: str | None = None,
        revision: str | None = None,
        instruction: str = "own",
        visual_tokens: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        # lmms-eval passes this one on to every model.
        unknown = [name for name, value in kwargs.items() if value is not None and name != "max_batch_size"]
        if unknown:
            raise EmmaError(
                "`--model_args` of emma are pretrained, device, dtype, batch_size, quantization, revision, instruction "
                f"and visual_tokens: got {', '.join(unknown)}."
            )
        self.instruction = instruction.replace("_", "-")
        if self.instruction not in RULES:
            names = ", ".join(rule.replace("-", "_") for rule in RULES)
            raise EmmaError(f"`instruction` must be one of {names}: got {instruction!r}.")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise EmmaError(f"`batch_size` must be a whole number of at least 1: got {batch_size!r}.")
        self.accelerator = Accelerator(cpu=device == "cpu")
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        several = self._world_size > 1 or device is None
        self.device = self.accelerator.device if several else torch.device(device)
        self.batch_size = int(batch_size)
        self.model, self.processor = load_model(pretrained, self.device, dtype, quantization, revision, visual_tokens)

    def generate_until(self, requests: list[Any]) -> list[str]:
        """The answers, in the order of the requests; an answer ends before the first of its task's `until`."""
        answers = [""] * len(requests)
        instructions = self._instructions(requests)
        for batch in self._batches(requests):
            rows = [self._row(requests[index]) for index in batch]
            settings = requests[batch[0]].args[1]
            texts = self._answer(
                [messages for messages, _ in rows],
                [images for _, images in rows],
                None if instructions is None else [instructions[index] for index in batch],
                settings,
            )
            for index, text in zip(batch, texts):
                answers[index] = text
                self.cache_hook.add_partial("generate_until", (requests[index].args[0], settings), text)
        return answers

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        raise NotImplementedError("emma answers tasks of one round: choose tasks without `generate_until_multi_round`.")

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError(
            "emma answers by generating: choose tasks whose `output_type` is generate_until, such as pope."
        )

    def _instructions(self, requests: list[Any]) -> list[str] | None:
        """The instruction of each request; None for `own`, which is that of its conversation."""
        if self.instruction == "own":
            return None
        token = self.processor.image_token
        if self.instruction == "swapped":
            keys = [" ".join(map(str, request.args[3:6])) for request in requests]
            own = [instruction_by_rule("own", request.args[0], "", token) for request in requests]
            tasks = [request.args[4] for request in requests]
            # Each process has a part of the requests, and any may have the instruction that is swapped in.
            everywhere = gather_object(list(zip(keys, tasks, own)))
            swapped = swap_instructions({key: (task, text) for key, task, text in everywhere})
            return [swapped[key] for key in keys]
        return [
            instruction_by_rule(self.instruction, request.args[0], self._question(request), token)
            for request in requests
        ]

    def _question(self, request: Any) -> str:
        if self.instruction != "question":
            return ""
        _, _, _, doc_id, task, split = request.args
        row = self.task_dict[task][split][doc_id]
        question = row.get("question")
        if not isinstance(question, str):
            raise EmmaError(
                f"The instruction rule `question` needs a task whose rows have a field `question`: {task} has "
                f"{', '.join(row)}. Use `first_line` or `own`."
            )
        return question

    def _batches(self, requests: list[Any]) -> Iterator[list[int]]:
        """Indices of requests with equal settings, at most `batch_size` at a time, longest questions first."""

        def settings(index: int) -> str:
            return repr(sorted(requests[index].args[1].items()))

        order = sorted(range(len(requests)), key=lambda index: (settings(index), -len(requests[index].args[0])))
        for _, group in groupby(order, key=settings):
            indices = list(group)
            for start in range(0, len(indices), self.batch_size):
                yield indices[start : start + self.batch_size]

    def _row(self, request: Any) -> tuple[list[dict[str, Any]], list[Image.Image]]:
        """The conversation of one request, and its pictures."""
        question, _, doc_to_visual, doc_id, task, split = request.args
        images = (doc_to_visual(self.task_dict[task][split][doc_id]) if doc_to_visual else None) or []
        kinds = sorted({type(image).__name__ for image in images if not isinstance(image, Image.Image)})
        if kinds:
            raise EmmaError(f"emma reads pictures: the task {task} gives {', '.join(kinds)}. Choose another task.")
        return user_messages(question, len(images), self.processor.image_token), images

    def _answer(
        self,
        conversations: list[Any],
        images: list[list[Image.Image]],
        instructions: list[str] | None,
        settings: dict,
    ) -> list[str]:
        until = settings.get("until") or []
        until = [until] if isinstance(until, str) else list(until)
        options: dict[str, Any] = {"stop_strings": until} if until else {}
        if settings.get("temperature"):
            options |= {"do_sample": True, "temperature": settings["temperature"]}
            options |= {"top_p": settings["top_p"]} if settings.get("top_p") else {}
        options |= {
            "num_beams": settings.get("num_beams") or 1,
            "max_new_tokens": settings.get("max_new_tokens") or DEFAULT_MAX_NEW_TOKENS,
        }
        if instructions is None:
            texts = answer(self.model, self.processor, conversations, images, **options)
        else:
            texts = answer_by_instruction(self.model, self.processor, conversations, images, [instructions], **options)[
                0
            ]
        return [_before(text, until).strip() for text in texts]


def _before(text: str, until: list[str]) -> str:
    return text[: min((place for stop in until if (place := text.find(stop)) >= 0), default=len(text))]
