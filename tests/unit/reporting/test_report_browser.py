"""The report in a real Chromium: every figure is seen, nothing is wider than the page, text can be read."""

import shutil
from collections.abc import Iterator
from importlib.util import find_spec

import pytest

from inrank_megatron.reporting.report import write_report
from inrank_megatron.reporting.several import write_comparison
from tests.unit.conftest import write_run

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None
)
INSTALL = "apt install chromium-headless-shell; bash launch/setup_env.sh test"
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or find_spec("playwright") is None, reason=f"there is no browser: {INSTALL}"
)
WIDTHS = (1280, 400)
SCHEMES = ("light", "dark")
FIGURES = {"low-rank": 5, "dense": 2, "several": 3}

LOOK = """() => {
  // Colours as CSS computes them: rgb(r, g, b), or rgba of what is transparent.
  const numbers = colour => colour.match(/[0-9.]+/g).map(Number);
  const luminance = colour => {
    const [r, g, b] = numbers(colour).slice(0, 3).map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = element => {
    for (; element; element = element.parentElement) {
      const colour = getComputedStyle(element).backgroundColor;
      if ((numbers(colour)[3] ?? 1) > 0) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const width = document.documentElement.clientWidth;
  const scrolled = element => element.closest(".scroll") && !element.matches(".scroll");
  const wide = [], faint = [];
  for (const element of document.body.querySelectorAll("*")) {
    const box = element.getBoundingClientRect();
    if (!scrolled(element) && (box.left < 0 || box.right > width)) wide.push(element.outerHTML.slice(0, 80));
    const own = [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
    if (!own || !element.checkVisibility()) continue;
    const colours = [getComputedStyle(element).color, behind(element)];
    const [dark, light] = colours.map(luminance).sort((a, b) => a - b);
    const contrast = (light + 0.05) / (dark + 0.05);  // 4.5: WCAG 2.2, level AA
    if (contrast < 4.5) faint.push(`${contrast.toFixed(2)}: ${element.outerHTML.slice(0, 80)}`);
  }
  const figures = [...document.images].map(image => {
    const box = image.getBoundingClientRect();
    const place = image.closest("figure").getBoundingClientRect();
    return {alt: image.alt, loaded: image.complete && image.naturalWidth > 0, shown: image.checkVisibility(),
      width: box.width, height: box.height, inside: box.left >= 0 && place.right <= width,
      rows: image.closest("figure").querySelectorAll("details tbody tr").length};
  });
  return {page: document.documentElement.scrollWidth, width, wide, faint, figures,
    background: luminance(getComputedStyle(document.body).backgroundColor)};
}"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict]:
    """What the browser shows of each page at each width, light and dark, and what its console says."""
    from playwright.sync_api import sync_playwright

    folder = tmp_path_factory.mktemp("pages")
    runs = [
        write_run(folder / "a run with a name as long as names of runs can be"),
        write_run(folder / "dense", method="dense", steps=47),
        write_run(folder / "another", lr=0.5, data_path=["a", "long", "list", "of", "files"] * 5),
    ]
    pages = {
        "low-rank": write_report(runs[0]),
        "dense": write_report(runs[1]),
        "several": write_comparison(runs, folder / "comparison.html"),
    }
    looks: dict = {"console": []}
    with sync_playwright() as playwright:
        # Root, as in a container, has no sandbox.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for scheme in SCHEMES:
            tab = browser.new_page(color_scheme=scheme)
            tab.on("console", lambda message: looks["console"].append(message.text))
            tab.on("pageerror", lambda error: looks["console"].append(str(error)))
            tab.on("requestfailed", lambda request: looks["console"].append(request.url[:80]))
            for name, path in pages.items():
                tab.goto(path.as_uri())
                for width in WIDTHS:
                    tab.set_viewport_size({"width": width, "height": 900})
                    looks[name, width, scheme] = tab.evaluate(LOOK)
        browser.close()
    yield looks


@pytest.fixture(params=[(name, w, s) for name in FIGURES for w in WIDTHS for s in SCHEMES], ids=str)
def look(request: pytest.FixtureRequest, seen: dict) -> dict:
    return seen[request.param] | {"scheme": request.param[2], "name": request.param[0]}


def test_the_console_says_nothing(seen):
    assert seen["console"] == []


def test_nothing_is_wider_than_the_page(look):
    assert look["page"] == look["width"] and look["wide"] == []


def test_every_figure_is_seen_and_has_words_and_a_table(look):
    assert len(look["figures"]) == FIGURES[look["name"]]
    for figure in look["figures"]:
        assert figure["loaded"] and figure["shown"] and figure["inside"], figure
        assert figure["width"] >= 600 and figure["height"] >= 200, "its letters can be read"
        assert len(figure["alt"]) > 40 and figure["rows"] >= 2, figure


def test_text_stands_out_in_light_and_in_dark(look):
    assert look["faint"] == []
    assert (look["background"] < 0.1) == (look["scheme"] == "dark")
