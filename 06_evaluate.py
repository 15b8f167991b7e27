"""Stage 6: each arm's user model acts on held-out pairs, and a judge compares the arms.

    in     RUN/pairs.jsonl, RUN/models/ARM/, RUN/scores[.TAG].jsonl; for the report RUN/rl.jsonl, RUN/costs.jsonl
    out    RUN/predictions/ARM.jsonl     what the user models wrote
           RUN/judgements.jsonl          who came closer, by pair and comparison
           RUN/results.json              arms, reconstructions, comparisons, warnings, and what it all was made with
           RUN/report.html               tables, plots and examples in one file that works offline

How to run it:

    python 06_evaluate.py
    python 06_evaluate.py --versus none --round-robin
    python 06_evaluate.py --judge openai:NAME              a model on a server (OPENAI_BASE_URL, OPENAI_API_KEY)
    python benchmarks/people.py --sheet 40                 people as judges, on the same texts

Two things are compared, each against the arm --versus: `actions` that the fitted user models write on their own, and
`reconstructions` that the frozen base wrote in stage 3 from an arm's trace, which was written with the action in view.
The first is the paper's question; the second asks of the traces alone whether they say enough.

The judge sees the context, the true action and two others. `encoder` (default): the closer in cosine wins, closer by
less than --margin is a tie; it is symmetric, as is `chrf`, which compares spelling alone. A language model is asked in
both orders, and where they disagree it is a tie. With --num-actions 4 each answer counts. A win rate counts a tie as
half a win. Its 95 % interval is a bootstrap over conversations (common.bootstrap_interval), because pairs of one
conversation are not independent; p is the two-sided sign-flip test that flips whole conversations.

Departures from the paper: its judge is a language model that agrees with people in 77 % of comparisons (as reported in
a summary of the paper); an encoder sees topic and wording, less of style and values. The controls are ours.
"""

import argparse
import importlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import torch

import common
from common import Choice, Completion, Cost, LocalModel, Pair, Prompt, Row, Scores

select_sft = importlib.import_module("04_select_sft")
rl_train = importlib.import_module("05_rl_train")

ORDER = ("none", "backward", "guarded", "recon", "judged", "recon-grpo", "e2e-grpo", "shuffled", "longest", "worst")
JUDGING = ("versus", "round_robin", "judge", "encoder", "margin", "api_omit")          # what no prediction depends on
FITTING = ("rank", "epochs", "batch_size", "lr", "limit", "seed", "dtype", "four_bit")         # the same for all arms
TEMPLATE = Path(__file__).resolve().parent / "templates" / "report.html"
Written = dict[str, dict[str, list[tuple[str | None, str]]]]      # (trace, text) of every answer, by arm and pair id
What = Literal["actions", "reconstructions"]


class Answer(Row):
    trace: str | None
    finished: bool                                         # the trace ended by itself
    action: str
    tokens: int                                            # that were sampled for both
    action_logprob: float                                  # of the true action behind this trace, nats in all


class Prediction(Row):
    """predictions/ARM.jsonl"""
    id: str
    answers: list[Answer]                                  # sampled independently, --num-actions of them
    action_tokens: int                                     # of the true action


class Verdict(Row):
    """judgements.jsonl"""
    what: What
    pair: str
    k: int                                                 # which of the pair's answers
    a: str                                                 # two arms
    b: str
    order: Literal["ab", "ba", "both"]                     # which was shown first; both: the judge is symmetric
    winner: Literal["a", "b", "tie"] | None                # None: no valid answer


# ----------------------------------------------------------------------------------------------------------------------
# Acting


@torch.inference_mode()
def true_action_logprobs(local: LocalModel, pair: Pair, traces: Sequence[str | None]) -> list[float]:
    """log p of the pair's true action behind each trace, nats in all."""
    prompt = common.encode_prompt(local.tokenizer, common.user_prompt(pair, thinking=traces[0] is not None))
    action = common.encode_data(local.tokenizer, pair.action)
    stems = [common.close_trace(local.tokenizer, trace) for trace in traces]
    (found,) = common.shared_prefix_logprobs(local.model, [(prompt, stems, [[action]] * len(stems))])
    return [row.sum().item() for row, in found]


