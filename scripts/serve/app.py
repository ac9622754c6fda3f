# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""What the server answers. Answers are JSON in ARK's form: ``data``, ``message``, and ``statusCode`` as in HTTP."""

import asyncio
import base64
import contextlib
import errno
import hashlib
import logging
import re
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.requests import ClientDisconnect

from scripts.serve.jobs import Job, Jobs
from scripts.serve.upload import drain, receive

HEADERS = [  # of every answer
    ("Cache-Control", "no-store"),
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    ("Referrer-Policy", "no-referrer"),
]
MEDIA = {".html": "text/html; charset=utf-8", ".gz": "application/gzip"}
_CHUNK_BYTES = 2**16

logger = logging.getLogger(__name__)


def make_app(jobs: Jobs, token: str, version: str, about: dict[str, Any]) -> FastAPI:
    """The server.

    Args:
        jobs: which it runs.
        token: that clients must know.
        version: of this software.
        about: of :meth:`Jobs.about`.
    """
    page = upload_page_text(bool(jobs.keep))
    policy = page_policy(page, about["report_policy"])
    known = {key: value for key, value in about.items() if key != "report_policy"}

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.tasks = [asyncio.create_task(jobs.work()), asyncio.create_task(jobs.expire())]
        yield
        jobs.close()
        for task in app.state.tasks:
            task.cancel()

    async def authorised(request: Request) -> None:
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not secrets.compare_digest(given.encode(), token.encode()):
            await drain(request.stream())
            raise HTTPException(401, "the token is missing or wrong (expected the one of the server's start)", BEARER)

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)  # pages of docs load scripts from afar

    @app.exception_handler(AnyHTTPException)
    async def refuse(request: Request, error: AnyHTTPException) -> JSONResponse:
        jobs.refused.labels(error.status_code).inc()
        return answer(error.status_code, message=error.detail, headers=error.headers)

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> JSONResponse:
        logger.error(f"{type(error).__name__} that nobody foresaw, in answer to {request.method}.")  # no path, no text
        return answer(500, message="the server failed")

    @app.get("/")
    async def upload_page() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    @app.get("/health")
    async def health() -> JSONResponse:
        alive = not any(task.done() for task in app.state.tasks)
        return answer(200 if alive else 503, {"status": "ok" if alive else "the queue has ended"})

    for router in (about_server(jobs, version, known), uploads(jobs), results(jobs)):
        app.include_router(router, dependencies=[Depends(authorised)])
    return app


def about_server(jobs: Jobs, version: str, known: dict[str, Any]) -> APIRouter:
    """What the server tells of itself."""
    router = APIRouter()

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(jobs.registry), media_type=CONTENT_TYPE_LATEST)

    @router.get("/info")
    async def info() -> JSONResponse:
        names = {"apiVersion": version, "modelName": "survival-map", "modelVersion": version}
        return answer(200, {**names, **known, "limits": jobs.limits._asdict()})

    return router


def uploads(jobs: Jobs) -> APIRouter:
    """How a job begins."""
    router = APIRouter()

    @router.post("/dicom/uri")
    async def uri() -> None:
        raise HTTPException(501, "this server fetches nothing (expected an upload to /dicom/files)")

    @router.post("/dicom/files")
    async def upload(request: Request) -> JSONResponse:
        try:
            job = jobs.open()
        except HTTPException:
            await drain(request.stream())
            raise
        try:
            job.image, job.size = await receive(request, job.folder, job.id, jobs.limits.upload_bytes)
            jobs.submit(job)
        except ClientDisconnect:
            raise HTTPException(400, "the connection was lost") from None
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise HTTPException(507, "the server has no room for the upload") from None
        finally:
            if job.state == "uploading":
                jobs.forget(job, "refused")
        return answer(202, told(jobs, job), headers={"Location": f"/jobs/{job.id}"})

    return router


def results(jobs: Jobs) -> APIRouter:
    """What becomes of a job."""
    router = APIRouter(prefix="/jobs/{name}")

    @router.get("")
    async def look(name: str) -> JSONResponse:
        job = jobs.find(name)
        return answer(job.status, told(jobs, job), job.message)

    @router.delete("")
    async def delete(name: str) -> JSONResponse:
        jobs.forget(jobs.find(name), "deleted")
        return answer(200, message="the job was deleted")

    @router.get("/{file}")
    async def deliver(name: str, file: str) -> StreamingResponse:
        job = jobs.find(name)
        if job.state != "done":
            raise HTTPException(job.status if job.message else 409, job.message or f"the job is {job.state}")
        if file not in job.files:
            raise HTTPException(404, f"there is no such file, or it was delivered (there: {', '.join(job.files)})")
        path = job.files[file]
        size = path.stat().st_size
        headers = {"Content-Length": str(size), "Content-Disposition": f'attachment; filename="{job.id}_{file}"'}

        async def content() -> AsyncIterator[bytes]:
            left = size
            with open(path, "rb") as source:
                while chunk := await asyncio.to_thread(source.read, _CHUNK_BYTES):
                    left -= len(chunk)
                    if left == 0:  # where the connection is lost, this is not come to
                        jobs.delivered(job, file)
                    yield chunk

        return StreamingResponse(content(), media_type=MEDIA[path.suffix], headers=headers)

    return router


BEARER = {"WWW-Authenticate": "Bearer"}


def answer(status: int, data: dict | None = None, message: str | None = None, headers: Any = None) -> JSONResponse:
    return JSONResponse({"data": data, "message": message, "statusCode": status}, status, headers)


def told(jobs: Jobs, job: Job) -> dict[str, Any]:
    """What a client is told of a job."""
    known = {"id": job.id, "state": job.state, "ahead": jobs.ahead(job), "prediction": job.prediction}
    return known | {"files": [f"/jobs/{job.id}/{name}" for name in job.files]}


def upload_page_text(keeps: bool) -> str:
    """The upload page, which says what becomes of results."""
    page = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    return page.replace("<!-- results -->", "<b>keeps the results</b>" if keeps else "a result when it is here")


def page_policy(page: str, report: str) -> str:
    """The Content-Security-Policy of the upload page: its own script, and what reports need, which inherit it.

    A report opens from a blob of the page, and such documents are bound by the policy of the page that made them.
    """
    own = base64.b64encode(hashlib.sha256(re.search("<script>(.*?)</script>", page, re.DOTALL)[1].encode()).digest())
    return report.replace("script-src", f"script-src 'sha256-{own.decode()}'").replace("connect-src", "connect-src 'self'")
