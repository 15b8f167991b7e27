#!/usr/bin/env bash
# bash run.sh                 environment, then stages 01 to 06 on the embedded default
# bash run.sh test [ARGS]     the same, then the tests; ARGS reach pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

if [ $# -gt 0 ] && [ "$1" != test ]; then
    echo "error: unknown argument '$1'; usage: bash run.sh [test [pytest arguments]]" >&2
    exit 2
fi
python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed" >&2; exit 2; }

# The stamp is written last, so an installation that broke off is taken up again, and a finished one is never touched:
# after the first time nothing here needs a network.
if ! cmp -s requirements.txt .venv/installed.txt; then
    [ -x .venv/bin/python ] || python3 -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    sed -n 's/^#no-deps //p' requirements.txt | xargs .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps
    cp requirements.txt .venv/installed.txt
fi

for stage in 01_prepare.py 02_sample_candidates.py 03_reconstruct_score.py 04_select_sft.py 05_rl_train.py "05_rl_train.py --objective e2e" 06_evaluate.py; do
    printf '\n--- %s\n' "$stage"
    .venv/bin/python $stage
done

if [ "${1:-}" = test ]; then
    printf '\n--- tests\n'
    .venv/bin/python -m pytest "${@:2}"
fi
