"""What each arm of the replication trains, and the model that all of them start from."""

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from ...model.compat_emma import CACHE_NAME
from ...model.errors_emma import EmmaError
from ...model.modeling_emma import EmmaForConditionalGeneration

# What every row of the arm "constant" has as its instruction.
CONSTANT_INSTRUCTION = "Describe the picture."


@dataclass(frozen=True)
class Arm:
    """One way to train. Projector and language model are trained in every arm, both towers in none.

    Args:
        title: its name in tables.
        mixing: whether the visual part of the alignment and the offset are trained.
        text: whether the text part of the alignment (from 0) and the instruction projection are trained.
        instruction: in training and in the test the question's `own`, `shuffled` (another row's) or `constant`.
        question_first: whether the question also stands before the picture in the prompt.
        film: whether the question also scales and shifts the projector's hidden units, which is not EMMA.
    """

    title: str
    mixing: bool = False
    text: bool = False
    instruction: str = "own"
    question_first: bool = False
    film: bool = False

    @property
    def reads(self) -> bool:
        """Whether what the image becomes depends on an instruction."""
        return self.text or self.film


ARMS = {
    "A": Arm("LLaVA"),
    "B": Arm("mixing without words", mixing=True),
    "C": Arm("EMMA", mixing=True, text=True),
    "D": Arm("EMMA, shuffled instruction", mixing=True, text=True, instruction="shuffled"),
    "E": Arm("EMMA, constant instruction", mixing=True, text=True, instruction="constant"),
    "F": Arm("question before the picture", question_first=True),
    "G": Arm("FiLM, an upper bound that is not EMMA", mixing=True, film=True),
}
_ROW = re.compile(r"([A-Z])-k(\d+)-d(\d+)-s(\d+)-r(\d+(?:\.\d+)?)(?:-w(\d+))?")


@dataclass(frozen=True)
class Task:
    """What the language model gets of an image, and how deep it is.

    Args:
        tokens: visual tokens, as in [`Row`].
        width: numbers that a visual token has on its way to the language model, which then begins at random. Default:
            all, and the language model begins as emma-tiny's.
        depth: layers.
    """

    tokens: int
    width: int | None = None
    depth: int = 6

    def __str__(self) -> str:
        tokens = f"{self.tokens} token{'s' * (self.tokens > 1)}"
        width = "" if self.width is None else f" of {self.width} numbers"
        return f"{tokens}{width}" + ("" if self.depth == 6 else f", {self.depth} layer{'s' * (self.depth > 1)}")


# One token of three numbers, which hold the color and shape of one thing but not of six, and all tokens.
FEW, ALL = Task(1, 3, 2), Task(64)
# A second experiment: with a higher rate for the text weights, and seeds that no row of that rate had before.
SECOND_RATE, SECOND_SEEDS = 3.0, range(2, 8)


@dataclass(frozen=True)
class Row:
    """One training run of the table.

    Args:
        arm: a key of [`ARMS`].
        tokens: visual tokens that the language model gets, K: a square number whose root divides the grid's side.
        depth: layers of the language model.
        seed: of the questions, their order and what begins at random, which all arms share.
        rate: learning rate of what reads the instruction, in units of that of all others.
        width: numbers that a visual token has on its way to the language model, as in [`Task`].

    Raises:
        EmmaError: an arm that does not exist.
    """

    arm: str
    tokens: int = 4
    depth: int = 6
    seed: int = 0
    rate: float = 1.0
    width: int | None = None

    def __post_init__(self) -> None:
        if self.arm not in ARMS:
            raise EmmaError(f"An arm of the replication is one of {', '.join(ARMS)}: got {self.arm!r}.")

    @property
    def name(self) -> str:
        """Such as `C-k4-d6-s0-r1` or `C-k1-d6-s0-r1-w16`, which [`Row.parse`] reads."""
        width = "" if self.width is None else f"-w{self.width}"
        return f"{self.arm}-k{self.tokens}-d{self.depth}-s{self.seed}-r{self.rate:g}{width}"

    @property
    def task(self) -> Task:
        """What all arms have in common."""
        return Task(self.tokens, self.width, self.depth)

    @classmethod
    def of(cls, arm: str, task: Task, seed: int, rate: float = 1.0) -> "Row":
        """The row of an arm that is trained for a task."""
        return cls(arm, task.tokens, task.depth, seed, rate, task.width)

    @classmethod
    def parse(cls, name: str) -> "Row":
        """The row of a name.

        Raises:
            EmmaError: a name of another form.
        """
        match = _ROW.fullmatch(name)
        if match is None:
            raise EmmaError(
                "A row of the replication is written ARM-kTOKENS-dDEPTH-sSEED-rRATE and may end in -wWIDTH, such as "
                f"C-k4-d6-s0-r1: got {name!r}."
            )
        arm, tokens, depth, seed, rate, width = match.groups()
        return cls(arm, int(tokens), int(depth), int(seed), float(rate), int(width) if width else None)


