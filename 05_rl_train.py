"""Stage 5: GRPO with the reconstruction score as reward (Recon-GRPO), or rewarding the user model itself (E2E-GRPO).

    --objective recon   policy: the synthesizer (sees context and action, writes a trace)
                        reward: `contrast`, how much the trace helps the frozen base to this action more than to others
    --objective e2e     policy: the user model (sees the context alone, writes a trace), from RUN/models/backward on
                        reward: `likelihood`, how much the trace that it wrote helps the frozen base to the true action

    in     RUN/pairs.jsonl; recon: the sampling settings of RUN/candidates.jsonl; e2e: RUN/models/backward/
    out    RUN/models/synthesizer/ or RUN/models/e2e-grpo/, RUN/rl.jsonl (a line a step), RUN/rl/ (the last checkpoint)

How to run it:

    python 05_rl_train.py                                  then 02, 03 and 04 with --tag grpo make the arm recon-grpo
    python 05_rl_train.py --objective e2e
    python 05_rl_train.py --steps 100                      started again, it goes on from the last checkpoint
    accelerate launch 05_rl_train.py --num-prompts 8       each GPU takes its share of a step's prompts

How it differs from textbook GRPO (arXiv 2402.03300):
- A policy that sees the action learns to hand it over. Tokens that the trace gives away earn nothing, help for any
  action earns nothing, and a trace that leaks or lacks a trace's form never has an advantage above zero.
- The policy that is trained is the one that is used: rollouts are sampled as stage 2 samples, with min-p, and the
  update leaves out the same tokens. Only tokens that remain in the trace are credited.
- The advantage is reward minus the mean of the group's honest traces, not divided by the standard deviation (arXiv
  2503.20783). The loss is normalised over all completion tokens of the step. One update a rollout, so there is no ratio
  to clip (--num-iterations brings it back), and no KL term: TRL's default weight is 0 as well.
Policy and reward share one base: with the adapter off it is the reconstructor. Groups go backward one at a time (on a
GPU short ones together).

Departures from the paper: its settings and the guards of its reward are not public; all of the above are ours.
"""

import argparse
import dataclasses
import math
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import common
from common import Completion, LocalModel, Pair, Prompt, Row

FAULT_MARGIN = 0.05                                        # how far below the honest mean a faulty trace ends, at least
MAX_ADVANTAGE = 0.6
REWARDS = {"recon": ("contrast", "likelihood"), "e2e": ("likelihood", "cosine")}


# ----------------------------------------------------------------------------------------------------------------------
# Rewards: from numbers to numbers


@dataclass
class Measured:
    """What is measured of one completion."""

    likelihood: float = 0.0                                # by the frozen base, nats a token: common.likelihood_scores
    masked_likelihood: float = 0.0
    contrast: float = 0.0
    cosine: float = 0.0                                    # e2e: of its action and the true one
    leak: float = 0.0                                      # recon: common.detect_leaks
    paraphrase: float = 0.0
    is_leak: bool = False
    malformed: bool = False                                # recon: not common.is_well_formed; e2e: no closing tag
    unfinished: bool = False                               # met the token limit
    tokens: int = 0


def reward_of(seen: Measured, args: argparse.Namespace) -> float:
    """The reward of a completion, by --reward; `seen` is from Policy.measure. A faulty one gains none by it: see
    is_faulty and group_advantages.

      contrast     how much likelier its trace makes the true action, as the frozen base reads it, than it makes
                   actions of other conversations; minus a part of paraphrase, which explains some of contrast, minus
                   a cost if it met the token limit
      likelihood   how much likelier its trace makes the true action; recon: naive, with a penalty on quoted 4-grams,
                   kept for comparison; e2e: as it is, as `leak` is 0 there
      cosine       e2e: of the action behind the trace and the true action
    """
    if args.reward == "contrast":
        return seen.contrast - args.paraphrase_weight * seen.paraphrase - args.limit_cost * seen.unfinished
    return seen.cosine if args.reward == "cosine" else seen.likelihood - args.paraphrase_weight * seen.leak


def is_faulty(seen: Measured, args: argparse.Namespace) -> bool:
    """A leak, or no trace at all: its advantage is never above zero. The naive reward sees no fault."""
    return (seen.is_leak or seen.malformed) and not (args.objective == "recon" and args.reward == "likelihood")


