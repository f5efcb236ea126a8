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
# A GPU affords more: the whole corpus several times over in one part, every distilled prompt, drafters from scratch.
python3 - "$work" "$data/functions.jsonl" "${STEPS:-12000}" "${DECAY:-4000}" <<'PY'
import sys, yaml, pathlib
work, functions = map(pathlib.Path, sys.argv[1:3])
steps, decay = map(int, sys.argv[3:])
own = [str(functions)] * functions.exists()
def change(name, **values):
    path = work / f"{name}.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | values))
target = yaml.safe_load((work / "embedded-target.yaml").read_text())
change("embedded-target", output=str(work / "target"), steps=steps, decay=decay, batch=48,
       data=target["data"] + own, mixture=target["mixture"] | {"functions": 2.0})
distill = yaml.safe_load((work / "embedded-distill.yaml").read_text())
change("embedded-distill", mixture={}, dtype="bfloat16", prompts=distill["prompts"][:1] + own)
for name in ("embedded-ctc", "paper"):
    change(name, init=None, dtype="bfloat16", steps=int(steps // 4), decay=int(decay // 4))
PY
run pretrain --config "$work/embedded-target.yaml"
run distill --config "$work/embedded-distill.yaml"
run train --config "$work/embedded-ctc.yaml"
run train --config "$work/paper.yaml"
suite=(--prompts "$data/eval/mt_bench.jsonl" --prompts "$data/eval/gsm8k_test.jsonl" --prompts "$data/eval/humaneval.jsonl" --limit 200)
python3 benchmarks/methods.py table --target "$work/target" --data "$work/distilled.jsonl" --eval "$data/eval" --work "$work/methods" \
  --steps "${METHOD_STEPS:-2000}" --dtype bfloat16 --json "$out/methods.json" --overwrite
for dtype in float32 bfloat16; do
  run bench --target "$work/target" --drafter "$work/ctc" --drafter "$work/paper" "${suite[@]}" \
    --budget 8 --budget 16 --budget 32 --dtype "$dtype" --profile --overwrite --json "$out/bench-$dtype.json"
done
# The engine: passes as CUDA graphs beside eager ones, and real shapes with random weights.
python3 -m pytest -q tests/test_captured.py
pair=(--target "$work/target" --drafter "$work/ctc" --overwrite)
python3 benchmarks/engine.py "${pair[@]}" --prompts "$data"/eval/{mt_bench,gsm8k_test,humaneval}.jsonl --limit 16 --budget 16 --compile --memory \
  --dtype bfloat16 --json "$out/engine.json"
python3 benchmarks/curves.py "${pair[@]}" --dtype bfloat16 --json "$out/curves.json" --figure "$out/step.svg"
python3 benchmarks/curves.py "${pair[@]}" --dtype bfloat16 --compile --budget 16 --json "$out/curves-compiled.json" --figure "$out/step-compiled.svg"
for how in "" --compile; do
  python3 benchmarks/shapes.py --shape ${SHAPES:-vicuna-7b vicuna-13b llama-3.1-8b qwen3-8b} --budget 16 $how --json "$out/shapes$how.json" --overwrite
done
cp "$work"/*.history.json "$work"/target/pretrain.json "$out"/
cp "$work/ctc/model.safetensors" "$out/ctc.safetensors"; cp "$work/paper/model.safetensors" "$out/paper.safetensors"
echo "Result: $out"
