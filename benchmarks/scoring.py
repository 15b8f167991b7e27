"""Do the scores measure anything? Real pairs, planted traces, and the leak detector, by stage 3's own functions.

    python benchmarks/scoring.py                            20 minutes on two cores
    python benchmarks/scoring.py runs/mine/pairs.jsonl      and the test split of any other pairs
    python benchmarks/scoring.py --limit 4 --planted 6      some minutes, to see it work

Real pairs, of two people who were not used for tuning: 4 traces a pair by the synthesizer. Does a pair's own trace
score above a trace of another conversation's pair? AUC: the share of comparisons won, 4 x 4 a pair; 0.5 is noise; with
a 95 % interval by conversation; with and without traces that the leak detector stops. Beside the stage's scores stand
the likelihood in the chat wording, the mean of both wordings, the mean gain in probability (RLPR, arXiv 2506.18254),
and the gain weighted by how much each token's log-prob varies over the pair's traces (DRO, arXiv 2506.13351).

Planted traces (tests/data): items with a cause, a justification that would fit many actions, and a leak; another item's
cause is the fourth trace. `planted` was in view when the detector's threshold was chosen, `planted_fresh` was written
and run afterwards. `rounding`: how far a planted trace's score moves when its neighbours in the row stand in another
order, nats a token; no choice between two traces that are nearer means anything. Prints one JSON object last.
"""

import argparse
import importlib
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
from benchmarks import speed
from common import Candidate, Candidates, LocalModel, Pair, Scores, Text

sampling, scoring = importlib.import_module("02_sample_candidates"), importlib.import_module("03_reconstruct_score")

# fifth and sixth by replies; tuning used the third and fourth
PEOPLE = ("a54af4d5-736a-4ef6-8f51-f45b6c5fdab7", "afe2b8b4-deb6-4f94-849b-8cc59a6140bd")
N, DATA = 4, Path(__file__).resolve().parent.parent / "tests" / "data"


class Planted(common.Row):
    """tests/data/planted.jsonl: traces that a person wrote."""
    id: Text
    context: list[common.Turn]
    action: Text
    cause: Text
    justification: Text
    leak: Text
    leak_kind: Text


def score_all(local: LocalModel, encoder: Any, pairs: Sequence[Pair], candidates: Sequence[list[Candidate]],
              negatives: int = 4) -> list[Scores]:
    """Rows of scores.jsonl with the scores of all scorers, by stage 3's function, a few pairs at a time."""
    work = []
    for pair, some in zip(pairs, candidates):
        leaks = common.detect_leaks(encoder, [one.trace for one in some], pair.action, common.format_context(pair))
        others = common.choose_negatives(pair, pairs, negatives, "", "benchmark")
        work.append(scoring.Work(pair, Candidates(id=pair.id, candidates=some), leaks, ("none", some[0]), others))
    rows = []
    for start in tqdm(range(0, len(work), 8), "scoring", disable=None):
        rows += scoring.score_pairs(work[start:start + 8], local, encoder, local, scoring.SCORERS, 24)
    return rows


@torch.inference_mode()
def more_scores(local: LocalModel, pair: Pair, traces: Sequence[str]) -> list[dict[str, float]]:
    """Further scores of each trace, from the log-probs of the action's tokens in both wordings."""
    action, table = common.encode_data(local.tokenizer, pair.action), {}
    for name, context in (("transcript", common.format_context(pair)), ("reconstruction", common.format_scene(pair))):
        prompts = [common.with_trace(name, trace, context=context, setting=pair.setting or common.SETTING)
                   for trace in (None, *traces)]
        prefix, stems = common.split_prefix([common.encode_prompt(local.tokenizer, prompt) for prompt in prompts])
        (found,) = common.shared_prefix_logprobs(local.model, [(prefix, stems, [[action]] * len(stems))])
        table[name] = torch.stack([row for row, in found]).cpu()                        # [1 + traces, action tokens]
    plain, chat = table["transcript"], table["reconstruction"]
    gain = lambda values: values[1:] - values[0]
    weights = plain[1:1 + N].var(0) / plain[1:1 + N].var(0).sum().clamp(min=1e-9)
    columns = {"likelihood, chat wording": gain(chat).mean(1),
               "likelihood, both wordings": gain(chat + plain).mean(1) / 2,
               "mean probability (RLPR)": gain(plain.exp()).mean(1),
               "variance-weighted (DRO)": (gain(plain) * weights).sum(1)}
    return [{name: column[place].item() for name, column in columns.items()} for place in range(len(traces))]


def auc(pairs: Sequence[Pair], rows: Sequence[Scores], name: str, passing: bool) -> dict[str, Any] | None:
    """How often one of a pair's first N traces has a higher score than one of the others, ties as half."""
    points, clusters = [], []
    for pair, row in zip(pairs, rows):
        own, other = ([one.scores[name] for one in side if not (passing and one.is_leak)]
                      for side in (row.candidates[:N], row.candidates[N:]))
        points += [(a > b) + 0.5 * (a == b) for a in own for b in other]
        clusters += [pair.conversation] * len(own) * len(other)
    return {"auc": sum(points) / len(points), "comparisons": len(points),
            "ci95": common.bootstrap_interval(points, clusters)} if points else None