def group_advantages(rewards: Sequence[float], faulty: Sequence[bool]) -> list[float]:
    """Reward minus the mean reward of the group's honest completions, within ± MAX_ADVANTAGE; 0 if none is honest.

    A faulty one ends at least FAULT_MARGIN below the honest mean. Not below every honest one: traces near the action
    are often leaks, and a hard cutoff taught the policy to avoid the action's content. For example
    group_advantages([0.2, 3.0, -0.1], [False, True, False]) is [0.15, -0.05, -0.15].
    """
    honest = [reward for reward, fault in zip(rewards, faulty) if not fault]
    if not honest:
        return [0.0] * len(rewards)
    mean = sum(honest) / len(honest)
    values = [min(reward - mean, 0.0) - FAULT_MARGIN if fault else reward - mean
              for reward, fault in zip(rewards, faulty)]
    return [max(-MAX_ADVANTAGE, min(MAX_ADVANTAGE, value)) for value in values]


# ----------------------------------------------------------------------------------------------------------------------
# The loss


@dataclass
class Group:
    """A prompt, the credited tokens of its completions, and the advantage of each."""

    prompt: list[int]
    completions: list[list[int]]
    advantages: list[float]

    @property
    def tree(self) -> common.Tree:
        return self.prompt, [[]], [self.completions]


def policy_logprobs(model: Any, groups: Sequence[Group], args: argparse.Namespace,
                    past: Sequence[torch.Tensor] = ()) -> tuple[torch.Tensor, torch.Tensor]:
    """(log p, entropy) of the policy that samples, at each token of the groups' completions, one after the other: both
    [tokens], float32. log p is differentiable.

    Tokens that min-p leaves out in sampling are left out here; the token that was sampled always stays.
    """
    logits, rows = common.shared_prefix_logits(model, [group.tree for group in groups], past=past,
                                               checkpointing=args.checkpointing)
    logits = logits[torch.cat([row for (stem,) in rows for row in stem])] / args.temperature    # [tokens, vocabulary]
    ids = [token for group in groups for completion in group.completions for token in completion]
    ids = torch.tensor(ids, device=logits.device)[:, None]
    with torch.no_grad():
        kept = logits >= logits.amax(-1, keepdim=True) + math.log(args.min_p or 1e-30)
        kept.scatter_(1, ids, True)
    logits = logits.masked_fill(~kept, -math.inf)
    with torch.no_grad():
        entropy = torch.special.entr(logits.softmax(-1)).sum(-1)
    return logits.gather(1, ids)[:, 0] - logits.logsumexp(-1), entropy


def policy_loss(logprobs: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor, clip: float) -> torch.Tensor:
    """GRPO's loss of each token; all [tokens]. The ratio p / p_old is clipped to 1 ± clip where that lowers the gain.

    On policy the ratio is 1 and the loss is minus the advantage: near 0 in the sum, but its gradient is that of
    -advantage * log p.
    """
    ratio = (logprobs - old).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def update(model: Any, optimizer: torch.optim.Optimizer, groups: Sequence[Group],
           args: argparse.Namespace) -> dict[str, float]:
    """--num-iterations optimizer steps over the groups that compare anything; returns the last one's measurements.

    Groups go backward one at a time, longest first, so memory is that of one group; on a GPU short ones share a padded
    forward. What their prompts have in common is read once: its keys and values collect the gradients of all groups,
    then pass them on in one backward. Several processes share the groups and add up their gradients, so all of them
    take the same step.
    """
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    useful = [group for group in groups if any(group.advantages)]
    total = sum(len(ids) for group in groups for ids in group.completions)
    seen = {"idle_groups": 1 - len(useful) / len(groups), "loss": 0.0, "entropy": 0.0, "clipped": 0.0, "grad_norm": 0.0}
    if not useful:
        return seen
    prompts, mine = [group.prompt for group in useful], common.batch_by_length(
        common.shard(useful), lambda group: common.tree_tokens(group.tree), common.PADDED_TOKENS)
    shared = 0 if args.checkpointing else min(len(os.path.commonprefix(prompts)), min(map(len, prompts)) - 1)
    olds: list[torch.Tensor] = []
    for _ in range(args.num_iterations):
        past = common.read_prefix(model, prompts[0][:shared])
        leaves = [tensor.detach().requires_grad_() for tensor in past]
        sums = torch.zeros(3)
        for place, batch in enumerate(mine):
            logprobs, entropy = policy_logprobs(model, batch, args, leaves)
            if len(olds) == place:                         # the first iteration: the policy is the one that sampled
                olds.append(logprobs.detach())
            advantages = torch.tensor([
                value for group in batch for value, ids in zip(group.advantages, group.completions) for _ in ids],
                device=logprobs.device)                                                 # [tokens]
            loss = policy_loss(logprobs, olds[place], advantages, args.clip).sum() / total
            loss.backward()
            clipped = ((logprobs.detach() - olds[place]).exp() - 1) * advantages.sign() > args.clip
            sums += torch.tensor([loss.item(), entropy.sum().item() / total, clipped.sum().item() / total])
        if past and mine:
            torch.autograd.backward(past, [leaf.grad for leaf in leaves])
        common.sum_gradients(weights)
        norm = torch.nn.utils.clip_grad_norm_(weights, 1.0).item()
        sums = torch.tensor(common.gather([sums.tolist()])).sum(0).tolist()
        if not math.isfinite(norm + sums[0]):
            common.fail("the gradient is not finite; start again with a lower --lr and --overwrite")
        optimizer.step()
        optimizer.zero_grad()
        seen |= dict(zip(("loss", "entropy", "clipped"), sums)) | {"grad_norm": norm}
    return seen


