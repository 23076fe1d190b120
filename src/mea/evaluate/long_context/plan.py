"""The prompts of an evaluation, their cost, and errors about lengths, before a model is loaded."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from mea.evaluate.long_context.needles import DEPTHS, many_needles, needle
from mea.evaluate.long_context.prompts import Prompt, Source
from mea.evaluate.long_context.recall import LONGEST, recall
from mea.evaluate.long_context.tracking import tracking
from mea.evaluate.long_context.words import common_words

Make = Callable[[Source, int, Random], Prompt]
FAMILIES: dict[str, Make] = {
    "multi-key": many_needles,
    "tracking": tracking,
    "common-words": common_words,
    "recall": recall,
}
NEEDLE, POSITION = "needle", "position"
TASKS = (NEEDLE, *FAMILIES, POSITION)
LENGTHS = (512, 1024, 2048, 4096, 8192)
MOST, LEAST, SHARED = 8, 2, 12_288  # prompts of a kind at one length, and tokens that all of them together may have
QUESTION = 48  # tokens that take as long as a question with its answer, roughly
WINDOWS = 2  # of the longest length, for the loss by position


@dataclass(frozen=True)
class Asked:
    """A prompt and the recipe that makes it again from the same tokenizer, text and seed."""

    task: str
    tokens: int
    number: int
    depth: float | None
    prompt: Prompt

    @property
    def recipe(self) -> dict[str, Any]:
        return {"task": self.task, "tokens": self.tokens, "number": self.number, "depth": self.depth}


def chosen_lengths(lengths: Sequence[int], limits: Sequence[int | None]) -> tuple[int, ...]:
    """The lengths to ask at, in ascending order.

    Parameters
    ----------
    lengths
        Requested lengths in tokens; empty for the default.
    limits
        Contexts of the models, None where there is no limit.

    Raises
    ------
    ValueError
        A length is not positive, given twice, or longer than a model's context.
    """
    longest = min((limit for limit in limits if limit is not None), default=None)
    if not lengths:
        return tuple(x for x in LENGTHS if longest is None or x <= longest) or (longest or LENGTHS[0],)
    if min(lengths) < 1 or len(set(lengths)) != len(lengths):
        raise ValueError(f"lengths are positive numbers of tokens, none twice, not {', '.join(map(str, lengths))}")
    if longest is not None and max(lengths) > longest:
        raise ValueError(f"{max(lengths):,} tokens are longer than the model's context of {longest:,}: ask for less")
    return tuple(sorted(lengths))


def prompts(
    source: Source, tasks: Sequence[str], lengths: Sequence[int], limit: int | None = None, seed: int = 0
) -> list[Asked]:
    """All prompts, shorter ones first; the same for the same tokenizer, text, limit and seed.

    Raises
    ------
    ValueError
        The limit is not positive, or a task does not fit into a length.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"the number of prompts must be positive, not {limit}")
    asked = []
    for tokens in lengths:
        for task in tasks:
            if task == POSITION or (task == "recall" and tokens > LONGEST):
                continue
            for depth in DEPTHS if task == NEEDLE else (None,):
                for number in range(limit or prompts_at(tokens)):
                    random = Random(f"{seed} {task} {tokens} {depth} {number}")
                    if depth is None:
                        prompt = FAMILIES[task](source, tokens, random)
                    else:
                        prompt = needle(source, tokens, random, depth)
                    asked.append(Asked(task, tokens, number, depth, prompt))
    return asked


def prompts_at(tokens: int) -> int:
    """How many prompts of a kind are asked at a length: few long ones, which take as long as many short ones."""
    return max(LEAST, min(MOST, SHARED // tokens))


@dataclass(frozen=True)
class Work:
    """Operations of reading texts, in closed form: enough to tell how far a run has come.

    Attributes
    ----------
    linear, quadratic
        Operations for each token, and for each pair of tokens.
    """

    linear: float
    quadratic: float

    def __call__(self, tokens: int, questions: int = 0) -> float:
        return self.linear * (tokens + QUESTION * questions) + self.quadratic * tokens**2

    @classmethod
    def of(cls, model: Any) -> "Work":
        """Of a model in memory: products with all weights but the embeddings', and of queries with keys."""
        config = model.config.get_text_config()
        heads = config.num_attention_heads
        width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
        weights = model.num_parameters() - model.get_input_embeddings().weight.numel()
        return cls(2.0 * weights, 2.0 * config.num_hidden_layers * width)
