"""The side-by-side comparison behind the demo, on a tiny model."""

import copy
import dataclasses
import math
import re
import sys

import pytest
import torch

from compression.small import tiny
from mea.comparison import peers
from mea.comparison import run as comparison
from mea.comparison.configs import DEMO, MethodConfig, method_configs
from mea.comparison.run import Protocol, compare, describe_cost, possible
from mea.comparison.training import Training
from mea.compression import cost
from mea.models.loading import load_config
from mea.report import make_sections, rows

METHOD_CONFIGS = [
    MethodConfig("post_rope:uniform", "post_rope:uniform"),
    MethodConfig("svd", "svd"),
    MethodConfig("svd, less", "svd", keep=0.25),
]
PROTOCOL = Protocol(
    texts=(("technical", 512),), window=128, position_text="technical", positions=(0, 128, 256),
    prompt="The", new_tokens=4, decode_context=256, decode_steps=3, decode_dtype="float32",
)  # fmt: skip


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    """A folder with a tiny Llama and its tokenizer, for all tests of this file."""
    folder = tmp_path_factory.mktemp("model") / "original"
    torch.manual_seed(0)
    tiny().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def measured(saved, calibration, tmp_path_factory):
    """A folder of records, and the records."""
    folder = tmp_path_factory.mktemp("records")
    return folder, compare(str(saved), folder, METHOD_CONFIGS, protocol=PROTOCOL, calibration=calibration)


@pytest.fixture
def records(measured):
    return measured[1]


def test_every_method_is_measured_on_the_same_tokens(records):
    original, *compressed = records
    assert rows(records)[0].name == "uncompressed"
    for record, method_config in zip(compressed, METHOD_CONFIGS, strict=True):
        size = record["results"]["cache"]["bytes_per_token"] / original["results"]["cache"]["bytes_per_token"]
        assert size == method_config.keep
        text, reference = (r["results"]["texts"]["technical"] for r in (record, original))
        assert text["tokens"] == reference["tokens"]
        assert text["ratio"] == pytest.approx(text["perplexity"] / reference["perplexity"], rel=1e-6)
        assert len(record["samples"]["decode_seconds"]["uncompressed"]) == PROTOCOL.decode_steps


