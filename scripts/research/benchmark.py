# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Time and memory of the network: a training step beside a plain transformer's, a whole CT, and how cost grows."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from monai.inferers import SimpleInferer
from monai.networks.nets import ViT
from torch import Tensor

from bundle.errors import InputError
from bundle.files import write_text
from bundle.maps import GridShiftInferer
from bundle.networks import SurvivalMapNet
from bundle.run.start import keep_memory
from bundle.survival import CenTime, SurvivalMapLoss

from . import benchmark_ct

WHAT = """\
Six questions, each answered by measurements made side by side in one run:

  train step   forward, loss, backward and AdamW. The network with windows and with global attention beside MONAI's ViT
               and a plain PyTorch transformer (nn.TransformerEncoder, padding mask) of the same patch size, width, depth
               and MLP, which attend over all patches; with all of the image lung and with 35 % of it. Steps of the
               rivals alternate, so that a busy machine slows all of them. And one scan of 256 voxels a side.
  format       the same in bfloat16, and in channels_last.
  forward      a whole CT, without gradients, in a process of its own: time, and peak memory over that of the imports;
               once, and from all 64 origins of the patch grid with refinement, as inference does.
  CT           a CT of 512 x 512 x 300 voxels from its file to the saved heat map: time of every stage, peak memory.
  cohort       six of them: one by one, reading ahead, and a process a core.
  scaling      train step of one scan from 32 to 512 voxels a side, fitted to time = a * voxels ** exponent.

Times are medians. Let nothing else run beside it; a loaded machine makes them useless.

examples:
  python -m scripts.research.benchmark
  python -m scripts.research.benchmark --quick --json speed.json
  python -m scripts.research.benchmark --threads 2 --markdown docs/performance.md
"""

SHARE = 0.35  # of a chest CT cropped to the lungs that is lung
SIZE = {"patch_size": 8, "dim": 128, "depth": 4, "num_heads": 8}
SHIPPED = {"patch_size": 4, "dim": 64, "depth": 2, "window": 2}
FULL_CT = (256, 480, 480)
FULL_CT_3MM = (96, 112, 96)


class StockViT(nn.Module):
    """MONAI's ViT with a linear head: a token for every patch, lung or not. Same output as :class:`SurvivalMapNet`.

    Args:
        flash: let PyTorch choose how attention is computed. MONAI's own way, the matrix of all pairs in memory, would take
            34 GB a block at 256 voxels a side.
    """

    def __init__(self, patch_size: int, dim: int, depth: int, num_heads: int, size: int, flash: bool = False) -> None:
        super().__init__()
        self.vit = ViT(1, size, patch_size, hidden_size=dim, mlp_dim=2 * dim, num_layers=depth, num_heads=num_heads)
        for block in self.vit.blocks:
            block.attn.use_flash_attention = flash
        self.head = nn.Linear(dim, 1)

    def forward(self, image: Tensor, lung: Tensor | None = None) -> Tensor:
        location = 60 + 30 * self.head(self.vit(image)[0])[..., 0]
        side = round(location.shape[1] ** (1 / 3))
        return torch.stack([location, (-location / 15).softmax(1)], 1).unflatten(2, (side, side, side))


