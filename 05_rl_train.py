"""Stage 5: GRPO with the reconstruction score as reward (Recon-GRPO), or with the action alone (E2E-GRPO).

    --objective recon   policy: the synthesizer M_r (sees context and action, writes a trace)
                        reward: how well the trace lets the frozen base reconstruct the action
                        then:   its traces for the train split, and the user model of arm recon-grpo
    --objective e2e     policy: the user model (sees the context, writes trace and action), from --init-adapter on
                        reward: cosine of its action and the true one

    in     RUN/pairs.jsonl; e2e: RUN/models/backward/ as well
    out    RUN/rl.jsonl                          a line a step (both objectives)
           RUN/models/synthesizer/, RUN/traces/recon-grpo.jsonl, RUN/models/recon-grpo/
           RUN/models/e2e-grpo/
           RUN/rl/OBJECTIVE/                     the last checkpoint

How to run it:

    python 05_rl_train.py
    python 05_rl_train.py --objective e2e
    python 05_rl_train.py --steps 100 --save-every 10      stopped and started again, it goes on from the last save

How it differs from textbook GRPO (arXiv 2402.03300): strictly on policy, one update a rollout, so there is no ratio
to clip; no KL term and so no reference model; the advantage is reward minus group mean without the division by the
standard deviation (--std-norm brings it back; arXiv 2503.20783); the loss is normalised over all completion tokens of
the step. Policy and reward share one base: with the adapter off it is the reconstructor.

Departures from the paper: its settings are not public. A trace may quote the action and would then be rewarded most,
so the reward credits only what the trace did not say (`unsaid`), and one that the leak guard stops, for a quote or a
rewording, always ranks below the honest ones of its group.
"""

import argparse
import importlib
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from common import (END_THINK, MIN_P, Group, Row, add_adapter, append_rows, batches_by_length, begin_output, begin_run, check_adapter,
                    check_made_from, check_record, clean_action, clip_gradients, closing_line, decode, discard, dump_row, embed,
                    finished_rows, generate, given_away, guard_traces, likelihood_scores, load_encoder, load_model, made_with, packed_logprobs, positive_float, positive_int, progress,
                    read_pairs, read_rows, replace_folder, save_adapter, seed_of, show_context, stage_arguments, stop,
                    synthesis_prompt, user_prompt, write_text)

sample_candidates = importlib.import_module("02_sample_candidates")
select_sft = importlib.import_module("04_select_sft")

Scored = tuple[list[list[float]], list[list[float]], list[list[float]]]  # rewards, scores, how much is given away: [pair][completion]


# ------------------------------------------------------------------------------------------------
# Rewards: one list a group (the completions of one prompt)


def gate_leaks(scores: Sequence[float], leaks: Sequence[float], penalty: float) -> list[float]:
    """Rewards of one group: an honest trace keeps its score, a leaking one falls below every honest one of the group.

    gate_leaks([0.2, 3.0, -0.1], [0, 0.5, 0], penalty=2) is [0.2, -1.1, -0.1]: the floor -0.1 minus 2 * 0.5.
    """
    floor = min([0.0, *(score for score, leak in zip(scores, leaks) if leak == 0)])
    return [score if leak == 0 else floor - penalty * leak for score, leak in zip(scores, leaks)]


def reward_recon(model: Any, tokenizer: Any, encoder: Any, pairs: Sequence[Row], texts: Sequence[Sequence[str]], args: argparse.Namespace) -> Scored:
    """Rewards, scores and leaks of traces [pair][trace]; the frozen base scores them, the adapter switched off."""
    scores, leaks = [], []
    with model.disable_adapter():
        for pair, traces in zip(pairs, texts):
            scores.append([row[args.score] for row in likelihood_scores(model, tokenizer, pair, traces)[0]])
            leaks.append([given_away(found) for found in guard_traces(encoder, traces, pair["action"], show_context(pair))])
    return [gate_leaks(*group, args.leak_penalty) for group in zip(scores, leaks)], scores, leaks


