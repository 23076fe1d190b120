"""Transforms in the loss's metric, moments that make it, and codes that are fitted to them."""

import copy
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from coded_models import original
from compression.small import tiny
from mea.compression.calibrate.layerwise import LayerWalk
from mea.compression.checkpoint import FactorStore
from mea.compression.coding import moments
from mea.compression.coding.convert import assemble_coded, check_codes, coded_config
from mea.compression.coding.fit import READINGS, Joint, LayerCode, Predictive, fit_codes, full_code, per_frequency
from mea.compression.coding.klt import transform
from mea.compression.coding.moments import LayerMoments, layer_moments
from mea.compression.convert import ConversionError
from mea.models.layer_code import CODES
from mea.ops.codes import bits_per_token
from mea.ops.latent import rotate

HEADS, DIM = 3, 8
WIDTH = 2 * HEADS * DIM


def positive(n: int, rank: int | None = None, kind: torch.dtype = torch.float64, batch: tuple = ()) -> Tensor:
    """A random covariance with eigenvalues over three decades."""
    factor = torch.randn(*batch, n, n if rank is None else rank, dtype=kind)
    size = torch.logspace(0, -1.5, n, dtype=torch.float64)[:, None]
    return (size * factor) @ (size * factor).mH / n


def made_up(rank: int = WIDTH, samples: int = 3000) -> LayerMoments:
    """Normal keys and values with a mean, and a random metric."""
    factor = torch.randn(WIDTH, rank, dtype=torch.float64) * torch.logspace(0, -1, rank, dtype=torch.float64)
    mean = torch.randn(WIDTH, dtype=torch.float64)
    sample = torch.randn(samples, rank, dtype=torch.float64) @ factor.T
    return LayerMoments(mean, sample.T @ sample / samples, positive(WIDTH), (sample + mean).float(), DIM)


def module(code: LayerCode, reading: str) -> Any:
    """The layer's module, in fp64."""
    made = CODES[reading](HEADS, DIM, [list(tier) for tier in code.tiers]).double()
    made.load_state_dict({name: tensor.to(made.state_dict()[name].dtype) for name, tensor in code.tensors.items()})
    return made


def heads(moments: LayerMoments, count: int = 200) -> tuple[Tensor, Tensor]:
    z = moments.sample[:count].double().unflatten(1, (2 * HEADS, DIM)).transpose(0, 1)[None]
    return z[:, :HEADS], z[:, HEADS:]


@pytest.mark.parametrize("kind", [torch.float64, torch.complex128])
@pytest.mark.parametrize("batch", [(), (4,)])
def test_all_components_give_everything_back(kind, batch):
    """Decoder times encoder is the identity, components have unit variance, and their losses add up to the whole.

    Complex components have unit variance in each of both parts, and a loss for each. Products of matrices with
    condition numbers of 10^3 are off by 10^3 ulps a term: 1e-9 is far above.
    """
    covariance, metric = positive(12, kind=kind, batch=batch), positive(12, kind=kind, batch=batch)
    encoder, decoder, losses = transform(covariance, metric)
    identity = torch.eye(12, dtype=kind).expand(*batch, 12, 12)
    torch.testing.assert_close(decoder @ encoder, identity, atol=1e-9, rtol=0)
    parts = 2 if covariance.is_complex() else 1
    used = losses > 2e-6 * losses[..., :1]  # below 1e-6 components are not enlarged to unit variance
    both, found = used[..., :, None] & used[..., None, :], encoder @ covariance @ encoder.mH
    torch.testing.assert_close(found[both], (parts * identity)[both], atol=1e-6, rtol=0)
    whole = (metric @ covariance).diagonal(dim1=-2, dim2=-1).sum(-1).real / 2
    torch.testing.assert_close(parts * losses.sum(-1), whole, rtol=1e-6, atol=0)
    assert (losses[..., :-1] >= losses[..., 1:]).all()


def test_losses_are_those_of_leaving_components_out():
    """Half of the metric's mean of what is missing, for every number of components.

    The metric is far from its floor, which would add 1e-6 of its mean.
    """
    covariance, metric = positive(10), positive(10) + torch.eye(10)
    encoder, decoder, losses = transform(covariance, metric)
    for kept in range(11):
        missing = torch.eye(10, dtype=torch.float64) - decoder[:, :kept] @ encoder[:kept]
        left = (metric @ missing @ covariance @ missing.T).trace() / 2
        torch.testing.assert_close(losses[kept:].sum(), left, rtol=1e-5, atol=1e-12)


