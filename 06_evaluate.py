"""Stage 6: each arm's user model acts on held-out pairs, and a judge compares the arms.

    in     RUN/pairs.jsonl, RUN/models/ARM/; for the reconstructions: RUN/scores.jsonl, RUN/traces/, RUN/models/synthesizer/;
           for the report: RUN/rl.jsonl, RUN/costs.jsonl, RUN/scores.summary.json
    out    RUN/predictions/ARM.jsonl        id, trace, finished, action, action_logprob
           RUN/reconstructions/ARM.jsonl    id, trace, reconstruction, stopped
           RUN/judgements.jsonl             what, id, a, b, order, winner
           RUN/answers.jsonl                a language model's verdicts
           RUN/results.json                 arms, reconstructions, comparisons, reading, people, and what it all was made with
           RUN/report.html                  tables, plots and examples in one file that works offline
           RUN/human.html, RUN/human.key.jsonl      with --human-sheet: a blind page for people, and what it hides

How to run it:

    python 06_evaluate.py
    python 06_evaluate.py --versus none --round-robin
    python 06_evaluate.py --judge openai:NAME                    a model on a server (OPENAI_BASE_URL, OPENAI_API_KEY)
    python 06_evaluate.py --human-sheet 40                       then open RUN/human.html, judge, download
    python 06_evaluate.py --human-labels ann.json bo.json        how far people agree with the judge, and with one another

Two things are compared, each against the arm --versus: `actions` that the fitted user models write on their own, and
`reconstructions` that the frozen base writes from an arm's trace, which was written with the action in view and is not
fitted to anything. The first is the paper's question; the second asks of the traces alone whether they say enough.

The judge sees the context, the true action and two others. `encoder` (default): the closer in cosine wins, closer by
less than --margin is a tie; it is symmetric. A language model is asked in both orders, and a pair where the orders
disagree is a tie. A win rate counts a tie as half a win. Its 95 % interval is a bootstrap over conversations, because
pairs of one conversation are not independent; p is the two-sided sign-flip test that flips whole conversations. What
else a sceptic asks is in results.json, and what it comes to, in words, under `reading`.

Departures from the paper: its judge is a language model that agrees with people in 77 % of comparisons (as reported
in a summary of the paper); an encoder sees topic and wording, less of style and values. The controls are ours.
"""

import hashlib
import importlib
import importlib.metadata
import json
import math
import os
import random
import re
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from common import (END_THINK, FEWEST, MIN_P, PROMPTS, REMOTE, Portions, Row, Server, append_rows, batches_by_length, begin_output, begin_run, bootstrap_interval,
                    check_adapter, check_made_from, clean_action, close_trace, closing_line, cut_torn_line, decode, discard, dump_row, embed, encode_data,
                    encode_prompt, end_output, file_hash, finished_rows, first_difference, fraction, gather, generate, leave_to_first, load_adapter, load_encoder, load_model,
                    made_with, messages_of, one_line, open_server, packed_logits, packed_logprobs, part_of, positive_float, positive_int, process_count, process_rank,
                    progress, quantiles, read_candidates, read_object, read_pairs, read_rows, record_of, run_stage, seed_of, server_address, server_arguments, settle_folder, share,
                    show_context, show_rate, show_scene, stage_arguments, stop, stop_unanswered, user_prompt, wait_for_all, words_of, write_output, write_text)

reconstruct_score = importlib.import_module("03_reconstruct_score")
select_sft = importlib.import_module("04_select_sft")
rl_train = importlib.import_module("05_rl_train")

ARMS = ("none", "backward", "recon", "recon-grpo", "e2e-grpo", "shuffled", "longest", "worst")
WHATS = ("actions", "reconstructions")
PREDICTED, REBUILT, COSTS = ("id", "trace", "finished", "action", "action_logprob"), ("id", "trace", "reconstruction", "stopped"), ("stage", "rows", "seconds", "tokens")
Base = Callable[[str, bool | None], tuple[Any, Any]]         # load_model, see one_at_a_time


# ------------------------------------------------------------------------------------------------
# Acting, and reconstructing


def act(model: Any, tokenizer: Any, pairs: Sequence[Row], thinking: bool, traces: int, max_trace: int, max_action: int, temperature: float, seed: object) -> list[Row]:
    """One {id, trace, finished, traces, action} a pair, sampled from a user model: `traces` traces, and an action behind the first of them.

    A trace that is not `finished` within `max_trace` tokens is closed for the model, so that every arm answers every pair.
    """
    prompts = [user_prompt(tokenizer, pair, thinking) for pair in pairs]
    thoughts: list[list[str | None]] = [[None]] * len(pairs)
    finished = [True] * len(pairs)
    groups = [(prompt[:-1], [prompt[-1:]]) for prompt in prompts]
    if thinking:
        seeds = [seed_of(seed, pair["id"], "trace", k) for pair in pairs for k in range(traces)]
        done = generate(model, tokenizer, [(prompt[:-1], [prompt[-1:]] * traces) for prompt in prompts], max_trace, seeds, temperature, MIN_P, END_THINK.strip())
        texts = [decode(tokenizer, completion).partition(END_THINK.strip())[0].strip() for completion in done]
        thoughts = [texts[at:at + traces] for at in range(0, len(texts), traces)]
        finished = [completion.finished for completion in done[::traces]]
        groups = [(prompt, [close_trace(tokenizer, some[0])]) for prompt, some in zip(prompts, thoughts)]
    done = generate(model, tokenizer, groups, max_action, [seed_of(seed, pair["id"], "action") for pair in pairs], temperature, MIN_P, "\n")
    return [{"id": pair["id"], "trace": some[0], "finished": ended, "traces": some, "action": clean_action(decode(tokenizer, completion))}
            for pair, some, ended, completion in zip(pairs, thoughts, finished, done)]


@torch.inference_mode()
def true_action_logprob(model: Any, tokenizer: Any, pair: Row, traces: Sequence[str | None]) -> float:
    """Log of the true action's mean probability behind each of K traces that the user model wrote, over the action's tokens; nats a token.

    The mean of probabilities, not of their logs: an estimate of log p(action | context) with the trace summed out. It lies
    below that, the further the fewer the traces (Jensen); for an arm without traces it is exact, so the two do not compare.
    """
    action = encode_data(tokenizer, pair["action"])
    thoughts = [[] if trace is None else close_trace(tokenizer, trace) for trace in traces]
    group = user_prompt(tokenizer, pair, thinking=traces[0] is not None), [thought + action for thought in thoughts]
    sums = torch.stack([part.sum() for part in packed_logprobs(model, [group], [list(map(len, thoughts))])[0]])          # [K]
    return ((sums.logsumexp(0) - math.log(len(sums))) / len(action)).item()


def act_all(args: Namespace, base: Base, pairs: Sequence[Row], folders: dict[str, Path], source: Path) -> tuple[dict[str, dict[str, Row]], int, int]:
    """(predictions by arm and id, tokens read or written, rows that were there already); appends to predictions/ARM.jsonl."""
    tokens, reused, portions = 0, 0, Portions()
    predictions: dict[str, dict[str, Row]] = {}
    acting = {key: vars(args)[key] for key in ("model", "four_bit", "seed", "limit", "traces", "max_trace_tokens", "max_action_tokens", "temperature", "batch")}
    for arm, folder in folders.items():
        output = args.run / "predictions" / f"{arm}.jsonl"
        record = made_with(Namespace(run=args.run, **acting), [source, folder / "adapter_model.safetensors"], ["user_model"])
        rows = finished_rows(output, record, args.overwrite, PREDICTED, [pair["id"] for pair in pairs])
        reused += len(rows)
        if len(rows) < len(pairs):
            model, tokenizer = base(args.model, args.four_bit)
            if args.overwrite and not predictions:            # all at once, so that an interrupted --overwrite goes on without it
                for old in ("predictions", "reconstructions", "answers.jsonl"):
                    discard(args.run / old)
            user_model = load_adapter(model, folder, args.model)
            begin_output(output, record, args.overwrite)
            batches = batches_by_length(pairs, lambda pair: len(show_context(pair)), args.batch)
            for batch in progress(share(batches), f"{arm} acts"):
                if all(pair["id"] in rows for pair in batch):
                    continue
                made = portions.run(lambda some: act(user_model, tokenizer, some, arm != "none", args.traces, args.max_trace_tokens, args.max_action_tokens, args.temperature,
                                                     (args.seed, "06")), batch)
                for pair, row in zip(batch, made):
                    thoughts = row.pop("traces")
                    row["action_logprob"] = true_action_logprob(user_model, tokenizer, pair, thoughts)
                    tokens += sum(len(encode_data(tokenizer, text or "")) for text in (*thoughts, row["action"]))
                append_rows(part_of(output), [row for row in made if row["id"] not in rows])
            user_model.unload()
            end_output(output, [pair["id"] for batch in batches for pair in batch])
            rows = finished_rows(output, record, False, PREDICTED, [pair["id"] for pair in pairs])
        predictions[arm] = rows
    return predictions, tokens, reused


def one_at_a_time(load: Base) -> Base:
    """`load`, but what it loaded last is kept, and let go before another is loaded."""
    held: dict[tuple, tuple[Any, Any]] = {}

    def base(name: str, four_bit: bool | None) -> tuple[Any, Any]:
        if (name, four_bit) not in held:
            held.clear()
            held[name, four_bit] = load(name, four_bit)
        return held[name, four_bit]

    return base


def held_out_traces(arm: str, pairs: Sequence[Row], scored: Sequence[Row], score: str, seed: int) -> list[Row]:
    """{id, trace, reconstruction, stopped} of an arm's trace for each scored held-out pair, chosen as stage 4 chooses; the reconstruction
    is None where stage 3 has not written it: for another pair's trace, and without the scorers that need it."""
    rows = []
    for row, chosen in zip(scored, select_sft.choose_traces(arm, scored, pairs, score, seed)):
        place = row["baseline"] if arm == "none" else {} if arm == "shuffled" else row["candidates"][chosen["k"]]
        rows.append({"id": row["id"], "trace": chosen["trace"], "reconstruction": place.get("reconstruction"), "stopped": chosen["stopped"]})
    return rows


def score_of(run: Path, arm: str, scored: Sequence[Row]) -> str:
    """The score by which stage 4 selected the arm's traces; of an arm not fitted, that of one that was; else the first score there is."""
    records = [record_of(path) for path in (run / "traces" / f"{name}.jsonl" for name in (arm, "recon", *select_sft.ARMS)) if path.is_file()]
    found = next((record["arguments"]["score"] for record in records if "score" in record["arguments"]), None)
    return found or next((name for name in ("unsaid", "likelihood", "embedding", "judge") if name in scored[0]["candidates"][0]["scores"]), "unsaid")


