"""How well models predict text, relative to the uncompressed model on the same tokens."""

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from mea.comparison.configs import CacheConfig
from mea.comparison.protocol import Protocol
from mea.evaluate.perplexity import Read, block_means, by_position, perplexity, ratio, text_losses
from mea.evaluate.through_cache import Continuation
from mea.records import Progress
from mea.text import encode_text, load_text

Losses = Float[Tensor, "windows scored"]
Parts = tuple[dict[str, Any], dict[str, Any]]  # results and samples of a record


class Quality:
    """Scores models by a protocol; ratios are relative to the first scored model."""

    def __init__(self, tokenizer: Any, protocol: Protocol, progress: Progress | None = None):
        self.tokenizer, self.protocol, self.progress = tokenizer, protocol, progress
        self.references: dict[tuple[str, int, int], Losses] = {}
        self._tokens: dict[tuple[str, int], Int[Tensor, " n"]] = {}

    def measure(self, label: str, model: Any, cache: CacheConfig | None, *, by_position: bool) -> Parts:
        """Score a model on whole windows, on continuations, and by position where that is asked for.

        Parameters
        ----------
        cache
            Cache through which the text is read; None for an ordinary cache.
        """
        protocol = self.protocol
        results: dict[str, Any] = {"texts": {}, "position_text": protocol.position_text}
        samples: dict[str, Any] = {}
        for text, tokens in protocol.texts:
            losses = self._losses(label, model, text, tokens, protocol.window, cache.read if cache else None)
            results["texts"][text] = self.summary(text, losses)
            samples[f"loss_{text}"] = block_means(losses)
        if protocol.context:
            results["continuations"] = {}
            read = Continuation(protocol.context, cache.make if cache else None)
            for text, tokens in protocol.texts:
                losses = self._losses(f"{label}, continued", model, text, tokens, protocol.window, read)
                results["continuations"][text] = self.continued(text, losses)
                samples[f"continued_{text}"] = block_means(losses)
        if protocol.positions and by_position:
            length = protocol.positions[-1]
            losses = self._losses(label, model, protocol.position_text, length, length)
            results["positions"] = self._by_position(losses)
            samples["loss_by_position"] = block_means(losses)
        return results, samples

    def tokens(self, text: str, count: int) -> Int[Tensor, " n"]:
        """The first tokens of a text, made once for all models."""
        if (text, count) not in self._tokens:
            self._tokens[text, count] = encode_text(self.tokenizer, load_text(text), count)
        return self._tokens[text, count]

    def summary(self, text: str, losses: Losses) -> dict[str, Any]:
        """Perplexity of a text, and its ratio to the reference's."""
        values = perplexity(losses).as_dict() | {"window": self.protocol.window, "tokens": losses.numel()}
        reference = self._reference(text, self.protocol.window, losses)
        return values if reference is losses else values | ratio(losses, reference).as_dict("ratio")

    def continued(self, text: str, losses: Losses) -> dict[str, Any]:
        """Perplexity of continuations, and its ratio to the reference's."""
        return self.summary(text, losses) | {"context": self.protocol.context}

    def _by_position(self, losses: Losses) -> list[dict[str, Any]]:
        edges = self.protocol.positions
        reference = self._reference(self.protocol.position_text, edges[-1], losses)
        ranges = []
        for own, relative in zip(by_position(losses, edges), by_position(losses, edges, reference), strict=True):
            values = {"start": own.start, "stop": own.stop} | own.estimate.as_dict()
            ranges.append(values if reference is losses else values | relative.estimate.as_dict("ratio"))
        return ranges

    def _reference(self, text: str, window: int, losses: Losses) -> Losses:
        return self.references.setdefault((text, window, losses.shape[1]), losses)

    def _losses(self, label: str, model: Any, text: str, count: int, window: int, read: Read | None = None) -> Losses:
        tokens, what = self.tokens(text, count), f"{label}: {text}"
        return text_losses(model, self.tokenizer, tokens, window, what=what, read=read, progress=self.progress)
