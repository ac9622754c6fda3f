# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""A whole CT from file to saved map, stage by stage, and a cohort of them: a part of `scripts.research.benchmark`."""

from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import bundle.run.results as prediction_writer
import nibabel as nib
import numpy as np
import torch
from monai.bundle import ConfigParser

from bundle.run.parallel import run_parallel
from bundle.run.start import begin

SHAPE, SPACING = (512, 512, 300), (0.7, 0.7, 1.0)
STAGES = {
    "LoadCTd": "read and check the CT and its lung mask",
    "Orientationd": "orient",
    "Spacingd": "resample to 3 mm",
    "LungMaskd": "lung mask, HU window, crop",
    "QualityGated": "quality gate",
    "ScaleIntensityRanged": "lung mask, HU window, crop",
    "CropForegroundd": "lung mask, HU window, crop",
    "SelectItemsd": "lung mask, HU window, crop",
    "GridShiftInferer": "network at 64 origins, refinement",
    "MapToHeatd": "heat",
    "HeatToScand": "heat to the scan's grid",
    "write_heat": "write the heat map",
    "add": "picture, curve and text of the report",
}


def write_ct(folder: Path, scans: int) -> Path:
    """A cohort CSV of a CT of a body with two lungs, a lesion and noise, its lung mask given, listed `scans` times."""
    rng, affine = np.random.default_rng(0), np.diag([-SPACING[0], -SPACING[1], SPACING[2], 1.0])
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in SHAPE), indexing="ij", sparse=True)
    lung = ((abs(x) - 0.42) / 0.33) ** 2 + (y / 0.55) ** 2 + (z / 0.9) ** 2 < 1
    hu = np.where((x / 0.95) ** 2 + (y / 0.75) ** 2 + 0 * z < 1, np.float32(40), np.float32(-1000))
    hu[lung] = -850
    hu[(x - 0.4) ** 2 + (y - 0.1) ** 2 + (0.8 * z) ** 2 < 0.012] = 30
    hu += 25 * rng.standard_normal(SHAPE, dtype=np.float32)
    nib.save(nib.Nifti1Image(np.clip(hu, -1024, 3071).astype(np.int16), affine), folder / "ct.nii.gz")
    nib.save(nib.Nifti1Image(lung.astype(np.uint8), affine), folder / "lung.nii.gz")
    rows = [f"ct{i},ct.nii.gz,lung.nii.gz" for i in range(scans)]
    cohort = folder / f"cohort{scans}.csv"
    cohort.write_text("\n".join(["patient_id,image,lung_mask", *rows]) + "\n")
    return cohort


def inference(cohort: Path, output_dir: Path, ahead: int, threads: int) -> ConfigParser:
    """The shipped inference, ready to run, with everything built."""
    begin()
    torch.set_num_threads(threads)
    parser = ConfigParser()
    parser.read_config("configs/inference.json")
    parser.update({"cohort": str(cohort), "output_dir": str(output_dir), "dataset#ahead": ahead})
    parser.get_parsed_content("evaluator")
    return parser


def resident(field: str) -> float | None:
    """Resident memory of this process in GiB, now (``VmRSS``) or at its peak (``VmHWM``); None where /proc isn't.

    `getrusage` won't do: its peak starts at that of the parent process.
    """
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(lines[field].split()[0]) / 2**20


@contextmanager
def timed(owner: Any, name: str, spent: dict[str, list[float]], stage: str) -> Iterator[None]:
    """Add wall and CPU seconds of every call of `owner.name` to a stage."""
    original: Callable = getattr(owner, name)

    def call(*args, **kwargs):
        start = time.perf_counter(), time.process_time()
        try:
            return original(*args, **kwargs)
        finally:
            spent[stage][0] += time.perf_counter() - start[0]
            spent[stage][1] += time.process_time() - start[1]

    setattr(owner, name, call)
    try:
        yield
    finally:
        setattr(owner, name, original)


def one_ct(cohort: Path, output_dir: Path, threads: int) -> dict:
    """Wall and CPU seconds of each stage of one CT, of all of it, and the peak memory."""
    parser = inference(cohort, output_dir, 0, threads)
    parts = [*parser.get_parsed_content("preprocessing").transforms, parser.get_parsed_content("inferer")]
    parts += parser.get_parsed_content("postprocessing").transforms
    spent = {stage: [0.0, 0.0] for stage in STAGES.values()}
    evaluator, start = parser.get_parsed_content("evaluator"), time.perf_counter()
    with ExitStack() as stack:
        for part in parts:
            stack.enter_context(timed(type(part), "__call__", spent, STAGES[type(part).__name__]))
        stack.enter_context(timed(prediction_writer, "write_heat", spent, STAGES["write_heat"]))
        stack.enter_context(timed(prediction_writer, "heat_figure", spent, STAGES["add"]))
        stack.enter_context(timed(prediction_writer, "write_png", spent, STAGES["add"]))
        stack.enter_context(timed(prediction_writer, "patient_section", spent, STAGES["add"]))
        evaluator.run()
    seconds = time.perf_counter() - start
    stages = [{"stage": name, "seconds": wall, "cpu_seconds": cpu} for name, (wall, cpu) in spent.items()]
    return {"seconds": seconds, "peak_gib": resident("VmHWM"), "stages": stages}


