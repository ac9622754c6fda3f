# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Hospitals that can't share scans train one network together, by NVIDIA FLARE: docs/federated.md."""

import argparse
import importlib.util
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bundle.errors import InputError
from bundle.federated.site import OF_THE_JOB, ROOT, bundle_digest, checked_job, training_rounds
from bundle.files import write_json
from bundle.run import make_folder
from scripts.jobs import literal

EXECUTOR = "bundle.federated.executor.SiteExecutor"
EXAMPLES = """\
examples:
  python -m scripts.federate simulate --sites a.csv b.csv c.csv --out runs/federated
  python -m scripts.federate export --names london paris rome --clinical "{'age': 'numeric', 'sex': ['f', 'm']}" --out job
"""


def flare_job(settings: dict, min_sites: int, wait: int) -> Any:
    """The job as FLARE's `Recipe`, for `SimEnv` or to be exported. Only the executor is ours, and is named, not sent.

    The server's part is FLARE's own: `ScatterAndGather`, which makes do with `min_sites` answers a round (`FedAvg` waits
    for all), and the mean weighted by scans. No model is kept there: each site writes the last one.

    Args:
        settings: from :func:`~bundle.federated.site.checked_job`.
        min_sites: answers that a round needs; with fewer in reach the job is aborted.
        wait: seconds that a round waits for the others once it has these.
    """
    from nvflare.apis.dxo import DataKind
    from nvflare.app_common.aggregators.intime_accumulate_model_aggregator import InTimeAccumulateWeightedAggregator
    from nvflare.app_common.shareablegenerators.full_model_shareable_generator import FullModelShareableGenerator
    from nvflare.app_common.workflows.scatter_and_gather import ScatterAndGather
    from nvflare.job_config.api import FedJob
    from nvflare.recipe.spec import Recipe

    from bundle.federated.executor import SiteExecutor

    job = FedJob(name="survival_map", min_clients=min_sites)
    job.job.set_app_packages(["bundle"])  # every site has its own copy
    controller = ScatterAndGather(
        min_clients=min_sites,
        num_rounds=training_rounds(settings) + 2,
        wait_time_after_min_received=wait,
        allow_empty_global_weights=True,
        snapshot_every_n_rounds=0,
        task_check_period=0.1,
    )
    job.to_server(controller)
    alike = dict.fromkeys(settings["sites"], 1.0)  # beyond the number of scans, which comes with each answer
    job.to_server(InTimeAccumulateWeightedAggregator(None, alike, DataKind.WEIGHTS), id="aggregator")
    job.to_server(FullModelShareableGenerator(), id="shareable_generator")
    for name in settings["sites"]:
        job.to(SiteExecutor(settings), name, tasks=["train"])
    return Recipe(job)


def simulate(sites: Sequence[Path], out: Path, settings: dict, min_sites: int | None = None, wait: int = 120) -> list[Path]:
    """Run a federation of cohorts on this machine, a process each; the folders of the sites, with their `model.pt`.

    Raises:
        InputError: FLARE is missing, or a round had too few answers.
    """
    names = settings["sites"]
    require_flare()
    out = Path(make_folder(str(out))).resolve()
    own = {name: {"cohort": str(path.resolve()), "ckpt_dir": str(out / name)} for name, path in zip(names, sites)}
    write_json(out / "sites.json", own)
    os.environ["SURVIVAL_MAP_SITES"] = str(out / "sites.json")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))

    from nvflare.app_common.default_component_policy import DEFAULT_CLASS_ALLOW_LIST
    from nvflare.recipe import SimEnv

    # As a hospital would: FLARE's own classes and this one, and no code that a job brings along.
    policy = {"format_version": 2, "class_allow_list": [*DEFAULT_CLASS_ALLOW_LIST, EXECUTOR]}
    recipe = flare_job(settings, checked_minimum(min_sites, names), wait)
    write_json(out / "flare" / recipe.name / "local" / "resources.json.default", policy)
    before = {name: stamp(out / name / "model.pt") for name in names}
    try:
        recipe.execute(SimEnv(clients=names, workspace_root=str(out / "flare")))
    except RuntimeError as e:
        raise InputError(f"the federation failed; see {out}/*/site.log and {out}/flare ({e}).") from e
    done = [out / name for name in names if stamp(out / name / "model.pt") not in (None, before[name])]
    if not done:
        raise InputError(f"no site got to the end; see {out}/*/site.log.")
    return done


