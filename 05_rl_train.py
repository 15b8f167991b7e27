"""Stage 5: GRPO with the reconstruction score as reward (Recon-GRPO), or with the action alone (E2E-GRPO).

    --objective recon   policy: the synthesizer M_r (sees context and action, writes a trace)
                        reward: how well the trace lets the frozen base reconstruct the action (--reward, below)
                        then:   its traces for the train split, and the user model of arm recon-grpo
    --objective e2e     policy: the user model (sees the context, writes trace and action), from --init-adapter on
                        reward: cosine of its action and the true one

    in     RUN/pairs.jsonl; e2e: RUN/models/backward/ as well
    out    RUN/rl.jsonl, RUN/rl.png              a line a step and the curves (both objectives)
           RUN/models/synthesizer/, RUN/traces/recon-grpo.jsonl, RUN/models/recon-grpo/
           RUN/models/e2e-grpo/
           RUN/rl/OBJECTIVE/                     the last checkpoint

How to run it:

    python 05_rl_train.py
    python 05_rl_train.py --objective e2e
    python 05_rl_train.py --steps 100 --prompts 4 --group 6 --save-every 10      stopped and started again, it goes on from the last save
    accelerate launch 05_rl_train.py --prompts 8                                 each GPU takes its share of a step's prompts

The reward of recon. A policy that sees the action will learn to hand it over, so each reward closes one more way:

    likelihood   the gain in likelihood minus a penalty on quoted 4-grams (naive, kept for comparison)
    unsaid       credit only for what the trace did not say; a trace that the leak guard stops, or that is not in
                 whole sentences about Sam's mind in the third person, earns less than the average honest one of its group
    specific     the same, minus what the trace adds to another pair's action, so text that helps any action earns
                 nothing, minus a part of its rewording: what is nearer to the action scores higher without saying more (default)

How it differs from textbook GRPO (arXiv 2402.03300): by default one update a rollout, so there is no ratio to clip
(--updates brings both back), no KL term (--kl does), and the advantage is reward minus group mean without the division by
the standard deviation (--std-norm; arXiv 2503.20783); the loss is normalised over all completion tokens of the step. Policy
and reward share one base: with the adapter off it is the reconstructor. Groups go backward one at a time, and the worked
examples that all prompts open with are read once a step; on a GPU layers are recomputed instead (--recompute), which takes
more time and far less memory.

Departures from the paper: its settings and its reward's guards are not public; all of the above are ours.
"""

import argparse
import importlib
import math
import os
import random
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from common import (END_THINK, MIN_P, Completion, Group, Portions, Row, add_adapter, append_rows, batches_by_length, begin_output, begin_run, check_adapter,
                    check_made_from, check_record, clean_action, clip_gradients, closing_line, decode, discard, dump_row, embed, end_output, finished_rows,
                    first_difference, fraction, gather, gather_shares, generate, given_away, guard_traces, is_trace, leak_share, likelihood_scores, load_encoder,
                    load_model, load_optimizer, made_with, other_pairs, packed_logits, part_of, positive_float, positive_int, process_count, process_rank, progress,
                    read_pairs, read_prefix, read_rows, recompute_or_not, record_of, run_stage, save_adapter, save_checkpoint, seed_of, share, show_context,
                    stage_arguments, stop, sum_gradients, synthesis_prompt, trace_of, user_prompt, wait_for_all, write_text)

sample_candidates = importlib.import_module("02_sample_candidates")
select_sft = importlib.import_module("04_select_sft")

Completions = list[list[Completion]]                         # [pair][completion]
MEASURED = ("reward", "score", "other", "leak", "leak_1", "reworded", "stopped", "malformed")


# ------------------------------------------------------------------------------------------------
# Rewards: a row {MEASURED, fault} for every completion of every pair. None is missing or not measured, never taken for 0.


def finite(value: float) -> float | None:
    """The value, or None for a NaN or an infinity."""
    return value if math.isfinite(value) else None


def gate(rewards: Sequence[float | None], faults: Sequence[float], penalty: float) -> list[float | None]:
    """Rewards of one group: an honest trace keeps its own, a faulty one never earns as much as the average honest one.

    gate([0.2, 3.0, -0.1], [0, 0.5, 0], penalty=0.2) is [0.2, -0.05, -0.1]: the honest mean 0.05 minus 0.2 * 0.5. Not below
    every honest one: traces near the action are often stopped, and a cliff there taught the policy to keep away from the
    action altogether (README, "What did not work").
    """
    honest = [reward for reward, fault in zip(rewards, faults) if fault == 0 and reward is not None]
    most = sum(honest) / len(honest) if honest else 0.0
    return [reward if fault == 0 or reward is None else min(reward, most) - penalty * fault for reward, fault in zip(rewards, faults)]


