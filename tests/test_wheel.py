"""The wheel alone, without the checkout: what `pip install` gives a user works."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from compression.small import byte_tokenizer, tiny

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The programs of an environment with the wheel, this environment's other packages, and not the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-qq"]
    wheel = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ROOT]
    subprocess.run(wheel, check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "env"], check=True)
    program = folder / "env/bin/python"
    subprocess.run([*pip, "--python", program, "install", "--no-deps", next(folder.glob("mea-*.whl"))], check=True)
    where = subprocess.run(
        [program, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    # A path in a .pth file: the .pth files in that path, this checkout's among them, are not followed.
    Path(where, "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return program.parent


def test_the_wheel_compresses_and_generates(installed, tmp_path):
    tiny(max_position_embeddings=1024).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*arguments: str) -> str:
        said = subprocess.run(
            [installed / arguments[0], *arguments[1:]], cwd=tmp_path, env=clean, capture_output=True, text=True
        )
        assert said.returncode == 0, said.stderr
        return said.stdout

    found = run("python", "-c", "import mea, sys; print(mea.__file__)").strip()
    assert Path(found).is_relative_to(installed.parent)
    options = ("--keep", "0.9", "--calibration-tokens", "4096", "--calibration-window", "256", "--measure", "0")
    run("mea", "compress", "model", "small", *options)
    assert (tmp_path / "small" / "compression.json").is_file()
    run("mea", "generate", "small", "--prompt", "once", "--max-new-tokens", "3")
