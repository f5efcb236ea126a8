#!/usr/bin/env bash
# The whole experiment on one GPU: train a target, distil, train its drafters, measure. Everything resumes.
#   benchmarks/gpu.sh DATA OUT      DATA holds corpus/ and eval/, and perhaps functions.jsonl of recipes/python_functions.py;
#                                   results and small weights go to OUT
set -euo pipefail
data=$(realpath "$1"); mkdir -p "$2"; out=$(realpath "$2")
cd "$(dirname "$0")/.."
export PYTHONPATH=src PYTHONUNBUFFERED=1
run() { python3 -m ctc_drafter "$@"; }
work=runs/gpu; mkdir -p "$work"
for recipe in embedded-target embedded-distill embedded-ctc paper; do
  sed "s#data/#$data/#g; s#runs/embedded#$work#g" "recipes/$recipe.yaml" > "$work/$recipe.yaml"
done
# A GPU affords more: the whole corpus several times over, and every distilled prompt.
printf 'steps: %s\ndecay: %s\nbatch: 48\n' "${STEPS:-12000}" "${DECAY:-4000}" > "$work/override"
python3 - "$work" "$data/functions.jsonl" <<'PY'
import sys, yaml, pathlib
work, functions = map(pathlib.Path, sys.argv[1:])
recipe = yaml.safe_load((work / "embedded-target.yaml").read_text())
recipe.update(yaml.safe_load((work / "override").read_text()))
if functions.exists():
    recipe["data"].append(str(functions))
    recipe["mixture"]["functions"] = 2.0
(work / "embedded-target.yaml").write_text(yaml.safe_dump(recipe))
distill = yaml.safe_load((work / "embedded-distill.yaml").read_text())
distill.update(limit=0, mixture={})
distill["prompts"] += [str(functions)] * functions.exists()
(work / "embedded-distill.yaml").write_text(yaml.safe_dump(distill))
PY
run pretrain --config "$work/embedded-target.yaml"
run distill --config "$work/embedded-distill.yaml"
run train --config "$work/embedded-ctc.yaml"
run train --config "$work/paper.yaml"
suite=(--prompts "$data/eval/mt_bench.jsonl" --prompts "$data/eval/gsm8k_test.jsonl" --prompts "$data/eval/humaneval.jsonl" --limit 200)
for dtype in float32 bfloat16; do
  run bench --target "$work/target" --drafter "$work/ctc" --drafter "$work/paper" "${suite[@]}" \
    --budget 8 --budget 16 --budget 32 --dtype "$dtype" --profile --overwrite --json "$out/bench-$dtype.json"
done
cp "$work"/*.history.json "$work"/target/pretrain.json "$out"/
cp "$work/ctc/model.safetensors" "$out/ctc.safetensors"; cp "$work/paper/model.safetensors" "$out/paper.safetensors"
echo "Result: $out"
