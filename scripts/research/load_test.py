# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Many uploads at once to `python -m scripts.serve`, bad ones among them, each result compared with the direct inference.

Trains weights for tiny phantoms, predicts them by `configs/inference.json`, then sends them all at the same moment over
loopback. It fails if an answer is not the expected one, if a map or a prediction differs in a bit from the direct one, or if
the server ends or leaves a file behind.
"""

import argparse
import http.client
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd

from bundle.files import write_text
from scripts.jobs import markdown, overrides, run_module

HEAD = """\
# Serving

Made by `{command}` over loopback, on {cores} {machine} cores (load average {busy:.0f} before it), {threads} thread(s) a
job, Python {python}. All uploads begin at the same moment; there is one job at a time, so that most of the time is spent
waiting.

{good} scans of {size}³ voxels and {bad} bad uploads at once: every answer was the expected one, every map and prediction
was that of the direct inference, bit for bit, and nothing was left behind.

"""
BOUNDARY = b"a-line-between-parts"
WANTED = ("median_months", "mean_months", "lower_months", "upper_months", "familiarity", "death_60m")


def form(files: Iterable[tuple[str, bytes]], field: str = "dicom") -> bytes:
    """A multipart form of files by name."""
    parts = b""
    for name, content in files:
        header = f'Content-Disposition: form-data; name="{field}"; filename="{name}"'.encode()
        parts += b"--%b\r\n%b\r\n\r\n%b\r\n" % (BOUNDARY, header, content)
    return parts + b"--%b--\r\n" % BOUNDARY


class Server:
    """A server in a process of its own, for as long as a `with` lasts.

    Args:
        folder: for its temporary files, in `temporary`, and its log.
        options: of `scripts.serve`.
    """

    def __init__(self, folder: Path, **options: object) -> None:
        self.temporary, self.log = folder / "temporary", folder / "server.log"
        self.temporary.mkdir(parents=True)
        self.command = [sys.executable, "-m", "scripts.serve", *overrides({"port": 0} | options)]

    def __enter__(self) -> "Server":
        with open(self.log, "w") as log:
            environment = {**os.environ, "TMPDIR": str(self.temporary)}
            self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
        found = re.search(r"http://127\.0\.0\.1:(\d+)/#?(\S*)", self.process.stdout.readline())
        if not found:
            self.process.wait()
            raise RuntimeError(self.log.read_text())
        self.port, self.token = int(found[1]), found[2]
        return self

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        self.process.wait(60)
        self.process.stdout.close()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def left(self) -> list[Path]:
        """The files of scans and results that are there."""
        walk = os.walk(self.temporary)  # which passes over a folder that is deleted meanwhile
        found = [Path(folder, name) for folder, _, names in walk for name in names if name != "lock"]
        return [path for path in found if path.is_file()]  # no sockets

    def ask(self, method: str, path: str, body: object = None, token: str | None = None, **headers: str):
        """Status, message and content of an answer; the content is the parsed ``data`` of JSON, else the body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        headers = {"Authorization": f"Bearer {self.token if token is None else token}", **headers}
        try:
            try:
                connection.request(method, path, body, headers, encode_chunked=not isinstance(body, (bytes, type(None))))
            except (BrokenPipeError, ConnectionResetError):
                pass  # it was refused before all was sent; the answer is there
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        if answer.headers["content-type"] != "application/json":
            return answer.status, None, content
        content = json.loads(content)
        return content["statusCode"], content["message"], content["data"]

    def send(self, body: object, **headers: str):
        """The answer to an upload of a form."""
        kind = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY.decode()}"}
        return self.ask("POST", "/dicom/files", body, **{**kind, **headers})

    def result(self, job: dict, every: float = 0.05):
        """Status, message and data of a job when it has ended; it is asked for each so many seconds."""
        while True:
            status, message, data = self.ask("GET", f"/jobs/{job['id']}")
            if message or data["state"] == "done":
                return status, message, data
            time.sleep(every)

    def fetch(self, data: dict) -> dict[str, bytes]:
        """The files of a job that is done."""
        return {path.rpartition("/")[2]: self.ask("GET", path)[2] for path in data["files"]}


def prepare(folder: Path, good: int, size: int) -> tuple[Path, Path]:
    """Phantoms and weights for them, and their direct inference in `direct/`; returns cohort and weights."""
    cohort, log = folder / "phantoms" / "cohort.csv", folder / "log"
    small = {"recipe": "network", "network_def#dim": 16, "batch_size": 4, "max_epochs": 2}
    configs = "['configs/train.json','configs/cohort/phantom.json']"
    phantoms = {"phantom": "spheres", "num": max(good, 16), "size": size, "out": cohort.parent}
    run_module("scripts.make_phantoms", *overrides(phantoms), log=log, threads=1)
    options = {"config_file": configs, "cohort": cohort, "ckpt_dir": folder / "model", **small}
    run_module("monai.bundle", "run", *overrides(options), log=log, threads=1)
    options = {"config_file": "configs/inference.json", "cohort": cohort, "ckpt": folder / "model" / "model.pt"}
    options |= {"output_dir": folder / "direct"}
    run_module("monai.bundle", "run", *overrides(options), log=log, threads=1)
    return cohort, folder / "model" / "model.pt"