def measure_pairs(local: LocalModel, encoder: Any, pairs: Sequence[Pair]) -> dict[str, Any]:
    """AUC of own over other traces for every score, with and without the leaks."""
    if len({pair.conversation for pair in pairs}) < 2:
        common.fail("the test split needs pairs of two conversations or more")
    settings = argparse.Namespace(seed="benchmark", num_samples=N, max_trace_tokens=48, temperature=1.0, min_p=0.1)
    found = {row.id: row.candidates for start in tqdm(range(0, len(pairs), 20), "sampling", disable=None)
             for row in sampling.sample_traces(local, pairs[start:start + 20], settings)}
    others = scoring.choose_other(pairs, "benchmark")
    rows = score_all(local, encoder, pairs, [[*found[pair.id], *found[others[pair.id].id]] for pair in pairs])
    for pair, row in zip(pairs, rows):
        for one, scores in zip(row.candidates, more_scores(local, pair, [one.trace for one in row.candidates])):
            one.scores |= scores
    own = [one for row in rows for one in row.candidates[:N]]
    return {"pairs": len(pairs), "conversations": len({pair.conversation for pair in pairs}), "own_traces": len(own),
            "own_leaks": sum(one.is_leak for one in own), "own_quotes": sum(one.leak > 0 for one in own),
            "auc": {name: {key: auc(pairs, rows, name, passing) for key, passing in (("all", False), ("passing", True))}
                    for name in own[0].scores}}


def planted_pair(item: Planted) -> Pair:
    return Pair(id=item.id, user="sam", conversation=item.id, split="test", context=item.context, action=item.action)


def measure_planted(local: LocalModel, encoder: Any, items: Sequence[Planted]) -> dict[str, Any]:
    """How often the cause comes first among honest traces, by each score; what the detector catches, what it costs."""
    pairs = list(map(planted_pair, items))
    traces = [[item.cause, item.justification, after.cause, item.leak]
              for item, after in zip(items, [*items[1:], items[0]])]
    rows = score_all(local, encoder, pairs, [[Candidate(trace=trace, finished=True, tokens=len(trace.split()))
                                              for trace in some] for some in traces])
    share = lambda values: sum(values) / len(values) if values else None
    stopped = lambda place, kind=None: share([row.candidates[place].is_leak for row, item in zip(rows, items)
                                              if kind in (None, item.leak_kind)])
    scores = {}
    for name in rows[0].candidates[0].scores:
        values = [[one.scores[name] for one in row.candidates] for row in rows]
        scores[name] = {"cause_first_of_3": share([cause > max(rest) for cause, *rest, _ in values]),
                        "cause_over_justification": share([cause > other for cause, other, *_ in values]),
                        "cause_over_other_cause": share([cause > other for cause, _, other, _ in values]),
                        "leak_first_of_4": share([leak > max(rest) for *rest, leak in values])}
    return {"items": len(items), "scores": scores, "leak_detector": {
        "leaks_caught": stopped(3), "causes_stopped": stopped(0), "justifications_stopped": stopped(1),
        "leaks_caught_by_4_grams_alone": share([row.candidates[3].leak > 0 for row in rows]),
        "leaks_caught_by_kind": {kind: stopped(3, kind) for kind in sorted({item.leak_kind for item in items})}}}


def measure_rounding(local: LocalModel, items: Sequence[Planted]) -> dict[str, float]:
    moves = []
    for item in items:
        pair = planted_pair(item)
        traces = [item.cause, item.justification, item.leak]
        (one, _), (turned, _) = (common.likelihood_scores(local, [(pair, some, [])])[0]
                                 for some in (traces, traces[::-1]))
        moves += [abs(a[name] - b[name]) for a, b in zip(one, turned[::-1]) for name in a]
    return {"largest": max(moves), "median": sorted(moves)[len(moves) // 2]}


def main(argv: list[str] | None = None) -> None:
    parser = speed.make_parser(__doc__, limit=(36, "pairs of each file"), planted=(1000, "items of each planted file"))
    parser.add_argument("pairs", nargs="*", type=Path, help="further pairs.jsonl files, to measure their test split")
    parser.add_argument("--model", default="embedded", metavar="NAME", help="synthesizer, reconstructor and judge")
    parser.add_argument("--dtype", default="auto", help="as in the stages")
    args = parser.parse_args(argv)
    local, encoder = common.load_model(args.model, torch.cuda.is_available(), args.dtype), common.load_encoder()
    result = {"machine": speed.machine(), "torch": torch.__version__, "model": args.model,
              "dtype": str(local.model.dtype), "planted": {}, "pairs": {}}
    for name in ("planted", "planted_fresh"):
        items = common.read_rows(DATA / f"{name}.jsonl", Planted)[:args.planted]
        result["planted"][name] = measure_planted(local, encoder, items)
        print(json.dumps(result["planted"][name]))
        result["planted"][name]["rounding"] = measure_rounding(local, items)
    with tempfile.TemporaryDirectory() as folder:
        importlib.import_module("01_prepare").main([
            "--run", folder, "--model", args.model, "--limit", str(4 * args.limit),
            "--user", PEOPLE[0], "--user", PEOPLE[1]])
        for path in (Path(folder) / "pairs.jsonl", *args.pairs):
            pairs = [pair for pair in common.read_rows(path, Pair) if pair.split == "test"][:args.limit]
            name = str(path) if path in args.pairs else "default data"
            result["pairs"][name] = measure_pairs(local, encoder, pairs)
            print(json.dumps(result["pairs"][name]))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
