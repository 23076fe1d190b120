"""Reports in a browser: nothing is cut off on a telephone or a screen, in light and in dark."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest
from matplotlib.image import imread

from mea.records import read_records
from mea.report import write_report

ROOT = Path(__file__).parents[2]
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
QUIET = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync")
PHONE, SCREEN = 500, 1280  # headless Chromium has no narrower windows
# What is wider than the page without its own scroll bar, what hides a part of itself, what is drawn outside its figure.
SCRIPT = """<script>addEventListener("load", () => {
  const found = [], width = document.documentElement.clientWidth, own = e => e.closest(".wide, svg");
  if (document.documentElement.scrollWidth > width) found.push("the page scrolls sideways");
  for (const e of document.body.querySelectorAll("*")) {
    const box = e.getBoundingClientRect(), name = e.tagName + " " + e.textContent.trim().slice(0, 40);
    if (!own(e) && (box.right > width + 1 || box.left < -1)) found.push(name + " is outside the page");
    if (getComputedStyle(e).overflowX === "hidden" && e.scrollWidth > e.clientWidth + 1) found.push(name + " hides");
  }
  for (const svg of document.querySelectorAll("svg")) {
    const outer = svg.getBoundingClientRect();
    for (const e of svg.querySelectorAll("text")) {
      const box = e.getBoundingClientRect(), over = Math.max(outer.left - box.left, box.right - outer.right,
        outer.top - box.top, box.bottom - outer.bottom);
      if (over > 1) found.push(e.textContent + " is cut off by " + over.toFixed(1));
    }
  }
  document.title = JSON.stringify({width, found});
})</script>"""

pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium, which is no Python package")


def browse(page: Path, *options: str) -> str:
    command = [str(BROWSER), *QUIET, f"--user-data-dir={page.parent / 'profile'}", *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


@pytest.fixture(scope="module", params=["compare", "long_context", "lr_decay"])
def page(request, tmp_path_factory):
    """A report on committed records, with the script that looks for what is cut off."""
    path = tmp_path_factory.mktemp("page") / "page.html"
    write_report(read_records(ROOT / "experiments" / request.param / "records"), path)
    path.write_text(path.read_text(encoding="utf-8").replace("</body>", f"{SCRIPT}</body>"), encoding="utf-8")
    return path


def found(page: Path, width: int) -> list[str]:
    """What the script found in a window of `width` pixels."""
    dom = browse(page, f"--window-size={width},900", "--dump-dom")
    seen = json.loads(unescape(re.findall("<title>(.*?)</title>", dom)[0]))
    assert width - 20 <= seen["width"] <= width
    return seen["found"]


def test_the_script_finds_what_is_cut_off(tmp_path):
    page = tmp_path / "page.html"
    svg = "<svg width='50' height='20'><text x='0' y='15'>too long for its figure</text></svg>"
    page.write_text(f"<body><div style='width: 800px'>wide</div><div class='wide'>{svg}</div>{SCRIPT}</body>")
    assert [words.split()[0] for words in found(page, PHONE)] == ["the", "DIV", "too"]


@pytest.mark.parametrize("width", [PHONE, SCREEN])
def test_nothing_is_cut_off(page, width):
    assert found(page, width) == []


@pytest.mark.parametrize(("scheme", "dark"), [("0", True), ("1", False)])
def test_a_screenshot_is_in_the_reader_s_colours(page, scheme, dark):
    picture = page.with_name(f"{scheme}.png")
    browse(page, f"--blink-settings=preferredColorScheme={scheme}", f"--window-size={PHONE},900",
           "--hide-scrollbars", f"--screenshot={picture}")  # fmt: skip
    pixels = imread(picture)[..., :3]
    background = pixels[0, 0]
    assert bool(background.mean() < 0.5) is dark
    assert pixels.std() > 0.05  # something is written
    assert abs(pixels[:, -1] - background).max() < 0.05  # nothing reaches the right edge
