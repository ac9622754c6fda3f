# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""The server gives what the command line gives, keeps nothing, and refuses what is bad in one sentence."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import stat
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

pytest.importorskip("fastapi", reason="no FastAPI (pip install -r requirements-serve.txt)")

from fastapi import HTTPException

from bundle.errors import InputError
from scripts.research.load_test import BOUNDARY, WANTED, Server, form
from scripts.serve import __main__ as command
from scripts.serve import jobs as serve_jobs
from scripts.serve.app import page_policy, upload_page_text
from scripts.serve.jobs import Jobs, Limits, scratch

from .commands import run
from .dicom_files import write_series
from .test_viewer import CHROMIUM, FLAGS, READY

HOSTILE = "../../etc/Secret^Name<script>document.title='got'</script>%00.nii.gz"


@pytest.fixture(scope="module")
def server(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    with Server(folder, ckpt=trained, max_upload_mib=1, max_jobs=6, job_gib=0.8) as found:
        yield found
    assert not list(found.temporary.iterdir())  # the end of the server is the end of all
    log = found.log.read_text()
    assert "Traceback" not in log and "Secret" not in log and "nii" not in log and found.token not in log


@pytest.fixture(scope="module")
def scans(tiny_cohort, tmp_path_factory) -> dict[str, tuple[Path, list[tuple[str, bytes]]]]:
    """By kind, a scan for the command line, and the same as files to upload."""
    folder = tmp_path_factory.mktemp("scans")
    zipped, plain = tiny_cohort.parent / "p0.nii.gz", folder / "plain.nii"
    nib.save(nib.load(tiny_cohort.parent / "p2.nii.gz"), plain)
    series, archive = folder / "series", io.BytesIO()
    write_series(series, np.asarray(nib.load(tiny_cohort.parent / "p4.nii.gz").dataobj), (3, 3, 3), (0, 0, 0))
    slices = [(f"{HOSTILE}{path.name}", path.read_bytes()) for path in sorted(series.iterdir())]
    with zipfile.ZipFile(archive, "w") as file:
        for name, content in slices:
            file.writestr(name, content)
    return {
        "NIfTI, gzipped": (zipped, [(HOSTILE, zipped.read_bytes())]),
        "NIfTI": (plain, [("a.gz", plain.read_bytes())]),
        "DICOM in a ZIP": (series, [("a.nii", archive.getvalue())]),
        "DICOM files": (series, slices),
    }


@pytest.fixture
def scan(scans) -> bytes:
    """A form with a good scan."""
    return form(scans["NIfTI, gzipped"][1])


def settled(server: Server) -> bool:
    """Whether no file of a scan or a result is left, now or soon."""
    end = time.monotonic() + 30
    while server.left() and time.monotonic() < end:
        time.sleep(0.1)
    return not server.left()


def test_results_are_those_of_the_command_line_whoever_else_asks(server, scans, trained, tmp_path):
    with ThreadPoolExecutor(len(scans)) as pool:
        answers = dict(zip(scans, pool.map(lambda kind: server.send(form(scans[kind][1])), scans)))
    for kind, (status, message, job) in answers.items():
        assert (status, message) == (202, None), kind
        status, message, data = server.result(job)
        assert (status, message) == (200, None), kind
        run("configs/inference.json", image=str(scans[kind][0]), ckpt=str(trained), output_dir=str(tmp_path / kind))
        (record,) = (tmp_path / kind / "done").iterdir()
        expected = json.loads(record.read_text())
        assert {key: data["prediction"][key] for key in WANTED} == {key: expected["row"][key] for key in WANTED}
        assert data["prediction"]["death_by_horizon"] == expected["risk"]
        assert data["prediction"]["survival_curve"] == pytest.approx(1 - np.cumsum(expected["pmf"]), abs=1e-5)
        files = server.fetch(data)
        assert files["heat.nii.gz"] == (tmp_path / kind / "maps" / f"{record.stem}_heat.nii.gz").read_bytes()
        report = (tmp_path / kind / "reports" / f"{record.stem}.html").read_text().splitlines()
        served = files["report.html"].decode().replace(job["id"], record.stem).splitlines()
        other = [line for line, expected in zip(served, report, strict=True) if line != expected]
        assert len(other) == (kind == "DICOM in a ZIP")  # the digest of the archive, not of the folder
        assert server.ask("GET", f"/jobs/{job['id']}")[0] == 404
    assert settled(server) and not list(tmp_path.parent.rglob("*Secret*"))


def nifti(shape=(16, 16, 16), size=None) -> bytes:
    """A NIfTI file, which may claim another shape than it has voxels."""
    image = nib.Nifti1Image(np.random.default_rng(0).integers(-1000, 0, (16, 16, 16), np.int16), np.diag([3.0, 3, 3, 1]))
    data = bytearray(image.to_bytes())
    data[42:48] = np.array(shape, "<i2").tobytes()
    return bytes(data[:size])


def archive(name: str = "a.dcm", content: bytes = b"DICM", link: bool = False, encrypted: bool = False) -> bytes:
    """A ZIP with one file."""
    held, member = io.BytesIO(), zipfile.ZipInfo(name)
    member.external_attr = (stat.S_IFLNK if link else stat.S_IFREG | 0o644) << 16
    with zipfile.ZipFile(held, "w") as file:
        file.writestr(member, content)
    data = bytearray(held.getvalue())
    if encrypted:
        data[6] |= 1
        data[data.rindex(b"PK\x01\x02") + 8] |= 1
    return bytes(data)


def pieces(content: bytes):
    """A body whose length is not told before."""
    return iter([content[i : i + 2**16] for i in range(0, len(content), 2**16)])


MUCH = form([("a.nii.gz", bytes(3 * 2**20))])
BAD = {  # what is sent, headers, the status, words of the sentence
    "no token": (b"", {"Authorization": ""}, 401, "token"),
    "a wrong token": (MUCH, {"Authorization": "Bearer wrong"}, 401, "token"),
    "another scheme": (b"", {"Authorization": "Basic wrong"}, 401, "token"),
    "too large by its header": (MUCH, {}, 413, "at most 1 MiB"),
    "too large as it comes": (lambda: pieces(MUCH), {}, 413, "at most 1 MiB"),
    "no form": (b"{}", {"Content-Type": "application/json"}, 415, "no multipart form"),
    "no boundary": (b"{}", {"Content-Type": "multipart/form-data"}, 415, "no multipart form"),
    "a damaged form": (b"--what\r\n\r\n", {}, 400, "damaged"),
    "half a form": (form([("a.nii", nifti())])[:-10], {}, 400, "before its form does"),
    "a form without a file": (form([]), {}, 400, "holds no file"),
    "another field": (form([("a.nii", nifti())], field="file"), {}, 400, "holds no file"),
    "an empty file": (form([("a.nii.gz", b"")]), {}, 415, "is empty"),
    "no scan": (form([(HOSTILE, b"MZ" + bytes(500))]), {}, 415, "no scan"),
    "a pickle": (form([("a.nii.gz", b"\x80\x04.")]), {}, 415, "no scan"),
    "two scans": (form([("a", nifti()), ("b", nifti())]), {}, 415, "2 files"),
    "a truncated scan": (form([("a.nii.gz", nifti(size=5000))]), {}, 422, "holds 4648 of the 8192 bytes"),
    "more than the memory": (form([("a.nii", nifti((700, 700, 700)))]), {}, 422, "more memory than the 0.8 GiB"),
    "a ZIP that climbs": (form([("a", archive("../../../climbed.dcm"))]), {}, 422, "no DICOM series"),
    "a ZIP with a link": (form([("a", archive("link", b"/etc/passwd", link=True))]), {}, 422, "no DICOM series"),
    "an encrypted ZIP": (form([("a", archive(encrypted=True))]), {}, 422, "encrypted"),
    "a ZIP that is none": (form([("a", b"PK\x03\x04" + bytes(500))]), {}, 422, "truncated or damaged"),
    "DICOM that is none": (form([("a", bytes(128) + b"DICM" + b"\xff" * 500)]), {}, 422, "no DICOM"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_uploads_get_one_sentence_and_leave_nothing(kind, server):
    body, headers, expected, words = BAD[kind]
    status, message, job = server.send(body() if callable(body) else body, **headers)
    if status == 202:
        status, message, _ = server.result(job)
        assert server.ask("GET", f"/jobs/{job['id']}/report.html")[:2] == (status, message)
    assert status == expected and words in message, message
    assert "\n" not in message and "expected" in message and str(server.temporary.parent) not in message
    assert settled(server) and not list(server.temporary.parent.rglob("climbed*"))


def test_a_connection_that_is_lost_leaves_nothing(server, scan):
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        head = f"POST /dicom/files HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {server.token}\r\n"
        head += f"Content-Type: multipart/form-data; boundary={BOUNDARY.decode()}\r\nContent-Length: {len(scan)}\r\n\r\n"
        connection.sendall(head.encode() + scan[: len(scan) // 2])
        while not server.left():
            time.sleep(0.01)
    assert settled(server)


def test_more_jobs_than_allowed_are_refused_and_what_is_deleted_is_gone(server, scan):
    answers = [server.send(scan) for _ in range(8)]
    assert {status for status, *_ in answers} == {202, 503}
    assert "6 jobs already" in next(message for status, message, _ in answers if status == 503)
    for status, _, job in answers:
        if status == 202:
            assert server.ask("DELETE", f"/jobs/{job['id']}")[0] == 200
            assert server.ask("GET", f"/jobs/{job['id']}")[0] == 404
    assert settled(server)
    metrics = server.ask("GET", "/metrics")[2].decode()
    assert 'survival_map_refused_total{status="503"}' in metrics and 'survival_map_jobs_now{state="waiting"} 0.0' in metrics


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if path.read_text().rpartition(")")[2].split()[1] == str(pid):
                found.append(int(path.parent.name))
    return found


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="finds processes by /proc")
def test_a_job_that_dies_costs_only_itself(server, scan):
    _, _, job = server.send(scan)
    while not (working := [job for child in children(server.process.pid) for job in children(child)]):
        time.sleep(0.01)
    for pid in working:
        os.kill(pid, signal.SIGKILL)
    status, message, _ = server.result(job)
    assert status == 500 and "process died" in message
    status, _, data = server.result(server.send(scan)[2])
    assert status == 200
    server.fetch(data)
    assert settled(server)


def test_who_has_no_token_sees_nothing(server):
    for path in ("/info", "/metrics", "/jobs/a", "/jobs/a/report.html"):
        assert server.ask("GET", path, token="wrong")[0] == 401
    assert server.ask("GET", "/health", token="")[2] == {"status": "ok"}
    assert server.ask("GET", "/", token="")[0] == 200 and server.token.encode() not in server.ask("GET", "/")[2]
    assert server.ask("GET", "/info")[2]["limits"]["upload_bytes"] == 2**20
    assert server.ask("POST", "/dicom/uri", b'{"uri": "http://127.0.0.1:1/a.zip"}')[:2] == (
        501, "this server fetches nothing (expected an upload to /dicom/files)"
    )  # fmt: skip
    for path in ("/jobs/..%2f..%2fetc/passwd", "/jobs/a", "/docs", "/openapi.json"):
        assert server.ask("GET", path)[0] == 404


# --- the page, in a browser -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(server):
    if not CHROMIUM:
        pytest.skip("no chromium on this machine (apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright (pip install -r requirements-dev.txt)")
    with playwright.sync_playwright() as api:
        browser = api.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_context(accept_downloads=True).new_page()
        page.set_default_timeout(300_000)
        page.said, page.asked = [], []
        page.context.on("console", lambda message: message.type in ("error", "warning") and page.said.append(message.text))
        page.context.on("weberror", lambda error: page.said.append(str(error.error)))
        page.context.on("request", lambda request: page.asked.append(request.url))
        page.goto(f"{server.address}#{server.token}")
        yield page
        browser.close()


def test_the_page_sends_a_scan_and_opens_its_report(page, server, scans):
    assert page.url == server.address and page.input_value("#token") == server.token  # not in the address any more
    path, _ = scans["NIfTI, gzipped"]
    page.set_input_files("#files", {"name": HOSTILE, "mimeType": "", "buffer": path.read_bytes()})
    page.wait_for_selector("li a")
    assert HOSTILE.replace("/", ":") in page.inner_text("li b").replace("/", ":") and page.title() == "Survival Map"
    page.wait_for_selector("li a >> text=heat")
    assert "median" in page.inner_text("li p") and settled(server)
    with page.expect_download() as download:
        page.click("li a >> text=heat")
    saved = gzip.decompress(download.value.path().read_bytes())
    assert nib.Nifti1Image.from_bytes(saved).shape == (16, 16, 16)
    with page.context.expect_page() as opened:
        page.click("li a >> text=report")
    opened.value.wait_for_selector(READY, state="attached", timeout=300_000)
    assert "Survival Map report of" in opened.value.title()
    opened.value.close()
    assert page.said == []
    assert all(url.startswith((server.address, f"blob:{server.address}", "blob:", "data:")) for url in page.asked)


def test_the_page_says_what_is_wrong(page, scans):
    drop = "(bytes) => { const held = new DataTransfer(); held.items.add(new File([new Uint8Array(bytes)], 'dropped.nii'));"
    drop += "document.getElementById('drop').dispatchEvent(new DragEvent('drop', { dataTransfer: held })); }"
    for content, words in ((b"no scan at all", "no scan"), (nifti(size=5000), "truncated"), (bytes(2**20 + 1), "too large")):
        before = page.locator("li.failed").count()
        page.evaluate(drop, [*content])
        page.locator(f"li.failed >> nth={before}").locator("p[role=status]", has_text=words).wait_for()
    page.fill("#token", "wrong")
    page.evaluate(drop, [1])
    page.wait_for_selector("li.failed >> text=token is missing or wrong")


# --- jobs without a server: the process of a job is forked from this one, and does what a test says ------------------


@pytest.fixture
def make_jobs(tmp_path, monkeypatch):
    def make(predict, keep=None, **limits) -> Jobs:
        made = Jobs("model.pt", tmp_path, Limits(**limits), keep)
        made.context = multiprocessing.get_context("fork")
        monkeypatch.setattr(serve_jobs.worker, "predict", predict)
        return made

    return make


def ran(jobs: Jobs):
    """A job of them when it has ended."""
    job = jobs.open()
    job.image = job.folder / "scan"
    jobs.submit(job)
    job.state, job.started = "reading", time.monotonic()
    jobs._run(job)
    return job


def writes(pipe, folder, ckpt, memory, image, output_dir) -> None:
    for name in ("reports", "maps"):
        (output_dir / name).mkdir(parents=True)
    (output_dir / "reports" / f"{output_dir.name}.html").write_text("report")
    (output_dir / "maps" / f"{output_dir.name}_heat.nii.gz").write_text("heat")
    pipe.send_bytes(b'{"done": {}}')


ODD = {
    "hangs": (lambda *args: time.sleep(60), 504, "longer than the 0.5 s"),
    "is killed": (lambda *args: os.kill(os.getpid(), signal.SIGKILL), 500, "process died"),
    "says nothing": (lambda *args: None, 500, "process died"),
    "says no JSON": (lambda pipe, *args: pipe.send_bytes(b"\x80\x04."), 500, "process died"),
    "says too much": (lambda pipe, *args: pipe.send_bytes(b" " * 2**21), 500, "process died"),
}


@pytest.mark.parametrize("kind", ODD)
def test_a_process_that_misbehaves_is_ended(kind, make_jobs):
    predict, status, words = ODD[kind]
    jobs = make_jobs(predict, seconds=0.5 if kind == "hangs" else 60)
    job = ran(jobs)
    assert (job.state, job.status) == ("failed", status) and words in job.message
    assert not job.process.is_alive() and not job.folder.exists() and not job.results.exists()


def test_results_are_kept_where_asked_and_expire_where_not(make_jobs, tmp_path):
    async def wait(jobs: Jobs) -> None:
        task = asyncio.create_task(jobs.expire())
        while jobs.jobs:
            await asyncio.sleep(0.01)
        task.cancel()

    for keep in (None, tmp_path / "kept"):
        (folder := tmp_path / f"jobs{bool(keep)}").mkdir()
        jobs = make_jobs(writes, keep, expire_seconds=0.2)
        jobs.uploads = folder
        job = ran(jobs)
        assert set(job.files) == {"report.html", "heat.nii.gz"} and not job.folder.exists()
        with ThreadPoolExecutor(1) as other:  # the thread of a browser has a loop already
            other.submit(asyncio.run, wait(jobs)).result(30)
        assert job.results.exists() == bool(keep)
        shutil.rmtree(tmp_path / "uploads", ignore_errors=True)
        with pytest.raises(HTTPException):
            jobs.find(job.id)


def test_what_a_killed_server_left_is_deleted(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    killed = tmp_path / f"{serve_jobs.FOLDER}killed"
    (killed / "uploads").mkdir(parents=True)
    (killed / "lock").touch()
    with scratch() as first:
        assert not killed.exists()
        with scratch() as second:
            assert first.exists() and second.exists()
    assert not list(tmp_path.iterdir())


def test_tokens_and_addresses(tmp_path, capsys):
    assert len(command.read_token(None)) >= 32 and command.read_token(None) != command.read_token(None)
    (tmp_path / "token").write_text("a" * 20 + "\n")
    assert command.read_token(tmp_path / "token") == "a" * 20
    for text in ("short", "has spaces in the middle", "no ASCII: مريضمريض"):
        (tmp_path / "token").write_text(text)
        with pytest.raises(InputError, match="--token_file"):
            command.read_token(tmp_path / "token")
    command.listen("127.0.0.1", 0).close()
    assert capsys.readouterr().err == ""
    with command.listen("0.0.0.0", 0) as taken:
        assert "without TLS" in capsys.readouterr().err
        with pytest.raises(InputError, match="can't listen"):
            command.listen("0.0.0.0", taken.getsockname()[1])


@pytest.mark.slow
def test_weights_that_cannot_be_used_end_the_start(tmp_path):
    with pytest.raises(RuntimeError, match="error: .*model.pt"), Server(tmp_path, ckpt=tmp_path / "model.pt"):
        pass


def test_the_page_says_whether_results_are_kept():
    assert "keeps the results" in upload_page_text(True)
    assert "keeps" not in upload_page_text(False) and "a result when it is here" in upload_page_text(False)


def test_the_page_may_run_its_own_script_and_that_of_reports_alone():
    policy = page_policy("<script>f()</script>", "default-src 'none'; script-src 'sha256-A'; connect-src blob:")
    assert re.fullmatch(r"default-src 'none'; script-src 'sha256-[\w+/]{43}=' 'sha256-A'; connect-src 'self' blob:", policy)
