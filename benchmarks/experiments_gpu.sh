#!/usr/bin/env bash
# AdamW against the Muon pack at the size of GPT-2 124M on one GPU, each tuned over three learning rates, then the best
# of both with three seeds; the same command again resumes after a stop.
#
#   benchmarks/experiments_gpu.sh DATASET runs/experiments-gpu [MAX_STEPS [FLAGS OF THE RECIPE …]]
#
# Sized for 15 minutes of an H100: 10 runs of MAX_STEPS (default: 300) steps of 65,536 tokens are 197M tokens. They take
# 7.0 minutes at llm.c's 468k tokens/s, and about 40 s per run to start and compile. DATASET is a prepared dataset with
# GPT-2's tokenizer (python -m gpt2repro.data.prepare). The last table compares the two by seed; optimizers.png has
# their curves. `make bench BENCH="--only optimizers --dataset DATASET --minutes 15"` runs this within a time limit.
set -eu
dataset=$(realpath -m "$1") out=$(realpath -m "$2") steps=${3:-300} flags=("${@:4}")
python=${PYTHON:-.venv/bin/python}
cd "$(dirname "$0")/.."

sweep() { # NAME ARGUMENTS …
    local name=$1
    shift
    echo "== $name"
    "$python" -m gpt2repro.tools.sweep recipes/gpt2-124m-10b.yaml --output "$out/$name" --source null \
        --tokenizer null --dataset_dir "$dataset" --global_batch_tokens 65536 --micro_batch_size 32 \
        --max_steps "$steps" --save_every "$steps" --keep_last 1 --sample_every 0 --schedule wsd_linear \
        --decay_ratio 0.7 --min_lr_ratio 0 --eval_tasks --eval_every 25 --eval_tokens 327680 "${flags[@]}" "$@" || [ $? -eq 1 ]
}

best() { # NAME FIELD: the value with the lowest mean loss
    "$python" - "$out/$1/sweep.json" "$2" <<'PYTHON'
import json, sys
results = [result for result in json.load(open(sys.argv[1])) if result["mean"] is not None]
print(min(results, key=lambda result: result["mean"])["setting"][sys.argv[2]])
PYTHON
}

warmup=(--warmup_steps $((steps / 20)))
sweep adamw-rates --set learning_rate=6e-4,1.2e-3,2.4e-3 "${warmup[@]}"
LEARNING_RATE=$(best adamw-rates learning_rate)
pack=(--optimizer muon --muon_split_qkv true --muon_normalise_rows true --muon_cautious_decay true --warmup_steps 0)
pack+=(--learning_rate "$LEARNING_RATE")
sweep muon-rates --set muon_learning_rate=2.4e-3,4.8e-3,9.6e-3 "${pack[@]}"
MUON_LEARNING_RATE=$(best muon-rates muon_learning_rate)

# ---- the best of both with two more seeds each, and one picture --------------------------------------------------
sweep adamw --set "learning_rate=$LEARNING_RATE" --set seed=1338,1339 "${warmup[@]}"
sweep muon --set "muon_learning_rate=$MUON_LEARNING_RATE" --set seed=1338,1339 "${pack[@]}"
"$python" - "$out" "$LEARNING_RATE" "$MUON_LEARNING_RATE" <<'PYTHON'
import json
import sys
from pathlib import Path

from gpt2repro.tools.sweep import draw, table

out, results = Path(sys.argv[1]), []
for name, label, rate in ("adamw", "AdamW", sys.argv[2]), ("muon", "Muon pack", sys.argv[3]):
    together = {"setting": {"optimizer": label}, "seeds": [], "losses": [], "curves": [], "std": None}
    for folder in f"{name}-rates", name:
        for result in json.loads((out / folder / "sweep.json").read_text()):
            if rate in result["setting"].values():
                for key in "seeds", "losses", "curves":
                    together[key] += result[key]
    together["mean"] = sum(together["losses"]) / len(together["losses"])
    results.append(together)
print(table(results))
draw(results, out / "optimizers.png")
PYTHON
