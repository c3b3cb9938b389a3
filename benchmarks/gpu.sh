#!/usr/bin/env bash
# What to run where a GPU is to be had for minutes, some twenty on one of 80 GB:
#   benchmarks/gpu.sh [FILE [check] [train_step] [sampling]]
# writes FILE (runs/gpu.md), Markdown to append to RESULTS.md, and beside it FILE.log: all parts, or those named, each
# of ten minutes at most. Nothing is downloaded. What the machine lacks (vLLM, TRL, a package) leaves out its part with
# a sentence. PYTHON names the interpreter. On a CPU it shows with a tiny model that all of it works.
set -uo pipefail
parts=${*:2}
file=$(realpath -m "${1:-$(dirname "$0")/../runs/gpu.md}")
cd "$(dirname "$0")/.." && mkdir -p runs "$(dirname "$file")"
python=${PYTHON:-python3}
[ -x .venv/bin/python ] && python=${PYTHON:-.venv/bin/python}
scratch=$(mktemp -d runs/gpu-XXXX)
trap 'rm -rf "$scratch"' EXIT
export PYTHONPATH="$PWD:$PWD/benchmarks" HF_HUB_OFFLINE=1

has() { "$python" -c "import $1" 2>/dev/null; }

# part TITLE MODULE COMMAND...: what a command prints, or why there is nothing
part() {
    local title=$1 lacks began=$SECONDS
    [[ " ${parts:-$title} " = *" $title "* ]] || return
    echo "gpu: $title" >&2
    if ! lacks=$("$python" -c "import $2" 2>&1); then
        printf '%s was left out: %s.\n\n' "$title" "${lacks##*$'\n'}" >>"$file"
        return
    fi
    if ! timeout 540 "${@:3}" >>"$file" 2>>"$file.log"; then
        printf '\n%s failed or took too long; its log ends with: %s\n' "$title" "$(tail -n 1 "$file.log")" >>"$file"
    fi
    printf '\n(%s: %d s)\n\n' "$title" $((SECONDS - began)) >>"$file"
}

shape=FULL on_cpu=() quick=()
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    shape=TINY quick=(--quick)
    on_cpu=(--trainer.accelerator cpu --trainer.strategy auto --trainer.precision 32-true
        --data.sampling.max_tokens 16 --data.evaluation.sampling.max_tokens 16)
fi
"$python" - "$shape" "$scratch/model" <<'END' || exit
import sys

import train_step
from sampling import paper_tokenizer

config = train_step.config_of(getattr(train_step, sys.argv[1]))
config.dtype, config.max_position_embeddings = "bfloat16", 4096
config.save_pretrained(sys.argv[2])
paper_tokenizer().save_pretrained(sys.argv[2])
END

printf '## `benchmarks/gpu.sh`\n\n' >"$file"
: >"$file.log"
nvidia-smi --query-gpu=name,memory.total,driver_version,power.limit --format=csv,noheader >>"$file" 2>/dev/null
echo >>"$file"

# The whole program, under FSDP on one device: memory, rates, swaps, resume, and whether draws depend on the batch.
sampler=VLLMSampler
has vllm || sampler=TransformersSampler
part check stasc.command_line.cli "$python" -m stasc check --random_weights --config configs/qwen_eif.yaml \
    --model.base "$scratch/model" --run_dir "$scratch/run" --trainer.devices 1 --sampler $sampler \
    --data.train data.DemoQuestions --data.test data.DemoQuestions ${on_cpu[@]+"${on_cpu[@]}"}

# A training step: prefix sharing against padded rows, flex against sdpa, FSDP, and TRL.
trl=()
has trl && trl=(--trl "$python")
part train_step stasc.training.module "$python" benchmarks/train_step.py --repeats 3 \
    ${trl[@]+"${trl[@]}"} ${quick[@]+"${quick[@]}"}

# Sampling: ours against bare vLLM.
part sampling vllm "$python" benchmarks/sampling.py --quick

cat "$file"