def many_cts(cohort: Path, output_dir: Path, ahead: int, threads: int) -> dict:
    """Seconds of a cohort's inference, and the peak memory."""
    evaluator, start = inference(cohort, output_dir, ahead, threads).get_parsed_content("evaluator"), time.perf_counter()
    evaluator.run()
    return {"seconds": time.perf_counter() - start, "peak_gib": resident("VmHWM")}


def by_processes(cohort: Path, output_dir: Path, jobs: int) -> dict:
    """The same by `--engine processes`; the memory of all of them, of which they share a part."""
    parser = inference(cohort, output_dir, 0, 1)
    names = ("dataset", "network", "inferer", "postprocessing", "writer")
    parts, start = [parser.get_parsed_content(name) for name in names], time.perf_counter()
    run_parallel("processes", *parts, jobs)
    seconds, here = time.perf_counter() - start, resident("VmHWM")
    child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    return {"seconds": seconds, "peak_gib": None if here is None else here + jobs * child}


def measure_ct(apart: Callable, scans: int, threads: int) -> dict:
    """All of this file's measurements, each `apart`: called with a function and its arguments, in its own process."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        one = apart(one_ct, write_ct(folder, 1), folder / "one", threads)
        cohort = write_ct(folder, scans)
        runs = {
            "one by one, 1 thread": apart(many_cts, cohort, folder / "one_thread", 0, 1),
            f"one by one, {threads} threads": apart(many_cts, cohort, folder / "serial", 0, threads),
            f"reading ahead, {threads} threads (as shipped)": apart(many_cts, cohort, folder / "ahead", 1, threads),
            f"--engine processes --jobs {threads}": apart(by_processes, cohort, folder / "processes", threads),
        }
        # Bit for bit where as many threads compute; sums of more threads are rounded otherwise.
        same = all(
            (folder / one_by_one / name).read_bytes() == (folder / other / name).read_bytes()
            for one_by_one, other in (("serial", "ahead"), ("one_thread", "processes"))
            for name in ("predictions.csv", "maps/ct0_heat.nii.gz")
        )
    cohort_rows = [{"how": how, **run} for how, run in runs.items()]
    return {"one": one, "scans": scans, "cohort": cohort_rows, "same": same}


def aims(result: dict) -> list[dict]:
    """What was aimed at, and whether it was met."""
    one, (*serial, ahead, processes) = result["one"], result["cohort"]
    rows = [
        {"aim": "CT of 512 x 512 x 300 from file to map below 20 s", "measured": one["seconds"], "met": one["seconds"] < 20},
    ]
    for run in serial:
        speedup = run["seconds"] / processes["seconds"]
        aim = f"{processes['how']} at least 1.6 x as fast as {run['how']}"
        rows.append({"aim": aim, "measured": speedup, "met": speedup >= 1.6})
    peaks = [run["peak_gib"] for run in (one, ahead) if run["peak_gib"] is not None]
    if peaks:
        rows.append({"aim": "a CT, and a cohort reading ahead, below 3 GiB of memory in all", "measured": max(peaks), "met": max(peaks) < 3})
    return rows


def sections(result: dict, table: Callable[[list[str], list[list[str]]], str]) -> list[str]:
    """Their part of docs/performance.md."""
    one = result["one"]
    stages = [[s["stage"], f"{s['seconds']:.2f} s", f"{s['cpu_seconds']:.2f} s"] for s in one["stages"]]
    other = one["seconds"] - sum(s["seconds"] for s in one["stages"])
    total = [["everything else", f"{other:.2f} s", ""], ["all", f"{one['seconds']:.2f} s", ""]]

    def memory(gib: float | None) -> str:
        return "not measured" if gib is None else f"{gib:.2f} GiB"

    serial = result["cohort"][0]["seconds"]
    runs = [
        [r["how"], f"{r['seconds']:.1f} s", f"{serial / r['seconds']:.2f} x", memory(r["peak_gib"])]
        for r in result["cohort"]
    ]
    same = "the same" if result["same"] else "NOT the same"
    return [
        "## A whole CT, from file to saved map",
        f"512 x 512 x 300 voxels of 0.7 x 0.7 x 1 mm, int16 `.nii.gz`, noisy, its lung mask given, `models/model.pt` and "
        f"`configs/inference.json` as shipped; {memory(one['peak_gib'])} at the peak, imports included.",
        table(["stage", "time", "of a CPU"], [*stages, *total]),
        "The bottlenecks were, in this order: the heat map's way back to the scan's grid (a general resampling of 79 "
        "million voxels, now a small matrix an axis), gzip (now ISA-L's, for checking the stream as well), and turning arrays "
        "round in memory (now plane by plane and block by block; voxels stay 16 bits until they are resampled). What is "
        "left is the network and reading.",
        f"## A cohort of {result['scans']} such CTs",
        f"As shipped a thread reads and preprocesses the next scan meanwhile; predictions and maps are {same}, bit for "
        "bit, as one by one with as many threads a scan. Threads share Python's lock and the kernel's memory map, processes do not.",
        table(["", "time", "speed", "peak memory"], runs),
    ]
