"""Perplexity against torch's own cross-entropy over all logits at once, its error against simulation, its refusals."""

import math

import pytest
import torch
from torch.nn import functional

from mea.evaluate.perplexity import block_means, by_position, exp_mean, perplexity, ratio, token_losses
from mea.models.lm_head import ROWS
from mea.text import encode_text, start_token


def by_hand(model, row):
    with torch.no_grad():
        logits = model(input_ids=row[None]).logits[0, :-1].float()
    return functional.cross_entropy(logits, row[1:], reduction="none")


@pytest.mark.parametrize("name", ["Llama", "Granite", "Gemma2", "Gemma3", "Qwen3Moe", "GPT2", "OPT"])
def test_losses_equal_cross_entropy_of_all_logits(tiny, agree, name):
    """Granite divides its logits and Gemma 2 caps them after the head; OPT calls parts of its body one by one."""
    model, window = tiny(name), 2 * ROWS + 45
    tokens = torch.randint(97, (2 * window + 31,))
    losses = token_losses(model, tokens, window)
    assert losses.shape == (2, window - 1)
    assert losses.std() > 0.1
    for row, loss in zip(tokens[: 2 * window].view(2, -1), losses, strict=True):
        agree(loss, by_hand(model, row), terms=200, what=name)


def test_logits_are_never_made_all_at_once(tiny):
    model, sizes = tiny(), []
    model.lm_head.register_forward_hook(lambda _, __, output: sizes.append(output.shape[1]))
    token_losses(model, torch.randint(97, (600,)), 300)
    assert max(sizes) == ROWS
    assert sum(sizes) == 2 * 299


def test_model_is_left_as_it_was(tiny):
    model = tiny().train()
    tokens = torch.randint(97, (64,))
    forward = model.base_model.forward
    token_losses(model, tokens, 64)
    assert model.training
    assert model.base_model.forward == forward
    assert "forward" not in vars(model.base_model)


def test_start_token_opens_every_window(tiny, agree):
    model, tokens = tiny(), torch.randint(3, 97, (62,))
    losses = token_losses(model, tokens, 32, start=1)
    assert losses.shape == (2, 31)  # 31 tokens of text in each, all of them scored
    opened = torch.cat([torch.tensor([1]), tokens[31:]])
    agree(losses[1], by_hand(model, opened), terms=100)


def test_perplexity_by_hand(tiny, agree):
    model, tokens = tiny(), torch.randint(97, (4 * 128,))
    losses = token_losses(model, tokens, 128)
    mean = sum(by_hand(model, row).double().sum() for row in tokens.view(4, 128)) / (4 * 127)
    estimate = perplexity(losses)
    assert estimate.value == pytest.approx(mean.exp().item(), rel=1e-6)
    assert estimate.tokens == 4 * 127


def test_progress_counts_windows(tiny):
    seen = []
    token_losses(tiny(), torch.randint(97, (100,)), 30, progress=lambda *done: seen.append(done))
    assert seen == [("reading", 1, 3), ("reading", 2, 3), ("reading", 3, 3)]


def test_standard_error_is_that_of_repeated_texts():
    """Losses whose neighbours are alike: an error that took tokens as independent would be half as large."""
    generator = torch.Generator().manual_seed(0)
    runs = torch.randn(300, 20, 256, generator=generator).repeat_interleave(4, dim=2) * 0.5 + 2
    estimates = [exp_mean(losses) for losses in runs]
    spread = torch.tensor([estimate.value for estimate in estimates]).std().item()
    stated = sum(estimate.standard_error for estimate in estimates) / len(estimates)
    assert stated == pytest.approx(spread, rel=0.12)


def test_ratio_error_is_paired():
    generator = torch.Generator().manual_seed(0)
    reference = torch.rand(8, 512, generator=generator) * 6
    losses = reference + 0.5 + 0.01 * torch.randn(8, 512, generator=generator)
    paired = ratio(losses, reference)
    assert paired.value == pytest.approx(math.exp(0.5), rel=2e-3)
    assert paired.standard_error < 0.05 * perplexity(losses).standard_error / perplexity(reference).value
    with pytest.raises(ValueError, match="different texts or windows"):
        ratio(losses, reference[:4])


def test_ranges_of_positions_make_up_the_whole():
    losses = torch.arange(1, 64).float().repeat(2, 1) / 16  # column p - 1 holds the loss of position p
    ranges = by_position(losses, (0, 16, 40, 64))
    assert [(r.start, r.stop, r.estimate.tokens) for r in ranges] == [(0, 16, 30), (16, 40, 48), (40, 64, 48)]
    assert ranges[1].estimate.value == pytest.approx(math.exp(sum(range(16, 40)) / 24 / 16), rel=1e-6)
    total = sum(math.log(r.estimate.value) * r.estimate.tokens for r in ranges)
    assert total / losses.numel() == pytest.approx(math.log(perplexity(losses).value), rel=1e-6)
    relative = by_position(losses + 0.25, (0, 16, 64), reference=losses)
    assert [r.estimate.value for r in relative] == pytest.approx([math.exp(0.25)] * 2)


@pytest.mark.parametrize("edges", [(0,), (0, 0), (16, 8), (-1, 8), (0, 65), (0, 1)])
def test_edges_that_make_no_ranges(edges):
    with pytest.raises(ValueError, match=r"edges must ascend|no token is scored"):
        by_position(torch.ones(1, 63), edges)


def test_blocks_keep_the_mean():
    losses = torch.rand(3, 255)
    means = block_means(losses)
    assert len(means) == 6
    assert means[0] == pytest.approx(losses[0, :128].mean().item())


@pytest.mark.parametrize(
    ("tokens", "window", "message"),
    [
        (50, 64, "the text has 50 tokens, fewer than one window of 64"),
        (700, 601, "a window of 601 tokens is longer than the model's context of 600"),
        (50, 1, "leaves nothing to score"),
    ],
)
def test_windows_that_do_not_fit(tiny, tokens, window, message):
    with pytest.raises(ValueError, match=message):
        token_losses(tiny(), torch.zeros(tokens, dtype=torch.long), window)


def test_tokens_of_another_vocabulary(tiny):
    with pytest.raises(ValueError, match="token 97 is outside the model's vocabulary of 97"):
        token_losses(tiny(), torch.full((64,), 97), 32)


def test_nan_names_the_window(tiny):
    model = tiny()
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = math.nan
    tokens = torch.zeros(64, dtype=torch.long)
    tokens[40] = 7
    with pytest.raises(ValueError, match="not finite numbers in window 2 of 2"):
        token_losses(model, tokens, 32)


class Words:
    """As much of a tokenizer as is asked for: a word is a token."""

    bos_token_id = 1

    def __init__(self, opens: bool):
        self.opens = opens

    def __call__(self, text, add_special_tokens=True, **_):
        return {"input_ids": [1] * (self.opens and add_special_tokens) + [5 for _ in text.split()]}


def test_encoding():
    assert encode_text(Words(True), "a b c", limit=2).tolist() == [5, 5]
    assert (start_token(Words(True)), start_token(Words(False))) == (1, None)
    with pytest.raises(ValueError, match="the text has 3 tokens, not the 4 asked for"):
        encode_text(Words(True), "a b c", limit=4)
    with pytest.raises(ValueError, match="must be positive"):
        encode_text(Words(True), "a", limit=0)
