# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Six bundles as those of the MONAI model zoo are written: harmless, and without code of their own."""

from __future__ import annotations

import io
import json

import torch

LOGGING = """[loggers]
keys=root

[handlers]
keys=consoleHandler

[formatters]
keys=fullFormatter

[logger_root]
level=INFO
handlers=consoleHandler

[handler_consoleHandler]
class=StreamHandler
level=INFO
formatter=fullFormatter
args=(sys.stdout,)

[formatter_fullFormatter]
format=%(asctime)s - %(name)s - %(levelname)s - %(message)s
"""
LARGE_FILES = """large_files:
  - path: "models/model_large.pt"
    url: "https://developer.download.nvidia.com/assets/Clara/monai/tutorials/model_zoo/model_x.pt"
    hash_val: "870e677b782a5184cbc48db1456b78e8"
    hash_type: "md5"
"""
DEVICE = "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')"


def metadata(shape: list) -> dict:
    image = {"type": "image", "num_channels": 1, "spatial_shape": shape, "dtype": "float32", "value_range": [0, 1]}
    return {
        "schema": "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json",
        "version": "0.1.0",
        "changelog": {"0.1.0": "first"},
        "monai_version": "1.6.1",
        "pytorch_version": "2.13.0",
        "numpy_version": "2.4.6",
        "required_packages_version": {"nibabel": "5.3.2"},
        "references": ["https://doi.org/10.1000/example"],
        "network_data_format": {"inputs": {"image": image}, "outputs": {"pred": dict(image)}},
    }


def segmentation() -> dict:
    """As spleen_ct_segmentation: globbed files, sliding windows, a checkpoint loader."""
    infer = {
        "imports": ["$import glob", "$import numpy", "$import os"],
        "bundle_root": ".",
        "image_key": "image",
        "output_dtype": "$numpy.float32",
        "load_pretrain": True,
        "dataset_dir": "/workspace/data/Task09",
        "datalist": "$list(sorted(glob.glob(@dataset_dir + '/imagesTs/*.nii.gz')))",
        "device": DEVICE,
        "network_def": {"_target_": "UNet", "spatial_dims": 3, "in_channels": 1, "out_channels": 2, "channels": [8, 16]},
        "network": "$@network_def.to(@device)",
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "LoadImaged", "keys": "@image_key", "reader": "NibabelReader"},
                {"_target_": "EnsureChannelFirstd", "keys": "@image_key"},
                {"_target_": "ScaleIntensityRanged", "keys": "@image_key", "a_min": -57, "a_max": 164},
            ],
        },
        "dataset": {"_target_": "Dataset", "data": "$[{'image': i} for i in @datalist]", "transform": "@preprocessing"},
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1, "num_workers": 4},
        "inferer": {"_target_": "SlidingWindowInferer", "roi_size": [96, 96, 96], "sw_batch_size": 4},
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "Invertd", "keys": "pred", "transform": "@preprocessing", "orig_keys": "@image_key"},
                {"_target_": "AsDiscreted", "keys": "pred", "argmax": True},
                {"_target_": "SaveImaged", "keys": "pred", "output_dir": "$@bundle_root + '/eval'"},
            ],
        },
        "checkpointloader": {
            "_target_": "CheckpointLoader",
            "load_path": "$@bundle_root + '/models/model.pt'",
            "load_dict": {"model": "@network"},
        },
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "val_data_loader": "@dataloader",
            "network": "@network",
            "val_handlers": [{"_target_": "StatsHandler", "iteration_log": False}],
        },
        "initialize": ["$monai.utils.set_determinism(seed=123)", "$setattr(torch.backends.cudnn, 'benchmark', True)"],
        "run": ["$@checkpointloader(@evaluator) if @load_pretrain else None", "$@evaluator.run()"],
    }
    return {"inference.json": infer, "metadata.json": metadata([96, 96, 96])}


