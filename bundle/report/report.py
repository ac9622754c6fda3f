# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Self-contained HTML pages from the templates beside this file; whatever is put into them is text, never HTML.

A new page is a template that extends `base.html`, and a function here that says what goes into it. `tables.html` has the
tables that pages share.
"""

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from bundle.files import write_atomically
from bundle.maps.familiarity import UNLIKE
from bundle.metrics.verdict import doubtful, in_words
from bundle.report import viewer
from bundle.report.regions import HOT, fault_of, ranked_regions


def percent(share: float) -> str:
    """A share as text.

    >>> percent(0.668)
    '66.8 %'
    """
    return f"{100 * share:.1f} %"


COLUMNS = {
    # of predictions.csv: heading, format
    "median_months": ("median, months", "{:.1f}".format),
    "lower_months": ("2.5 %", "{:.0f}".format),
    "upper_months": ("97.5 %", "{:.0f}".format),
    "death_12m": ("death by 12 months", percent),
    "death_24m": ("24", percent),
    "death_36m": ("36", percent),
    "death_60m": ("60", percent),
    "familiarity": ("familiarity", "{:.2f}".format),
}

LONG = ("trained_on", "familiarity", "outcomes")  # of the settings, which nobody reads


def data_uri(picture: bytes) -> str:
    """A PNG as an address that holds it."""
    return f"data:image/png;base64,{base64.b64encode(picture).decode()}"


PAGES = Environment(
    loader=PackageLoader("bundle.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
PAGES.globals["COLUMNS"] = COLUMNS
PAGES.filters |= {"data_uri": data_uri, "percent": percent}


def write_page(path: str | Path, template: str, **content: Any) -> None:
    """Write a page piece by piece to a temporary name, then rename."""
    page = PAGES.get_template(template).stream(**content)
    write_atomically(path, lambda temporary: page.dump(str(temporary), encoding="utf-8"))


class ScanViews(NamedTuple):
    """What the viewer shows of a scan, all on one grid.

    Args:
        hu: (D, H, W), axes towards right, front, head (RAS), clipped to the window.
        lung: True in the lung.
        masked: whether a lung mask was used; else `lung` is True everywhere.
        affine: of the voxels (RAS, mm).
        overlays: maps by name, each with its unit; the first is the heat, the share of the risk per mL. One entry is
            one more map to switch to.
        masks: that the cohort gives, `gt_mask` and `confounder_mask`, of which outlines are drawn.
    """

    hu: np.ndarray
    lung: np.ndarray
    masked: bool
    affine: np.ndarray
    overlays: dict[str, tuple[np.ndarray, str]]
    masks: dict[str, np.ndarray] = {}


def write_scan_report(
    path: str | Path, row: dict, pmf: np.ndarray, views: ScanViews, about: dict[str, Any], settings: dict
) -> None:
    """Write the page about one scan.

    Args:
        path: of the HTML file.
        row: of `predictions.csv`.
        pmf: P(T = 1..tmax months).
        views: of the scan.
        about: `risk`, P(T <= horizon); `horizon`, months; `hu_window`; `lung_mask_source`; `read`, from what; `notes`, a
            list; `picture`, a PNG of :func:`~bundle.report.pictures.heat_figure`; `provenance`, texts by name.
        settings: of the weights.
    """
    heat = next(iter(views.overlays.values()))[0]
    regions = ranked_regions(heat, views.hu, views.lung, views.affine, views.masked)
    hottest = np.unravel_index(int(np.nan_to_num(heat).argmax()), heat.shape)
    start = regions[0].mm if regions else (views.affine[:3, :3] @ hottest + views.affine[:3, 3]).tolist()
    volumes, spacing = viewer.volumes(views, about["hu_window"])
    data = {**volumes, "hu_window": about["hu_window"], "regions": [r.mm for r in regions], "start": start}
    known = {name: value for name, value in settings.items() if name not in LONG}
    write_page(
        path, "scan.html", row=row, **about, **believed(settings), **survival_content(row, pmf, settings),
        familiarity=familiarity_in_words(row.get("familiarity")), fault=fault_of(heat, views.lung), regions=regions,
        lungs=lungs_in_words(about["lung_mask_source"]), overlays=data["overlays"],
        rest=1 - sum(r.share for r in regions), hot=HOT, data=data, spacing=spacing,
        methods=methods(settings, about), settings=json.dumps(known, indent=2), licence=viewer.LICENCE.read_text(),
        niivue=viewer.niivue()[0], script=viewer.script("viewer.js"), policy=viewer.policy("viewer.js", viewer=True),
    )  # fmt: skip


def write_cohort_page(folder: str | Path, rows: list[dict], settings: dict, outcomes: dict | None = None) -> None:
    """Write `cohort.html` about all scans of a run, and `report.html`, which opens the report of the first.

    Args:
        folder: that has the scans' `reports/` and `maps/`.
        rows: of `predictions.csv`.
        settings: of the weights.
        outcomes: predictions against what happened: `said`, sentences; `metrics`, as in `metrics.json`, or None;
            `pictures`, PNGs by the name of their figure.
    """
    done = [row for row in rows if row["status"] == "ok"]
    links = [(row, f"maps/{quote(row['patient_id'])}_heat.png", f"reports/{quote(row['patient_id'])}.html") for row in done]
    failed = [row for row in rows if row["status"] != "ok"]
    page = {"script": viewer.script("listing.js"), "policy": viewer.policy("listing.js")}
    known = outcomes or {"said": [], "metrics": None, "pictures": {}}
    known |= {"groups": metric_groups({"survival": known["metrics"]})}
    write_page(Path(folder) / "cohort.html", "cohort.html", done=links, failed=failed, **known, **page, **believed(settings))
    write_page(Path(folder) / "report.html", "opener.html", target=links[0][2] if links else "cohort.html")


def survival_content(row: dict, pmf: np.ndarray, settings: dict) -> dict:
    """What `scan.html` says of survival: curves as points of its drawing, deaths, and where the patient stands."""
    outcomes = settings.get("outcomes", {})
    tmax, cohort, last = len(pmf), outcomes.get("pmf"), outcomes.get("last_death") or len(pmf)
    alive = np.clip(1 - np.cumsum([0, *pmf]), 0, 1)
    content = {"tmax": tmax, "curve": _points(alive, tmax), "cohort_curve": ""}
    content["standing"] = (
        "The weights have no record of how the training cohort survived, so the patient has no place in it."
    )
    everyone = None
    if cohort:
        everyone = np.clip(1 - np.cumsum([0, *cohort]), 0, 1)
        content["cohort_curve"] = _points(everyone[: int(last) + 1], tmax)
        before = 1 - np.interp(row["median_months"], np.arange(tmax + 1), everyone)
        died = f"{100 * before:.0f} % of the training cohort had died (Kaplan\N{EN DASH}Meier)"
        content["standing"] = f"By that median {died}."
        if row["median_months"] > last:
            content["standing"] = f"That median lies beyond the last death of the training, at {last:.0f} months."
    deaths = {int(name[6:-1]): value for name, value in row.items() if name.startswith("death_")}
    known = {t: 1 - float(everyone[t]) if everyone is not None and t <= last else None for t in deaths}
    return content | {"deaths": {t: (own, known[t]) for t, own in deaths.items()}}


def _points(alive: np.ndarray, tmax: int) -> str:
    """A step curve from month 0 on, as points of the drawing in `scan.html`."""
    months = np.repeat(np.arange(len(alive)), 2)[1:]
    x, y = 45 + 600 * months / tmax, 10 + 215 * (1 - np.repeat(alive, 2)[:-1])
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y))


def lungs_in_words(source: str) -> str:
    """Where the lung mask is from.

    >>> lungs_in_words("threshold, thorax filled")
    'segmented by threshold, thorax filled'
    """
    if source == "none":
        return "no mask, the whole scan counts as lung"
    return f"the mask was {source}" if source.startswith("given") else f"segmented by {source}"


def familiarity_in_words(familiarity: float | None) -> str:
    """How like the training scans a scan looks.

    >>> familiarity_in_words(0.0)
    'it looks unlike the training scans: 0 % of them look as strange or stranger, so its map means little'
    """
    if familiarity is None:
        return "the weights have no record of what the training scans look like, so nobody knows how like them it is"
    share = f"{100 * familiarity:.0f} % of them look as strange or stranger"
    if familiarity < UNLIKE:
        return f"it looks unlike the training scans: {share}, so its map means little"
    return f"it looks like the training scans: {share}"


def methods(settings: dict, about: dict[str, Any]) -> str:
    """A paragraph for a paper on how the map was made."""
    prepared, network = settings.get("preprocessing", {}), settings.get("network", {})
    spacing, (low, high) = prepared.get("spacing", "native"), about["hu_window"]
    grid = "kept at their own spacing" if spacing == "native" else f"resampled to {viewer.times(spacing)} mm"
    version = about["provenance"]["Survival Map"]
    return (
        f"Survival and its map were predicted from chest CT by Survival Map {version} ({network.get('name')}, "
        f"{settings.get('objective', {}).get('name')} objective). Scans were {grid}, clipped to {low:g} to {high:g} HU, and "
        f"cropped to the lungs (lung mask: {about['lung_mask_source']}). The network gives each patch of lung a time and "
        f"a weight; the heat of a patch is its weight times the patient's probability of death by {about['horizon']} months "
        f"and sums to it. Of the weights: {believed(settings)['verdict']}. Research use only."
    )


def believed(settings: dict) -> dict:
    """What pages say of the training that left weights with these settings: `verdict` in words, and if it is `doubtful`."""
    learnt = settings.get("learnt")
    if learnt is None:
        return {"verdict": "these weights have no record of what their training learnt", "doubtful": True}
    return {"verdict": in_words(learnt), "doubtful": doubtful(learnt)}


def write_evaluation_report(
    path: str | Path, metrics: dict, pictures: dict[str, bytes], settings: dict | None = None
) -> None:
    """Write the page about an evaluation.

    Args:
        path: of the HTML file.
        metrics: what `metrics.json` holds.
        pictures: PNGs by the name of their figure in `evaluation.html`.
        settings: of the weights; None for maps of another tool.
    """
    failed = metrics.get("failed", {}).get("scans", [])
    said = believed(settings) if settings else {"verdict": "", "doubtful": False}
    write_page(path, "evaluation.html", groups=metric_groups(metrics), pictures=pictures, failed=failed, **said)


class MetricGroup(NamedTuple):
    """One set of metrics as pages and terminals show it."""

    title: str
    counts: list[str]  # such as "32 scans"
    entries: dict[str, dict]  # "value", "lower", "upper" and "num_scans" of each metric


def metric_groups(metrics: Mapping[str, Any]) -> list[MetricGroup]:
    """The sets of metrics of `metrics.json`; its other entries are left out.

    >>> entry = {"value": 0.7, "lower": 0.6, "upper": 0.8, "num_scans": 32}
    >>> metric_groups({"survival": {"c_index": entry, "num_scans": 32}, "horizon": 60})[0].counts
    ['32 scans']
    """
    groups = []
    for title, group in metrics.items():
        if isinstance(group, Mapping):
            entries = {name: entry for name, entry in group.items() if isinstance(entry, Mapping) and "value" in entry}
            numbers = {name: number for name, number in group.items() if isinstance(number, int)}
            counts = [f"{number} {name.removeprefix('num_').replace('_', ' ')}" for name, number in numbers.items()]
            groups.append(MetricGroup(title, counts, entries))
    return [group for group in groups if group.entries]
