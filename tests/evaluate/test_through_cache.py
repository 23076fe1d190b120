"""A continuation over an ordinary cache is the end of the whole window."""

import pytest
import torch

from compression.small import tiny
from mea.evaluate.perplexity import token_losses
from mea.evaluate.through_cache import Continuation


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_losses_are_those_of_the_window_read_at_once(kind):
    model, tokens = tiny(kind), torch.randint(0, 256, (100,))
    whole = token_losses(model, tokens, 50)
    continued = token_losses(model, tokens, 50, read=Continuation(30))
    torch.testing.assert_close(continued, whole[:, 30:], rtol=1e-4, atol=1e-5)


def test_a_context_as_long_as_the_window_is_refused():
    with pytest.raises(ValueError, match="nothing to score in a window of 50"):
        token_losses(tiny(), torch.zeros(50, dtype=torch.long), 50, read=Continuation(49))
