"""Stage 5's GRPO against TRL's GRPOTrainer: the same loss and gradients, and the seconds of a step, in one run.

    pip install --no-deps trl==1.16.0        (TRL is needed for this benchmark alone)
    python benchmarks/grpo_vs_trl.py

Correctness: on a random batch of 3 prompts x 4 completions of unequal lengths and random rewards, the loss and all LoRA
gradients of `update` against those of TRL's `_compute_loss` (loss_type "dapo", normalised over all completion tokens):
plain; with rewards scaled by the group's standard deviation; and for the second of two updates of a rollout, where the
ratio is no longer 1 and clipping and a KL term of 0.1 act. Advantages are computed here by TRL's formula.

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
from datasets import Dataset
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common

try:
    from trl import GRPOConfig, GRPOTrainer
except ImportError:
    common.stop("this benchmark needs TRL: pip install --no-deps trl==1.16.0")
rl = importlib.import_module("05_rl_train")

PROMPTS, GROUP, NEW_TOKENS = 4, 4, 48
KL, CLIP = 0.1, 0.2


class Recorder:
    """An optimizer for `update` that keeps each gradient and moves the weights by `moves`, if there are any."""

    def __init__(self, weights: list[torch.Tensor], moves: list[torch.Tensor] | None = None):
        self.param_groups, self.moves, self.gradients = [{"params": weights}], moves, []

    @torch.no_grad()
    def step(self) -> None:
        weights = self.param_groups[0]["params"]
        self.gradients.append([weight.grad.clone() for weight in weights])
        for weight, move in zip(weights, self.moves or []):
            weight += move

    def zero_grad(self) -> None:
        for weight in self.param_groups[0]["params"]:
            weight.grad = None


def arguments(**more: Any) -> argparse.Namespace:
    return argparse.Namespace(**({"temperature": 1.0, "updates": 1, "clip": CLIP, "kl": 0.0, "recompute": False, "max_new_tokens": NEW_TOKENS} | more))


def make_trainer(model: Any, tokenizer: Any, prompts: list[str], folder: str, **more: Any) -> Any:
    """TRL's trainer with this project's settings: token-normalised loss, float32, no checkpointing of gradients."""
    settings = {"loss_type": "dapo", "scale_rewards": "none", "beta": 0.0, "epsilon": CLIP, "temperature": 1.0, "num_generations": GROUP, "learning_rate": 2e-4,
                "max_completion_length": NEW_TOKENS, "per_device_train_batch_size": PROMPTS * GROUP, "steps_per_generation": 1, "gradient_checkpointing": False,
                "bf16": False, "use_cpu": not torch.cuda.is_available(), "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1, "max_grad_norm": 1.0}
    reward = lambda completions, **_: [sum(map(ord, text)) % 97 / 97 for text in completions]
    return GRPOTrainer(model=model, reward_funcs=reward, processing_class=tokenizer, train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
                       args=GRPOConfig(output_dir=folder, **(settings | more)))


def trl_batch(groups: list[common.Group], advantages: list[list[float]]) -> dict[str, torch.Tensor]:
    """The groups as TRL holds them: prompts padded on the left, completions on the right."""
    prompts = [prompt for prompt, completions in groups for _ in completions]
    completions = [ids for _, some in groups for ids in some]
    wide, long = max(map(len, prompts)), max(map(len, completions))
    return {"prompt_ids": torch.tensor([[0] * (wide - len(ids)) + ids for ids in prompts]), "prompt_mask": torch.tensor([[0] * (wide - len(ids)) + [1] * len(ids) for ids in prompts]),
            "completion_ids": torch.tensor([ids + [0] * (long - len(ids)) for ids in completions]), "completion_mask": torch.tensor([[1] * len(ids) + [0] * (long - len(ids)) for ids in completions]),
            "advantages": torch.tensor(sum(advantages, [])), "num_items_in_batch": torch.tensor(sum(map(len, completions)))}


def trl_logprobs(trainer: Any, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    ids, mask = (torch.cat([batch[f"prompt_{kind}"], batch[f"completion_{kind}"]], 1) for kind in ("ids", "mask"))
    with torch.no_grad():
        return trainer._get_per_token_logps_and_entropies(model, ids, mask, batch["completion_ids"].shape[1])[0]


def compare(base: Any, tokenizer: Any, folder: str, seed: int) -> dict:
    """Largest relative difference of loss and gradients to TRL's, in three settings; gradients relative to each tensor's norm."""
    numbers, found = random.Random(seed), {}
    some = lambda low, high: [numbers.randrange(100, 40_000) for _ in range(numbers.randint(low, high))]
    shared = some(10, 20)
    groups = [(shared + some(5, 40), [some(1, 24) for _ in range(GROUP)]) for _ in range(3)]
    rewards = torch.tensor([[numbers.gauss(0, 1) for _ in range(GROUP)] for _ in groups])
    centred = rewards - rewards.mean(1, keepdim=True)
    for name, scaled, updates, kl in (("plain", False, 1, 0.0), ("std scaling", True, 1, 0.0), ("second update, clipping, KL", True, 2, KL)):
        theirs_advantages = (centred / (rewards.std(1, keepdim=True) + 1e-4) if scaled else centred).tolist()
        ours_advantages = [rl.group_advantages(row, scaled) for row in rewards.tolist()]
        model = common.add_adapter(base, 16, seed)
        generator = torch.Generator().manual_seed(seed)
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        with torch.no_grad():
            for weight in weights:                                   # B starts at 0, where A has no gradient
                weight += 0.02 * torch.randn(weight.shape, generator=generator)
        moves = [0.01 * torch.randn(weight.shape, generator=generator) for weight in weights]
        start = [weight.detach().clone() for weight in weights]
        recorder = Recorder(weights, moves)
        row = rl.update(model, recorder, groups, ours_advantages, arguments(updates=updates, kl=kl))
        loss = row["loss"]
        ours = [gradient * max(1.0, row["grad_norm"]) for gradient in recorder.gradients[-1]]      # update clips them to norm 1

        with torch.no_grad():
            for weight, first in zip(weights, start):
                weight.copy_(first)
        trainer = make_trainer(model, tokenizer, ["x"] * 4, folder, beta=kl)
        trainer.current_gradient_accumulation_steps = 1
        batch = trl_batch(groups, theirs_advantages)
        if updates == 2:
            batch["old_per_token_logps"] = trl_logprobs(trainer, model, batch)
            with torch.no_grad():
                for weight, move in zip(weights, moves):
                    weight += move
        if kl:
            with model.disable_adapter():
                batch["ref_per_token_logps"] = trl_logprobs(trainer, model, batch)
        recorder.zero_grad()
        model.train()
        theirs_loss = trainer._compute_loss(model, batch)
        theirs_loss.backward()
        model.eval()
        gaps = [((gradient - weight.grad).norm() / weight.grad.norm()).item() for gradient, weight in zip(ours, weights)]
        found[name] = {"loss": loss, "loss_trl": theirs_loss.item(), "loss_relative_difference": abs(loss - theirs_loss.item()) / abs(theirs_loss.item()),
                       "gradient_largest_relative_difference": max(gaps), "gradient_tensors": len(gaps), "tokens_clipped": row["clipped"]}
        model.unload()
    return found


class Clock(TrainerCallback):
    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.started)


def race(base: Any, tokenizer: Any, folder: str, steps: int) -> dict:
    """Seconds of a whole step, all completions of full length, first on our side, then on TRL's."""
    importlib.import_module("01_prepare").main(["--run", folder, "--limit", "40"])
    pairs = sorted(common.read_rows(Path(folder) / "pairs.jsonl"), key=lambda pair: common.seed_of(pair["id"]))
    # Two worked examples instead of four make prompts of about the length asked for.
    system, *turns = common.PROMPTS["synthesis"]
    common.PROMPTS["synthesis"] = [system, *turns[4:]]
    prompts = [common.synthesis_prompt(tokenizer, pair) for pair in pairs][:PROMPTS]
    base.generation_config.eos_token_id, tokenizer.eos_token_id, end = None, len(tokenizer), tokenizer.eos_token_id

    model = common.add_adapter(base, 16, 0)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=2e-4)
    ours: list[dict] = []
    for step in range(steps + 1):
        clock = time.perf_counter()
        completions = rl.rollout(model, tokenizer, prompts, [common.seed_of(step, k) for k in range(PROMPTS * GROUP)], GROUP, arguments())
        sampled = time.perf_counter()
        groups = [(prompt, [rl.tokens_of(completion) for completion in some]) for prompt, some in zip(prompts, completions)]
        rewards = [[sum(ids) % 97 / 97 for ids in some] for _, some in groups]
        rl.update(model, optimizer, groups, [rl.group_advantages(some, False) for some in rewards], arguments())
        ours.append({"step": time.perf_counter() - clock, "sampling": sampled - clock, "update": time.perf_counter() - sampled})
    assert all(len(ids) == NEW_TOKENS for _, some in groups for ids in some)
    model.unload()

    tokenizer.eos_token_id = end
    model, clock = common.add_adapter(base, 16, 0), Clock()
    trainer = make_trainer(model, tokenizer, [tokenizer.decode(prompt) for prompt in prompts], folder, max_steps=steps + 1,
                           generation_kwargs={"min_new_tokens": NEW_TOKENS})
    trainer.add_callback(clock)
    trainer.train()
    lengths = [row["completions/mean_length"] for row in trainer.state.log_history if "completions/mean_length" in row]
    assert lengths and all(length == NEW_TOKENS for length in lengths)
    fastest = min(ours[1:], key=lambda row: row["step"])                                # the first step of both also warms up
    return {"prompt_tokens": [len(prompt) for prompt in prompts], "completions": f"{PROMPTS} x {GROUP} x {NEW_TOKENS}", "seconds": fastest, "seconds_trl": min(clock.seconds[1:]),
            "all_seconds": [row["step"] for row in ours], "all_seconds_trl": clock.seconds, "speedup": min(clock.seconds[1:]) / fastest["step"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=common.positive_int, default=2, help="steps timed on each side, behind one to warm up (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=None, help="of the random batch (default: drawn and printed)")
    args = parser.parse_args()
    seed = random.SystemRandom().randrange(2**31) if args.seed is None else args.seed
    base, tokenizer = common.load_model("embedded", None)
    with tempfile.TemporaryDirectory() as folder:
        result = {"machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads", "torch": torch.__version__,
                  "trl": importlib.import_module("trl").__version__, "seed": seed, "equal": compare(base, tokenizer, folder, seed)}
        print(json.dumps(result["equal"], indent=1))
        result["step"] = race(base, tokenizer, folder, args.steps)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
