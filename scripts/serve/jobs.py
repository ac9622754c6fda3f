# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Jobs of the server: one queue, one at a time, each in a process of its own, with limits; nothing outlives its delivery."""

import asyncio
import contextlib
import fcntl
import json
import logging
import multiprocessing
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from fastapi import HTTPException
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from bundle.errors import InputError
from scripts.serve import worker

FOLDER = "survival-map-serve-"  # a server's temporary folder begins so
RUNNING = ("reading", "predicting")
AHEAD = ("uploading", "waiting", *RUNNING)
RESULTS = {  # what is delivered, and where inference leaves it
    "report.html": "reports/{id}.html",
    "heat.nii.gz": "maps/{id}_heat.nii.gz",
    "lung.nii.gz": "maps/{id}_lung.nii.gz",
}
MOST_START = 600  # seconds until a process has imported all
MOST_TOLD = 2**20  # bytes that a job's process may tell at once

logger = logging.getLogger(__name__)


class Limits(NamedTuple):
    """What a server takes on."""

    upload_bytes: int = 2**30
    jobs: int = 20  # that are uploading, waiting or running
    seconds: float = 300  # of a job
    memory: int = 8 * 2**30  # bytes of a job
    expire_seconds: float = 900  # that results wait to be fetched


@dataclass
class Job:
    """One upload and what becomes of it.

    Args:
        id: 16 random hexadecimal digits; all files are named by it, none by the uploader.
        folder: of the upload and of what reading it leaves; deleted when the job ends.
        results: folder that inference writes; deleted when all is delivered.
    """

    id: str
    folder: Path
    results: Path
    state: str = "uploading"  # waiting, reading, predicting, done, failed
    status: int = 200  # HTTP status of its fault
    message: str | None = None
    prediction: dict | None = None
    files: dict[str, Path] = field(default_factory=dict)  # that are not delivered yet
    size: int = 0  # bytes of the upload
    image: Path | None = None
    submitted: float = 0.0  # by the monotonic clock, as are these
    started: float = 0.0
    ended: float = 0.0
    process: multiprocessing.Process | None = None
    gone: bool = False


