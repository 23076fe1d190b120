"""Interrupted runs go on where they stopped, and a folder is there complete or not at all."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compression.small import tiny
from mea.compression import Calibration
from mea.compression.checkpoint import FactorStore
from mea.compression.methods.base import Method
from mea.compression.save import compress_to_folder
from mea.models.saving import complete_folder


def arguments(calibration: Calibration, **changes: Any) -> dict[str, Any]:
    return {"method": "post_rope", "calibration": calibration, "measure_tokens": 0, **changes}


def files(folder: Path) -> dict[str, bytes]:
    """Everything but the record and the card, which hold times."""
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {"README.md", "compression.json", "model.safetensors", "config.json", "tokenizer.json"} <= set(found)
    return {name: content for name, content in found.items() if name not in ("README.md", "compression.json")}


def in_a_process(code: str, *values: object) -> subprocess.CompletedProcess:
    """Run code in another Python, with `saved`, `out`, `text` given as its arguments."""
    head = f"""
        import os, resource, signal, sys, torch
        torch.set_num_threads({torch.get_num_threads()})
        from mea.compression import Calibration
        from mea.compression.save import compress_to_folder
        saved, out, text = sys.argv[1:4]
        calibration = Calibration(text, tokens=256, window=64, copy_fraction=0.0)  # as the fixture
    """
    code = textwrap.dedent(head) + textwrap.dedent(code)
    command = [sys.executable, "-c", code, *map(str, values)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def fits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lists the layers' fits from now on."""
    calls: list[int] = []
    original = Method.fit

    def counted(*args: Any) -> Any:
        calls.append(1)
        return original(*args)

    monkeypatch.setattr(Method, "fit", counted)
    return calls


