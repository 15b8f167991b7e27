"""The whole loop with all arms and controls, evaluated on 100 held-out pairs and more.

    python benchmarks/evaluation.py                         two hours on two cores, with the embedded model
    python benchmarks/evaluation.py --judge embedded        once that is done: the small language model as judge
    python benchmarks/evaluation.py --run runs/small --limit 24 --steps 1 --arms none,backward,guarded,recon
                                                            ten minutes, to see it work

Runs the stages as programs, so it goes on where it was stopped. Prints the table and one JSON object last: results.json
without its settings, and the seconds of each stage. Win rates are against `backward`, ties as half, with 95 % intervals
by conversation.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

import common
from benchmarks import speed

ARMS = "none,backward,guarded,recon,shuffled,longest,worst"
KEPT = ("arms", "reconstructions", "comparisons", "judge", "versus", "chosen_by", "warnings", "data")


def stages(limit: int = 44, val_share: float = 0.05, test_share: float = 0.72,
           arms: str = "none,backward,guarded,recon", steps: int = 6, num_prompts: int = 2, num_generations: int = 4,
           acting: tuple[str, ...] = (), sampling: tuple[str, ...] = (), e2e: tuple[str, ...] = ()) -> list[list[str]]:
    """The commands of the whole loop, in order; the defaults are those of the stages."""
    grpo = ["--steps", str(steps), "--num-prompts", str(num_prompts), "--num-generations", str(num_generations)]
    return [["01_prepare.py", "--limit", str(limit), "--val-share", str(val_share), "--test-share", str(test_share)],
            ["02_sample_candidates.py", *sampling], ["03_reconstruct_score.py"], ["04_select_sft.py", "--arms", arms],
            ["05_rl_train.py", *grpo], ["02_sample_candidates.py", "--tag", "grpo"],
            ["03_reconstruct_score.py", "--tag", "grpo"], ["04_select_sft.py", "--tag", "grpo"],
            ["05_rl_train.py", "--objective", "e2e", *grpo, *e2e], ["06_evaluate.py", *acting]]


def run_program(name: str, *arguments: str) -> None:
    subprocess.run([sys.executable, str(ROOT / name), *arguments], check=True)


def rounded(value: Any) -> Any:
    """The same with all numbers to four places."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return round(value, 4) if isinstance(value, float) else value


def main(argv: list[str] | None = None) -> None:
    parser = speed.make_parser(
        __doc__, limit=(156, "pairs in all"), steps=(8, "of GRPO, for each objective"), num_prompts=(2, "a GRPO step"),
        num_generations=(4, "completions a prompt in GRPO"), num_actions=(4, "answers a held-out pair in stage 6"))
    add = parser.add_argument
    add("--run", type=Path, default=Path("runs/evaluation"), metavar="DIR", help="folder of the run")
    add("--model", default="embedded", metavar="NAME", help="as in the stages")
    add("--judge", default="encoder", metavar="NAME", help="as in stage 6")
    add("--arms", default=ARMS, help="as in stage 4")
    add("--val-share", type=common.fraction, default=0.06, help="as in stage 1")
    add("--test-share", type=common.fraction, default=0.68, help="as in stage 1")
    args = parser.parse_args(argv)
    acting = ("--num-actions", str(args.num_actions), "--judge", args.judge)
    for command in stages(args.limit, args.val_share, args.test_share, args.arms, args.steps, args.num_prompts,
                          args.num_generations, acting):
        run_program(*command, "--run", str(args.run), "--model", args.model)
    results = json.loads((args.run / "results.json").read_text(encoding="utf-8"))
    seconds: dict[str, float] = {}
    for row in common.read_rows(args.run / "costs.jsonl", common.Cost):
        seconds[row.stage] = seconds.get(row.stage, 0.0) + row.seconds
    print(json.dumps({"machine": speed.machine(), "torch": torch.__version__, "model": args.model, "seconds": seconds,
                      **{key: rounded(results[key]) for key in KEPT}}))


if __name__ == "__main__":
    main()
