# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""A cohort's inference, several scans at a time: by processes of this machine or by the workers of Ray Data."""

import ctypes
import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch
from ignite.engine import Events
from monai.data import DataLoader
from monai.engines import Evaluator
from monai.inferers import Inferer
from tqdm import tqdm

from bundle.data.stream import ScanStream
from bundle.errors import InputError
from bundle.run.engine import ScanEvaluator, prepare_batch
from bundle.run.results import PredictionWriter

logger = logging.getLogger(__name__)


class ScanWorker:
    """Predicts one scan, as the evaluator of `configs/inference.json` does.

    Args:
        parts: `stream`, `network`, `inferer`, `postprocessing` and `writer` of the config; the writer's `stream` is
            that stream.
        device: to compute on; by default a GPU where there is one.
    """

    def __init__(self, parts: dict, device: str | None = None) -> None:
        torch.set_flush_denormal(True)
        self.parts = parts
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def __call__(self, item: dict) -> dict:
        """Predict the scan at place `index` of the stream and write its map and its record; `fault` says what failed."""
        stream, writer = self.parts["stream"], self.parts["writer"]
        scan, fault = stream.prepare(stream.data[item["index"]])
        if scan is not None:
            evaluator = ScanEvaluator(
                stream,
                device=self.device,
                val_data_loader=DataLoader([scan], batch_size=1),
                network=self.parts["network"].to(self.device),
                prepare_batch=prepare_batch,
                inferer=self.parts["inferer"],
                postprocessing=self.parts["postprocessing"],
            )
            evaluator.add_event_handler(Events.ITERATION_COMPLETED, writer.add)
            evaluator.run()
            fault = stream.faults.pop()[1] if stream.faults else ""
        return {"index": item["index"], "fault": fault}


def predict(engine: str, evaluator: Evaluator, writer: PredictionWriter, jobs: int) -> None:
    """Predict the scans of an evaluator's stream.

    Args:
        engine: ``local``, one scan after the other; ``processes`` or ``ray``, several at a time.
        evaluator: which has `writer` among its handlers.
        writer: of the results.
        jobs: scans at a time, for ``processes``.

    Raises:
        InputError: several at a time by an ensemble.
    """
    if engine == "local":
        evaluator.run()
    else:
        network = getattr(evaluator, "network", None)  # an ensemble has several, which are refused
        run_parallel(engine, evaluator.stream, network, evaluator.inferer, evaluator.postprocessing, writer, jobs)


def run_parallel(
    engine: str,
    stream: ScanStream,
    network: torch.nn.Module,
    inferer: Inferer,
    postprocessing: object,
    writer: PredictionWriter,
    jobs: int,
) -> None:
    """Predict the scans of a stream, several at a time, and write what the local run writes.

    A scan's files are written under another name and renamed, and a scan that is done already, by whatever engine, is
    passed over. So a worker that is killed leaves nothing behind, and nothing is done twice.

    Args:
        engine: ``processes``, `jobs` of them with a thread each, on CPU: two CTs on two cores take little longer than one.
            ``ray``: workers of the cluster that ``RAY_ADDRESS`` names, else of a Ray started here, with a core each (a
            GPU where there are some). Scans, outputs and this repository have to be at the same paths on all machines.
        stream, network, inferer, postprocessing, writer: as in `configs/inference.json`.
        jobs: scans at a time for ``processes``.

    Raises:
        InputError: another engine, Ray isn't installed, processes for a model on a GPU, or the network is an ensemble's.
    """
    _check(engine, network)
    writer.start(None)
    todo = [i for i, record in enumerate(stream.data) if record["patient_id"] not in stream.done]
    parts = {"stream": stream, "network": network.cpu(), "inferer": inferer, "postprocessing": postprocessing}
    faults: dict[int, str] = {}
    if todo:
        with tqdm(desc="inference", total=len(todo), unit="scan") as bar:
            for item in ENGINES[engine]({**parts, "writer": writer}, todo, jobs):
                faults[item["index"]] = item["fault"]
                bar.update()
    stream.faults += [(stream.data[i]["patient_id"], faults[i]) for i in todo if faults[i]]
    writer.finish(None)


def _check(engine: str, network: torch.nn.Module) -> None:
    if engine not in ENGINES:
        raise InputError(f"--engine is {engine} (expected local, {' or '.join(ENGINES)}).")
    if not isinstance(network, torch.nn.Module):
        raise InputError(f"--engine {engine} predicts by one model; leave it out for an ensemble.")
    if engine == "processes" and next(network.parameters()).is_cuda:
        raise InputError("--engine processes computes on CPU (expected --device cpu as well, or no --engine).")
    if engine == "ray":
        try:
            import ray.data  # noqa: F401
        except ImportError as e:
            raise InputError("--engine ray needs Ray: pip install -r requirements-ray.txt.") from e


_worker: ScanWorker  # of a process of `--engine processes`


def _start(parts: dict, run: int) -> None:
    """Begin a process, which is forked, so that it has the parts without a copy."""
    global _worker
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, else it outlives a run that is killed
        if os.getppid() != run:  # killed just before
            os._exit(1)
    torch.set_num_threads(1)  # the scans share the cores; and libgomp hangs in a fork that asks for more
    _worker = ScanWorker(parts, "cpu")


def _predict(item: dict) -> dict:
    return _worker(item)


def _by_processes(parts: dict, todo: list[int], jobs: int) -> Iterator[dict]:
    """What :class:`ScanWorker` says of each scan.

    A process that dies, of lack of memory perhaps, is replaced by one that works alone. The scan at which that one dies
    too is a bad one.
    """
    todo, jobs = list(todo), min(jobs, len(todo))
    context = multiprocessing.get_context("fork")
    while todo:
        with ProcessPoolExecutor(jobs, context, _start, (parts, os.getpid())) as pool:
            futures = [pool.submit(_predict, {"index": index}) for index in todo]
            try:
                for future in futures:  # in their order: the first without a result is what the one process died of
                    item = future.result()
                    todo.pop(0)
                    yield item
            except BrokenProcessPool:
                if jobs > 1:
                    logger.warning("a process died (out of memory?); the rest goes on with one at a time.")
                    jobs = 1
                else:
                    patient = parts["stream"].data[todo[0]]["patient_id"]
                    fault = f"patient {patient}: the process died while reading or predicting this scan (out of memory?)."
                    yield {"index": todo.pop(0), "fault": fault}


def _by_ray(parts: dict, todo: list[int], jobs: int) -> Iterator[dict]:
    """The same by Ray Data's workers, a core each; a scan whose worker was killed goes to another one."""
    import ray.data

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
        # A block is a scan: what is lost with a worker is the one it was at.
        places = ray.data.from_items([{"index": i} for i in todo], override_num_blocks=len(todo))
        done = places.map(
            ScanWorker, fn_constructor_args=(parts,), concurrency=(1, most), num_cpus=1, num_gpus=1 if gpus else None
        )
        yield from done.iter_rows()
    finally:
        if started_here:
            ray.shutdown()


ENGINES = {"processes": _by_processes, "ray": _by_ray}
