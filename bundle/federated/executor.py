# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""A site in an NVIDIA FLARE job. Only this module needs nvflare (requirements-federated.txt)."""

import json
import logging
import os
from pathlib import Path

from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal
from nvflare.app_common.app_constant import AppConstants

from bundle.errors import InputError
from bundle.federated.site import Site, checked_job, kept_at_site

SITES = "SURVIVAL_MAP_SITES"


def own_settings(name: str) -> dict:
    """This site's settings, from the JSON file that the environment names: ``{"NAME": {"cohort": ..., "ckpt_dir": ...}}``.

    Raises:
        InputError: there is no such file, or nothing of this name in it.
    """
    path = os.environ.get(SITES, "")
    if not os.path.isfile(path):
        raise InputError(f"{SITES} is {path!r} (expected a JSON file of this site's cohort and ckpt_dir).")
    found = json.loads(Path(path).read_text())
    if name not in found:
        raise InputError(f"{path} has nothing of the site {name} (found: {', '.join(found)}).")
    return found[name]


class SiteExecutor(Executor):
    """Hands the messages of a FLARE job to a :class:`~bundle.federated.site.Site`, and its answers back.

    The job says no more than this class and plain settings. A hospital allows the class by name in its own FLARE
    resources (`class_allow_list`), and runs no code that the server sends.

    Args:
        settings: of the job, see :func:`~bundle.federated.site.checked_job`.
    """

    def __init__(self, settings: dict) -> None:
        super().__init__()
        self.settings = settings
        self._site: Site | None = None

    def execute(self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal) -> Shareable:
        """Answer a round; what goes wrong is told in the site's own log, and to the server only that something did."""
        if task_name != AppConstants.TASK_TRAIN:
            return make_reply(ReturnCode.TASK_UNKNOWN)
        name, number = fl_ctx.get_identity_name(), shareable.get_header(AppConstants.CURRENT_ROUND)
        try:
            own = own_settings(name)
            with kept_at_site(Path(own["ckpt_dir"]) / "site.log"):
                try:
                    if self._site is None:
                        self._site = Site(name, checked_job(self.settings), own)
                    message, weight = self._site.answer(from_shareable(shareable).data or {}, number)
                except Exception:
                    logging.getLogger(__name__).exception(f"round {number} failed")
                    raise
        except Exception as e:  # its words may be of a patient
            self.log_error(fl_ctx, f"no answer to round {number} ({type(e).__name__}): see site.log in the site's ckpt_dir.")
            return make_reply(ReturnCode.EXECUTION_EXCEPTION)
        self.log_info(fl_ctx, f"answered round {number}.")
        return DXO(DataKind.WEIGHTS, data=message, meta={MetaKey.NUM_STEPS_CURRENT_ROUND: weight}).to_shareable()