def gate_rows(rows: Sequence[Row], penalty: float) -> None:
    """Put gate's rewards of one group into its rows."""
    for row, reward in zip(rows, gate([row["reward"] for row in rows], [row["fault"] for row in rows], penalty)):
        row["reward"] = reward


def look_at_traces(encoder: Any, traces: Sequence[str], pair: Row) -> list[Row]:
    """{leak, leak_1, reworded, stopped, malformed} of each trace of a pair: the ways to earn a score without a reason."""
    context = show_context(pair)
    return [row | {"leak_1": leak_share(trace, pair["action"], context, 1), "malformed": not is_trace(trace)}
            for row, trace in zip(guard_traces(encoder, traces, pair["action"], context), traces)]


def rate_recon(model: Any, tokenizer: Any, encoder: Any, pairs: Sequence[Row], others: Sequence[Row], completions: Completions, args: argparse.Namespace) -> list[list[Row]]:
    """Rate traces of `pairs` by what they add to the pair's action (`score`) and to the action of another pair (`other`).

    Both are `unsaid` scores, whatever is rewarded, by the frozen base, the adapter switched off. A `fault` above 0 is for
    `gate`: what a stopped trace gives away, 0.5 for one without a trace's form; no fault is seen by the naive reward.
    """
    rated = []
    with model.disable_adapter():
        for pair, foreign, group in zip(pairs, others, completions):
            traces = [trace_of(tokenizer, completion) for completion in group]
            own, elsewhere = (likelihood_scores(model, tokenizer, some, traces)[0] for some in (pair, foreign))
            rows = look_at_traces(encoder, traces, pair)
            for row, here, there in zip(rows, own, elsewhere):
                rewards = {"likelihood": here["likelihood"] - args.leak_penalty * row["leak"], "unsaid": here["unsaid"],
                           "specific": here["unsaid"] - there["unsaid"] - args.reword_penalty * row["reworded"]}
                row |= {"reward": finite(rewards[args.reward]), "score": finite(here["unsaid"]), "other": finite(there["unsaid"])}
                row["fault"] = 0.0 if args.reward == "likelihood" else max(given_away(row), 0.5 * row["malformed"])
            rated.append(rows)
    return rated


def rate_e2e(model: Any, tokenizer: Any, encoder: Any, pairs: Sequence[Row], others: Sequence[Row], completions: Completions, args: argparse.Namespace) -> list[list[Row]]:
    """Rate completions by the cosine of the action behind the think block and the true one, -1 without an action."""
    rated = []
    for pair, foreign, group in zip(pairs, others, completions):
        actions = [clean_action(decode(tokenizer, completion).partition(END_THINK.strip())[2]) for completion in group]
        true, elsewhere, *vectors = embed(encoder, [pair["action"], foreign["action"], *actions])
        rows = []
        for action, vector in zip(actions, vectors):
            score = (true @ vector).item() if action else -1.0
            rows.append({**dict.fromkeys(MEASURED), "reward": score, "score": score, "other": (elsewhere @ vector).item() if action else -1.0,
                         "malformed": not action, "fault": 0.0})
        rated.append(rows)
    return rated


# ------------------------------------------------------------------------------------------------
# GRPO: rollout, advantages, update


def rollout(model: Any, tokenizer: Any, prompts: Sequence[list[int]], seeds: Sequence[int], group: int, args: argparse.Namespace) -> Completions:
    """A group of completions for each prompt, sampled from the policy, or greedy without `seeds`. Each has at least one token."""
    done = generate(model, tokenizer, [(prompt[:-1], [prompt[-1:]] * group) for prompt in prompts], args.max_new_tokens, seeds, args.temperature if seeds else 0.0)
    return [done[at:at + group] for at in range(0, len(done), group)]


def tokens_of(completion: Completion) -> list[int]:
    """Its ids with the end token, if it ended by one: the policy chose that too and must be credited for it."""
    return completion.ids + ([] if completion.end is None else [completion.end])


