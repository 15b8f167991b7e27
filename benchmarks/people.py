"""People as judges: a blind page on which they compare actions, and how far they agree with the judge of stage 6.

    python benchmarks/people.py --run runs/demo --sheet 40
    python benchmarks/people.py --run runs/demo --labels ann.json bo.json

    in     RUN/pairs.jsonl, RUN/predictions/ARM.jsonl; with --labels RUN/judgements.jsonl and RUN/human.key.jsonl
    out    RUN/human.html           --sheet N comparisons of an arm with the arm --versus. It shows neither arms nor ids
           RUN/human.key.jsonl      what was what on it, and on earlier sheets; not for the people who judge

Each person opens human.html, judges, and downloads a file of labels. --labels compares these files with the judge and
with one another and prints one JSON object last: agreement and Cohen's kappa (agreement beyond chance; the mean over
people), each with a 95 % interval by conversation, over a, b and tie, and where both sides `decided`. Labels on
messages that have changed since count as `outdated`, those that the judge has no verdict on as `not_judged`: left out.
"""

import argparse
import importlib
import json
import random
import sys
from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import ValidationError
from scipy import stats
from sklearn.metrics import cohen_kappa_score

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
from common import Pair, Row

evaluate = importlib.import_module("06_evaluate")

TEMPLATE = evaluate.TEMPLATE.with_name("annotate.html")
Texts = dict[str, dict[str, str]]                          # actions by arm and pair id


class Item(Row):
    """human.key.jsonl: a comparison on a sheet."""
    sheet: str
    item: int                                              # its place on the sheet, from 0
    pair: str
    a: str                                                 # two arms
    b: str
    first: Literal["a", "b"]                               # the arm whose message is shown as A
    shown: str                                             # hash of what the page shows


class Labels(Row):
    """The file that human.html downloads."""
    sheet: str
    rater: str
    labels: dict[int, Literal["A", "B", "tie"]]            # by place on the sheet


class Judged(NamedTuple):
    """Two verdicts on one comparison."""
    who: tuple[int, int]                                   # numbers of the two raters; -1 is the judge
    conversation: str
    verdicts: tuple[str, str]


def read_texts(run: Path) -> Texts:
    files = sorted((run / "predictions").glob("*.jsonl"))
    return {path.stem: {row.id: row.answers[0].action for row in common.read_rows(path, evaluate.Prediction)}
            for path in files}


def show_item(pair: Pair, texts: Texts, a: str, b: str, first: str) -> dict[str, str]:
    """What a person sees of a comparison: no arm, no id."""
    sides = [texts[arm][pair.id] for arm in ((a, b) if first == "a" else (b, a))]
    return {"context": common.format_context(pair), "action": pair.action, "first": sides[0], "second": sides[1]}


def write_sheet(run: Path, versus: str, count: int, seed: int) -> int:
    """Write human.html with at most `count` comparisons and add them to human.key.jsonl. Returns how many there are.

    Pairs and orders are drawn at random, arms take turns. A pair comes once, or the message that recurs would give
    `versus` away. Two equal texts are left out.
    """
    texts, key = read_texts(run), run / "human.key.jsonl"
    if versus not in texts or len(texts) < 2:
        common.fail(f"{run / 'predictions'} must hold {versus}.jsonl and another arm; run 06_evaluate.py first")
    pairs = [pair for pair in common.read_rows(run / "pairs.jsonl", Pair, "01_prepare.py")
             if all(pair.id in rows for rows in texts.values())]
    arms, chosen = [arm for arm in texts if arm != versus], []
    for pair in random.Random(common.stable_seed(seed, "human")).sample(pairs, len(pairs)):
        turn = len(chosen) % len(arms)
        arm = next((arm for arm in arms[turn:] + arms[:turn] if texts[arm][pair.id] != texts[versus][pair.id]), None)
        if arm and len(chosen) < count:
            chosen.append((pair, arm, versus, "ab"[common.stable_seed(seed, "first", pair.id, arm) % 2]))
    if not chosen:
        common.fail(f"no arm wrote anything else than {versus}; there is nothing to judge")
    shown = [show_item(pair, texts, *rest) for pair, *rest in chosen]
    sheet = common.hash_of([(pair.id, *rest) for pair, *rest in chosen], shown)
    items = [Item(sheet=sheet, item=place, pair=pair.id, a=a, b=b, first=first, shown=common.hash_of(what))
             for place, ((pair, a, b, first), what) in enumerate(zip(chosen, shown))]
    earlier = [row for row in (common.read_rows(key, Item) if key.is_file() else []) if row.sheet != sheet]
    common.write_file(key, "".join(map(common.dump_row, [*earlier, *items])))
    evaluate.write_page(run / "human.html", TEMPLATE, {"sheet": sheet, "items": shown})
    return len(items)


def read_labels(path: Path, key: dict[tuple[str, int], Item]) -> Labels:
    try:
        found = Labels.model_validate_json(path.read_bytes())
    except OSError as problem:
        common.fail(f"cannot read --labels {path}: {problem.strerror}")
    except ValidationError as problem:
        where, what = problem.errors()[0]["loc"], problem.errors()[0]["msg"]
        common.fail(f"--labels {path} is not a file that human.html downloads: {'.'.join(map(str, where))} {what}")
    if lost := [place for place in found.labels if (found.sheet, place) not in key]:
        common.fail(f"--labels {path}: item {lost[0]} of sheet {found.sheet} is not in human.key.jsonl; "
                    "name the --run folder whose sheet was judged")
    return found


