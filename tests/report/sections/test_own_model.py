import pytest

from mea.report import make_sections
from mea.report.schema import check_fields


@pytest.fixture
def record():
    """A compression of two layers to codes, as `mea compress` keeps it."""
    tiers = [[[1, 2, 1], [0, 1, 2]], [[0, 3, 1], [0, 0, 4]]]
    config = {"model": "small", "method": "predictive", "calibration_text": "mine.txt", "tiers": tiers, "numbers": 8}
    results = {"cache_bytes_per_token_before": 512.0, "cache_bytes_per_token": 128.0, "seconds": 90.0}
    results |= {"perplexity_before": 20.0, "perplexity": 20.5, "perplexity_ratio": 1.025}
    results |= {"perplexity_ratio_error": 0.002, "layer_expected_loss": [0.003, 0.001]}
    config |= {"measured_text": "wikitext-2-test", "measured_tokens": 4096}
    return {"kind": "compression", "config": config, "results": results, "samples": {}}


def test_a_compression_shows_what_it_cost_and_what_its_bits_are_spent_on(record):
    check_fields(record, "compression.json")
    (section,) = make_sections([record])
    table, layers = section.parts
    assert section.heading == "Compressed: small"
    expected = ["predictive, 25 %", "25.0%", "1.025 ± 0.002", "20.00", "20.50", "128", "mine.txt", "1.5"]
    assert table.table.lines == [expected]
    assert [figure.name for figure in layers.figures] == ["bits-predictive, 25 %", "expected-loss"]


def test_without_a_measured_text_there_is_no_perplexity(record):
    for name in ("perplexity_before", "perplexity", "perplexity_ratio", "perplexity_ratio_error"):
        del record["results"][name]
    record["config"]["measured_tokens"] = 0
    check_fields(record, "compression.json")
    (section,) = make_sections([record])
    assert section.parts[0].table.lines[0][2:5] == ["–"] * 3
    assert "Perplexity" not in section.parts[0].table.note


def test_codes_without_their_loss_are_refused(record):
    del record["results"]["layer_expected_loss"]
    with pytest.raises(ValueError, match=r"config\.tiers is there and results\.layer_expected_loss is not"):
        check_fields(record, "compression.json")