def marginal_logprob(row: Prediction, count: int) -> float:
    """Estimate of log p(true action | context) with the trace summed out, nats a token: the log of the action's mean
    probability behind `count` of the model's own traces, averaged over groups of so many.

    It lies below the truth, the further the fewer the traces (Jensen); for an arm without traces it is exact.
    """
    found = [answer.action_logprob for answer in row.answers]
    groups = torch.tensor([found[start:start + count] for start in range(0, len(found) - count + 1, count)]).double()
    return ((groups.logsumexp(1) - math.log(count)).mean() / row.action_tokens).item()


def read_answer(completion: Completion, thinking: bool) -> Answer:
    """A trace and the action behind it. One that did not end is cut to whole sentences, and has no action yet."""
    trace, closed, action = completion.text.partition(common.END_THINK.strip())
    trace = trace.strip() if closed else common.trace_of(completion)
    if not thinking:
        trace, closed, action = None, "by itself", completion.text
    return Answer(trace=trace, finished=bool(closed), action=common.clean_action(action), tokens=completion.tokens,
                  action_logprob=0.0)                      # of the pair, which act knows


def act(local: LocalModel, pairs: Sequence[Pair], thinking: bool, args: argparse.Namespace) -> list[Prediction]:
    """What the user model writes for each pair: --num-actions times a trace of its own and an action behind it.

    A trace that does not end is closed for the model, so that every arm answers every pair.
    """
    count, tokenizer = args.num_actions, local.tokenizer
    options = {"temperature": args.temperature, "min_p": args.min_p}
    seeds = [[common.stable_seed(args.seed, "act", pair.id, k) for k in range(count)] for pair in pairs]
    found = local.sample([[common.user_prompt(pair, thinking)] * count for pair in pairs], seeds,
                         max_new_tokens=args.max_trace_tokens * thinking + args.max_action_tokens,
                         stop_text=None if thinking else "\n", **options)                # [pair][k]
    answers = [[read_answer(one, thinking) for one in group] for group in found]
    if late := [(pair, k, answer) for pair, group in zip(pairs, answers)
                for k, answer in enumerate(group) if not answer.finished]:
        groups = [(common.encode_prompt(tokenizer, common.user_prompt(pair, thinking)),
                   [common.close_trace(tokenizer, answer.trace)]) for pair, _, answer in late]
        seeds = [common.stable_seed(args.seed, "close", pair.id, k) for pair, k, _ in late]
        actions = common.generate(local.model, tokenizer, groups, args.max_action_tokens, seeds, stop_text="\n",
                                  **options)
        for (*_, answer), one in zip(late, actions):
            answer.action, answer.tokens = common.clean_action(one.text), answer.tokens + one.tokens
    for pair, group in zip(pairs, answers):
        for answer, logprob in zip(group, true_action_logprobs(local, pair, [answer.trace for answer in group])):
            answer.action_logprob = logprob
    return [Prediction(id=pair.id, answers=group, action_tokens=len(common.encode_data(tokenizer, pair.action)))
            for pair, group in zip(pairs, answers)]


def act_all(args: argparse.Namespace, pairs: Sequence[Pair], arms: Sequence[str], load: Callable[[], LocalModel]
            ) -> tuple[dict[str, dict[str, Prediction]], int, int]:
    """(predictions by arm and pair id, how many of them were there already, tokens in the others)."""
    found, there, tokens = {}, 0, 0
    for arm in arms:
        folder = args.run / "models" / arm
        inputs = [args.run / "pairs.jsonl", folder / "adapter_model.safetensors"]
        config = common.run_config(args, inputs, ["user_model"], JUDGING)
        output = common.Output(args.run / "predictions" / f"{arm}.jsonl", Prediction, config, args.overwrite)
        there += len(output.rows)
        if not output.has(pairs):
            local, thinking = load(), arm != "none"
            tokens_of = lambda pair: args.num_actions * (
                local.length(common.user_prompt(pair, thinking)) + args.max_trace_tokens * thinking
                + args.max_action_tokens)
            batches = common.batch_by_length(pairs, tokens_of, args.batch_tokens)
            todo = [batch for batch in batches if not output.has(batch)]
            user = LocalModel(common.add_adapter(local.model, 0, 0, folder, trainable=False), local.tokenizer)
            for rows in common.run_batches(lambda batch: act(user, batch, thinking, args), todo, f"{arm} acts"):
                output.append(rows)
                tokens += sum(answer.tokens for row in rows for answer in row.answers)
            local.model = user.model.unload()
        found[arm] = output.rows
    return found, there, tokens


