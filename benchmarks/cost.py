"""What the whole loop costs before it is run: model calls, tokens, and, if you say how fast or how dear a model is, hours and money.

    python benchmarks/cost.py --pairs 1000 --tokens-per-second 3000 400
    python benchmarks/cost.py --pairs 1000 --words 430 --context 900 --action 90 --trace 200 --price 0.25 2

A call is one completion or one judgement, as the paper counts: 2N + 1 a pair for sampling, reconstructing and judging.
`read` is what prompts hold and a server bills. `computed` counts once what the completions of one prompt share, as
`common.generate` does and a server with prefix caching: time goes by it. A training example is computed three times,
forward and twice that backward. The defaults are those of the stages, and tokens a call as measured in the embedded run
(44 pairs; mean lengths, SmolLM2's tokenizer). It is an estimate: it leaves out the encoder, loading, the likelihoods of
the evaluation, worked examples that are computed once for a whole batch, questions asked again, validation in GRPO, the whole
objective e2e, and what stage 6 does with reconstructions: a language model as judge compares those too, in up to three times
the calls that are counted for comparisons. Prints one JSON object last.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import fraction, positive_float, positive_int

# Tokens of the prompts without what is filled in, by SmolLM2's tokenizer (tests/test_cost.py counts them again); the transcript's with its setting,
# the user model's with the person's id and the tag that opens a thought. BEHIND comes once a trace, after what the traces of a pair share; the user
# model writes it: the tag that closes a thought, and the end token.
WORDS = {"synthesis": 524, "reconstruction": 30, "judge": 192, "comparison": 165, "user_model": 46, "transcript": 6}
BEHIND = {"reconstruction": 26, "user_model": 6, "transcript": 6}
GUESS = 6                                                  # around a guess that the judge is shown
RATING = 17                                                # of a judge's answer a guess: {"1":{"style":0,"intent":0,"values":0},


def costs(args: argparse.Namespace) -> list[dict]:
    """{stage, what, server (can it be one), calls, read, computed, written} of every part of the loop."""
    rows: list[dict] = []

    def part(stage: str, what: str, server: bool, prompts: float, prompt: float, each: float = 1, suffix: float = 0, written: float = 0, passes: int = 1) -> None:
        """`each` completions of `written` tokens for every one of `prompts`: `prompt` tokens that they share, `suffix` tokens that they do not."""
        rows.append({"stage": stage, "what": what, "server": server, "calls": round(prompts * each), "read": round(prompts * each * (prompt + suffix)),
                     "computed": round(prompts * (prompt + each * suffix) * passes), "written": round(prompts * each * written)})

    pairs, n, c, a, t, r = args.pairs, args.n, args.context, args.action, args.trace, args.reconstruction
    train, test = pairs * args.train_share, pairs * args.test_share
    part("02", "traces", True, pairs, args.words + c + a, n, 0, t)
    part("03", "reconstructions", True, pairs, WORDS["reconstruction"] + c, n, BEHIND["reconstruction"] + t, r)
    if "embedding" in args.scorers:
        part("03", "reconstructions for controls", True, pairs, WORDS["reconstruction"] + c, 2, BEHIND["reconstruction"] + t / 2, r)
    if "judge" in args.scorers:
        part("03", "judgements", True, pairs, WORDS["judge"] + c + a + n * (r + GUESS), 1, 0, RATING * n)
    if "likelihood" in args.scorers:
        part("03", "likelihoods", False, pairs, WORDS["transcript"] + c, n + 2, BEHIND["transcript"] + t + a)
    part("04", "fitting", False, args.arms * args.epochs * train, WORDS["user_model"] + c + t + BEHIND["user_model"] + a, passes=3)
    if args.steps:
        prompts = args.steps * args.prompts
        part("05", "GRPO, sampling", False, prompts, args.words + c + a, args.group, 0, t)
        part("05", "GRPO, rewards on two actions", False, 2 * prompts, WORDS["transcript"] + c, args.group + 1, BEHIND["transcript"] + t + a)
        part("05", "GRPO, updates", False, prompts, args.words + c + a, args.group, t, passes=3)
        part("05", "traces and user model", False, train, args.words + c + a, 1, 0, t)
        part("05", "fitting", False, args.epochs * train, WORDS["user_model"] + c + t + BEHIND["user_model"] + a, passes=3)
    part("06", "acting", False, (args.arms + bool(args.steps)) * test, WORDS["user_model"] + c, args.traces, 0, t + BEHIND["user_model"] + a / args.traces)
    part("06", "comparisons", True, (args.arms + bool(args.steps) - 1) * test, WORDS["comparison"] + c + 3 * a, 2, 0, 1)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("size")
    group.add_argument("--pairs", type=positive_int, required=True, help="of all splits")
    group.add_argument("--model", default="embedded", metavar="NAME", help="name for the table; it is not loaded (default: %(default)s)")
    group.add_argument("--n", type=positive_int, default=4, help="candidates a pair (default: %(default)s)")
    group.add_argument("--scorers", default="embedding,judge,likelihood", help="as in stage 3 (default: %(default)s)")
    group.add_argument("--train-share", type=fraction, default=0.36, help="of the pairs (default: %(default)s)")
    group.add_argument("--test-share", type=fraction, default=0.55, help="of the pairs (default: %(default)s)")
    group.add_argument("--arms", type=positive_int, default=3, help="arms that stage 4 fits and stage 6 compares (default: %(default)s)")
    group.add_argument("--epochs", type=positive_int, default=2, help="of a fit (default: %(default)s)")
    group.add_argument("--steps", type=int, default=100, help="GRPO steps; 0 leaves stage 5 out (default: %(default)s)")
    group.add_argument("--prompts", type=positive_int, default=8, help="a GRPO step (default: %(default)s)")
    group.add_argument("--group", type=positive_int, default=8, help="completions a prompt in GRPO (default: %(default)s)")
    group.add_argument("--traces", type=positive_int, default=2, help="traces a held-out pair in stage 6 (default: %(default)s)")
    group = parser.add_argument_group("tokens (defaults: measured in the embedded run)")
    for name, tokens, what in (("words", WORDS["synthesis"], "of the synthesis prompt with its worked examples"), ("context", 73, "of a context"), ("action", 18, "of an action"),
                               ("trace", 32, "of a trace"), ("reconstruction", 19, "of a reconstruction")):
        group.add_argument(f"--{name}", type=positive_int, default=tokens, metavar="TOKENS", help=f"{what} (default: %(default)s)")
    group = parser.add_argument_group("speed and price")
    group.add_argument("--tokens-per-second", type=positive_float, nargs=2, metavar=("READ", "WRITE"), help="how fast prompts are computed and answers written, all requests together")
    group.add_argument("--price", type=positive_float, nargs=2, metavar=("READ", "WRITE"), help="of a million tokens, for the parts that a server can do")
    args = parser.parse_args()
    rows = costs(args)
    for row in rows:
        if args.tokens_per_second:
            row["hours"] = round((row["computed"] / args.tokens_per_second[0] + row["written"] / args.tokens_per_second[1]) / 3600, 3)
        if args.price and row["server"]:
            row["price"] = round((row["read"] * args.price[0] + row["written"] * args.price[1]) / 1e6, 3)
    columns = ["calls", "read", "computed", "written", *(["hours"] if args.tokens_per_second else []), *(["price"] if args.price else [])]
    total = {column: round(sum(row.get(column, 0) for row in rows), 3) for column in columns}
    show = lambda value: "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"
    print(f"{args.model}, {args.pairs:,} pairs")
    print(f"{'stage':6}{'':32}" + "".join(f"{column:>14}" for column in columns))
    for row in [*rows, {"stage": "all", "what": "", "server": False} | total]:
        print(f"{row['stage']:6}{row['what'] + (' *' if row['server'] else ''):32}" + "".join(f"{show(row.get(column)):>14}" for column in columns))
    print("* can be a server's work")
    told = sum(row["calls"] for row in rows if row["what"] in ("traces", "reconstructions", "judgements"))
    print(json.dumps({"model": args.model, "pairs": args.pairs, "calls_a_pair": told / args.pairs, "parts": rows, "total": total}))


if __name__ == "__main__":
    main()
