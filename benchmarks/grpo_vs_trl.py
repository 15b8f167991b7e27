"""Stage 5's GRPO against TRL's GRPOTrainer: the same loss and gradients, and the seconds of a step.

    pip install --no-deps trl==1.16.0        (TRL is needed for this benchmark alone)
    python benchmarks/grpo_vs_trl.py
    python benchmarks/grpo_vs_trl.py --skip-speed

Correctness, in float32, on a random batch of 3 prompts x 4 completions of unequal lengths with random advantages: the
loss and all LoRA gradients of `update` against
  plain, second update   TRL's `_compute_loss` (loss_type "dapo", normalised over all completion tokens), for the first
                         and the second of two updates of a rollout; in the second the ratio is not 1, and clipping acts
  min-p                  a slow version, token by token: TRL knows no min-p in its loss

Speed: a step of 4 prompts x 4 completions x 48 tokens over real synthesis prompts of about 370 tokens, sampling
included: TRL with `generate`, its default engine without a GPU, and with gradient checkpointing switched off, which is
faster. The reward costs nothing on both sides. Prints one JSON object last. About 10 minutes on two cores.
"""

import argparse
import importlib
import json
import platform
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common

try:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
except ImportError:
    common.fail("this benchmark needs TRL: pip install --no-deps trl==1.16.0")
rl = importlib.import_module("05_rl_train")

PROMPTS, GROUP, NEW_TOKENS = 4, 4, 48
CLIP = 0.2


class Recorder:
    """An optimizer for `update` that keeps each gradient and moves the weights by `moves`."""

    def __init__(self, weights: list[torch.Tensor], moves: list[torch.Tensor]):
        self.param_groups, self.moves, self.gradients = [{"params": weights}], moves, []

    @torch.no_grad()
    def step(self) -> None:
        weights = self.param_groups[0]["params"]
        self.gradients.append([weight.grad.clone() for weight in weights])
        for weight, move in zip(weights, self.moves):
            weight += move

    def zero_grad(self) -> None:
        for weight in self.param_groups[0]["params"]:
            weight.grad = None


def arguments(**more: Any) -> argparse.Namespace:
    """What stage 5 reads of its arguments."""
    return argparse.Namespace(**({
        "objective": "recon", "reward": "contrast", "seed": 0, "temperature": 1.0, "min_p": 0.0, "num_iterations": 1,
        "clip": CLIP, "checkpointing": False, "max_new_tokens": NEW_TOKENS} | more))


def make_trainer(model: Any, tokenizer: Any, prompts: list[str], folder: str, **more: Any) -> Any:
    """TRL's trainer with this project's settings: token-normalised loss, float32, no checkpointing of gradients."""
    settings = {
        "loss_type": "dapo", "scale_rewards": "none", "beta": 0.0, "epsilon": CLIP, "temperature": 1.0,
        "num_generations": GROUP, "learning_rate": 1e-4, "max_completion_length": NEW_TOKENS, "max_grad_norm": 1.0,
        "per_device_train_batch_size": PROMPTS * GROUP, "steps_per_generation": 1, "gradient_checkpointing": False,
        "bf16": False, "use_cpu": not torch.cuda.is_available(), "report_to": "none", "save_strategy": "no",
        "disable_tqdm": True, "logging_steps": 1}
    reward = lambda completions, **_: [sum(map(ord, text)) % 97 / 97 for text in completions]
    data = Dataset.from_list([{"prompt": prompt} for prompt in prompts])
    return GRPOTrainer(model=model, reward_funcs=reward, processing_class=tokenizer, train_dataset=data,
                       args=GRPOConfig(output_dir=folder, **(settings | more)))


# ----------------------------------------------------------------------------------------------------------------------
# Correctness


