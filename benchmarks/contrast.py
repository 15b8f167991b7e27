"""Which form of contrast tells best whose trace it is? Tried: negatives, masks, the wording of the prompt, two readers.

    python benchmarks/contrast.py                          300 chat pairs, two readers: more than an hour on a core
    python benchmarks/contrast.py --domains court,podcast --transcripts DIR
    python benchmarks/contrast.py --run runs/small --pairs 6 --readers embedded         a minute, to see it work

    in     the pairs and traces of benchmarks/readers.py, which are made if they are not there
    out    RUN/DOMAIN/variants.READER.jsonl         a line a pair; finished lines are kept

All are made of one table a pair: how much likelier each trace makes the true action and --negatives other actions, by
token. The AUC is the share of comparisons that a pair's own trace wins against one of another conversation, among
traces that the leak detector lets through; `over_default` is what it adds to that of the default, contrast with 4
negatives, pair by pair. Intervals by conversation. Prints one JSON object last.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from tqdm import tqdm

import common
from benchmarks import readers, speed
from benchmarks.evaluation import rounded, with_interval
from common import LocalModel, Pair

DEFAULT = "contrast, 4 negatives"
NEAREST = "contrast, the 4 negatives nearest to the action"


class Variants(common.Row):
    """RUN/DOMAIN/variants.READER.jsonl: every score of the traces that the leak detector lets through."""
    id: str
    own: list[dict[str, float]]
    other: list[dict[str, float]]                          # of the control, if it passes


@torch.inference_mode()
def read_table(local: LocalModel, pair: Pair, prompt: str, traces: Sequence[str], actions: Sequence[str]
               ) -> list[list[torch.Tensor]]:
    """[1 + trace][action] of log p of the action's tokens; row 0 is without a trace."""
    setting = common.one_line(pair.setting or common.SETTING)
    context = common.format_context(pair) if prompt == "transcript" else common.format_scene(pair)
    prompts = [common.with_trace(prompt, trace, context=context, setting=setting) for trace in (None, *traces)]
    prefix, stems = common.split_prefix([common.encode_prompt(local.tokenizer, one) for one in prompts])
    space = " " if prompt == "transcript" else ""          # in a transcript a name stands before the action
    leaves = [common.encode_data(local.tokenizer, space + action) for action in actions]
    past = common.read_prefix(local.model, prefix[:-1])
    (found,) = common.shared_prefix_logprobs(local.model, [(prefix, stems, [leaves] * len(stems))], past=past)
    return found


def forms_of(gains: Sequence[torch.Tensor], masks: Sequence[torch.Tensor], nearest: Sequence[int]) -> dict[str, float]:
    """Every form of score from the gains of the true action (the first) and of the others; masks are of credit."""
    plain = torch.stack([gain.mean() for gain in gains])                                    # [1 + negatives]
    credited = torch.stack([(gain * mask).mean() for gain, mask in zip(gains, masks)])
    sums = torch.stack([(gain * mask).sum() for gain, mask in zip(gains, masks)])
    against = lambda values, places: (values[0] - values[places].mean()).item()
    counts = [count for count in (1, 2, 4, 8, 16) if count < len(gains)]
    others = range(1, len(gains))
    found = {"likelihood": plain[0].item(), "masked_likelihood": credited[0].item()}
    found |= {f"contrast, {count} negatives": against(credited, [*range(1, count + 1)]) for count in counts}
    return found | {
        NEAREST: against(credited, [1 + place for place in nearest]),
        "contrast, nothing masked": against(plain, [*others]),
        "contrast with the likeliest other action alone": (credited[0] - credited[1:].max()).item(),
        "contrast, of sums over tokens": against(sums, [*others]),
        "log of the action's share among all": (sums[0] - sums.logsumexp(0)).item(),
        "share of other actions that gain less": (credited[0] > credited[1:]).double().mean().item()}