class PlainTransformer(nn.Module):
    """What one would write first: a token for every patch of the image, all of them in every layer.

    Patches outside the lung are masked as keys and in the softmin. Same output as :class:`SurvivalMapNet`.
    """

    def __init__(self, patch_size: int, dim: int, depth: int, num_heads: int, size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.embed = nn.Conv3d(1, dim, patch_size, patch_size)
        self.position = nn.Parameter(0.02 * torch.randn(1, (size // patch_size) ** 3, dim))
        layer = nn.TransformerEncoderLayer(dim, num_heads, 2 * dim, 0.0, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, 1))

    def forward(self, image: Tensor, lung: Tensor | None = None) -> Tensor:
        x = self.embed(image)
        grid = x.shape[2:]
        outside = None
        if lung is not None:
            outside = nn.functional.avg_pool3d(lung, self.patch_size).flatten(1) < 0.25
        x = self.encoder(x.flatten(2).transpose(1, 2) + self.position, src_key_padding_mask=outside)
        location = 60 + 30 * self.head(x)[..., 0]
        score = -location / 15
        if outside is not None:
            score = score.masked_fill(outside, -math.inf)
        return torch.stack([location, score.softmax(1)], 1).unflatten(2, grid)


def build(name: str, size: int) -> nn.Module:
    """The network called `name`, for images of `size` voxels a side (which only the rivals need to know)."""
    torch.manual_seed(0)
    return {
        "plain": lambda: PlainTransformer(**SIZE, size=size),
        "stock": lambda: StockViT(**SIZE, size=size),
        "stock flash": lambda: StockViT(**SIZE, size=size, flash=True),
        "window 2": lambda: SurvivalMapNet(**SIZE, window=2),
        "global": lambda: SurvivalMapNet(**SIZE, window=0),
        "shipped": lambda: SurvivalMapNet(**SHIPPED),
        "patch 32": lambda: SurvivalMapNet(patch_size=32),
    }[name]()


def two_lungs(shape: tuple[int, ...], share: float, batch: int) -> Tensor | None:
    """Two ellipsoids side by side that fill `share` of the image, (batch, 1, *shape); None for all of it."""
    if share >= 1:
        return None
    z, y, x = [torch.linspace(-1, 1, n) for n in shape]
    radius = (z * z * 0.8)[:, None, None] + (y * y)[:, None] + ((x.abs() - 0.5) / 0.5).square()
    thinned = radius[::4, ::4, ::4].flatten()
    inside = radius <= thinned.kthvalue(max(1, round(share * len(thinned))))[0]
    return inside.float().expand(batch, 1, *shape).contiguous()


def training_step(name: str, size: int, batch: int, share: float, how: str = "float32") -> Callable[[], None]:
    """One optimisation step on random scans of `size` voxels a side, as a function to time.

    Args:
        how: ``float32``, ``bfloat16`` (autocast), or ``channels_last``.
    """
    network = build(name, size)
    loss = SurvivalMapLoss(CenTime())
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    image, lung = torch.rand(batch, 1, size, size, size), two_lungs((size, size, size), share, batch)
    if how == "channels_last":
        network, image = network.to(memory_format=torch.channels_last_3d), image.to(memory_format=torch.channels_last_3d)
    outcome = torch.tensor([[12.0, 1.0], [30.0, 0.0]]).repeat(-(-batch // 2), 1)[:batch]

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "bfloat16"):
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
    torch.set_flush_denormal(True)  # a trained softmin has denormal weights, which would cost time in a CPU
    if keep:
        keep_memory()


def alone(task: str, name: str, shape: tuple[int, ...], batch: int, share: float, repeats: int, threads: int) -> dict:
    """In a fresh process: median time of a forward pass, map or training step, and peak memory over that of the imports."""
    prepare(threads)
    before = benchmark_ct.resident("VmRSS")
    if task == "train":
        step = training_step(name, shape[0], batch, share)
    else:
        network, lung = build(name, max(shape)).eval(), two_lungs(shape, share, batch)
        image = torch.rand(batch, 1, *shape)

        run = GridShiftInferer(4, network.stride, 1.0, refine=True) if task == "map" else SimpleInferer()

        @torch.no_grad()
        def step() -> None:
            run(image, network, lung=lung)

    result = {"seconds": seconds({name: step}, repeats)[name], "peak_gib": None}
    if before is not None:
        result["peak_gib"] = benchmark_ct.resident("VmHWM") - before
    return {"task": task, "network": name, "shape": list(shape), "batch": batch, "lung_share": share, **result}


def apart(function: Callable, *args) -> Any:
    """Call a function in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def exponent(voxels: list[int], times: list[float]) -> float:
    """Slope of log time over log voxels."""
    return float(np.polyfit(np.log(voxels), np.log(times), 1)[0])


def measure_train(keep: bool, repeats: int, quick: bool, threads: int) -> list[dict]:
    """Steps of the network and of its rivals: 4 scans of 64 voxels a side, and 1 of 256.

    Args:
        keep: freed memory, as training does, instead of leaving it to malloc's defaults, as a script of one's own would.
    """
    prepare(threads, keep)
    rows = []

    def add(size: int, batch: int, share: float, times: dict[str, float], stock: str) -> None:
        for name, time_taken in times.items():
            row = {"network": name, "size": size, "batch": batch, "lung_share": share, "memory_kept": keep, "seconds": time_taken}
            rows.append({**row, "stock_over_this": times[stock] / time_taken})

    for share in (1.0, SHARE):
        names = ["window 2", "global", "plain", "stock"]
        add(64, 4, share, seconds({name: training_step(name, 64, 4, share) for name in names}, repeats), "stock")
    if not quick and not keep:  # the stock one takes minutes
        times = seconds({"window 2": training_step("window 2", 256, 1, SHARE)}, 5)
        step, start = training_step("stock flash", 256, 1, SHARE), time.perf_counter()
        step()
        add(256, 1, SHARE, {**times, "stock flash": time.perf_counter() - start}, "stock flash")
    return rows


def measure_precision(repeats: int, threads: int) -> list[dict]:
    """Steps of the shipped network and of the wider one in other number and memory formats."""
    prepare(threads)
    rows = []
    for name in ("shipped", "window 2"):
        hows = ("float32", "bfloat16", "channels_last")
        for how, time_taken in seconds({how: training_step(name, 64, 4, SHARE, how) for how in hows}, repeats).items():
            rows.append({"network": name, "how": how, "seconds": time_taken})
    return rows


def measure_scaling(sizes: list[int], repeats: int, threads: int) -> list[dict]:
    prepare(threads)
    rows = []
    # Full-grid attention at 256 voxels a side would need tens of GB for one layer's scores.
    for name, largest in (("window 2", 512), ("global", 128), ("plain", 64)):
        mine = [size for size in sizes if size <= largest]
        times = [seconds({name: training_step(name, size, 1, SHARE)}, repeats)[name] for size in mine]
        voxels = [size**3 for size in mine]
        row = {"network": name, "sizes": mine, "seconds": times, "exponent": exponent(voxels, times)}
        row["exponent_last_step"] = exponent(voxels[-2:], times[-2:])
        rows.append(row)
    return rows


def measure_all(quick: bool, threads: int) -> dict:
    """Everything, as plain JSON."""
    repeats = 3 if quick else 15
    few = 1 if quick else 5
    alone_cases = [
        ("forward", "patch 32", FULL_CT, 1, 1.0),
        ("forward", "patch 32", FULL_CT, 1, SHARE),
        ("forward", "shipped", FULL_CT_3MM, 1, SHARE),
        ("map", "shipped", FULL_CT_3MM, 1, SHARE),
        ("train", "shipped", (64, 64, 64), 8, 1.0),
        ("train", "shipped", (64, 64, 64), 8, SHARE),
        ("train", "window 2", (64, 64, 64), 4, SHARE),
        ("train", "plain", (64, 64, 64), 4, SHARE),
        ("train", "stock", (64, 64, 64), 4, SHARE),
    ]
    print("measuring whole scans ...", file=sys.stderr)
    whole = [apart(alone, *case, few, threads) for case in alone_cases]
    print("measuring whole CTs from file to map ...", file=sys.stderr)
    ct = benchmark_ct.measure_ct(apart, 2 if quick else 6, threads)
    print("measuring train steps ...", file=sys.stderr)
    train = [row for keep in (False, True) for row in apart(measure_train, keep, repeats, quick, threads)]
    precision = apart(measure_precision, repeats, threads)
    print("measuring scaling ...", file=sys.stderr)
    scaling = apart(measure_scaling, [32, 64, 128] if quick else [32, 64, 128, 256, 512], few, threads)

    mine = [r for r in train if r["network"] == "window 2" and r["lung_share"] == SHARE]
    ratios = {(r["size"], r["memory_kept"]): r["stock_over_this"] for r in mine}
    memory = {False: "malloc's defaults", True: "memory kept"}
    slowest = max(r["seconds"] for r in whole if r["task"] == "forward")
    peaks = [r["peak_gib"] for r in whole if r["task"] == "forward" and r["peak_gib"] is not None]
    slope = scaling[0]["exponent_last_step"]
    aims = [
        *(
            {"aim": f"train step of {n}³, 35 % lung, {memory[keep]}, at least 5 x as fast as MONAI's ViT", "measured": r, "met": r >= 5}
            for (n, keep), r in ratios.items()
        ),
        {"aim": "exponent of the cost in voxels at most 1.1 with windows", "measured": slope, "met": slope <= 1.1},
        {"aim": "forward pass on a whole CT below 3 s", "measured": slowest, "met": slowest < 3},
    ]
    if peaks:
        aims.append({"aim": "and below 2 GiB", "measured": max(peaks), "met": max(peaks) < 2})
    aims += benchmark_ct.aims(ct)
    machine = {
        "processor": platform.machine(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "quick": quick,
    }
    result = {"machine": machine, "train_step": train, "precision": precision, "alone": whole, "ct": ct}
    return {**result, "scaling": scaling, "aims": aims}


def table(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths)) + " |"

    return "\n".join([line(header), "|" + "|".join("-" * (w + 2) for w in widths) + "|", *map(line, rows)])


def markdown(result: dict, command: str) -> str:
    """The tables of docs/performance.md."""
    m = result["machine"]
    labels = {
        "window 2": "survival map, windows of 2",
        "global": "survival map, global attention",
        "plain": "plain PyTorch transformer",
        "stock": "MONAI's ViT",
        "stock flash": "MONAI's ViT, flash attention",
        "shipped": "shipped configuration (patch 4, dim 64, 2 blocks)",
        "patch 32": "survival map, patch 32",
    }
    rows_of_train: dict[tuple, list[str]] = {}
    for r in result["train_step"]:  # those with malloc's defaults, then those with memory kept
        cells = rows_of_train.setdefault((r["batch"], r["size"], r["lung_share"], r["network"]), [])
        cells += [f"{1000 * r['seconds']:.0f} ms", f"{r['stock_over_this']:.1f} x"]
    train = [
        [f"{batch} x {size}³", labels[network], f"{share:.0%}", *cells, *["-"] * (4 - len(cells))]
        for (batch, size, share, network), cells in rows_of_train.items()
    ]
    precision = [[labels[r["network"]], r["how"], f"{1000 * r['seconds']:.0f} ms"] for r in result["precision"]]
    whole = [
        [
            {"forward": "forward pass", "map": "map from 64 origins", "train": "train step"}[r["task"]],
            labels[r["network"]],
            f"{r['batch']} x " + " x ".join(map(str, r["shape"])),
            f"{r['lung_share']:.0%}",
            f"{r['seconds']:.2f} s",
            "not measured" if r["peak_gib"] is None else f"{r['peak_gib']:.2f} GiB",
        ]
        for r in result["alone"]
    ]
    sizes = max((r["sizes"] for r in result["scaling"]), key=len)
    scaling = [
        [labels[r["network"]]]
        + [f"{1000 * s:.0f} ms" for s in r["seconds"]]
        + ["-"] * (len(sizes) - len(r["sizes"]))
        + [f"{r['exponent']:.2f}", f"{r['exponent_last_step']:.2f}"]
        for r in result["scaling"]
    ]
    aims = [[a["aim"], f"{a['measured']:.2f}", "met" if a["met"] else "missed"] for a in result["aims"]]
    parts = [
        "# Performance",
        f"Made by `{command}` on {m['cores']} {m['processor']} cores ({m['vector_instructions']}), {m['threads']} "
        f"threads, Python {m['python']}, torch {m['torch']}. Times are medians.",
        "## Train step",
        f"Patch {SIZE['patch_size']}, dim {SIZE['dim']}, {SIZE['depth']} blocks, {SIZE['num_heads']} heads, MLP of "
        f"{2 * SIZE['dim']}: forward, loss, backward and AdamW (fused). MONAI's ViT and the plain transformer attend over "
        "all patches. At 256³ MONAI's attention would need 34 GB a block for its matrix of all pairs of patches, so there "
        "PyTorch's flash attention is switched on in it; one step, not repeated. *Memory kept*: glibc keeps freed memory for the "
        "next arrays (`bundle.run.keep_memory`), as in training by this bundle; a script of one's own has malloc's defaults.",
        table(["scans", "network", "lung", "time", "faster than MONAI's ViT", "memory kept: time", "faster"], train),
        "Other formats, on 4 scans of 64³, 35% lung. The configurations train in float32 and in torch's usual order; "
        "`channels_last` can do nothing for images of one channel whose patches are gathered.",
        table(["network", "format", "time"], precision),
        "## Time and peak memory",
        "Each in a process of its own; memory is what it takes beyond the imports, input and gradients included.",
        table(["what", "network", "input", "lung", "time", "peak memory"], whole),
        *benchmark_ct.sections(result["ct"], table),
        "## Scaling",
        f"Train step of one scan, patch {SIZE['patch_size']}, {SHARE:.0%} lung, so tokens grow with the voxels; "
        "time = a * voxels ** exponent. Small scans are all overhead, hence the exponent between the two largest. As in "
        "training, freed memory is kept (`bundle.run.keep_memory`); without that the kernel clears every page of every "
        "large array anew, which takes half of the time at 512³.",
        table(["network", *[f"{n}³" for n in sizes], "exponent", "between the two largest"], scaling),
        "## Aims",
        table(["aim", "measured", ""], aims),
    ]
    return "\n\n".join(parts) + "\n"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m scripts.research.benchmark",
        description=__doc__,
        epilog=WHAT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--quick", action="store_true", help="fewer repeats, up to 128 voxels a side: about 2 minutes")
    p.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads (default: %(default)s)")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there as well")
    p.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there as well")
    return p


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    try:
        if args.threads < 1:
            raise InputError(f"--threads must be at least 1, got {args.threads}.")
        for path in (args.json, args.markdown):
            if path is not None and not os.access(path.parent, os.W_OK):
                raise InputError(f"{path.parent} is not a folder one can write to; choose another file.")
        result = measure_all(args.quick, args.threads)
        command = "python -m scripts.research.benchmark" + (" --quick" if args.quick else "") + f" --threads {args.threads}"
        if args.markdown is not None:
            command += f" --markdown {args.markdown.name if args.markdown.is_absolute() else args.markdown}"
        text, numbers = markdown(result, command), json.dumps(result, indent=2) + "\n"
        print(text)
        print(numbers, end="")
        if args.json is not None:
            write_text(args.json, numbers)
        if args.markdown is not None:
            write_text(args.markdown, text)
    except InputError as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