class Jobs:
    """The jobs of a server.

    Args:
        ckpt: weights.
        folder: for uploads, and for results unless they are kept.
        limits: of each job and of all.
        keep: folder in which results stay, by job id.
    """

    def __init__(self, ckpt: str, folder: Path, limits: Limits, keep: Path | None = None) -> None:
        self.ckpt, self.limits, self.keep = ckpt, limits, keep
        self.uploads, self.results = folder / "uploads", keep or folder / "results"
        self.uploads.mkdir()
        self.jobs: dict[str, Job] = {}
        self.queue: asyncio.Queue[Job] = asyncio.Queue()
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload([*worker.PRELOADED, worker.__name__])
        self.registry = CollectorRegistry()
        metric = {"registry": self.registry, "namespace": "survival_map"}
        self.events = Counter("jobs", "What became of jobs", ["event"], **metric)
        self.refused = Counter("refused", "Requests that were refused, by HTTP status", ["status"], **metric)
        self.waits = Histogram("wait_seconds", "Time that jobs waited", **metric, buckets=(0.1, 1, 5, 15, 60, 300, 900))
        self.times = Histogram("job_seconds", "Time that jobs ran", **metric, buckets=(1, 2, 5, 10, 20, 60, 120, 300))
        self.now = Gauge("jobs_now", "Jobs that the server knows, by state", ["state"], **metric)
        for state in (*AHEAD, "done", "failed"):
            self.now.labels(state).set_function(lambda state=state: self.count(state))

    def count(self, *states: str) -> int:
        return sum(job.state in states for job in self.jobs.values())

    def about(self) -> dict:
        """What the weights are; this imports all that jobs need, once.

        Raises:
            InputError: the weights can't be used.
        """
        try:
            return self._in_process(Job("about", self.uploads, self.results), worker.about, MOST_START)
        except HTTPException as error:
            raise InputError(f"jobs can't be done: {error.detail}") from error

    def open(self) -> Job:
        """A job to upload into.

        Raises:
            HTTPException: 503, there are too many.
        """
        if self.count(*AHEAD) >= self.limits.jobs:
            sentence = f"there are {self.limits.jobs} jobs already (expected to be asked again later)"
            raise HTTPException(503, sentence, {"Retry-After": "10"})
        name = secrets.token_hex(8)
        job = Job(name, self.uploads / name, self.results / name)
        job.folder.mkdir(mode=0o700)
        self.jobs[name] = job
        return job

    def submit(self, job: Job) -> None:
        job.state, job.submitted = "waiting", time.monotonic()
        self.queue.put_nowait(job)

    def find(self, name: str) -> Job:
        """The job of an id.

        Raises:
            HTTPException: 404, there is none.
        """
        if name not in self.jobs:
            raise HTTPException(404, "there is no such job: it was delivered, deleted or expired, or never was")
        return self.jobs[name]

    def ahead(self, job: Job) -> int:
        """How many jobs are done before this one."""
        others = (j for j in self.jobs.values() if j.state in ("waiting", *RUNNING))
        return sum(other.submitted < job.submitted for other in others) if job.state == "waiting" else 0

    def delivered(self, job: Job, name: str) -> None:
        """Delete a file that has been sent; the job goes with its last one."""
        path = job.files.pop(name, None)
        if path and not self.keep:
            path.unlink(missing_ok=True)
        if not job.files:  # of two clients that fetch one file both get it
            self.forget(job, "delivered")

    def forget(self, job: Job, event: str) -> None:
        """Delete a job and all that is left of it; one that runs is ended."""
        if self.jobs.pop(job.id, None) is None:
            return
        job.gone = True
        self.events.labels(event).inc()
        if job.state in RUNNING:
            if job.process and job.process.pid:
                job.process.kill()  # the folder is deleted after its end
        else:
            self._clear(job)

    async def work(self) -> None:
        """Run the jobs of the queue, one after the other, for ever."""
        while True:
            job = await self.queue.get()
            if not job.gone:
                job.state, job.started = "reading", time.monotonic()
                try:
                    await asyncio.to_thread(self._run, job)
                except Exception as error:  # the next job may do
                    logger.error(f"job {job.id}: {type(error).__name__} that nobody foresaw.")
                    job.state, job.status, job.message = "failed", 500, "the server failed"

    async def expire(self) -> None:
        """Forget the jobs whose results nobody fetched, for ever."""
        while True:
            await asyncio.sleep(min(5, self.limits.expire_seconds / 4))
            late = time.monotonic() - self.limits.expire_seconds
            for job in [job for job in self.jobs.values() if job.state in ("done", "failed") and job.ended < late]:
                self.forget(job, "expired")

    def close(self) -> None:
        for job in list(self.jobs.values()):
            self.forget(job, "deleted")

    def _run(self, job: Job) -> None:
        fault, prediction = None, None
        try:
            prediction = self._in_process(job, worker.predict, self.limits.seconds, job.image, job.results)
        except HTTPException as error:
            fault = error
        shutil.rmtree(job.folder, ignore_errors=True)
        job.ended = time.monotonic()
        waited, ran = job.started - job.submitted, job.ended - job.started
        what = "deleted" if job.gone else f"failed ({fault.status_code})" if fault else "done"
        logger.info(f"job {job.id}: {what} in {ran:.1f} s, after {waited:.1f} s of waiting; {job.size / 2**20:.1f} MiB.")
        self.waits.observe(waited)
        self.times.observe(ran)
        if not job.gone:
            self.events.labels("failed" if fault else "done").inc()
        if fault:
            job.status, job.message = fault.status_code, fault.detail
        else:
            found = {name: job.results / path.format(id=job.id) for name, path in RESULTS.items()}
            job.files = {name: path for name, path in found.items() if path.is_file()}
            job.prediction = prediction
        job.state = "failed" if fault else "done"  # last: now others may see it
        if fault or job.gone:
            self._clear(job)

    def _in_process(self, job: Job, target: Callable, seconds: float, *args: object) -> dict:
        """Call `target` in a process, and follow what it tells; what it says is done.

        Raises:
            HTTPException: it says that it failed, or took too long, or died.
        """
        deadline = time.monotonic() + seconds
        ours, theirs = self.context.Pipe(duplex=False)
        job.process = self.context.Process(
            target=target, args=(theirs, job.folder, self.ckpt, self.limits.memory, *args), daemon=True
        )
        try:
            job.process.start()
            theirs.close()
            while not job.gone:
                if not ours.poll(max(0.0, deadline - time.monotonic())):
                    raise HTTPException(504, f"it took longer than the {seconds:g} s of a job (expected a smaller scan)")
                told = json.loads(ours.recv_bytes(MOST_TOLD))
                if told.get("state") in RUNNING:
                    job.state = told["state"]
                elif "done" in told:
                    return told["done"]
                else:
                    raise HTTPException(422 if told["foreseen"] else 500, told["failed"])
            raise HTTPException(404, "it was deleted")
        except (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError) as error:  # no word, or none of ours
            raise HTTPException(500, "its process died: out of memory, or a file that crashes the reader") from error
        finally:
            ours.close()
            if job.process.pid:
                job.process.kill()
                job.process.join()

    def _clear(self, job: Job) -> None:
        """Delete what is left of a job, but results that are to be kept."""
        shutil.rmtree(job.folder, ignore_errors=True)
        if not (self.keep and job.state == "done"):
            shutil.rmtree(job.results, ignore_errors=True)


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A temporary folder; what killed servers of this user left is deleted first."""
    for old in Path(tempfile.gettempdir()).glob(f"{FOLDER}*"):
        with contextlib.suppress(OSError), open(old / "lock") as lock:  # a server that lives holds its own
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(old)
    with tempfile.TemporaryDirectory(prefix=FOLDER) as folder, open(Path(folder) / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield Path(folder)
