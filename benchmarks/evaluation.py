"""The whole loop with all arms and controls on the embedded default, evaluated on 100 held-out pairs and more.

    python benchmarks/evaluation.py                              80 minutes on two cores
    python benchmarks/evaluation.py --judge embedded             once that is done: the small language model as judge

Runs the stages as programs, so it goes on where it was stopped, and prints the table and one JSON object last. The win
rates are those of results.json: against `backward`, ties as half, 95 % intervals by conversation.
"""

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common

ARMS = "none,backward,recon,shuffled,longest,worst"
STAGES = [("01_prepare.py", "--limit", "156", "--val-share", "0.06", "--test-share", "0.68"), ("02_sample_candidates.py",), ("03_reconstruct_score.py",),
          ("04_select_sft.py", "--arms", ARMS), ("05_rl_train.py", "--steps", "8"), ("05_rl_train.py", "--objective", "e2e", "--steps", "8")]
KEPT = ("n", "wins", "ties", "losses", "win_rate", "ci95", "p", "p_holm", "similarity", "action_logprob", "distinct_actions", "action_words", "trace_words")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/evaluation"), metavar="DIR", help="folder of the run (default: %(default)s)")
    parser.add_argument("--judge", default="encoder", metavar="NAME", help="as in stage 6 (default: %(default)s)")
    args = parser.parse_args()
    for script, *settings in [*STAGES, ("06_evaluate.py", "--traces", "4", "--judge", args.judge)]:
        subprocess.run([sys.executable, str(ROOT / script), "--run", str(args.run), *settings], check=True)
    results = json.loads((args.run / "results.json").read_text(encoding="utf-8"))
    seconds: dict[str, float] = {}
    for row in common.read_rows(args.run / "costs.jsonl", ("stage", "seconds")):
        seconds[row["stage"]] = seconds.get(row["stage"], 0.0) + row["seconds"]
    rounded = lambda value: round(value, 4) if isinstance(value, float) else [round(end, 4) for end in value] if isinstance(value, list) else value
    print(json.dumps({
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads", "torch": torch.__version__, "judge": results["judge"],
        "data": {key: results["data"][key] for key in ("people", "pairs", "conversations")}, "seconds": seconds,
        **{what: {arm: {key: rounded(row.get(key)) for key in KEPT if key in row} for arm, row in results[what].items()} for what in ("arms", "reconstructions")},
        "comparisons": [{key: rounded(value) for key, value in row.items() if key not in ("by_person", "matched")}
                        | {"matched": {key: rounded(value) for key, value in (row["matched"] or {}).items()}, "by_person": {person: rounded(part["win_rate"]) for person, part in (row["by_person"] or {}).items()}}
                        for row in results["comparisons"]],
        "reading": results["reading"]}, indent=1))


if __name__ == "__main__":
    main()
