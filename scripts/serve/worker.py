# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""The process of one job: what `configs/inference.json` does on the command line, confined, and silent.

It is forked from a process that has imported everything and has never seen a scan (`multiprocessing`'s fork server). So it
starts at once, and a file that crashes or fills it costs only its own job. What is heavy is imported within functions:
the server itself imports this module, and does without.
"""

import json
import multiprocessing
import os
import re
import resource
import tempfile
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

PRELOADED = ["monai.bundle", "bundle.run", "bundle.transforms", "bundle.maps", "bundle.explain.volumes"]

_CONFIG = Path(__file__).parents[2] / "configs" / "inference.json"
_NO_ROOM = re.compile("MemoryError|bad_alloc|allocat|out of memory", re.IGNORECASE)


def about(pipe: Connection, folder: Path, ckpt: str, memory: int) -> None:
    """Tell what the weights are, and by what policy the pages of reports are bound."""

    def look() -> dict[str, Any]:
        from bundle.metrics.verdict import in_words
        from bundle.report.viewer import policy
        from bundle.run import TrainedModel

        settings = TrainedModel(ckpt).settings
        verdict = in_words(settings["learnt"]) if settings.get("learnt") else "its training left no verdict"
        known = {"weights_sha256": settings.get("weights_sha256"), "horizon_months": settings["horizon"]}
        return {"done": known | {"verdict": verdict, "report_policy": policy("viewer.js", viewer=True)}}

    _work(pipe, folder, memory, look)


def predict(pipe: Connection, folder: Path, ckpt: str, memory: int, image: Path, output_dir: Path) -> None:
    """Predict a scan, and tell how far it is and what came of it.

    Args:
        pipe: to the server, for JSON: ``state`` where the work has come to, and last ``done``, the prediction, or
            ``failed``, a sentence.
        folder: for temporary files; the server deletes it.
        ckpt: weights.
        memory: bytes that the process may take.
        image: file or DICOM folder, whose name the outputs get.
        output_dir: folder to write.
    """

    def infer() -> dict[str, Any]:
        import torch
        from ignite.engine import Events
        from monai.bundle import create_workflow

        from bundle.survival.readout import survival_curve

        job = create_workflow(config_file=str(_CONFIG), image=str(image), ckpt=ckpt, output_dir=str(output_dir))
        part = job.parser.get_parsed_content
        part("evaluator").add_event_handler(Events.ITERATION_STARTED, lambda engine: _tell(pipe, state="predicting"))
        try:
            job.run()
        except Exception:
            if faults := part("dataset").faults:
                return _failed(faults[0][1])
            raise
        found = part("writer").done.read(part("dataset").data[0]["patient_id"])
        row = {key: value for key, value in found["row"].items() if key not in ("patient_id", "status")}
        curve = survival_curve(torch.tensor(found["pmf"])).tolist()
        return {"done": row | {"death_by_horizon": found["risk"], "survival_curve": curve}}

    _tell(pipe, state="reading")
    _work(pipe, folder, memory, infer)


def _work(pipe: Connection, folder: Path, memory: int, call: Callable[[], dict[str, Any]]) -> None:
    """Call with limits on the process, and tell what is returned, or one sentence on what was raised."""
    from tqdm import tqdm

    from bundle.errors import input_error_of

    _confine(folder, memory)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a process that is killed leaves behind
    try:
        outcome = call()
    except Exception as error:
        fault = input_error_of(error)
        outcome = _failed(str(fault)) if fault else _failed(f"{type(error).__name__}: {error}", foreseen=False)
    if _NO_ROOM.search(outcome.get("failed", "")):
        outcome = _failed(f"it needs more memory than the {memory / 2**30:g} GiB of a job (expected a smaller scan)")
    elif not outcome.get("foreseen", True):
        outcome["failed"] = f"{outcome['failed'].partition(':')[0]} that nobody foresaw"  # what it says may name a patient
    elif "failed" in outcome:
        outcome["failed"] = " ".join(outcome["failed"].replace(f"{folder}{os.sep}", "").split())
    _tell(pipe, **outcome)


def _failed(sentence: str, foreseen: bool = True) -> dict[str, Any]:
    return {"failed": sentence, "foreseen": foreseen}


def _tell(pipe: Connection, **what: Any) -> None:
    pipe.send_bytes(json.dumps(what).encode())  # JSON: what a stranger's file may have taken over sends no pickles


def _confine(folder: Path, memory: int) -> None:
    """Bound the memory; leave no core dump, no line on the terminal, and no temporary file but in `folder`."""
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))  # not RLIMIT_AS: CUDA reserves addresses beyond any limit
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.umask(0o077)
    tempfile.tempdir = os.environ["TMPDIR"] = str(folder)
    with open(os.devnull, "r+b") as nothing:  # DICOM headers are in the log of an inference
        for descriptor in (0, 1, 2):
            os.dup2(nothing.fileno(), descriptor)
    threading.Thread(target=_end_with_the_server, daemon=True).start()


def _end_with_the_server() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