def mean_kappa(rows: Sequence[Judged]) -> float | None:
    """Cohen's kappa of each two raters, the mean. It is undefined for two who both gave one and the same label."""
    raters: dict[tuple[int, int], list[tuple[str, str]]] = defaultdict(list)
    for row in rows:
        raters[row.who].append(row.verdicts)
    values = [float(cohen_kappa_score(*zip(*found))) for found in raters.values() if len({*sum(found, ())}) > 1]
    return sum(values) / len(values) if values else None


def kappa_interval(rows: Sequence[Judged]) -> list[float] | None:
    """95 % interval of mean_kappa by jackknife: each conversation is left out in turn. None below MIN_CLUSTERS."""
    conversations = {row.conversation for row in rows}
    if (n := len(conversations)) < common.MIN_CLUSTERS:
        return None
    values = [mean_kappa([row for row in rows if row.conversation != left_out]) for left_out in conversations]
    if (kappa := mean_kappa(rows)) is None or None in values:
        return None
    error = ((n - 1) / n * sum((value - sum(values) / n) ** 2 for value in values)) ** 0.5
    half = float(stats.t.ppf(0.975, n - 1)) * error
    return [max(-1.0, kappa - half), min(1.0, kappa + half)]


def agreement(rows: Sequence[Judged]) -> dict[str, Any] | None:
    same = [float(len({*row.verdicts}) == 1) for row in rows]
    return {"n": len(rows), "agreement": sum(same) / len(same),
            "ci95": common.bootstrap_interval(same, [row.conversation for row in rows]),
            "kappa": mean_kappa(rows), "kappa_ci95": kappa_interval(rows)} if rows else None


def compare_people(run: Path, files: Sequence[Path]) -> dict[str, Any]:
    """How far people agree with the judge and with one another."""
    items = common.read_rows(run / "human.key.jsonl", Item, "benchmarks/people.py --sheet N")
    key, texts = {(row.sheet, row.item): row for row in items}, read_texts(run)
    pairs = {pair.id: pair for pair in common.read_rows(run / "pairs.jsonl", Pair, "01_prepare.py")}
    winners: dict[tuple[str, str, str], list[str | None]] = defaultdict(list)
    for row in common.read_rows(run / "judgements.jsonl", evaluate.Verdict, "06_evaluate.py"):
        if row.what == "actions" and row.k == 0:
            winners[row.pair, row.a, row.b].append(row.winner)
    found, with_judge, handed_in = {"raters": len(files), "labels": 0, "outdated": 0, "not_judged": 0}, [], set()
    raters: list[dict[str, tuple[str, str]]] = [{} for _ in files]       # (conversation, verdict) by what was shown
    for number, path in enumerate(files):
        file = read_labels(path, key)
        if file.rater and (file.rater, file.sheet) in handed_in:
            common.fail(f"--labels {path}: {file.rater!r} handed in this sheet twice; name the last file only")
        handed_in.add((file.rater, file.sheet))
        found["labels"] += len(file.labels)
        for place, choice in file.labels.items():
            item = key[file.sheet, place]
            pair, sides = pairs.get(item.pair), (item.a, item.b)
            verdict = "tie" if choice == "tie" else "a" if (choice == "A") == (item.first == "a") else "b"
            raters[number][item.shown] = pair.conversation if pair else item.pair, verdict
            current = pair and all(pair.id in texts.get(arm, {}) for arm in sides) and item.shown == common.hash_of(
                show_item(pair, texts, *sides, item.first))
            judge, _ = evaluate.aggregate_orders(winners.get((item.pair, *sides), [None]))
            if current and judge:
                with_judge.append(Judged((number, -1), pair.conversation, (verdict, judge)))
            else:
                found["not_judged" if current else "outdated"] += 1
    between = [Judged((i, j), one[shown][0], (one[shown][1], other[shown][1]))
               for (i, one), (j, other) in combinations(enumerate(raters), 2) for shown in one if shown in other]
    for name, rows in (("with_judge", with_judge), ("between_people", between)):
        found[name] = agreement(rows)
        found[f"{name}_decided"] = agreement([row for row in rows if "tie" not in row.verdicts])
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--run", type=Path, default=common.DEFAULT_RUN, metavar="DIR", help="folder of the run (default: %(default)s)")
    add("--sheet", type=common.positive_int, metavar="N", help="write a page with N comparisons")
    add("--labels", type=Path, nargs="+", metavar="FILE", help="files that people downloaded from the page")
    add("--versus", default="backward", metavar="ARM", help="compare the arms with this one (default: %(default)s)")
    add("--seed", type=int, default=0, help="of what is drawn (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.sheet:
        count = write_sheet(args.run, args.versus, args.sheet, args.seed)
        print(f"{args.run / 'human.html'}: {count} comparisons; the key stays in human.key.jsonl")
    if args.labels:
        print(json.dumps(compare_people(args.run, args.labels)))
    elif not args.sheet:
        common.fail("name --sheet N to write a page, or --labels FILE for what people downloaded from it")


if __name__ == "__main__":
    main()