def reconstruct_all(args: Namespace, base: Base, servers: dict[str, Server], pairs: Sequence[Row], scores: Path, scored: Sequence[Row]) -> tuple[dict[str, dict[str, Row]], int]:
    """(reconstructions by arm and id, tokens read or written) from each arm's traces for the held-out pairs that stage 3 scored.

    Written by the model that scored, which need not be the one that user models were fitted on; if a server has it, it is
    asked there and joins `servers`. Arm recon-grpo's traces are written here, by the trained synthesizer, as stage 5 wrote
    those of the train split; it is left out if the synthesizer was trained on another model. Appends to reconstructions/ARM.jsonl.
    """
    scoring, encoder = record_of(scores)["arguments"], None
    written, synthesizer = args.run / "traces" / "recon-grpo.jsonl", args.run / "models" / "synthesizer"
    by_id = {pair["id"]: pair for pair in pairs}
    # As stage 3 showed it: a context that was cut for scoring must not be longer for the arms that are written here.
    pairs = [by_id[row["id"]] | {"context": by_id[row["id"]]["context"][row.get("cut", 0) - by_id[row["id"]].get("cut", 0):]} for row in scored]
    arms = list(select_sft.ARMS)
    if synthesizer.is_dir() and written.is_file():
        if (trained_on := record_of(synthesizer)["arguments"]["model"]) == scoring["model"]:
            arms.append("recon-grpo")
        else:
            print(f"no reconstructions from recon-grpo's traces: the synthesizer was trained on {trained_on}, and {scoring['model']} scored")
    found: dict[str, dict[str, Row]] = {}
    tokens, missing, portions = 0, 0, Portions()
    for arm in sorted(arms, key=ARMS.index):
        score = score_of(args.run, arm, scored)
        output = args.run / "reconstructions" / f"{arm}.jsonl"
        settings = Namespace(run=args.run, model=scoring["model"], four_bit=scoring["four_bit"], max_action_tokens=scoring["max_action_tokens"], score=score, seed=args.seed, limit=args.limit)
        inputs = [scores, *([synthesizer / "adapter_model.safetensors"] if arm == "recon-grpo" else [])]
        record = made_with(settings, inputs, ["reconstruction", "reconstruction_no_trace"])
        rows = finished_rows(output, record, args.overwrite, REBUILT, by_id)
        if len(rows) < len(pairs):
            chosen = None
            if arm != "recon-grpo":
                whole = select_sft.rows_with_score(scored, score)
                ids = {row["id"] for row in whole}
                chosen = held_out_traces(arm, [pair for pair in pairs if pair["id"] in ids], whole, score, args.seed)
            if chosen is None or any(row["reconstruction"] is None for row in chosen):
                name = scoring["model"]
                if name.startswith(REMOTE) and name not in servers:
                    servers[name] = open_server(name, args.concurrency)
                model, tokenizer = (servers[name], None) if name in servers else base(name, scoring["four_bit"])
            if chosen is None:
                encoder = encoder or load_encoder(scoring["encoder"])
                tracing = Namespace(**record_of(written)["arguments"], run=args.run, overwrite=args.overwrite)
                target = output.with_name("recon-grpo.traces.jsonl")
                chosen = rl_train.write_traces(model, tokenizer, encoder, pairs, tracing, synthesizer, target, made_with(tracing, [*inputs, written], ["synthesis"]))
                chosen = [{"id": row["id"], "trace": row["trace"], "reconstruction": None, "stopped": row["stopped"]} for row in chosen]
            begin_output(output, record, args.overwrite)
            shown = {pair["id"]: pair for pair in pairs}
            batches = batches_by_length([(shown[row["id"]], row) for row in chosen], lambda item: len(show_context(item[0])), args.batch)
            for batch in progress(share(batches), f"reconstructing from {arm}'s traces"):
                if all(row["id"] in rows for _, row in batch):
                    continue
                todo = [(pair, row) for pair, row in batch if row["reconstruction"] is None]
                texts = portions.run(lambda some: reconstruct_score.reconstruct(model, tokenizer, [show_scene(pair) for pair, _ in some], [[row["trace"]] for _, row in some],
                                                                               scoring["max_action_tokens"]), todo)
                for (_, row), (text,) in zip(todo, texts):
                    row["reconstruction"] = text
                    tokens += len(encode_data(tokenizer, text)) if tokenizer else 0
                whole = [row for _, row in batch if row["reconstruction"] is not None]
                missing += len(batch) - len(whole)
                append_rows(part_of(output), [row for row in whole if row["id"] not in rows])
            end_output(output, [row["id"] for batch in batches for _, row in batch])
            rows = finished_rows(output, record, False, REBUILT, by_id)
        found[arm] = rows
    if missing:
        stop_unanswered(servers.values(), missing, "reconstructions")
    return found, tokens


# ------------------------------------------------------------------------------------------------
# Judging


@dataclass
class Judge:
    """Who compares. `ask(context, true action, [(first, second), …])` answers first, second, tie or None (no valid answer) for each."""

    name: str
    orders: tuple[str, ...]                      # ("both",) for a symmetric judge, else ("ab", "ba")
    ask: Callable[[str, str, Sequence[tuple[str, str]]], list[str | None]]
    calls: int = 0
    unanswered: int = 0                          # questions for which a server gave no answer: to be asked again


def closer(first: float, second: float, margin: float) -> str:
    """'first', 'second' or 'tie': which action is closer to the true one by at least `margin`."""
    if abs(first - second) < margin:
        return "tie"
    return "first" if first > second else "second"


def cosines(encoder: Any, true: Sequence[str], texts: Sequence[str]) -> list[float]:
    """Cosine of each text and its true action; -1 for no text."""
    values = (embed(encoder, true) * embed(encoder, texts)).sum(-1).tolist()
    return [value if text else -1.0 for value, text in zip(values, texts)]


def encoder_judge(encoder: Any, margin: float) -> Judge:
    def ask(context: str, action: str, questions: Sequence[tuple[str, str]]) -> list[str | None]:
        texts = sorted({text for question in questions for text in question})
        near = dict(zip(texts, cosines(encoder, [action] * len(texts), texts)))
        return [closer(near[first], near[second], margin) for first, second in questions]

    return Judge("encoder", ("both",), ask)


def local_judge(name: str, model: Any, tokenizer: Any) -> Judge:
    """A language model whose verdict is the likelier of the two answer tokens, read in one packed forward for all questions."""
    letters = [tokenizer.encode(letter, add_special_tokens=False) for letter in "AB"]
    if any(len(ids) != 1 for ids in letters):
        stop(f"the tokenizer of --judge {name} does not write A and B as single tokens; choose another judge")

    portions = Portions()

    @torch.inference_mode()
    def leads(context: str, action: str, questions: Sequence[tuple[str, str]]) -> list[float]:
        prompts = [sum(encode_prompt(tokenizer, "comparison", context=context, action=one_line(action), first=one_line(first), second=one_line(second)), []) for first, second in questions]
        shared = min(len(os.path.commonprefix(prompts)), min(map(len, prompts)) - 1)
        suffixes = [ids[shared:] for ids in prompts]
        logits, rows = packed_logits(model, prompts[0][:shared], [[*ids, letters[0][0]] for ids in suffixes], list(map(len, suffixes)))
        return (logits[:, letters[0][0]] - logits[:, letters[1][0]])[torch.cat(rows)].tolist()                          # [questions]

    def ask(context: str, action: str, questions: Sequence[tuple[str, str]]) -> list[str | None]:
        judge.calls += len(questions)
        return ["first" if value > 0 else "second" if value < 0 else "tie" for value in portions.run(lambda some: leads(context, action, some), questions)]

    judge = Judge(name, ("ab", "ba"), ask)
    return judge


def parse_choice(answer: str) -> str | None:
    """'first' or 'second' from a judge's answer that is one letter, perhaps with 'Message' or punctuation around it; else None."""
    found = re.fullmatch(r"\W*(?:message\s+)?([AB])\W*", answer, re.IGNORECASE)
    return found and {"A": "first", "B": "second"}[found.group(1).upper()]


def remote_judge(server: Server, tries: int = 3) -> Judge:
    """A model on an OpenAI-compatible server. An answer that is not a letter is asked for again, and missing after `tries`."""
    def ask(context: str, action: str, questions: Sequence[tuple[str, str]]) -> list[str | None]:
        def ask_one(question: tuple[str, str]) -> tuple[str | None, int]:
            messages = messages_of("comparison", context=context, action=one_line(action), first=one_line(question[0]), second=one_line(question[1]))
            for call in range(1, tries + 1):
                if choice := parse_choice(server.ask(messages, 16).text):
                    return choice, call
            return None, tries

        told = server.each(ask_one, questions)
        judge.calls += sum(calls for _, calls in filter(None, told))
        judge.unanswered += told.count(None)
        return [one and one[0] for one in told]

    judge = Judge(f"{REMOTE}{server.name} at {server.base}", ("ab", "ba"), ask)
    return judge


FAMILIES = ("smollm", "llama", "qwen", "gemma", "gemini", "mistral", "mixtral", "phi", "gpt", "claude", "deepseek", "olmo", "granite", "falcon")


def load_judge(args: Namespace, base: Base, encoder: Any, servers: dict[str, Server]) -> Judge:
    if args.judge == "encoder":
        return encoder_judge(encoder, args.margin)
    if args.judge in servers:
        return remote_judge(servers[args.judge])
    return local_judge(f"{args.judge}{' in 4 bits' * bool(args.four_bit)}", *base(args.judge, args.four_bit))


def family(model: str) -> str | None:
    """The family that a model's name or path names: 'qwen' of 'Qwen/Qwen3-8B'; None if it names none that we know."""
    name = "smollm" if model == "embedded" else model.lower()
    return next((family for family in FAMILIES if family in name), None)


def read_answers(path: Path) -> dict[str, str]:
    """{hash of the question: first, second or tie} of answers.jsonl."""
    known: dict[str, str] = {}
    for number, row in enumerate(read_rows(path, ("answers",)), start=1):
        if not all(answer in ("first", "second", "tie") for answer in row["answers"].values()):
            stop(f"{path}, line {number}: an answer must be first, second or tie; remove this line, and its questions are asked again")
        known |= row["answers"]
    return known


