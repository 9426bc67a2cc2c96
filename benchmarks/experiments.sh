#!/usr/bin/env bash
# Every experiment of docs/experiments.md, one after another; the same command again resumes after a stop.
#
#   benchmarks/experiments.sh 'path/to/corpus/train-*.jsonl.zst' runs/experiments [MAX_STEPS]
#
# Sized for two CPU cores: 50 runs of recipes/corpus-small.yaml take 160 minutes of processor time. A run has MAX_STEPS
# (default: 300) steps of 4,096 tokens. JOBS (default: 2) runs at a time have one thread each: 7,300 tokens/s each in bf16
# on an AMD EPYC, together 27 % more than one run on both cores. Every sweep has a folder with sweep.json, sweep.png and a
# log beside every run. LEARNING_RATE and MUON_LEARNING_RATE are the best values of the first two sweeps.
set -eu
corpus=$(realpath -m "$1") out=$(realpath -m "$2") steps=${3:-300}
python=${PYTHON:-.venv/bin/python}
cd "$(dirname "$0")/.."
mkdir -p "$out"

# ---- the data: one vocabulary for all runs, and a part that the steps read twice -------------------------------
if [ ! -e "$out/corpus/dataset.json" ]; then
    "$python" -m gpt2repro.data.prepare --source files --files "$corpus" --tokenizer train:4096 --fast \
        --out "$out/corpus"
fi
if [ ! -e "$out/corpus-part/dataset.json" ]; then
    "$python" -m gpt2repro.data.prepare --source files --files "$corpus" --tokenizer "$out/corpus" --fast \
        --part "0/$((22000 / steps))" --val-fraction 0.06 --out "$out/corpus-part"
fi

# ---- the initial weights of the ablation: with and without the scaled residual projections --------------------
if [ ! -e "$out/init/plain/config.json" ]; then
    "$python" - "$out" <<'PYTHON'
import sys
from pathlib import Path

from gpt2repro.data.shards import open_dataset
from gpt2repro.hub.initial import initial_model
from gpt2repro.recipe_parser import parse_recipe

out = Path(sys.argv[1])
recipe, dataset = parse_recipe(["--recipe", "recipes/corpus-small.yaml"], default=""), open_dataset(out / "corpus")
model = initial_model(recipe, vocab_size=dataset.vocab_size, eot_id=dataset.eot_id)
model.save_pretrained(out / "init" / "scaled")
for name, parameter in model.named_parameters():
    if name.endswith("c_proj.weight"):
        parameter.data.mul_((2 * model.config.n_layer) ** 0.5)
model.save_pretrained(out / "init" / "plain")
PYTHON
fi

sweep() { # NAME ARGUMENTS …
    local name=$1
    shift
    echo "== $name"
    "$python" -m gpt2repro.tools.sweep recipes/corpus-small.yaml --output "$out/$name" --source null --files \
        --tokenizer null --dataset_dir "$out/corpus" --max_steps "$steps" --save_every "$steps" --jobs "${JOBS:-2}" "$@" || [ $? -eq 1 ]
}

best() { # NAME FIELD: the value with the lowest mean loss
    "$python" - "$out/$1/sweep.json" "$2" <<'PYTHON'
import json, sys
results = [result for result in json.load(open(sys.argv[1])) if result["mean"] is not None]
print(min(results, key=lambda result: result["mean"])["setting"][sys.argv[2]])
PYTHON
}

# ---- AdamW, tuned; Muon, tuned, at the same tokens and at three quarters of them -------------------------------
sweep adamw --set learning_rate=1e-3,2e-3,4e-3,8e-3 --seeds 3
LEARNING_RATE=$(best adamw learning_rate)
sweep muon --set muon_learning_rate=2e-3,4e-3,8e-3 --seeds 3 --optimizer muon --learning_rate "$LEARNING_RATE"
MUON_LEARNING_RATE=$(best muon muon_learning_rate)
shorter=$((steps * 3 / 4))
sweep muon-fewer-tokens --set "max_steps=$shorter" --seeds 3 --optimizer muon --learning_rate "$LEARNING_RATE" \
    --muon_learning_rate "$MUON_LEARNING_RATE"

# ---- the schedule after the warm-up; cosine is the best AdamW above --------------------------------------------
sweep schedules --set schedule=wsd_linear,wsd_sqrt --seeds 3 --learning_rate "$LEARNING_RATE"

# ---- the order of the data -------------------------------------------------------------------------------------
sweep order --set shuffle=false --seeds 3 --learning_rate "$LEARNING_RATE"
sweep epochs --set shuffle=true,false --seeds 3 --learning_rate "$LEARNING_RATE" --dataset_dir "$out/corpus-part"

# ---- a padded embedding; the initialisation --------------------------------------------------------------------
sweep padded --set vocab_size=4224 --seeds 3 --learning_rate "$LEARNING_RATE"
sweep init --set "init_from=$out/init/scaled,$out/init/plain" --seeds 3 --learning_rate "$LEARNING_RATE"

# ---- accumulation: the same global batch in other micro batches ------------------------------------------------
sweep accumulation --set micro_batch_size=16,4 --learning_rate "$LEARNING_RATE" --max_steps $((steps / 5)) \
    --save_every $((steps / 5)) --warmup_steps 5

# ---- one picture of the optimizers: the best AdamW, the best Muon, Muon with fewer tokens ----------------------
"$python" - "$out" <<'PYTHON'
import json
import sys
from pathlib import Path

from gpt2repro.tools.sweep import draw

out, curves = Path(sys.argv[1]), []
for folder, name in ("adamw", "AdamW"), ("muon", "Muon"), ("muon-fewer-tokens", "Muon, three quarters of the tokens"):
    results = [result for result in json.loads((out / folder / "sweep.json").read_text()) if result["mean"] is not None]
    curves.append(min(results, key=lambda result: result["mean"]) | {"setting": {"optimizer": name}})
draw(curves, out / "optimizers.png")
PYTHON