def reconstructed(rows: Sequence[Scores], rule: str, score: str) -> dict[str, list[tuple[str | None, str]]]:
    """(trace, reconstruction) by pair id, as stage 3 wrote them: those of the candidate that stage 4 would choose;
    of no trace for the arm none, of the control for shuffled. Empty if stage 3 wrote none; a pair without the score is
    left out."""
    found = {}
    for row in rows if all(row.baseline_reconstruction is not None for row in rows) else []:
        if rule not in ("none", "shuffled", "backward") and not select_sft.has_score(row, score):
            continue
        k = None if rule in ("none", "shuffled") else select_sft.choose_candidate(rule, row, score)
        some = row.control if k is None else row.candidates[k]
        found[row.id] = [(None, row.baseline_reconstruction) if rule == "none" else (some.trace, some.reconstruction)]
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Judging


@dataclass
class Judge:
    """Who compares. ask(pair, [(first, second), …]) answers first, second, tie or None (no valid answer) for each."""

    name: str
    orders: tuple[str, ...]                                # ("both",) for a symmetric judge, else ("ab", "ba")
    ask: Callable[[Pair, list[tuple[str, str]]], list[str | None]]


def similarity_judge(name: str, encoder: Any, margin: float) -> Judge:
    """The text that is nearer to the true action wins: 'encoder' by cosine, 'chrf' by shared character sequences.

    chrF (Popović 2015, doi 10.18653/v1/W15-3049) knows nothing of meaning, and nothing of the leak detector's encoder.
    """
    if name == "chrf":
        from sacrebleu import sentence_chrf                # here: half a second that others need not pay

    def ask(pair: Pair, questions: list[tuple[str, str]]) -> list[str | None]:
        texts = sorted({text for question in questions for text in question})
        values = (common.cosines(encoder, [pair.action] * len(texts), texts) if name == "encoder" else
                  [sentence_chrf(text, [pair.action]).score / 100 for text in texts])
        near = dict(zip(texts, values))
        leads = [near[first] - near[second] for first, second in questions]
        return ["tie" if abs(lead) < margin else "first" if lead > 0 else "second" for lead in leads]

    return Judge(name, ("both",), ask)


def comparison_prompt(pair: Pair, question: tuple[str, str]) -> Prompt:
    first, second = map(common.one_line, question)
    return Prompt("comparison", {"context": common.format_scene(pair), "action": common.one_line(pair.action),
                                 "first": first, "second": second})


def local_judge(name: str, local: LocalModel) -> Judge:
    """A language model whose verdict is the likelier of the two answer tokens, in one forward for all questions."""
    letters = [local.tokenizer.encode(letter, add_special_tokens=False) for letter in "AB"]
    if any(len(ids) != 1 for ids in letters):
        common.fail(f"the tokenizer of --judge {name} does not write A and B as single tokens; choose another judge")

    @torch.inference_mode()
    def ask(pair: Pair, questions: list[tuple[str, str]]) -> list[str | None]:
        prompts = [common.encode_prompt(local.tokenizer, comparison_prompt(pair, question)) for question in questions]
        prefix, stems = common.split_prefix(prompts)
        logits, (rows,) = common.shared_prefix_logits(local.model, [(prefix, stems, [[letters[0]]] * len(stems))])
        leads = (logits[:, letters[0][0]] - logits[:, letters[1][0]])[torch.cat([row for row, in rows])].tolist()
        return ["first" if lead > 0 else "second" if lead < 0 else "tie" for lead in leads]

    return Judge(name, ("ab", "ba"), ask)


def parse_choice(answer: str) -> str | None:
    """'first' or 'second' from an answer that is one letter, perhaps with 'Message' or punctuation; else None."""
    found = re.fullmatch(r"\W*(?:message\s+)?([AB])\W*", answer, re.IGNORECASE)
    return found and {"A": "first", "B": "second"}[found.group(1).upper()]


def api_judge(api: common.ApiModel) -> Judge:
    """A model on a server. An answer that is not a letter is missing; no answer at all ends the stage."""
    def ask(pair: Pair, questions: list[tuple[str, str]]) -> list[str | None]:
        answers = api.ask_all([(api.messages(comparison_prompt(pair, question)), 16) for question in questions])
        common.fail_unanswered([api], answers.count(None), "comparisons")
        return [parse_choice(answer.text) for answer in answers]

    return Judge(f"{api.name} at {api.base}", ("ab", "ba"), ask)