def judge_pairs(judge: Judge, what: str, pairs: Sequence[Row], texts: dict[str, dict[str, str]], comparisons: Sequence[tuple[str, str]], answers: Path) -> list[Row]:
    """A row {what, id, a, b, order, winner} for each pair, comparison (a, b) and order; `texts` are by arm and pair id.

    Two equal texts tie unasked. A language model's answers are kept in the file `answers` under a hash of the judge and all that
    it was told, so an answer is never asked for twice and never taken for another's. A pair's answers stand in one line: a local
    judge reads a pair's questions in one forward, so after a crash all of them must be asked again, or rounding would differ.
    """
    asks_model = judge.orders != ("both",)
    known: dict[str, str] = {}
    if asks_model and answers.is_file():
        cut_torn_line(answers)
        known = read_answers(answers)
    rows = []
    for pair in progress(pairs, f"judging {what}") if asks_model else pairs:
        context, asked = show_scene(pair), {}
        for a, b in comparisons:
            for order in judge.orders:
                some = texts[a][pair["id"]], texts[b][pair["id"]]
                asked[a, b, order] = some[::-1] if order == "ba" else some
        key = {question: hashlib.sha256(repr((judge.name, PROMPTS["comparison"], context, pair["action"], *question)).encode("utf-8", "replace")).hexdigest()[:32]
               for question in asked.values()}
        new = [question for question in key if question[0] != question[1] and key[question] not in known]
        if new:
            said = judge.ask(context, pair["action"], new)
            known |= {key[question]: answer for question, answer in zip(new, said)}
            if asks_model and any(said):
                append_rows(answers, [{"answers": {key[question]: answer for question, answer in zip(new, said) if answer}}])
        for (a, b, order), question in asked.items():
            answer = "tie" if question[0] == question[1] else known[key[question]]
            winner = {"first": "ba"[order != "ba"], "second": "ab"[order != "ba"]}.get(answer, answer)
            rows.append({"what": what, "id": pair["id"], "a": a, "b": b, "order": order, "winner": winner})
    return rows


# ------------------------------------------------------------------------------------------------
# Statistics


def settle(winners: Sequence[str | None]) -> tuple[str | None, bool | None]:
    """(verdict a, b or tie over all orders, whether the orders contradict each other); (None, None) if an answer is missing.

    Orders that disagree make a tie. A symmetric judge, with one order, cannot contradict itself: None.
    """
    if None in winners:
        return None, None
    verdict = winners[0] if len(set(winners)) == 1 else "tie"
    return verdict, {"a", "b"} <= set(winners) if len(winners) > 1 else None


def people_interval(points: Sequence[float], conversations: Sequence[str], people: Sequence[str], seed: int, draws: int = 2000) -> list[float] | None:
    """95 % interval of the mean when people are drawn with replacement, and then each one's conversations; None of fewer than FEWEST people."""
    tree: dict[str, dict[str, list[float]]] = {}
    for point, conversation, person in zip(points, conversations, people):
        tree.setdefault(person, {}).setdefault(conversation, []).append(point)
    if len(tree) < FEWEST:
        return None
    generator, branches, means = random.Random(seed), [list(some.values()) for some in tree.values()], []
    for _ in range(draws):
        drawn = [conversation for person in generator.choices(branches, k=len(branches)) for conversation in generator.choices(person, k=len(person))]
        means.append(sum(map(sum, drawn)) / sum(map(len, drawn)))
    return quantiles(torch.tensor(means), len(tree))


def sign_flip_p(points: Sequence[float], clusters: Sequence[str], seed: int) -> float:
    """Two-sided p of the hypothesis that the arms are equal: the sums (point - 0.5) of whole clusters change sign at random.

    Exact with 13 clusters or fewer, else from 9,999 random flips.
    """
    from scipy.stats import permutation_test  # here: its import takes a second that a finished stage need not pay

    sums: Counter[str] = Counter()
    for point, cluster in zip(points, clusters):
        sums[cluster] += point - 0.5
    if len(sums) < 2 or not any(sums.values()):
        return 1.0
    total = lambda values, axis: values.sum(axis=axis)
    return float(permutation_test((list(sums.values()),), total, permutation_type="samples", vectorized=True, rng=seed).pvalue)


def standard_error(points: Sequence[float], clusters: Sequence[str]) -> float | None:
    """Of the mean of `points`, when whole clusters are what is independent (cluster-robust, CR1); None for one cluster."""
    mean, sums = sum(points) / len(points), Counter()
    for point, cluster in zip(points, clusters):
        sums[cluster] += point - mean
    count = len(sums)
    return (count / (count - 1) * sum(value * value for value in sums.values())) ** 0.5 / len(points) if count > 1 else None


def similar_length(first: str, second: str) -> bool:
    """Does the longer text have at most a quarter more words than the shorter, and one?"""
    short, long = sorted((len(words_of(first)), len(words_of(second))))
    return long <= 1.25 * short + 1


def compare(judgements: Sequence[Row], pairs: Sequence[Row], texts: dict[str, dict[str, str]], seed: int) -> Row:
    """Statistics of one comparison (a, b) from its judgements, a's point of view.

      win_rate     (wins + ties / 2) / judged, ci95 by conversation, ci95_people by person and conversation
      p            sign_flip_p
      identical    pairs whose two texts are the same, ties that no judge was asked for
      flip_rate    share of pairs asked about in which the judge named the other arm when the order was turned; None for a symmetric judge
      unparsed     share of pairs without a valid answer, which count nowhere else
      matched      win rate among pairs whose two texts differ and have similar length
      longer_wins  how often the longer text wins, ties as half, with its n and interval; 0.5 is no bias (or no difference in quality)
      by_person    win rate of each person's pairs
      needed       pairs that would tell this win rate from 50 % with 80 % power at p < 0.05, were it exactly the true one and the pairs spread
                   over conversations like these
    """
    a, b = judgements[0]["a"], judgements[0]["b"]
    winners: dict[str, list[str | None]] = {}
    for row in judgements:
        winners.setdefault(row["id"], []).append(row["winner"])
    verdicts = {name: settle(some) for name, some in winners.items()}
    judged = [pair for pair in pairs if pair["id"] in verdicts and verdicts[pair["id"]][0]]
    found: Row = {"what": judgements[0]["what"], "a": a, "b": b, "n": len(judged), "unparsed": 1 - len(judged) / len(verdicts)}
    worth = {"a": 1.0, "tie": 0.5, "b": 0.0}
    points = [worth[verdicts[pair["id"]][0]] for pair in judged]
    differ = {pair["id"]: texts[a][pair["id"]] != texts[b][pair["id"]] for pair in judged}
    flips = [verdicts[pair["id"]][1] for pair in judged if differ[pair["id"]]]

    def rate(keep: Callable[[Row], bool], worth_of: Callable[[float, Row], float] = lambda point, pair: point) -> Row:
        some = [(worth_of(point, pair), pair["conversation"]) for point, pair in zip(points, judged) if keep(pair)]
        return {"n": len(some), "win_rate": sum(point for point, _ in some) / len(some) if some else None, "ci95": bootstrap_interval(*zip(*some), seed) if some else None}

    if not judged:
        return found | dict.fromkeys(("wins", "ties", "losses", "win_rate", "ci95", "ci95_people", "p", "p_holm", "identical", "flip_rate", "matched", "longer_wins", "by_person", "needed"))
    conversations, people = [pair["conversation"] for pair in judged], [pair["user"] for pair in judged]
    length = {pair["id"]: len(words_of(texts[a][pair["id"]])) - len(words_of(texts[b][pair["id"]])) for pair in judged}
    error = standard_error(points, conversations)
    whole = rate(lambda pair: True)
    effect = whole["win_rate"] - 0.5
    return found | {
        "wins": points.count(1.0), "ties": points.count(0.5), "losses": points.count(0.0), "win_rate": whole["win_rate"], "ci95": whole["ci95"],
        "ci95_people": people_interval(points, conversations, people, seed), "p": sign_flip_p(points, conversations, seed),
        "p_holm": None, "identical": len(judged) - sum(differ.values()), "flip_rate": sum(flips) / len(flips) if flips and flips[0] is not None else None,
        "matched": rate(lambda pair: differ[pair["id"]] and similar_length(texts[a][pair["id"]], texts[b][pair["id"]])),
        "longer_wins": rate(lambda pair: length[pair["id"]] != 0, lambda point, pair: point if length[pair["id"]] > 0 else 1 - point),
        "by_person": {person: rate(lambda pair: pair["user"] == person) for person in sorted(set(people))},
        "needed": math.ceil(len(points) * ((1.96 + 0.8416) * error / effect) ** 2) if effect and error else None}