def test_second_run_reuses_the_records_and_a_changed_one_does_not(measured, saved, calibration, monkeypatch):
    folder, records = measured

    def fail(*_args, **_kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(comparison, "load", fail)
    again = compare(str(saved), folder, METHOD_CONFIGS, protocol=PROTOCOL, calibration=calibration)
    assert again == records
    other = dataclasses.replace(PROTOCOL, window=64)
    with pytest.raises(AssertionError, match="loaded"):
        compare(str(saved), folder, METHOD_CONFIGS, protocol=other, calibration=calibration)


CONTINUED = dataclasses.replace(PROTOCOL, context=96, positions=(), prompt="", decode_steps=0)


@pytest.fixture(scope="module")
def several(saved, calibration, tmp_path_factory):
    configs = method_configs(["post_rope:uniform"], [0.5, 0.75], bits=(8, 4), presses=("SnapKVPress",))
    folder = tmp_path_factory.mktemp("several")
    return compare(str(saved), folder, configs, protocol=CONTINUED, calibration=calibration)


def test_quantised_caches_and_ranks_are_measured_in_one_protocol(several):
    by_label = {record["config"]["label"]: record["results"] for record in several}
    size = {label: results["cache"]["bytes_per_token"] for label, results in by_label.items() if "cache" in results}
    assert size["post_rope:uniform 0.5"] == size["uncompressed"] / 2
    assert size["4 bits"] < size["8 bits"] < size["uncompressed"]
    for results in by_label.values():
        for text in results.get("continuations", {}).values():
            assert text["tokens"] == 4 * 31
    error = {label: abs(by_label[label]["continuations"]["technical"]["ratio"] - 1) for label in ("8 bits", "4 bits")}
    assert error["8 bits"] < error["4 bits"]


def test_a_peer_that_is_not_there_is_a_note_and_not_a_failure(several):
    absent = [record for record in several if "not_run" in record["results"]]
    assert [record["config"]["label"] for record in absent] == ["kvpress SnapKVPress 0.5", "kvpress SnapKVPress 0.75"]
    (section,) = make_sections(several)
    table = next(part.table for part in section.parts if part.table)
    assert "Not run: kvpress SnapKVPress 0.5 (no environment with it was given)" in table.note
    assert {"pareto-texts", "pareto-continuations"} <= {f.name for part in section.parts for f in part.figures}


def test_a_peer_exchanges_tokens_and_losses_with_its_environment(saved, calibration, tmp_path, monkeypatch):
    """The peer's script is stood in for by one that scores every token alike, run by a Python of its own."""
    script = tmp_path / "peer.py"
    script.write_text(
        "import json, pathlib, sys, torch\n"
        "from safetensors.torch import load_file, save_file\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "request = json.loads((folder / 'request.json').read_text())\n"
        "tokens = load_file(folder / 'tokens.safetensors')['tokens']\n"
        "assert (pathlib.Path(request['model']) / 'config.json').is_file()\n"
        "assert request['calibration'][0] and request['calibration_window'] > 0\n"
        "losses = torch.ones(len(tokens), tokens.shape[1] - request['context'] - 1)\n"
        "save_file({'losses': losses}, folder / '0.safetensors')\n"
        "(folder / '0.json').write_text(json.dumps({'bytes_per_token': 7.0, 'versions': {}}))\n"
        "(folder / '1.json').write_text(json.dumps({'error': 'TypeError: no such press'}))\n"
    )
    monkeypatch.setitem(peers.SCRIPTS, "json", script)
    configs = [MethodConfig("one", "json One", 0.5), MethodConfig("two", "json Two", 0.25)]
    options = {"protocol": CONTINUED, "calibration": calibration, "peers": {"json": sys.executable}}
    _, one, two = compare(str(saved), tmp_path / "r", configs, **options)
    assert one["results"]["cache"]["bytes_per_token"] == 7.0
    assert one["results"]["continuations"]["technical"]["perplexity"] == pytest.approx(math.e)
    assert two["results"]["not_run"] == "TypeError: no such press"


def test_recovered_models_are_measured_as_the_training_leaves_them(saved, calibration, tmp_path):
    def silenced(student, original, name):
        assert student is not original
        names.append(name)
        model = copy.deepcopy(student)
        torch.nn.init.zeros_(model.get_output_embeddings().weight)
        return model

    names = []
    configs = method_configs(["post_rope:uniform", "svd"], [0.5], bits=(), recovered=True)
    options = {"protocol": CONTINUED, "calibration": calibration, "training": Training(silenced, {"how": "zeros"})}
    records = compare(str(saved), tmp_path / "r", configs, **options)
    by_label = {record["config"]["label"]: record for record in records}
    assert names == ["post-rope-uniform-0-5--recovered", "svd-0-5--recovered"]
    vocabulary = load_config(str(saved)).vocab_size
    for method in ("post_rope:uniform", "svd"):
        before, after = (by_label[f"{method} 0.5{end}"] for end in ("", ", recovered"))
        assert after["config"]["recovery"] == {"how": "zeros"}
        assert "recovery" not in before["config"]
        assert after["results"]["cache"] == before["results"]["cache"]
        assert after["results"]["texts"]["technical"]["perplexity"] == pytest.approx(vocabulary)
        assert before["results"]["texts"]["technical"]["perplexity"] != pytest.approx(vocabulary)
    with pytest.raises(ValueError, match="no training is given"):
        compare(str(saved), tmp_path / "r", configs, **options | {"training": None})


def test_an_environment_without_the_peer_says_so(tmp_path):
    tokens = torch.zeros(1, 8, dtype=torch.long)
    runs = [{"name": "X", "ratio": 0.5}]
    for python, words in ((str(tmp_path / "none"), "could not be run"), (sys.executable, "is not installed")):
        (result,) = peers.run_peer("kvpress", python, tmp_path, tmp_path, tokens, runs, context=4, dtype="float32")
        assert result.losses is None
        assert words in result.error


def test_a_backend_that_is_not_installed_is_a_note(saved, calibration, tmp_path):
    configs = [MethodConfig("theirs", "none", 1.0, bits=4, backend="unheard-of")]
    _, theirs = compare(str(saved), tmp_path, configs, protocol=CONTINUED, calibration=calibration)
    assert "unheard-of" in theirs["results"]["not_run"]


def test_configs_with_one_label_are_refused(saved, calibration, tmp_path):
    with pytest.raises(ValueError, match="labels of their own"):
        compare(str(saved), tmp_path, [METHOD_CONFIGS[0]] * 2, protocol=PROTOCOL, calibration=calibration)


def test_what_a_comparison_costs_is_said_before_any_weight_is_read(saved, calibration, monkeypatch):
    monkeypatch.setattr(comparison, "load", None)
    monkeypatch.setattr(cost, "_speed", lambda: 1e5)
    one, more = [MethodConfig("1", "svd")], [MethodConfig(str(i), "svd", keep=i / 4) for i in (1, 2, 3)]
    few, many = (describe_cost(str(saved), configs, PROTOCOL, calibration) for configs in (one, more))
    minutes = [int(re.search(r"about (\d+) minutes on this machine", words)[1]) for words in (few, many)]
    assert few.startswith("1 way to")
    assert many.startswith("3 ways to")
    assert 1 < minutes[0] < minutes[1]


def test_what_no_calibration_text_made_is_not_measured_again_for_another(saved, calibration, tmp_path):
    configs = method_configs(["post_rope:uniform"], [0.5], bits=[8])
    for seed in (0, 1):
        before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("r/*.json")}
        seeded = dataclasses.replace(calibration, seed=seed)
        compare(str(saved), tmp_path / "r", configs, protocol=CONTINUED, calibration=seeded)
    kept = [path.stem for path, written in before.items() if path.stat().st_mtime_ns == written]
    assert kept == ["8-bits"]  # the uncompressed model is measured anew because ratios are to it


