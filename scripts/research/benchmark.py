# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Time and memory on CPUs: a CT from its file to its map, a cohort of CTs, training steps beside MONAI's ViT.

Times are medians, each measured in a process of its own. Let nothing else run beside it.
"""

import argparse
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import torch
import torch.nn as nn
from monai.bundle import ConfigParser
from monai.networks.nets import ViT
from torch import Tensor

from bundle.files import write_text
from bundle.networks import SurvivalMapNet
from bundle.run import predict, results
from bundle.run.start import begin, keep_memory
from bundle.survival import CenTime, SurvivalMapLoss
from scripts.jobs import markdown

LUNG = 0.35  # of a chest CT cropped to the lungs that is lung
WIDE = {"patch_size": 8, "dim": 128, "depth": 4}
NETWORKS: dict[str, Callable[[int], nn.Module]] = {  # of images of so many voxels a side
    "as shipped": lambda size: SurvivalMapNet(patch_size=4, dim=64, depth=2, window=2),
    "wide, windows of 2": lambda size: SurvivalMapNet(**WIDE, window=2),
    "wide, global attention": lambda size: SurvivalMapNet(**WIDE, window=0),
    "MONAI's ViT": lambda size: StockViT(**WIDE, size=size),
}
CT, SPACING = (512, 512, 300), (0.7, 0.7, 1.0)  # voxels, mm
STAGES = {  # what belongs together, by the names of transforms and functions
    "read and check the CT and its lung mask": ["LoadCTd"],
    "orient": ["Orientationd"],
    "resample to 3 mm": ["Spacingd"],
    "quality gate": ["QualityGated"],
    "lung mask, HU window, crop": ["LungMaskd", "ScaleIntensityRanged", "CropForegroundd", "SelectItemsd"],
    "network at 64 origins, refinement": ["GridShiftInferer"],
    "heat, on the scan's grid": ["MapToHeatd", "HeatToScand"],
    "write the heat map": ["write_heat"],
    "picture and report": ["heat_figure", "write_png", "write_scan_report"],
}
HEAD = """\
# Performance

