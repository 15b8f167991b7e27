"""Stage 4: choose one trace a pair for each arm, and fit one user model an arm.

Recon-Select is the arm `recon`: the trace with the best reconstruction score. The user model learns
context -> <think> trace </think> action, so that at test time it thinks for itself before it acts.

    in     RUN/pairs.jsonl, RUN/scores.jsonl
    out    RUN/traces/ARM.jsonl     id, trace, k (which candidate), score, leak, stopped
           RUN/models/ARM/          a LoRA adapter on the base model

The arms: none (no trace at all), backward (candidate 0, unselected: Backward Synthesis), recon (best score); and, by
--arms, controls: shuffled (recon's trace of another pair), longest, worst (lowest score).

How to run it:

    python 04_select_sft.py
    python 04_select_sft.py --arms shuffled --score likelihood
    accelerate launch 04_select_sft.py                         each GPU takes its share of every batch

Departures from the paper: training settings are not public; these are common ones for LoRA. One model serves all
people of the run, told apart by their id in the prompt. A candidate that the leak guard stopped is chosen (but by
backward) only if all of a pair's candidates were; then it is the one that gives least away.
"""

import argparse
import math
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from common import (Group, Row, add_adapter, begin_run, check_made_from, check_record, clip_gradients, closing_line, discard, dump_row, first_difference, gather,
                    given_away, load_model, load_optimizer, made_with, other_pairs, packed_logprobs, positive_float, positive_int, process_rank, progress,
                    read_candidates, read_pairs, recompute_or_not, record_of, run_stage, save_adapter, save_checkpoint, seed_of, settle_folder, share,
                    stage_arguments, stop, sum_gradients, user_completion, user_prompt, wait_for_all, write_output)

ARMS = ("none", "backward", "recon", "shuffled", "longest", "worst")
SAVE_SECONDS = 120                                         # between checkpoints of a fit: what a kill can cost
NEAR = 2e-5                                                # scores no further apart are a tie: so much, packing can move a log-prob


def choose_trace(arm: str, row: Row, score: str) -> Row:
    """The trace row {id, trace, k, score, leak, stopped} of an arm for one scored pair; ties, to within NEAR, go to the earlier candidate."""
    candidates = row["candidates"]
    if arm == "none":
        return {"id": row["id"], "trace": None, "k": None, "score": row["baseline"].get(score), "leak": 0.0, "stopped": False}
    if arm == "backward":
        k = 0
    else:
        scored = [k for k, candidate in enumerate(candidates) if candidate["scores"].get(score) is not None]
        least = min(given_away(candidates[k]) for k in scored)                          # 0 if any passed the guard
        honest = [k for k in scored if given_away(candidates[k]) <= least + NEAR]
        wanted = {"longest": lambda k: candidates[k]["tokens"], "worst": lambda k: -candidates[k]["scores"][score]}
        worth = list(map(wanted.get(arm, lambda k: candidates[k]["scores"][score]), honest))
        k = next(k for k, value in zip(honest, worth) if value >= max(worth) - NEAR)
    chosen = candidates[k]
    return {"id": row["id"], "trace": chosen["trace"], "k": k, "score": chosen["scores"].get(score), "leak": chosen["leak"], "stopped": chosen["stopped"]}


def rows_with_score(rows: Sequence[Row], score: str) -> list[Row]:
    """The rows of which a candidate has the score. A judge's answer may be missing; such a pair is left out of every arm,
    so that all arms have the same pairs. Stops if no row is left."""
    whole = [row for row in rows if any(candidate["scores"].get(score) is not None for candidate in row["candidates"])]
    if not whole:
        stop(f"no pair has the score {score!r}; run 03_reconstruct_score.py --overwrite with that scorer")
    if len(whole) < len(rows):
        print(f"left out: {len(rows) - len(whole)} of {len(rows)} pairs, which have no score {score!r}")
    return whole