def test_sizes_follow_the_method_and_bits_are_of_the_uncompressed_model():
    configs = method_configs(["predictive", "post_rope", "svd"], bits=(8, 4, 2))
    sizes = {}
    for config in configs:
        if config.bits is None:
            sizes.setdefault(config.method, []).append(config.keep)
    assert sizes == {"predictive": [0.08, 0.1, 0.14, 0.2, 0.28], "post_rope": [0.5], "svd": [0.5]}
    assert [(config.method, config.bits) for config in configs if config.bits] == [("none", n) for n in (8, 4, 2)]


@pytest.mark.parametrize("method", ["predictive", "svd"])
def test_bits_on_top_of_a_compressed_cache_are_refused(saved, calibration, tmp_path, method):
    configs = [MethodConfig("both", method, 0.5, bits=4)]
    with pytest.raises(ValueError, match=f"both: {method} compresses the cache;"):
        compare(str(saved), tmp_path, configs, protocol=CONTINUED, calibration=calibration)


def test_what_a_model_is_too_small_for_is_named(saved, calibration):
    """At 512 tokens the exact ones take more than a tenth."""
    configs = method_configs(["joint", "svd"], bits=())
    kept, reasons = possible(str(saved), configs, calibration, Protocol())
    assert [config.label for config in kept] == ["svd 0.5"]
    assert all("newest tokens exact" in reason for reason in reasons.values())
    assert len(reasons) == 5


def test_packed_caches_are_measured_at_the_same_length_as_others(tokenizer, calibration, tmp_path):
    tiny(max_position_embeddings=8192).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    configs = [
        *(config for config in DEMO if config.method != "svd"),
        MethodConfig("trained", "joint", 0.2, recovered=True),
    ]
    training = Training(lambda student, original, name: student, {"how": "not"})
    protocol = dataclasses.replace(PROTOCOL, prompt="", positions=(0, 128, 512), context=96)
    options = {"protocol": protocol, "calibration": calibration, "training": training}
    records = compare(str(tmp_path / "model"), tmp_path / "r", configs, **options)
    whole = records[0]["results"]["cache"]
    shares = [record["results"]["cache"]["bytes_per_token"] / whole["bytes_per_token"] for record in records[1:]]
    assert all(record["results"]["cache"]["tokens"] == 8192 for record in records)
    # Of numbers in 32 bits; the quantised cache adds its scales.
    assert [round(share, 2) for share in shares[:2]] == [0.1, 0.1]
    assert shares[-1] == shares[1]
    assert 0.125 < shares[2] < 0.21
    names = [row.name for row in rows(records)]
    assert {"predictive 0.2 (default)", "joint 0.2, keys rebuilt", "whole cache in 4 bits"} < set(names)
    assert all(record["results"]["positions"] for record in records[1:3])
    assert make_sections(records)