On {cores} {machine} cores ({instructions}), {threads} thread(s), Python {python}, torch {torch}.
Made by `python -m scripts.research.benchmark --threads {threads}{quick}`. Times are medians. *Wide* networks have patches
of 8, dim 128, 4 blocks, 8 heads and an MLP of 256, as MONAI's ViT has here, which attends over all patches.
"""


class StockViT(nn.Module):
    """MONAI's ViT with a linear head: a token for every patch, lung or not. Same output as :class:`SurvivalMapNet`."""

    def __init__(self, patch_size: int, dim: int, depth: int, size: int) -> None:
        super().__init__()
        self.vit = ViT(1, size, patch_size, hidden_size=dim, mlp_dim=2 * dim, num_layers=depth, num_heads=dim // 16)
        self.head = nn.Linear(dim, 1)

    def forward(self, image: Tensor, lung: Tensor | None = None) -> Tensor:
        location = 60 + 30 * self.head(self.vit(image)[0])[..., 0]
        side = round(location.shape[1] ** (1 / 3))
        return torch.stack([location, (-location / 15).softmax(1)], 1).unflatten(2, (side, side, side))


def lung_of(image: Tensor, share: float) -> Tensor | None:
    """A mask of the first slices, `share` of the image; None for all of it."""
    lung = torch.zeros_like(image)
    lung[:, :, : round(share * image.shape[2])] = 1
    return lung if share < 1 else None


def training_step(name: str, size: int, batch: int, share: float, bfloat16: bool = False) -> Callable[[], None]:
    """One optimisation step on random scans of `size` voxels a side, as a function to time."""
    torch.manual_seed(0)
    network, loss = NETWORKS[name](size), SurvivalMapLoss(CenTime())
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    image = torch.rand(batch, 1, size, size, size)
    lung = lung_of(image, share)
    outcome = torch.tensor([[12.0, 1.0], [30.0, 0.0]]).repeat(-(-batch // 2), 1)[:batch]

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            survival_map = network(image, lung)
        loss(survival_map.float(), outcome).backward()
        optimizer.step()

    return step


def seconds(steps: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median time of each step; they take turns, after one round that doesn't count."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t[1:]) for name, t in times.items()}


def prepare(threads: int, keep: bool = True) -> None:
    """Threads, denormals and, unless told otherwise, memory as in a run."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    if keep:
        keep_memory()


def apart(function: Callable, *args) -> Any:
    """Call a function in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def resident(field: str) -> float:
    """Resident memory of this process in GiB, now (``VmRSS``) or at its peak (``VmHWM``); NaN where /proc isn't.

    `getrusage` won't do: its peak starts at that of the parent process.
    """
    status = Path("/proc/self/status")
    if not status.is_file():
        return float("nan")
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(lines[field].split()[0]) / 2**20


def step_times(share: float, keep: bool, repeats: int, threads: int) -> dict[str, float]:
    """Seconds of a step on 4 scans of 64 voxels a side, by network."""
    prepare(threads, keep)
    steps = {name: training_step(name, 64, 4, share) for name in NETWORKS}
    steps["as shipped, bfloat16"] = training_step("as shipped", 64, 4, share, bfloat16=True)
    return seconds(steps, repeats)


def train_steps(repeats: int, threads: int) -> pd.DataFrame:
    """Training steps of all networks, with all of the image lung and with a part of it."""
    rows = []
    for share in (1.0, LUNG):
        plain, kept = (apart(step_times, share, keep, repeats, threads) for keep in (False, True))
        for name in plain:
            row = {"network": name, "lung": f"{share:.0%}"}
            for title, times in (("time", plain), ("with memory kept", kept)):
                faster = times["MONAI's ViT"] / times[name]
                row |= {title: f"{1000 * times[name]:.0f} ms", f"{title}: faster than the ViT": f"{faster:.1f} x"}
            rows.append(row)
    return pd.DataFrame(rows)


def times_by_size(name: str, sizes: list[int], repeats: int, threads: int) -> list[float]:
    prepare(threads)
    return [seconds({name: training_step(name, size, 1, LUNG)}, repeats)[name] for size in sizes]


def scaling(sizes: list[int], repeats: int, threads: int) -> pd.DataFrame:
    """Train step of one scan, by its size; time = a * voxels ** exponent between the two largest sizes."""
    rows = []
    # Global attention at 256 voxels a side would need tens of GB for one layer's scores.
    for name, largest in (("wide, windows of 2", 512), ("wide, global attention", 128)):
        mine = [size for size in sizes if size <= largest]
        times = apart(times_by_size, name, mine, repeats, threads)
        slope = float(np.log(times[-1] / times[-2]) / np.log(mine[-1] / mine[-2]) / 3)
        cells = {f"{size}³": f"{1000 * t:.0f} ms" for size, t in zip(mine, times, strict=True)}
        rows.append({"network": name, **cells, "exponent": f"{slope:.2f}"})
    return pd.DataFrame(rows, columns=["network", *(f"{size}³" for size in sizes), "exponent"]).fillna("–")


def write_ct(folder: Path, scans: int) -> Path:
    """A cohort CSV of a CT of a body with two lungs, a lesion and noise, its lung mask given, listed `scans` times."""
    rng, affine = np.random.default_rng(0), np.diag([-SPACING[0], -SPACING[1], SPACING[2], 1.0])
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in CT), indexing="ij", sparse=True)
    lung = ((abs(x) - 0.42) / 0.33) ** 2 + (y / 0.55) ** 2 + (z / 0.9) ** 2 < 1
    hu = np.where((x / 0.95) ** 2 + (y / 0.75) ** 2 + 0 * z < 1, np.float32(40), np.float32(-1000))
    hu[lung] = -850
    hu[(x - 0.4) ** 2 + (y - 0.1) ** 2 + (0.8 * z) ** 2 < 0.012] = 30
    hu += 25 * rng.standard_normal(CT, dtype=np.float32)
    nib.save(nib.Nifti1Image(np.clip(hu, -1024, 3071).astype(np.int16), affine), folder / "ct.nii.gz")
    nib.save(nib.Nifti1Image(lung.astype(np.uint8), affine), folder / "lung.nii.gz")
    cohort = folder / f"cohort{scans}.csv"
    rows = [{"patient_id": f"ct{i}", "image": "ct.nii.gz", "lung_mask": "lung.nii.gz"} for i in range(scans)]
    pd.DataFrame(rows).to_csv(cohort, index=False)
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


@contextmanager
def timed(owner: Any, name: str, spent: dict[str, float], stage: str) -> Iterator[None]:
    """Add the seconds of every call of `owner.name` to a stage."""
    original: Callable = getattr(owner, name)

    def call(*args, **kwargs):
        start = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            spent[stage] += time.perf_counter() - start

    setattr(owner, name, call)
    try:
        yield
    finally:
        setattr(owner, name, original)


def one_ct(cohort: Path, output_dir: Path, threads: int) -> pd.DataFrame:
    """Seconds of each stage of one CT, and the peak memory."""
    parser = inference(cohort, output_dir, 0, threads)
    parts = [*parser.get_parsed_content("preprocessing").transforms, parser.get_parsed_content("inferer")]
    parts += parser.get_parsed_content("postprocessing").transforms
    owners = {type(part).__name__: (type(part), "__call__") for part in parts}
    spent = dict.fromkeys(STAGES, 0.0)
    with ExitStack() as stack:
        for stage, names in STAGES.items():
            for name in names:
                stack.enter_context(timed(*owners.get(name, (results, name)), spent, stage))
        start = time.perf_counter()
        parser.get_parsed_content("evaluator").run()
        taken = time.perf_counter() - start
    rows = {**spent, "everything else": taken - sum(spent.values()), "all": taken}
    table = pd.DataFrame({"stage": rows.keys(), "time": [f"{value:.2f} s" for value in rows.values()]})
    table.loc[len(table)] = ["peak memory", f"{resident('VmHWM'):.2f} GiB"]
    return table


def many_cts(cohort: Path, output_dir: Path, ahead: int, threads: int, jobs: int = 0) -> tuple[float, float]:
    """Seconds of a cohort's inference, and the peak memory of its processes, of which they share a part."""
    parser, start = inference(cohort, output_dir, ahead, threads), time.perf_counter()
    evaluator, writer = (parser.get_parsed_content(name) for name in ("evaluator", "writer"))
    predict("processes" if jobs else "local", evaluator, writer, jobs)
    child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    return time.perf_counter() - start, resident("VmHWM") + jobs * child


def whole_cts(scans: int, threads: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Stages of one CT, and several of them: one by one, reading ahead, and a process a core."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stages = apart(one_ct, write_ct(folder, 1), folder / "one", threads)
        cohort = write_ct(folder, scans)
        runs = {
            "one by one, 1 thread": apart(many_cts, cohort, folder / "one_thread", 0, 1),
            f"one by one, {threads} thread(s)": apart(many_cts, cohort, folder / "serial", 0, threads),
            f"reading ahead, {threads} thread(s), as shipped": apart(many_cts, cohort, folder / "ahead", 1, threads),
            f"--engine processes --jobs {threads}": apart(many_cts, cohort, folder / "processes", 0, 1, threads),
        }
        # Bit for bit where as many threads compute; sums of more threads are rounded otherwise.
        for one, other in (("serial", "ahead"), ("one_thread", "processes")):
            for file in ("predictions.csv", "maps/ct0_heat.nii.gz"):
                if (folder / one / file).read_bytes() != (folder / other / file).read_bytes():
                    raise RuntimeError(f"{file} of {other} is not that of {one}.")
    first = next(iter(runs.values()))[0]
    rows = [
        {"how": how, "time": f"{t:.1f} s", "speed": f"{first / t:.2f} x", "peak memory": f"{gib:.2f} GiB"}
        for how, (t, gib) in runs.items()
    ]
    return stages, pd.DataFrame(rows)


def measured(quick: bool, threads: int) -> str:
    """The page."""
    few, repeats, scans = (1, 3, 2) if quick else (5, 15, 6)
    stages, cohort = whole_cts(scans, threads)
    sizes = [32, 64, 128] if quick else [32, 64, 128, 256, 512]
    sections = {
        "A CT of 512 x 512 x 300 voxels of 0.7 x 0.7 x 1 mm, its lung mask given, from file to saved map": stages,
        f"A cohort of {scans} such CTs; predictions and maps are the same, bit for bit": cohort,
        "Training step on 4 scans of 64³, also with freed memory kept, as in training": train_steps(repeats, threads),
        f"Training step of one scan with {LUNG:.0%} lung by voxels a side": scaling(sizes, few, threads),
    }
    page = HEAD.format(
        cores=os.cpu_count(),
        machine=platform.machine(),
        instructions=torch.backends.cpu.get_cpu_capability(),
        threads=threads,
        python=platform.python_version(),
        torch=torch.__version__,
        quick=" --quick" if quick else "",
    )
    return page + "".join(f"\n## {title}\n\n{markdown(table)}" for title, table in sections.items())


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(prog="python -m scripts.research.benchmark", description=__doc__)
    p.add_argument("--quick", action="store_true", help="fewer repeats and scans, up to 128 voxels a side: about 2 minutes")
    p.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads (default: %(default)s)")
    p.add_argument("--page", type=Path, default=Path("docs/results/performance.md"), help="to write (default %(default)s)")
    args = p.parse_args(argv)
    if args.threads < 1:
        sys.exit(f"error: --threads must be at least 1, got {args.threads}.")
    if not os.access(args.page.parent, os.W_OK):
        sys.exit(f"error: {args.page.parent} is not a folder one can write to; choose another --page.")
    write_text(args.page, measured(args.quick, args.threads))
    print(args.page.read_text())


if __name__ == "__main__":
    main()
