"""What GRPO teaches the synthesizer on real data, under three rewards, measured on people's held-out conversations.

    python benchmarks/rl_curve.py                          all three rewards, one after the other
    python benchmarks/rl_curve.py --rewards specific       the default reward alone

Each reward trains the same adapter from the same start on the default data (stage 5's own loop, with --steps). Before and
after, greedy and sampled traces are written for the test split, which training and its validation lines never see, and
every pair's action is scored behind its own trace and behind another pair's. `specific` is the first minus the second, credit
only for what the trace did not say, nats a token (in the mean over pairs the same as `specific` in rl.jsonl); its gain over the untrained synthesizer comes with a 95 % interval by
conversation (paired bootstrap). Beside it stand the ways to cheat: quoted 4-grams and single words, rewording, stopped and
malformed traces, length. Started again with the same --run, it goes on where it stopped. Draws benchmarks/rl_curve.png
(--picture) and prints one JSON object last.
"""

import argparse
import importlib
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common

rl = importlib.import_module("05_rl_train")

REWARDS = {"specific": [], "unsaid": [], "likelihood": ["--leak-penalty", "2"]}
MEASURED = ("score", "other", "leak", "leak_1", "reworded", "stopped", "malformed", "length")


def measure(model: Any, tokenizer: Any, encoder: Any, pairs: list[dict], samples: int, args: argparse.Namespace) -> list[dict]:
    """{MEASURED, specific, id, conversation, greedy, trace} of a greedy and `samples` sampled traces of each pair, scored alike whatever was rewarded.

    `specific` is the trace's score minus that of another pair's trace on the same action: the pairs stand in a circle, and
    each lends its trace to the one before.
    """
    args = argparse.Namespace(**vars(args) | {"reward": "specific"})
    circle = sorted(pairs, key=lambda pair: common.seed_of("circle", pair["id"]))
    rows = []
    for k in range(1 + samples):
        completions: dict[str, list] = {}
        for batch in common.batches_by_length(circle, lambda pair: len(common.synthesis_prompt(tokenizer, pair)), 16):
            seeds = [common.seed_of("rl_curve", k, pair["id"]) for pair in batch] if k else []
            completions |= zip((pair["id"] for pair in batch), rl.rollout(model, tokenizer, [common.synthesis_prompt(tokenizer, pair) for pair in batch], seeds, 1, args))
        others = [next(other for other in circle[place + 1:] + circle[:place] if other["conversation"] != pair["conversation"]) for place, pair in enumerate(circle)]
        written = [completions[pair["id"]] for pair in circle]
        own = rl.rate_recon(model, tokenizer, encoder, circle, others, written, args)
        for pair, other, completion, (row,) in zip(circle, others, written, own):
            # A second look at the pair's own action, with the other pair's trace in the trace's place.
            with model.disable_adapter():
                foreign = common.likelihood_scores(model, tokenizer, pair, [common.decode(tokenizer, completions[other["id"]][0])])[0][0]["unsaid"]
            if row["score"] is None or foreign != foreign:
                common.stop(f"the score of {pair['id']} is not a number")
            rows.append({name: float(row[name]) for name in MEASURED if name in row} | {"specific": row["score"] - foreign, "length": len(completion[0].ids), "id": pair["id"],
                        "conversation": pair["conversation"], "greedy": k == 0, "trace": common.decode(tokenizer, completion[0])})
    return rows


def summarise(rows: list[dict], before: list[dict]) -> dict:
    """Means of greedy and of sampled traces, with the gain of `specific` over the untrained synthesizer and its interval."""
    found = {}
    for kind, greedy in (("greedy", True), ("sampled", False)):
        some, old = ([row for row in side if row["greedy"] == greedy] for side in (rows, before))
        gains = [new["specific"] - was["specific"] for new, was in zip(some, old)]
        found[kind] = {name: round(sum(row[name] for row in some) / len(some), 4) for name in ("specific", *MEASURED)}
        if rows is not before:
            found[kind] |= {"specific_gain": round(sum(gains) / len(gains), 4),
                            "specific_gain_ci95": [round(end, 4) for end in common.bootstrap_interval(gains, [row["conversation"] for row in some], 0)]}
    return found


