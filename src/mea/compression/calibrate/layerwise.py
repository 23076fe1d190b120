"""Run a model one decoder layer at a time, so that only one layer's weights need be in memory.

`LayerWalk` records once the arguments that the model's own forward passes to each layer, so no architecture's forward
is rewritten here.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import torch
from accelerate.utils import align_module_device
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from mea.compression.calibrate.offload import resident
from mea.models.lm_head import ROWS

MOST_POSITIONS, RUN = 8192, 256


class LayerInputs(NamedTuple):
    """A layer's arguments besides the hidden states, for a window at positions ``0 .. t-1``, batch 1.

    `rotary` is the model's rotary embedding, which computed the `position_embeddings`.
    """

    options: dict[str, Any]
    position_embeddings: tuple[Tensor, Tensor]
    mask: Float[Tensor, "1 1 t t"]
    rotary: Any

    @property
    def without_cache(self) -> dict[str, Any]:
        """The options of a pass that fills no cache."""
        return {name: value for name, value in self.options.items() if name != "past_key_values"}


class AttentionPass(NamedTuple):
    """One window's way through a layer.

    Attributes
    ----------
    attention_in
        Input of the attention, after the norm.
    heads_out
        The outputs of all query heads, before ``W_O``.
    weight
        Weight of each token: one over the energy of the residual stream that the attention's output is added to.
    layer_out
        The hidden states after the layer.
    """

    attention_in: Float[Tensor, "t D"]
    heads_out: Float[Tensor, "t h*d"]
    weight: Float[Tensor, " t"]
    layer_out: Float[Tensor, "t D"]


class _Recorder(nn.Module):
    """Replaces a decoder layer: records its arguments and returns the hidden states."""

    def __init__(self, layer: Any):
        super().__init__()
        self.__dict__["layer"] = layer  # not a submodule: its weights may be offloaded
        self.options: dict[str, Any] = {}
        self.hidden = torch.empty(0)
        self.replacement: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["layer"], name)

    def forward(self, hidden_states: Tensor, **options: Any) -> Tensor:
        self.hidden, self.options = hidden_states, options
        return hidden_states if self.replacement is None else self.replacement


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Put the model in evaluation mode, and restore its modes afterwards.

    Attention is SDPA meanwhile, which `LayerWalk` records inputs for: eager attention needs a mask where SDPA has none.
    """
    modes, used = {module: module.training for module in model.modules()}, model.config._attn_implementation
    model.eval()
    model.config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        model.config._attn_implementation = used
        for module, mode in modes.items():
            module.training = mode


def check_weights(model: Any) -> None:
    """Refuse a damaged model before any work.

    Raises
    ------
    ValueError
        A weight is NaN or infinite.
    """
    for path, module in model.named_modules():
        with align_module_device(module):
            for name, parameter in module.named_parameters(prefix=path, recurse=False):
                if not parameter.isfinite().all():
                    raise ValueError(f"the weights in {name} are not all finite; the checkpoint is damaged")


def check_finite(tensor: Tensor, index: int, what: str, layer: Any) -> None:
    """Refuse a model that overflows, with the largest weight of layer `index`.

    Raises
    ------
    ValueError
        A number is NaN or infinite.
    """
    if not tensor.isfinite().all():
        raise ValueError(
            f"layer {index}: {what} are not finite on the calibration text; the model overflows, and {_largest(layer)}"
        )


def check_activations(hidden: Float[Tensor, "n t D"], index: int, layer: Any) -> None:
    """Refuse a model if its hidden states or their squares overflow: a norm turns such states into zeros.

    Raises
    ------
    ValueError
        As `check_finite`.
    """
    check_finite(hidden.float().square().mean(-1), index, "activations", layer)


def _largest(module: Any) -> str:
    """The largest weight of a module, in words."""
    sizes = {name: parameter.abs().max().item() for name, parameter in module.named_parameters()}
    name = max(sizes, key=lambda name: sizes[name])
    return f"its largest weight is {sizes[name]:.1e} in {name}"


def _check_logits(logits: Tensor, head: Any) -> None:
    if not logits.isfinite().all():
        raise ValueError(f"lm_head: logits are not finite; the model overflows, and {_largest(head)}")


@contextmanager
def _recording(model: Any, implementation: str) -> Iterator[list[_Recorder]]:
    decoder = model.model
    layers, used = decoder.layers, model.config._attn_implementation
    recorders = [_Recorder(layer) for layer in layers]
    decoder.layers = nn.ModuleList(recorders)
    model.config._attn_implementation = implementation
    try:
        yield recorders
    finally:
        decoder.layers = layers
        model.config._attn_implementation = used


