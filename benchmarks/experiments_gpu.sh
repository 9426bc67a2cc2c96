#!/usr/bin/env bash
# AdamW, tuned over four learning rates, against Muon at the size of GPT-2 124M on one GPU; the same command again
# resumes after a stop.
#
#   benchmarks/experiments_gpu.sh 'path/to/corpus/train-*.jsonl.zst' TOKENIZER runs/experiments-gpu [MAX_STEPS]
#
# Sized for 20 minutes of an H100: 14 runs of MAX_STEPS (default: 300; three of them 225) steps of 65,536 tokens are 261M
# tokens. They take 9.3 minutes at llm.c's 468k tokens/s, and about 40 s per run to start and compile. TOKENIZER is a
# folder or a Hub id with GPT-2's tokenizer.
set -eu
corpus=$(realpath -m "$1") tokenizer=$(realpath -m "$2") out=$(realpath -m "$3") steps=${4:-300}
python=${PYTHON:-.venv/bin/python}
cd "$(dirname "$0")/.."

if [ ! -e "$out/corpus/dataset.json" ]; then
    "$python" -m gpt2repro.data.prepare --source files --files "$corpus" --tokenizer "$tokenizer" --fast \
        --out "$out/corpus"
fi

sweep() { # NAME ARGUMENTS …
    local name=$1
    shift
    echo "== $name"
    "$python" -m gpt2repro.tools.sweep recipes/gpt2-124m-10b.yaml --output "$out/$name" --source null \
        --tokenizer null --dataset_dir "$out/corpus" --global_batch_tokens 65536 --micro_batch_size 32 \
        --max_steps "$steps" --warmup_steps $((steps / 20)) --save_every "$steps" --keep_last 1 --sample_every 0 \
        --eval_tasks --eval_every 25 --eval_tokens 327680 "$@" || [ $? -eq 1 ]
}

best() { # NAME FIELD: the value with the lowest mean loss
    "$python" - "$out/$1/sweep.json" "$2" <<'PYTHON'
import json, sys
results = [result for result in json.load(open(sys.argv[1])) if result["mean"] is not None]
print(min(results, key=lambda result: result["mean"])["setting"][sys.argv[2]])
PYTHON
}

sweep adamw --set learning_rate=6e-4,1.2e-3,2.4e-3,4.8e-3
LEARNING_RATE=$(best adamw learning_rate)
sweep muon --set muon_learning_rate=1.2e-3,2.4e-3,4.8e-3 --optimizer muon --learning_rate "$LEARNING_RATE"
MUON_LEARNING_RATE=$(best muon muon_learning_rate)
muon=(--optimizer muon --muon_learning_rate "$MUON_LEARNING_RATE")

# ---- the best of both with three seeds, and Muon with three quarters of the tokens -----------------------------
for name in adamw muon; do
    cp "$out/$name/sweep.json" "$out/$name/rates.json"
done
sweep adamw --set "learning_rate=$LEARNING_RATE" --seeds 3
sweep muon --set "muon_learning_rate=$MUON_LEARNING_RATE" --seeds 3 --optimizer muon --learning_rate "$LEARNING_RATE"
sweep muon-fewer-tokens --set "max_steps=$((steps * 3 / 4))" --seeds 3 --learning_rate "$LEARNING_RATE" "${muon[@]}"
