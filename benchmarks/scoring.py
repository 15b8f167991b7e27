"""Do the scores measure anything? Real pairs, planted traces, the leak guard, and the speed of scoring, in one run.

    python benchmarks/scoring.py                       the default data, two people who were not used for tuning
    python benchmarks/scoring.py runs/mine/pairs.jsonl  and the test split of any other pairs

Real pairs: 4 traces a pair by the synthesizer; does a pair's own trace score above a trace of another conversation's pair
(AUC: the share of comparisons won, 4 x 4 a pair; 0.5 is noise; 95 % interval by conversation), with and without the traces that the leak
guard stops? Beside the stage's scores stand the likelihood in the chat wording, the mean of both wordings, and aggregates of the
stage's token log-probs: the mean gain in probability (RLPR, arXiv 2506.18254) and the mean gain weighted by how much each token's log-prob varies
over the pair's traces (DRO, arXiv 2506.13351).

Planted traces (tests/data): items with a cause, a justification that would fit many actions, and a leak; another item's
cause is the fourth trace. `planted` was in view when the guard's threshold was chosen, `planted_fresh` was written and run
afterwards. Prints one JSON object last. 15 to 20 minutes on two cores.
"""

import argparse
import importlib
import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
import common
import speed

sampling = importlib.import_module("02_sample_candidates")
scoring = importlib.import_module("03_reconstruct_score")

PEOPLE = ("a54af4d5-736a-4ef6-8f51-f45b6c5fdab7", "afe2b8b4-deb6-4f94-849b-8cc59a6140bd")  # fifth and sixth by replies; tuning used the third and fourth
N, DATA = 4, Path(__file__).resolve().parent.parent / "tests" / "data"


def score_all(model: Any, tokenizer: Any, encoder: Any, pairs: list[dict], candidates: list[list[dict]], what: str) -> tuple[list[dict], list[dict]]:
    """scores.jsonl rows and token log-probs by stage 3's own function, all scorers, a few pairs at a time."""
    judge = scoring.local_judge(model, tokenizer)
    rows, logprobs = [], []
    work = list(zip(pairs, ({"id": pair["id"], "candidates": some} for pair, some in zip(pairs, candidates))))
    for start in common.progress(range(0, len(work), 8), what):
        some, found = zip(*work[start:start + 8])
        control = [{"id": "", "trace": "Sam feels something.", "tokens": 4}] * len(some)
        more = scoring.score_pairs(model, tokenizer, encoder, judge, some, found, control, scoring.SCORERS, 32)
        rows, logprobs = rows + more[0], logprobs + more[1]
    return rows, logprobs


def aggregates(model: Any, tokenizer: Any, pair: dict, traces: list[str], tokens: dict) -> list[dict[str, float]]:
    """Further scores of each trace from token log-probs: the chat wording, both wordings, RLPR's mean and DRO's weighting."""
    transcript = torch.tensor([tokens["baseline"], *tokens["candidates"]])              # [1 + traces, action tokens]
    group, starts = common.action_group(tokenizer, pair, [None, *traces], "reconstruction")
    chat = torch.stack(common.packed_logprobs(model, [group], [starts])[0]).cpu()
    gain = lambda table: table[1:] - table[0]
    spread = transcript[1:1 + N].var(0)
    weights = spread / spread.sum().clamp(min=1e-9)
    columns = {"likelihood, chat wording": gain(chat).mean(1), "likelihood, both wordings": (gain(chat) + gain(transcript)).mean(1) / 2,
               "mean probability (RLPR)": gain(transcript.exp()).mean(1), "variance-weighted (DRO)": (gain(transcript) * weights).sum(1)}
    return [{name: column[place].item() for name, column in columns.items()} for place in range(len(traces))]