class LayerWalk:
    """Runs a model layer by layer.

    The model's own forward runs once, with recorders instead of layers. The recorded arguments of each layer (masks,
    rotary embeddings, anything that an architecture adds) are used for all windows up to that length. Where rotary
    embeddings depend on the length of the window, every length is recorded.

    Parameters
    ----------
    model
        Its weights may be offloaded.
    length
        Tokens of the longest window, if known; a longer window is recorded again.
    """

    def __init__(self, model: Any, length: int = 0):
        self.model, self.length = model, length
        self._recorded: list[LayerInputs] = []
        kinds = str(model.model.rotary_emb.rope_type)  # one, or one for each type of layer
        self._by_length = "dynamic" in kinds or "longrope" in kinds

    @property
    def layers(self) -> list[Any]:
        """The decoder layers of the model."""
        return list(self.model.model.layers)

    def inputs(self, length: int) -> list[LayerInputs]:
        """Every layer's arguments besides the hidden states, for windows of `length` tokens."""
        if self._by_length:
            return self._record(length)
        if not self._recorded or length > self.length:
            self.length = max(length, self.length)
            self._recorded = self._record(self.length)
        return [_first_tokens(inputs, length, self.length) for inputs in self._recorded]

    @torch.no_grad()
    def embed(self, tokens: Int[Tensor, "n t"]) -> Float[Tensor, "n t D"]:
        """The input of the first layer: embeddings, scaled if the architecture scales them.

        Raises
        ------
        ValueError
            They overflow.
        """
        hidden = []
        with _recording(self.model, "sdpa") as recorders:
            for window in tokens.split(1):
                self.model.model(input_ids=window.to(self.model.device), use_cache=False)
                hidden.append(recorders[0].hidden)
        if not torch.cat(hidden).float().square().mean(-1).isfinite().all():
            with align_module_device(self.model.model.embed_tokens):
                largest = _largest(self.model.model.embed_tokens)
            raise ValueError(f"embed_tokens: the embeddings overflow, and {largest}")
        return torch.cat(hidden)

    @torch.no_grad()
    def read_out(self, tokens: Int[Tensor, "1 t"], hidden: Float[Tensor, "n t D"]) -> Float[Tensor, "n t vocabulary"]:
        """Logits in fp32 from the last layer's output; norm, output projection and scales are the model's own.

        Raises
        ------
        ValueError
            They overflow.
        """
        model, decoder = self.model, self.model.model
        head, norm = model.lm_head, decoder.norm
        try:
            model.lm_head, decoder.norm = resident(head), resident(norm)
            with _recording(model, "sdpa") as recorders:
                logits = []
                for recorders[-1].replacement in hidden.split(1):
                    logits.append(model(input_ids=tokens.to(model.device), use_cache=False).logits)
                    _check_logits(logits[-1], model.lm_head)
        finally:
            model.lm_head, decoder.norm = head, norm
        return torch.cat(logits)

    def loss_gradients(
        self,
        tokens: Int[Tensor, "n t"],
        hidden: Float[Tensor, "n t D"],
        generator: torch.Generator,
        skips: Sequence[int] = (),
        advance: Callable[[], None] = lambda: None,
    ) -> Float[Tensor, "n t D"]:
        """Gradients of the loss with respect to the last layer's output, for labels drawn from the model itself.

        The loss is summed over tokens, in nats. `skips` counts the windows of other processes before each window: their
        labels are drawn and dropped, so that labels do not depend on the number of processes. `advance` is called after
        each window.

        Raises
        ------
        ValueError
            Logits overflow.
        """
        model, decoder = self.model, self.model.model
        head, norm = model.lm_head, decoder.norm
        gradients = []
        try:
            model.lm_head, decoder.norm = resident(head), resident(norm)
            with _recording(model, "sdpa") as recorders, torch.enable_grad():
                skipped = skips or [0] * len(tokens)
                for window, ids, skip in zip(hidden.split(1), tokens.split(1), skipped, strict=True):
                    for some in [*ids.split(ROWS, 1)] * skip:
                        torch.multinomial(torch.ones(some.shape[1], len(model.lm_head.weight)), 1, generator=generator)
                    parts = []
                    for states, some in zip(window.split(ROWS, 1), ids.split(ROWS, 1), strict=True):
                        start = states.detach().requires_grad_()
                        recorders[-1].replacement = start
                        logits = model(input_ids=some.to(model.device), use_cache=False).logits[0].float()
                        _check_logits(logits, model.lm_head)
                        probabilities = logits.detach().softmax(-1).cpu()
                        labels = torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(logits.device)
                        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
                        parts.append(torch.autograd.grad(loss, start)[0])
                    gradients.append(torch.cat(parts, 1))
                    advance()
        finally:
            model.lm_head, decoder.norm = head, norm
        return torch.cat(gradients)

    @cached_property
    def rotations(self) -> list[tuple[Float[Tensor, "p d"], Float[Tensor, "p d"]]]:
        """Cosines and sines of every layer's rotary embedding, over all positions that the model supports.

        For more than `MOST_POSITIONS` positions, a sample: runs of `RUN` consecutive positions at equal distances.
        """
        length = self.model.config.max_position_embeddings
        count = min(MOST_POSITIONS, length) // RUN or 1
        run = min(RUN, length)
        starts = torch.tensor([(length - run) * block // max(1, count - 1) for block in range(count)])
        tables = self.position_embeddings(starts[:, None] + torch.arange(run))
        return [(cos.flatten(0, 1), sin.flatten(0, 1)) for cos, sin in tables]

    @torch.no_grad()
    def position_embeddings(
        self, positions: Int[Tensor, "n t"]
    ) -> list[tuple[Float[Tensor, "n t d"], Float[Tensor, "n t d"]]]:
        """Every layer's rotary embedding at the windows' positions; layers that share one get the same tensors."""
        made: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
        tables: list[list[tuple[Tensor, Tensor]]] = []
        with _recording(self.model, "sdpa") as recorders:
            for row in positions:
                ids = row[None].to(self.model.device)
                self.model.model(inputs_embeds=self._zeros(len(row)), position_ids=ids, use_cache=False)
                tables.append([recorder.options["position_embeddings"] for recorder in recorders])
        layers = []
        for windows in zip(*tables, strict=True):
            same = tuple(id(cos) for cos, _ in windows)
            if same not in made:
                cosines, sines = zip(*windows, strict=True)
                made[same] = torch.cat(cosines), torch.cat(sines)
            layers.append(made[same])
        return layers

    @torch.no_grad()
    def _record(self, length: int) -> list[LayerInputs]:
        with _recording(self.model, "sdpa") as recorders:
            self.model.model(inputs_embeds=self._zeros(length), use_cache=False)
            options = [recorder.options for recorder in recorders]
        with _recording(self.model, "eager") as recorders:
            self.model.model(inputs_embeds=self._zeros(length), use_cache=False)
            masks = [recorder.options["attention_mask"] for recorder in recorders]
        rotary = self.model.model.rotary_emb
        return [
            LayerInputs(layer_options, layer_options["position_embeddings"], mask, rotary)
            for layer_options, mask in zip(options, masks, strict=True)
        ]

    def _zeros(self, length: int) -> Float[Tensor, "1 t D"]:
        """Embeddings in fp32, so that the angles are in fp32 too."""
        return torch.zeros(1, length, self.model.config.hidden_size, device=self.model.device)


def _first_tokens(inputs: LayerInputs, length: int, recorded: int) -> LayerInputs:
    """The inputs of a window's first `length` tokens."""
    if length == recorded:
        return inputs

    def cut(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(cut(part) for part in value)
        if not isinstance(value, Tensor):
            return value
        if value.dim() == 4:  # a mask; other tensors count tokens in their first dimension behind the batch
            return value[..., :length, :length]
        return value[:length] if value.dim() == 1 else value[:, :length]

    options = {name: cut(value) for name, value in inputs.options.items()}
    return LayerInputs(options, options["position_embeddings"], cut(inputs.mask), inputs.rotary)


@torch.no_grad()
def run_layer(layer: Any, hidden: Float[Tensor, "n t D"], inputs: LayerInputs) -> Iterator[AttentionPass]:
    """Run every window through a layer, and yield the inputs and outputs of its attention."""
    seen: dict[str, Tensor] = {}

    def note_input(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen["in"] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

    def note_heads(_module: nn.Module, args: tuple, output: Tensor) -> None:
        seen["heads"], seen["out"] = args[0], output

    handles = [
        layer.self_attn.register_forward_pre_hook(note_input, with_kwargs=True),
        layer.self_attn.o_proj.register_forward_hook(note_heads),
    ]
    try:
        for window in hidden.split(1):
            out = layer(window, **inputs.options)
            energy = window.square().mean(-1) + seen["out"].square().mean(-1)
            yield AttentionPass(seen["in"][0], seen["heads"][0], 1 / energy[0], out[0])
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def run_layer_cached(layer: Any, hidden: Float[Tensor, "1 t D"], inputs: LayerInputs) -> Float[Tensor, "1 t D"]:
    """Run one window through a layer token by token with a cache: absorbed decoding if it caches latents."""
    cache = DynamicCache()
    layer_idx = layer.self_attn.layer_idx
    cos, sin = inputs.position_embeddings
    steps = []
    layer.self_attn.layer_idx = 0
    try:
        for t in range(hidden.shape[1]):
            step = {
                **inputs.options,
                "position_ids": inputs.options["position_ids"][:, t : t + 1],
                "position_embeddings": (cos[:, t : t + 1], sin[:, t : t + 1]),
                "attention_mask": inputs.mask[:, :, t : t + 1, : t + 1],
                "past_key_values": cache,
                "use_cache": True,
            }
            steps.append(layer(hidden[:, t : t + 1], **step))
    finally:
        layer.self_attn.layer_idx = layer_idx
    return torch.cat(steps, dim=1)


@contextmanager
def attention_outputs(layer: Any) -> Iterator[list[Tensor]]:
    """A list to which every call of the layer's attention appends its output."""
    outputs: list[Tensor] = []
    handle = layer.self_attn.o_proj.register_forward_hook(lambda _module, _args, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()