def training_on_many_gpus() -> dict:
    """As multi_gpu_train.json, stacked on train.json: ranks, process groups, slices of handlers."""
    train = {
        "imports": ["$import glob", "$import os", "$import ignite"],
        "images": "$list(sorted(glob.glob('/workspace/data/imagesTr/*.nii.gz')))",
        "val_interval": 5,
        "device": DEVICE,
        "network_def": {"_target_": "SegResNet", "in_channels": 1, "out_channels": 2, "blocks_down": [1, 2]},
        "network": "$@network_def.to(@device)",
        "loss": {"_target_": "DiceCELoss", "to_onehot_y": True, "softmax": True},
        "optimizer": {"_target_": "torch.optim.AdamW", "params": "$@network.parameters()", "lr": 1e-4},
        "train": {
            "deterministic_transforms": [{"_target_": "LoadImaged", "keys": ["image", "label"]}],
            "random_transforms": [{"_target_": "RandFlipd", "keys": ["image"], "prob": 0.5}],
            "dataset": {"_target_": "CacheDataset", "data": "$[{'image': i} for i in @images[:-9]]"},
            "preprocessing": {
                "_target_": "Compose",
                "transforms": "$@train#deterministic_transforms + @train#random_transforms",
            },
            "handlers": [
                {
                    "_target_": "StatsHandler",
                    "tag_name": "train_loss",
                    "output_transform": "$monai.handlers.from_engine(['loss'], first=True)",
                },
            ],
            "trainer": {"_target_": "SupervisedTrainer", "max_epochs": 10, "train_handlers": "@train#handlers"},
        },
        "initialize": ["$monai.utils.set_determinism(seed=123)"],
        "run": ["$@train#trainer.run()"],
    }
    several = {
        "device": "$torch.device('cuda:' + os.environ['LOCAL_RANK'])",
        "network": {
            "_target_": "torch.nn.parallel.DistributedDataParallel",
            "module": "$@network_def.to(@device)",
            "device_ids": ["@device"],
        },
        "train#sampler": {"_target_": "DistributedSampler", "dataset": "@train#dataset", "shuffle": True},
        "train#trainer#train_handlers": "$@train#handlers[: -2 if dist.get_rank() > 0 else None]",
        "initialize": [
            "$import torch.distributed as dist",
            "$dist.is_initialized() or dist.init_process_group(backend='nccl')",
            "$torch.cuda.set_device(@device)",
            "$@train#trainer.logger.setLevel(logging.WARNING if dist.get_rank() > 0 else logging.INFO)",
            "$import logging",
        ],
        "finalize": ["$dist.is_initialized() and dist.destroy_process_group()"],
    }
    return {"train.json": train, "multi_gpu_train.json": several, "metadata.json": metadata(["16 * n", "16*n", "2**p"])}


def detection() -> dict:
    """As lung_nodule_ct_detection: a detector put together by expressions, a data list in JSON."""
    infer = {
        "patch": [192, 192, 80],
        "backbone": "$monai.networks.nets.resnet.resnet50(spatial_dims=3, n_input_channels=1, conv1_t_size=[7, 7, 7])",
        "feature_extractor": (
            "$monai.apps.detection.networks.retinanet_network.resnet_fpn_feature_extractor(@backbone, 3, False, [1], None)"
        ),
        "anchors": {
            "_target_": "monai.apps.detection.utils.anchor_utils.AnchorGeneratorWithAnchorShape",
            "base_anchor_shapes": [[6, 8, 4], [8, 6, 5]],
        },
        "detector": {"_target_": "RetinaNetDetector", "network": "@feature_extractor", "anchor_generator": "@anchors"},
        "detector_ops": [
            "$@detector.set_target_keys(box_key='box', label_key='label')",
            "$@detector.set_sliding_window_inferer(roi_size=@patch, overlap=0.25, sw_batch_size=1, mode='constant')",
        ],
        "test_data": "$monai.data.load_decathlon_datalist('LUNA16/fold0.json', data_list_key='validation')[:3]",
        "dataloader": {"_target_": "DataLoader", "dataset": "@test_data", "collate_fn": "$monai.data.utils.no_collation"},
    }
    datalist = {"training": [{"image": "a.nii.gz", "box": [[1.5, 2, 3, 4, 5, 6]], "label": [0]}]}
    return {"inference.json": infer, "metadata.json": metadata([192, 192, "*"]), "datalist.json": datalist}


def classification_in_yaml() -> dict:
    """As the bundles in YAML: aliases of imports, lambdas, a reader by its class."""
    infer = """
imports:
- $import glob
- $import json
- $from functools import partial
- $from pathlib import Path
bundle_root: .
out: "$@bundle_root + '/eval'"
make: "$Path(@out).mkdir(exist_ok=True)"
images: "$json.load(open(@bundle_root + '/configs/list.json'))['images']"
reader: $monai.data.PILReader
load_transform: {_target_: LoadImaged, keys: image, reader: "@reader"}
save: {_target_: SaveImaged, keys: pred, output_dir: "@out"}
network_def: {_target_: DenseNet121, spatial_dims: 2, in_channels: 3, out_channels: 4}
checkpoint: "$torch.load(@bundle_root + '/models/model.pt', map_location='cpu', weights_only=True)"
load: "$@network_def.load_state_dict(@checkpoint)"
head: "$partial(torch.nn.functional.softmax, dim=1)"
post: {_target_: Lambdad, keys: pred, func: "$lambda x: torch.where(x[[1]] > 0.5, 4, x)"}
sampler: {_target_: torch.utils.data.WeightedRandomSampler, weights: "$torch.ones(len(@images))", num_samples: 10}
handlers: [{_target_: ignite.metrics.Accuracy, output_transform: "$monai.handlers.from_engine(['pred', 'label'])"}]
"""
    return {"inference.yaml": infer, "metadata.json": metadata([299, 299])}