def judge_pairs(judge: Judge, what: What, pairs: Sequence[Pair], texts: Written, comparisons: Sequence[tuple[str, str]]
                ) -> list[Verdict]:
    """A verdict for each pair, answer, comparison (a, b) and order. Two equal texts tie unasked."""
    rows = []
    for pair in common.progress(pairs, f"judging {what}"):
        asked = {(k, a, b, order): (x[1], y[1])[::-1 if order == "ba" else 1] for a, b in comparisons
                 for k, (x, y) in enumerate(zip(texts[a][pair.id], texts[b][pair.id])) for order in judge.orders}
        questions = sorted({question for question in asked.values() if question[0] != question[1]})
        answers = dict(zip(questions, judge.ask(pair, questions) if questions else []))
        for (k, a, b, order), question in asked.items():
            answer = "tie" if question[0] == question[1] else answers[question]
            first, second = "ba" if order == "ba" else "ab"
            winner = {"first": first, "second": second}.get(answer, answer)
            rows.append(Verdict(what=what, pair=pair.id, k=k, a=a, b=b, order=order, winner=winner))
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# Comparing

class Rate(Row):
    """A win rate, ties as half, with its 95 % interval by conversation."""
    n: int                                                 # answers
    win_rate: float | None = None
    ci95: list[float] | None = None


class Comparison(Rate):
    """One arm against another, from a's point of view."""
    what: What
    a: str
    b: str
    wins: int = 0
    ties: int = 0
    losses: int = 0
    p: float | None = None                                 # sign_flip_p
    p_holm: float | None = None                            # allowing for the number of comparisons
    identical: int = 0                                     # pairs whose two texts are the same: ties that nobody judged
    flip_rate: float | None = None                         # share in which the other order made the other arm win
    unparsed: float = 0.0                                  # share without a valid answer; they count nowhere else
    matched: Rate | None = None                            # among pairs whose texts differ and are about as long
    longer_wins: Rate | None = None                        # how often the longer text wins; 0.5 is no bias
    by_person: dict[str, Rate] = {}


def aggregate_orders(winners: Sequence[str | None]) -> tuple[str | None, bool | None]:
    """(verdict over all orders, do they contradict each other?). Orders that disagree tie; a missing one gives None."""
    if None in winners:
        return None, None
    verdict = winners[0] if len(set(winners)) == 1 else "tie"
    return verdict, {"a", "b"} <= set(winners) if len(winners) > 1 else None


def sign_flip_p(points: Sequence[float], clusters: Sequence[str], seed: int) -> float:
    """Two-sided p that the arms are equal: the sums (point - 0.5) of whole clusters change sign at random.

    Exact with 13 clusters or fewer, else from 9,999 random flips.
    """
    from scipy.stats import permutation_test               # here: a second that a finished stage need not pay

    sums: Counter[str] = Counter()
    for point, cluster in zip(points, clusters):
        sums[cluster] += point - 0.5
    if len(sums) < 2 or not any(sums.values()):
        return 1.0
    total = lambda values, axis: values.sum(axis=axis)
    return float(permutation_test([list(sums.values())], total, permutation_type="samples", rng=seed).pvalue)


