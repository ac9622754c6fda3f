#!/usr/bin/env bash
# All of it on a fresh machine: installs into .venv, makes a phantom cohort, trains, evaluates the maps against their
# masks, predicts a real chest CT. Run it again and it goes on where it was stopped. Results: runs/quickstart/
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" requirements.txt
out=runs/quickstart

echo "== 1/4 a phantom cohort: chests with fibrosis-like lesions that set the survival time"
python -m scripts.make_phantoms --phantom chest --num 100 --size 96 --seed 0 --jobs "$(getconf _NPROCESSORS_ONLN)" --out "$out/phantoms"

echo "== 2/4 training from survival times alone"
python -m monai.bundle run --config_file configs/train.json \
    --cohort "$out/phantoms/cohort.csv" --ckpt_dir "$out/train" --output_dir "$out/train"

echo "== 3/4 evaluating the maps of held-out scans against their masks"
[ -f "$out/evaluate/report.html" ] && [ "$out/evaluate/report.html" -nt "$out/train/model.pt" ] ||
    python -m monai.bundle run --config_file configs/evaluate.json \
        --cohort "$out/phantoms/cohort.csv" --ckpt "$out/train/model.pt" --output_dir "$out/evaluate"

echo "== 4/4 a real chest CT (demo/README.md says where it is from)"
[ -f "$out/inference/report.html" ] && [ "$out/inference/report.html" -nt "$out/train/model.pt" ] ||
    python -m monai.bundle run --config_file configs/inference.json \
        --image demo/chest_ct.nii.gz --ckpt "$out/train/model.pt" --output_dir "$out/inference"

python - "$out/evaluate/metrics.json" <<'PY'
import json, sys
from bundle.handlers.metrics_writer import format_metrics_table
print(format_metrics_table(json.load(open(sys.argv[1]))))
PY
echo
echo "evaluation: $PWD/$out/evaluate/report.html"
echo "report:     $PWD/$out/inference/report.html"
echo "heat map:   $PWD/$out/inference/maps/chest_ct_heat.nii.gz (opens on top of demo/chest_ct.nii.gz in any viewer)"