def generation() -> dict:
    """As the generative bundles: schedulers, time stamps in the name of a folder, noise."""
    train = {
        "imports": ["$import functools", "$from datetime import datetime", "$import json", "$import pathlib"],
        "run_dir": "$'./results/' + datetime.now().strftime('sample_%Y%m%d_%H%M%S')",
        "meta": "$json.loads(pathlib.Path(@bundle_root + '/configs/metadata.json').read_text())",
        "listed": "$json.load(open(@bundle_root + '/configs/datalist.json', 'r', encoding='utf8'))",
        "bundle_root": ".",
        "net": {"_target_": "monai.networks.nets.diffusion_model_unet.DiffusionModelUNet", "spatial_dims": 3},
        "scheduler": {"_target_": "monai.networks.schedulers.ddim.DDIMScheduler", "num_train_timesteps": 1000},
        "noise": "$torch.randn([1] + [8, 20, 28]).to(@device)",
        "device": DEVICE,
        "optimizer": {"_target_": "torch.optim.Adam", "params": "$@net.parameters()", "lr": 1e-5},
        "lr_scheduler": {"_target_": "torch.optim.lr_scheduler.MultiStepLR", "optimizer": "@optimizer", "milestones": [100]},
        "terminate": "$@trainer.add_event_handler(ignite.engine.Events.EPOCH_STARTED, ignite.handlers.TerminateOnNan())",
        "trainer": {"_target_": "AdversarialTrainer", "g_network": "@net"},
        "initialize": ["$import ignite"],
    }
    return {"train.json": train, "metadata.json": metadata([80, 112, 80]), "datalist.json": {"training": []}}


def pathology() -> dict:
    """As pathology_tumor_detection: whole slides, a list of regions in CSV."""
    train = {
        "imports": ["$import os"],
        "region_size": 768,
        "num_classes": 1,
        "wsi_reader": "WSIReader",
        "dataset": {
            "_target_": "PatchWSIDataset",
            "data": {"_target_": "CSVDataset", "src": "$os.path.join(@bundle_root, 'training.csv')", "col_names": ["image"]},
            "reader": "@wsi_reader",
        },
        "bundle_root": ".",
        "preprocessing": {"_target_": "Lambdad", "keys": "label", "func": "$lambda x: x.reshape((1, *@grid_shape))"},
        "grid_shape": "$[int(@region_size / 256)] * 2",
        "network_def": {"_target_": "TorchVisionFCModel", "model_name": "resnet18", "num_classes": "@num_classes"},
        "patience": "$lambda current, prev: prev < 0 or current < prev",
        "text": '$f"slides of {@region_size} pixels"',
    }
    return {"train.json": train, "metadata.json": metadata([224, 224])}


def weights(script: bool = False) -> bytes:
    """A state dict as torch writes it, or TorchScript."""
    network = torch.nn.Sequential(torch.nn.Conv3d(1, 2, 3), torch.nn.ReLU())
    buffer = io.BytesIO()
    if script:
        torch.jit.save(torch.jit.script(network), buffer)
    else:
        torch.save(network.state_dict(), buffer)
    return buffer.getvalue()


def bundle_files(configs: dict) -> dict[str, bytes]:
    """The files of a bundle with these configs."""
    texts = {name: each if isinstance(each, str) else json.dumps(each, indent=1) for name, each in configs.items()}
    texts = {f"configs/{name}": text for name, text in texts.items()} | {
        "configs/logging.conf": LOGGING,
        "large_files.yml": LARGE_FILES,
        "docs/README.md": "# A bundle\n",
        "docs/data_license.txt": "CC BY 4.0\n",
        "LICENSE": "Apache License\n",
    }
    files = {name: text.encode() for name, text in texts.items()}
    return files | {"models/model.pt": weights(), "models/model.ts": weights(script=True)}


BUNDLES = (segmentation, training_on_many_gpus, detection, classification_in_yaml, generation, pathology)
