"""The large table: the whole loop with all arms and controls on hundreds of pairs, by three judges.

    python benchmarks/evaluation.py                         some hours on two cores, with the embedded model
    python benchmarks/evaluation.py --judges encoder,chrf,embedded          the small language model as judge, too
    python benchmarks/evaluation.py --run runs/small --limit 24 --steps 1 --arms none,backward,guarded,recon
                                    --marginal-pairs 4 --marginal-actions 4
                                                            ten minutes, to see it work

    out    RUN/               what the stages make of it, run as programs, so it goes on where it was stopped
           RUN/marginal/      user models without the arms longest and worst on the first --marginal-pairs held-out
                              pairs, --marginal-actions traces each, sampled without truncation

Prints one JSON object last. By judge: results.json with every arm compared with `backward` and with `guarded`, ties as
half a win, 95 % intervals by conversation. `marginal` is the third judge, the likelihood of the true action with the
trace summed out: its lower bound by the number of traces K, and the gain over `guarded` at the largest K.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

import common
from benchmarks import speed

ARMS = "none,backward,guarded,recon,shuffled,longest,worst"
KEPT = ("arms", "reconstructions", "comparisons", "warnings", "data")
LIKELIHOOD = ("action_logprob", "action_logprob_by_k", "action_logprob_gain", "action_logprob_gain_ci95", "unfinished")


def stages(limit: int = 44, val_share: float = 0.05, test_share: float = 0.72,
           arms: str = "none,backward,guarded,recon", steps: int = 6, num_prompts: int = 2, num_generations: int = 4,
           sampling: tuple[str, ...] = (), e2e: tuple[str, ...] = (),
           fitting: tuple[str, ...] = (), training: tuple[str, ...] = ()) -> list[list[str]]:
    """The commands of the whole loop, in order; the defaults are those of the stages."""
    grpo = ["--steps", str(steps), "--num-prompts", str(num_prompts), "--num-generations", str(num_generations),
            *training]
    return [["01_prepare.py", "--limit", str(limit), "--val-share", str(val_share), "--test-share", str(test_share)],
            ["02_sample_candidates.py", *sampling], ["03_reconstruct_score.py"],
            ["04_select_sft.py", "--arms", arms, *fitting], ["05_rl_train.py", *grpo],
            ["02_sample_candidates.py", "--tag", "grpo"], ["03_reconstruct_score.py", "--tag", "grpo"],
            ["04_select_sft.py", "--tag", "grpo"], ["05_rl_train.py", "--objective", "e2e", *grpo, *e2e],
            ["06_evaluate.py"]]


def run_program(name: str, *arguments: str) -> None:
    subprocess.run([sys.executable, str(ROOT / name), *arguments], check=True)


def rounded(value: Any) -> Any:
    """The same with all numbers to four places."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return round(value, 4) if isinstance(value, float) else value


def with_interval(values: Sequence[float], clusters: Sequence[str]) -> dict[str, Any]:
    """The mean and its 95 % interval by cluster."""
    return {"mean": sum(values) / len(values), "n": len(values), "ci95": common.bootstrap_interval(values, clusters)}


def evaluate(run: Path, model: str, versus: str, *acting: str) -> dict[str, Any]:
    """results.json of stage 6. Answers are kept, so another judge or arm to compare with takes seconds."""
    run_program("06_evaluate.py", "--run", str(run), "--model", model, "--versus", versus, *acting)
    return json.loads((run / "results.json").read_text(encoding="utf-8"))


def make_marginal_run(run: Path) -> Path:
    """RUN/marginal: links to the pairs and most user models of RUN, for answers of its own."""
    place = run / "marginal"
    (place / "models").mkdir(parents=True, exist_ok=True)
    models = (path.relative_to(run) for path in (run / "models").iterdir()
              if path.name.partition(".")[0] not in ("longest", "worst"))
    for name in (Path("pairs.jsonl"), Path("pairs.jsonl.config.json"), Path("traces"), *models):
        if not (place / name).is_symlink():
            (place / name).symlink_to(os.path.relpath(run / name, (place / name).parent))
    return place


def main(argv: list[str] | None = None) -> None:
    parser = speed.make_parser(
        __doc__, limit=(660, "pairs in all"), steps=(80, "of GRPO, for each objective"), num_prompts=(4, "a GRPO step"),
        num_generations=(8, "completions a prompt in GRPO"), val_every=(20, "steps between looks at validation pairs"),
        epochs=(1, "of a user model's fit"), num_actions=(4, "answers a held-out pair in stage 6"),
        marginal_pairs=(64, "held-out pairs for the marginal likelihood"), marginal_actions=(32, "traces for each"))
    add = parser.add_argument
    add("--run", type=Path, default=Path("runs/evaluation"), metavar="DIR", help="folder of the run")
    add("--model", default="embedded", metavar="NAME", help="as in the stages")
    add("--judges", default="encoder,chrf", metavar="NAMES", help="comma-separated, each as stage 6's --judge")
    add("--arms", default=ARMS, help="as in stage 4")
    add("--val-share", type=common.fraction, default=0.03, help="as in stage 1")
    add("--test-share", type=common.fraction, default=0.32, help="as in stage 1")
    args = parser.parse_args(argv)
    acting = ("--num-actions", str(args.num_actions))
    *commands, _ = stages(args.limit, args.val_share, args.test_share, args.arms, args.steps, args.num_prompts,
                          args.num_generations, fitting=("--epochs", str(args.epochs)),
                          training=("--val-every", str(args.val_every)))
    for command in commands:
        run_program(*command, "--run", str(args.run), "--model", args.model)
    results = {judge: {versus: evaluate(args.run, args.model, versus, *acting, "--judge", judge)
                       for versus in ("guarded", "backward")} for judge in args.judges.split(",")}
    marginal = evaluate(make_marginal_run(args.run), args.model, "guarded", "--limit", str(args.marginal_pairs),
                        "--num-actions", str(args.marginal_actions), "--temperature", "1", "--min-p", "0")
    seconds: dict[str, float] = {}
    for row in (row for run in (args.run, args.run / "marginal")
                for row in common.read_rows(run / "costs.jsonl", common.Cost)):
        seconds[row.stage] = seconds.get(row.stage, 0.0) + row.seconds
    print(json.dumps(rounded({
        "machine": speed.machine(), "torch": torch.__version__, "model": args.model, "seconds": seconds,
        "judges": {judge: {versus: {key: found[key] for key in KEPT} for versus, found in some.items()}
                   for judge, some in results.items()},
        "marginal": {"data": marginal["data"], "arms": {
            arm: {key: row[key] for key in LIKELIHOOD} for arm, row in marginal["arms"].items()}}})))


if __name__ == "__main__":
    main()
