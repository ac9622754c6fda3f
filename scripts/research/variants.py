# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""What the sweep trains and measures: single differences from the shipped configuration, by name."""

import numpy as np

from bundle.survival import OBJECTIVES

# Overrides of keys of configs/train.json; beside them "config" are files stacked on top, "phantoms" options of
# scripts.make_phantoms, and "shuffle" deals the outcomes out at random. `monai.bundle run` ignores a None; "$None" is one.
VARIANTS: dict[str, dict] = {
    "default": {},
    # heads
    "softmin": {"network_def#head": "softmin"},
    "attention": {"network_def#head": "attention"},
    "hazard": {"network_def#head": "hazard"},
    "mean": {"network_def#head": "mean", "severity": False},
    # objectives
    **{name: {"config": [f"configs/objective/{name}.json"]} for name in OBJECTIVES if name != "centime"},
    # regularisers and schedules
    "no_entropy": {"loss#entropy": 0.0},
    "entropy_1": {"loss#entropy": 1.0},
    "no_smoothness": {"loss#smoothness": 0.0},
    "smoothness_0.3": {"loss#smoothness": 0.3},
    "occlusion_0.1": {"loss#occlusion": 0.1},
    "occlusion_1": {"loss#occlusion": 1.0},
    "no_ease": {"train#regularisers#vc_kwargs#gamma": 1.0},
    "anneal": {"config": ["configs/schedule/beta.json"], "train#beta_schedule#vc_kwargs#start": 0.15},
    "anneal_to_8": {
        "config": ["configs/schedule/beta.json"],
        "train#beta_schedule#vc_kwargs#start": 0.1 / 8,
        "network_def#beta": 8.0,
    },
    "fixed_steep": {"network_def#beta": 5.0},
    "learn_beta": {"network_def#learn_beta": True},
    "no_warmup": {"lr_scheduler#warmup_steps": 0},
    "epochs_10": {"max_epochs": 10},
    "one_origin": {"train#random_transforms#0#prob": 0.0},
    "no_balance": {"train#dataloader#sampler": "$None", "train#dataloader#shuffle": True},
    # locations and how sure they are
    "range_-30": {"network_def#loc_range": [-30, 120]},
    "alpha_5": {"objective#alpha_censored": 5.0},
    "alpha_10": {"objective#alpha_censored": 10.0},
    "variance_9": {"objective#variance": 9.0},
    "variance_100": {"objective#variance": 100.0},
    "variance_144": {"objective#variance": 144.0},
    "variance_169": {"objective#variance": 169.0},
    "learn_variance": {"objective#learn_variance": True},
    # receptive field and patches
    "no_window": {"network_def#window": 1},
    "window_4": {"network_def#window": 4},
    "global": {"network_def#window": 0, "network_def#patch_size": 8},
    "film_context": {"network_def#film_context": True},
    "patch_8": {"network_def#patch_size": 8},
    "overlap_50": {"network_def#overlap": 0.5, "network_def#patch_size": 8},
    "head_layers_2": {"network_def#head_layers": 2},
    "center_tokens": {"network_def#center_tokens": True},
    # what the network sees
    "no_texture": {"network_def#texture": False},
    "one_hu_window": {"narrow_hu_window": "$None"},
    "flips": {  # each scan in a random one of the 48 ways to lay a cube
        "train#preprocessing#transforms": "$@load_transforms"
        " + [monai.transforms.RandFlipd(['image', 'lung'], 0.5, axis) for axis in range(3)]"
        " + [monai.transforms.RandRotate90d(['image', 'lung'], 0.75, 3, a) for a in ((0, 1), (0, 2), (1, 2))]"
        " + @train#random_transforms"
    },
    # cohorts
    "clinical": {"phantoms": {"clinical": ""}, "config": ["configs/clinical/fibrosis.json"]},
    "clinical_only": {
        "phantoms": {"clinical": ""},
        "config": ["configs/clinical/fibrosis.json", "configs/network/clinical_only.json"],
    },
    "events_10": {"phantoms": {"feature_fraction": 0.1}},
    "events_10_as_drawn": {"phantoms": {"feature_fraction": 0.1}, "train#sampler#min_event_share": 0.0},
    "events_30": {"phantoms": {"feature_fraction": 0.3}},
    "events_70": {"phantoms": {"feature_fraction": 0.7}},
    "events_90": {"phantoms": {"feature_fraction": 0.9}},
    "events_90_alpha_5": {"phantoms": {"feature_fraction": 0.9}, "objective#alpha_censored": 5.0},
    "radius_2": {"phantoms": {"sphere_radius": "2 3"}},
    "radius_4": {"phantoms": {"sphere_radius": "4 5"}},
    "radius_7": {"phantoms": {"sphere_radius": "7 8"}},
    # with room for what they are to say: a lesion that kills at 40 months and is 1/500 of the scan must lie below 0
    "radius_4_range_-30": {"phantoms": {"sphere_radius": "4 5"}, "network_def#loc_range": [-30, 120]},
    "contrast_1": {"phantoms": {"contrast": 1.0}},  # of faint-spheres, in units of the noise; 2 by default
    "contrast_0.5": {"phantoms": {"contrast": 0.5}},
    "shuffled_outcomes": {"shuffle": True},  # a negative control
}

# What is measured of one training: other phantoms, moved phantoms, or other options of configs/evaluate.json.
TESTS: dict[str, dict] = {
    "same": {},
    "severity_off": {"options": {"inferer#severity": "$None"}},
    "no_refinement": {"options": {"refine": False}},
    "one_grid": {"options": {"refine": False, "shifts": 1}},
    "flip": {"move": lambda volume: volume[::-1]},
    "shift": {"move": lambda volume: np.pad(volume, [(7, 0), (5, 0), (3, 0)], "reflect")[:-7, :-5, :-3]},
    "noise_x2": {"phantoms": {"noise": 0.4}},
    "contrast_80": {"phantoms": {"bright": 16.0, "noise": 0.16}},
    "contrast_120": {"phantoms": {"bright": 24.0, "noise": 0.24}},
    "size_64": {"phantoms": {"size": 64}},
    "size_96": {"phantoms": {"size": 96}},
}