def measure_pairs(model: Any, tokenizer: Any, encoder: Any, pairs: list[dict], what: str) -> dict:
    """AUC of own over other traces for every score, before and after the guard."""
    found = []
    for start in common.progress(range(0, len(pairs), 20), f"{what}: sampling"):
        found += sampling.sample_traces(model, tokenizer, pairs[start:start + 20], N, 40, 1.0, common.MIN_P, "benchmark")
    by_id = {pair["id"]: some for pair, some in zip(pairs, found)}
    if len({pair["conversation"] for pair in pairs}) < 2:
        common.stop(f"{what}: the test split needs pairs of two conversations or more")
    other = {pair["id"]: by_id[foreign["id"]] for pair, foreign in zip(pairs, common.other_pairs(pairs, pairs, "benchmark"))}
    rows, logprobs = score_all(model, tokenizer, encoder, pairs, [[dict(c) for c in (*by_id[pair["id"]], *other[pair["id"]])] for pair in pairs], f"{what}: scoring")
    for pair, row, tokens in zip(pairs, rows, logprobs):
        more = aggregates(model, tokenizer, pair, [candidate["trace"] for candidate in row["candidates"]], tokens)
        for candidate, scores in zip(row["candidates"], more):
            candidate["scores"] |= scores
    table = {}
    for name in rows[0]["candidates"][0]["scores"]:
        table[name] = {}
        for guarded in (False, True):
            points, clusters = [], []
            for pair, row in zip(pairs, rows):
                own, others = ([c["scores"][name] for c in some if not (guarded and c["stopped"])] for some in (row["candidates"][:N], row["candidates"][N:]))
                compared = scoring.own_over_other(own, others)
                points += compared
                clusters += [pair["conversation"]] * len(compared)
            if not points:
                continue
            interval = common.bootstrap_interval(points, clusters, 0)
            table[name]["guarded" if guarded else "all"] = {"auc": round(sum(points) / len(points), 4), "comparisons": len(points),
                                                            "ci95": interval and [round(end, 4) for end in interval]}
    own = [candidate for row in rows for candidate in row["candidates"][:N]]
    return {"pairs": len(pairs), "conversations": len({pair["conversation"] for pair in pairs}), "people": len({pair["user"] for pair in pairs}),
            "own_traces": len(own), "own_traces_stopped": sum(c["stopped"] for c in own), "own_traces_with_a_quote": sum(c["leak"] > 0 for c in own), "auc": table}


def measure_planted(model: Any, tokenizer: Any, encoder: Any, path: Path) -> dict:
    """How often the cause comes first among the honest traces, by each score; what the guard catches and what it costs."""
    items = common.read_rows(path)                            # their `leak` is a trace, not the number of scores.jsonl
    pairs = [{"id": item["id"], "user": "sam", "conversation": item["id"], "split": "test", "context": item["context"], "action": item["action"]} for item in items]
    traces = [[item["cause"], item["justification"], after["cause"], item["leak"]] for item, after in zip(items, items[1:] + items[:1])]
    rows, _ = score_all(model, tokenizer, encoder, pairs, [[{"trace": trace, "tokens": len(trace.split())} for trace in some] for some in traces], path.stem)
    first = {}
    for name in rows[0]["candidates"][0]["scores"]:
        values = [[candidate["scores"][name] for candidate in row["candidates"]] for row in rows]
        first[name] = {"cause_first_of_3": sum(cause > max(just, other) for cause, just, other, _ in values) / len(rows),
                       "cause_over_justification": sum(cause > just for cause, just, _, _ in values) / len(rows),
                       "cause_over_other_cause": sum(cause > other for cause, _, other, _ in values) / len(rows),
                       "leak_first_of_4": sum(leak > max(rest) for *rest, leak in values) / len(rows)}
    kinds = sorted({item["leak_kind"] for item in items})
    stopped = lambda place, kind=None: [row["candidates"][place]["stopped"] for row, item in zip(rows, items) if kind in (None, item["leak_kind"])]
    share = lambda values: sum(values) / len(values)
    return {"items": len(items), "scores": first,
            "guard": {"leaks_caught": share(stopped(3)), **{f"leaks_caught_{kind}": share(stopped(3, kind)) for kind in kinds},
                      "leaks_caught_by_4_grams_alone": share([row["candidates"][3]["leak"] > 0 for row in rows]),
                      "causes_stopped": share(stopped(0)), "justifications_stopped": share(stopped(1))}}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="*", type=Path, help="further pairs.jsonl files, whose test split is measured as well")
    parser.add_argument("--model", default="embedded", metavar="NAME", help="synthesizer, reconstructor and judge (default: %(default)s)")
    parser.add_argument("--limit", type=common.positive_int, default=36, help="pairs of each file (default: %(default)s)")
    args = parser.parse_args()
    model, tokenizer = common.load_model(args.model, None)
    encoder = common.load_encoder()
    result = {"machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads", "torch": torch.__version__, "model": args.model,
              "speed": [speed.scoring_race(model, tokens) for tokens in (48, 80)], "pairs": {}, "planted": {}}
    print(json.dumps(result["speed"]))
    for name in ("planted", "planted_fresh"):
        result["planted"][name] = measure_planted(model, tokenizer, encoder, DATA / f"{name}.jsonl")
        print(json.dumps(result["planted"][name]))
    with tempfile.TemporaryDirectory() as folder:
        importlib.import_module("01_prepare").main(["--run", folder, "--model", args.model, "--limit", str(4 * args.limit), *(word for person in PEOPLE for word in ("--user", person))])
        files = {"default data": Path(folder) / "pairs.jsonl"} | {str(path): path for path in args.pairs}
        for name, path in files.items():
            pairs = [pair for pair in common.read_pairs(path) if pair["split"] == "test"][:args.limit]
            if not pairs:
                common.stop(f"{name} holds no pair of the test split")
            result["pairs"][name] = measure_pairs(model, tokenizer, encoder, pairs, name)
            print(json.dumps(result["pairs"][name]))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
