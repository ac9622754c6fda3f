# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""A cohort's inference shared out over the workers of Ray Data, on one machine or many (`--engine ray`)."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import torch
from ignite.engine import Events
from monai.data import DataLoader
from monai.engines import SupervisedEvaluator
from monai.inferers import Inferer
from tqdm import tqdm

from bundle.data.datasets import ScanStream
from bundle.errors import InputError
from bundle.handlers import PredictionWriter
from bundle.workflow import prepare_batch

__all__ = ["ScanWorker", "is_ray", "run_on_ray"]

logger = logging.getLogger(__name__)


def is_ray(engine: str) -> bool:
    """Whether to run on Ray rather than in this process (``local``).

    Raises:
        InputError: neither, or Ray isn't installed.
    """
    if engine not in ("local", "ray"):
        raise InputError(f"--engine is {engine} (expected local or ray).")
    if engine == "ray":
        try:
            import ray.data  # noqa: F401
        except ImportError as e:
            raise InputError("--engine ray needs Ray: pip install -r requirements-ray.txt.") from e
    return engine == "ray"


class ScanWorker:
    """What a worker of Ray does with a scan: all that the evaluator of `configs/inference.json` does.

    Args:
        parts: `stream`, `network`, `inferer`, `postprocessing` and `writer` of the config; the writer's `stream` is
            that stream.
    """

    def __init__(self, parts: dict) -> None:
        torch.set_flush_denormal(True)
        self.parts = parts
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def __call__(self, item: dict) -> dict:
        """Predict the scan at place `index` of the stream and write its map and its record; `fault` says what failed."""
        stream, writer = self.parts["stream"], self.parts["writer"]
        record = stream.data[item["index"]]
        scan = stream.prepare(record)
        fault = ""
        if scan is None:
            fault = stream.faults.pop()[1]
        else:
            evaluator = SupervisedEvaluator(
                device=self.device,
                val_data_loader=DataLoader([scan], batch_size=1),
                network=self.parts["network"].to(self.device),
                prepare_batch=prepare_batch,
                inferer=self.parts["inferer"],
                postprocessing=self.parts["postprocessing"],
            )
            evaluator.add_event_handler(Events.ITERATION_COMPLETED, writer.add)
            evaluator.run()
        return {"index": item["index"], "fault": fault}


def run_on_ray(
    stream: ScanStream,
    network: torch.nn.Module,
    inferer: Inferer,
    postprocessing: object,
    writer: PredictionWriter,
) -> None:
    """Predict the scans of a stream on Ray's workers, and write what the local run writes.

    It joins the cluster that ``RAY_ADDRESS`` names, else starts Ray here, with a worker a core (a GPU where there are
    some). Scans, outputs and this repository have to be at the same paths on all machines. A scan whose worker was
    killed goes to another one; its files are written under another name and renamed, so that nothing is left of the
    first attempt. Scans that are done already, by either engine, are passed over.

    Args:
        stream, network, inferer, postprocessing, writer: as in `configs/inference.json`.

    Raises:
        InputError: the network is an ensemble's.
    """
    if not isinstance(network, torch.nn.Module):
        raise InputError("--engine ray predicts by one model; leave it out for an ensemble.")
    import ray

    writer.start(None)
    todo = [i for i, record in enumerate(stream.data) if record["patient_id"] not in stream.done]
    if not todo:
        writer.finish(None)
        return
    paths = ":".join([str(Path(__file__).resolve().parents[1]), *filter(None, sys.path)])
    started_here = not ray.is_initialized()
    if started_here:
        ray.init(runtime_env={"env_vars": {"PYTHONPATH": paths}}, log_to_driver=False, logging_level=logging.ERROR)
    try:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0))
        most = min(len(todo), gpus or int(resources["CPU"]))
        parts = dict(stream=stream, inferer=inferer, postprocessing=postprocessing, writer=writer)
        parts["network"] = network.cpu()
        # A block is a scan: what is lost with a worker is the one it was at.
        places = ray.data.from_items([{"index": i} for i in todo], override_num_blocks=len(todo))
        done = places.map(
            ScanWorker, fn_constructor_args=(parts,), concurrency=(1, most), num_cpus=1, num_gpus=1 if gpus else None
        )
        faults: dict[int, str] = {}
        with tqdm(desc="inference", total=len(todo), unit="scan") as bar:
            for item in done.iter_rows():
                faults[item["index"]] = item["fault"]
                bar.update()
    finally:
        if started_here:
            ray.shutdown()
    stream.faults += [(stream.data[i]["patient_id"], faults[i]) for i in todo if faults[i]]
    writer.finish(None)
