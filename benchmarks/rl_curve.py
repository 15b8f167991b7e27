"""What GRPO teaches the synthesizer on real data, under three rewards, measured on people's held-out conversations.

    python benchmarks/rl_curve.py                          all three rewards, one after the other
    python benchmarks/rl_curve.py --rewards specific       the default reward alone

Each reward trains the same adapter from the same start on the default data (stage 5's own loop). Before and after, greedy and
sampled traces are written for the test split, which training and its validation lines never see, and every pair's action
is scored behind its own trace and behind another pair's. `specific` is the first minus the second, credit only for what
the trace did not say, nats a token (rl.jsonl holds one trace against two actions instead); its gain over the untrained
synthesizer comes with a 95 % interval by conversation (paired bootstrap). Beside it stand the ways to cheat: quoted 4-grams
and single words, rewording, stopped and malformed traces, length. `passing` are the sampled traces that the leak guard does not
stop, the only ones that the loop uses: a stopped trace has a high score because it hands the action over, so fewer of
them lower the mean of all sampled ones. The default reward trains for about 45 minutes on two cores. Started again with
the same --run, it goes on where it stopped. Draws benchmarks/rl_curve.png (--picture) and prints one JSON object last.
"""

import argparse
import importlib
import json
import math
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common

sampling = importlib.import_module("02_sample_candidates")
rl = importlib.import_module("05_rl_train")

STEPS = {"specific": 64, "unsaid": 16, "likelihood": 16}              # the failures show within 16
REWARDS = {"specific": [], "unsaid": [], "likelihood": ["--leak-penalty", "2"]}
SAMPLES = 12                                                          # nearly all of a gain's variance is between samples of one pair
DRAWN = 4                                                             # as many as stage 5 draws to find one that passes the guard
MEASURED = ("score", "other", "leak", "leak_1", "reworded", "stopped", "malformed", "length")


def measure(model: Any, tokenizer: Any, encoder: Any, pairs: list[dict], args: argparse.Namespace) -> list[dict]:
    """{MEASURED, specific, kind, id, k, conversation, trace} of each pair's traces, scored alike whatever was rewarded.

    `kind` is greedy, sampled (SAMPLES as stage 2 samples: temperature 1, min-p 0.1), or guarded: the one of DRAWN samples that
    stage 5 would train a user model on, the first that the leak guard passes. `score` is the trace's `unsaid` on its
    pair's action, `other` that of another pair's trace of the same kind on the same action, `specific` the first minus the second.
    """
    written: dict[str, list[dict]] = {}
    for batch in common.batches_by_length(pairs, lambda pair: len(common.synthesis_prompt(tokenizer, pair)), 16):
        greedy = sampling.sample_traces(model, tokenizer, batch, 1, args.max_new_tokens, 0.0, 0.0, "")
        sampled = sampling.sample_traces(model, tokenizer, batch, SAMPLES, args.max_new_tokens, 1.0, common.MIN_P, "rl_curve")
        written |= {pair["id"]: one + more for pair, one, more in zip(batch, greedy, sampled)}
    looks = {pair["id"]: rl.look_at_traces(encoder, [candidate["trace"] for candidate in written[pair["id"]]], pair) for pair in pairs}
    passing = {name: min(range(1, 1 + DRAWN), key=lambda k: (common.given_away(rows[k]), k)) for name, rows in looks.items()}
    rows = []
    for pair, other in zip(pairs, common.other_pairs(pairs, pairs, "rl_curve")):
        traces = [candidate["trace"] for some in (pair, other) for candidate in written[some["id"]]]
        with model.disable_adapter():
            scores = [row["unsaid"] for row in common.likelihood_scores(model, tokenizer, pair, traces)[0]]
        if not all(map(math.isfinite, scores)):
            common.stop(f"a score of {pair['id']} is not a number")
        own, foreign = scores[:1 + SAMPLES], scores[1 + SAMPLES:]
        chosen = [("greedy", 0, 0), *(("sampled", k, k) for k in range(1, 1 + SAMPLES)), ("guarded", passing[pair["id"]], passing[other["id"]])]
        for kind, k, place in chosen:
            rows.append({name: float(value) for name, value in looks[pair["id"]][k].items()} | {
                "score": own[k], "other": foreign[place], "specific": own[k] - foreign[place], "kind": kind, "id": pair["id"], "k": k,
                "length": written[pair["id"]][k]["tokens"], "conversation": pair["conversation"], "trace": traces[k]})
    return rows


