# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Write the network of trained weights as ONNX, and check with onnxruntime that it gives the same maps.

    python -m scripts.export_onnx --ckpt runs/mine/model.pt --out model.onnx

It takes one scan of any size: `image` and `lung`, float32 (1, 1, D, H, W), as the config's preprocessing leaves them, and
`clinical`, (1, K), if the weights use covariates. It gives `map`, as the network does; what inference does around the
network (finer grid, smoothing, severity, months) is not in it. A voxel of codebooks that lies between two words may take
the other by rounding, and its surroundings then differ a little. Needs `pip install -r requirements-onnx.txt`.
"""

import argparse
import logging
import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from bundle.errors import InputError
from bundle.files import write_atomically
from bundle.networks import CodebookNet
from bundle.networks.dense import dense
from bundle.run import TrainedModel

TOLERANCE = 1e-4  # of the largest value of a channel, and of the patient's months
BETWEEN_WORDS = 1e-2  # of voxels around one that takes another word


def scan_of(network: nn.Module, size: list[int], seed: int) -> dict[str, Tensor]:
    """Noise, a lung of part of it, and covariates if the network has any: inputs by name."""
    generator = torch.Generator().manual_seed(seed)
    image, lung = torch.rand(1, 1, *size, generator=generator), torch.zeros(1, 1, *size)
    inside = torch.rand(1, 1, *(n - k for n, k in zip(size, (3, 3, 2))), generator=generator) > 0.1
    lung[:, :, 1:-2, 2:-1, 1:-1] = inside.float()
    clinical = {"clinical": torch.rand(1, network.clinical_dim, generator=generator)} if network.clinical_dim > 0 else {}
    return {"image": image, "lung": lung, **clinical}


def export_onnx(network: nn.Module, path: Path) -> tuple[float, float]:
    """Write a network as ONNX.

    Returns:
        The largest difference of a voxel, and of the patient's months, in onnxruntime, as shares of the largest value: of
        scans of two sizes that the export has not seen.

    Raises:
        InputError: the packages are missing, the network has no such form, or the maps are others.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  torch writes ONNX with it
    except ImportError as e:
        raise InputError(f"{e.name} is not installed: pip install -r requirements-onnx.txt.") from e
    form, inputs = dense(network.eval()).eval(), scan_of(network, [24, 28, 20], seed=0)
    any_size = dict.fromkeys((2, 3, 4), torch.export.Dim.DYNAMIC)
    sizes = {name: any_size if name != "clinical" else None for name in inputs}

    def save(temporary: Path) -> None:
        # unoptimised: the optimiser takes small numbers, which keep a square root from 0, for 0
        torch.onnx.export(
            form, (), str(temporary), kwargs=inputs, input_names=list(inputs), output_names=["map"], dynamo=True,
            dynamic_shapes=sizes, external_data=False, optimize=False, verbose=False,
        )  # fmt: skip
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors
        session = onnxruntime.InferenceSession(temporary.read_bytes(), options)
        for seed, size in enumerate(([17, 33, 18], [30, 16, 21]), 1):
            scan = scan_of(network, size, seed)
            with torch.no_grad():
                expected = network(**scan)
            found = torch.from_numpy(session.run(None, {name: value.numpy() for name, value in scan.items()})[0])
            scale = expected.abs().amax((0, 2, 3, 4)).clamp_min(1e-12)
            voxels.append(float(((found - expected).abs().amax((0, 2, 3, 4)) / scale).max()))
            months.append(float(((found[:, 0] * found[:, -1] - expected[:, 0] * expected[:, -1]).sum() / scale[0]).abs()))
            if not (voxels[-1] <= most and months[-1] <= TOLERANCE):
                what = f"voxels by {voxels[-1]:.1e} and months by {months[-1]:.1e}"
                raise InputError(f"onnxruntime gives others, {what} (expected within {most:g} and {TOLERANCE:g}).")

    voxels, months = [], []
    most = BETWEEN_WORDS if isinstance(network, CodebookNet) else TOLERANCE
    write_atomically(path, save)
    return max(voxels), max(months)


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(
        prog="python -m scripts.export_onnx", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--ckpt", type=Path, default=Path("models/model.pt"), metavar="PT", help="weights (models/model.pt)")
    p.add_argument("--out", type=Path, required=True, metavar="ONNX", help="file to write")
    args = p.parse_args(argv)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    try:
        voxels, months = export_onnx(TrainedModel(str(args.ckpt)).network, args.out)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        logging.disable(logging.NOTSET)
    print(f"{args.out}: as the network, voxels within {voxels:.1e} and months within {months:.1e} of the largest value")


if __name__ == "__main__":
    main()