def test_a_killed_run_goes_on_from_its_finished_layers(
    saved: Path, calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    killed = in_a_process(
        """
        def kill(what, done, of):
            if (what, done) == ("compressing", 2):
                os.kill(os.getpid(), signal.SIGKILL)
        compress_to_folder(saved, out, method="post_rope", calibration=calibration, measure_tokens=0, progress=kill)
        """,
        saved, out, calibration.text,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not out.exists()
    assert len(list((tmp_path / "out.partial" / "layers").glob("*.safetensors"))) == 2

    calls = fits(monkeypatch)
    compress_to_folder(str(saved), out, **arguments(calibration))
    assert len(calls) == 1, "the finished layers were fitted again"
    assert not (tmp_path / "out.partial").exists()
    compress_to_folder(str(saved), tmp_path / "whole", **arguments(calibration))
    assert len(calls) == 4
    assert files(out) == files(tmp_path / "whole")


class Interrupted(Exception):
    pass


def interrupt(saved: Path, out: Path, calibration: Calibration, after: int = 1, **changes: Any) -> None:
    def stop(what: str, done: int, of: int) -> None:
        if done == after and not what.startswith("loading"):
            raise Interrupted

    with pytest.raises(Interrupted):
        compress_to_folder(str(saved), out, **arguments(calibration, progress=stop, **changes))
    assert not out.exists()


def test_an_exception_leaves_the_finished_layers(saved: Path, calibration: Calibration, tmp_path: Path) -> None:
    for layers in (1, 2, 3):  # again and again, the last time after all of them
        interrupt(saved, tmp_path / "out", calibration, after=layers)
    compress_to_folder(str(saved), tmp_path / "out", **arguments(calibration))
    compress_to_folder(str(saved), tmp_path / "whole", **arguments(calibration))
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.parametrize("method", ["pre_rope", "shared"])
def test_finished_layers_remember_the_form_of_their_latents(
    method: str, saved: Path, calibration: Calibration, tmp_path: Path
) -> None:
    interrupt(saved, tmp_path / "out", calibration, after=2, method=method)
    for out in ("out", "whole"):
        compress_to_folder(str(saved), tmp_path / out, **arguments(calibration, method=method))
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_file_cut_short_by_a_crash_does_not_count(saved: Path, calibration: Calibration, tmp_path: Path) -> None:
    interrupt(saved, tmp_path / "out", calibration)
    layers = tmp_path / "out.partial" / "layers"
    content = (layers / "00000.safetensors").read_bytes()
    (layers / "00001.safetensors.part").write_bytes(content[:100])
    compress_to_folder(str(saved), tmp_path / "out", **arguments(calibration))


@pytest.mark.parametrize(
    "changes",
    [{"keep": 0.75}, {"method": "post_rope:frequency"}, {"dtype": "bfloat16"}, {"method": "svd"}],
)
def test_an_interrupted_run_of_other_settings_is_refused(
    changes: dict[str, Any], saved: Path, calibration: Calibration, tmp_path: Path
) -> None:
    interrupt(saved, tmp_path / "out", calibration)
    with pytest.raises(ValueError, match=r"out\.partial holds an interrupted run .* remove that folder, or give"):
        compress_to_folder(str(saved), tmp_path / "out", **arguments(calibration, **changes))
    assert len(list((tmp_path / "out.partial" / "layers").glob("*.safetensors"))) == 1


def test_an_interrupted_run_of_other_calibration_text_is_refused(
    saved: Path, calibration: Calibration, tmp_path: Path
) -> None:
    interrupt(saved, tmp_path / "out", calibration)
    (tmp_path / "other.txt").write_text(Path(calibration.text).read_text()[::-1])
    other = Calibration(str(tmp_path / "other.txt"), tokens=256, window=64)
    with pytest.raises(ValueError, match="holds an interrupted run"):
        compress_to_folder(str(saved), tmp_path / "out", **arguments(other))


def test_an_interrupted_run_of_other_weights_is_refused(saved: Path, calibration: Calibration, tmp_path: Path) -> None:
    """The configuration alone does not tell a model from its fine-tuned sister."""
    interrupt(saved, tmp_path / "out", calibration)
    model = tiny()
    model.model.norm.weight.data *= 2
    model.save_pretrained(saved)
    with pytest.raises(ValueError, match="holds an interrupted run of another model"):
        compress_to_folder(str(saved), tmp_path / "out", **arguments(calibration))


LIMITED = """
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing on then fails as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]), resource.RLIM_INFINITY))
    try:
        compress_to_folder(saved, out, method="post_rope", calibration=calibration, measure_tokens=0)
    except OSError as error:
        print(error)
        sys.exit(7)
"""


@pytest.mark.parametrize("limit", [100_000, 4096])  # the model does not fit; not even a layer's factors do
def test_disk_full_while_saving(limit: int, saved: Path, calibration: Calibration, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert (saved / "model.safetensors").stat().st_size > 100_000
    full = in_a_process(LIMITED, saved, out, calibration.text, limit)
    assert full.returncode == 7, full.stderr
    assert "could not be written" in full.stdout
    assert "free disk space and repeat" in full.stdout
    assert not out.exists()
    left = sorted(path.name for path in (tmp_path / "out.partial").rglob("*") if path.is_file())
    expected = [f"{layer:05d}.safetensors" for layer in range(3)] if limit == 100_000 else []
    assert left == ([*expected, "run.json"] if expected else []), "something half written remains"
    for name in expected:
        load_file(tmp_path / "out.partial" / "layers" / name)
    # With room again, the same command ends as if nothing had been.
    compress_to_folder(str(saved), out, **arguments(calibration))
    compress_to_folder(str(saved), tmp_path / "whole", **arguments(calibration))
    assert files(out) == files(tmp_path / "whole")


def test_the_folder_can_be_there_if_it_is_empty(saved: Path, calibration: Calibration, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    compress_to_folder(str(saved), tmp_path / "out", **arguments(calibration))
    files(tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["original", "out"]
    shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("metadata", [{"form": "rotated", "groups": "1"}, {"form": "post_rope"}, None])
def test_a_layer_that_another_version_wrote_is_refused_with_what_to_do(tmp_path, metadata):
    store = FactorStore(tmp_path / "out.partial" / "layers", "the same")
    store.folder.mkdir(parents=True)
    names = ("key_encoder", "key_decoder", "value_encoder", "value_decoder")
    tensors = {name: torch.ones(2, 2) for name in names}
    save_file(tensors, store.folder / "00000.safetensors", metadata)
    with pytest.raises(ValueError, match=r"out\.partial holds an interrupted run of another version of mea; remove"):
        store.get(0)


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "one bit", "another layer", "another run"])
def test_a_damaged_layer_does_not_count(damage: str, tmp_path: Path) -> None:
    store, other = FactorStore(tmp_path / "layers", "this"), FactorStore(tmp_path / "other", "other")
    for index in range(2):
        store.put_tensors("kind", index, {"a": torch.full((3, 5), 1.0 + index)})
    other.put_tensors("kind", 1, {"a": torch.full((3, 5), 2.0)})
    first, second = sorted(store.folder.glob("*.safetensors"))
    content = second.read_bytes()
    second.write_bytes({
        "cut": content[: len(content) // 2],
        "empty": b"",
        "garbage": b"\xff" * 5000,
        "one bit": content[:-1] + bytes([content[-1] ^ 1]),
        "another layer": first.read_bytes(),
        "another run": next(other.folder.glob("*.safetensors")).read_bytes(),
    }[damage])  # fmt: skip
    store = FactorStore(tmp_path / "layers", "this")
    assert store.get_tensors("kind", 0) is not None
    assert store.get_tensors("kind", 1) is None
    store.put_tensors("kind", 1, {"a": torch.full((3, 5), 2.0)})
    assert second.read_bytes() == content


@pytest.mark.parametrize("method", ["post_rope", "predictive"])
def test_damaged_layers_are_made_again(
    method: str, saved: Path, calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the run had not been interrupted."""
    options = arguments(calibration, method=method, keep=0.8)

    def broken(*_: Any) -> Any:
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr("mea.compression.save._measure", broken)
        with pytest.raises(Interrupted):
            compress_to_folder(str(saved), tmp_path / "out", **options)
    first, second, third = sorted((tmp_path / "out.partial" / "layers").glob("*.safetensors"))
    second.write_bytes(first.read_bytes())
    third.write_bytes(third.read_bytes()[:100])
    compress_to_folder(str(saved), tmp_path / "out", **options)
    compress_to_folder(str(saved), tmp_path / "whole", **options)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.parametrize("content", ["", "[" * 100_000, "7", "\xff"])
def test_a_damaged_description_of_the_run_is_refused(
    content: str, saved: Path, calibration: Calibration, tmp_path: Path
) -> None:
    interrupt(saved, tmp_path / "out", calibration)
    (tmp_path / "out.partial" / "layers" / "run.json").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match="holds an interrupted run"):
        compress_to_folder(str(saved), tmp_path / "out", **arguments(calibration))


def test_a_failed_start_leaves_nothing(saved: Path, calibration: Calibration, tmp_path: Path) -> None:
    """So that the same command succeeds once the model is put right."""
    weights = load_file(saved / "model.safetensors")
    out = tmp_path / "a" / "b" / "out"
    for name, value in (("layers.1.mlp.up_proj", float("nan")), ("layers.2.mlp.down_proj", 1e38)):
        wrong = {key: tensor.clone() for key, tensor in weights.items()}
        wrong[f"model.{name}.weight"][:] = value
        save_file(wrong, saved / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=r"not all finite|not finite"):
            compress_to_folder(str(saved), out, **arguments(calibration))
        assert sorted(os.listdir(tmp_path)) == ["original"]
    save_file(weights, saved / "model.safetensors", {"format": "pt"})
    (tmp_path / "out.partial" / "layers").mkdir(parents=True)
    (tmp_path / "out.partial" / "layers" / "run.json").write_text('"what a failed start once left"')
    compress_to_folder(str(saved), tmp_path / "out", **arguments(calibration))


def test_the_second_writer_is_told(saved: Path, calibration: Calibration, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def second(what: str, done: int, of: int) -> None:
        if done == 1:
            with pytest.raises(ValueError, match=r"another process is writing .*/out: wait until it has finished"):
                compress_to_folder(str(saved), out, **arguments(calibration))

    compress_to_folder(str(saved), out, **arguments(calibration, progress=second))
    files(out)
    assert sorted(os.listdir(tmp_path)) == ["original", "out"]


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_the_files_have_the_mode_of_new_files(mask: int, saved: Path, calibration: Calibration, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        compress_to_folder(str(saved), tmp_path / "out", **arguments(calibration))
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert modes == {0o666 & ~mask}


def test_of_two_runs_that_write_one_folder_the_first_is_kept_whole(tmp_path):
    out, work = tmp_path / "out", tmp_path / "out.partial"

    def write(name: str, meanwhile: Callable[[], None] = lambda: None) -> None:
        with complete_folder(out, work) as folder:
            (folder / "weights").write_text(name)
            meanwhile()

    with pytest.raises(ValueError, match=r"out exists and is not an empty folder"):
        write("slow", lambda: write("fast"))
    assert (out / "weights").read_text() == "fast"
    assert not work.exists()