def holm(values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (Holm 1979): holm([0.01, 0.04, 0.03]) is [0.03, 0.06, 0.06]."""
    adjusted, largest = [0.0] * len(values), 0.0
    for rank, place in enumerate(sorted(range(len(values)), key=lambda at: values[at])):
        largest = max(largest, min(1.0, (len(values) - rank) * values[place]))
        adjusted[place] = largest
    return adjusted


def compare_all(judgements: Sequence[Row], pairs: Sequence[Row], texts: dict[str, dict[str, str]], seed: int) -> list[Row]:
    """Statistics of every comparison in the judgements, with p_holm over those that have a p."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in judgements:
        groups.setdefault((row["a"], row["b"]), []).append(row)
    found = [compare(group, pairs, texts, seed) for group in groups.values()]
    valid = [row for row in found if row["p"] is not None]
    for row, p in zip(valid, holm([row["p"] for row in valid])):
        row["p_holm"] = p
    return found


def choose_comparisons(arms: Sequence[str], versus: str, round_robin: bool) -> list[tuple[str, str]]:
    """Which arms (a, b) to compare: each with `versus`, recon with its control shuffled, and with `round_robin` all others."""
    chosen = [(arm, versus) for arm in arms if arm != versus]
    more = list(combinations(arms, 2)) if round_robin else [("recon", "shuffled")] if {"recon", "shuffled"} <= set(arms) else []
    return chosen + [(a, b) for a, b in more if versus not in (a, b)]


def read_results(comparisons: Sequence[Row], arms: dict[str, Row], judge: Row, scorer: str | None) -> list[str]:
    """What the numbers say, in sentences; what they cannot say as well."""
    said = []
    for what in WHATS:
        some = [row for row in comparisons if row["what"] == what and row["p"] is not None]
        if not some:
            continue
        clear = [row for row in some if row["p_holm"] < 0.05]
        better = "; ".join(f"{row['a']} {'above' if row['win_rate'] > 0.5 else 'below'} {row['b']}" for row in clear)
        said.append(f"{what}: {len(clear)} of {len(some)} comparisons differ from 50 % when their number is allowed for (Holm, p < 0.05)" + (f": {better}." if clear else "."))
        if control := next((row for row in some if {row["a"], row["b"]} == {"recon", "shuffled"}), None):
            rate = control["win_rate"] if control["a"] == "recon" else 1 - control["win_rate"]
            verdict = ("recon and its control shuffled, with another conversation's traces, cannot be told apart: nothing here shows that what the traces say about their own pair counts" if control["p"] >= 0.05
                       else "recon does better than its control shuffled: what its traces say about their own pair counts" if rate > 0.5
                       else "the control shuffled does better than recon, which should not be: look at the examples")
            said.append(f"{what}: {verdict} ({control['a']} over {control['b']} {show_rate(control['win_rate'], control['ci95'])}, p = {control['p']:.3f}).")
        for row in some:
            if row["flip_rate"] is not None and row["flip_rate"] > 0.3:
                said.append(f"{what}: the judge contradicts itself in {row['flip_rate']:.0%} of the pairs of {row['a']} and {row['b']} when their order is turned; these ties mean little.")
            longer = row["longer_wins"]
            if longer["ci95"] and not longer["ci95"][0] <= 0.5 <= longer["ci95"][1]:
                matched = f"; among {row['matched']['n']} pairs of similar length {row['a']} wins {show_rate(row['matched']['win_rate'], row['matched']['ci95'])}" if row["matched"]["n"] else ""
                said.append(f"{what}: of {row['a']} and {row['b']} the longer text wins {show_rate(longer['win_rate'], longer['ci95'])}{matched}.")
    if any(row["what"] == "reconstructions" for row in comparisons):
        said.append("reconstructions: recon and worst were chosen with the held-out action in view, so what they win and lose is partly so by construction; shuffled and backward were not.")
    if judge["name"] == "encoder" and "e2e-grpo" in arms:
        said.append("actions: e2e-grpo was rewarded by the cosine that judges here.")
    if judge["name"] == "encoder" and scorer == "embedding":
        said.append("reconstructions: recon was chosen by the cosine that judges here.")
    if judge["same_family"]:
        said.append(f"The judge {judge['name']} is of the user models' own family, and such judges favour their own.")
    for arm, row in arms.items():
        if row["distinct_actions"] < 0.8:
            said.append(f"{arm} repeats itself: {row['distinct_actions']:.0%} of its actions differ from one another.")
    said.append("Every arm was fitted once: the intervals are over conversations, not over refits.")
    return said


# ------------------------------------------------------------------------------------------------
# People as judges


def choose_items(pairs: Sequence[Row], texts: dict[str, dict[str, str]], comparisons: Sequence[tuple[str, str]], count: int, seed: int) -> list[Row]:
    """At most `count` items {item, id, a, b, first} of a human sheet, `first` the arm shown as A: pairs and orders at random, comparisons by turns.

    A pair comes once, or the message that recurs under it would give away the arm that all are compared with. No two equal texts.
    """
    turns = []
    for pair in random.Random(seed_of(seed, "human")).sample(list(pairs), len(pairs)):
        ahead = [comparisons[(len(turns) + step) % len(comparisons)] for step in range(len(comparisons))]
        a, b = next(((a, b) for a, b in ahead if texts[a][pair["id"]] != texts[b][pair["id"]]), (None, None))
        if a:
            turns.append((pair["id"], a, b))
    return [{"item": item, "id": name, "a": a, "b": b, "first": "ab"[seed_of(seed, "human first", name, a, b) % 2]} for item, (name, a, b) in enumerate(turns[:count])]


def texts_shown(pair: Row, texts: dict[str, dict[str, str]], item: Row) -> Row:
    """What a person sees of an item: no arm, no id."""
    sides = [texts[item[side]][pair["id"]] for side in ("ab" if item["first"] == "a" else "ba")]
    return {"context": show_context(pair), "action": pair["action"], "first": sides[0], "second": sides[1]}


def hash_of(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def write_sheet(run: Path, pairs: Sequence[Row], texts: dict[str, dict[str, str]], items: Sequence[Row]) -> None:
    """human.html, which shows neither arms nor ids, and human.key.jsonl, which says what was what and keeps the keys of earlier sheets."""
    by_id, key = {pair["id"]: pair for pair in pairs}, run / "human.key.jsonl"
    shown = [texts_shown(by_id[item["id"]], texts, item) for item in items]
    sheet = hash_of(items, shown)
    earlier = [row for row in (read_rows(key, ("sheet",)) if key.is_file() else []) if row["sheet"] != sheet]
    write_text(key, "".join(map(dump_row, [*earlier, *({"sheet": sheet, **item, "shown": hash_of(what)} for item, what in zip(items, shown))])))
    write_page(run / "human.html", SHEET, {"sheet": sheet, "items": shown})


def read_labels(path: Path, key: dict[tuple[str, int], Row]) -> tuple[str, list[tuple[Row, str]]]:
    """(name, [(row of the key, verdict a, b or tie), …]) of one downloaded file; `key` is by (sheet, item)."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        rater, labels = str(found["rater"]), [((str(found["sheet"]), int(row["item"])), row["choice"]) for row in found["labels"]]
        if any(choice not in ("A", "B", "tie") for _, choice in labels):
            raise ValueError("a choice must be A, B or tie")
    except OSError as problem:
        stop(f"cannot read --human-labels {path}: {problem.strerror}")
    except (ValueError, LookupError, TypeError, OverflowError, RecursionError) as problem:
        stop(f"--human-labels {path} is not a file that human.html downloads ({type(problem).__name__}: {problem})")
    if lost := next((place for place, _ in labels if place not in key), None):
        stop(f"--human-labels {path}: item {lost[1]} of sheet {lost[0]} is not in human.key.jsonl; use the run folder whose sheet was judged")
    other = {"a": "b", "b": "a"}
    return rater, [(key[place], "tie" if choice == "tie" else key[place]["first"] if choice == "A" else other[key[place]["first"]]) for place, choice in labels]


def kappa(first: Sequence[str], second: Sequence[str]) -> float | None:
    """Cohen's kappa of two raters: agreement beyond what their own shares of labels would give by chance; None if chance alone gives all."""
    n, shares = len(first), (Counter(first), Counter(second))
    chance = sum(shares[0][label] * shares[1][label] for label in shares[0]) / n ** 2
    return None if chance == 1 else (sum(a == b for a, b in zip(first, second)) / n - chance) / (1 - chance)


def agreement(labels: Sequence[tuple[object, str, str]], clusters: Sequence[str], seed: int, draws: int = 1000) -> Row | None:
    """{n, agreement, ci95, kappa, kappa_ci95} of labels (which two raters, one's label, the other's), intervals by cluster; None for no labels.

    kappa is the mean of Cohen's kappa over each two raters, those whose kappa is undefined left out.
    """
    if not labels:
        return None

    def mean_kappa(some: Sequence[tuple[object, str, str]]) -> float | None:
        raters: dict[object, list[tuple[str, str]]] = {}
        for who, first, second in some:
            raters.setdefault(who, []).append((first, second))
        values = [value for value in (kappa(*zip(*both)) for both in raters.values()) if value is not None]
        return sum(values) / len(values) if values else None

    by_cluster: dict[str, list[tuple[object, str, str]]] = {}
    for label, cluster in zip(labels, clusters):
        by_cluster.setdefault(cluster, []).append(label)
    groups, generator = list(by_cluster.values()), random.Random(seed)
    drawn = [mean_kappa([label for group in generator.choices(groups, k=len(groups)) for label in group]) for _ in range(draws)]
    values = [value for value in drawn if value is not None]
    same = [float(first == second) for _, first, second in labels]
    return {"n": len(labels), "agreement": sum(same) / len(same), "ci95": bootstrap_interval(same, clusters, seed), "kappa": mean_kappa(labels),
            "kappa_ci95": quantiles(torch.tensor(values), len(groups)) if len(groups) >= FEWEST and values else None}


def compare_people(files: Sequence[Path], run: Path, judgements: Sequence[Row], pairs: Sequence[Row], texts: dict[str, dict[str, str]], seed: int) -> Row:
    """Agreement of people with the judge and with one another, over a, b and tie, and where both decided.

    A label whose messages are no longer those that the arms write now counts as `outdated`, one on a comparison that was not
    judged now as `not_judged`; neither is compared with the judge.
    """
    key = {(row["sheet"], row["item"]): row for row in read_rows(run / "human.key.jsonl", ("sheet", "item", "id", "a", "b", "first", "shown"), "06_evaluate.py --human-sheet N")}
    winners: dict[tuple[str, str, str], list[str | None]] = {}
    for row in judgements:
        if row["what"] == "actions":
            winners.setdefault((row["id"], row["a"], row["b"]), []).append(row["winner"])
    by_id, lost, raters, names = {pair["id"]: pair for pair in pairs}, Counter(), [], set()
    with_judge: list[tuple[str, tuple[object, str, str]]] = []
    for rater, path in enumerate(files):
        name, labels = read_labels(path, key)
        for sheet in {row["sheet"] for row, _ in labels if name}:
            if (name, sheet) in names:
                stop(f"--human-labels {path}: {name!r} handed in sheet {sheet} twice; name the last file only")
            names.add((name, sheet))
        raters.append({})
        for row, label in labels:
            pair, place = by_id.get(row["id"]), (row["id"], row["a"], row["b"])
            verdict = settle(winners[place])[0] if place in winners else None
            raters[-1][row["shown"]] = pair["conversation"] if pair else row["id"], label
            if not pair or not {row["a"], row["b"]} <= texts.keys() or hash_of(texts_shown(pair, texts, row)) != row["shown"]:
                lost["outdated"] += 1
            elif verdict is None:
                lost["not_judged"] += 1
            else:
                with_judge.append((pair["conversation"], (rater, label, verdict)))
    between = [(conversation, ((i, j), label, other[shown][1])) for (i, one), (j, other) in combinations(enumerate(raters), 2)
               for shown, (conversation, label) in one.items() if shown in other]
    measure = lambda some: agreement([label for _, label in some], [conversation for conversation, _ in some], seed)
    decided = lambda some: [row for row in some if "tie" not in row[1][1:]]
    return {"raters": len(raters), "labels": sum(map(len, raters)), "outdated": lost["outdated"], "not_judged": lost["not_judged"], "with_judge": measure(with_judge),
            "with_judge_decided": measure(decided(with_judge)), "between": measure(between), "between_decided": measure(decided(between))}


# ------------------------------------------------------------------------------------------------
# Results


def describe_arms(what: str, versus: str, comparisons: Sequence[Row], pairs: Sequence[Row], texts: dict[str, dict[str, str]],
                  traces: dict[str, dict[str, str | None]], near: dict[str, dict[str, float]]) -> dict[str, Row]:
    """What results.json holds of each arm: its comparison with `versus`, and what its texts are like."""
    described = {}
    for arm in texts:
        row = next((row for row in comparisons if (row["what"], row["a"], row["b"]) == (what, arm, versus)), {})
        mine, thoughts = [texts[arm][pair["id"]] for pair in pairs], [traces[arm][pair["id"]] for pair in pairs]
        described[arm] = {"n": len(pairs), "versus": versus if row else None, **{key: row.get(key) for key in ("wins", "ties", "losses", "win_rate", "ci95", "p", "p_holm")},
                          "similarity": sum(near[arm].values()) / len(pairs), "distinct_actions": len(set(mine)) / len(mine), "empty_actions": mine.count(""),
                          "action_words": sum(len(words_of(text)) for text in mine) / len(mine), "trace_words": sum(len(words_of(text or "")) for text in thoughts) / len(thoughts),
                          "ids": [pair["id"] for pair in pairs]}
    return described


def describe_likelihood(pairs: Sequence[Row], mine: dict[str, Row], other: dict[str, Row], seed: int) -> Row:
    """The mean log-prob of the true action, its gain over that of `other` with an interval, and the share of traces that met the token limit."""
    gains = [mine[pair["id"]]["action_logprob"] - other[pair["id"]]["action_logprob"] for pair in pairs]
    return {"action_logprob": sum(mine[pair["id"]]["action_logprob"] for pair in pairs) / len(pairs), "action_logprob_gain": sum(gains) / len(gains),
            "action_logprob_gain_ci95": bootstrap_interval(gains, [pair["conversation"] for pair in pairs], seed),
            "cut_traces": sum(not mine[pair["id"]]["finished"] for pair in pairs) / len(pairs)}


def make_examples(pairs: Sequence[Row], predictions: dict[str, dict[str, Row]], rebuilt: dict[str, dict[str, Row]], near: dict[str, dict[str, dict[str, float]]],
                  judgements: Sequence[Row], versus: str, scored: Sequence[Row]) -> list[Row]:
    """What the report shows of each pair: every arm's trace and action with its outcome against `versus`, reconstructions, candidates."""
    winners: dict[tuple[str, str], list[str | None]] = {}
    for row in judgements:
        if row["what"] == "actions" and row["b"] == versus:
            winners.setdefault((row["id"], row["a"]), []).append(row["winner"])
    outcome, by_id, examples = {"a": "win", "b": "loss", "tie": "tie", None: None}, {row["id"]: row for row in scored}, []
    for pair in pairs:
        name, row = pair["id"], by_id.get(pair["id"], {"candidates": [], "baseline": {}})
        arms = {arm: {"trace": rows[name]["trace"], "action": rows[name]["action"], "similarity": near["actions"][arm][name],
                      "outcome": outcome[settle(winners.get((name, arm), [None]))[0]]} for arm, rows in predictions.items()}
        more = {arm: {"trace": rows[name]["trace"], "reconstruction": rows[name]["reconstruction"], "similarity": near["reconstructions"][arm].get(name)}
                for arm, rows in rebuilt.items() if name in rows}
        examples.append({"id": name, "user": pair["user"], "context": show_context(pair), "action": pair["action"], "arms": arms, "rebuilt": more,
                         "candidates": row["candidates"], "baseline": row["baseline"]})
    return examples


def distributions(scored: Sequence[Row]) -> Row:
    """For each score, the values of pairs' own traces and of the control, another pair's trace."""
    names = sorted({name for row in scored for candidate in row["candidates"] for name in candidate["scores"]})
    return {name: {"a pair's own traces": [candidate["scores"].get(name) for row in scored for candidate in row["candidates"]],
                   "another pair's trace": [row["control"]["scores"].get(name) for row in scored]} for name in names}


def draw_table(what: str, arms: dict[str, Row]) -> str:
    lines = [f"{what:<15} {'n':>4} {'wins':>5} {'ties':>5} {'losses':>6}  {'win rate':<22} {'p':>6} {'similarity':>10} {'distinct':>8} {'words':>5}"
             + (f" {'log p(action)':>13}" if what == "actions" else "")]
    for arm, row in arms.items():
        rate = show_rate(row["win_rate"], row["ci95"]) if row["wins"] is not None else "(no valid answer)" if row["versus"] else "(compared with)"
        wins = ["" if row[key] is None else row[key] for key in ("wins", "ties", "losses")]
        p = "" if row["p"] is None else f"{row['p']:.3f}"
        lines.append(f"{arm:<15} {row['n']:>4} {wins[0]:>5} {wins[1]:>5} {wins[2]:>6}  {rate:<22} {p:>6} {row['similarity']:>10.3f} {row['distinct_actions']:>8.0%} {row['action_words']:>5.1f}"
                     + (f" {row['action_logprob']:>13.3f}" if "action_logprob" in row else ""))
    return "\n".join(lines)


def print_results(results: Row) -> None:
    for what, key in zip(WHATS, ("arms", "reconstructions")):
        if results[key]:
            print(draw_table(what, results[key]))
    print(f"judge: {results['judge']['name']}; {results['data']['conversations']} conversations of {len(results['data']['people'])} people")
    print("\n".join(results["reading"]))
    if people := results["people"]:
        if people["outdated"] or people["not_judged"]:
            print(f"labels left out: {people['outdated']} on messages that have changed since, {people['not_judged']} on comparisons that were not judged now")
        for name, title in (("with_judge", "people and judge"), ("with_judge_decided", "people and judge, where both decided"), ("between", "people with one another")):
            if row := people[name]:
                print(f"{title}: agreement {show_rate(row['agreement'], row['ci95'])}, kappa " + ("none" if row["kappa"] is None else f"{row['kappa']:.3f}")
                      + (f" [{row['kappa_ci95'][0]:.3f}, {row['kappa_ci95'][1]:.3f}]" if row["kappa_ci95"] else "") + f", {row['n']} labels")


def write_page(path: Path, page: str, data: Row) -> None:
    """A page with its data as JSON inside. '<' is escaped, so no text can end the script; the pages set text, never HTML."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    write_text(path, page.replace("DATA", text.encode("utf-8", "replace").decode(), 1))


# Both pages stand in this file, because a page must be one file that works offline and the stage should be one file too.
HEAD = r"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<style>
:root { color-scheme: light dark; --ink: light-dark(#1c1e21, #e6e6e3); --soft: light-dark(#63676e, #9a9ea6); --line: light-dark(#dcdee2, #393d44);
  --card: light-dark(#fff, #1f2226); --back: light-dark(#f5f6f7, #16181b); --mark: light-dark(#2458c5, #82aaff); --good: light-dark(#117a4b, #5fd0a0); --bad: light-dark(#b3342b, #ff8f84); }
* { box-sizing: border-box; }
</style>
"""

PAGE = HEAD + r"""<title>Recon: report of a run</title>
<style>
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 62rem; font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back); }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .6rem; } h3 { font-size: .95rem; margin: 1.2rem 0 .4rem; color: var(--soft); }
p.note { color: var(--soft); margin: .3rem 0; max-width: 46rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 1rem; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top; white-space: nowrap; }
tr:last-child td { border-bottom: 0; } th { color: var(--soft); font-weight: 500; font-size: .85rem; white-space: nowrap; }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
svg { display: block; width: 100%; min-width: 34rem; height: auto; } svg text { fill: var(--ink); font: 13px system-ui, sans-serif; } svg .soft { fill: var(--soft); }
.turns { margin: 0; padding: 0; list-style: none; } .turns li { margin: .15rem 0; } .turns b { font-weight: 600; }
.true { border-left: 3px solid var(--good); padding: .3rem .8rem; margin: .6rem 0; }
select { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .25rem .4rem; max-width: 100%; } label { color: var(--soft); font-size: .85rem; }
ul.reading { margin: .3rem 0; padding-left: 1.2rem; max-width: 52rem; } ul.reading li { margin: .25rem 0; } .win { color: var(--good); } .loss { color: var(--bad); }
nav { display: flex; gap: .5rem; align-items: center; flex-wrap: wrap; margin: .6rem 0; } button { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .25rem .8rem; cursor: pointer; }
button:disabled { opacity: .4; cursor: default; } button:focus-visible { outline: 2px solid var(--mark); }
.leak { color: var(--bad); } small { color: var(--soft); } pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .8rem; margin: 0; }
td.text { overflow-wrap: anywhere; white-space: normal; } #examples td.text { min-width: 12rem; }
@media (max-width: 40rem) { #examples table, #examples tbody, #examples tr, #examples td { display: block; text-align: left; } #examples tr:first-child { display: none; } #examples td { border: 0; padding: .1rem 0; } #examples tr { border-bottom: 1px solid var(--line); padding: .5rem 0; } #examples td[data-label]::before { content: attr(data-label) ": "; color: var(--soft); font-size: .85rem; } }
</style>
</head>
<body>
<h1>Recon: report of a run</h1>
<p class="note" id="about"></p>
<h2>What the numbers say</h2><ul class="reading" id="reading"></ul>
<h2>Actions of the user models</h2><div class="card" id="actions"></div>
<p class="note">Every arm's user model acts alone on held-out pairs. Win rate: against the arm compared with, a tie as half a win, 95 % interval by conversation. p: sign-flip test by conversation; Holm: allowing for the number of comparisons. Similarity: mean cosine to the true action. log p(action): the true action behind traces that the model wrote itself, nats a token; a lower bound for arms with traces, exact for “none”, so compare arms with traces only. Gain: over the arm compared with. Cut: traces that met the token limit. Distinct: share of actions that differ from one another.</p>
<div class="card" id="actions-plot"></div>
<div id="rebuilt-part" hidden><h2>Reconstructions from the arms' traces</h2><div class="card" id="reconstructions"></div>
<p class="note">No training: the frozen base writes the action from context and trace. Traces were written with the action in view, so this says how much they hold, not how well a user model acts.</p>
<div class="card" id="reconstructions-plot"></div></div>
<h2>Every comparison, as a sceptic reads it</h2><div class="card" id="comparisons"></div>
<p class="note">By people: interval when people are drawn as well, with six people or more. Identical: pairs whose texts are the same, ties that nobody judged. Flips: the judge named the other arm when the order was turned; none for a symmetric judge. Unparsed: no valid answer. Similar length: win rate among pairs whose texts differ and are about as long. Longer wins: how often the longer text wins, 50 % is no bias. Needed: pairs that would tell this rate from 50 % with 80 % power, were it exactly the true one.</p>
<div id="people-part" hidden><h2>People and the judge</h2><div class="card" id="people"></div></div>
<h2 id="curve-title" hidden>Reward over training steps</h2><div class="card" id="curve" hidden></div>
<h2 id="scores-title" hidden>Scores of the traces</h2><div class="card" id="scores" hidden></div>
<h2>Cost</h2><div class="card" id="cost"></div>
<h2>Held-out examples</h2>
<nav><label>arm <select id="of-arm"></select></label><label>outcome <select id="of-outcome"><option value="">any</option><option>win</option><option>tie</option><option>loss</option></select></label>
<label>leak guard <select id="of-leak"><option value="">any</option><option value="stopped">stopped a candidate</option><option value="passed">passed all</option></select></label></nav>
<nav><button id="previous">Previous</button><button id="next">Next</button><span id="place"></span></nav>
<div class="card" id="examples"></div>
<h2>Made with</h2><div class="card"><pre id="made"></pre></div>
<script type="application/json" id="data">DATA</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const by = id => document.getElementById(id);
function make(tag, text, name) {
  const node = document.createElement(tag);
  if (text !== undefined && text !== null) node.textContent = text;
  if (name) node.className = name;
  return node;
}
function draw(tag, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const key in attributes) node.setAttribute(key, attributes[key]);
  if (text !== undefined) node.textContent = text;
  return node;
}
const fixed = (value, digits = 3) => value === null || value === undefined ? "" : value.toFixed(digits);
const percent = value => (100 * value).toFixed(1) + " %";
function table(head, rows, textColumns) {
  const node = make("table"), first = node.appendChild(make("tr"));
  head.forEach((label, i) => first.append(make("th", label, textColumns.includes(i) ? "text" : "")));
  for (const row of rows) {
    const line = node.appendChild(make("tr"));
    row.forEach((cell, i) => {
      const box = line.appendChild(make("td", cell.text ?? cell, (textColumns.includes(i) ? "text " : "") + (cell.name ?? "")));
      box.dataset.label = head[i];
    });
  }
  return node;
}
const arms = Object.keys(data.arms), versus = data.versus;
const called = name => name === "embedded" ? "SmolLM2-135M-Instruct" : name ?? "nobody";
const range = ends => ends ? ends.map(percent).join(" – ") : "none";
const rate = row => row.win_rate === null || row.win_rate === undefined ? "" : percent(row.win_rate);
by("about").textContent = `${data.data.pairs} held-out pairs of ${Object.keys(data.data.people).length} people in ${data.data.conversations} conversations; user models on ${called(data.models.user_models)}, traces by ${called(data.models.traces)}, scored by ${called(data.models.scores)}; judge: ${data.judge.name}${data.judge.same_family ? ", of the user models' own family" : ""}. An interval that holds 50 % shows no difference.`;
for (const sentence of data.reading) by("reading").append(make("li", sentence));
function armTable(rows, acted) {
  return table(["arm", "win rate", "95 % interval", "p", "Holm", "n", "wins", "ties", "losses", "similarity", ...(acted ? ["log p(action)", "gain", "95 % interval", "cut"] : []), "distinct", "words", "trace words"],
    Object.entries(rows).map(([arm, r]) => [arm, r.versus ? rate(r) : "compared with", r.versus ? range(r.ci95) : "",
      fixed(r.p), fixed(r.p_holm), r.n, r.wins ?? "", r.ties ?? "", r.losses ?? "", fixed(r.similarity), ...(acted ? [fixed(r.action_logprob), r.versus ? fixed(r.action_logprob_gain) : "", r.versus && r.action_logprob_gain_ci95 ? r.action_logprob_gain_ci95.map(end => fixed(end)).join(" – ") : "", percent(r.cut_traces)] : []), percent(r.distinct_actions), fixed(r.action_words, 1), fixed(r.trace_words, 1)]), []);
}
function forest(rows, what) {
  const shown = rows.filter(row => row.what === what && row.win_rate !== null), height = 44 + 30 * shown.length, x = value => 220 + 460 * value;
  const svg = draw("svg", {viewBox: `0 0 720 ${height}`, role: "img", "aria-label": `win rates of ${what} with 95 % intervals`});
  for (const tick of [0, .25, .5, .75, 1]) svg.append(
    draw("line", {x1: x(tick), x2: x(tick), y1: 8, y2: height - 30, stroke: "var(--line)", "stroke-width": tick === .5 ? 2 : 1}),
    draw("text", {x: x(tick), y: height - 10, "text-anchor": "middle", class: "soft"}, 100 * tick + " %"));
  shown.forEach((row, i) => {
    const y = 24 + 30 * i;
    svg.append(draw("text", {x: 4, y: y + 5}, `${row.a} over ${row.b}`));
    if (row.ci95) svg.append(draw("line", {x1: x(row.ci95[0]), x2: x(row.ci95[1]), y1: y, y2: y, stroke: "var(--mark)", "stroke-width": 2}));
    svg.append(draw("circle", {cx: x(row.win_rate), cy: y, r: 6, fill: "var(--mark)"}));
  });
  return svg;
}
by("actions").append(armTable(data.arms, true));
by("actions-plot").append(forest(data.comparisons, "actions"));
if (Object.keys(data.reconstructions).length) {
  by("rebuilt-part").hidden = false;
  by("reconstructions").append(armTable(data.reconstructions, false));
  by("reconstructions-plot").append(forest(data.comparisons, "reconstructions"));
}
by("comparisons").append(table(["comparison", "of", "n", "win rate", "95 % interval", "by people", "p", "Holm", "identical", "flips", "unparsed", "similar length (n)", "longer wins (n)", "needed", "by person"],
  data.comparisons.map(r => [`${r.a} over ${r.b}`, r.what, r.n, rate(r), range(r.ci95), range(r.ci95_people), fixed(r.p), fixed(r.p_holm), r.identical ?? "", r.flip_rate === null ? "none" : percent(r.flip_rate), percent(r.unparsed),
    r.matched?.n ? `${rate(r.matched)} (${r.matched.n})` : "", r.longer_wins?.n ? `${rate(r.longer_wins)} (${r.longer_wins.n})` : "", r.needed ?? "",
    Object.entries(r.by_person ?? {}).map(([person, part]) => `${person.slice(0, 16)} ${rate(part)}`).join(", ")]), []));
if (data.people) {
  by("people-part").hidden = false;
  by("people").append(table(["", "labels", "agreement", "95 % interval", "kappa", "95 % interval"], [["with_judge", "people and judge"], ["with_judge_decided", "the same, where both decided"],
    ["between", "people with one another"], ["between_decided", "the same, where both decided"]].filter(([key]) => data.people[key]).map(([key, title]) => {
      const r = data.people[key];
      return [title, r.n, percent(r.agreement), range(r.ci95), fixed(r.kappa), r.kappa_ci95 ? r.kappa_ci95.map(end => fixed(end, 2)).join(" – ") : "none"];
    }), []));
}
for (const objective of new Set(data.rl.map(row => row.objective))) {
  const rows = data.rl.filter(row => row.objective === objective);
  const last = Math.max(1, ...rows.map(row => row.step));
  for (const [key, title] of [["reward", "mean reward"], ["leak", "share of the action's 4-grams quoted"], ["length", "tokens a completion"]]) {
    const dots = rows.filter(row => Number.isFinite(row[key])), held = rows.filter(row => Number.isFinite(row["val_" + key]));
    const values = [...dots.map(row => row[key]), ...held.map(row => row["val_" + key])];
    if (!values.length) continue;
    by("curve").hidden = by("curve-title").hidden = false;
    const low = Math.min(...values), high = Math.max(...values);
    const x = step => 60 + 640 * step / last, y = value => 20 + 100 * (high > low ? (high - value) / (high - low) : .5);
    const svg = draw("svg", {viewBox: "0 0 720 150", role: "img", "aria-label": `${title} of ${objective}`});
    svg.append(
      draw("text", {x: 4, y: y(high) + 4, class: "soft"}, fixed(high, 2)),
      draw("text", {x: 4, y: y(low) + 4, class: "soft"}, low < high ? fixed(low, 2) : ""),
      draw("polyline", {points: dots.map(row => `${x(row.step)},${y(row[key])}`).join(" "), fill: "none", stroke: "var(--mark)", "stroke-width": 2}));
    dots.forEach((row, i) => {
      svg.append(draw("circle", {cx: x(row.step), cy: y(row[key]), r: 3.5, fill: "var(--mark)"}));
      if (i % Math.ceil(dots.length / 10) === 0)
        svg.append(draw("text", {x: x(row.step), y: 145, "text-anchor": "middle", class: "soft"}, (i ? "" : "step ") + row.step));
    });
    for (const row of held)
      svg.append(draw("rect", {x: x(row.step) - 5, y: y(row["val_" + key]) - 5, width: 10, height: 10, fill: "none", stroke: "var(--good)", "stroke-width": 2}));
    by("curve").append(make("h3", `objective ${objective}: ${title} of sampled completions (dots) and of greedy ones on held-out pairs (squares)`), svg);
  }
}
for (const [name, sides] of Object.entries(data.distributions)) {
  const all = Object.values(sides).flat().filter(Number.isFinite);
  if (!all.length) continue;
  by("scores").hidden = by("scores-title").hidden = false;
  const sorted = [...all].sort((a, b) => a - b), low = sorted[Math.floor(.005 * all.length)], high = sorted[Math.ceil(.995 * all.length) - 1], bins = 30;
  const svg = draw("svg", {viewBox: "0 0 720 160", role: "img", "aria-label": `distribution of the score ${name}`});
  const shares = Object.values(sides).map(values => {
    const counts = Array(bins).fill(0), some = values.filter(Number.isFinite);
    for (const value of some) counts[Math.max(0, Math.min(bins - 1, Math.floor(bins * (value - low) / (high - low || 1))))] += 1 / some.length;
    return counts;
  });
  const top = Math.max(...shares.flat()), x = bin => 20 + 680 * bin / bins, y = share => 130 - 110 * share / top;
  shares.forEach((counts, side) => {
    const points = counts.flatMap((share, bin) => [`${x(bin)},${y(share)}`, `${x(bin + 1)},${y(share)}`]).join(" ");
    svg.append(draw("polyline", {points, fill: "none", stroke: side ? "var(--bad)" : "var(--good)", "stroke-width": 2, "stroke-dasharray": side ? "5 3" : "none"}));
  });
  svg.append(draw("text", {x: 20, y: 152, class: "soft"}, fixed(low, 2)), draw("text", {x: 700, y: 152, "text-anchor": "end", class: "soft"}, fixed(high, 2)));
  by("scores").append(make("h3", `${name}: ${Object.keys(sides)[0]} (solid) and ${Object.keys(sides)[1]} (dashed)`), svg);
}
{
  const stages = {};
  for (const row of data.costs) {
    const sum = stages[row.stage] ??= {starts: 0, rows: 0, seconds: 0, tokens: 0, requests: 0, read: 0, written: 0};
    sum.starts++; sum.rows += row.rows; sum.seconds += row.seconds; sum.tokens += row.tokens;
    sum.requests += row.requests ?? 0; sum.read += row.prompt_tokens ?? 0; sum.written += row.completion_tokens ?? 0;
  }
  const asked = data.costs.some(row => row.requests);
  by("cost").append(table(["stage", "starts", "rows", "seconds", "tokens", "tokens a second", ...(asked ? ["requests to a server", "tokens read there", "written there"] : [])], Object.entries(stages).map(([stage, sum]) =>
    [stage, sum.starts, sum.rows, fixed(sum.seconds, 0), sum.tokens, sum.seconds ? fixed(sum.tokens / sum.seconds, 0) : "", ...(asked ? [sum.requests, sum.read, sum.written] : [])]), []),
    make("p", Object.keys(data.calls).length ? `Model calls of stages 2 and 3, and verdicts of this one: ${Object.entries(data.calls).map(([name, count]) => `${count} ${name}`).join(", ")}.` : "", "note"));
}
let place = 0, shown = data.examples;
for (const arm of arms) by("of-arm").append(make("option", arm));
by("of-arm").value = arms.includes("recon") ? "recon" : arms[0];
function filter() {
  const arm = by("of-arm").value, outcome = by("of-outcome").value, leak = by("of-leak").value;
  shown = data.examples.filter(example => (!outcome || example.arms[arm].outcome === outcome)
    && (!leak || (leak === "stopped") === example.candidates.some(candidate => candidate.stopped)));
  place = 0;
  show();
}
for (const id of ["of-arm", "of-outcome", "of-leak"]) by(id).onchange = filter;
function show() {
  const example = shown[place], box = by("examples");
  box.replaceChildren();
  by("place").textContent = shown.length ? `${place + 1} of ${shown.length}` : "none like this";
  by("previous").disabled = place === 0;
  by("next").disabled = place >= shown.length - 1;
  if (!example) return;
  const turns = box.appendChild(make("ul", null, "turns"));
  for (const line of example.context.split("\n")) {
    const cut = line.indexOf(": ");
    turns.appendChild(make("li")).append(make("b", line.slice(0, cut + 1)), line.slice(cut + 1));
  }
  box.appendChild(make("div", null, "true")).append(make("small", "what Sam really wrote"), make("div", example.action));
  box.append(make("h3", "What each arm's user model wrote"));
  box.append(table(["arm", "trace", "action", "similarity", "against " + versus], arms.map(arm => {
    const r = example.arms[arm];
    return [arm, r.trace === null ? "(this arm has none)" : r.trace || "(empty)", r.action || "(nothing)", fixed(r.similarity), {text: r.outcome ?? "", name: r.outcome ?? ""}];
  }), [1, 2]));
  if (Object.keys(example.rebuilt).length) {
    box.append(make("h3", "Reconstructions from each arm's trace (written with the action in view)"));
    box.append(table(["arm", "trace", "reconstruction", "similarity"], Object.entries(example.rebuilt).map(([arm, r]) =>
      [arm, r.trace === null ? "(this arm has none)" : r.trace || "(empty)", r.reconstruction || "(nothing)", fixed(r.similarity)]), [1, 2]));
  }
  if (example.candidates.length) {
    box.append(make("h3", "Candidate traces (written with the action in view) and their scores"));
    box.append(make("p", "likelihood: how much likelier the trace makes the action, nats a token; unsaid: the same without the words that the trace "
      + "gives away; embedding: cosine of reconstruction and action; leak: share of the action's 4-grams in the trace, red if the leak guard stopped it; reworded: how near the trace comes to the action in other words; judge: 0 to 9.", "note"));
    const scores = Object.keys(example.candidates[0].scores ?? {});
    const lines = example.candidates.map(c => [c.trace, c.reconstruction ?? "", ...scores.map(s => fixed(c.scores[s])),
      {text: percent(c.leak), name: c.stopped ? "leak" : ""}, fixed(c.reworded, 2)]);
    lines.push(["(no trace)", example.baseline.reconstruction ?? "", ...scores.map(s => fixed(example.baseline[s])), "", ""]);
    box.append(table(["trace", "reconstruction", ...scores, "leak", "reworded"], lines, [0, 1]));
  }
  box.append(make("p", `${example.id} · modelled person ${example.user}`, "note"));
}
function move(step) {
  place = Math.min(Math.max(place + step, 0), Math.max(shown.length - 1, 0));
  show();
}
by("previous").onclick = () => move(-1);
by("next").onclick = () => move(1);
document.addEventListener("keydown", event => { if (event.target.tagName === "SELECT") return; if (event.key === "ArrowLeft") move(-1); if (event.key === "ArrowRight") move(1); });
filter();
by("made").textContent = JSON.stringify(data.made_with, null, 1);
</script>
</body>
</html>
"""

SHEET = HEAD + r"""<title>Recon: which message comes closer?</title>
<style>
body { margin: 0 auto; padding: 1rem 1rem 3rem; max-width: 48rem; font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back); overflow-wrap: anywhere; }
h1 { font-size: 1.3rem; margin: 0; } p { margin: .4rem 0; } small, .soft { color: var(--soft); }
progress { width: 100%; height: .6rem; accent-color: var(--mark); }
.turns { margin: .8rem 0; padding: 0; list-style: none; } .turns li { margin: .15rem 0; }
.true { border-left: 3px solid var(--good); padding: .3rem .8rem; margin: .8rem 0; }
#choices { display: grid; grid-template-columns: 1fr 1fr; gap: .8rem; } #tie { grid-column: 1 / 3; }
@media (max-width: 36rem) { #choices { grid-template-columns: 1fr; } #tie { grid-column: 1; } }
button { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .7rem .9rem; cursor: pointer; text-align: left; }
button[aria-pressed=true] { border-color: var(--mark); box-shadow: inset 0 0 0 1px var(--mark); } button:disabled { opacity: .4; cursor: default; } button:focus-visible, input:focus-visible { outline: 2px solid var(--mark); }
kbd { border: 1px solid var(--line); border-radius: 4px; padding: 0 .3rem; font: inherit; font-size: .85rem; background: var(--back); }
nav { display: flex; gap: .5rem; flex-wrap: wrap; align-items: center; margin-top: 1rem; } nav button { padding: .3rem .8rem; }
input { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .25rem .5rem; max-width: 12rem; }
</style>
</head>
<body>
<h1>Which message comes closer to what Sam really sent?</h1>
<p class="soft">In style (how it is worded), intent (what it is meant to do) and values (what matters to its writer). Length alone is no merit. Keys: <kbd>A</kbd> <kbd>B</kbd> <kbd>T</kbd> for a tie, <kbd>←</kbd> <kbd>→</kbd> to go back and on. Your answers stay in this browser until you download them.</p>
<progress id="bar" value="0"></progress><small id="place" aria-live="polite"></small>
<ul class="turns" id="turns"></ul>
<div class="true"><small>what Sam really sent</small><div id="true"></div></div>
<div id="choices"><button id="A"><small>message <kbd>A</kbd></small><div id="first"></div></button><button id="B"><small>message <kbd>B</kbd></small><div id="second"></div></button>
<button id="tie"><small><kbd>T</kbd></small> neither is closer</button></div>
<nav><button id="previous">Back</button><button id="next">On</button><label>your name <input id="rater" autocomplete="off"></label><button id="download">Download answers</button></nav>
<p id="done" class="soft" hidden>All are judged. Download your answers and hand the file in: <code>python 06_evaluate.py --human-labels FILE</code>.</p>
<script type="application/json" id="data">DATA</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent), store = "recon-human-" + data.sheet;
const by = id => document.getElementById(id);
let state = {rater: "", place: 0, choices: {}};
try { state = {...state, ...JSON.parse(localStorage.getItem(store) ?? "{}")}; } catch { by("done").hidden = false; by("done").textContent = "This browser keeps nothing for a page opened like this: download before you close it."; }
function save() { try { localStorage.setItem(store, JSON.stringify(state)); } catch { /* said above */ } }
function show() {
  const item = data.items[state.place], judged = Object.keys(state.choices).length;
  by("bar").max = data.items.length;
  by("bar").value = judged;
  by("place").textContent = `${state.place + 1} of ${data.items.length}, ${judged} judged`;
  by("turns").replaceChildren(...item.context.split("\n").map(line => {
    const turn = document.createElement("li"), name = document.createElement("b"), cut = line.indexOf(": ");
    name.textContent = line.slice(0, cut + 1);
    turn.append(name, line.slice(cut + 1));
    return turn;
  }));
  by("true").textContent = item.action;
  by("first").textContent = item.first || "(nothing)";
  by("second").textContent = item.second || "(nothing)";
  for (const choice of ["A", "B", "tie"]) by(choice).setAttribute("aria-pressed", state.choices[state.place] === choice);
  by("previous").disabled = state.place === 0;
  by("next").disabled = state.place === data.items.length - 1;
  if (judged === data.items.length) by("done").hidden = false;
}
function move(step) {
  state.place = Math.min(Math.max(state.place + step, 0), data.items.length - 1);
  save();
  show();
}
function choose(choice) {
  state.choices[state.place] = choice;
  move(1);
}
for (const choice of ["A", "B", "tie"]) by(choice).onclick = () => choose(choice);
by("previous").onclick = () => move(-1);
by("next").onclick = () => move(1);
by("rater").value = state.rater;
by("rater").oninput = () => { state.rater = by("rater").value; save(); };
by("download").onclick = () => {
  const labels = Object.entries(state.choices).map(([item, choice]) => ({item: Number(item), choice}));
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify({sheet: data.sheet, rater: state.rater, labels}, null, 1)], {type: "application/json"}));
  link.download = `recon-${data.sheet}-${state.rater.replace(/[^\p{L}\p{N}]+/gu, "-") || "labels"}.json`;
  link.click();
  URL.revokeObjectURL(link.href);
};
document.addEventListener("keydown", event => {
  if (event.target.tagName === "INPUT" || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  const act = {a: () => choose("A"), b: () => choose("B"), t: () => choose("tie"), ArrowLeft: () => move(-1), ArrowRight: () => move(1)}[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (act) { event.preventDefault(); act(); }
});
show();
</script>
</body>
</html>
"""


def main(argv: list[str] | None = None) -> None:
    parser = stage_arguments(__doc__)
    group = parser.add_argument_group("acting")
    group.add_argument("--traces", type=positive_int, default=2, help="traces a pair behind which the true action's probability is averaged; the first is acted on (default: %(default)s)")
    group.add_argument("--max-trace-tokens", type=positive_int, default=40, help="tokens in a trace, at most (default: %(default)s)")
    group.add_argument("--max-action-tokens", type=positive_int, default=32, help="tokens in an action, at most (default: %(default)s)")
    group.add_argument("--temperature", type=positive_float, default=0.7, help="of traces and actions (default: %(default)s)")
    group.add_argument("--batch", type=positive_int, default=32, help="pairs at once (default: %(default)s)")
    group = parser.add_argument_group("judging")
    group.add_argument("--versus", default="backward", choices=ARMS, help="the arm that all others are compared with (default: %(default)s)")
    group.add_argument("--round-robin", action="store_true", help="compare all arms with one another as well")
    group.add_argument("--judge", default="encoder", metavar="NAME", help="'encoder', or a language model: 'embedded', a local folder, a hub name, openai:NAME (default: %(default)s)")
    group.add_argument("--encoder", default="embedded", metavar="NAME", help="sentence encoder of the judge and of the similarities (default: %(default)s)")
    group.add_argument("--margin", type=fraction, default=0.02, help="cosines closer than this are a tie for the judge encoder (default: %(default)s)")
    group = parser.add_argument_group("people as judges")
    group.add_argument("--human-sheet", type=positive_int, metavar="N", help="write RUN/human.html with N comparisons of actions for a person to judge")
    group.add_argument("--human-labels", type=Path, nargs="+", default=[], metavar="FILE", help="files that people downloaded from the sheet: how far they agree with the judge")
    server_arguments(parser)
    args = parser.parse_args(argv)

    started = begin_run(args.run, args.max_memory)
    source, scores = args.run / "pairs.jsonl", args.run / "scores.jsonl"
    pairs = [pair for pair in read_pairs(source) if pair["split"] == "test"][:args.limit]
    if not pairs:
        stop(f"{source} holds no pair of the test split; run 01_prepare.py with more pairs")
    for arm in ARMS:
        settle_folder(args.run / "models" / arm)
    wait_for_all()
    folders = {arm: args.run / "models" / arm for arm in ARMS if (args.run / "models" / arm).is_dir()}
    if args.versus not in folders:
        stop(f"{args.run / 'models' / args.versus} does not exist, and --versus {args.versus} is compared with; run 04_select_sft.py first")
    prompt = made_with(Namespace(run=args.run), prompts=["user_model"])["prompts"]["user_model"]
    for arm, folder in folders.items():
        check_adapter(folder, args.model)
        if first_difference(record_of(folder).get("prompts", {}).get("user_model", prompt), prompt):
            stop(f"{folder} was fitted with another prompt for user models than the one there is now; remove it, and fit it anew")
        check_made_from(folder, source, "the stages from 02 on with")
        if arm in select_sft.ARMS and scores.is_file():
            check_made_from(folder, scores, "04_select_sft.py with")
    if lost := next((path for path in args.human_labels if not path.is_file()), None):
        stop(f"--human-labels {lost} does not exist; name a file that was downloaded from RUN/human.html")
    inputs = [source, *([scores] if scores.is_file() else []), *(folder / "adapter_model.safetensors" for folder in folders.values())]
    prompts = ["user_model", "reconstruction", "reconstruction_no_trace", "comparison"]
    # Judging costs little beside acting, so another --versus or a new arm is judged anew; what models wrote or answered is kept.
    record = made_with(args, inputs, prompts, ignore=("human_sheet", "human_labels", "concurrency"), labels=[file_hash(path) for path in args.human_labels],
                       scipy=importlib.metadata.version("scipy"),
                       **({"server": server_address()} if args.judge.startswith(REMOTE) else {}))
    judged, target, report = (args.run / name for name in ("judgements.jsonl", "results.json", "report.html"))
    if not (args.overwrite or args.human_sheet) and all(path.is_file() for path in (judged, target, report)) and record_of(target) == record and (made := read_object(target)):
        print_results(made)
        print(f"06_evaluate: {target} and {report} are already made")
        return

    if process_count() > 1 and scores.is_file() and record_of(scores)["arguments"]["model"].startswith(REMOTE):
        stop(f"{scores} was reconstructed by a server, which one process asks; start this stage without accelerate launch")
    # What later steps read is looked at before models act for hours.
    scored: list[Row] = []
    if scores.is_file():
        check_made_from(scores, source, "02_sample_candidates.py and 03_reconstruct_score.py")
        scored = read_candidates(scores, "03_reconstruct_score.py", ("trace", "scores", "leak", "reworded", "stopped", "tokens"), ("baseline", "control"))
    summary, costs, curves = (args.run / name for name in ("scores.summary.json", "costs.jsonl", "rl.jsonl"))
    calls: dict[str, int] = {}
    if summary.is_file():
        if (told := read_object(summary, "calls")) is None:
            stop(f"{summary} cannot be read; remove it and run 03_reconstruct_score.py, which makes it anew from the rows")
        calls |= told["calls"]
    if costs.is_file() and process_rank() == 0:
        cut_torn_line(costs)
        read_rows(costs, COSTS)
    log = read_rows(curves, ("objective", "step")) if curves.is_file() else []
    base = one_at_a_time(load_model)                          # user model, reconstructor and judge may be one base
    # Opened now, as acting takes long and a key may be wrong.
    servers = {args.judge: open_server(args.judge, args.concurrency)} if args.judge.startswith(REMOTE) else {}
    predictions, tokens, reused = act_all(args, base, pairs, folders, source)
    rebuilt: dict[str, dict[str, Row]] = {}
    if scores.is_file():
        held_out = {pair["id"] for pair in pairs}
        if some := [row for row in scored if row["id"] in held_out]:
            rebuilt, read = reconstruct_all(args, base, servers, pairs, scores, some)
            tokens += read
    if not rebuilt:
        print(f"no reconstructions are compared: {scores} holds no held-out pair")

    tokens = sum(gather([tokens]))
    leave_to_first()
    encoder = load_encoder(args.encoder)
    judge = load_judge(args, base, encoder, servers)
    written = {"actions": {arm: {name: row["action"] for name, row in rows.items()} for arm, rows in predictions.items()},
               "reconstructions": {arm: {name: row["reconstruction"] for name, row in rows.items()} for arm, rows in rebuilt.items()}}
    thoughts = {what: {arm: {name: row["trace"] for name, row in rows.items()} for arm, rows in some.items()} for what, some in zip(WHATS, (predictions, rebuilt))}
    judgements, comparisons, near, answers = [], [], {}, args.run / "answers.jsonl"
    results: Row = {"arms": {}, "reconstructions": {}}
    for what, key in zip(WHATS, results):
        if written[what]:
            some = [pair for pair in pairs if all(pair["id"] in rows for rows in written[what].values())]
            versus = args.versus if args.versus in written[what] else "backward"          # e2e-grpo's traces come with its actions, none without
            rows = judge_pairs(judge, what, some, written[what], choose_comparisons(list(written[what]), versus, args.round_robin), answers)
            found = compare_all(rows, some, written[what], args.seed)
            near[what] = {arm: dict(zip((pair["id"] for pair in some), cosines(encoder, [pair["action"] for pair in some], [of[pair["id"]] for pair in some])))
                          for arm, of in written[what].items()}
            results[key] = describe_arms(what, versus, found, some, written[what], thoughts[what], near[what])
            judgements, comparisons = judgements + rows, comparisons + found
    if judge.unanswered:
        closing_line(args.run, "06_evaluate", len(folders) * len(pairs), len(folders) * len(pairs), reused, started, tokens, servers.values())
        stop_unanswered(servers.values(), judge.unanswered, "comparisons")
    for arm, row in results["arms"].items():
        row |= describe_likelihood(pairs, predictions[arm], predictions[args.versus], args.seed)

    kin, scorer = family(args.judge), score_of(args.run, "recon", scored) if scored else None
    about = {"name": args.judge, "encoder": args.encoder, "margin": args.margin if args.judge == "encoder" else None, "orders": list(judge.orders),
             "same_family": args.judge != "encoder" and (args.judge == args.model or (kin is not None and kin == family(args.model)))}
    if scorer == "judge":                                     # a score by whom
        scorer = f"judge: {record_of(scores)['arguments']['judge'] or record_of(scores)['arguments']['model']}"
    made_by = lambda name: record_of(args.run / name)["arguments"]["model"] if (args.run / name).is_file() else None
    results |= {"comparisons": comparisons, "reading": read_results(comparisons, results["arms"], about, scorer),
                "people": compare_people(args.human_labels, args.run, judgements, pairs, written["actions"], args.seed) if args.human_labels else None, "judge": about,
                "data": {"made_with": record_of(source)["arguments"], "people": dict(Counter(pair["user"] for pair in pairs)), "pairs": len(pairs),
                         "conversations": len({pair["conversation"] for pair in pairs})},
                "models": {"user_models": args.model, "scores": made_by("scores.jsonl"), "traces": made_by("candidates.jsonl")}, "scorer": scorer, "made_with": record}
    write_text(judged, "".join(map(dump_row, judgements)))
    shorter = {key: {arm: {name: cell for name, cell in row.items() if name != "ids"} for arm, row in results[key].items()} for key in ("arms", "reconstructions")}
    if args.human_sheet:
        against = [row for row in choose_comparisons(list(predictions), args.versus, False) if args.versus in row]
        items = choose_items(pairs, written["actions"], against, args.human_sheet, args.seed)
        if not items:
            stop("there is nothing to judge: no other arm's actions differ from those of --versus")
        if len(items) < args.human_sheet:
            print(f"a pair comes once on a sheet, so {len(items)} comparisons are all there are")
        write_sheet(args.run, pairs, written["actions"], items)
        print(f"human sheet: {args.run / 'human.html'} with {len(items)} comparisons; the key stays in human.key.jsonl")
    print_results(results)
    if judge.calls:
        print(f"judge: {judge.calls} calls made now, {len(judgements)} verdicts")
    print(f"report: {report}")                              # written behind the closing line, so that its costs have this stage too
    closing_line(args.run, "06_evaluate", len(folders) * len(pairs), len(folders) * len(pairs), reused, started, tokens, servers.values())
    calls |= {"verdicts": len(read_answers(answers))} if answers.is_file() else {}
    write_page(report, PAGE, {**results, **shorter, "versus": args.versus, "examples": make_examples(pairs, predictions, rebuilt, near, judgements, args.versus, scored),
                              "distributions": distributions(scored), "rl": log, "costs": read_rows(costs, COSTS), "calls": calls})
    write_output(target, json.dumps(results, indent=1), record)


if __name__ == "__main__":
    run_stage(main)
