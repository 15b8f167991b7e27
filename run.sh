#!/usr/bin/env bash
# bash run.sh                   environment, then the whole loop on the embedded default, into runs/demo
# bash run.sh --dtype float32   the same in float32, into runs/demo-float32
# bash run.sh --gpu [4b]        the loop with Qwen3-8B (24 GB) or -4B (12 GB) in 4 bits, into runs/gpu or runs/gpu-4b
# bash run.sh test [ARGS]       environment, then the tests alone; ARGS reach pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

case "$*" in
    "" | test | "test "* | --gpu | "--gpu 4b" | "--dtype float32") ;;
    *) echo "error: unknown argument '$*'; usage: bash run.sh [test [pytest arguments] | --gpu [4b] | --dtype float32]" >&2
       exit 2 ;;
esac
python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed" >&2; exit 2; }

# The stamp is written last: an installation that broke off is taken up again, and a finished one is never touched.
if ! cmp -s requirements.txt .venv/installed.txt; then
    [ -x .venv/bin/python ] || python3 -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    sed -n 's/^#no-deps //p' requirements.txt | xargs .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps
    cp requirements.txt .venv/installed.txt
fi
if [ "${1:-}" = test ]; then
    exec .venv/bin/python -m pytest "${@:2}"
fi

run="" prepare="" score="" fit="" train="" e2e="--val-every 6" act=""
sample="--held-out 12"                                           # the demo: all else is every stage's default
case "${1:-}" in
    --dtype) run="--run runs/demo-float32 --dtype float32" ;;
    --gpu)
        size=${2:-8b} judge=microsoft/Phi-4-mini-instruct        # of another family than the models it judges
        [ "$size" = 8b ] && context=2048 trace=256 tokens=49152 || context=1024 trace=192 tokens=16384
        run="--run runs/gpu$([ "$size" = 8b ] || echo "-$size") --model Qwen/Qwen3-${size^^}"
        prepare="--limit 600 --val-share 0.1 --test-share 0.4 --max-context-turns 40 --max-context-tokens $context --max-action-tokens 64"
        e2e="" sample="--max-trace-tokens $trace --batch-tokens $tokens"
        score="--scorers likelihood,embedding,judge --judge $judge --max-action-tokens 64 --batch-tokens $tokens"
        fit="--lr 2e-4 --batch-size 8 --row-tokens $((context + trace + 72)) --arms none,backward,guarded,recon,judged,shuffled,worst"
        train="--steps 100 --num-prompts 8 --num-generations 8 --lr 2e-5 --warmup 10 --val-every 10 --save-every 10 --max-new-tokens $((trace + 8))"
        act="--judge $judge --round-robin --max-trace-tokens $((trace + 8)) --max-action-tokens 64 --batch-tokens $tokens" ;;
esac
# Freed memory is kept for the next tensor: asking the system for it anew takes a twentieth of the time on a CPU.
export MALLOC_MMAP_THRESHOLD_=8589934592 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=268435456
stages=("01_prepare.py $run $prepare"
        "02_sample_candidates.py $run $sample"
        "03_reconstruct_score.py $run $score"
        "04_select_sft.py $run $fit"
        "05_rl_train.py $run $train"
        "02_sample_candidates.py $run --tag grpo"
        "03_reconstruct_score.py $run --tag grpo"
        "04_select_sft.py $run --tag grpo"
        "05_rl_train.py --objective e2e $run $train $e2e"
        "06_evaluate.py $run $act")
for stage in "${stages[@]}"; do
    printf '\n--- %s\n' "$stage"
    .venv/bin/python $stage
done
