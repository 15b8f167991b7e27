"""Stage 3: the reconstructor M_a predicts the action from context and trace, and each trace is scored by how close it comes.

The heart of Recon: a trace from which the action can be predicted holds a cause of it; a mere justification does not.
M_a never sees the action when it writes. All scores are per candidate, higher is better, and all stay in the row:

    likelihood   mean over the action's tokens of log p(token | context, trace) - log p(token | context), nats a token
    unsaid       the same, but tokens of content words that the trace gives away earn nothing
    embedding    cosine of the encoded reconstruction and the encoded action
    judge        a language model sees the action and all N reconstructions and rates style, intent, values; mean, 0 to 9

and the leak guard, which no score is trusted without, because a trace that quotes the action reconstructs it best:

    leak         share of the action's 4-grams that stand in the trace but not in the context
    reworded     how much of the action the trace gives away in other words or forms (see common.guard_traces)
    stopped      true if either is too high; selection takes such a trace last, and in GRPO it earns less than the average honest one

    in     RUN/pairs.jsonl, RUN/candidates.jsonl
    out    RUN/scores.jsonl             id, candidates [{… leak, reworded, stopped, reconstruction, scores, logprob_sum}],
                                        baseline {the scores with no trace}, control {another pair's trace, its scores}, calls
                                        (with the judge: each candidate's ratings; cut: turns left out of the context)
           RUN/scores.summary.json      the controls below, what the guard stopped, model calls
           RUN/token_logprobs.jsonl     with --keep-token-logprobs: what other aggregates need, without a model call

How to run it:

    python 03_reconstruct_score.py
    python 03_reconstruct_score.py --scorers likelihood                          writes no reconstructions: several times faster
    python 03_reconstruct_score.py --scorers likelihood,embedding,judge          the paper's scorer beside ours
    python 03_reconstruct_score.py --scorers judge --judge openai:NAME           by a server (OPENAI_BASE_URL, OPENAI_API_KEY)
    accelerate launch 03_reconstruct_score.py                                    on all GPUs; the rows are the same
    python 03_reconstruct_score.py --model openai:NAME --scorers embedding,judge          reconstructed there as well

The summary's controls say whether a score measures anything: how often a pair's own trace beats another pair's (AUC;
0.5 is noise), whether the score merely follows length or leaks, and in how many pairs not one trace scores above having no trace.
The judge sees neither the other pair's trace nor the one without a trace, so it has no AUC here (benchmarks/scoring.py has).

Departures from the paper: it scores with a judge alone, in 2N + 1 model calls a pair (N traces, N reconstructions, one
judgement), as `--scorers judge` does. The other scores, the guard and the controls are ours.
"""

import json
from collections import Counter
from collections.abc import Callable, Container, Sequence
from functools import partial
from itertools import zip_longest
from typing import Any

from common import (ASPECTS, REMOTE, Group, Portions, Row, Server, append_rows, batches_by_length, begin_output, begin_run, bootstrap_interval, check_made_from,
                    clean_action, closing_line, cut_context, decode, digit_tokens, discard, embed, encode_data, encode_prompt, end_output, finished_rows, gather,
                    generate, guard_traces, judge_locally, judge_remotely, leave_to_first, likelihood_scores, load_encoder, load_model, load_writer, made_with,
                    messages_of, open_server, other_pairs, part_of, positive_int, progress, read_candidates, read_object, read_pairs, reconstruction_prompt, run_stage, seed_of,
                    server_address, server_arguments, share, show_context, show_rate, show_scene, stage_arguments, stop, stop_unanswered, write_text)

SCORERS = ("likelihood", "embedding", "judge")
Judge = Callable[[str, str, Sequence[str]], tuple[list[dict[str, float]] | None, int]]  # (context, action, guesses) -> (ratings, calls)