def choose_traces(arm: str, rows: Sequence[Row], pairs: Sequence[Row], score: str, seed: int) -> list[Row]:
    """The trace rows of an arm; `pairs` belong to `rows`, one each. `shuffled` gives each pair the selected trace of a pair of another conversation."""
    chosen = [choose_trace(arm, row, score) for row in rows]
    if arm == "shuffled":
        by_id = {row["id"]: row for row in chosen}
        chosen = [by_id[other["id"]] | {"id": pair["id"]} for pair, other in zip(pairs, other_pairs(pairs, pairs, seed, "shuffled"))]
    return chosen


def user_example(tokenizer: Any, pair: Row, trace: str | None) -> Group:
    """(prompt ids, [completion ids]) of one training example; the loss covers the completion, all of it and no more."""
    return user_prompt(tokenizer, pair, thinking=trace is not None), [user_completion(tokenizer, trace, pair["action"])]


def completion_loss(model: Any, examples: Sequence[Group], total_tokens: int, recompute: bool = False) -> torch.Tensor:
    """Cross-entropy of the completions, summed over their tokens and divided by `total_tokens`, in nats a token."""
    logprobs = packed_logprobs(model, examples, recompute=recompute)
    return -sum(part.sum() for parts in logprobs for part in parts) / total_tokens


def add_fit_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("fitting a user model")
    group.add_argument("--rank", type=positive_int, default=16, help="LoRA rank; alpha is twice that (default: %(default)s)")
    group.add_argument("--epochs", type=positive_int, default=2, help="passes over the training pairs (default: %(default)s)")
    group.add_argument("--batch", type=positive_int, default=2, help="pairs an optimizer step (default: %(default)s)")
    group.add_argument("--recompute", action=argparse.BooleanOptionalAction, help="compute every layer twice in training, so that long contexts fit (default: only on a GPU)")
    group.add_argument("--fit-lr", type=positive_float, default=1e-3,
                       help="peak learning rate of AdamW, after 10%% warm-up, falling linearly to 0; 2e-4 suits a model of billions (default: %(default)s)")