def bad_uploads(scan: bytes) -> list[tuple[str, bytes, dict[str, str], int]]:
    """What is wrong, the body, headers, and the status that is expected at once, or of the job."""
    archive = b"PK\x03\x04" + os.urandom(2000)
    return [
        ("wrong token", form([("a.nii.gz", scan)]), {"token": "wrong"}, 401),
        ("text", form([("a.nii.gz", b"not a scan")]), {}, 415),
        ("truncated scan", form([("a.nii.gz", scan[: len(scan) // 2])]), {}, 422),
        ("damaged ZIP", form([("../../a.zip", archive)]), {}, 422),
        ("half a form", form([("a.nii.gz", scan)])[:-20], {}, 400),
    ]


def load(server: Server, direct: Path, scans: list[Path], copies_of_bad: int) -> pd.DataFrame:
    """Send all at once; a row of seconds for each good one.

    Raises:
        AssertionError: an answer or a result is another than expected.
    """
    bad = bad_uploads(scans[0].read_bytes()) * copies_of_bad
    start = threading.Barrier(len(scans) + len(bad))

    def good_one(scan: Path) -> dict[str, float]:
        body = form([(scan.name, scan.read_bytes())])
        start.wait()
        begun = time.monotonic()
        status, message, job = server.send(body)
        assert status == 202, (scan.name, status, message)
        sent = time.monotonic()
        status, message, data = server.result(job, every=1)
        assert status == 200, (scan.name, status, message)
        files, done = server.fetch(data), time.monotonic()
        patient = scan.name.removesuffix(".nii.gz")
        expected = json.loads((direct / "done" / f"{patient}.json").read_text())["row"]
        assert {key: data["prediction"][key] for key in WANTED} == {key: expected[key] for key in WANTED}, patient
        assert files["heat.nii.gz"] == (direct / "maps" / f"{patient}_heat.nii.gz").read_bytes(), patient
        assert job["id"].encode() in files["report.html"]
        return {"upload": sent - begun, "until the report is there": done - begun, "end": done}

    def bad_one(what: str, body: bytes, headers: dict, expected: int) -> None:
        start.wait()
        status, message, job = server.send(body, **headers)
        if status == 202:
            status, message, _ = server.result(job, every=1)
        assert status == expected and message and "\n" not in message, (what, status, message)

    with ThreadPoolExecutor(len(scans) + len(bad)) as pool:
        others = [pool.submit(bad_one, *each) for each in bad]
        rows = [future.result() for future in [pool.submit(good_one, scan) for scan in scans]]
        for future in others:
            future.result()
    assert server.process.poll() is None and "Traceback" not in server.log.read_text()
    return pd.DataFrame(rows)


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(prog="python -m scripts.research.load_test", description=__doc__)
    p.add_argument("--good", type=int, default=40, help="scans (default %(default)s)")
    p.add_argument("--bad", type=int, default=2, help="of each kind of bad upload (default %(default)s)")
    p.add_argument("--size", type=int, default=32, help="voxels a side (default %(default)s)")
    p.add_argument("--page", type=Path, default=Path("docs/results/serving.md"), help="to write (default %(default)s)")
    args = p.parse_args(argv)
    busy = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cohort, ckpt = prepare(folder, args.good, args.size)
        scans = [cohort.parent / image for image in pd.read_csv(cohort).image[: args.good]]
        with Server(folder, ckpt=ckpt, max_jobs=200) as server:
            begun = time.monotonic()
            table = load(server, folder / "direct", scans, args.bad)
            took = float(table.pop("end").max()) - begun
            left = [path for path in server.left() if path.suffix in (".gz", ".html", ".zip")]
            assert not left, left
            ran = [float(seconds) for seconds in re.findall(r"done in ([\d.]+) s", server.log.read_text())]
    table["job alone"] = ran
    times = table.quantile([0.5, 0.95]).T.map("{:.2f} s".format).rename(columns={0.5: "p50", 0.95: "p95"})
    page = HEAD.format(
        command="python -m scripts.research.load_test", cores=os.cpu_count(), machine=platform.machine(), busy=busy,
        threads=os.environ.get("OMP_NUM_THREADS", os.cpu_count()), python=platform.python_version(),
        good=args.good, bad=5 * args.bad, size=args.size,
    )  # fmt: skip
    rate = f"\nAll were done after {took:.0f} s: {np.mean(ran):.2f} s a job.\n"
    write_text(args.page, page + markdown(times.rename_axis("time").reset_index()) + rate)
    print(args.page.read_text())


if __name__ == "__main__":
    main()