# ----------------------------------------------------------------------------------------------------------------------
# Rollouts and what is measured of them


class Step(Row):
    """rl.jsonl: means over the completions of a step."""
    objective: str
    step: int
    reward: float
    measured: dict[str, float]                             # the means of Measured
    update: dict[str, float]                               # see update
    seconds: dict[str, float]
    validation: dict[str, float | None] | None             # before this step, on held-out pairs; see validate


@dataclass
class Policy:
    """The model with the adapter that is trained, and what its rewards need."""

    local: LocalModel
    encoder: Any
    args: argparse.Namespace

    def prompt(self, pair: Pair) -> Prompt:
        recon = self.args.objective == "recon"
        return common.synthesis_prompt(pair) if recon else common.user_prompt(pair, thinking=True)

    def rollout(self, pairs: Sequence[Pair], count: int, *seed: object) -> list[list[Completion]]:
        """`count` completions a pair, sampled as the policy is used: [pair][k]."""
        args, end = self.args, common.END_THINK.strip()
        return self.local.sample(
            [[self.prompt(pair)] * count for pair in pairs],
            seeds=[[common.stable_seed(args.seed, *seed, pair.id, k) for k in range(count)] for pair in pairs],
            max_new_tokens=args.max_new_tokens, temperature=args.temperature, min_p=args.min_p,
            stop_text=end if args.objective == "e2e" and args.reward == "likelihood" else None)

    def inspect(self, pair: Pair, completions: Sequence[Completion]) -> tuple[list[str], list[Measured]]:
        """(the traces in a pair's completions, all that is measured of them but the scores)."""
        cosines = [0.0] * len(completions)
        if self.args.objective == "recon":
            traces = [common.trace_of(found) for found in completions]
            leaks = common.detect_leaks(self.encoder, traces, pair.action, common.format_context(pair))
            faults = [not common.is_well_formed(trace) for trace in traces]
        else:
            thoughts = [found.text.partition(common.END_THINK.strip()) for found in completions]
            traces, faults = [thought.strip() for thought, *_ in thoughts], [not tag for _, tag, _ in thoughts]
            leaks = [common.Leak(leak=0.0, paraphrase=0.0, is_leak=False)] * len(traces)
            if self.args.reward == "cosine":
                actions = [common.clean_action(rest) for *_, rest in thoughts]
                cosines = common.cosines(self.encoder, [pair.action] * len(actions), actions)
        return traces, [Measured(**leak.model_dump(), cosine=cosine, malformed=fault, unfinished=not found.finished,
                                 tokens=found.tokens)
                        for leak, cosine, fault, found in zip(leaks, cosines, faults, completions)]

    def measure(self, items: Sequence[tuple[Pair, Sequence[Completion], Sequence[str]]]) -> list[list[Measured]]:
        """What the rewards are made of, for each (pair, completions, actions of other conversations). Scores are by the
        frozen base: the adapter is off."""
        seen = [self.inspect(pair, completions) for pair, completions, _ in items]
        with self.local.model.disable_adapter():
            scored = common.likelihood_scores(self.local, [
                (pair, traces, others) for (pair, _, others), (traces, _) in zip(items, seen)])
        return [[dataclasses.replace(one, **scores) for one, scores in zip(found, rows)]
                for (_, found), (rows, _) in zip(seen, scored)]


