# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""The pages of a scan and of a cohort in a real browser: they work, load nothing, and show what is hostile as text."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from bundle.report import ScanViews, write_cohort_page
from bundle.report.compare import write_compare_page
from tests.test_report import ROW, chest, report_of

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--headless=new", "--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
HOSTILE = "<script>document.title='got'<b>\"'&{{7*7}} مريض 🫁"
READY = "body[data-ready]"

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine (apt-get install chromium)")


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright (pip install -r requirements-dev.txt)")
    with playwright.sync_playwright() as api:
        found = api.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield found
        found.close()


class Opened:
    """A page of a file, with all that it said and asked for."""

    def __init__(self, browser, path, ready: str) -> None:
        self.page = browser.new_page(viewport={"width": 1200, "height": 1000})
        self.page.set_default_timeout(300_000)  # a software renderer on a busy machine
        self.said, self.requests = [], []
        self.page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector(ready, state="attached")

    def pixels(self) -> bytes:
        return self.page.locator("#canvases").screenshot()

    def slide(self, name: str, value: int) -> None:
        self.page.locator(f"#{name}").fill(str(value))

    def where(self) -> str:
        return self.page.inner_text("#where")


@pytest.fixture(scope="module")
def scan(browser, tmp_path_factory):
    folder = tmp_path_factory.mktemp("viewer")
    views = chest()
    other = np.where(views.lung, np.arange(60.0)[:, None, None], 0)
    masks = {"gt_mask": views.overlays["heat"][0] > 0.3, "confounder_mask": np.zeros_like(views.lung)}
    masks["confounder_mask"][40:44, 15:19, 10:14] = True
    views = views._replace(overlays={**views.overlays, HOSTILE: (other, HOSTILE)}, masks=masks)
    return Opened(browser, report_of(folder / f"{HOSTILE.replace('/', '')}.html", views, patient_id=HOSTILE), READY)


def test_sliders_and_switches_change_pixels(scan):
    scan.page.click("[data-region='0']")
    shown = [scan.pixels()]
    for name, value in (("opacity", 0), ("opacity", 100), ("threshold", 40)):
        scan.slide(name, value)
        shown.append(scan.pixels())
    for name in ("lung", "gt_mask", "confounder_mask"):
        scan.page.uncheck(f"#outline-{name}")
        shown.append(scan.pixels())
    assert len(set(shown)) == len(shown)


def test_lung_surface_and_heat_are_rendered_and_turn(scan):
    def rendered() -> bytes:
        return scan.page.locator("#rendering").screenshot()

    scan.slide("opacity", 0)
    scan.page.uncheck("#outline-gt_mask")
    scan.page.uncheck("#outline-confounder_mask")
    scan.page.uncheck("#outline-lung")
    shown = [rendered()]
    scan.page.check("#outline-lung")
    shown.append(rendered())
    scan.slide("opacity", 100)
    shown.append(rendered())
    scan.page.locator("#rendering").drag_to(scan.page.locator("#rendering"), target_position={"x": 20, "y": 20})
    shown.append(rendered())
    assert len(set(shown)) == len(shown)


def test_a_region_moves_the_crosshair_there(scan):
    scan.page.click("[data-region='1']")
    assert scan.where().startswith("-60, 0, -70 mm (RAS) · -49 HU · heat 0.50 per mL")  # HU in steps of 4.7
    scan.page.keyboard.press("1")
    assert scan.where().startswith("45, 0, -10 mm (RAS) · -49 HU · heat 1.0 per mL")
    scan.page.focus("#planes")
    scan.page.keyboard.press("PageDown")
    scan.page.keyboard.press("ArrowLeft")  # the patient's right is on the left
    assert scan.where().startswith("48, 0, -13 mm")


def test_another_map_is_one_more_choice(scan):
    scan.page.select_option("#map", index=1)
    scan.page.wait_for_selector("#most:has-text('54')")
    scan.page.click("[data-region='0']")
    assert HOSTILE in scan.where() and "45 " in scan.where()
    scan.page.select_option("#map", index=0)
    scan.page.wait_for_selector("#most:has-text('1.0 per mL')")


def test_what_is_hostile_is_text_and_nothing_is_loaded(scan):
    assert scan.page.inner_text("h1") == f"Survival Map report of {HOSTILE}"
    assert scan.page.title() == f"Survival Map report of {HOSTILE}"
    assert scan.said == [] and len(scan.requests) == 1 and scan.requests[0].startswith("file:")


