"""Train a small Llama-shaped language model with 4 key/value heads, for `run.py` to compress.

Minutes on two cores. Writes the model, its tokenizer, and the text it did and did not see to a folder.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mea.text import encode_text, load_text

VOCABULARY = 1024
HELD_OUT = 0.1  # of the text, its end


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def make_model() -> Any:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, head_dim=32, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def train(model: Any, ids: torch.Tensor, steps: int, batch: int, window: int, lr: float) -> list[float]:
    """Plain AdamW with a warm-up and a cosine; returns the loss of every step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / warm) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
    )
    generator = torch.Generator().manual_seed(0)
    losses = []
    start = time.perf_counter()
    for step in range(steps):
        places = torch.randint(len(ids) - window, (batch, 1), generator=generator)
        rows = ids[places + torch.arange(window)]
        loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.3f}, {time.perf_counter() - start:.0f} s", flush=True)
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/four_heads"))
    parser.add_argument(
        "--text", nargs="+", default=["encyclopaedic", "wikitext-2-valid"], help="packaged texts or files"
    )
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--lr", type=float, default=2e-3)
    options = parser.parse_args()

    torch.manual_seed(0)
    texts = [load_text(name) for name in options.text]
    cuts = [int(len(text) * (1 - HELD_OUT)) for text in texts]
    seen = "".join(text[:cut] for text, cut in zip(texts, cuts, strict=True))
    tokenizer = train_tokenizer(seen)
    ids = encode_text(tokenizer, seen)
    model = make_model()
    print(f"{model.num_parameters():,} parameters, {len(ids):,} tokens of text")
    losses = train(model, ids, options.steps, options.batch, options.window, options.lr)

    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    (options.out / "seen.txt").write_text(seen, encoding="utf-8")
    unseen = "".join(text[cut:] for text, cut in zip(texts, cuts, strict=True))
    (options.out / "held-out.txt").write_text(unseen, encoding="utf-8")
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    settings["text"] = [Path(name).name for name in options.text]
    settings["parameters"] = model.num_parameters()
    (options.out / "training.json").write_text(json.dumps({"settings": settings, "losses": losses}), encoding="utf-8")


if __name__ == "__main__":
    main()