def summarise(rows: list[dict], before: list[dict]) -> dict:
    """Means of each kind of traces, with the gain of `specific` over the untrained synthesizer and its interval.

    The gain of a pair is that of its mean; a pair of which a kind has no trace on both sides takes no part in it.
    """
    found = {}
    conversations = {row["id"]: row["conversation"] for row in rows}
    for kind in ("greedy", "sampled", "passing", "guarded"):
        some, earlier = ([row for row in side if row["kind"] == ("sampled" if kind == "passing" else kind) and not (kind == "passing" and row["stopped"])] for side in (rows, before))
        means = [{name: sum(values) / len(values) for name, values in by_pair(side).items()} for side in (some, earlier)]
        gains = {name: mean - means[1][name] for name, mean in means[0].items() if name in means[1]}
        found[kind] = {name: round(sum(row[name] for row in some) / len(some), 4) for name in ("specific", *MEASURED)}
        if rows is not before:
            interval = common.bootstrap_interval(list(gains.values()), [conversations[name] for name in gains], 0)
            found[kind] |= {"specific_gain": round(sum(gains.values()) / len(gains), 4), "pairs": len(gains), "specific_gain_ci95": interval and [round(end, 4) for end in interval]}
    return found


def by_pair(rows: list[dict]) -> dict[str, list[float]]:
    """`specific` of the rows of each pair."""
    values: dict[str, list[float]] = {}
    for row in rows:
        values.setdefault(row["id"], []).append(row["specific"])
    return values


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
    parser.add_argument("--limit", type=common.positive_int, default=300, help="pairs in all; 27 %% are the test split, 4 %% the validation split (default: %(default)s)")
    parser.add_argument("--picture", type=Path, default=Path(__file__).with_suffix(".png"), metavar="FILE", help="where the curves are drawn (default: %(default)s)")
    args = parser.parse_args()
    if unknown := [name for name in args.rewards.split(",") if name not in REWARDS]:
        common.stop(f"--rewards: unknown reward {unknown[0]!r}; choose from {', '.join(REWARDS)}")
    started = time.monotonic()
    importlib.import_module("01_prepare").main(["--run", str(args.run), "--limit", str(args.limit), "--val-share", "0.04", "--test-share", "0.27"])
    source = args.run / "pairs.jsonl"
    pairs = common.read_pairs(source)
    split = {name: [pair for pair in pairs if pair["split"] == name] for name in ("train", "val", "test")}
    base, tokenizer = common.load_model("embedded", None)
    encoder = common.load_encoder()
    measured, curves = {}, {}
    for reward in [None, *args.rewards.split(",")]:
        run = args.run / (reward or "untrained")
        settings = rl.parse_arguments(["--run", str(run), "--prompts", "4", "--group", "6", "--temperature", "1", "--lr", "4e-4", "--warmup", "5", "--std-norm", "--val-every", "8",
                                       *(["--reward", reward, "--steps", str(STEPS[reward]), *REWARDS[reward]] if reward else [])])
        run.mkdir(parents=True, exist_ok=True)
        if not reward:                                        # the settings of a training have no part in it
            settings = argparse.Namespace(**{key: value for key, value in vars(settings).items() if key in ("run", "model", "seed", "rank", "max_new_tokens")})
        record = common.made_with(settings, [source], ["synthesis", "transcript", "transcript_no_trace"])
        target, results = run / "models" / "synthesizer", run / "measured.jsonl"
        if reward and not common.check_record(target, record, False):
            so_far = record | {"arguments": {key: value for key, value in record["arguments"].items() if key != "steps"}}
            rl.train(base, tokenizer, encoder, split["train"], split["val"], settings, target, record, so_far)
        record |= {"adapter": common.file_hash(target / "adapter_model.safetensors") if reward else None}
        if not common.check_record(results, record, False):
            model = common.add_adapter(base, settings.rank, settings.seed, target if reward else None)
            common.write_output(results, "".join(map(common.dump_row, measure(model, tokenizer, encoder, split["test"], settings))), record)
            model.unload()
        measured[reward or "untrained"] = common.read_rows(results)
        if reward:
            curves[reward] = common.read_rows(run / "rl.jsonl")
        print(json.dumps({reward or "untrained": summarise(measured[reward or "untrained"], measured["untrained"])}))
    draw(curves, args.picture)
    step = lambda lines, key: round(sum(row[key] for row in lines if key in row) / sum("reward" in row for row in lines), 1)
    print(json.dumps({"machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads", "torch": torch.__version__,
                      "pairs": {name: len(some) for name, some in split.items()}, "test_conversations": len({pair["conversation"] for pair in split["test"]}), "steps": STEPS,
                      "seconds_a_step": {reward: {key: step(lines, f"seconds_{key}") for key in ("sampling", "reward", "update")} for reward, lines in curves.items()},
                      "minutes_of_this_start": round((time.monotonic() - started) / 60, 1),
                      "held_out": {name: summarise(rows, measured["untrained"]) for name, rows in measured.items()}}, indent=1))


if __name__ == "__main__":
    main()
