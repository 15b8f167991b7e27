"""Stage 4: choose one trace a pair for each arm, and fit one user model an arm.

Recon-Select is the arm `recon`: the trace with the best reconstruction score. The user model learns
context -> <think> trace </think> action, so that at test time it thinks for itself before it acts.

    none        no trace at all
    backward    candidate 0, unselected: Backward Synthesis
    guarded     the first candidate that passes the leak detector: recon beside it is the score and nothing else
    recon       the best score, by --score
    judged      the best score by stage 3's judge: recon as the paper chooses, from the same candidates
    shuffled    recon's trace of another pair: recon beside it is what the traces say of their own pair
    longest, worst                the longest trace, the lowest score
    recon-TAG   with --tag: the first that passes of the second set; recon-grpo beside guarded is GRPO and nothing else

    in     RUN/pairs.jsonl, RUN/scores[.TAG].jsonl
    out    RUN/traces/ARM.jsonl, RUN/models/ARM/ (a LoRA adapter on the base model)

How to run it:

    python 04_select_sft.py
    python 04_select_sft.py --arms shuffled --score likelihood
    python 04_select_sft.py --tag grpo                         arm recon-grpo, fitted as the others were
    accelerate launch 04_select_sft.py                         each GPU takes its share of every batch

Departures from the paper: its training settings are not public; these are common ones for LoRA. One model serves all
people of the run, told apart by their id in the prompt. Every arm but backward takes a trace that the leak detector
stopped only if all of a pair's traces with a score were; then it is the one that gives least away. All arms train on
the same pairs in the same order.
"""

import argparse
import math
import random
from collections.abc import Sequence
from typing import Any

import torch

import common
from common import Choice, Pair, Scores

ARMS = ("none", "backward", "guarded", "recon", "judged", "shuffled", "longest", "worst")
# Scores no further apart are a tie: so much rounding moves them in float32. In bfloat16 it moves them further (see
# docs/scoring.md), but a tolerance as wide would make ties of traces that differ; a choice repeats as scores are kept.
TIE_TOLERANCE = 2e-5
Example = tuple[list[int], list[int]]          # (prompt ids, completion ids)


# ----------------------------------------------------------------------------------------------------------------------
# Choose


def choose_candidate(arm: str, row: Scores, score: str) -> int:
    """Which candidate an arm takes; ties, to within TIE_TOLERANCE, go to the earlier one.

    Leaks stand back: a candidate that the leak detector stopped is taken only if all that have the score were stopped,
    and then the one that gives away least. The arm backward alone takes its first candidate, whatever it is.
    """
    scored = [k for k, some in enumerate(row.candidates)
              if some.scores.get(score) is not None or arm in ("guarded", "longest")]
    severity = {k: common.leak_severity(row.candidates[k]) for k in scored}
    cleanest = [k for k in scored if severity[k] <= min(severity.values()) + TIE_TOLERANCE]   # 0 if any passed
    value = {"backward": lambda k: -k, "guarded": lambda k: -k, "longest": lambda k: row.candidates[k].tokens,
             "worst": lambda k: -row.candidates[k].scores[score]}.get(arm, lambda k: row.candidates[k].scores[score])
    pool = range(len(row.candidates)) if arm == "backward" else cleanest
    best = max(map(value, pool))
    return next(k for k in pool if value(k) >= best - TIE_TOLERANCE)


def score_of(arm: str, score: str) -> str:
    """The score that an arm's choice looks at."""
    return "judge" if arm == "judged" else score


def choose_trace(arm: str, row: Scores, rows: dict[str, Scores], score: str) -> Choice:
    """The trace that an arm trains on for one pair; `rows` are all, for the arm shuffled."""
    score = score_of(arm, score)
    if arm == "none":
        return Choice(id=row.id, trace=None, k=None, score=row.baseline.get(score), is_leak=False)
    source = rows[row.control.id] if arm == "shuffled" else row
    k = choose_candidate("recon" if arm == "shuffled" else arm, source, score)
    chosen = source.candidates[k]
    return Choice(id=row.id, trace=chosen.trace, k=k, score=chosen.scores.get(score), is_leak=chosen.is_leak)


def has_score(row: Scores | None, score: str) -> bool:
    return row is not None and any(some.scores.get(score) is not None for some in row.candidates)


