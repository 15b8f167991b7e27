"""What the whole loop costs before it is run: model calls, tokens, and hours and money if you say how fast, how dear.

    python benchmarks/cost.py --pairs 1000 --tokens-per-second 3000 400
    python benchmarks/cost.py --pairs 1000 --context 900 --action 90 --trace 200 --price 0.25 2

A few seconds; no model is loaded, only the tokenizer that counts the prompts' own words. Prints one JSON object last.

A call is one completion or one judgement, as the paper counts: 2N + 1 a pair for sampling, reconstructing and judging.
`read` is what prompts hold and a server bills. `computed` counts once what the completions of one prompt share, as
common.generate does and a server with prefix caching: time goes by it. A training example is computed three times:
forward, backward, and forward again for checkpointing. GRPO's settings and the judge are those of the GPU preset, all
else is the stages' defaults unless given; lengths are those of the embedded run (44 pairs, mean tokens by SmolLM2's
tokenizer).

It is an estimate. It leaves out the encoder, loading, questions asked again, and what a whole batch of prompts shares,
and takes the arm `none` for one with traces. `judging` is what a language model as stage 6's judge would be asked.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
from benchmarks import speed
from common import fraction, positive_float, positive_int

select_sft, evaluate = map(importlib.import_module, ("04_select_sft", "06_evaluate"))

# What the judge of stage 3 answers, and what stands around each guess that it is shown.
RATING, GUESS = '"1":{"style":0,"intent":0,"values":0},', "Guess 1: \n"
HELD_OUT_TRACES = 4                                        # of a pair, each time that stage 5 validates


def prompt_words(tokenizer: Any, name: str) -> tuple[int, int]:
    """(tokens of a prompt's own words before the trace, and behind it); all stand before it where there is no trace."""
    fields = {"setting": common.SETTING, "user": common.hash_of("a user")[:8]}
    pieces = common.template_pieces(tokenizer, tuple(common.PROMPTS[name]), name == "user_model")
    data = lambda name: common.encode_data(tokenizer, fields.get(name, ""))
    length = lambda piece: len(data(piece) if isinstance(piece, str) else piece)
    at = pieces.index("trace") if "trace" in pieces else len(pieces)
    think = len(tokenizer.encode(common.THINK, add_special_tokens=False)) if name == "user_model" else 0
    return sum(map(length, pieces[:at])) + think, sum(map(length, pieces[at:]))


def costs(args: argparse.Namespace, tokenizer: Any) -> list[dict]:
    """{stage, what, server (can it be one), calls, read, computed, written} of every part of the loop."""
    rows: list[dict] = []
    length = lambda text: len(common.encode_data(tokenizer, text))
    words = {name: prompt_words(tokenizer, name)[0] for name in ("synthesis", "judge", "comparison", "user_model")}
    rebuild, rebuild_end = prompt_words(tokenizer, "reconstruction")
    plain, plain_end = prompt_words(tokenizer, "transcript")
    close = len(common.close_trace(tokenizer, "")) + 1     # and the end token
    pairs, n, c, a, t, r = args.pairs, args.num_samples, args.context, args.action, args.trace, args.reconstruction
    train, test = pairs * args.train_share, pairs * args.test_share
    synthesis, user, fitted = words["synthesis"] + c + a, words["user_model"] + c, train * args.epochs

    def part(stage: str, what: str, prompts: float, shared: float, each: float = 1, suffix: float = 0,
             written: float = 0, passes: int = 1, server: bool = False) -> None:
        """`each` completions of `written` tokens a prompt, behind `shared` tokens and a `suffix` of their own."""
        rows.append({"stage": stage, "what": what, "server": server, "calls": round(prompts * each),
                     "read": round(prompts * each * (shared + suffix)), "written": round(prompts * each * written),
                     "computed": round(prompts * (shared + each * suffix) * passes)})

    def score(stage: str, what: str, prompts: float, traces: int, negatives: int) -> None:
        """Likelihoods behind each trace and behind none, of the pair's action and `negatives` others."""
        part(stage, what, prompts, plain + c, traces + 1, plain_end + t + (1 + negatives) * a)

    def candidates(tag: str, server: bool) -> None:
        part("02" + tag, "traces", pairs, synthesis, n, 0, t, server=server)
        if {"embedding", "judge"} & set(args.scorers.split(",")):
            part("03" + tag, "reconstructions", pairs, rebuild + c, n, rebuild_end + t, r, server=True)
            part("03" + tag, "reconstructions for controls", pairs, rebuild + c, 2, rebuild_end + t / 2, r, server=True)
        if "judge" in args.scorers:
            part("03" + tag, "judgements", pairs, words["judge"] + c + a + n * (r + length(GUESS)),
                 written=n * length(RATING), server=True)
        if "likelihood" in args.scorers:
            score("03" + tag, "likelihoods", pairs, n + 1, args.negatives)

    candidates("", True)
    arms = args.arms.split(",")
    part("04", "fitting", len(arms) * fitted, user + t + close + a, passes=3)
    if args.steps:
        steps, validated = args.steps * args.num_prompts, pairs * (1 - args.train_share - args.test_share)
        looks = validated * (args.steps // args.val_every + 1)
        for stage, prompt, negatives in (("05", synthesis, 3), ("05 e2e", user, 3)):
            part(stage, "sampling", steps, prompt, args.num_generations, 0, t)
            score(stage, "rewards", steps, args.num_generations, negatives)
            part(stage, "updates", steps, prompt, args.num_generations, t, passes=3)
            part(stage, "sampling for validation", looks, prompt, HELD_OUT_TRACES, 0, t)
            score(stage, "scores for validation", looks, HELD_OUT_TRACES, negatives)
        candidates(" grpo", False)
        part("04 grpo", "fitting", fitted, user + t + close + a, passes=3)
    trained = ["recon-grpo", "e2e-grpo"] if args.steps else []
    part("06", "answers", test * len(arms + trained), user, args.num_actions, 0, t + close + a)
    part("06", "likelihoods", test * len(arms + trained), user, args.num_actions, t + close + a)
    rebuilt = [arm for arm in select_sft.ARMS if arm != "judged" or arm in arms] + trained[:1]
    compared = sum(len(evaluate.choose_comparisons(some, "backward", args.round_robin))
                   for some in (arms + trained, rebuilt))
    part("06", "judging", test, words["comparison"] + c + a, 2 * compared, 2 * a, 1, server=True)
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = speed.make_parser(
        __doc__, num_samples=(4, "candidates a pair"), negatives=(4, "other actions in stage 3"),
        epochs=(2, "of a fit"), num_prompts=(8, "a GRPO step"),
        num_generations=(8, "completions a prompt in GRPO"),
        val_every=(10, "GRPO steps between looks at held-out pairs"),
        num_actions=(1, "answers a held-out pair in stage 6"),
        context=(73, "tokens in a context"), action=(18, "tokens in an action"), trace=(32, "tokens in a trace"),
        reconstruction=(19, "tokens in a reconstruction"))
    add = parser.add_argument
    add("--pairs", type=positive_int, required=True, help="of all splits")
    add("--model", default="embedded", help="whose tokenizer counts")
    add("--scorers", default="likelihood,embedding,judge", help="as in stage 3")
    add("--arms", default="none,backward,guarded,recon", help="as in stage 4")
    add("--round-robin", action="store_true", help="as in stage 6")
    add("--train-share", type=fraction, default=0.23, help="of the pairs")
    add("--test-share", type=fraction, default=0.72, help="of the pairs; the rest is for validation")
    add("--steps", type=int, default=100, help="of GRPO, for each objective; 0 leaves stage 5 out")
    add("--tokens-per-second", type=positive_float, nargs=2, metavar=("READ", "WRITE"), help="that the model does")
    add("--price", type=positive_float, nargs=2, metavar=("READ", "WRITE"),
        help="of a million tokens, for the parts that a server can do")
    args = parser.parse_args(argv)
    rows = costs(args, common.load_tokenizer(args.model))
    for row in rows:
        if args.tokens_per_second:
            read, write = args.tokens_per_second
            row["hours"] = round((row["computed"] / read + row["written"] / write) / 3600, 3)
        if args.price and row["server"]:
            row["price"] = round((row["read"] * args.price[0] + row["written"] * args.price[1]) / 1e6, 3)
    names = ("calls", "read", "computed", "written", "hours", "price")
    columns = [name for name in names if any(name in row for row in rows)]
    total = {column: round(sum(row.get(column, 0) for row in rows), 3) for column in columns}
    print(f"{'stage':9}{'':32}" + "".join(f"{column:>14}" for column in columns))
    for row in [*rows, {"stage": "all", "what": "", "server": False} | total]:
        cells = ["" if row.get(column) is None else f"{row[column]:,}" for column in columns]
        print(f"{row['stage']:9}{row['what'] + ' *' * row['server']:32}" + "".join(f"{cell:>14}" for cell in cells))
    print("* can be a server's work")
    told = sum(row["calls"] for row in rows if row["stage"] in ("02", "03") and row["what"] in (
        "traces", "reconstructions", "judgements"))
    print(json.dumps({"pairs": args.pairs, "calls_a_pair": told / args.pairs, "parts": rows, "total": total}))


if __name__ == "__main__":
    main()
