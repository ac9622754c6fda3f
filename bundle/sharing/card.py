# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""The model card, `docs/README.md` of a bundle, from what a run left."""

from typing import Any

import pandas as pd

from bundle.metrics.verdict import doubtful, in_words
from bundle.report import metric_groups

DOUBTS = """Do not believe a map if

- the verdict above is `no` or `unsure`, or the scan's `familiarity` is near 0;
- the model was not tested on patients like yours, or its C-index there is no better than that of clinical
  covariates alone;
- heat lies in both hila, along the edge of the lung mask, or evenly over the lung;
- the lung mask is wrong: outside it nothing can be found;
- `message` in `predictions.csv` has a warning: thick slices, cut lungs, metal, motion.

A map shows what the model used, not what causes death. If the predicted times are wrong, it means nothing."""


def model_card(
    settings: dict, metadata: dict, data: str, history: pd.DataFrame | None, metrics: dict[str, Any] | None
) -> str:
    """Markdown.

    Args:
        settings, metadata: of the model and the bundle.
        data: what the packer says of the training data.
        history: of the training, one row an epoch.
        metrics: of an evaluation, as in `metrics.json`.
    """
    patients = len(settings["trained_on"])
    clinical = ", ".join((settings["clinical"] or {}).get("columns", {})) or "none"
    training = [f"- {patients} patients in training and validation." if patients else "- How many patients: not recorded."]
    training += [f"- Clinical covariates: {clinical}.", *_training(settings, history)]
    parts = [
        f"# {metadata['name']} {metadata['version']}",
        f"{metadata['description']}.",
        f"**Intended use:** {metadata['intended_use']}.",
        "## Training data",
        data or "The packer did not describe them.",
        "Their licence: [data_license.txt](data_license.txt).",
        "## What the training showed",
        "\n".join(training),
        "## Measured",
        _measured(metrics),
        "## Where not to trust it",
        DOUBTS,
        "## Settings",
        _settings(settings),
        "## Use",
        "Look at the bundle first, from a copy of Survival Map that you trust:",
        f"```bash\npython -m scripts.share install {metadata['name'].lower().replace(' ', '_')}.zip --out DIR\n"
        "python -m scripts.share try DIR\ncd DIR && python -m monai.bundle run --config_file configs/inference.json "
        "--image scan.nii.gz --output_dir out\n```",
        f"Made with MONAI {metadata['monai_version']}, PyTorch {metadata['pytorch_version']}, "
        f"NumPy {metadata['numpy_version']}. Code: Apache-2.0.",
    ]
    return "\n\n".join(parts) + "\n"


def _training(settings: dict, history: pd.DataFrame | None) -> list[str]:
    lines = []
    if learnt := settings.get("learnt"):
        words = in_words(learnt)
        lines.append(f"- {words[0].upper()}{words[1:]}.")
        if doubtful(learnt):
            lines.append("- **Do not use its predictions or maps for anything but tests of the software.**")
    else:
        lines.append("- Whether it learnt anything was not tested.")
    if history is not None and len(history):
        best = {name: history[name].max() for name in ("val_log_likelihood", "val_c_index") if name in history}
        text = ", ".join(f"{name.removeprefix('val_').replace('_', '-')} {value:.3f}" for name, value in best.items())
        lines.append(f"- {len(history)} epochs; best on validation scans: {text}." if text else f"- {len(history)} epochs.")
    return lines


def _measured(metrics: dict[str, Any] | None) -> str:
    if metrics is None:
        return "Nothing was measured on scans that the model had not seen (no `metrics.json` beside the weights)."
    lines = ["| metric | value | 95 % interval | scans |", "|---|---|---|---|"]
    for title, counts, entries in metric_groups(metrics):
        lines.append(f"| **{title}** {', '.join(counts)} | | | |")
        for name, entry in entries.items():
            value, low, high = (_number(entry.get(key)) for key in ("value", "lower", "upper"))
            lines.append(f"| `{name}` | {value} | {low} to {high} | {entry.get('num_scans', '')} |")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _settings(settings: dict) -> str:
    rows = [("horizon", f"{settings['horizon']} months")]
    for part in ("network", "objective", "preprocessing"):
        for name, value in settings[part].items():
            text = str(value)
            rows.append((f"{part}: {name}", text if len(text) <= 60 else f"{len(value)} values"))
    return "\n".join(["| setting | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])