def test_what_is_not_ours_does_not_run(browser, tmp_path):
    page = report_of(tmp_path / "a.html", chest()).read_text()
    assert page.count("<h2>") > 1
    (tmp_path / "b.html").write_text(page.replace("<h2>", "<script>document.title='got'</script><h2 onclick='x()'>", 1))
    opened = Opened(browser, tmp_path / "b.html", READY)
    assert opened.page.title() != "got" and any("Content Security Policy" in line for line in opened.said)


def test_cohort_sorts_and_turns_pages(browser, tmp_path):
    rows = [{**ROW, "patient_id": f"p{i}", "familiarity": None, "median_months": float(i * 37 % 120)} for i in range(120)]
    rows[0]["patient_id"] = rows[0]["message"] = HOSTILE
    rows.append(dict(patient_id=f"failed {HOSTILE}", status="failed", message=HOSTILE))
    write_cohort_page(tmp_path, rows, {})
    opened = Opened(browser, tmp_path / "cohort.html", "#scans button")
    page = opened.page
    assert page.locator("#scans tbody tr").count() == 50 and page.inner_text("#page") == "1 to 50 of 120"
    assert len(opened.requests) <= 51  # the page, and pictures of these rows
    page.click("#next")
    page.click("#next")
    assert page.locator("#scans tbody tr").count() == 20 and page.is_disabled("#next")
    for order in (range(120), range(119, -1, -1)):
        page.click("text=median, months")
        medians = page.locator("#scans tbody td:nth-child(3)").all_inner_texts()
        assert medians == [f"{m:.1f}" for m in [*order][:50]]
    page.click("#sheet")
    assert page.is_visible("#scans td img >> nth=0") and not page.is_visible("#scans td:nth-child(4) >> nth=0")
    page.click("#sheet")
    assert page.is_visible("#scans td:nth-child(4) >> nth=0")
    page.click("#scans th button >> nth=0")
    names = page.locator("#scans tbody td:first-child").all_inner_texts()
    assert names[0] == HOSTILE and names[1:4] == ["p1", "p2", "p3"]
    assert page.title() == "Survival Map cohort"
    assert all(url.startswith(tmp_path.as_uri()) for url in opened.requests)
    assert not any("Content Security" in line for line in opened.said)


def test_comparison_opens_and_sorts(browser, tmp_path):
    numbers = dict(rank_correlation=None, region_dice=0.5, lung_dice=1.0, risk_a=0.5, risk_b=0.5, difference_months=3.0)
    months = {f"{name}_{side}": 9.0 for name in ("median", "lower", "upper") for side in "ab"}
    row = dict(status="ok", message=HOSTILE) | numbers | months
    rows = [row | {"patient_id": name, "rank_correlation": r} for name, r in ((HOSTILE, 0.5), ("b", None), ("c", 0.1))]
    write_compare_page(tmp_path, rows, [HOSTILE])
    opened = Opened(browser, tmp_path / "compare.html", "#scans button")
    opened.page.click("#scans >> text=rank correlation")
    assert opened.page.locator("#scans tbody td:first-child").all_inner_texts() == ["c", HOSTILE, "b"]
    assert not any("Content Security" in line for line in opened.said) and HOSTILE in opened.page.inner_text("p >> nth=1")


def test_report_at_the_top_opens_the_first(browser, tmp_path):
    (tmp_path / "reports").mkdir()
    report_of(tmp_path / "reports" / "a b.html", chest())
    write_cohort_page(tmp_path, [{**ROW, "patient_id": "a b", "familiarity": None}], {})
    assert Opened(browser, tmp_path / "report.html", READY).page.url.endswith("/reports/a%20b.html")


def test_one_voxel_without_a_mask_is_shown(browser, tmp_path):
    views = ScanViews(
        np.zeros((1, 1, 1)), np.ones((1, 1, 1), bool), False, np.eye(4), {"heat": (np.zeros((1, 1, 1)), "per mL")}
    )
    opened = Opened(browser, report_of(tmp_path / "a.html", views), READY)
    assert "no heat" in opened.page.inner_text(".believe") and opened.said == []
    assert "the whole scan counts as lung" in opened.page.inner_text(".believe")
    assert not opened.page.is_visible("#outline-lung")