def trl_batch(groups: list[rl.Group], device: Any) -> dict[str, torch.Tensor]:
    """The groups as TRL holds them: prompts padded on the left, completions on the right."""
    prompts = [group.prompt for group in groups for _ in group.completions]
    completions = [ids for group in groups for ids in group.completions]
    wide, long = max(map(len, prompts)), max(map(len, completions))
    batch = {"prompt_ids": [[0] * (wide - len(ids)) + ids for ids in prompts],
             "prompt_mask": [[0] * (wide - len(ids)) + [1] * len(ids) for ids in prompts],
             "completion_ids": [ids + [0] * (long - len(ids)) for ids in completions],
             "completion_mask": [[1] * len(ids) + [0] * (long - len(ids)) for ids in completions],
             "advantages": sum((group.advantages for group in groups), []),
             "num_items_in_batch": sum(map(len, completions))}
    return {key: torch.tensor(value, device=device) for key, value in batch.items()}


def trl_loss(local: common.LocalModel, model: Any, groups: list[rl.Group], folder: str, moves: list) -> torch.Tensor:
    """TRL's loss; with `moves` that of a second update, for which the weights have moved by so much since sampling."""
    trainer, batch = make_trainer(model, local.tokenizer, ["x"] * GROUP, folder), trl_batch(groups, model.device)
    trainer.current_gradient_accumulation_steps = 1
    if moves:
        ids, mask = (torch.cat([batch[f"prompt_{kind}"], batch[f"completion_{kind}"]], 1) for kind in ("ids", "mask"))
        with torch.no_grad():
            batch["old_per_token_logps"], *_ = trainer._get_per_token_logps_and_entropies(
                model, ids, mask, batch["completion_ids"].shape[1])
            for weight, move in zip((weight for weight in model.parameters() if weight.requires_grad), moves):
                weight += move
    model.train()
    return trainer._compute_loss(model, batch)


def min_p_loss(model: Any, groups: list[rl.Group], min_p: float) -> torch.Tensor:
    """The loss by the definition of min-p, one completion and one token at a time."""
    parts = []
    for group in groups:
        for ids, advantage in zip(group.completions, group.advantages):
            logits = model(torch.tensor([group.prompt + ids], device=model.device)).logits[0, len(group.prompt) - 1:-1]
            for token, chances in zip(ids, logits.softmax(-1)):
                allowed = chances >= min_p * chances.max()
                allowed[token] = True
                logprob = (chances[token] / chances[allowed].sum()).log()
                parts.append(-advantage * (logprob - logprob.detach()).exp())        # the ratio is 1
    return torch.stack(parts).mean()


def compare(local: common.LocalModel, folder: str, seed: int) -> dict:
    """Differences of loss and gradients in three settings; gradients relative to each tensor's norm, the largest."""
    numbers, found = random.Random(seed), {}
    some = lambda low, high: [numbers.randrange(100, 40_000) for _ in range(numbers.randint(low, high))]
    shared, groups = some(10, 20), []
    for _ in range(3):
        rewards = [numbers.gauss(0, 1) for _ in range(GROUP)]
        groups.append(rl.Group(shared + some(5, 40), [some(1, 24) for _ in rewards],
                               [reward - sum(rewards) / GROUP for reward in rewards]))
    for name, min_p, iterations in (("plain", 0.0, 1), ("second update", 0.0, 2), ("min-p", 0.1, 1)):
        model = common.add_adapter(local.model, 16, seed)
        generator = torch.Generator().manual_seed(seed)
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        noise = lambda scale: [scale * torch.randn(weight.shape, generator=generator).to(weight) for weight in weights]
        with torch.no_grad():
            for weight, move in zip(weights, noise(0.02)):           # B starts at 0, where A has no gradient
                weight += move
        start, recorder = [weight.detach().clone() for weight in weights], Recorder(weights, noise(0.01))
        row = rl.update(model, recorder, groups, arguments(min_p=min_p, num_iterations=iterations))
        ours = [gradient * max(1.0, row["grad_norm"]) for gradient in recorder.gradients[-1]]        # unclipped
        with torch.no_grad():
            for weight, first in zip(weights, start):
                weight.copy_(first)
        theirs = min_p_loss(model, groups, min_p) if min_p else trl_loss(
            local, model, groups, folder, recorder.moves if iterations == 2 else [])
        theirs.backward()
        gaps = [((mine - weight.grad).norm() / weight.grad.norm()).item() for mine, weight in zip(ours, weights)]
        found[name] = {
            "loss": row["loss"], "loss_expected": theirs.item(), "loss_difference": abs(row["loss"] - theirs.item()),
            "gradient_largest_relative_difference": max(gaps), "gradient_tensors": len(gaps),
            "tokens_clipped": row["clipped"]}
        model.eval().unload()
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Speed