def credited_tokens(tokenizer: Any, completion: Completion, cut: bool) -> list[int]:
    """The tokens that the loss credits: with the end token if one ended it, which the policy chose too; of a trace that
    is `cut` to whole sentences, those that remain."""
    ids = completion.ids + ([] if completion.end is None else [completion.end])
    kept = len(common.trace_of(completion)) if cut and not completion.finished else math.inf
    while len(ids) > 1 and len(tokenizer.decode(ids[:-1], skip_special_tokens=True).strip()) >= kept:
        ids = ids[:-1]
    return ids or [tokenizer.eos_token_id]


def mean_of(rows: Sequence[Measured]) -> dict[str, float | None]:
    """The mean of everything that is measured; None, never 0, if there is nothing to take it of."""
    return {field.name: sum(float(getattr(row, field.name)) for row in rows) / len(rows) if rows else None
            for field in dataclasses.fields(Measured)}


def validate(policy: Policy, pairs: Sequence[Pair], pool: Sequence[Pair]) -> dict[str, float | None]:
    """Means over 4 completions of each held-out pair, sampled as the policy is used, always with the same noise.

    Scores are those of the completions without a fault, the only ones that the loop uses; a leak has a high score
    because it hands the action over. is_leak, malformed, unfinished and tokens are over all.
    """
    args = policy.args
    pairs = sorted(pairs, key=lambda pair: policy.local.length(policy.prompt(pair)), reverse=True)
    batches = [pairs[start:start + args.num_prompts] for start in range(0, len(pairs), args.num_prompts)]
    others = {pair.id: common.choose_negatives(pair, pool, args.negatives, "", args.seed) for pair in pairs}
    work = lambda batch: policy.measure([(pair, found, others[pair.id]) for pair, found in zip(
        batch, policy.rollout(batch, 4, "validation"))])
    rows = [row for groups in common.run_batches(work, batches, "validating") for group in groups for row in group]
    over_all, passing = mean_of(rows), mean_of([row for row in rows if not (row.is_leak or row.malformed)])
    return passing | {key: over_all[key] for key in ("is_leak", "malformed", "unfinished", "tokens")}


def describe(step: int, seen: dict[str, float | None], objective: str) -> str:
    scores = ("contrast", "masked_likelihood", "paraphrase") if objective == "recon" else ("likelihood",)
    shown = (f"{key} " + ("none" if seen[key] is None else f"{seen[key]:+.3f}") for key in scores)
    return (f"step {step}, held-out, without fault: " + ", ".join(shown)
            + f"; all: leaks {seen['is_leak']:.0%}, malformed {seen['malformed']:.0%}, at the limit "
              f"{seen['unfinished']:.0%}, {seen['tokens']:.0f} tokens")


# ----------------------------------------------------------------------------------------------------------------------
# The loop


def last_checkpoint(folder: Path) -> Path | None:
    """The newest step-N in a folder of checkpoints: each is renamed when it is whole, then the older one is removed."""
    return max((path for path in folder.glob("step-*") if path.is_dir() and path.suffix != ".tmp"), default=None)