def reconstruct(model: Any, tokenizer: Any, contexts: Sequence[str], traces: Sequence[Sequence[str | None]], max_tokens: int) -> list[list[str | None]]:
    """M_a's greedy prediction of the action for each trace of each context; a trace of None predicts without one.

    The context is computed once for its traces. There is no action among the arguments. A `model` that is a Server is asked;
    what it does not answer is None.
    """
    if isinstance(model, Server):
        prompts = [messages_of("reconstruction", context=context, trace=trace) if trace is not None else messages_of("reconstruction_no_trace", context=context)
                   for context, some in zip(contexts, traces) for trace in some]
        answers = iter([answer and clean_action(answer.text) for answer in model.ask_all({"messages": prompt, "max_tokens": max_tokens} for prompt in prompts)])
        return [[next(answers) for _ in some] for some in traces]
    groups: list[Group] = []
    for context, some in zip(contexts, traces):
        prefix, suffixes = reconstruction_prompt(tokenizer, context, some)
        groups.append((prefix, suffixes))
    texts = iter([clean_action(decode(tokenizer, completion)) for completion in generate(model, tokenizer, groups, max_tokens, stop_text="\n")])
    return [[next(texts) for _ in some] for some in traces]


def local_judge(model: Any, tokenizer: Any) -> Judge:
    """A judge whose ratings are read from a local model's token probabilities, one call each."""
    digit_tokens(tokenizer)
    return lambda context, action, guesses: (judge_locally(model, tokenizer, context, action, guesses), 1)


def judge_in_order(judge: Judge, context: str, action: str, guesses: Sequence[str], first: int) -> tuple[list[dict[str, float]] | None, int]:
    """The judge's ratings of `guesses`, in their order, when guess number `first` is shown first and the rest follow in a circle."""
    shown = [*guesses[first:], *guesses[:first]]
    ratings, calls = judge(context, action, shown)
    return (ratings and [ratings[(place - first) % len(guesses)] for place in range(len(guesses))]), calls


def judge_all(judge: Judge | Server, asked: Sequence[tuple[str, str, Sequence[str], int]]) -> list[tuple[list[dict[str, float]] | None, int] | None]:
    """judge_in_order of each (context, action, guesses, first); a server is asked many at once, and what it does not answer is None."""
    if isinstance(judge, Server):
        return judge.each(lambda one: judge_in_order(partial(judge_remotely, judge), *one), asked)
    return [judge_in_order(judge, *one) for one in asked]


