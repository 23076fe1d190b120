"""Continue a prompt and stream the text."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import TextStreamer

from mea.models.quantized_cache import QuantisedCache
from mea.text import encode_chat


class _Streamer(TextStreamer):
    """Hands each finished piece of text on instead of printing it."""

    def __init__(self, tokenizer: Any, stream: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.stream = stream

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.stream(text)


@torch.no_grad()
def continue_prompt(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    chat: bool = False,
    cache_bits: int | None = None,
    stream: Callable[[str], None] | None = None,
) -> str:
    """The continuation of a prompt, without the prompt.

    Parameters
    ----------
    model, tokenizer
        Model and tokenizer, as `mea.models.loading.load` returns them.
    prompt
        Text to continue, or with `chat` a message to answer.
    max_new_tokens
        Most new tokens; the model may stop earlier.
    temperature
        Sampling temperature; 0 always takes the most likely token.
    top_p
        Draw from the likeliest tokens that together have this probability.
    seed
        Seed of the sampling.
    chat
        Put the prompt into the tokenizer's chat template.
    cache_bits
        Quantise the cache to 8, 4, 3 or 2 bits, see `mea.models.quantized_cache`; None is an ordinary cache.
    stream
        Called with each piece of text as soon as it is generated.

    Raises
    ------
    ValueError
        An empty prompt, a prompt that leaves no room in the model's context, a tokenizer without a chat template, a
        template that fails, or numbers out of range.
    """
    if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(
            "max_new_tokens must be positive, temperature not negative and top_p in (0, 1], "
            f"not {max_new_tokens}, {temperature} and {top_p}"
        )
    inputs = _encode(tokenizer, prompt, chat).to(model.device)
    length = inputs["input_ids"].shape[1]
    _check_length(model, length, max_new_tokens)
    options = _sampling(temperature, top_p)
    if temperature > 0:
        torch.manual_seed(seed)
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        options["pad_token_id"] = tokenizer.eos_token_id
    if cache_bits is not None:
        options["past_key_values"] = QuantisedCache(model.config.get_text_config(), cache_bits)
    streamer = _Streamer(tokenizer, stream) if stream else None
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, streamer=streamer, **options)
    return tokenizer.decode(output[0, length:], skip_special_tokens=True)


def _check_length(model: Any, length: int, max_new_tokens: int) -> None:
    if not length:
        raise ValueError("the prompt is empty: give the model something to continue")
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and length + max_new_tokens > longest:
        raise ValueError(
            f"{length:,} tokens of prompt and {max_new_tokens:,} new ones exceed the model's context of {longest:,}: "
            "give a shorter prompt or fewer new tokens"
        )


def _sampling(temperature: float, top_p: float) -> dict[str, Any]:
    if temperature > 0:
        return {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


def _encode(tokenizer: Any, prompt: str, chat: bool) -> Any:
    if not chat:
        return tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    messages = [{"role": "user", "content": prompt}]
    return encode_chat(tokenizer, messages, add_generation_prompt=True, return_tensors="pt")