def rows_with_score(rows: Sequence[Scores], everyone: dict[str, Scores], score: str) -> list[Scores]:
    """The rows that have the score, as has the row of their control's pair, for the arm shuffled.

    A judge's answer may be missing; such a pair is left out of all arms.
    """
    whole = [row for row in rows if has_score(row, score) and has_score(everyone.get(row.control.id), score)]
    if not whole:
        common.fail(f"no pair has the score {score!r}; run 03_reconstruct_score.py --overwrite with that scorer "
                    "and more conversations, or pass another --score")
    if len(whole) < len(rows):
        print(f"left out: {len(rows) - len(whole)} of {len(rows)} pairs, which have no score {score!r}")
    return whole


# ----------------------------------------------------------------------------------------------------------------------
# Fit


def user_example(tokenizer: Any, pair: Pair, trace: str | None) -> Example:
    """One training example; its completion is (trace, closing tag,) action, end token. A trace of None is left out."""
    prompt = common.encode_prompt(tokenizer, common.user_prompt(pair, thinking=trace is not None))
    action = common.encode_data(tokenizer, pair.action)
    return prompt, [*common.close_trace(tokenizer, trace), *action, tokenizer.eos_token_id]


def fill_rows(examples: Sequence[Example], room: int) -> list[list[Example]]:
    """Examples in rows of at most `room` tokens, a longer one alone: short ones are faster in a row than one by one."""
    rows, used = [], 0
    for example in examples:
        tokens = sum(map(len, example))
        if not rows or used + tokens > room:
            rows.append([])
            used = 0
        rows[-1].append(example)
        used += tokens
    return rows


def completion_loss(model: Any, examples: Sequence[Example], total_tokens: int,
                    checkpointing: bool = False) -> torch.Tensor:
    """Cross-entropy of the completions, all of them and no more, divided by `total_tokens` of the batch; nats a token.

    The examples go through the model in one row and do not see one another (see common.shared_prefix_logits).
    """
    prefix, stems = common.split_prefix([prompt for prompt, _ in examples])
    tree = prefix, stems, [[completion] for _, completion in examples]
    (logprobs,) = common.shared_prefix_logprobs(model, [tree], checkpointing=checkpointing)
    return -sum(row.sum() for row, in logprobs) / total_tokens