def score_pairs(model: Any, tokenizer: Any, encoder: Any, judge: Judge | Server | None, pairs: Sequence[Row], sampled: Sequence[Row], controls: Sequence[Row],
                scorers: Sequence[str], max_tokens: int, done: Container[str] = ()) -> tuple[list[Row], list[Row]]:
    """The row `sampled` of each pair with scores for every candidate, for no trace and for the control; and its token log-probs.

    No row for a pair in `done`, which is there to fill the batch, nor for one for which a server gave no answer.

    A control is {id, trace}, a trace of another pair. The judge never sees it, nor the reconstruction without a trace:
    with the judge alone there are N reconstructions and one judgement a pair.
    """
    contexts, scenes = [show_context(pair) for pair in pairs], [show_scene(pair) for pair in pairs]
    rows, logprobs = [], []
    for pair, context, row, control in zip(pairs, contexts, sampled, controls):
        everyone = [dict(candidate) for candidate in (*row["candidates"], control)]
        for candidate, found in zip(everyone, guard_traces(encoder, [candidate["trace"] for candidate in everyone], pair["action"], context)):
            candidate |= found | {"scores": {}}
        rows.append({**row, "cut": pair.get("cut", 0), "candidates": everyone[:-1], "baseline": {}, "control": everyone[-1], "calls": {}})

    if "likelihood" in scorers:
        for pair, row in zip(pairs, rows):
            everyone = [*row["candidates"], row["control"]]
            gains, tokens = likelihood_scores(model, tokenizer, pair, [candidate["trace"] for candidate in everyone])
            for candidate, gain in zip(everyone, gains):
                candidate["logprob_sum"] = gain.pop("logprob_sum")
                candidate["scores"] |= gain
            row["baseline"] |= {"likelihood": 0.0, "unsaid": 0.0, "logprob_sum": sum(tokens[0]), "action_tokens": len(tokens[0])}
            logprobs.append({"id": row["id"], "baseline": tokens[0], "candidates": tokens[1:-1], "control": tokens[-1]})

    if "embedding" in scorers or "judge" in scorers:
        more = [[None, row["control"]["trace"]] if "embedding" in scorers else [] for row in rows]
        written = reconstruct(model, tokenizer, scenes, [[*(c["trace"] for c in row["candidates"]), *extra] for row, extra in zip(rows, more)], max_tokens)
        whole = [place for place, texts in enumerate(written) if None not in texts]
        pairs, scenes, rows, written, more = ([some[place] for place in whole] for some in (pairs, scenes, rows, written, more))
        for row, texts, extra in zip(rows, written, more):
            places = [*row["candidates"], row["baseline"], row["control"]]
            for place, text in zip(places, texts):
                place["reconstruction"] = text
            row["calls"] = {"reconstructions": len(row["candidates"]), "reconstructions for controls": len(extra)}

    if "embedding" in scorers:
        for pair, row in zip(pairs, rows):
            everyone = [*row["candidates"], row["control"]]
            action, without, *vectors = embed(encoder, [pair["action"], row["baseline"]["reconstruction"], *(c["reconstruction"] for c in everyone)])
            row["baseline"]["embedding"] = (action @ without).item()                    # unit length, so a dot is a cosine
            for candidate, vector in zip(everyone, vectors):
                candidate["scores"]["embedding"] = (action @ vector).item() if candidate["reconstruction"] else -1.0

    if "judge" in scorers:
        # Another guess comes first in every pair, so that no candidate's number gains from its place.
        asked = {row["id"]: (scene, pair["action"], [candidate["reconstruction"] for candidate in row["candidates"]], seed_of("judge", row["id"]) % len(row["candidates"]))
                 for pair, scene, row in zip(pairs, scenes, rows) if row["id"] not in done}
        told = dict(zip(asked, judge_all(judge, list(asked.values()))))
        judged = [(row, told[row["id"]]) for row in rows if told.get(row["id"])]
        for row, (ratings, calls) in judged:
            row["calls"]["judgements"] = calls
            for candidate, rating in zip(row["candidates"], ratings or [None] * len(row["candidates"])):
                candidate["judge"] = rating
                candidate["scores"]["judge"] = rating and sum(rating.values()) / len(ASPECTS)
        rows = [row for row, _ in judged]
    return [row for row in rows if row["id"] not in done], logprobs


# ------------------------------------------------------------------------------------------------
# Controls: does the score measure what it should?


def ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 0, ties sharing their mean rank: ranks([5, 1, 5]) is [1.5, 0, 1.5]."""
    return [sum(other < value for other in values) + (sum(other == value for other in values) - 1) / 2 for value in values]


def rank_correlation(groups: Sequence[tuple[Sequence[float], Sequence[float]]]) -> float | None:
    """Spearman's correlation within groups: ranks are taken inside each pair's candidates, so pairs do not differ in level.

    None if there is nothing to correlate.
    """
    products = squares_x = squares_y = 0.0
    for xs, ys in groups:
        middle = (len(xs) - 1) / 2
        for x, y in zip(ranks(xs), ranks(ys)):
            products, squares_x, squares_y = products + (x - middle) * (y - middle), squares_x + (x - middle) ** 2, squares_y + (y - middle) ** 2
    return products / (squares_x * squares_y) ** 0.5 if squares_x and squares_y else None


def own_over_other(own: Sequence[float], other: Sequence[float]) -> list[float]:
    """Every comparison of an own with another trace of one pair: 1 if the own one scores higher, 0.5 for a tie, else 0."""
    return [(a > b) + 0.5 * (a == b) for a in own for b in other]


def auc(rows: Sequence[Row], conversations: dict[str, str], name: str, guarded: bool) -> Row | None:
    """Share of the comparisons within pairs that a pair's own trace wins against the control, with a 95 % interval by conversation.

    `guarded` leaves out stopped traces, own ones and controls.
    """
    points, clusters = [], []
    for row in rows:
        some = [[c["scores"][name] for c in side if c["scores"].get(name) is not None and not (guarded and c["stopped"])]
                for side in (row["candidates"], [row["control"]])]
        compared = own_over_other(*some)
        points += compared
        clusters += [conversations[row["id"]]] * len(compared)
    if not points:
        return None
    return {"auc": sum(points) / len(points), "ci95": bootstrap_interval(points, clusters, 0), "comparisons": len(points)}


def measure_controls(rows: Sequence[Row], conversations: dict[str, str], name: str) -> Row:
    """The controls of one score over all rows."""
    scored = [row for row in rows if any(c["scores"].get(name) is not None for c in row["candidates"])]
    groups = [[c for c in row["candidates"] if c["scores"].get(name) is not None] for row in scored]
    against = lambda key: rank_correlation([([c["scores"][name] for c in some], [c[key] for c in some]) for some in groups])
    beaten = [all(c["scores"][name] <= row["baseline"][name] for c in some) for row, some in zip(scored, groups) if name in row["baseline"]]
    return {"own_over_other": auc(rows, conversations, name, False), "own_over_other_guarded": auc(rows, conversations, name, True),
            "correlation_with_length": against("tokens"), "correlation_with_leak": against("leak"), "correlation_with_rewording": against("reworded"),
            "pairs_where_no_trace_wins": sum(beaten) / len(beaten) if beaten else None}


def judge_movement(judge: Judge | Server, pairs: Sequence[Row], rows: Sequence[Row]) -> Row | None:
    """How far ratings move when the same guesses are shown in every rotation, beside how far they differ between guesses.

    Both are mean absolute differences on the 0 to 9 scale: of one guess in two orders, of two guesses over all orders. An order
    without an answer is left out.
    """
    asked = [(pair, [candidate["reconstruction"] for candidate in row["candidates"]]) for pair, row in zip(pairs, rows) if len(row["candidates"]) > 1]
    told = [one or (None, 0) for one in judge_all(judge, [(show_scene(pair), pair["action"], guesses, first) for pair, guesses in asked for first in range(len(guesses))])]
    answers, moved, apart = iter(told), [], []
    for _, guesses in asked:
        orders = [[sum(rating.values()) / len(ASPECTS) for rating in ratings] for ratings, _ in (next(answers) for _ in guesses) if ratings]
        moved += [abs(a[k] - b[k]) for k in range(len(guesses)) for i, a in enumerate(orders) for b in orders[:i]]
        means = [sum(values) / len(values) for values in zip(*orders)]
        apart += [abs(a - b) for i, a in enumerate(means) for b in means[:i]]
    if not moved or not apart:
        return None
    return {"between_orders": sum(moved) / len(moved), "between_guesses": sum(apart) / len(apart), "pairs": len(pairs), "calls": sum(calls for _, calls in told)}


def summarise(rows: Sequence[Row], conversations: dict[str, str], movement: Row | None, left_out: Sequence[str] = ()) -> Row:
    """What scores.summary.json holds."""
    every = [candidate for row in rows for candidate in row["candidates"]]
    names = sorted({name for candidate in every for name in candidate["scores"]}, key=("likelihood", "unsaid", "embedding", "judge").index)
    calls = Counter({"traces": len(every)})
    for row in rows:
        calls.update(row["calls"])
    if movement:
        calls["judgements in other orders"] = movement["calls"]
    guard = {"candidates": len(every), "leaking": sum(c["leak"] > 0 for c in every), "stopped": sum(c["stopped"] for c in every),
             "pairs_with_all_stopped": sum(all(c["stopped"] for c in row["candidates"]) for row in rows)}
    missing = sum(any(c["scores"].get("judge", 0) is None for c in row["candidates"]) for row in rows)
    return {"pairs": len(rows), "left_out": list(left_out), "contexts_cut": sum(row["cut"] > 0 for row in rows), "calls": dict(calls), "guard": guard, "judge_missing_pairs": missing,
            "judge_order": movement, "controls": {name: measure_controls(rows, conversations, name) for name in names}}


def print_summary(summary: Row) -> None:
    guard, calls = summary["guard"], summary["calls"]
    print(f"leak guard: stopped {guard['stopped']} of {guard['candidates']} candidates ({guard['leaking']} share a 4-gram with the action, the others reword it); "
          f"pairs with all stopped: {guard['pairs_with_all_stopped']} of {summary['pairs']}")
    for name, row in summary["controls"].items():
        own = " -> ".join(show_rate(part["auc"], part["ci95"]) if part else "none" for part in (row["own_over_other"], row["own_over_other_guarded"]))
        follows = ", ".join(f"{what} {row[f'correlation_with_{what}']:+.2f}" for what in ("length", "leak", "rewording") if row[f"correlation_with_{what}"] is not None)
        loses = "" if row["pairs_where_no_trace_wins"] is None else f"; not one trace above having no trace in {row['pairs_where_no_trace_wins']:.0%} of pairs"
        print(f"{name}: " + (f"own trace over another pair's {own} (behind the guard); " if row["own_over_other"] else "") + (f"correlation with {follows}" if follows else "no correlation to be had") + loses)
    if judged := calls.get("judgements"):
        print(f"judge: {calls['traces']} traces + {calls['reconstructions']} reconstructions + {judged} judgements = {calls['traces'] + calls['reconstructions'] + judged} model calls "
              f"for {summary['pairs']} pairs; {summary['judge_missing_pairs']} pairs without a valid answer")
    if moved := summary["judge_order"]:
        print(f"judge: another order of the same guesses moves a rating by {moved['between_orders']:.2f}; two guesses differ by {moved['between_guesses']:.2f} ({moved['calls']} further calls)")


# ------------------------------------------------------------------------------------------------
# The stage


def room_in_window(model: Any, tokenizer: Any, prompt: str, tokens: int) -> int:
    """Tokens left for a context in the model's window once the words of `prompt` and `tokens` more have their place."""
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if window is None:
        stop("the model's configuration names no window (max_position_embeddings); use a model that does")
    return window - sum(map(len, encode_prompt(tokenizer, prompt, context="", action="", trace="", guesses="", setting=""))) - tokens