def compare(verdicts: Sequence[Verdict], pairs: Sequence[Pair], texts: Written, seed: int) -> Comparison:
    """The statistics of one comparison from its verdicts: a point an answer, intervals by conversation."""
    a, b, by_id = verdicts[0].a, verdicts[0].b, {pair.id: pair for pair in pairs}
    winners: dict[tuple[str, int], list[str | None]] = {}
    for row in verdicts:
        winners.setdefault((row.pair, row.k), []).append(row.winner)
    settled = {answer: aggregate_orders(some) for answer, some in winners.items()}
    answered = [answer for answer, (verdict, _) in settled.items() if verdict]
    found = Comparison(what=verdicts[0].what, a=a, b=b, n=len(answered), unparsed=1 - len(answered) / len(settled))
    if not answered:
        return found
    points = [{"a": 1.0, "tie": 0.5, "b": 0.0}[settled[answer][0]] for answer in answered]
    mine = [by_id[name] for name, _ in answered]
    conversations = [pair.conversation for pair in mine]
    both = [[texts[arm][name][k][1] for arm in (a, b)] for name, k in answered]
    words = [[len(common.words_of(text)) for text in two] for two in both]
    differ = [x != y for x, y in both]
    flips = [settled[answer][1] for answer, other in zip(answered, differ) if other]

    def rate(keep: Sequence[bool], values: Sequence[float] = points) -> Rate:
        some = [(value, cluster) for value, cluster, kept in zip(values, conversations, keep) if kept]
        return Rate(n=len(some), win_rate=sum(value for value, _ in some) / len(some) if some else None,
                    ci95=common.bootstrap_interval(*zip(*some), seed) if some else None)

    everyone = rate([True] * len(answered))
    return found.model_copy(update=everyone.model_dump() | {
        "wins": points.count(1.0), "ties": points.count(0.5), "losses": points.count(0.0),
        "p": sign_flip_p(points, conversations, seed), "identical": differ.count(False),
        "flip_rate": sum(flips) / len(flips) if flips and flips[0] is not None else None,
        "matched": rate([other and max(two) <= 1.25 * min(two) + 1 for other, two in zip(differ, words)]),
        "longer_wins": rate([x != y for x, y in words],
                            [value if x > y else 1 - value for value, (x, y) in zip(points, words)]),
        "by_person": {user: rate([pair.user == user for pair in mine])
                      for user in sorted({pair.user for pair in mine})}})