class Clock(TrainerCallback):
    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.started)


def race(local: common.LocalModel, folder: str, steps: int) -> dict:
    """Seconds of a whole step, all completions of full length, first on our side, then on TRL's."""
    importlib.import_module("01_prepare").main(["--run", folder, "--limit", "40"])
    pairs = common.read_rows(Path(folder) / "pairs.jsonl", common.Pair)
    pairs = sorted(pairs, key=lambda pair: common.stable_seed(pair.id))[:PROMPTS]
    # Two worked examples instead of four make prompts of about the length asked for.
    system, *turns = common.PROMPTS["synthesis"]
    common.PROMPTS["synthesis"] = [system, *turns[4:]]
    base, tokenizer, args = local.model, local.tokenizer, arguments()
    base.generation_config.eos_token_id, tokenizer.eos_token_id, end = None, len(tokenizer), tokenizer.eos_token_id

    model = common.add_adapter(base, 16, 0)
    policy = rl.Policy(common.LocalModel(model, tokenizer), None, args)
    prompts = [common.encode_prompt(tokenizer, policy.prompt(pair)) for pair in pairs]
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-4)
    ours: list[dict] = []
    for step in range(steps + 1):
        clock = time.perf_counter()
        completions = policy.rollout(pairs, GROUP, "race", step)
        sampled, groups, honest = time.perf_counter(), [], [False] * GROUP
        for prompt, group in zip(prompts, completions):
            rewards = [sum(found.ids) % 97 / 97 for found in group]
            groups.append(rl.Group(prompt, [found.ids for found in group], rl.group_advantages(rewards, honest)))
        rl.update(model, optimizer, groups, args)
        ended = time.perf_counter()
        ours.append({"step": ended - clock, "sampling": sampled - clock, "update": ended - sampled})
    assert all(len(ids) == NEW_TOKENS for group in groups for ids in group.completions)
    model.unload()

    tokenizer.eos_token_id = end
    model, clock = common.add_adapter(base, 16, 0), Clock()
    trainer = make_trainer(model, tokenizer, list(map(tokenizer.decode, prompts)), folder, max_steps=steps + 1,
                           generation_kwargs={"min_new_tokens": NEW_TOKENS})
    trainer.add_callback(clock)
    trainer.train()
    lengths = [row[key] for row in trainer.state.log_history if (key := "completions/mean_length") in row]
    assert lengths and all(length == NEW_TOKENS for length in lengths)
    fastest = min(ours[1:], key=lambda row: row["step"])             # the first step of both also warms up
    return {"prompt_tokens": list(map(len, prompts)), "new_tokens": f"{PROMPTS} x {GROUP} x {NEW_TOKENS}",
            "seconds": fastest, "seconds_trl": min(clock.seconds[1:]), "all_seconds": [row["step"] for row in ours],
            "all_seconds_trl": clock.seconds, "speedup": min(clock.seconds[1:]) / fastest["step"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=common.positive_int, default=2, metavar="N",
                        help="steps timed on each side, behind one to warm up (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="of the random batch (default: drawn and printed)")
    parser.add_argument("--skip-speed", action="store_true", help="compare loss and gradients alone")
    args = parser.parse_args()
    seed = random.SystemRandom().randrange(2**31) if args.seed is None else args.seed
    local = common.load_model("embedded", False, "float32")
    with tempfile.TemporaryDirectory() as folder:
        result = {"machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
                  "torch": torch.__version__, "trl": importlib.import_module("trl").__version__, "seed": seed,
                  "equal": compare(local, folder, seed)}
        print(json.dumps(result["equal"], indent=1))
        if not args.skip_speed:
            result["step"] = race(local, folder, args.steps)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