def stamp(path: Path) -> int | None:
    """When a file was written; None if it isn't there."""
    return path.stat().st_mtime_ns if path.is_file() else None


def checked_names(names: Sequence[str]) -> list[str]:
    """Names of sites as FLARE takes them.

    Raises:
        InputError: fewer than two, two alike, or one with other signs.
    """
    if len(set(names)) < 2 or len(set(names)) < len(names):
        raise InputError(f"the sites are {', '.join(names)} (expected two or more, of different names).")
    if wrong := [name for name in names if not re.fullmatch(r"[A-Za-z0-9_-]+", name)]:
        raise InputError(f"the sites' names have {', '.join(wrong)} (expected letters, digits, - and _).")
    return list(names)


def checked_minimum(min_sites: int | None, names: Sequence[str]) -> int:
    """Answers that a round needs; without one given all sites' but one, and two at least.

    Raises:
        InputError: fewer than two, whose mean would be one site's own, or more than there are.
    """
    least = max(2, len(names) - 1) if min_sites is None else min_sites
    if not 2 <= least <= len(names):
        raise InputError(f"--min_sites is {least} (expected 2 to {len(names)}, the number of sites).")
    return least


def require_flare() -> None:
    """Raise an :class:`InputError` where nvflare isn't installed."""
    if importlib.util.find_spec("nvflare") is None:
        raise InputError("NVIDIA FLARE is missing: pip install -r requirements-federated.txt.")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m scripts.federate",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = p.add_subparsers(dest="command", required=True)
    simulation = commands.add_parser("simulate", help="run it on this machine, a process for each cohort")
    simulation.add_argument("--sites", type=Path, nargs="+", required=True, metavar="CSV", help="a cohort of each site")
    export = commands.add_parser("export", help="write the job, to be submitted to a FLARE server")
    export.add_argument("--names", nargs="+", required=True, metavar="NAME", help="of the sites, as in FLARE's project")
    for command in (simulation, export):
        command.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to")
        command.add_argument("--recipe", choices=("codebook", "network"), default="codebook", help="(default codebook)")
        command.add_argument("--rounds", type=int, default=60, help="of a network's training (default 60)")
        command.add_argument("--local_epochs", type=int, default=1, help="of each site in a round (default 1)")
        command.add_argument("--min_sites", type=int, help="answers that a round needs (default: all but one, at least 2)")
        command.add_argument("--wait", type=int, default=600, help="seconds a round waits for others then (default 600)")
        command.add_argument(
            "--clinical", type=literal, default={}, help="covariates: {'age': 'numeric', 'sex': ['f', 'm']}"
        )
        command.add_argument("--tmax", type=int, default=100, help="last month, above every site's follow-up (default 100)")
        for key in OF_THE_JOB:
            if key != "tmax":
                command.add_argument(f"--{key}", type=literal, help="as of configs/train.json")
    return p


def job_settings(args: argparse.Namespace) -> dict:
    """What the sites are told, from the command line."""
    given = {key: value for key in OF_THE_JOB if (value := getattr(args, key)) is not None}
    names = checked_names([path.stem for path in args.sites] if args.command == "simulate" else args.names)
    told = {key: getattr(args, key) for key in ("recipe", "rounds", "local_epochs", "clinical")}
    return checked_job({**given, **told, "sites": names, "bundle": bundle_digest()})


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    try:
        if args.command == "simulate":
            for folder in simulate(args.sites, args.out, job_settings(args), args.min_sites, args.wait):
                print(folder / "model.pt")
            return
        settings = job_settings(args)
        require_flare()
        flare_job(settings, checked_minimum(args.min_sites, args.names), args.wait).export(str(args.out))
        print(json.dumps({"job": str(args.out / "survival_map"), "allow at each site": EXECUTOR}))
    except InputError as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