def holm(values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (Holm 1979): holm([0.01, 0.04, 0.03]) is [0.03, 0.06, 0.06]."""
    adjusted, largest = [0.0] * len(values), 0.0
    for rank, place in enumerate(sorted(range(len(values)), key=lambda at: values[at])):
        largest = max(largest, min(1.0, (len(values) - rank) * values[place]))
        adjusted[place] = largest
    return adjusted


def compare_all(verdicts: Sequence[Verdict], pairs: Sequence[Pair], texts: Written, seed: int) -> list[Comparison]:
    """Every comparison in the verdicts, with p_holm over those that have a p."""
    groups: dict[tuple[str, str], list[Verdict]] = {}
    for row in verdicts:
        groups.setdefault((row.a, row.b), []).append(row)
    found = [compare(group, pairs, texts, seed) for group in groups.values()]
    valid = [row for row in found if row.p is not None]
    for row, p in zip(valid, holm([row.p for row in valid])):
        row.p_holm = p
    return found


def choose_comparisons(arms: Sequence[str], versus: str, round_robin: bool) -> list[tuple[str, str]]:
    """Which arms (a, b) to compare: each with `versus`, recon with its controls, recon-TAG with guarded; or all."""
    chosen = [(arm, versus) for arm in arms if arm != versus]
    controls = [("recon", "shuffled"), *((arm, "guarded") for arm in arms if arm.startswith("recon"))]
    more = list(combinations(arms, 2)) if round_robin else [(a, b) for a, b in controls if {a, b} <= set(arms)]
    return chosen + [(a, b) for a, b in more if versus not in (a, b)]


def find_warnings(comparisons: Sequence[Comparison], arms: dict[str, Any], args: argparse.Namespace,
                  score: str) -> list[str]:
    """What a reader should know before believing the table."""
    found = []
    if args.judge == "encoder":
        chosen = ", and recon was chosen by its cosine" if score == "embedding" else ""
        found.append(f"The judge and the leak detector share an encoder{chosen}: it sees topic and wording alone.")
    elif args.judge == args.model:
        found.append(f"The judge {args.judge} is the user models' own base, and such judges favour their own.")
    if "judged" in arms:
        made = common.read_config(args.run / "scores.jsonl")["arguments"]
        if args.judge == (made["judge"] or made["model"]):
            found.append("The judge that compares here also chose the traces of judged.")
    for row in comparisons:
        if row.flip_rate and row.flip_rate > 0.3:
            found.append(f"{row.what}: the judge contradicts itself in {row.flip_rate:.0%} of pairs when the order of "
                         f"{row.a} and {row.b} is turned.")
        longer = row.longer_wins and row.longer_wins.ci95
        if longer and not longer[0] <= 0.5 <= longer[1]:
            found.append(f"{row.what}: of {row.a} and {row.b} the longer text wins "
                         f"{common.format_rate(row.longer_wins.win_rate, longer)}; among texts of similar length "
                         f"{row.a} wins {common.format_rate(row.matched.win_rate, row.matched.ci95)}.")
    found += [f"{arm} repeats itself: {row['distinct']:.0%} of its actions differ from one another."
              for arm, row in arms.items() if row["distinct"] < 0.8]
    return [*found, "Every arm was fitted once: intervals are over conversations, not over refits."]


# ----------------------------------------------------------------------------------------------------------------------
# Results


def describe_arms(versus: str, comparisons: Sequence[Comparison], pairs: Sequence[Pair], texts: Written,
                  near: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """What results.json holds of each arm: its comparison with `versus`, and what its texts are like."""
    described, words = {}, lambda some: sum(len(common.words_of(text or "")) for text in some) / len(some)
    for arm, found in texts.items():
        row = next((row for row in comparisons if (row.a, row.b) == (arm, versus)), None)
        traces, mine = zip(*(answer for pair in pairs for answer in found[pair.id]))
        described[arm] = {
            "n": len(pairs), "versus": row and versus,
            **{key: row and getattr(row, key) for key in ("wins", "ties", "losses", "win_rate", "ci95", "p", "p_holm")},
            "similarity": sum(near[arm]) / len(mine), "distinct": len(set(mine)) / len(mine),
            "action_words": words(mine), "trace_words": words(traces)}
    return described


def describe_likelihood(pairs: Sequence[Pair], mine: dict[str, Prediction],
                        other: dict[str, Prediction]) -> dict[str, Any]:
    """The mean log p of the true action behind all K traces and behind fewer, its gain over that of `other`, and the
    share of traces that met the limit."""
    most = len(mine[pairs[0].id].answers)
    by_k = {k: sum(marginal_logprob(mine[pair.id], k) for pair in pairs) / len(pairs)
            for k in sorted({most, *(2**power for power in range(most.bit_length()))})}
    now = [marginal_logprob(mine[pair.id], most) for pair in pairs]
    gains = [value - marginal_logprob(other[pair.id], most) for value, pair in zip(now, pairs)]
    ended = [answer.finished for pair in pairs for answer in mine[pair.id].answers]
    return {"action_logprob": sum(now) / len(now), "action_logprob_by_k": by_k,
            "action_logprob_gain": sum(gains) / len(gains),
            "action_logprob_gain_ci95": common.bootstrap_interval(gains, [pair.conversation for pair in pairs]),
            "unfinished": 1 - sum(ended) / len(ended)}


def format_table(what: What, arms: dict[str, dict[str, Any]]) -> str:
    lines = [f"{what:<15} {'n':>4} {'wins':>5} {'ties':>5} {'losses':>6}  {'win rate':<22} {'p':>6} {'similarity':>10} "
             f"{'distinct':>8} {'words':>5}" + (f" {'log p(action)':>13}" if what == "actions" else "")]
    for arm, row in arms.items():
        rate = common.format_rate(row["win_rate"], row["ci95"]) if row["versus"] else "(compared with)"
        wins, ties, losses = ("" if row[key] is None else row[key] for key in ("wins", "ties", "losses"))
        p = "" if row["p"] is None else f"{row['p']:.3f}"
        lines.append(f"{arm:<15} {row['n']:>4} {wins:>5} {ties:>5} {losses:>6}  {rate:<22} {p:>6} "
                     f"{row['similarity']:>10.3f} {row['distinct']:>8.0%} {row['action_words']:>5.1f}"
                     + (f" {row['action_logprob']:>13.3f}" if what == "actions" else ""))
    return "\n".join(lines)


def print_results(results: dict[str, Any]) -> None:
    for what, key in (("actions", "arms"), ("reconstructions", "reconstructions")):
        if results[key]:
            print(format_table(what, results[key]))
    people = len(results["data"]["people"])
    print(f"judge: {results['judge']}; {results['data']['conversations']} conversations of {people} people")
    print("\n".join(results["warnings"]))


def make_example(pair: Pair, place: int, texts: Written, near: dict[str, list[float]], verdicts: Sequence[Verdict],
                 row: Scores | None) -> dict[str, Any]:
    """What the report shows of a pair: every arm's first answer with its outcome, and the candidates."""
    arms = {}
    for arm, found in texts.items():
        mine = [some.winner for some in verdicts if (some.pair, some.k, some.a) == (pair.id, 0, arm)]
        (winner, _), (trace, action) = aggregate_orders(mine or [None]), found[pair.id][0]
        arms[arm] = {"trace": trace, "action": action, "similarity": near[arm][place * len(found[pair.id])],
                     "outcome": {"a": "win", "b": "loss"}.get(winner, winner)}
    return {"id": pair.id, "user": pair.user, "context": common.format_context(pair), "action": pair.action,
            "arms": arms, "scored": row and row.model_dump()}


def write_page(path: Path, template: Path, data: dict[str, Any]) -> None:
    """A page with its data as JSON inside. '<' is escaped: no text can end the script; pages set text, never HTML."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    common.write_file(path, template.read_text(encoding="utf-8").replace("DATA", text, 1))


# ----------------------------------------------------------------------------------------------------------------------
# The stage


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = common.stage_arguments(__doc__)
    add = parser.add_argument_group("acting").add_argument
    add("--num-actions", **common.COUNT, default=1, help="answers a pair, each a trace of its own and an action")
    add("--max-trace-tokens", **common.COUNT, default=56, help="tokens in a trace and its closing tag")
    add("--max-action-tokens", **common.COUNT, default=24, help="tokens in an action, at most")
    add("--temperature", type=common.positive_float, default=0.7, help="of traces and actions")
    add("--min-p", type=common.fraction, default=0.1, help="leave out tokens less likely than this times the likeliest")
    common.batch_argument(add)
    add = parser.add_argument_group("judging").add_argument
    add("--versus", default="backward", metavar="ARM", help="the arm that all others are compared with")
    add("--round-robin", action="store_true", help="compare all arms with one another")
    add("--judge", default="encoder", metavar="NAME", help="'encoder', 'chrf', or a language model as --model names "
        "it")
    add("--encoder", default="embedded", metavar="NAME", help="sentence encoder of the judge and of the similarities")
    add("--margin", type=common.fraction, default=0.02, help="similarities closer than this are a tie")
    common.api_arguments(parser)
    return parser.parse_args(argv)


def find_arms(args: argparse.Namespace) -> list[str]:
    """The arms that were fitted, in a fixed order. Fails unless all were fitted alike on the pairs there are now."""
    models = args.run / "models"
    names = {path.name for path in models.glob("*") if (path / "adapter_model.safetensors").is_file()} - {"synthesizer"}
    arms = [arm for arm in ORDER if arm in names] + sorted(names - set(ORDER))
    if args.versus not in arms:
        common.fail(f"{models / args.versus} does not exist, and --versus names it; run 04_select_sft.py first")
    first: tuple | None = None
    for arm in arms:
        common.check_adapter(models / arm, args.model)
        common.check_made_from(models / arm, args.run / "pairs.jsonl", "the stages from 02 on with")
        if arm == "e2e-grpo":
            continue
        settings = {key: common.read_config(models / arm)["arguments"].get(key) for key in FITTING}
        ids = [row.id for row in common.read_rows(args.run / "traces" / f"{arm}.jsonl", Choice)]
        first = first or (arm, settings, ids)
        if difference := common.first_difference(first[1], settings) or (first[2] != ids and "other training pairs"):
            common.fail(f"{first[0]} and {arm} were not fitted alike: {difference}; run 04_select_sft.py --overwrite")
    return arms


def read_scores(args: argparse.Namespace, tag: str | None, ids: set[str]) -> list[Scores]:
    """The rows of held-out pairs in scores[.TAG].jsonl; none without the file."""
    path = args.run / common.tagged("scores.jsonl", tag)
    return [row for row in common.read_rows(path, Scores) if row.id in ids] if path.is_file() else []


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    started = common.open_run(args)
    source = args.run / "pairs.jsonl"
    pairs = [pair for pair in common.read_rows(source, Pair, "01_prepare.py") if pair.split == "test"][:args.limit]
    if not pairs:
        common.fail(f"{source} holds no pair of the test split; run 01_prepare.py with more pairs")
    arms, ids = find_arms(args), {pair.id for pair in pairs}
    target, report, judged = (args.run / name for name in ("results.json", "report.html", "judgements.jsonl"))
    held: dict[str, LocalModel] = {}                       # one model at a time

    def load(name: str = args.model) -> LocalModel:
        if name not in held:
            held.clear()
            held[name] = common.load_model(name, args.four_bit, args.dtype)
        return held[name]

    if args.show_prompt:
        return print(load().show(common.user_prompt(pairs[0], thinking=True)))
    tags = [arm.removeprefix("recon-") for arm in arms if arm.startswith("recon-")]
    scores = {tag: read_scores(args, tag, ids) for tag in (None, *tags)}
    made_of = [source, *(path for tag in scores if (path := args.run / common.tagged("scores.jsonl", tag)).is_file()),
               *(args.run / "models" / arm / "adapter_model.safetensors" for arm in arms)]
    config = common.run_config(args, made_of, ["user_model", "comparison"])
    log = args.run / "rl.jsonl"                            # it holds seconds, so it is no part of the config
    newer = log.is_file() and report.is_file() and log.stat().st_mtime > report.stat().st_mtime
    if report.is_file() and target.is_file() and not (args.overwrite or newer) and common.read_config(target) == config:
        print_results(json.loads(target.read_text(encoding="utf-8")))
        return print(f"{target} and {report} are complete")
    # Now, as acting takes long and a key may be wrong.
    api = common.ApiModel(args.judge, args) if args.judge.startswith(common.REMOTE) else None
    predictions, there, tokens = act_all(args, pairs, arms, load)
    if common.process_rank():                              # what is left is work for one
        return
    recon = args.run / "traces" / "recon.jsonl"
    score = common.read_config(recon)["arguments"]["score"] if recon.is_file() else "contrast"
    rules = {arm: (None, arm) for arm in select_sft.ARMS if arm != "judged" or arm in arms}
    rules |= {f"recon-{tag}": (tag, "guarded") for tag in tags}
    rebuilt = {arm: reconstructed(scores[tag], rule, select_sft.score_of(rule, score))
               for arm, (tag, rule) in rules.items()}
    written = {"actions": {arm: {name: [(answer.trace, answer.action) for answer in row.answers]
                                 for name, row in rows.items()} for arm, rows in predictions.items()},
               "reconstructions": {arm: found for arm, found in rebuilt.items() if found}}
    encoder = common.load_encoder(args.encoder)
    judge = (similarity_judge(args.judge, encoder, args.margin) if args.judge in ("encoder", "chrf") else
             api_judge(api) if api else local_judge(args.judge, load(args.judge)))
    verdicts, comparisons, near, described = [], [], {}, {"actions": {}, "reconstructions": {}}
    for what, texts in written.items():
        some = [pair for pair in pairs if all(pair.id in found for found in texts.values())]
        versus = args.versus if args.versus in texts else "backward"
        if versus not in texts or not some:
            print(f"no {what} are compared: stage 3 wrote none for held-out pairs")
            continue
        rows = judge_pairs(judge, what, some, texts, choose_comparisons(list(texts), versus, args.round_robin))
        statistics = compare_all(rows, some, texts, args.seed)
        near[what] = {arm: common.cosines(encoder, *zip(*((pair.action, text) for pair in some
                                                          for _, text in found[pair.id])))
                      for arm, found in texts.items()}
        described[what] = describe_arms(versus, statistics, some, texts, near[what])
        verdicts, comparisons = verdicts + rows, comparisons + statistics
    for arm, row in described["actions"].items():
        row |= describe_likelihood(pairs, predictions[arm], predictions[args.versus])
    results = {
        "arms": described["actions"], "reconstructions": described["reconstructions"],
        "comparisons": [row.model_dump() for row in comparisons], "judge": judge.name, "versus": args.versus,
        "chosen_by": score,
        "warnings": find_warnings(comparisons, described["actions"], args, score),
        "data": {"people": dict(Counter(pair.user for pair in pairs)), "pairs": len(pairs),
                 "conversations": len({pair.conversation for pair in pairs})}, "config": config}
    common.write_file(judged, "".join(map(common.dump_row, verdicts)))
    print_results(results)
    common.end_stage(args, "06_evaluate", len(arms) * len(pairs), len(arms) * len(pairs), there, started, tokens,
                     f"open {report}", [api] if api else [])
    by_id = {row.id: row for row in scores[None]}
    against = [row for row in verdicts if row.what == "actions" and row.b == args.versus]
    curves = common.read_rows(log, rl_train.Step) if log.is_file() else []
    write_page(report, TEMPLATE, results | {
        "examples": [make_example(pair, place, written["actions"], near["actions"], against, by_id.get(pair.id))
                     for place, pair in enumerate(pairs)],
        "rl": [row.model_dump() for row in curves],
        "costs": [row.model_dump() for row in common.read_rows(args.run / "costs.jsonl", Cost)]})
    common.write_file(target, json.dumps(results, indent=1, default=str), config)


if __name__ == "__main__":
    common.run_stage(main)