def score_pair(local: LocalModel, encoder: Any, pair: Pair, passing: Sequence[str], control: Sequence[str],
               others: Sequence[str]) -> Variants:
    """All scores of one pair's traces, in the transcript's wording and in that of the chat prompt."""
    traces, actions, context = [*passing, *control], [pair.action, *others], common.format_context(pair)
    near = common.cosines(encoder, [pair.action] * len(others), others)
    nearest = sorted(range(len(others)), key=lambda place: -near[place])[:4]
    # A base model has no chat template.
    prompts = ["transcript", *(["reconstruction"] if local.tokenizer.chat_template else [])]
    tables = {prompt: read_table(local, pair, prompt, traces, actions) for prompt in prompts}
    rows = []
    for place, trace in enumerate(traces, 1):
        masks = [torch.tensor(common.credit_mask(local.tokenizer, trace, f" {action}", context)) for action in actions]
        gains = {prompt: [(after - before).cpu() for after, before in zip(table[place], table[0])]
                 for prompt, table in tables.items()}
        scores = forms_of(gains["transcript"], masks, nearest)
        if "reconstruction" in gains:                      # without the space its tokens are others: no mask fits
            chat = [gain.mean() for gain in gains["reconstruction"]]
            scores["likelihood, chat wording"] = chat[0].item()
            scores["contrast, nothing masked, chat wording"] = (chat[0] - sum(chat[1:]) / len(others)).item()
            for name in ("likelihood", "contrast, nothing masked"):
                scores[f"{name}, both wordings"] = (scores[name] + scores[f"{name}, chat wording"]) / 2
        rows.append(scores)
    return Variants(id=pair.id, own=rows[:len(passing)], other=rows[len(passing):])


def won(row: Variants, name: str) -> list[float]:
    return [(own[name] > other[name]) + 0.5 * (own[name] == other[name]) for own in row.own for other in row.other]


def pool(one: Sequence[Variants], other: Sequence[Variants]) -> list[Variants]:
    """The rows with the mean of two readers' scores, each divided by its standard deviation over all traces."""
    pooled = [row.model_copy(deep=True) for row in one]
    for name in next(scores for row in other for scores in row.own):
        columns = [torch.tensor([scores[name] for row in rows for scores in (*row.own, *row.other)])
                   for rows in (one, other)]
        mean = sum(column / column.std() for column in columns) / 2
        for scores, value in zip((scores for row in pooled for scores in (*row.own, *row.other)), mean.tolist()):
            scores[name] = value
    return pooled


def summarise(rows: Sequence[Variants], conversations: dict[str, str]) -> dict[str, Any]:
    """{score: AUC, and what it adds to the default's}."""
    kept = [row for row in rows if row.own and row.other]
    names = kept[0].own[0]
    clusters = [conversations[row.id] for row in kept for _ in won(row, DEFAULT)]
    points = {name: [point for row in kept for point in won(row, name)] for name in names}
    return {name: {"auc": with_interval(values, clusters), "over_default": with_interval(
        [value - usual for value, usual in zip(values, points[DEFAULT])], clusters)} for name, values in points.items()}


def main(argv: list[str] | None = None) -> None:
    args = readers.parse_args(argv, __doc__, 1, negatives=(16, "other actions"))
    if args.negatives < 4:
        common.fail("--negatives must be 4 or more: the default has 4")
    encoder, work, readings, results = common.load_encoder(), {}, {}, {}
    for domain in args.domains:
        count = args.pairs if domain == "chat" else args.other_pairs
        pairs, found = readers.make_traces(args.run / domain, count, args.seed,
                                           readers.source_of(domain, args.transcripts))
        work[domain] = readers.scoring.prepare_work(encoder, pairs, found, args.negatives, args.seed)
    for name, reader in args.readers.items():
        local = None
        for domain, items in work.items():
            run = args.run / domain
            settings = argparse.Namespace(run=run, reader=reader, seed=args.seed, negatives=args.negatives,
                                          dtype=common.resolve_dtype("auto"))
            config = common.run_config(settings, [run / "pairs.jsonl", run / "candidates.jsonl"],
                                       ["transcript", "transcript_no_trace", "reconstruction"])
            output = common.Output(run / common.tagged("variants.jsonl", name), Variants, config)
            for item in tqdm([item for item in items if item.id not in output.rows], f"{name}, {domain}", disable=None):
                local = local or readers.load_reader(reader)
                traces = [some.trace for some, leak in zip(item.row.candidates, item.leaks) if not leak.is_leak]
                control = item.control[1]
                stopped = common.detect_leaks(encoder, [control.trace], item.pair.action,
                                              common.format_context(item.pair))[0].is_leak
                output.append([score_pair(local, encoder, item.pair, traces, [] if stopped else [control.trace],
                                          item.negatives)])
            readings[name, domain] = [output.rows[item.id] for item in items]
    for domain, items in work.items():
        conversations = {item.id: item.pair.conversation for item in items}
        judges = {name: readings[name, domain] for name in args.readers}
        if len(judges) == 2:
            judges["+".join(judges)] = pool(*judges.values())
        results[domain] = {judge: summarise(rows, conversations) for judge, rows in judges.items()}
    print(json.dumps(rounded({"machine": speed.machine(), "torch": torch.__version__, "negatives": args.negatives,
                              "seed": args.seed, "domains": results})))


if __name__ == "__main__":
    main()