def draw(curves: dict[str, list[dict]], path: Path) -> None:
    """A line a reward over the steps, on the validation pairs (mean of greedy and sampled traces)."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, plots = pyplot.subplots(1, 4, figsize=(15, 3.4), layout="constrained")
    for plot, (name, title) in zip(plots, (("specific", "own minus another pair's action, nats a token"), ("leak", "quoted 4-grams"), ("reworded", "rewording"), ("length", "tokens a trace"))):
        for reward, lines in curves.items():
            points = [(row["step"], (row[f"val_{name}"] + row[f"val_sampled_{name}"]) / 2) for row in lines if "val_length" in row]
            plot.plot(*zip(*points), marker="o", markersize=3, label=reward)
        plot.set(xlabel="step", title=title)
    plots[0].legend(title="reward", fontsize=8)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/rl_curve"), metavar="DIR", help="folder of pairs, checkpoints and measurements (default: %(default)s)")
    parser.add_argument("--rewards", default=",".join(REWARDS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--steps", type=common.positive_int, default=30, help="GRPO steps with each reward (default: %(default)s)")
    parser.add_argument("--limit", type=common.positive_int, default=160, help="pairs in all; 40 %% are the test split (default: %(default)s)")
    parser.add_argument("--samples", type=common.positive_int, default=2, help="sampled traces of each test pair (default: %(default)s)")
    parser.add_argument("--picture", type=Path, default=Path(__file__).with_suffix(".png"), metavar="FILE", help="where the curves are drawn (default: %(default)s)")
    args = parser.parse_args()
    if unknown := [name for name in args.rewards.split(",") if name not in REWARDS]:
        common.stop(f"--rewards: unknown reward {unknown[0]!r}; choose from {', '.join(REWARDS)}")
    started = time.monotonic()
    importlib.import_module("01_prepare").main(["--run", str(args.run), "--limit", str(args.limit), "--val-share", "0.08", "--test-share", "0.4"])
    source = args.run / "pairs.jsonl"
    pairs = common.read_pairs(source)
    split = {name: [pair for pair in pairs if pair["split"] == name] for name in ("train", "val", "test")}
    base, tokenizer = common.load_model("embedded", None)
    encoder = common.load_encoder()
    measured, curves = {}, {}
    for reward in [None, *args.rewards.split(",")]:
        run = args.run / (reward or "untrained")
        settings = rl.parse_arguments(["--run", str(run), "--steps", str(args.steps), "--prompts", "4", "--group", "6", "--warmup", "5",
                                       *(["--reward", reward, *REWARDS[reward]] if reward else [])])
        run.mkdir(parents=True, exist_ok=True)
        record = common.made_with(settings, [source], ["synthesis", "transcript", "transcript_no_trace"], samples=args.samples)
        target, results = run / "models" / "synthesizer", run / "measured.jsonl"
        if reward and not common.check_record(target, record, False):
            so_far = record | {"arguments": {key: value for key, value in record["arguments"].items() if key != "steps"}}
            rl.train(base, tokenizer, split["train"], split["val"], settings, target, record, so_far)
        record |= {"adapter": common.file_hash(target / "adapter_model.safetensors") if reward else None}
        if not common.check_record(results, record, False):
            model = common.add_adapter(base, settings.rank, settings.seed, target if reward else None)
            common.write_output(results, "".join(map(common.dump_row, measure(model, tokenizer, encoder, split["test"], args.samples, settings))), record)
            model.unload()
        measured[reward or "untrained"] = common.read_rows(results)
        if reward:
            curves[reward] = common.read_rows(run / "rl.jsonl")
        print(json.dumps({reward or "untrained": summarise(measured[reward or "untrained"], measured["untrained"])}))
    draw(curves, args.picture)
    step = lambda lines, key: round(sum(row[key] for row in lines if key in row) / args.steps, 1)
    print(json.dumps({"machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads", "torch": torch.__version__,
                      "pairs": {name: len(some) for name, some in split.items()}, "test_conversations": len({pair["conversation"] for pair in split["test"]}), "steps": args.steps,
                      "seconds_a_step": {reward: {key: step(lines, f"seconds_{key}") for key in ("sampling", "reward", "update")} for reward, lines in curves.items()},
                      "minutes_of_this_start": round((time.monotonic() - started) / 60, 1),
                      "held_out": {name: summarise(rows, measured["untrained"]) for name, rows in measured.items()}}, indent=1))


if __name__ == "__main__":
    main()
