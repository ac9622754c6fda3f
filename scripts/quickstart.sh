#!/usr/bin/env bash
# All of it on a fresh machine: installs into .venv, puts known disease into six real chests, learns from the survival times
# of 100 scans of five of them, measures its maps on the sixth, predicts a scan of it beside the truth, and a real patient.
# Run it again and it goes on where it was stopped. Results: runs/quickstart/
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" requirements.txt
out=runs/quickstart
unseen=lidc-idri_0350 # the chest that no training sees

echo "== 1/4 a cohort: real chests with implanted disease like fibrosis, of which patients die sooner"
python -m scripts.make_implants --backgrounds demo/anatomies.csv --disease fibrosis --num 120 --test_share 0.1667 \
    --test_anatomies "$unseen" --seed 0 --jobs "$(getconf _NPROCESSORS_ONLN)" --out "$out/implants"

echo "== 2/4 training from survival times alone"
python -m monai.bundle run --config_file configs/train.json \
    --cohort "$out/implants/cohort.csv" --ckpt_dir "$out/train" --output_dir "$out/train"

echo "== 3/4 evaluating the maps of 20 scans of the unseen chest against the implanted disease"
[ -f "$out/evaluate/report.html" ] && [ "$out/evaluate/report.html" -nt "$out/train/model.pt" ] ||
    python -m monai.bundle run --config_file configs/evaluate.json \
        --cohort "$out/implants/cohort.csv" --ckpt "$out/train/model.pt" --output_dir "$out/evaluate"

echo "== 4/4 predicting: of the unseen chest the scan whose map is neither good nor bad, and a real patient (demo/README.md)"
python - "$out" <<'PY'
import sys
from pathlib import Path
import pandas as pd
from scripts.implant_test import middle_scan
out = Path(sys.argv[1])
scans = pd.read_csv(out / "implants/cohort.csv", index_col="patient_id")
row = scans.loc[[middle_scan(out / "evaluate")], ["image", "lung_mask"]].map(lambda name: f"implants/{name}")
row.loc["chest_ct", "image"] = Path("demo/chest_ct.nii.gz").resolve()
row.to_csv(out / "predicted.csv")
PY
[ -f "$out/inference/report.html" ] && [ "$out/inference/report.html" -nt "$out/train/model.pt" ] ||
    python -m monai.bundle run --config_file configs/inference.json \
        --cohort "$out/predicted.csv" --ckpt "$out/train/model.pt" --output_dir "$out/inference"

python - "$out" <<'PY'
import json, sys
from pathlib import Path
import pandas as pd
from bundle.handlers.metrics_writer import format_metrics_table
from scripts.implant_test_report import draw_examples
out = Path(sys.argv[1])
name = pd.read_csv(out / "predicted.csv").patient_id[0]
files = [out / f"implants/images/{name}.nii.gz", out / f"implants/masks/{name}_gt.nii.gz"]
picture = draw_examples([("a chest never seen: disease outlined, heat", *files, out / f"inference/maps/{name}_heat.nii.gz")])
(out / "heat_beside_truth.png").write_bytes(picture)
print(format_metrics_table(json.load(open(out / "evaluate/metrics.json"))))
PY
echo
echo "heat beside the truth: $PWD/$out/heat_beside_truth.png"
echo "evaluation:            $PWD/$out/evaluate/report.html"
echo "report:                $PWD/$out/inference/report.html"
echo "heat map:              $PWD/$out/inference/maps/chest_ct_heat.nii.gz (opens on top of demo/chest_ct.nii.gz in any viewer)"