def test_directions_that_a_text_hardly_uses_are_not_enlarged_without_bound():
    """A component of 10^-12 of the largest loss has 10^-3 of unit deviation: no other text makes it fill a group."""
    covariance = torch.diag(torch.tensor([1.0, 1e-3, 1e-12, 0.0], dtype=torch.float64))
    encoder, decoder, _ = transform(covariance, torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(decoder @ encoder, torch.eye(4, dtype=torch.float64))
    variance = (encoder @ covariance @ encoder.T).diagonal()
    torch.testing.assert_close(variance[:2], torch.ones(2, dtype=torch.float64))
    assert variance[2] <= 1.1e-6


def test_no_other_subspace_loses_less():
    """Against random and principal subspaces of the same size, each with its best decoder."""
    covariance, metric = positive(10), positive(10)
    losses = transform(covariance, metric).losses
    principal = torch.linalg.eigh(covariance).eigenvectors.flip(1).T
    for encoder in (principal[:4], *torch.randn(20, 4, 10, dtype=torch.float64)):
        decoder = covariance @ encoder.T @ torch.linalg.inv(encoder @ covariance @ encoder.T)
        missing = torch.eye(10, dtype=torch.float64) - decoder @ encoder
        assert (metric @ missing @ covariance @ missing.T).trace() / 2 >= losses[4:].sum() - 1e-12


@pytest.mark.parametrize("kind", [torch.float64, torch.complex128])
def test_missing_directions_and_free_errors(kind):
    """Rank-deficient or zero covariances and metrics give finite maps; what there is comes back."""
    zero = torch.zeros(8, 8, dtype=kind)
    for covariance, metric in (
        (positive(8, 3, kind), positive(8, kind=kind)), (positive(8, kind=kind), positive(8, 2, kind)),
        (zero, positive(8, kind=kind)), (positive(8, kind=kind), zero), (zero, zero),
    ):  # fmt: skip
        found = transform(covariance, metric)
        assert all(part.isfinite().all() for part in found)
        assert (found.losses >= 0).all()
        back = found.decoder @ found.encoder @ covariance
        torch.testing.assert_close(back, covariance, atol=1e-7 * max(1e-9, covariance.abs().max().item()), rtol=0)


def test_per_frequency_against_a_direct_sum():
    """``E[z z^H]`` of complex numbers whose real and imaginary parts are half of a head apart."""
    x = torch.randn(50, HEADS, DIM, dtype=torch.float64)
    z = torch.complex(x[..., : DIM // 2], x[..., DIM // 2 :])
    flat = x.flatten(1)
    expected = torch.einsum("sgf,shf->fgh", z, z.conj()) / 50
    torch.testing.assert_close(per_frequency(flat.T @ flat / 50, DIM), expected)


def test_components_of_keys_turn_with_their_keys():
    """Rotating keys is multiplying each component by ``exp(i angle)`` of its frequency; so scores need no keys.

    With fp64 sums of `HEADS` products; angles are the same numbers on both sides.
    """
    moments = made_up()
    moments.mean[: HEADS * DIM] = 0
    code = module(Predictive(moments).code([(8, 8, 4), (8, 8, 0)]), "predictive")
    keys = torch.randn(1, HEADS, 40, DIM, dtype=torch.float64)
    angles = torch.arange(40)[:, None] * 10000.0 ** (-torch.arange(DIM // 2, dtype=torch.float64) / (DIM // 2))
    cos, sin = (f(angles).repeat(1, 2)[None] for f in (torch.cos, torch.sin))
    turned = torch.view_as_complex(code.key_components(rotate(keys, cos, sin)).unflatten(-1, (-1, 2)))
    plain = torch.view_as_complex(code.key_components(keys).unflatten(-1, (-1, 2)))
    torch.testing.assert_close(turned, plain * torch.polar(torch.ones_like(angles), angles)[:, code.frequency.long()])


@pytest.mark.parametrize("reading", READINGS)
def test_scores_are_products_with_the_rebuilt_keys(reading):
    """Turned components, or rebuilt keys: the means of keys included."""
    moments = made_up()
    sizes = {"predictive": [(8, 8, 4), (8, 8, 0)], "joint": [(16, 8, 8)]}
    code = module(READINGS[reading](moments).code(sizes[reading]), reading)
    components = code.rounded(*heads(moments, 40))
    angles = torch.arange(40)[:, None] * 10000.0 ** (-torch.arange(DIM // 2, dtype=torch.float64) / (DIM // 2))
    cos, sin = (f(angles).repeat(1, 2)[None] for f in (torch.cos, torch.sin))
    queries = torch.randn(1, 2 * HEADS, 3, DIM, dtype=torch.float64)
    keys = rotate(code.rebuild(components)[0], cos, sin)
    expected = queries @ keys.repeat_interleave(2, 1).mT
    torch.testing.assert_close(code.scores(queries, components, cos, sin), expected)


@pytest.mark.parametrize("reading", READINGS)
def test_without_rounding_everything_comes_back(reading):
    """All components of sampled tokens give their keys and values; fp32 would leave 1e-6 of them."""
    moments = made_up()
    code = module(full_code(READINGS[reading](moments)), reading)
    code.exactly = True
    for found, expected in zip(code.rebuild(code.rounded(*heads(moments))), heads(moments), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-7, rtol=0)


@pytest.mark.parametrize("reading", READINGS)
def test_codes_say_what_is_read(reading):
    """Decoded codes are the rounded components, and 8 bits of all components come back to 1 %."""
    moments = made_up()
    code = module(full_code(READINGS[reading](moments)), reading)
    keys, values = heads(moments)
    components = code.decode(*code.encode(keys, values))
    torch.testing.assert_close(components.double(), code.rounded(keys, values), atol=1e-5, rtol=0)
    for found, expected in zip(code.rebuild(components.double()), (keys, values), strict=True):
        assert (found - expected).square().mean() <= 1e-4 * expected.square().mean()


@torch.no_grad()
def fisher_loss(moments: LayerMoments, code: Any) -> float:
    """Half of the metric's mean of the errors of the sample, in nats per token."""
    keys, values = heads(moments, len(moments.sample))
    rebuilt = code.rebuild(code.rounded(keys, values))
    errors = torch.cat([(a - b).transpose(1, 2).flatten(2) for a, b in zip(rebuilt, (keys, values), strict=True)], -1)[
        0
    ]
    return float(((errors @ moments.cost) * errors).sum(1).mean() / 2)


@pytest.mark.parametrize("tiers", [(8, 16, 8), (0, 16, 0), (16, 0, 0)])
def test_the_expected_loss_of_the_joint_reading_is_that_of_its_errors(tiers):
    """Above a quarter and at most a third more: the range of 8 to 16 normal numbers is 2.8 to 3.5 deviations, of the
    table's 128 it is 5.2, and errors go with its square.
    """
    moments = made_up()
    code = Joint(moments).code([tiers])
    assert code.loss / 4 <= fisher_loss(moments, module(code, "joint")) <= code.loss * 4 / 3


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("rank", [5, 0])
def test_layers_of_low_rank(reading, rank):
    """Keys and values in few directions, or constant: finite weights, and what there is comes back."""
    moments = made_up(rank=rank) if rank else made_up()
    if not rank:
        moments.covariance = torch.zeros_like(moments.covariance)
        moments.sample = moments.mean.float().expand_as(moments.sample)
    found = READINGS[reading](moments)
    code = fit_codes([found], [100], 100 * 4 * WIDTH)[0]
    assert code is not None
    assert all(tensor.isfinite().all() for tensor in code.tensors.values())
    assert sum(map(bits_per_token, code.tiers)) <= 4 * WIDTH
    made = module(code, reading)
    keys, values = heads(moments)
    components = made.decode(*made.encode(keys, values)).double()
    for got, expected in zip(made.rebuild(components), (keys, values), strict=True):
        spread = (expected - expected.mean(2, keepdim=True)).square().mean()
        assert (got - expected).square().mean() <= 0.1 * spread + 1e-10


@pytest.mark.parametrize("reading", READINGS)
def test_bits_are_met_and_ordinary_layers_stay(reading):
    moments = [made_up(), made_up(), made_up()]
    readings = [READINGS[reading](found) for found in moments]
    given, tokens, budget = [readings[0], None, readings[2]], [100, 100, 50], 150 * 3 * WIDTH
    codes = fit_codes(given, tokens, budget)
    assert codes[1] is None
    bits = [sum(map(bits_per_token, code.tiers)) for code in codes if code]
    assert 0.7 * budget <= 100 * bits[0] + 50 * bits[1] <= budget


# Moments of a model


@pytest.fixture(scope="module")
def measured() -> tuple[Any, Tensor, list[LayerMoments]]:
    torch.manual_seed(0)
    model = tiny("llama")
    ids = torch.randint(0, 256, (24, 64))
    return model, ids, layer_moments(LayerWalk(model), ids, 4, seed=0)


def test_moments_are_those_of_the_keys_and_values(measured):
    """Mean and covariance of a direct computation, without the first tokens; fp32 products of numbers of size 1."""
    model, ids, moments = measured
    seen: dict[str, Tensor] = {}
    attention = model.model.layers[1].self_attn
    handles = [
        part.register_forward_hook(lambda *call, name=name: seen.__setitem__(name, call[2]))
        for name, part in (("k", attention.k_proj), ("v", attention.v_proj))
    ]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    z = torch.cat([seen["k"], seen["v"]], -1)[:, 4:].flatten(0, 1).double()
    torch.testing.assert_close(moments[1].mean, z.mean(0), atol=1e-5, rtol=0)
    torch.testing.assert_close(moments[1].covariance, z.T.cov(correction=0), atol=1e-4, rtol=0)


@pytest.mark.parametrize("part", ["keys", "values"])
@pytest.mark.parametrize("layer", [0, 2])
def test_the_metric_predicts_the_divergence_of_small_errors(measured, layer, part):
    """Errors ``e`` added to one layer's keys or values move the next-token distributions by ``E[e^T C e] / 2`` nats.

    1,440 tokens; the metric's own sampling (one drawn label a token) and that of the errors are off by some percent
    each, and errors of 1 % add as much beyond the second order: 0.7 to 1.3 is three deviations of 10 %.
    """
    model, ids, moments = measured
    width = len(moments[layer].mean) // 2
    chosen = slice(0, width) if part == "keys" else slice(width, 2 * width)
    size = 0.02 * moments[layer].covariance.diagonal()[chosen].mean().sqrt()
    attention = model.model.layers[layer].self_attn
    projection = attention.k_proj if part == "keys" else attention.v_proj
    found, rounds = 0.0, 4
    with torch.no_grad():
        expected = model(ids).logits.double().log_softmax(-1)
        for _ in range(rounds):

            def noisy(_module: Any, _args: Any, output: Tensor) -> Tensor:
                noise = size.float() * torch.randn_like(output)
                noise[:, :4] = 0
                return output + noise

            handle = projection.register_forward_hook(noisy)
            logits = model(ids).logits.double().log_softmax(-1)
            handle.remove()
            found += float((expected.exp() * (expected - logits)).sum()) / rounds / (ids.shape[0] * 60)
    predicted = float(moments[layer].cost.diagonal()[chosen].sum() * size**2 / 2)
    assert 0.7 <= found / predicted <= 1.3


def test_an_interrupted_calibration_goes_on_where_it_was(tmp_path, monkeypatch):
    """Sums of three of six parts are kept; the rest gives the same moments bit by bit, and a damaged file none."""
    monkeypatch.setattr(moments, "PART", 1)  # one window at a time
    monkeypatch.setattr(moments, "KEPT_EVERY", 0.0)
    walk, ids = LayerWalk(tiny("llama")), torch.randint(0, 256, (6, 64), generator=torch.Generator().manual_seed(1))
    expected = layer_moments(walk, ids, 4, seed=0)
    begun: list[int] = []

    def interrupt(_what: str, done: int, steps: int) -> None:
        begun.append(done)
        if done == steps // 2 + 1 and begun.count(done) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="50% of the calibration is kept"):
        layer_moments(walk, ids, 4, seed=0, progress=interrupt, store=FactorStore(tmp_path, "run"))
    store = FactorStore(tmp_path, "run")
    again = layer_moments(walk, ids, 4, seed=0, progress=interrupt, store=store)
    assert store.seconds > 0  # of the interrupted run, for the record
    layers = len(walk.layers)
    (head,) = {b - a for a, b in pairwise(begun)} - {1, 3, -1}  # units of the output layer; one was repeated
    half = 3 * ([1] * layers + [head] + [3] * layers)
    assert begun == [*accumulate([0, *half, 1]), *accumulate([sum(half), *half])]
    for first, second in zip(expected, again, strict=True):
        assert all(torch.equal(x, second.tensors()[name]) for name, x in first.tensors().items())
    (kept,) = tmp_path.glob("sums-*")
    kept.write_bytes(kept.read_bytes()[:-1])
    assert FactorStore(tmp_path, "run").get_state("sums-0-of-1") == (0, {})


def test_text_without_variety_is_refused():
    model = tiny("llama")
    with pytest.raises(ValueError, match=r"too little variety: keys and values of layer 0 take \d+ directions"):
        layer_moments(LayerWalk(model), torch.full((2, 64), 7), 4, seed=0)


def test_overflow_is_refused():
    model = tiny("llama")
    model.model.layers[1].self_attn.o_proj.weight.data *= 1e38
    with pytest.raises(ValueError, match=r"(activations|gradients) are not finite .* the model overflows"):
        layer_moments(LayerWalk(model), torch.randint(0, 256, (2, 64)), 4, seed=0)


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("zero", ["k_proj", "v_proj", "o_proj"])
def test_layers_with_zero_weights(reading, zero):
    """Keys or values that are constant, or that nobody reads, get codes or none; the checks pass."""
    model = tiny("llama")
    getattr(model.model.layers[0].self_attn, zero).weight.data.zero_()
    check(model, reading)


@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text", "mistral"])
@pytest.mark.parametrize("reading", READINGS)
def test_checks_pass(kind, reading):
    errors = check(original(kind), reading)
    assert all(0 <= error <= 1e-4 for error in errors.values())


def check(model: Any, reading: str, change: Any = None) -> dict[str, float]:
    walk, vocabulary = LayerWalk(model), model.config.vocab_size
    ids = torch.randint(1, vocabulary, (8, 64))
    readings = [READINGS[reading](found) for found in layer_moments(walk, ids, 4, seed=0)]
    codes = fit_codes(readings, [100] * len(readings), 100 * len(readings) * 6 * 48)
    if change:
        change(readings, codes)
    return check_codes(walk, ids, readings, codes)


@pytest.mark.parametrize(("reading", "name"), [("predictive", "encoder"), ("joint", "transform")])
def test_a_wrong_encoder_is_refused(reading, name):
    def damage(readings: Any, _codes: Any) -> None:
        found = readings[1]
        if name == "encoder":
            found.encoder[0] *= 1.01
        else:
            found.transform.encoder[0] *= 1.01

    with pytest.raises(ConversionError, match="with all components and no rounding the logits differ"):
        check(tiny("llama"), reading, damage)


@pytest.mark.parametrize("reading", READINGS)
def test_a_wrong_reading_of_the_cache_is_refused(reading, monkeypatch):
    """Codes that decode to something else than what a pass over the whole text reads."""
    right = CODES[reading].decode
    monkeypatch.setattr(CODES[reading], "decode", lambda self, *given: 1.01 * right(self, *given))
    with pytest.raises(ConversionError, match="decoding over the packed cache differs"):
        check(tiny("llama"), reading)


def coded_by(model: Any, reading: str, ids: Tensor, bits: int) -> Any:
    readings = [READINGS[reading](found) for found in layer_moments(LayerWalk(model), ids, 4, seed=0)]
    codes = fit_codes(readings, [100] * len(readings), 100 * len(readings) * bits)
    return assemble_coded(model, codes, coded_config(model.config, reading, (4, 8), codes, {}))


@torch.no_grad()
def divergence(model: Any, packed: Any, ids: Tensor) -> float:
    """Nats per token of a whole pass."""
    p, q = (each(ids, use_cache=False).logits.double().log_softmax(-1) for each in (model, packed))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("reading", READINGS)
def test_key_biases_cost_nothing(reading):
    """Biases of several hundred are a constant mean, whatever their size.

    Scores of a query with all keys change by about the same number, so attention is nearly that without biases; fp32
    keys of 500 are off by 2^-15, which is far below the step of a code.
    """
    ids, found = torch.randint(0, 256, (12, 64)), []
    for size in (0.0, 500.0):
        model = tiny("qwen2", rope_parameters={"rope_type": "default", "rope_theta": 1e6})
        for layer in model.model.layers:
            bias = layer.self_attn.k_proj.bias.data
            bias.zero_()
            bias[3::8], bias[7::8] = size, -size / 2  # of each head's lowest frequency: 0.002 radians in 64 tokens
        packed = coded_by(model, reading, ids, 6 * 32)
        found.append(divergence(model, packed, ids))
    assert found[0] > 1e-4
    assert found[1] <= 2 * found[0]


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("exponent", [17, -17])
def test_rescaled_values_change_nothing(reading, exponent):
    """``v_proj`` times a power of two and ``o_proj`` divided by it: the same model, the same codes."""
    ids, results = torch.randint(0, 256, (12, 64)), []
    for power in (0, exponent):
        model = tiny("llama")
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight.data *= 2.0**power
            layer.self_attn.o_proj.weight.data *= 2.0**-power
        packed = coded_by(copy.deepcopy(model), reading, ids, 6 * 32)
        results.append((packed.config.cache_code["tiers"], divergence(model, packed, ids)))
    assert results[0][0] == results[1][0]
    assert results[1][1] == pytest.approx(results[0][1], rel=0.02)