def group_advantages(rewards: Sequence[float], std_norm: bool) -> list[float]:
    """Reward minus the mean of its group, over its standard deviation if `std_norm` (plus 1e-4, as in TRL); 0 if all are equal."""
    mean = sum(rewards) / len(rewards)
    centred = [reward - mean for reward in rewards]
    std = (sum(value * value for value in centred) / max(len(centred) - 1, 1)) ** 0.5
    if std < 1e-6:
        return [0.0] * len(rewards)
    return [value / (std + 1e-4) for value in centred] if std_norm else centred


def policy_logprobs(model: Any, group: Group, temperature: float, past: Sequence[torch.Tensor] = (), recompute: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """(log p, entropy of the policy) at each token of a group's completions, one after the other: both [tokens], float32.

    `past` are keys and values of the first tokens of the prompt (see common.read_prefix), `recompute` saves memory in their
    place (see common.packed_logits). Only log p is differentiable.
    """
    logits, rows = packed_logits(model, *group, past=past, recompute=recompute)
    logits = logits / temperature                                                       # [places, vocabulary]
    normaliser, at = logits.logsumexp(-1), torch.cat(rows)
    logprobs = logits[at, torch.tensor(sum(group[1], []), device=logits.device)] - normaliser[at]
    with torch.no_grad():
        entropy = torch.special.entr(logits.softmax(-1)).sum(-1)
    return logprobs, entropy[at]


def policy_loss(logprobs: torch.Tensor, old: torch.Tensor, reference: torch.Tensor | None, advantages: torch.Tensor, clip: float, kl: float) -> torch.Tensor:
    """GRPO's loss of each token; all arguments and the result are [tokens].

    The ratio p / p_old is clipped to 1 ± clip where that lowers the objective. On policy it is 1 and the loss is minus the
    advantage: near 0 in the sum, but its gradient is that of -advantage * log p. The KL term is GRPO's estimator
    exp(q) - q - 1 with q = log p_reference - log p, times the ratio: without it the gradient is not that of the
    divergence (arXiv 2512.02556; TRL's default).
    """
    ratio = (logprobs - old).exp()
    loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    if reference is not None:
        gap = reference - logprobs
        loss = loss + kl * ratio * (gap.exp() - gap - 1)
    return loss


@contextmanager
def reference_policy(model: Any):
    """The policy as it was before training: the base alone, or the adapter that training continues from."""
    if "reference" not in model.peft_config:
        with model.disable_adapter():
            yield
        return
    model.set_adapter("reference")
    try:
        yield
    finally:
        model.set_adapter("default")


def update(model: Any, optimizer: torch.optim.Optimizer, groups: Sequence[Group], advantages: Sequence[Sequence[float]], args: argparse.Namespace) -> Row:
    """args.updates optimizer steps over the groups whose rewards differ (with a KL term, all); returns the last one's measurements.

    Groups go backward one at a time, longest first, so memory is that of one group. What their prompts have in common is
    read once: its keys and values collect the gradients of all groups, then pass them on in one backward. A loss or a
    gradient that is not finite is not applied, ends the updates of this rollout and is reported as `nonfinite`. Several
    processes share the groups and add up their gradients, so all of them take the same step.
    """
    weights = [weight for parameters in optimizer.param_groups for weight in parameters["params"]]
    before = [weight.detach().clone() for weight in weights]
    useful = [place for place, some in enumerate(advantages) if any(some) or (args.kl and some)]
    recompute = recompute_or_not(args.recompute)
    useful.sort(key=lambda place: len(groups[place][0]) + sum(map(len, groups[place][1])), reverse=True)
    total = sum(len(ids) for _, completions in groups for ids in completions)
    row: Row = {"zero_variance": 1 - sum(any(some) for some in advantages) / len(advantages), "loss": None, "entropy": None, "kl": None,
                "clipped": None, "grad_norm": 0.0, "adapter_change": 0.0, "nonfinite": False}
    if not useful:
        return row
    mine = share(useful)
    prompts = [groups[place][0] for place in useful]
    shared = 0 if recompute else min(len(os.path.commonprefix(prompts)), min(map(len, prompts)) - 1)
    references: dict[int, torch.Tensor] = {}
    if args.kl:
        with torch.no_grad(), reference_policy(model):
            references = {place: policy_logprobs(model, groups[place], args.temperature)[0] for place in mine}
    olds: dict[int, torch.Tensor] = {}
    for _ in range(args.updates):
        past = read_prefix(model, prompts[0][:shared])
        leaves = [tensor.detach().requires_grad_() for tensor in past]
        loss = entropy = kl = clipped = 0.0
        for place in mine:
            logprobs, surprise = policy_logprobs(model, groups[place], args.temperature, leaves, recompute)
            old = olds.setdefault(place, logprobs.detach())
            weight = torch.tensor([value for value, ids in zip(advantages[place], groups[place][1]) for _ in ids], device=logprobs.device)
            part = policy_loss(logprobs, old, references.get(place), weight, args.clip, args.kl).sum() / total
            part.backward()
            loss, entropy = loss + part.item(), entropy + surprise.sum().item()
            clipped += (((logprobs.detach() - old).exp() - 1) * weight.sign() > args.clip).sum().item()
            if args.kl:
                gap = references[place] - logprobs.detach()
                kl += (gap.exp() - gap - 1).sum().item()
        if past and mine:
            torch.autograd.backward(past, [leaf.grad for leaf in leaves])
        sum_gradients(weights)
        loss, entropy, kl, clipped = map(sum, zip(*gather([(loss, entropy, kl, clipped)])))
        norm = clip_gradients(weights)
        row["nonfinite"] = not (math.isfinite(norm) and math.isfinite(loss))
        if row["nonfinite"]:
            row |= {"grad_norm": None, "loss": None}
            optimizer.zero_grad()
            break
        optimizer.step()
        optimizer.zero_grad()
        tokens = sum(len(ids) for place in useful for ids in groups[place][1])
        row |= {"loss": loss, "entropy": entropy / tokens, "kl": kl / tokens if args.kl else None, "clipped": clipped / tokens, "grad_norm": norm}
    row["adapter_change"] = float(sum((weight.detach() - was).square().sum() for weight, was in zip(weights, before)) ** 0.5)
    return row


# ------------------------------------------------------------------------------------------------
# The loop


def average(rows: Sequence[Row], key: str) -> float | None:
    values = [row[key] for row in rows if row[key] is not None]
    return sum(values) / len(values) if values else None


def validate(model: Any, tokenizer: Any, encoder: Any, prompt_of: Callable, rate: Callable, pairs: Sequence[Row], args: argparse.Namespace, portions: Portions) -> Row:
    """The same measurements on fixed held-out pairs, of greedy completions (val_…) and of sampled ones (val_sampled_…).

    `specific` is what a trace adds to its own pair's action minus what it adds to another pair's; `auc` is the share of
    such comparisons on one action that its own trace wins. For `reward` all held-out pairs are gated as one group.
    """
    row: Row = {}
    prompts = {pair["id"]: prompt_of(pair) for pair in pairs}
    others = other_pairs(pairs, pairs, "val")
    for kind in ("val", "val_sampled"):
        completions: dict[str, list[Completion]] = {}
        for batch in batches_by_length(pairs, lambda pair: len(prompts[pair["id"]]), 16):
            draw = lambda some: rollout(model, tokenizer, [prompts[pair["id"]] for pair in some],
                                        [] if kind == "val" else [seed_of(args.seed, "05 val", pair["id"]) for pair in some], 1, args)
            completions |= zip((pair["id"] for pair in batch), portions.run(draw, batch))
        rows = sum(rate(model, tokenizer, encoder, pairs, others, [completions[pair["id"]] for pair in pairs], args), [])
        gate_rows(rows, args.leak_penalty)
        own = {pair["id"]: some["score"] for pair, some in zip(pairs, rows)}
        for pair, other, some in zip(pairs, others, rows):
            if other["id"] == pair["id"]:                     # a pair alone has nothing to be held against
                some["other"] = None
            some["specific"] = None if None in (some["score"], some["other"]) else some["score"] - some["other"]
            some["auc"] = None if None in (own[other["id"]], some["other"]) else (own[other["id"]] > some["other"]) + 0.5 * (own[other["id"]] == some["other"])
        row |= {f"{kind}_{name}": average(rows, name) for name in (*MEASURED, "specific", "auc")}
        row[f"{kind}_length"] = sum(len(completions[pair["id"]][0].ids) for pair in pairs) / len(pairs)
    return row


def draw_curves(log: Sequence[Row], path: Path) -> None:
    """rl.png: reward, leak and rewording, and length over the steps, a row of plots an objective; dots are held-out pairs."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    objectives = sorted({row["objective"] for row in log})
    figure, plots = pyplot.subplots(len(objectives), 3, figsize=(12, 3.2 * len(objectives)), squeeze=False, layout="constrained")
    for objective, line in zip(objectives, plots):
        rows = [row for row in log if row["objective"] == objective]
        for plot, names in zip(line, (("reward", "score", "other"), ("leak", "leak_1", "reworded"), ("length",))):
            for colour, name in zip(("tab:blue", "tab:orange", "tab:green"), names):
                for key, style in ((name, {"linewidth": 1.2, "label": name}), (f"val_{name}", {"linestyle": ":", "marker": "o", "markersize": 4})):
                    points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
                    plot.plot(*zip(*points) if points else ((), ()), color=colour, **style)
            plot.set(xlabel="step", title=f"{objective}: {', '.join(names)}")
            plot.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def train(base: Any, tokenizer: Any, encoder: Any, pairs: Sequence[Row], held_out: Sequence[Row], args: argparse.Namespace, target: Path, record: Row, so_far: Row) -> int:
    """Train the adapter of `target` for args.steps steps; returns how many tokens were sampled.

    `record` is that of the finished adapter, `so_far` that of its checkpoints, which may be continued to more steps.
    """
    recon = args.objective == "recon"
    rate = rate_recon if recon else rate_e2e
    prompt_of = (lambda pair: synthesis_prompt(tokenizer, pair)) if recon else (lambda pair: user_prompt(tokenizer, pair, thinking=True))
    checkpoint, log = args.run / "rl" / args.objective, args.run / "rl.jsonl"
    resumed = check_record(checkpoint, so_far, args.overwrite)
    model = add_adapter(base, args.rank, args.seed, checkpoint if resumed else args.init_adapter)
    if args.kl and args.init_adapter:
        model.load_adapter(args.init_adapter, "reference")
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=args.lr, weight_decay=0.0)
    first = load_optimizer(checkpoint, optimizer) if resumed else 0
    if first > args.steps:
        stop(f"{checkpoint} has done {first} steps already; pass --steps {first} or more, or --overwrite")
    # The log may be ahead of the checkpoint; those steps are done again, with the same result.
    lines = [row for row in (read_rows(log, ("objective", "step")) if log.is_file() else []) if row["objective"] != args.objective or row["step"] < first]
    write_text(log, "".join(map(dump_row, lines)))
    order: list[Row] = []
    while len(order) < args.steps * args.prompts:
        order += random.Random(seed_of(args.seed, "05", len(order))).sample(list(pairs), len(pairs))

    sampled, portions, validating = 0, Portions(), Portions()
    for step in progress(range(first, args.steps), f"GRPO ({args.objective})", save=lambda: save_checkpoint(checkpoint, model, optimizer, step + 1, so_far)):
        row: Row = {"objective": args.objective, "step": step}
        if step % args.val_every == 0:
            row |= validate(model, tokenizer, encoder, prompt_of, rate, held_out, args, validating)
        clock = time.monotonic()
        batch = order[step * args.prompts:(step + 1) * args.prompts]
        prompts = [prompt_of(pair) for pair in batch]
        seeds = [[seed_of(args.seed, "05", args.objective, step, place, k) for k in range(args.group)] for place in range(len(batch))]
        completions = portions.run(lambda some: rollout(model, tokenizer, [prompts[place] for place in some], sum((seeds[place] for place in some), []), args.group, args),
                                   share(range(len(batch))))
        sampling, clock = time.monotonic() - clock, time.monotonic()
        rated = rate(model, tokenizer, encoder, share(batch), share(other_pairs(batch, pairs, args.seed, step)), completions, args)
        for rows in rated:
            gate_rows(rows, args.leak_penalty)
        completions, rated = gather_shares(completions), gather_shares(rated)
        rewarding, clock = time.monotonic() - clock, time.monotonic()
        # A completion whose reward is missing takes no part: neither in its group's mean nor in the loss.
        present = [[(completion, row["reward"]) for completion, row in zip(group, rows) if row["reward"] is not None] for group, rows in zip(completions, rated)]
        groups = [(prompt, [tokens_of(completion) for completion, _ in some]) for prompt, some in zip(prompts, present)]
        advantages = [group_advantages([reward for _, reward in some], args.std_norm) if some else [] for some in present]
        for parameters in optimizer.param_groups:
            parameters["lr"] = args.lr * min(1.0, (step + 1) / args.warmup)
        flat, lengths = sum(rated, []), [len(completion.ids) for group in completions for completion in group]
        rewards = [row["reward"] for row in flat if row["reward"] is not None]
        row |= {name: average(flat, name) for name in MEASURED}
        row |= {"reward_std": torch.tensor(rewards).std().item() if len(rewards) > 1 else None, "missing_rewards": len(flat) - len(rewards),
                "length": sum(lengths) / len(lengths),
                "unfinished": sum(not completion.finished for group in completions for completion in group) / len(flat), "empty": lengths.count(0)}
        row |= update(model, optimizer, groups, advantages, args)
        row |= {"lr": optimizer.param_groups[0]["lr"], "seconds_sampling": round(sampling, 2), "seconds_reward": round(rewarding, 2),
                "seconds_update": round(time.monotonic() - clock, 2)}
        sampled += sum(lengths)
        lines.append(row)
        write_text(log, "".join(map(dump_row, lines)))
        if [line["nonfinite"] for line in lines[-3:] if line["objective"] == args.objective] == [True] * 3:
            stop(f"the gradient was not finite in three steps in a row (see {log}); start again with a lower --lr and --overwrite")
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            save_checkpoint(checkpoint, model, optimizer, step + 1, so_far)
    row = {"objective": args.objective, "step": args.steps} | validate(model, tokenizer, encoder, prompt_of, rate, held_out, args, validating)
    write_text(log, "".join(map(dump_row, [*lines, row])))
    if process_rank() == 0:
        draw_curves([*lines, row], args.run / "rl.png")
    print_course([*(line for line in lines if line["objective"] == args.objective), row])
    save_adapter(model, target, record)
    model.unload()
    return sampled


def print_course(lines: Sequence[Row]) -> None:
    """What the training did to the held-out pairs, and which steps could not teach anything."""
    steps, last = lines[:-1], lines[-1]
    first = next((line for line in steps if "val_reward" in line), last)
    columns = (("reward", "+.3f"), ("score", "+.3f"), ("specific", "+.3f"), ("leak", ".1%"), ("reworded", ".3f"), ("stopped", ".0%"), ("malformed", ".0%"), ("length", ".0f"))
    shown = [f"{name} {first[f'val_{name}']:{form}} -> {last[f'val_{name}']:{form}}" for name, form in columns if None not in (first[f"val_{name}"], last[f"val_{name}"])]
    print(f"{last['objective']}, greedy on held-out pairs: {', '.join(shown)} tokens")
    for count, what in ((sum(line["zero_variance"] == 1 for line in steps), f"of {len(steps)} steps had nothing to compare: no group's rewards differed"),
                        (sum(line["nonfinite"] for line in steps), f"of {len(steps)} steps met a loss or gradient that was not finite, which was not applied"),
                        (sum(line["missing_rewards"] for line in steps), "rewards were missing; their completions took no part"),
                        (sum(line["empty"] for line in steps), "completions were empty")):
        if count:
            print(f"{count} {what}")


def write_traces(base: Any, tokenizer: Any, encoder: Any, pairs: Sequence[Row], args: argparse.Namespace, synthesizer: Path, path: Path, record: Row) -> list[Row]:
    """The trained synthesizer's traces for `pairs`: the first of --retries that passes the leak guard, else the one that gives least away."""
    rows = finished_rows(path, record, args.overwrite, ("id", "trace", "score", "leak", "stopped"), [pair["id"] for pair in pairs])
    begin_output(path, record, args.overwrite)
    model = add_adapter(base, args.rank, args.seed, synthesizer)
    portions, batches = Portions(), batches_by_length(pairs, lambda pair: len(synthesis_prompt(tokenizer, pair)), args.trace_batch)
    for batch in progress(share(batches), "traces by the trained synthesizer"):
        if all(pair["id"] in rows for pair in batch):
            continue
        best: dict[str, Row] = {}
        left, given = batch, {}
        for k in range(args.retries):
            drawn = portions.run(lambda some: sample_candidates.sample_traces(model, tokenizer, some, 1, args.max_new_tokens, args.temperature, MIN_P, (args.seed, "05", k)), left)
            for pair, (candidate,) in zip(left, drawn):
                (found,) = guard_traces(encoder, [candidate["trace"]], pair["action"], show_context(pair))
                if pair["id"] not in best or given_away(found) < given[pair["id"]]:
                    given[pair["id"]] = given_away(found)
                    best[pair["id"]] = {"id": pair["id"], "trace": candidate["trace"], "k": k, "score": None, "leak": found["leak"], "stopped": found["stopped"]}
            left = [pair for pair in left if best[pair["id"]]["stopped"]]
            if not left:
                break
        with model.disable_adapter():
            for pair in batch:
                row = best[pair["id"]]
                row["score"] = finite(likelihood_scores(model, tokenizer, pair, [row["trace"]])[0][0]["unsaid"])
        append_rows(part_of(path), [best[pair["id"]] for pair in batch if pair["id"] not in rows])
    model.unload()
    end_output(path, [pair["id"] for batch in batches for pair in batch])
    rows = finished_rows(path, record, False, ("id", "score"), [pair["id"] for pair in pairs])
    return [rows[pair["id"]] for pair in pairs]


def more_steps(old: Row, new: Row) -> bool:
    """Does `new` ask for what `old` made and further steps? Then training goes on from the last checkpoint."""
    asked = old.get("arguments", {}).get("steps", 0), new["arguments"]["steps"]
    return asked[0] < asked[1] and not first_difference(old | {"arguments": old.get("arguments", {}) | {"steps": asked[1]}}, new)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = stage_arguments(__doc__)
    group = parser.add_argument_group("what is trained")
    group.add_argument("--objective", choices=("recon", "e2e"), default="recon", help="see above (default: %(default)s)")
    group.add_argument("--init-adapter", type=Path, metavar="DIR", help="adapter to continue from (default: none for recon, RUN/models/backward for e2e)")
    group = parser.add_argument_group("reward")
    group.add_argument("--reward", default="specific", choices=("specific", "unsaid", "likelihood"), help="what recon rewards, see above (default: %(default)s)")
    group.add_argument("--leak-penalty", type=positive_float, default=0.1, help="how far a trace that gives all away falls below the average honest one of its group, nats a token; "
                       "with --reward likelihood what it loses (default: %(default)s)")
    group.add_argument("--reword-penalty", type=fraction, default=0.3, help="what a whole rewording costs with --reward specific, nats a token (default: %(default)s)")
    group.add_argument("--encoder", default="embedded", metavar="NAME", help="sentence encoder that rewards e2e and guards recon (default: %(default)s)")
    group = parser.add_argument_group("GRPO")
    group.add_argument("--steps", type=positive_int, default=2, help="optimizer steps; a real run takes 100 and more (default: %(default)s)")
    group.add_argument("--prompts", type=positive_int, default=2, help="prompts a step; a real run takes 8 and more (default: %(default)s)")
    group.add_argument("--group", type=positive_int, default=4, help="completions a prompt (default: %(default)s)")
    group.add_argument("--max-new-tokens", type=positive_int, help="tokens in a completion, at most (default: 40 for recon, 72 for e2e)")
    group.add_argument("--temperature", type=positive_float, default=0.7, help="of sampling and of the policy that is updated (default: %(default)s)")
    group.add_argument("--lr", type=positive_float, default=2e-4, help="learning rate of AdamW (default: %(default)s)")
    group.add_argument("--warmup", type=positive_int, default=2, help="steps over which the learning rate rises (default: %(default)s)")
    group.add_argument("--std-norm", action="store_true", help="divide advantages by their group's standard deviation")
    group.add_argument("--updates", type=positive_int, default=1, help="optimizer steps a rollout; from the second on the policy is no longer the one that sampled (default: %(default)s)")
    group.add_argument("--clip", type=positive_float, default=0.2, help="the ratio to the sampling policy counts from 1 - CLIP to 1 + CLIP (default: %(default)s)")
    group.add_argument("--kl", type=fraction, default=0.0, help="weight of the divergence from the policy before training (default: %(default)s)")
    group.add_argument("--val-every", type=positive_int, default=10, help="steps between looks at held-out pairs (default: %(default)s)")
    group.add_argument("--save-every", type=positive_int, default=2, help="steps between checkpoints (default: %(default)s)")
    group = parser.add_argument_group("traces by the trained synthesizer")
    group.add_argument("--retries", type=positive_int, default=4, help="samples a pair, at most, until one passes the leak guard (default: %(default)s)")
    group.add_argument("--trace-batch", type=positive_int, default=32, help="pairs sampled at once (default: %(default)s)")
    select_sft.add_fit_arguments(parser)
    args = parser.parse_args(argv)
    if args.group < 2:
        stop("--group must be 2 or more: an advantage compares the completions of one prompt")
    if args.prompts < process_count():
        stop(f"--prompts {args.prompts} is too few for {process_count()} processes, each of which takes its share; pass {process_count()} or more")
    if args.objective == "e2e" and args.init_adapter is None:
        args.init_adapter = args.run / "models" / "backward"
    args.max_new_tokens = args.max_new_tokens or (40 if args.objective == "recon" else 72)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    started = begin_run(args.run, args.max_memory)
    source = args.run / "pairs.jsonl"
    pairs = read_pairs(source)
    held_out = [pair for pair in pairs if pair["split"] == "val"]
    pairs = [pair for pair in pairs if pair["split"] == "train"][:args.limit]
    if not pairs or not held_out:
        stop(f"{source} needs pairs of the splits train and val; run 01_prepare.py with more pairs")
    if len(pairs) < 2 and args.objective == "recon" and args.reward == "specific":
        stop("one pair of the train split is not enough for --reward specific, which holds a trace against another pair's action")
    inputs = [source]
    if args.init_adapter:
        check_adapter(args.init_adapter, args.model)
        if args.init_adapter.is_relative_to(args.run):
            check_made_from(args.init_adapter, source, "04_select_sft.py")
        inputs.append(args.init_adapter / "adapter_model.safetensors")

    # Three outputs, three records: other settings of the fit must not cost a night of GRPO.
    fit, tracing, saving = ("epochs", "batch", "fit_lr"), ("retries", "trace_batch"), ("save_every", "init_adapter", "recompute")
    prompts = ["synthesis", "transcript", "transcript_no_trace"] if args.objective == "recon" else ["user_model"]
    record = made_with(args, inputs, prompts, ignore=(*fit, *tracing, *saving))
    so_far = made_with(args, inputs, prompts, ignore=(*fit, *tracing, *saving, "steps"))
    target = args.run / "models" / ("synthesizer" if args.objective == "recon" else "e2e-grpo")
    arm, traces = args.run / "models" / "recon-grpo", args.run / "traces" / "recon-grpo.jsonl"
    go_on = not args.overwrite and target.exists() and more_steps(record_of(target), record)
    wait_for_all()                                            # each has seen what there was before the first one discards it
    if go_on:
        for old in (arm, traces, target) if args.objective == "recon" else (target,):      # what depends on another goes first
            discard(old)
    wait_for_all()
    trained = check_record(target, record, args.overwrite)
    if trained and args.objective == "e2e":
        print(f"05_rl_train: {target} is already made")
        return
    model = tokenizer = encoder = None
    tokens = 0
    if not trained:
        model, tokenizer = load_model(args.model, args.four_bit)
        encoder = load_encoder(args.encoder)
        remade = [target, args.run / "rl" / args.objective, *([traces, arm] if args.objective == "recon" else [])]
        for old in remade if args.overwrite else []:
            discard(old)
        tokens += train(model, tokenizer, encoder, pairs, held_out, args, target, record, so_far)
        wait_for_all()
    if args.objective == "recon":
        by_id = {pair["id"]: pair for pair in pairs}
        adapter = target / "adapter_model.safetensors"
        of_traces = made_with(args, [source, adapter], prompts, ignore=(*fit, *saving))
        chosen = list(finished_rows(traces, of_traces, args.overwrite, ("id", "trace", "score", "leak", "stopped"), by_id).values())
        of_arm = made_with(args, [source, adapter], [*prompts, "user_model"], ignore=saving)
        if len(chosen) == len(pairs) and check_record(arm, of_arm, args.overwrite):
            print(f"05_rl_train: {target}, {traces} and {arm} are already made")
            return
        if model is None:
            model, tokenizer = load_model(args.model, args.four_bit)
            encoder = load_encoder(args.encoder)
        chosen = write_traces(model, tokenizer, encoder, pairs, args, target, traces, of_traces)
        examples = [select_sft.user_example(tokenizer, by_id[row["id"]], row["trace"]) for row in chosen]
        losses, read = select_sft.fit_user_model(model, examples, args, arm, of_arm)
        print(select_sft.describe("recon-grpo", chosen, "unsaid", losses))
        tokens += read
    closing_line(args.run, "05_rl_train", len(pairs), len(pairs), 0, started, tokens)


if __name__ == "__main__":
    run_stage(main)