def choose_controls(work: Sequence[Row], pairs: Sequence[Row], found: dict[str, Row]) -> dict[str, Row]:
    """{id, trace, tokens} for each pair of `work`: the first candidate of another of `pairs` (see common.other_pairs)."""
    if work and len(pairs) < 2:
        stop("one pair is not enough: each pair's control is the trace of another pair")
    chosen = {}
    for pair, other in zip(work, other_pairs(work, pairs, "control")):
        first = found[other["id"]]["candidates"][0]
        chosen[pair["id"]] = {"id": other["id"], "trace": first["trace"], "tokens": first["tokens"]}
    return chosen


def main(argv: list[str] | None = None) -> None:
    parser = stage_arguments(__doc__)
    group = parser.add_argument_group("scoring")
    group.add_argument("--scorers", default="likelihood,embedding", help=f"which scores to compute, comma-separated, from {', '.join(SCORERS)} (default: %(default)s)")
    group.add_argument("--encoder", default="embedded", metavar="NAME", help="mean-pooled sentence encoder: 'embedded', a local folder or a hub name (default: %(default)s)")
    group.add_argument("--judge", metavar="NAME", help="model that judges: a local folder, a hub name or openai:NAME (default: the reconstructor)")
    group.add_argument("--max-action-tokens", type=positive_int, default=24, help="tokens in a reconstruction, at most (default: %(default)s)")
    group.add_argument("--batch", type=positive_int, default=16, help="pairs reconstructed at once (default: %(default)s)")
    server_arguments(parser)
    group.add_argument("--keep-token-logprobs", action="store_true", help="write RUN/token_logprobs.jsonl as well")
    args = parser.parse_args(argv)
    scorers = args.scorers.split(",")
    if unknown := [name for name in scorers if name not in SCORERS]:
        stop(f"--scorers: unknown scorer {unknown[0]!r}; choose from {', '.join(SCORERS)}")
    if args.keep_token_logprobs and "likelihood" not in scorers:
        stop("--keep-token-logprobs needs the scorer likelihood")
    if args.judge and "judge" not in scorers:
        stop("--judge names a judge, but --scorers does not ask for one; add judge to --scorers")
    writing_remotely, judged_by = args.model.startswith(REMOTE), (args.judge or args.model) if "judge" in scorers else ""
    if writing_remotely and "likelihood" in scorers:
        stop("--scorers likelihood needs a local model; pass --scorers embedding,judge, or a local --model")

    started = begin_run(args.run, args.max_memory)
    sources, output = (args.run / "pairs.jsonl", args.run / "candidates.jsonl"), args.run / "scores.jsonl"
    side = args.run / "token_logprobs.jsonl"
    pairs = {pair["id"]: pair for pair in read_pairs(sources[0])}
    found = {row["id"]: row for row in read_candidates(sources[1], "02_sample_candidates.py", ("trace", "tokens"))}
    check_made_from(sources[1], sources[0], "02_sample_candidates.py")
    if foreign := next((name for name in found if name not in pairs), None):
        stop(f"{sources[1]}: id {foreign!r} is not in {sources[0]}; run 02_sample_candidates.py --overwrite")
    work = [pair for name, pair in pairs.items() if name in found][:args.limit]
    prompts = ["reconstruction", "reconstruction_no_trace", "transcript", "transcript_no_trace", *(["judge"] if "judge" in scorers else [])]
    at_server = {"server": server_address()} if writing_remotely or judged_by.startswith(REMOTE) else {}
    record = made_with(args, sources, prompts, ignore=("seed", "keep_token_logprobs", "concurrency", *(["batch"] if writing_remotely else [])), **at_server)
    keys, expected = ("id", "candidates", "baseline"), [pair["id"] for pair in work]
    done = finished_rows(output, record, args.overwrite, keys, expected)
    kept = finished_rows(side, record, args.overwrite or not done, ("id", "baseline", "candidates"), expected) if args.keep_token_logprobs else {}
    if args.keep_token_logprobs and (lost := next((name for name in done if name not in kept), None)):
        stop(f"{side} lacks the log-probs of {lost}, which {output} holds already; pass --overwrite")
    summary = args.run / "scores.summary.json"
    told = read_object(summary, "left_out")
    if done and told and len(done) + len(told["left_out"]) == len(work):
        print(f"03_reconstruct_score: {output} is already made ({len(done)} rows)")
        return

    model, tokenizer = load_writer(args.model, args.four_bit, args.concurrency)
    encoder = load_encoder(args.encoder)
    judge = judging = None                                    # judging: a local judge's model and tokenizer
    if judged_by.startswith(REMOTE):
        judge = model if judged_by == args.model else open_server(judged_by, args.concurrency)
    elif judged_by:
        judging = (model, tokenizer) if judged_by == args.model else load_model(judged_by, args.four_bit)
        judge = local_judge(*judging)
    servers = {id(some): some for some in (model, judge) if isinstance(some, Server)}.values()
    controls = choose_controls(work, [pair for name, pair in pairs.items() if name in found], found)
    fitting, left_out = [], []
    # A server's tokenizer and window are not known here: it is told what stage 1 left of a context, and refuses what is too long for it.
    counter = tokenizer or (judging and judging[1])
    for pair in work:
        if not counter:
            fitting.append(pair)
            continue
        traces = [candidate["trace"] for candidate in found[pair["id"]]["candidates"]]
        longest = max(len(encode_data(counter, trace)) for trace in (*traces, controls[pair["id"]]["trace"]))
        action = max(len(encode_data(counter, pair["action"])), args.max_action_tokens)
        rooms = [] if writing_remotely else [room_in_window(model, tokenizer, "reconstruction", longest + action)]
        if judging:                                           # a guess, its number, and room for the answer
            rooms.append(room_in_window(*judging, "judge", action + len(traces) * (args.max_action_tokens + 8) + 16))
        shorter = cut_context(counter, pair, min(rooms))
        if shorter:
            fitting.append(shorter)
        else:
            left_out.append(pair["id"])
            print(f"left out: pair {pair['id']}, whose action, traces and last turn do not fit the model's window together")

    summary.unlink(missing_ok=True)
    begin_output(output, record, args.overwrite)
    if args.keep_token_logprobs:
        begin_output(side, record, args.overwrite or not done)
    elif args.overwrite:
        discard(side)
    tokens = missing = 0
    length = lambda pair: len(show_context(pair) if writing_remotely else tokenizer.encode(show_context(pair)))
    portions, batches = Portions(), batches_by_length(fitting, length, args.batch)
    work_on = lambda some: list(zip_longest(*score_pairs(model, tokenizer, encoder, judge, some, [found[pair["id"]] for pair in some], [controls[pair["id"]] for pair in some],
                                                         scorers, args.max_action_tokens, done)))
    for batch in progress(share(batches), "reconstructing and scoring"):
        if all(pair["id"] in done for pair in batch):
            continue
        if writing_remotely:                                  # no row depends on another's, and none is paid for twice
            batch = [pair for pair in batch if pair["id"] not in done]
        scored = portions.run(work_on, batch)
        rows = [row for row, _ in scored if row]
        missing += sum(pair["id"] not in done for pair in batch) - len(rows)
        if args.keep_token_logprobs:                          # first, so that every row of scores.jsonl has its log-probs
            append_rows(part_of(side), [row for _, row in scored if row and row["id"] not in kept])
        append_rows(part_of(output), rows)
        if writing_remotely:
            continue
        texts = [text for row in rows for some in (*row["candidates"], row["baseline"], row["control"]) for text in (some.get("trace", ""), some.get("reconstruction", ""))]
        tokens += sum(map(len, tokenizer([*texts, *(show_context(pair) for pair in batch)]).input_ids))

    order = [pair["id"] for batch in batches for pair in batch]
    for path in (side, output) if args.keep_token_logprobs else (output,):
        end_output(path, order)
    tokens = model.prompt_tokens + model.completion_tokens if writing_remotely else sum(gather([tokens]))
    leave_to_first()
    scored = finished_rows(output, record, False, keys, expected)
    if not missing:
        some = [pair for pair in fitting[:8] if "judge" in scorers]
        movement = judge_movement(judge, some, [scored[pair["id"]] for pair in some]) if some else None
        measured = summarise(list(scored.values()), {name: pair["conversation"] for name, pair in pairs.items()}, movement, left_out)
        write_text(summary, json.dumps(measured, indent=1) + "\n")
        print_summary(measured)
    closing_line(args.run, "03_reconstruct_score", len(work), len(scored), len(done), started, tokens, servers)
    if missing:
        stop_unanswered(servers, missing, "pairs")


if __name__ == "__main__":
    run_stage(main)