def reward_e2e(model: Any, tokenizer: Any, encoder: Any, pairs: Sequence[Row], texts: Sequence[Sequence[str]], args: argparse.Namespace) -> Scored:
    """Rewards, the same as scores, zeros: cosine of the action behind the think block and the true one; -1 without one."""
    scores = []
    for pair, group in zip(pairs, texts):
        actions = [clean_action(text.partition(END_THINK.strip())[2]) for text in group]
        true, *vectors = embed(encoder, [pair["action"], *actions])
        scores.append([(true @ vector).item() if action else -1.0 for action, vector in zip(actions, vectors)])
    return scores, scores, [[0.0] * len(group) for group in texts]


# ------------------------------------------------------------------------------------------------
# GRPO: rollout, advantages, update


def rollout(model: Any, tokenizer: Any, prompts: Sequence[list[int]], pairs: Sequence[Row], step: int,
            args: argparse.Namespace) -> tuple[list[Group], list[list[str]]]:
    """Sample a group of completions for each prompt: (the groups of token ids, their texts).

    The end token belongs to a completion that ended by itself: the policy chose it and must be credited for it.
    No completion is empty: sampling yields at least one token or the end token.
    """
    seeds = [seed_of(args.seed, "05", args.objective, step, pair["id"], k) for pair in pairs for k in range(args.group)]
    done = generate(model, tokenizer, [(prompt[:-1], [prompt[-1:]] * args.group) for prompt in prompts], args.max_new_tokens, seeds, args.temperature)
    ids = [completion.ids + ([] if completion.end is None else [completion.end]) for completion in done]
    texts = [decode(tokenizer, completion) for completion in done]
    cut = range(0, len(done), args.group)
    return [(prompt, ids[at:at + args.group]) for prompt, at in zip(prompts, cut)], [texts[at:at + args.group] for at in cut]


def group_advantages(rewards: Sequence[float], std_norm: bool) -> list[float]:
    """Reward minus the mean of its group, divided by the group's standard deviation if `std_norm`; 0 if all are equal."""
    mean = sum(rewards) / len(rewards)
    centred = [reward - mean for reward in rewards]
    std = (sum(value * value for value in centred) / max(len(centred) - 1, 1)) ** 0.5
    if std < 1e-6:
        return [0.0] * len(rewards)
    return [value / std for value in centred] if std_norm else centred


def policy_loss(model: Any, group: Group, advantages: Sequence[float], total_tokens: int, temperature: float) -> tuple[torch.Tensor, float]:
    """GRPO's loss of one group, and the sum of -log p over its tokens (for an estimate of the entropy).

    The ratio p / stop_gradient(p) is 1, so the loss itself is near 0; its gradient is that of -advantage * log p,
    summed over the completions' tokens and divided by `total_tokens` of the whole step.
    """
    logprobs = packed_logprobs(model, [group], temperature=temperature)[0]
    loss = -sum(advantage * (row - row.detach()).exp().sum() for advantage, row in zip(advantages, logprobs)) / total_tokens
    return loss, -sum(row.detach().sum().item() for row in logprobs)


def update(model: Any, optimizer: torch.optim.Optimizer, groups: Sequence[Group], advantages: Sequence[Sequence[float]], args: argparse.Namespace) -> Row:
    """One optimizer step over the groups whose rewards differ; returns the measurements of the step."""
    weights = [weight for parameters in optimizer.param_groups for weight in parameters["params"]]
    before = [weight.detach().clone() for weight in weights]
    total = sum(len(ids) for _, completions in groups for ids in completions)
    useful = [place for place, group in enumerate(advantages) if any(group)]
    surprise = counted = 0.0
    for place in useful:
        loss, nats = policy_loss(model, groups[place], advantages[place], total, args.temperature)
        loss.backward()
        surprise, counted = surprise + nats, counted + sum(map(len, groups[place][1]))
    norm = 0.0
    if useful:
        norm = clip_gradients(weights)
        optimizer.step()
        optimizer.zero_grad()
    change = sum((weight.detach() - old).square().sum() for weight, old in zip(weights, before)) ** 0.5
    return {"zero_variance": 1 - len(useful) / len(groups), "entropy": surprise / counted if counted else None, "grad_norm": norm, "adapter_change": float(change)}