def fit_user_model(base: Any, examples: Sequence[Group], args: argparse.Namespace, folder: Path, record: Row) -> tuple[list[float], int]:
    """Fit a LoRA adapter on the examples and save it under `folder`; returns each step's loss and the tokens read.

    Every example goes through the model alone: without padding two cores are as fast as they can be. Several processes
    share the examples of a batch and add up their gradients, so all of them take the same step. Goes on from the
    checkpoint in folder.part that an interrupted fit left there, if it was made with the same `record`.
    """
    work = folder.with_name(folder.name + ".part")
    checkpoint = work / "last"
    if process_rank() == 0:
        settle_folder(checkpoint)
    wait_for_all()
    stale = args.overwrite or (checkpoint.is_dir() and first_difference(record_of(checkpoint), record))
    wait_for_all()                                            # each has looked before the first one discards
    if stale:
        discard(work)
    wait_for_all()
    resumed = checkpoint.is_dir()
    model = add_adapter(base, args.rank, args.seed, checkpoint if resumed else None)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=args.fit_lr, weight_decay=0.0)
    order = [place for epoch in range(args.epochs)
             for place in random.Random(seed_of(args.seed, "04", epoch)).sample(range(len(examples)), len(examples))]
    batches = [order[start:start + args.batch] for start in range(0, len(order), args.batch)]
    warmup = max(1, len(batches) // 10)
    losses, tokens = load_optimizer(checkpoint, optimizer) if resumed else [], 0
    save = lambda: save_checkpoint(checkpoint, model, optimizer, losses, record)
    saved = time.monotonic()
    for step, batch in progress(list(enumerate(batches))[len(losses):], f"fitting {folder.name}", save=save):
        total = sum(len(examples[place][1][0]) for place in batch)
        tokens += sum(len(examples[place][0]) for place in batch) + total
        loss = 0.0
        for place in share(batch):
            part = completion_loss(model, [examples[place]], total, recompute_or_not(args.recompute))
            part.backward()
            loss += part.item()
        sum_gradients(weights)
        if not math.isfinite(clip_gradients(weights)):
            stop(f"the gradient of {folder.name} is not finite; lower --fit-lr and start again (finished arms are kept)")
        for parameters in optimizer.param_groups:
            parameters["lr"] = args.fit_lr * min((step + 1) / warmup, (len(batches) - step) / (len(batches) - warmup + 1))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(sum(gather([loss])))
        if time.monotonic() - saved > SAVE_SECONDS:
            save()
            saved = time.monotonic()
    save_adapter(model, folder, record)
    discard(work)
    model.unload()
    return losses, tokens


def describe(arm: str, chosen: Sequence[Row], score: str, losses: Sequence[float]) -> str:
    """A line on an arm: the mean score of its traces, how many give the action away, and the loss at both ends of the fit."""
    values = [row["score"] for row in chosen if row["score"] is not None]
    traces = f"{score} of its traces {sum(values) / len(values):+.3f}, " if values and arm != "none" else ""
    tenth = max(1, len(losses) // 10)
    return (f"{arm}: {traces}stopped by the leak guard {sum(row['stopped'] for row in chosen)} of {len(chosen)}, "
            f"loss {sum(losses[:tenth]) / tenth:.2f} -> {sum(losses[-tenth:]) / tenth:.2f} nats a token")


def main(argv: list[str] | None = None) -> None:
    parser = stage_arguments(__doc__)
    group = parser.add_argument_group("selection")
    group.add_argument("--arms", default="none,backward,recon", help=f"comma-separated, from {', '.join(ARMS)} (default: %(default)s)")
    group.add_argument("--score", default="unsaid", choices=("likelihood", "unsaid", "embedding", "judge"), help="what recon selects by (default: %(default)s)")
    add_fit_arguments(parser)
    args = parser.parse_args(argv)
    arms = list(dict.fromkeys(args.arms.split(",")))
    if unknown := [arm for arm in arms if arm not in ARMS]:
        stop(f"--arms: unknown arm {unknown[0]!r}; choose from {', '.join(ARMS)}")

    started = begin_run(args.run, args.max_memory)
    sources = args.run / "pairs.jsonl", args.run / "scores.jsonl"
    pairs = {pair["id"]: pair for pair in read_pairs(sources[0])}
    scored = read_candidates(sources[1], "03_reconstruct_score.py", ("trace", "tokens", "leak", "reworded", "stopped", "scores"), ("baseline",))
    check_made_from(sources[1], sources[0], "02_sample_candidates.py and 03_reconstruct_score.py")
    rows = [row for row in scored if row["id"] in pairs and pairs[row["id"]]["split"] == "train"][:args.limit]
    if not rows:
        stop(f"{sources[1]} holds no pair of the train split; run 01_prepare.py with more pairs, then stages 2 and 3")
    rows = rows_with_score(rows, args.score)
    model = tokenizer = None
    tokens = made = 0
    for arm in arms:
        record = made_with(args, sources, ["user_model"], ignore=("arms", "recompute"), arm=arm)
        folder, traces = args.run / "models" / arm, args.run / "traces" / f"{arm}.jsonl"
        if check_record(traces, record, args.overwrite) and check_record(folder, record, args.overwrite):
            print(f"04_select_sft: {folder} is already made")
            continue
        chosen = choose_traces(arm, rows, [pairs[row["id"]] for row in rows], args.score, args.seed)
        if model is None:
            model, tokenizer = load_model(args.model, args.four_bit)
            for old in arms if args.overwrite else []:
                discard(args.run / "models" / old)
                discard(args.run / "traces" / f"{old}.jsonl")
        write_output(traces, "".join(map(dump_row, chosen)), record)
        losses, read = fit_user_model(model, [user_example(tokenizer, pairs[row["id"]], row["trace"]) for row in chosen], args, folder, record)
        tokens, made = tokens + read, made + 1
        print(describe(arm, chosen, args.score, losses))
    if made:
        closing_line(args.run, "04_select_sft", len(rows), made * len(rows), (len(arms) - made) * len(rows), started, tokens)


if __name__ == "__main__":
    run_stage(main)