def train(policy: Policy, base: Any, pairs: Sequence[Pair], held_out: Sequence[Pair], config: dict[str, Any]) -> int:
    """Train the policy's adapter for --steps steps; returns how many tokens were sampled.

    `config` is that of the checkpoints, which may be continued to more steps.
    """
    args, tokenizer = policy.args, policy.local.tokenizer
    folder, log = args.run / "rl" / args.objective, args.run / "rl.jsonl"
    checkpoint = last_checkpoint(folder)
    if checkpoint and common.first_difference(common.read_config(checkpoint), config):
        checkpoint = None                                  # of other settings, whose adapter --overwrite has discarded
    model = policy.local.model = common.add_adapter(base, args.rank, args.seed, checkpoint or args.init_adapter)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=args.lr, weight_decay=0.0, fused=True)
    first = int(checkpoint.name.partition("-")[2]) if checkpoint else 0
    if checkpoint:
        optimizer.load_state_dict(torch.load(checkpoint / "optimizer.pt", weights_only=True))
    # The log may be ahead of the checkpoint; those steps are done again, with the same result.
    lines = [line for line in (common.read_rows(log, Step) if log.is_file() else [])
             if line.objective != args.objective or line.step < first]
    order: list[Pair] = []
    while len(order) < args.steps * args.num_prompts:
        order += random.Random(common.stable_seed(args.seed, "order", len(order))).sample(list(pairs), len(pairs))

    sampled = 0
    for step in common.progress(range(first, args.steps + 1), f"GRPO ({args.objective})"):
        seen, last = None, step == args.steps
        if step % args.val_every == 0 or last:
            seen = validate(policy, held_out, [*pairs, *held_out])
            print(describe(step, seen, args.objective))
        if last:
            lines.append(Step(objective=args.objective, step=step, reward=0.0, measured={}, update={}, seconds={},
                              validation=seen))
            common.write_file(log, "".join(map(common.dump_row, lines)))
            break
        clock = [time.monotonic()]
        # Where an epoch ends within a step, a pair may come twice, with the same noise: once is enough.
        batch = list({pair.id: pair for pair in order[step * args.num_prompts:(step + 1) * args.num_prompts]}.values())
        mine = common.shard(list(enumerate(batch)))
        draw = lambda some: policy.rollout([pair for _, pair in some], args.num_generations, "rollout", step)
        completions = common.in_portions(draw, mine) if mine else []
        clock.append(time.monotonic())
        measured = common.in_portions(policy.measure, [
            (pair, group, common.choose_negatives(pair, pairs, args.negatives, "", step))
            for (_, pair), group in zip(mine, completions)])
        everyone = sorted(common.gather([(place, *rest) for (place, _), *rest in zip(mine, completions, measured)]),
                          key=lambda entry: entry[0])
        clock.append(time.monotonic())
        groups, rewards = [], []
        for place, group, rows in everyone:
            rewards.append([reward_of(row, args) for row in rows])
            groups.append(Group(common.encode_prompt(tokenizer, policy.prompt(batch[place])),
                                [credited_tokens(tokenizer, found, args.objective == "recon") for found in group],
                                group_advantages(rewards[-1], [is_faulty(row, args) for row in rows])))
        for parameters in optimizer.param_groups:
            parameters["lr"] = args.lr * min(1.0, (step + 1) / args.warmup)
        updated = update(model, optimizer, groups, args)
        clock.append(time.monotonic())
        flat = [row for *_, rows in everyone for row in rows]
        lines.append(Step(
            objective=args.objective, step=step, reward=sum(map(sum, rewards)) / len(flat), measured=mean_of(flat),
            update=updated, validation=seen, seconds={name: round(after - before, 2) for name, before, after in zip(
                ("sampling", "reward", "update"), clock, clock[1:])}))
        sampled += sum(row.tokens for row in flat)
        common.write_file(log, "".join(map(common.dump_row, lines)))
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            name = f"step-{step + 1:06}"
            common.save_adapter(model, folder / name, config, optimizer)
            for older in [path for path in folder.glob("step-*") if not path.name.startswith(name)]:
                common.discard(older)
    return sampled


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = common.stage_arguments(__doc__)
    add = parser.add_argument_group("what is trained").add_argument
    add("--objective", choices=tuple(REWARDS), default="recon", help="see above")
    add("--init-adapter", type=Path, metavar="DIR", help="adapter to start from (e2e: RUN/models/backward)")
    add("--rank", **common.COUNT, default=16, help="of LoRA; alpha is twice that")
    add = parser.add_argument_group("reward").add_argument
    add("--reward", choices=("contrast", "likelihood", "cosine"), help="unset: contrast for recon, likelihood for e2e")
    add("--negatives", **common.COUNT, default=3, help="other actions for the score contrast")
    add("--paraphrase-weight", type=common.fraction, default=0.2, help="what a whole paraphrase costs, nats a token; "
        "with --reward likelihood what quoting all 4-grams costs")
    add("--limit-cost", type=common.fraction, default=0.05, help="what running to the token limit costs, nats a token; "
        "with --reward contrast")
    add("--encoder", default="embedded", metavar="NAME", help="sentence encoder of the leak detector and the cosine")
    add = parser.add_argument_group("GRPO").add_argument
    add("--steps", **common.COUNT, default=6, help="optimizer steps; 80 and more teach something")
    add("--num-prompts", **common.COUNT, default=2, help="prompts a step")
    add("--num-generations", **common.COUNT, default=4, help="completions a prompt")
    add("--max-new-tokens", **common.COUNT, default=56, help="e2e: in a completion; recon: as stage 2")
    add("--temperature", type=common.positive_float, default=0.7, help="e2e: as in stage 6; recon: as stage 2")
    add("--min-p", type=common.fraction, default=0.1, help="e2e: as in stage 6; recon: as stage 2")
    add("--lr", type=common.positive_float, default=1e-4, help="learning rate of AdamW")
    add("--warmup", **common.COUNT, default=5, help="steps over which the learning rate rises")
    add("--num-iterations", **common.COUNT, default=1, help="optimizer steps a rollout")
    add("--clip", type=common.positive_float, default=0.2, help="the ratio to the old policy counts within 1 ± CLIP")
    add("--val-every", **common.COUNT, default=3, help="steps between looks at held-out pairs")
    add("--save-every", **common.COUNT, default=4, help="steps between checkpoints")
    add("--checkpointing", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available(),
        help="compute activations twice, so that long contexts fit")
    args = parser.parse_args(argv)
    args.reward = args.reward or REWARDS[args.objective][0]
    if args.reward not in REWARDS[args.objective]:
        common.fail(f"--reward {args.reward} is not for {args.objective}; choose from {REWARDS[args.objective]}")
    if args.num_generations < 2:
        common.fail("--num-generations must be 2 or more: an advantage compares the completions of one prompt")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    started = common.open_run(args)
    source, inputs = args.run / "pairs.jsonl", [args.run / "pairs.jsonl"]
    pairs = common.read_rows(source, Pair, "01_prepare.py")
    held_out = [pair for pair in pairs if pair.split == "val"]
    pairs = [pair for pair in pairs if pair.split == "train"][:args.limit]
    if len({pair.conversation for pair in pairs}) < 2 or not held_out:
        common.fail(f"{source} needs pairs of two conversations in train, and of val; prepare more pairs")
    if args.objective == "recon":                          # the policy is sampled as it will be used
        drawn = common.read_config(args.run / "candidates.jsonl")["arguments"]
        args.temperature, args.min_p = drawn["temperature"] or 1.0, drawn["min_p"]
        args.max_new_tokens = drawn["max_trace_tokens"]
        target, prompts = args.run / "models" / "synthesizer", ["synthesis", "transcript", "transcript_no_trace"]
        following = "python 02_sample_candidates.py --tag grpo"
    else:
        args.init_adapter = args.init_adapter or args.run / "models" / "backward"
        target, prompts = args.run / "models" / "e2e-grpo", ["user_model", "transcript", "transcript_no_trace"]
        following = "python 06_evaluate.py"
    if args.init_adapter:
        common.check_adapter(args.init_adapter, args.model)
        common.check_made_from(args.init_adapter, source, "04_select_sft.py")
        inputs.append(args.init_adapter / "adapter_model.safetensors")
    if args.show_prompt:
        local = common.load_model(args.model, args.four_bit, args.dtype)
        return print(local.show(Policy(local, None, args).prompt(pairs[0])))
    ignore = ["save_every", "init_adapter", "checkpointing"]
    config = common.run_config(args, inputs, prompts, ignore)
    if target.exists() and not args.overwrite:             # more steps than were done: training goes on
        old = common.read_config(target)
        more = old | {"arguments": old["arguments"] | {"steps": args.steps}}
        if old["arguments"].get("steps", 0) < args.steps and not common.first_difference(more, config):
            common.wait_for_all()                          # all have seen it
            common.discard(target)
            common.wait_for_all()
    if common.is_made(target, config, args.overwrite):
        print(f"{target} is complete")
        return common.print_next(args, following)
    local = common.load_model(args.model, args.four_bit, args.dtype)
    policy = Policy(local, common.load_encoder(args.encoder), args)
    if args.overwrite:
        for old in (target, *(args.run / "rl" / args.objective).glob("step-*")):
            common.discard(old)
        common.wait_for_all()
    tokens = train(policy, local.model, pairs, held_out, common.run_config(args, inputs, prompts, [*ignore, "steps"]))
    common.save_adapter(policy.local.model, target, config)
    common.end_stage(args, "05_rl_train", len(pairs), len(pairs), 0, started, tokens, following)


if __name__ == "__main__":
    common.run_stage(main)