def fit_user_model(base: Any, examples: Sequence[Example], args: argparse.Namespace,
                   name: str) -> tuple[Any, list[float]]:
    """Fit a LoRA adapter on the examples; returns the model that wears it and each step's loss.

    Several processes share the examples of a batch and add up their gradients, so all of them take the same step.
    """
    model = common.add_adapter(base, args.rank, args.seed)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=args.lr, weight_decay=0.0, fused=True)
    order = [place for epoch in range(args.epochs) for place in random.Random(
        common.stable_seed(args.seed, "fit", epoch)).sample(range(len(examples)), len(examples))]
    batches = [order[start:start + args.batch_size] for start in range(0, len(order), args.batch_size)]
    warmup, losses = max(1, len(batches) // 10), []
    for step, batch in enumerate(common.progress(batches, f"fitting {name}")):
        total, loss = sum(len(examples[place][1]) for place in batch), 0.0
        for row in fill_rows([examples[place] for place in common.shard(batch)], args.row_tokens):
            part = completion_loss(model, row, total, args.checkpointing)
            part.backward()
            loss += part.item()
        common.sum_gradients(weights)
        if not math.isfinite(torch.nn.utils.clip_grad_norm_(weights, 1.0).item()):
            common.fail(f"the gradient of {name} is not finite; lower --lr and start again (finished arms are kept)")
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min((step + 1) / warmup, (len(batches) - step) / (len(batches) - warmup + 1))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(sum(common.gather([loss])))
    return model, losses


def describe(arm: str, chosen: Sequence[Choice], score: str, losses: Sequence[float]) -> str:
    """A line on an arm: the mean score of its traces, how many are leaks, and the loss at both ends of the fit."""
    values = [row.score for row in chosen if row.score is not None and arm != "none"]
    traces = f"{score} of its traces {sum(values) / len(values):+.3f}, " if values else ""
    tenth = max(1, len(losses) // 10)
    return (f"{arm}: {traces}{sum(row.is_leak for row in chosen)} leaks in {len(chosen)}, "
            f"loss {sum(losses[:tenth]) / tenth:.2f} -> {sum(losses[-tenth:]) / tenth:.2f} nats a token")


# ----------------------------------------------------------------------------------------------------------------------
# The stage


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = common.stage_arguments(__doc__)
    add = parser.add_argument_group("selection").add_argument
    add("--arms", default="none,backward,guarded,recon", help=f"comma-separated, from {', '.join(ARMS)}")
    add("--score", default="contrast", help="what recon selects by: any score of stage 3")
    add("--tag", metavar="NAME", help="fit arm recon-NAME from a second set, with the settings of the arms there are")
    add = parser.add_argument_group("fitting a user model").add_argument
    add("--rank", **common.COUNT, default=16, help="of LoRA; alpha is twice that")
    add("--epochs", **common.COUNT, default=2, help="passes over the training pairs")
    add("--batch-size", **common.COUNT, default=1, help="pairs an optimizer step; with ten pairs, two are "
        "too few steps to learn where a trace ends")
    add("--row-tokens", **common.COUNT, default=384, help="tokens that go through the model at once, at most")
    add("--lr", type=common.positive_float, default=1e-3, help="peak learning rate of AdamW, after 10%% warm-up, "
        "falling linearly to 0; 2e-4 suits a model of billions")
    add("--checkpointing", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available(),
        help="compute activations twice, so that long contexts fit")
    args = parser.parse_args(argv)
    if unknown := [arm for arm in args.arms.split(",") if arm not in ARMS]:
        common.fail(f"--arms: unknown arm {unknown[0]!r}; choose from {', '.join(ARMS)}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    started = common.open_run(args)
    pairs_path, source = args.run / "pairs.jsonl", args.run / common.tagged("scores.jsonl", args.tag)
    traces_of, model_of = (lambda arm: args.run / "traces" / f"{arm}.jsonl"), (lambda arm: args.run / "models" / arm)
    rules = {arm: arm for arm in args.arms.split(",")}
    following = "python 05_rl_train.py"
    if args.tag:
        rules, following = {f"recon-{args.tag}": "guarded"}, "python 05_rl_train.py --objective e2e"
        fitted = next((arm for arm in ARMS if traces_of(arm).is_file()), None)
        if not fitted:
            common.fail(f"{args.run / 'traces'} holds no arm whose settings --tag takes; run 04_select_sft.py first")
        args = common.inherit_settings(args, traces_of(fitted))
    pairs = common.read_rows(pairs_path, Pair, "01_prepare.py")
    scored = {row.id: row for row in common.read_rows(source, Scores, "03_reconstruct_score.py")}
    common.check_made_from(source, pairs_path, "02_sample_candidates.py and 03_reconstruct_score.py")
    train = [pair for pair in pairs if pair.split == "train" and pair.id in scored][:args.limit]
    if not train:
        common.fail(f"{source} holds no pair of the train split; run stages 1, 2 and 3 with more pairs")
    by_id = {pair.id: pair for pair in train}
    rows = [scored[pair.id] for pair in train]
    if args.tag:                                           # the pairs of the other arms; this one needs no score
        ids = {row.id for row in common.read_rows(traces_of(fitted), Choice)}
        rows = [row for row in rows if row.id in ids]
    else:                                                  # of all arms, or those fitted later would train on others
        rated = any(has_score(row, "judge") for row in rows) or "judged" in rules
        for score in [args.score, *(["judge"] if rated else [])]:
            rows = rows_with_score(rows, scored, score)
    local, tokens, made = None, 0, 0
    if args.show_prompt:
        trace = choose_trace(list(rules.values())[-1], rows[0], scored, args.score).trace
        local = common.load_model(args.model, args.four_bit, args.dtype)
        return print(local.tokenizer.decode(sum(user_example(local.tokenizer, by_id[rows[0].id], trace), [])))
    for arm, rule in rules.items():
        config = common.run_config(args, [pairs_path, source], ["user_model"], ["arms", "tag", "checkpointing"])
        config["arm"] = arm
        if all(common.is_made(path, config, args.overwrite) for path in (traces_of(arm), model_of(arm))):
            print(f"{model_of(arm)} is complete")
            continue
        local = local or common.load_model(args.model, args.four_bit, args.dtype)
        chosen = [choose_trace(rule, row, scored, args.score) for row in rows]
        examples = [user_example(local.tokenizer, by_id[row.id], row.trace) for row in chosen]
        common.write_file(traces_of(arm), "".join(map(common.dump_row, chosen)), config)
        model, losses = fit_user_model(local.model, examples, args, arm)
        common.save_adapter(model, model_of(arm), config)
        local.model = model.unload()
        tokens, made = tokens + args.epochs * sum(len(ids) for example in examples for ids in example), made + 1
        print(describe(arm, chosen, score_of(rule, args.score), losses))
    common.end_stage(args, "04_select_sft", len(rows), len(rules) * len(rows), (len(rules) - made) * len(rows), started,
                     tokens, following)


if __name__ == "__main__":
    common.run_stage(main)