# ------------------------------------------------------------------------------------------------
# The loop


def mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)


def flatten(lists: Sequence[Sequence[float]]) -> list[float]:
    return [value for some in lists for value in some]


def save_checkpoint(folder: Path, model: Any, optimizer: torch.optim.Optimizer, step: int, record: Row) -> None:
    """Adapter, optimizer state and step number. The noise needs no saving: it is drawn from (seed, step, pair)."""
    state = {f"{place}.{key}": value for place, entry in optimizer.state_dict()["state"].items() for key, value in entry.items()}
    temporary = folder.with_name(folder.name + ".new")
    save_adapter(model, temporary, record)
    save_file(state, temporary / "optimizer.safetensors")
    write_text(temporary / "step.json", json.dumps(step))
    replace_folder(temporary, folder)


def load_optimizer(folder: Path, optimizer: torch.optim.Optimizer) -> int:
    """Put a checkpoint's optimizer state back; returns the number of steps done."""
    state: dict[int, Row] = {}
    for name, value in load_file(folder / "optimizer.safetensors").items():
        place, key = name.split(".")
        state.setdefault(int(place), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return json.loads((folder / "step.json").read_text())


def validate(model: Any, tokenizer: Any, encoder: Any, prompt_of: Any, reward_of: Any, pairs: Sequence[Row], args: argparse.Namespace) -> Row:
    """Mean reward, score, leak and length of greedy completions on fixed held-out pairs."""
    columns: dict[str, list[float]] = {"val_reward": [], "val_score": [], "val_leak": [], "val_length": []}
    for batch in batches_by_length(pairs, lambda pair: len(prompt_of(pair)), args.prompts * args.group):
        prompts = [prompt_of(pair) for pair in batch]
        done = generate(model, tokenizer, [(prompt[:-1], [prompt[-1:]]) for prompt in prompts], args.max_new_tokens)
        measured = reward_of(model, tokenizer, encoder, batch, [[decode(tokenizer, completion)] for completion in done], args)
        for column, values in zip(columns.values(), (*map(flatten, measured), [len(completion.ids) for completion in done])):
            column += values
    return {name: mean(values) for name, values in columns.items()}


def train(base: Any, tokenizer: Any, pairs: Sequence[Row], held_out: Sequence[Row], args: argparse.Namespace, target: Path, record: Row, so_far: Row) -> int:
    """Train the adapter of `target` for args.steps steps; returns how many tokens were sampled.

    `record` is that of the finished adapter, `so_far` that of its checkpoints, which may be continued to more steps.
    """
    encoder = load_encoder(args.encoder)
    reward_of = reward_recon if args.objective == "recon" else reward_e2e
    prompt_of = (lambda pair: synthesis_prompt(tokenizer, pair)) if args.objective == "recon" else (lambda pair: user_prompt(tokenizer, pair, thinking=True))
    checkpoint, log = args.run / "rl" / args.objective, args.run / "rl.jsonl"
    resumed = check_record(checkpoint, so_far, args.overwrite)
    model = add_adapter(base, args.rank, args.seed, checkpoint if resumed else args.init_adapter)
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

    sampled = 0
    for step in progress(range(first, args.steps), f"GRPO ({args.objective})"):
        row: Row = {"objective": args.objective, "step": step}
        if step % args.val_every == 0:
            row |= validate(model, tokenizer, encoder, prompt_of, reward_of, held_out, args)
        clock = time.monotonic()
        batch = order[step * args.prompts:(step + 1) * args.prompts]
        groups, texts = rollout(model, tokenizer, [prompt_of(pair) for pair in batch], batch, step, args)
        sampling, clock = time.monotonic() - clock, time.monotonic()
        rewards, scores, leaks = reward_of(model, tokenizer, encoder, batch, texts, args)
        rewarding, clock = time.monotonic() - clock, time.monotonic()
        for parameters in optimizer.param_groups:
            parameters["lr"] = args.lr * min(1.0, (step + 1) / max(args.warmup, 1))
        row |= update(model, optimizer, groups, [group_advantages(group, args.std_norm) for group in rewards], args)
        flat = flatten(rewards)
        row |= {"reward": mean(flat), "reward_std": torch.tensor(flat).std().item(), "score": mean(flatten(scores)), "leak": mean(flatten(leaks)),
                "leaking": mean([leak > 0 for leak in flatten(leaks)]), "length": mean([len(ids) for _, some in groups for ids in some]),
                "lr": optimizer.param_groups[0]["lr"], "seconds_sampling": round(sampling, 2), "seconds_reward": round(rewarding, 2),
                "seconds_update": round(time.monotonic() - clock, 2)}
        sampled += sum(len(ids) for _, some in groups for ids in some)
        lines.append(row)
        write_text(log, "".join(map(dump_row, lines)))
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            save_checkpoint(checkpoint, model, optimizer, step + 1, so_far)
    row = {"objective": args.objective, "step": args.steps} | validate(model, tokenizer, encoder, prompt_of, reward_of, held_out, args)
    write_text(log, "".join(map(dump_row, [*lines, row])))
    start = next((line for line in lines if line["objective"] == args.objective and "val_reward" in line), row)
    print(f"{args.objective}: held-out reward {start['val_reward']:+.3f} -> {row['val_reward']:+.3f}, score {start['val_score']:+.3f} -> "
          f"{row['val_score']:+.3f}, leak {start['val_leak']:.1%} -> {row['val_leak']:.1%}, length {start['val_length']:.0f} -> {row['val_length']:.0f} tokens")
    save_adapter(model, target, record)
    model.unload()
    return sampled


def write_traces(base: Any, tokenizer: Any, pairs: Sequence[Row], args: argparse.Namespace, synthesizer: Path, path: Path, record: Row) -> list[Row]:
    """The trained synthesizer's traces for `pairs`: the first of --retries that passes the leak guard, else the one that gives least away."""
    rows = finished_rows(path, record, args.overwrite, ("id", "trace", "score", "leak", "stopped"), [pair["id"] for pair in pairs])
    begin_output(path, record, args.overwrite)
    encoder = load_encoder(args.encoder)
    model = add_adapter(base, args.rank, args.seed, synthesizer)
    for batch in progress(batches_by_length(pairs, lambda pair: len(synthesis_prompt(tokenizer, pair)), args.trace_batch), "traces by the trained synthesizer"):
        if all(pair["id"] in rows for pair in batch):
            continue
        best: dict[str, Row] = {}
        left, given = batch, {}
        for k in range(args.retries):
            drawn = sample_candidates.sample_traces(model, tokenizer, left, 1, args.max_new_tokens, args.temperature, MIN_P, (args.seed, "05", k))
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
                row["score"] = likelihood_scores(model, tokenizer, pair, [row["trace"]])[0][0][args.score]
        append_rows(path, [best[pair["id"]] for pair in batch if pair["id"] not in rows])
        rows |= best
    model.unload()
    return [rows[pair["id"]] for pair in pairs]


def main(argv: list[str] | None = None) -> None:
    parser = stage_arguments(__doc__)
    group = parser.add_argument_group("what is trained")
    group.add_argument("--objective", choices=("recon", "e2e"), default="recon", help="see above (default: %(default)s)")
    group.add_argument("--init-adapter", type=Path, metavar="DIR", help="adapter to continue from (default: none for recon, RUN/models/backward for e2e)")
    group = parser.add_argument_group("reward")
    group.add_argument("--score", default="unsaid", choices=("likelihood", "unsaid"), help="score that recon rewards (default: %(default)s)")
    group.add_argument("--leak-penalty", type=positive_float, default=2.0, help="reward that a fully leaking trace loses (default: %(default)s)")
    group.add_argument("--encoder", default="embedded", metavar="NAME", help="sentence encoder that rewards e2e and guards recon (default: %(default)s)")
    group = parser.add_argument_group("GRPO")
    group.add_argument("--steps", type=positive_int, default=2, help="optimizer steps; a real run takes 100 and more (default: %(default)s)")
    group.add_argument("--prompts", type=positive_int, default=2, help="prompts a step; a real run takes 8 and more (default: %(default)s)")
    group.add_argument("--group", type=positive_int, default=4, help="completions a prompt (default: %(default)s)")
    group.add_argument("--max-new-tokens", type=positive_int, help="tokens in a completion, at most (default: 40 for recon, 72 for e2e)")
    group.add_argument("--temperature", type=positive_float, default=1.0, help="of sampling and of the policy that is updated (default: %(default)s)")
    group.add_argument("--lr", type=positive_float, default=2e-4, help="learning rate of AdamW (default: %(default)s)")
    group.add_argument("--warmup", type=positive_int, default=2, help="steps over which the learning rate rises (default: %(default)s)")
    group.add_argument("--std-norm", action="store_true", help="divide advantages by their group's standard deviation")
    group.add_argument("--val-every", type=positive_int, default=10, help="steps between looks at held-out pairs (default: %(default)s)")
    group.add_argument("--save-every", type=positive_int, default=2, help="steps between checkpoints (default: %(default)s)")
    group = parser.add_argument_group("traces by the trained synthesizer")
    group.add_argument("--retries", type=positive_int, default=4, help="samples a pair until one passes the leak guard (default: %(default)s)")
    group.add_argument("--trace-batch", type=positive_int, default=32, help="pairs sampled at once (default: %(default)s)")
    select_sft.add_fit_arguments(parser)
    args = parser.parse_args(argv)
    if args.group < 2:
        stop("--group must be 2 or more: an advantage compares the completions of one prompt")
    if args.objective == "e2e" and args.init_adapter is None:
        args.init_adapter = args.run / "models" / "backward"
    args.max_new_tokens = args.max_new_tokens or (40 if args.objective == "recon" else 72)

    started = begin_run(args.run)
    source = args.run / "pairs.jsonl"
    pairs = read_pairs(source)
    held_out = [pair for pair in pairs if pair["split"] == "val"]
    pairs = [pair for pair in pairs if pair["split"] == "train"][:args.limit]
    if not pairs or not held_out:
        stop(f"{source} needs pairs of the splits train and val; run 01_prepare.py with more pairs")
    inputs = [source]
    if args.init_adapter:
        check_adapter(args.init_adapter, args.model)
        if args.init_adapter.is_relative_to(args.run):
            check_made_from(args.init_adapter, source, "04_select_sft.py")
        inputs.append(args.init_adapter / "adapter_model.safetensors")

    # Three outputs, three records: other settings of the fit must not cost a night of GRPO.
    fit, tracing, saving = ("epochs", "batch", "fit_lr"), ("retries", "trace_batch"), ("save_every", "init_adapter")
    prompts = ["synthesis", "transcript", "transcript_no_trace"] if args.objective == "recon" else ["user_model"]
    record = made_with(args, inputs, prompts, ignore=(*fit, *tracing, *saving))
    so_far = made_with(args, inputs, prompts, ignore=(*fit, *tracing, *saving, "steps"))
    target = args.run / "models" / ("synthesizer" if args.objective == "recon" else "e2e-grpo")
    arm, traces = args.run / "models" / "recon-grpo", args.run / "traces" / "recon-grpo.jsonl"
    trained = check_record(target, record, args.overwrite)
    if trained and args.objective == "e2e":
        print(f"05_rl_train: {target} is already made")
        return
    model = tokenizer = None
    tokens = 0
    if not trained:
        model, tokenizer = load_model(args.model, args.four_bit)
        remade = [target, args.run / "rl" / args.objective, *([traces, arm] if args.objective == "recon" else [])]
        for old in remade if args.overwrite else []:
            discard(old)
        tokens += train(model, tokenizer, pairs, held_out, args, target, record, so_far)
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
        chosen = write_traces(model, tokenizer, pairs, args, target, traces, of_traces)
        examples = [select_sft.user_example(tokenizer, by_id[row["id"]], row["trace"]) for row in chosen]
        losses, read = select_sft.fit_user_model(model, examples, args, arm, of_arm)
        print(select_sft.describe("recon-grpo", chosen, args.score, losses))
        tokens += read
    closing_line("05_rl_train", len(pairs), len(pairs), 0, started, tokens)


if __name__ == "__main__":
    main()