class ReplicationModel(nn.Module):
    """emma-tiny with its text term folded into an offset, and what its arm adds.

    Every arm begins as the same function: F = Wv V + offset, where the offset (visual tokens, vision width) holds `ba`
    and the mean of `Wt P` over questions, and `Wt` is 0.

    Args:
        model: emma-tiny. Its modules become parts of this one and are trained.
        row: which arm, how many tokens, and how deep.
        mean_text: mean of `Wt P` over questions, (visual tokens, vision width).

    Raises:
        EmmaError: tokens that do not tile the grid, or more layers than there are.
    """

    def __init__(self, model: EmmaForConditionalGeneration, row: Row, mean_text: torch.Tensor) -> None:
        super().__init__()
        self.row, self.arm, self.tokens = row, ARMS[row.arm], row.tokens
        adaptation, config = model.model.modality_adaptation, model.config
        self.side, self.pooled_side = math.isqrt(config.vision_seq_length), math.isqrt(row.tokens)
        if self.pooled_side**2 != row.tokens or not row.tokens or self.side % self.pooled_side:
            raise EmmaError(
                f"Visual tokens are averaged over squares of the {self.side}x{self.side} grid, so their number is a "
                f"square whose root divides {self.side}: got {row.tokens}."
            )
        layers = model.model.language_model.layers
        if not 1 <= row.depth <= len(layers):
            raise EmmaError(f"The language model has {len(layers)} layers: got depth {row.depth}.")

        visual_tokens = config.vision_seq_length
        weight, bias = adaptation.visual_alignment.weight, adaptation.visual_alignment.bias
        self.visual_weight = nn.Parameter(weight[:, :visual_tokens].detach().clone(), self.arm.mixing)
        self.text_weight = nn.Parameter(torch.zeros_like(weight[:, visual_tokens:]), self.arm.text)
        self.offset = nn.Parameter(bias.detach()[:, None] + mean_text, self.arm.mixing)
        self.instruction_projection = adaptation.instruction_projection.requires_grad_(self.arm.text)
        self.projector = model.model.multi_modal_projector.requires_grad_(True)
        self.language_model = model.model.language_model.requires_grad_(True)
        self.language_model.layers = layers[: row.depth]
        self.lm_head = model.lm_head.requires_grad_(True)
        if self.arm.film:
            self.film = nn.Linear(config.instruction_config.hidden_size, 2 * self.projector.linear_1.out_features)
            # No gain and no shift at the start.
            nn.init.zeros_(self.film.weight)
            nn.init.zeros_(self.film.bias)
        self.end_mean, self.end_scale = torch.zeros(()), torch.ones(())
        self.image_mean, self.image_scale = torch.zeros(()), torch.ones(())
        self.narrow: nn.Module = nn.Identity()
        self.train(False)

    def standardize_end_tokens(self, end_tokens: torch.Tensor) -> None:
        """Let FiLM read end tokens around their mean, in units of their spread over questions.

        Nine tenths of an end token's norm are the same for every question: a step of the optimizer would move the gain
        of all questions by 1.

        Args:
            end_tokens: H at the end tokens of some questions, (questions, instruction width).
        """
        self.end_mean, self.end_scale = end_tokens.mean(0), end_tokens.std(0)

    @torch.no_grad()
    def narrow_tokens(self, width: int, images: torch.Tensor, seed: int) -> None:
        """Let each visual token pass through `width` numbers, and a language model read them that begins at random.

        The numbers are at first the principal components of `images`, in units of their mean spread. emma-tiny's
        language model reads such tokens no sooner than a random one: nothing that it learned is left in them.

        Args:
            width: at least 1 and at most the text width.
            images: a result of [`image_features`], (images, K, text width).
            seed: of what begins at random.

        Raises:
            EmmaError: a width that does not exist.
        """
        tokens = images.flatten(0, 1)
        if not 1 <= width <= tokens.shape[-1]:
            raise EmmaError(f"A visual token has {tokens.shape[-1]} numbers, of which 1 or more are left: got {width}.")
        self.image_mean = tokens.mean(0)
        directions = torch.linalg.svd(tokens - self.image_mean, full_matrices=False).Vh[:width]
        self.image_scale = ((tokens - self.image_mean) @ directions.T).std(0).mean()
        self.narrow = nn.Sequential(nn.Linear(tokens.shape[-1], width), nn.Linear(width, tokens.shape[-1]))
        generator = torch.Generator().manual_seed(seed)
        for module in (self.narrow, self.language_model, self.lm_head):
            for name, parameter in module.named_parameters():
                if parameter.dim() == 1:
                    parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                else:
                    # Embeddings are small beside what attention adds to them, or it is learned late.
                    spread = 0.1 if "embed" in name else parameter.shape[1] ** -0.5
                    parameter.normal_(0.0, spread, generator=generator)
        self.narrow[0].weight.copy_(directions)

    def parameter_groups(self, learning_rate: float, text_rate: float) -> list[dict[str, Any]]:
        """Parameters that are trained, for an optimizer: what reads the instruction at `text_rate` times the rate."""
        readers = [self.text_weight, *self.instruction_projection.parameters()] if self.arm.text else []
        readers += self.film.parameters() if self.arm.film else []
        known = {id(parameter) for parameter in readers}
        others = [each for each in self.parameters() if each.requires_grad and id(each) not in known]
        groups = [{"params": others, "lr": learning_rate}]
        return [*groups, {"params": readers, "lr": text_rate * learning_rate}] if readers else groups

    def text_term(self, instruction_features: torch.Tensor) -> torch.Tensor:
        """`Wt P`, (images, visual tokens, vision width), of H (images, instruction tokens, instruction width)."""
        projected = nn.functional.gelu(self.instruction_projection(instruction_features))
        return self.text_weight @ projected

    def fused(self, vision_features: torch.Tensor, instruction_features: torch.Tensor) -> torch.Tensor:
        """F, (images, visual tokens, vision width), of V and H; H is not read by an arm without text."""
        fused = self.visual_weight @ vision_features + self.offset
        if self.arm.text:
            fused = fused + self.text_term(instruction_features)
        return fused

    def hidden(
        self,
        vision_features: torch.Tensor,
        instruction_features: torch.Tensor,
        ends: torch.Tensor,
    ) -> torch.Tensor:
        """What the projector's activation is given, (images, visual tokens, hidden width)."""
        hidden = self.projector.linear_1(self.fused(vision_features, instruction_features))
        if self.arm.film:
            end_tokens = (instruction_features[torch.arange(len(ends)), ends] - self.end_mean) / self.end_scale
            gain, shift = self.film(end_tokens)[:, None].chunk(2, dim=-1)
            hidden = hidden * (1 + gain) + shift
        return hidden

    def image_features(
        self,
        vision_features: torch.Tensor,
        instruction_features: torch.Tensor,
        ends: torch.Tensor,
    ) -> torch.Tensor:
        """Z averaged over squares of the grid, (images, K, text width).

        Args:
            vision_features: V, (images, visual tokens, vision width).
            instruction_features: H, (images, instruction tokens, instruction width).
            ends: index of each instruction's end token, (images,).
        """
        # Never in 16 bits: images differ little beside what they have in common.
        with torch.autocast("cpu", enabled=False):
            active = self.projector.act(self.hidden(vision_features, instruction_features, ends))
            block = self.side // self.pooled_side
            grid = active.unflatten(1, (self.pooled_side, block, self.pooled_side, block))
            # The mean of what a linear layer gives is what it gives of the mean.
            features = self.projector.linear_2(grid.mean((2, 4)).flatten(1, 2))
            return self.narrow((features - self.image_mean) / self.image_scale)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        images: torch.Tensor,
        is_image: torch.Tensor,
        shared: int,
    ) -> torch.Tensor:
        """Last hidden states of the tokens behind those that all rows begin with, (rows, tokens - shared, text width).

        What all rows begin with is computed once: two thirds of a prompt with 4 visual tokens.

        Args:
            input_ids: (rows, tokens).
            attention_mask: (rows, tokens).
            images: the result of [`image_features`], (rows, K, text width).
            is_image: (rows, tokens), true at K placeholders of each row.
            shared: how many tokens all rows begin with, at least 1, all of them before the picture.
        """
        embed = self.language_model.get_input_embeddings()
        cache = DynamicCache()
        self.language_model(inputs_embeds=embed(input_ids[:1, :shared]), **{CACHE_NAME: cache}, use_cache=True)
        cache.batch_repeat_interleave(len(input_ids))
        embeddings = embed(input_ids[:, shared:]).masked_scatter(is_image[:, shared:, None], images)
        outputs = self.language_model(
            inputs_embeds=embeddings, attention_mask=attention_mask, **{CACHE_NAME: cache}, use_cache=True
        )
        return outputs.last_hidden_state


__all__ = [
    "ALL",
    "ARMS",
    "CONSTANT_INSTRUCTION",
    "FEW",
    "SECOND_RATE",
    "SECOND_SEEDS",
    "Arm",
    "ReplicationModel",
    "Row",
    "Task",
]
