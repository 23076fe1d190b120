"""Models whose compressed cache is that of fewer kv heads, as stock checkpoints that every engine loads.

Encoders and decoders go into the projections where every kv head reads one component only, and where the maps of keys
commute with RoPE: one complex number per rotary frequency. Query heads are put in the order of their components.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from mea.arguments import check_output, unfinished
from mea.models.card import MADE_HERE, model_card, origin
from mea.models.latent_attention import MODEL_TYPE_PREFIX, SUPPORTED
from mea.models.loading import hidden_bars, load, load_config
from mea.models.saving import SHARD_SIZE, complete_folder, writing
from mea.names import escaped

ZERO = 1e-6  # of a matrix's largest number: what rounding leaves
INSTEAD = "serve it with mea's plugin for vLLM, or compress with --method gqa-mean and train the result (mea recover)"
OWN = ("latent_ranks", "latent_form", "latent_groups", "cache_code", "head_norm_eps", "compression", "auto_map")


def export(source: str, out: str | Path) -> None:
    """Write a compressed model as a stock checkpoint with its tokenizer; ``transformers`` alone loads it.

    Parameters
    ----------
    source
        Folder that `mea.compress_to_folder` or ``mea recover`` wrote, with whole heads (``gqa-mean``; with one kv head
        also ``gqa-procrustes`` and ``gauge``).
    out
        A folder that does not exist or is empty.

    Raises
    ------
    ValueError
        The model is not compressed, its cache is not that of fewer heads, or `out` is not empty.
    """
    out = Path(out)
    check_output(out)
    config = load_config(source)
    stock_config(config)
    work = unfinished(out)
    model, tokenizer = load(source)
    stock = stock_heads(model)
    with writing(out, work, "*"), complete_folder(out, work) as folder, hidden_bars():
        stock.save_pretrained(folder, max_shard_size=SHARD_SIZE)
        tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(_card(source, config, stock), encoding="utf-8")
        for record in (Path(source, name) for name in MADE_HERE):
            if record.is_file():
                shutil.copy(record, folder)


def stock_config(config: Any) -> Any:
    """The stock configuration with fewer kv heads for a compressed model's, without its weights.

    Raises
    ------
    ValueError
        As `export`, for what does not depend on weights.
    """
    kind = config.model_type.removeprefix(MODEL_TYPE_PREFIX)
    if kind == config.model_type:
        raise ValueError(f"this {kind} model is not compressed: engines load it as it is")
    if config.cache_code is not None or config.latent_form != "post_rope" or config.latent_groups != 1:
        form = "packed" if config.cache_code is not None else f"of {config.latent_form} latents"
        raise ValueError(f"the cache is {form}, which no stock architecture has: {INSTEAD}")
    ranks = {tuple(pair) if pair else None for pair in config.latent_ranks}
    kept = {name: value for name, value in config.to_dict().items() if name not in (*OWN, "model_type")}
    stock = getattr(transformers, SUPPORTED[kind][0])(**kept)
    with torch.device("meta"):
        attention = _stock_class(stock)(stock).model.layers[0].self_attn
    if config.head_norm_eps is not None or hasattr(attention, "q_norm"):
        raise ValueError(f"norms of heads stand between the projections and RoPE: {INSTEAD}")
    pair, width = next(iter(ranks)), attention.head_dim
    if len(ranks) > 1 or pair is None or pair[0] != pair[1] or pair[0] % width:
        raise ValueError(f"layers need equally many whole kv heads of keys and of values, not {ranks}: {INSTEAD}")
    stock.num_key_value_heads = pair[0] // width
    stock.architectures = [_stock_class(stock).__name__]
    return stock


def _stock_class(config: Any) -> Any:
    return getattr(transformers, f"{SUPPORTED[config.model_type][1]}ForCausalLM")


def _card(source: str, config: Any, stock: Any) -> str:
    heads, name = stock.config.num_key_value_heads, Path(source).name
    size = 2 * stock.config.num_hidden_layers * stock.model.layers[0].self_attn.head_dim * stock.dtype.itemsize
    rows = [("key/value heads", str(config.num_key_value_heads), str(heads))]
    kind = str(stock.dtype).removeprefix("torch.")
    rows.append((f"cache bytes per token ({kind})", f"{size * config.num_key_value_heads:,}", f"{size * heads:,}"))
    summary = (
        f"{escaped(name)}, compressed by mea to whole heads and written as a stock {stock.config.model_type} "
        "checkpoint: it computes the same and needs no code of mea."
    )
    title, header = f"{name} with {heads} key/value heads", ("", "original", "here")
    return model_card(title, summary, header, rows, MADE_HERE[0], origin(source), stock=True)


@torch.no_grad()
def stock_heads(model: Any) -> Any:
    """The stock model with fewer kv heads that computes what the compressed one does; a copy.

    Raises
    ------
    ValueError
        As `export`.
    """
    config = stock_config(model.config)
    made = _stock_class(config)(config).to(model.dtype)
    state = {name: value for name, value in model.state_dict().items() if ".head_mixing." not in name}
    for index, layer in enumerate(model.model.layers):
        try:
            changed = _projections(layer.self_attn, config.num_key_value_heads)
        except ValueError as error:
            raise ValueError(f"layer {index}: {error}: {INSTEAD}") from None
        state |= {f"model.layers.{index}.self_attn.{name}": value.to(model.dtype) for name, value in changed.items()}
    made.load_state_dict(state)
    made.generation_config = model.generation_config
    return made.eval()


def _projections(attention: Any, heads: int) -> dict[str, Tensor]:
    """Weights and biases of the four projections for `heads` kv heads, by name."""
    mixing, d = attention.head_mixing, attention.head_dim
    encoder = mixing.key_encoder.double()
    keys, values = (
        x.double().unflatten(-1, (heads, d)).movedim(2, 1) for x in (mixing.key_decoder, mixing.value_decoder)
    )
    read = [(part.flatten(2).abs().amax(-1) > ZERO * part.abs().max()) for part in (keys, values)]  # [g, heads]
    if not torch.equal(*read) or (read[0].sum(1) != 1).any():
        raise ValueError("heads read several components, or other ones for keys than for values")
    component = read[0].long().argmax(1)
    blocks = encoder.unflatten(0, (heads, d)).unflatten(-1, (-1, d)).movedim(2, 1)
    per_head = torch.arange(len(component))
    keys, values = keys[per_head, component], values[per_head, component]  # [g, d, d]
    if not _commutes(blocks) or not _commutes(keys):
        raise ValueError("the maps of keys do not commute with RoPE")
    repeats = attention.q_proj.out_features // d // len(component)
    order = torch.argsort(component, stable=True)
    counts = component.bincount(minlength=heads)
    if (counts != counts[0]).any():
        raise ValueError(f"components are read by {counts.tolist()} heads, and stock attention needs equally many")

    def queries(x: Tensor) -> Tensor:
        grouped = x.double().unflatten(0, (len(component), repeats, d))
        return torch.einsum("gab,gna...->gnb...", keys, grouped)[order].flatten(0, 2)

    changed = {"v_proj.weight": attention.v_proj.weight, "k_proj.weight": encoder @ attention.k_proj.weight.double()}
    changed["q_proj.weight"] = queries(attention.q_proj.weight)
    output = attention.o_proj.weight.double().unflatten(1, (len(component), repeats, d))
    changed["o_proj.weight"] = torch.einsum("Dgna,gab->Dgnb", output, values)[:, order].flatten(1)
    for name, change in (("q_proj", queries), ("k_proj", lambda x: encoder @ x.double()), ("v_proj", lambda x: x)):
        if (bias := getattr(attention, name).bias) is not None:
            changed[f"{name}.bias"] = change(bias)
    if attention.o_proj.bias is not None:
        changed["o_proj.bias"] = attention.o_proj.bias
    return {name: value.contiguous() for name, value in changed.items()}


def _commutes(maps: Tensor) -> bool:
    """Whether matrices ``[..., d, d]`` multiply each pair of channels of RoPE by one complex number."""
    half = maps.shape[-1] // 2
    a, b, c, e = (maps[..., i : i + half, j : j + half] for i in (0, half) for j in (0, half))
    off = torch.stack([x - torch.diag_embed(x.diagonal(dim1=-2, dim2=-1)) for x in (a, b)])
    wrong = max(x.abs().max().item() for x in (off, a - e, b + c))
    return wrong <= ZERO * maps.abs().max().item()
