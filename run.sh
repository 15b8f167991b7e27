#!/usr/bin/env bash
# bash run.sh                 environment, then stages 01 to 06 on the embedded default
# bash run.sh test [ARGS]     the same, then the tests; ARGS reach pytest
# bash run.sh --gpu [4b]      environment, then the stages with Qwen3-8B (for 24 GB) or -4B (12 GB) in 4 bits, into runs/gpu or runs/gpu-4b
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

case "$*" in
    "" | test | "test "* | --gpu | "--gpu 4b") ;;
    *) echo "error: unknown argument '$*'; usage: bash run.sh [test [pytest arguments] | --gpu [4b]]" >&2; exit 2 ;;
esac
python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed" >&2; exit 2; }

# The stamp is written last, so an installation that broke off is taken up again, and a finished one is never touched:
# after the first time nothing here needs a network.
if ! cmp -s requirements.txt .venv/installed.txt; then
    [ -x .venv/bin/python ] || python3 -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    sed -n 's/^#no-deps //p' requirements.txt | xargs .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps
    cp requirements.txt .venv/installed.txt
fi

stages=(01_prepare.py 02_sample_candidates.py 03_reconstruct_score.py 04_select_sft.py 05_rl_train.py "05_rl_train.py --objective e2e" 06_evaluate.py)
if [ "${1:-}" = --gpu ]; then
    # The judge is of another family than the models it judges. A batch that does not fit is halved by itself.
    size=${2:-8b} judge=microsoft/Phi-4-mini-instruct
    [ "$size" = 8b ] && context=2048 trace=256 at_once=4 || context=1024 trace=192 at_once=2
    base="--run runs/gpu$([ "$size" = 8b ] || echo "-$size") --model Qwen/Qwen3-${size^^}"
    fit="--fit-lr 2e-4 --batch 8"
    grpo="--steps 100 --prompts 8 --group 8 --temperature 1 --lr 2e-5 --warmup 10 --std-norm --save-every 5"
    stages=("01_prepare.py $base --limit 600 --max-context-tokens $context --max-action-tokens 64"
            "02_sample_candidates.py $base --max-trace-tokens $trace --batch $at_once"
            "03_reconstruct_score.py $base --scorers likelihood,embedding,judge --judge $judge --max-action-tokens 64 --batch $at_once"
            "04_select_sft.py $base $fit"
            "05_rl_train.py $base $fit $grpo --max-new-tokens $trace --trace-batch $at_once"
            "05_rl_train.py --objective e2e $base $fit $grpo --max-new-tokens $((trace + 64))"
            "06_evaluate.py $base --judge $judge --round-robin --max-trace-tokens $trace --max-action-tokens 64 --batch $at_once")
fi
for stage in "${stages[@]}"; do
    printf '\n--- %s\n' "$stage"
    .venv/bin/python $stage
done

if [ "${1:-}" = test ]; then
    printf '\n--- tests\n'
    .venv/bin/python -m pytest "${@:2}"
fi
