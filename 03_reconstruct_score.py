"""Stage 3: the reconstructor predicts the action from context and trace; each trace is scored by how close it comes.

The heart of Recon: a trace from which the action can be predicted holds a cause of it; a mere justification does not.
The reconstructor never sees the action when it writes. All scores are per candidate, and higher is better:

    likelihood         mean over the action's tokens of log p(token | context, trace) - log p(token | context), nats
    masked_likelihood  the same, but tokens of content words that the trace gives away earn nothing
    contrast           masked_likelihood minus its mean over 4 actions of other conversations in the same context: what
                       helps any action earns nothing. Stage 4 selects by it, and stage 5 rewards it
    embedding          cosine of the encoded reconstruction and the encoded action
    judge              a language model sees the action and all N reconstructions and rates style, intent and values,
                       0 to 9 each; their mean

and the leak detector, without which no score is trusted, because a trace that quotes the action reconstructs it best
(common.detect_leaks): selection takes a leak last, and in GRPO it earns less than the average honest trace.

    in     RUN/pairs.jsonl, RUN/candidates[.TAG].jsonl
    out    RUN/scores[.TAG].jsonl             with reconstructions from every candidate, from no trace (the baseline)
                                              and from another pair's trace (the control), for held-out pairs too
           RUN/scores[.TAG].summary.json      do the scores measure anything? See ScoreCheck

How to run it:

    python 03_reconstruct_score.py
    python 03_reconstruct_score.py --scorers likelihood                          writes no reconstructions: faster
    python 03_reconstruct_score.py --scorers likelihood,embedding,judge          the paper's scorer beside ours
    python 03_reconstruct_score.py --scorers judge --judge openai:NAME           by a server
    python 03_reconstruct_score.py --tag grpo                                    the second set, as the first was scored

Departures from the paper: it scores with a judge alone, in 2N + 1 model calls a pair (N traces, N reconstructions, one
judgement), as `--scorers judge` does. The other scores, the leak detector and the controls are ours.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

import common
from common import Candidate, Candidates, Control, Leak, Pair, Prompt, Row, Scored, Scores

SCORERS = ("likelihood", "embedding", "judge")
SCORES = ("likelihood", "masked_likelihood", "contrast", "embedding", "judge")
ASPECTS = ("style", "intent", "values")
Ratings = list[dict[str, float]]                           # {aspect: 0 to 9} of each guess


# ----------------------------------------------------------------------------------------------------------------------
# Reconstruct


def reconstruct(model: common.LocalModel | common.ApiModel, pairs: Sequence[Pair],
                traces: Sequence[Sequence[str | None]], max_new_tokens: int) -> list[list[str] | None]:
    """The greedy prediction of the action from each trace of each pair; a trace of None predicts without one.

    None for a pair that a server did not answer in full.
    """
    prompts = [[common.reconstruction_prompt(pair, trace) for trace in group] for pair, group in zip(pairs, traces)]
    found = model.sample(prompts, max_new_tokens=max_new_tokens, stop_text="\n")
    return [[common.clean_action(guess.text) for guess in group] if all(group) else None for group in found]


# ----------------------------------------------------------------------------------------------------------------------
# The judge

NO_JSON = str.maketrans(dict.fromkeys('{}[]"', " "))


def without_json(text: str) -> str:
    """One line without brackets and double quotes: the embedded model copied the numbers of an answer that a message
    forged and raised its rating by 4 of 9 points, whatever the prompt said against it."""
    return common.one_line(text.translate(NO_JSON))


def judge_prompt(pair: Pair, guesses: Sequence[str]) -> Prompt:
    numbered = [f"Guess {number}: {without_json(guess)}" for number, guess in enumerate(guesses, start=1)]
    return Prompt("judge", {"context": common.format_scene(pair).translate(NO_JSON), "guesses": "\n".join(numbered),
                            "action": without_json(pair.action)})


@torch.inference_mode()
def rate_locally(judge: common.LocalModel, pair: Pair, guesses: Sequence[str]) -> Ratings:
    """Ratings from token probabilities: the expected digit where the answer's digit is due (G-Eval, arXiv 2303.16634).

    It needs no parsing, has no ties and is never missing. All answers' beginnings, one a guess and aspect, share the
    prompt; the JSON has no spaces, so that the digit is the very next token.
    """
    encode = lambda text: judge.tokenizer.encode(text, add_special_tokens=False)
    if any(len(encode(str(digit))) != 1 for digit in range(10)):
        common.fail("the judge's tokenizer does not write the digits 0 to 9 as single tokens; choose another --judge")
    digits = [encode(str(digit))[0] for digit in range(10)]
    beginnings = [encode(f'{{"{number}":{{"{aspect}":') for number in range(1, len(guesses) + 1) for aspect in ASPECTS]
    prompt = common.encode_prompt(judge.tokenizer, judge_prompt(pair, guesses))
    tree = prompt, beginnings, [[digits[:1]]] * len(beginnings)
    logits, (rows,) = common.shared_prefix_logits(judge.model, [tree])
    chances = logits[torch.cat([row for row, in rows])][:, digits].softmax(-1)          # [guesses * aspects, 10]
    expected = (chances @ torch.arange(10.0, device=chances.device)).view(len(guesses), len(ASPECTS)).tolist()
    return [dict(zip(ASPECTS, row)) for row in expected]


def parse_ratings(answer: str, count: int) -> Ratings | None:
    """The ratings of `count` guesses in a judge's JSON answer, or None if it is anything but exactly that.

    A code fence around the object is taken off; nothing else is repaired: a guessed rating is worse than none.
    """
    text = re.sub(r"\A```(?:json)?\s*\n(.*)\n```\Z", r"\1", answer.strip(), flags=re.DOTALL)
    try:
        found = json.loads(text)
        rows = [found[str(number)] for number in range(1, count + 1)]
        if any(type(value) not in (int, float) for row in rows for value in row.values()):
            return None
        ratings = [{aspect: float(row.pop(aspect)) for aspect in ASPECTS} for row in rows]
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
        return None
    whole = len(found) == count and not any(found.values())        # no further guess and no further aspect
    return ratings if whole and all(0 <= value <= 9 for row in ratings for value in row.values()) else None


def rate_guesses(judge: Any, pairs: Sequence[Pair], guesses: Sequence[Sequence[str]]) -> list[Ratings | None | str]:
    """Ratings of each pair's guesses: None where a server's answer is not the JSON asked for, 'unanswered' without one.

    Another guess is shown first in every pair, so that no candidate's number gains from its place.
    """
    firsts = [common.stable_seed("judge", pair.id) % len(some) for pair, some in zip(pairs, guesses)]
    shown = [[*some[first:], *some[:first]] for some, first in zip(guesses, firsts)]
    if isinstance(judge, common.ApiModel):
        answers = judge.ask_all([(judge.messages(judge_prompt(pair, some)), 50 + 50 * len(some))
                                 for pair, some in zip(pairs, shown)])
        found = ["unanswered" if answer is None else parse_ratings(answer.text, len(some))
                 for answer, some in zip(answers, shown)]
    else:
        found = [rate_locally(judge, pair, some) for pair, some in zip(pairs, shown)]
    back = lambda ratings, first: [ratings[(place - first) % len(ratings)] for place in range(len(ratings))]
    return [back(ratings, first) if isinstance(ratings, list) else ratings for ratings, first in zip(found, firsts)]


# ----------------------------------------------------------------------------------------------------------------------
# Score


@dataclass
class Work:
    """A pair with all that its scoring needs."""

    pair: Pair
    row: Candidates
    leaks: list[Leak]                                      # of its candidates
    control: tuple[str, Candidate]                         # another pair's id, and a trace of that pair
    negatives: list[str]                                   # actions of other conversations, for contrast

    @property
    def id(self) -> str:
        return self.pair.id


def choose_other(pairs: Sequence[Pair], *seed: object) -> dict[str, Pair]:
    """Another pair for each pair, by id: the next in a seeded circle, of another conversation where there is one."""
    circle = sorted(pairs, key=lambda pair: common.stable_seed(*seed, pair.id))
    chosen = {}
    for place, pair in enumerate(circle):
        later = [*circle[place + 1:], *circle[:place]]
        elsewhere = (other for other in later if other.conversation != pair.conversation)
        chosen[pair.id] = next(elsewhere, later[0] if later else pair)
    return chosen


def prepare_work(encoder: Any, pairs: Sequence[Pair], found: dict[str, Candidates], negatives: int,
                 seed: int) -> list[Work]:
    """The leaks of every candidate, and for each pair its control and negatives, both of its own split."""
    leaks = {pair.id: common.detect_leaks(encoder, [candidate.trace for candidate in found[pair.id].candidates],
                                          pair.action, common.format_context(pair)) for pair in pairs}
    work = {}
    for split in ("train", "val", "test"):
        peers = [pair for pair in pairs if pair.split == split]
        others = choose_other(peers if len(peers) > 1 else pairs, "control")
        for pair, other in ((pair, others[pair.id]) for pair in peers):
            passing = [k for k, leak in enumerate(leaks[other.id]) if not leak.is_leak]
            trace = found[other.id].candidates[passing[0] if passing else 0]
            work[pair.id] = Work(pair, found[pair.id], leaks[pair.id], (other.id, trace),
                                 common.choose_negatives(pair, peers, negatives, other.id, seed))
    return [work[pair.id] for pair in pairs]


def score_pairs(work: Sequence[Work], model: Any, encoder: Any, judge: Any, scorers: Sequence[str],
                max_new_tokens: int) -> list[Scores]:
    """Scores of every candidate, of no trace and of the control. A pair that a server did not answer has no row."""
    rows = []
    for item in work:
        other, trace = item.control
        (leak,) = common.detect_leaks(encoder, [trace.trace], item.pair.action, common.format_context(item.pair))
        scored = [Scored(**candidate.model_dump(), **found.model_dump(), scores={})
                  for candidate, found in zip(item.row.candidates, item.leaks)]
        control = Control(**trace.model_dump(), **leak.model_dump(), scores={}, id=other)
        rows.append(Scores(id=item.id, **item.row.model_extra, candidates=scored, control=control, baseline={},
                           calls={}))

    if "likelihood" in scorers:
        items = [(item.pair, [some.trace for some in (*row.candidates, row.control)], item.negatives)
                 for item, row in zip(work, rows)]
        for row, (found, plain) in zip(rows, common.likelihood_scores(model, items)):
            for some, scores in zip((*row.candidates, row.control), found):
                some.scores |= scores
            row.baseline |= dict.fromkeys(found[0], 0.0) | {"action_logprob": plain}

    if "embedding" in scorers or "judge" in scorers:
        traces = [[*(some.trace for some in row.candidates), row.control.trace, None] for row in rows]
        guesses = reconstruct(model, [item.pair for item in work], traces, max_new_tokens)
        work, rows, guesses = zip(*answered) if (answered := [
            entry for entry in zip(work, rows, guesses) if entry[2]]) else ([], [], [])
        for item, row, texts in zip(work, rows, guesses):
            *_, row.baseline_reconstruction = texts
            row.calls = {"reconstructions": len(row.candidates), "reconstructions for controls": 2}
            similarities = common.cosines(encoder, [item.pair.action] * len(texts), texts)
            targets = [*(some.scores for some in row.candidates), row.control.scores, row.baseline]
            for some, text in zip([*row.candidates, row.control], texts):
                some.reconstruction = text
            for target, similarity in zip(targets, similarities):
                target |= {"embedding": similarity} if "embedding" in scorers else {}

    if "judge" in scorers and rows:
        told = rate_guesses(judge, [item.pair for item in work], [texts[:-2] for texts in guesses])
        for row, ratings in zip(rows, told):
            row.calls["judgements"] = 1
            for some, rating in zip(row.candidates, ratings or [None] * len(row.candidates)):
                if rating is None or isinstance(rating, dict):
                    some.ratings, some.scores["judge"] = rating, rating and sum(rating.values()) / len(ASPECTS)
        rows = [row for row, ratings in zip(rows, told) if ratings != "unanswered"]
    return list(rows)


# ----------------------------------------------------------------------------------------------------------------------
# Do the scores measure what they should?


class ScoreCheck(Row):
    """A score held against what it should not follow. AUC 0.5 is noise."""
    auc: float | None                                      # share of comparisons with the control that own traces win
    auc_ci95: list[float] | None                           # by conversation
    auc_passing: float | None                              # the same among traces that pass the leak detector
    auc_passing_ci95: list[float] | None
    no_trace_wins: float | None                            # share of pairs in which not one trace beats no trace


class Summary(Row):
    pairs: int
    candidates: int
    quotes: int                                            # candidates that share a 4-gram with the action
    leaks: int                                             # those and the ones that paraphrase it
    pairs_with_all_leaks: int
    pairs_without_judgement: int
    calls: dict[str, int]                                  # model calls of stages 2 and 3
    checks: dict[str, ScoreCheck]


def own_over_control(rows: Sequence[Scores], conversations: dict[str, str], name: str, passing: bool) -> tuple:
    """(share of comparisons within pairs that an own trace wins against the control, ties as half; its interval)."""
    points, clusters = [], []
    for row in rows:
        own, other = ([some.scores[name] for some in side if some.scores.get(name) is not None
                       and not (passing and some.is_leak)] for side in (row.candidates, [row.control]))
        points += [(a > b) + 0.5 * (a == b) for a in own for b in other]
        clusters += [conversations[row.id]] * len(own) * len(other)
    return (sum(points) / len(points), common.bootstrap_interval(points, clusters)) if points else (None, None)


def check_score(rows: Sequence[Scores], conversations: dict[str, str], name: str) -> ScoreCheck:
    groups = [(row, [some for some in row.candidates if some.scores.get(name) is not None]) for row in rows]
    groups = [(row, some) for row, some in groups if some]
    beaten = [all(each.scores[name] <= row.baseline[name] for each in some)
              for row, some in groups if name in row.baseline]
    (auc, ci), (passing, passing_ci) = (own_over_control(rows, conversations, name, only) for only in (False, True))
    return ScoreCheck(auc=auc, auc_ci95=ci, auc_passing=passing, auc_passing_ci95=passing_ci,
                      no_trace_wins=sum(beaten) / len(beaten) if beaten else None)


def summarise(rows: Sequence[Scores], conversations: dict[str, str]) -> Summary:
    everyone = [some for row in rows for some in row.candidates]
    calls = sum((Counter(row.calls) for row in rows), Counter({"traces": len(everyone)}))
    names = [name for name in SCORES if any(name in some.scores for some in everyone)]
    return Summary(
        pairs=len(rows), candidates=len(everyone), quotes=sum(some.leak > 0 for some in everyone),
        leaks=sum(some.is_leak for some in everyone), calls=dict(calls),
        pairs_with_all_leaks=sum(all(some.is_leak for some in row.candidates) for row in rows),
        pairs_without_judgement=sum(row.candidates[0].scores.get("judge", 0.0) is None for row in rows),
        checks={name: check_score(rows, conversations, name) for name in names})


def print_summary(summary: Summary) -> None:
    print(f"leak detector: {summary.leaks} of {summary.candidates} candidates ({summary.quotes} quote, the others "
          f"paraphrase); all of a pair's in {summary.pairs_with_all_leaks} of {summary.pairs} pairs")
    for name, check in summary.checks.items():
        loses = "" if check.no_trace_wins is None else f"; no trace is best in {check.no_trace_wins:.0%} of pairs"
        print(f"{name}: own trace over another pair's {common.format_rate(check.auc, check.auc_ci95)}, among those "
              f"that pass {common.format_rate(check.auc_passing, check.auc_passing_ci95)}{loses}")
    if "judgements" in summary.calls:
        total = sum(summary.calls[key] for key in ("traces", "reconstructions", "judgements"))
        print(f"judge: {total} model calls for {summary.pairs} pairs, 2N + 1 each; "
              f"{summary.pairs_without_judgement} pairs without a valid answer")


# ----------------------------------------------------------------------------------------------------------------------
# The stage


def parse_args(argv: list[str] | None):
    parser = common.stage_arguments(__doc__)
    add = parser.add_argument_group("scoring").add_argument
    add("--scorers", default="likelihood,embedding", help=f"comma-separated, from {', '.join(SCORERS)}")
    add("--negatives", type=common.number_type(int, 0, 100), default=4, metavar="N",
        help="other actions for the score contrast; 0: none is computed")
    add("--encoder", default="embedded", metavar="NAME", help="sentence encoder: 'embedded', a folder, a hub name")
    add("--judge", metavar="NAME", help="a local folder, a hub name or openai:NAME (unset: the reconstructor)")
    add("--max-action-tokens", **common.COUNT, default=24, help="tokens in a reconstruction")
    common.batch_argument(add)
    add("--tag", metavar="NAME", help="of a second set of candidates; all other settings are those of scores.jsonl")
    common.api_arguments(parser)
    args = parser.parse_args(argv)
    scorers = args.scorers.split(",")
    if unknown := [name for name in scorers if name not in SCORERS]:
        common.fail(f"--scorers: unknown scorer {unknown[0]!r}; choose from {', '.join(SCORERS)}")
    if args.judge and "judge" not in scorers:
        common.fail("--judge names a judge, but --scorers does not ask for one; add judge to --scorers")
    if args.model.startswith(common.REMOTE) and "likelihood" in scorers:
        common.fail("--scorers likelihood needs a local model; pass --scorers embedding,judge, or a local --model")
    return args


def load_judge(args, model: Any) -> Any:
    """The judge, which may be the reconstructor; None if no score asks for it."""
    if "judge" not in args.scorers.split(","):
        return None
    return model if args.judge in (None, args.model) else common.load_writer(args.judge, args)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    started = common.open_run(args)
    pairs_path, target = args.run / "pairs.jsonl", args.run / common.tagged("scores.jsonl", args.tag)
    source = args.run / common.tagged("candidates.jsonl", args.tag)
    following = "python 04_select_sft.py" + (f" --tag {args.tag}" if args.tag else "")
    if args.tag:
        args = common.inherit_settings(args, args.run / "scores.jsonl")
    pairs = common.read_rows(pairs_path, Pair, "01_prepare.py")
    found = {row.id: row for row in common.read_rows(source, Candidates, "02_sample_candidates.py")}
    common.check_made_from(source, pairs_path, "02_sample_candidates.py")
    pairs = [pair for pair in pairs if pair.id in found][:args.limit]
    if len(pairs) < 2:
        common.fail(f"{source} has too few pairs: each pair's control is the trace of another pair")
    if args.show_prompt:
        prompt = common.reconstruction_prompt(pairs[0], found[pairs[0].id].candidates[0].trace)
        return print(common.load_writer(args.model, args).show(prompt))
    prompts = ["reconstruction", "reconstruction_no_trace", "transcript", "transcript_no_trace", "judge"]
    output = common.Output(target, Scores, common.run_config(args, [pairs_path, source], prompts), args.overwrite)
    summary, skipped = target.with_suffix(".summary.json"), len(output.rows)
    if output.has(pairs) and summary.is_file():
        print(f"{target} is complete ({skipped} rows)")
        return common.print_next(args, following)
    model = common.load_writer(args.model, args)
    encoder, judge = common.load_encoder(args.encoder), load_judge(args, model)
    apis = [some for some in {id(some): some for some in (model, judge)}.values() if isinstance(some, common.ApiModel)]
    work = prepare_work(encoder, pairs, found, args.negatives, args.seed)
    room = lambda item: (len(item.row.candidates) + 2) * (args.max_action_tokens + max(
        model.length(common.reconstruction_prompt(item.pair, some.trace))
        for some in (*item.row.candidates, item.control[1])))
    batches = common.batch_by_length(work, room, args.batch_tokens)
    todo, tokens = [batch for batch in batches if not output.has(batch)], 0
    score = lambda batch: score_pairs(batch, model, encoder, judge, args.scorers.split(","), args.max_action_tokens)
    for rows in common.run_batches(score, todo, "reconstructing and scoring"):
        output.append(rows)
        tokens += sum(some.tokens for row in rows for some in (*row.candidates, row.control)) * (not apis)
    if output.has(pairs):
        conversations = {pair.id: pair.conversation for pair in pairs}
        measured = summarise([output.rows[pair.id] for pair in pairs], conversations)
        common.write_file(summary, measured.model_dump_json(indent=1) + "\n")
        print_summary(measured)
    common.end_stage(args, "03_reconstruct_score", len(pairs), len(output.rows), skipped, started, tokens, following,
                     apis)
    common.fail_unanswered(apis, len(pairs) - len(output.rows), "pairs")


if __name__ == "__main__":
    common.run_stage(main)
