"""SFT and GRPO: what the loss covers, what moves and what does not, and resuming."""

import argparse
import json
import shutil
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, make_pair, random_ids
from test_prepare import write_turns

import common


@pytest.fixture(scope="module")
def sft(stage):
    return stage("04_select_sft")


@pytest.fixture(scope="module")
def rl(stage):
    return stage("05_rl_train")


def scored_row(scores, leaks=None, name="c/1"):
    candidates = [{"trace": f"trace {k}", "tokens": 5 + k, "leak": (leaks or [0] * len(scores))[k], "reworded": 0.1, "stopped": bool(leaks and leaks[k]), "scores": {"unsaid": score}} for k, score in enumerate(scores)]
    return {"id": name, "candidates": candidates, "baseline": {"unsaid": 0.0}}


def test_each_arm_chooses_its_candidate(sft):
    row = scored_row([0.1, 0.9, 0.4, -0.2], [0, 0.5, 0, 0])
    assert {arm: sft.choose_trace(arm, row, "unsaid")["k"] for arm in ("none", "backward", "recon", "longest", "worst")} == {"none": None, "backward": 0, "recon": 2, "longest": 3, "worst": 3}


def test_a_leaking_trace_is_chosen_only_if_all_leak_and_then_the_least(sft):
    row = scored_row([0.1, 0.9, 0.4], [0.5, 0.6, 0.2])
    chosen = sft.choose_trace("recon", row, "unsaid")
    assert chosen["k"] == 2 and chosen["leak"] == 0.2


def test_candidates_whose_scores_differ_by_rounding_tie_and_the_earlier_one_is_chosen(sft, numbers):
    """Whatever the rounding: another batch must not turn the choice."""
    for _ in range(100):
        row = scored_row([score + numbers.uniform(-5e-6, 5e-6) for score in (-0.3, 0.4, -0.7, 0.4, -0.7)])
        assert [sft.choose_trace(arm, row, "unsaid")["k"] for arm in ("recon", "worst")] == [1, 2]
        assert sft.choose_trace("recon", scored_row([-0.3, 0.4, 0.9], [0.2 + numbers.uniform(0, 5e-6), 0.2 + numbers.uniform(0, 5e-6), 0.3]), "unsaid")["k"] == 1
    assert [sft.choose_trace(arm, scored_row([0.4, 0.401, -0.7, -0.701]), "unsaid")["k"] for arm in ("recon", "worst")] == [1, 3]


def test_a_missing_score_is_never_taken_for_zero(sft, capsys):
    row = scored_row([-0.5, None, -0.7])
    assert sft.choose_trace("recon", row, "unsaid")["k"] == 0
    rows = [row, scored_row([None, None], name="c/2")]
    assert sft.rows_with_score(rows, "unsaid") == rows[:1] and "left out: 1 of 2" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        sft.rows_with_score(rows[1:], "unsaid")
    assert "03_reconstruct_score.py" in capsys.readouterr().err


def test_shuffled_gives_every_pair_a_trace_of_another_conversation(sft):
    rows = [scored_row([1.0], name=f"c{i // 3}/{i}") for i in range(9)]
    for i, row in enumerate(rows):
        row["candidates"][0]["trace"] = f"of {i}"
    chosen = sft.choose_traces("shuffled", rows, [make_pair(row["id"]) for row in rows], "unsaid", seed=5)
    assert [row["id"] for row in chosen] == [row["id"] for row in rows]
    assert all(int(row["trace"].removeprefix("of ")) // 3 != i // 3 for i, row in enumerate(chosen))


@pytest.mark.parametrize("trace", ["Sam feels fine", None])
def test_the_loss_covers_exactly_trace_action_and_end_token(sft, tiny, trace):
    """Against transformers' own loss with labels of -100 on the prompt."""
    model, tokenizer = tiny
    pair = make_pair()
    prompt, (completion,) = sft.user_example(tokenizer, pair, trace)
    text = tokenizer.decode(completion)
    assert text == ("" if trace is None else f"{trace}\n</think>\n") + pair["action"] + "<|im_end|>"
    assert tokenizer.decode(prompt).endswith("<|im_start|>assistant\n" + ("<think>\n" if trace else ""))
    labels = torch.tensor([[-100] * len(prompt) + completion])
    expected = model(torch.tensor([prompt + completion]), labels=labels).loss
    torch.testing.assert_close(sft.completion_loss(model, [(prompt, [completion])], len(completion)), expected, atol=1e-5, rtol=1e-5)


def weights_of(model):
    return {name.replace(".base_layer", ""): weight.detach().clone() for name, weight in model.named_parameters() if "lora" not in name}


def fit_arguments(**more):
    return argparse.Namespace(**({"rank": 4, "epochs": 2, "batch": 2, "fit_lr": 1e-2, "seed": 0, "recompute": False, "overwrite": False} | more))


def test_sft_moves_the_adapter_lowers_the_loss_and_leaves_the_base_bit_identical(sft, tiny, tmp_path):
    model, tokenizer = tiny
    before = weights_of(model)
    examples = [sft.user_example(tokenizer, make_pair(action=f"number {i} is my answer"), "Sam counts") for i in range(4)]
    losses, _ = sft.fit_user_model(model, examples, fit_arguments(epochs=10), tmp_path / "arm", {"arguments": {"model": "tiny"}})
    assert losses[-1] < losses[0] - 0.3
    after = weights_of(model)
    assert after.keys() == before.keys() and all(torch.equal(before[name], after[name]) for name in before)
    adapted = common.load_adapter(model, tmp_path / "arm", "tiny")
    moved = [weight.abs().max().item() for name, weight in adapted.named_parameters() if "lora_B" in name]
    assert len(moved) == 14 and min(moved) > 0                              # 7 linear layers in each of 2 blocks; B starts at 0
    with torch.no_grad():
        assert sft.completion_loss(adapted, examples[:1], len(examples[0][1][0])).item() < losses[0]


def test_an_adapter_of_another_base_is_refused(sft, tiny, tmp_path, capsys):
    model, tokenizer = tiny
    sft.fit_user_model(model, [sft.user_example(tokenizer, make_pair(), None)], fit_arguments(epochs=1), tmp_path / "arm", {"arguments": {"model": "tiny"}})
    with pytest.raises(SystemExit):
        common.load_adapter(model, tmp_path / "arm", "other")
    assert "fitted on --model tiny" in capsys.readouterr().err


def test_gradients_through_a_4_bit_base_equal_those_through_its_dequantised_weights(tiny_folder, numbers):
    """Also after sampling, which on some CPUs makes bitsandbytes repack the weights for a kernel without a backward."""
    from bitsandbytes.functional import dequantize_4bit
    quantised, tokenizer = common.load_model(str(tiny_folder), True)
    plain, _ = common.load_model(str(tiny_folder), False)
    linears = dict(plain.named_modules())
    layers = [(name, module) for name, module in quantised.named_modules() if type(module).__name__ == "Linear4bit"]
    assert len(layers) == 14
    for name, module in layers:
        linears[name].weight.data = dequantize_4bit(module.weight.data, module.weight.quant_state).to(torch.float32)
    groups = [(random_ids(numbers, 3, 9), [random_ids(numbers, 1, 7) for _ in range(3)]) for _ in range(2)]
    common.generate(quantised, tokenizer, groups, 3)
    gradients = []
    for base in (quantised, plain):
        model = common.add_adapter(base, 4, 0)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_B" in name:                                     # with B at 0 the gradient of A would be 0
                    weight.copy_(torch.linspace(-0.1, 0.1, weight.numel()).view_as(weight))
        sum(row.sum() for rows in common.packed_logprobs(model, groups) for row in rows).backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad})
    assert len(gradients[0]) == 28 and gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-4, rtol=1e-4, msg=name)


def test_advantages_equal_the_obvious_formula(rl, numbers):
    for _ in range(20):
        rewards = [numbers.gauss(0, 2) for _ in range(numbers.randint(2, 8))]
        values = torch.tensor(rewards, dtype=torch.float64)
        assert rl.group_advantages(rewards, False) == pytest.approx((values - values.mean()).tolist())
        assert rl.group_advantages(rewards, True) == pytest.approx(((values - values.mean()) / (values.std() + 1e-4)).tolist())
    assert rl.group_advantages([0.3, 0.3, 0.3], True) == [0.0, 0.0, 0.0]


def test_the_policy_gradient_equals_weighted_log_probs_one_row_at_a_time(rl, tiny, numbers):
    model, _ = tiny
    model.requires_grad_(True)
    shared = random_ids(numbers, 2, 9)                                                 # what all prompts open with
    groups = [(shared + random_ids(numbers, 1, 9), [random_ids(numbers, 1, 7) for _ in range(numbers.randint(1, 4))]) for _ in range(3)]
    advantages = [[numbers.gauss(0, 1) for _ in completions] for _, completions in groups]
    row = rl.update(model, Still(model), groups, advantages, grpo_arguments(temperature=0.9))
    packed = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    total = sum(len(ids) for _, completions in groups for ids in completions)
    entropy = 0.0
    for (prompt, completions), some in zip(groups, advantages):
        for advantage, ids in zip(some, completions):
            logprobs = (model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1:-1] / 0.9).log_softmax(-1)
            (-advantage * logprobs[range(len(ids)), ids].sum() / total).backward()
            entropy -= (logprobs.exp() * logprobs).sum().item() / total
    norm = torch.stack([weight.grad.norm() for weight in model.parameters()]).norm().item()
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-4) and row["entropy"] == pytest.approx(entropy, rel=1e-4)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(packed[name] * max(1.0, norm), weight.grad, atol=1e-5, rtol=1e-4, msg=name)


class Still:
    """An optimizer that moves nothing and keeps the (clipped) gradients."""

    def __init__(self, model):
        self.param_groups = [{"params": list(model.parameters())}]

    def step(self):
        pass

    zero_grad = step


@pytest.mark.parametrize("suffixes", [1, 3])
def test_recomputed_layers_give_the_same_log_probs_and_gradients_and_keep_less_memory(tiny, numbers, suffixes):
    model, _ = tiny
    adapted = common.add_adapter(model, 4, 0)
    weights = [weight for name, weight in adapted.named_parameters() if weight.requires_grad and "lora_B" in name]
    for weight in weights:
        torch.nn.init.normal_(weight, std=0.1)
    groups = [(random_ids(numbers, 30, 40), [random_ids(numbers, 5, 9) for _ in range(suffixes)]) for _ in range(2)]
    found, kept = {}, {}
    for recompute in (False, True):
        held = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: held.append(tensor.numel()) or tensor, lambda tensor: tensor):
            logprobs = torch.cat([part for parts in common.packed_logprobs(adapted, groups, recompute=recompute) for part in parts])
        kept[recompute] = sum(held)
        logprobs.mul(torch.linspace(-1, 1, len(logprobs))).sum().backward()
        found[recompute] = [logprobs.detach(), *(weight.grad.clone() for weight in weights)]
        adapted.zero_grad()
    for one, other in zip(found[False], found[True]):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert kept[True] < 0.5 * kept[False] and all("forward" not in vars(layer) for layer in model.model.layers)


def grpo_arguments(**more):
    return argparse.Namespace(**({"temperature": 1.0, "updates": 1, "clip": 0.2, "kl": 0.0, "recompute": False} | more))


def test_the_loss_clips_the_ratio_only_where_that_lowers_the_objective_and_adds_the_divergence(rl, numbers):
    tensors = [torch.randn(30, generator=torch.Generator().manual_seed(numbers.randrange(2**31))) * scale for scale in (0.4, 0.4, 0.4, 1.0)]
    logprobs, old, reference, advantages = tensors
    found = rl.policy_loss(logprobs, old, reference, advantages, 0.2, 0.3)
    for p, q, r, a, value in zip(*(tensor.tolist() for tensor in (*tensors, found))):
        ratio = torch.tensor(p - q).exp().item()
        objective = min(ratio * a, min(max(ratio, 0.8), 1.2) * a)
        divergence = torch.tensor(r - p).exp().item() - (r - p) - 1
        assert value == pytest.approx(-objective + 0.3 * ratio * divergence, abs=1e-5) and divergence >= 0
    torch.testing.assert_close(rl.policy_loss(logprobs, old, None, advantages, 0.2, 0.3), rl.policy_loss(logprobs, old, None, advantages, 0.2, 0.0))


def test_several_updates_move_further_and_the_divergence_holds_them_back(rl, tiny_folder, numbers):
    """Also: the reference is the policy before training, and the first of several updates equals a single one."""
    groups = [(random_ids(numbers, 3, 9), [random_ids(numbers, 2, 6) for _ in range(3)]) for _ in range(2)]
    advantages = [[1.0, -0.5, -0.5], [0.3, -0.6, 0.3]]
    moved, away = {}, {}
    for name, more in (("one", {}), ("four", {"updates": 4}), ("held", {"updates": 4, "kl": 1.0})):
        model, _ = common.load_model(str(tiny_folder), False)
        adapted = common.add_adapter(model, 4, 0)
        optimizer = torch.optim.AdamW([weight for weight in adapted.parameters() if weight.requires_grad], lr=1e-2, weight_decay=0.0)
        row = rl.update(adapted, optimizer, groups, advantages, grpo_arguments(**more))
        moved[name] = row["adapter_change"]
        assert (row["kl"] is None) == (name != "held") and 0 <= row["clipped"] <= 1
        with torch.no_grad(), rl.reference_policy(adapted):
            base = rl.policy_logprobs(adapted, groups[0], 1.0)[0]
        with torch.no_grad():
            gap = base - rl.policy_logprobs(adapted, groups[0], 1.0)[0]
        away[name] = (gap.exp() - gap - 1).mean().item()
        adapted.unload()
        torch.testing.assert_close(base, torch.cat(common.packed_logprobs(model, groups[:1])[0]).detach(), atol=1e-5, rtol=0)
    assert moved["four"] > 1.5 * moved["one"] and away["held"] < away["four"]


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_moves_nothing_and_is_reported(rl, tiny, numbers, poison, monkeypatch):
    model, _ = tiny
    adapted = common.add_adapter(model, 4, 0)
    weights = [weight for weight in adapted.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-2)
    before = [weight.detach().clone() for weight in weights]
    groups = [(random_ids(numbers, 3, 9), [random_ids(numbers, 2, 6) for _ in range(3)])]
    if poison == "loss":
        loss = rl.policy_loss
        monkeypatch.setattr(rl, "policy_loss", lambda *args: loss(*args) * float("inf"))
    else:
        weights[0].register_hook(lambda grad: grad * float("nan"))
    row = rl.update(adapted, optimizer, groups, [[1.0, -0.5, -0.5]], grpo_arguments())
    assert row["nonfinite"] and row["adapter_change"] == 0 and all(torch.equal(a, b) for a, b in zip(before, weights))
    assert not optimizer.state and all(weight.grad is None for weight in weights)
    json.dumps(row, allow_nan=False)


def test_a_leaking_trace_never_earns_as_much_as_the_average_honest_one_of_its_group(rl, numbers):
    for _ in range(20):
        scores = [numbers.gauss(0, 1) for _ in range(6)]
        leaks = [numbers.choice([0.0, numbers.uniform(0.01, 1)]) for _ in range(6)]
        rewards = rl.gate(scores, leaks, 2.0)
        honest = [reward for reward, leak in zip(rewards, leaks) if leak == 0]
        leaking = [(reward, score, leak) for reward, score, leak in zip(rewards, scores, leaks) if leak > 0]
        assert honest == [score for score, leak in zip(scores, leaks) if leak == 0]
        assert all(reward < score and reward <= sum(honest) / max(len(honest), 1) - 2.0 * leak + 1e-9 for reward, score, leak in leaking)


def rl_arguments(run, tiny_folder, *more):
    return ["--run", str(run), "--model", str(tiny_folder), "--max-new-tokens", "8", "--rank", "4", "--epochs", "1", "--retries", "1",
            "--prompts", "2", "--group", "3", "--val-every", "2", "--save-every", "2", "--lr", "1e-2", "--reward", "likelihood", *more]


@pytest.fixture()
def prepared(stage, tmp_path, tiny_folder):
    write_turns(tmp_path / "turns.jsonl", conversations=12, turns=6)
    run = tmp_path / "run"
    stage("01_prepare").main(["--run", str(run), "--model", str(tiny_folder), "--source", f"turns:{tmp_path / 'turns.jsonl'}", "--max-action-tokens", "200", "--user", "ann", "--limit", "30"])
    return run


def adapter_of(folder):
    from safetensors.torch import load_file
    return load_file(folder / "adapter_model.safetensors")


def test_one_grpo_step_moves_the_adapter_and_leaves_the_base_bit_identical(rl, prepared, tiny, tiny_folder, tmp_path):
    before = {name: weight.clone() for name, weight in weights_of(tiny[0]).items()}
    loaded, keep = common.load_model, {}
    rl.load_model = lambda *args: keep.setdefault("model", loaded(*args))
    try:
        rl.main(rl_arguments(prepared, tiny_folder, "--steps", "1"))
    finally:
        rl.load_model = loaded
    after = weights_of(keep["model"][0])
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert max(weight.abs().max() for name, weight in adapter_of(prepared / "models" / "synthesizer").items() if "lora_B" in name) > 0
    step = common.read_rows(prepared / "rl.jsonl")[0]
    assert step["adapter_change"] > 0 and step["grad_norm"] > 0 and step["zero_variance"] == 0
    assert (prepared / "models" / "recon-grpo" / "made.json").is_file()
    pairs = common.read_rows(prepared / "pairs.jsonl")
    assert {row["id"] for row in common.read_rows(prepared / "traces" / "recon-grpo.jsonl")} == {pair["id"] for pair in pairs if pair["split"] == "train"}


def without_times(rows):
    return [{key: value for key, value in row.items() if not key.startswith("seconds")} for row in rows]


def test_grpo_stopped_between_checkpoints_ends_like_an_undisturbed_run(rl, prepared, tiny_folder, tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    shutil.copytree(prepared, whole)
    rl.main(rl_arguments(whole, tiny_folder, "--steps", "5"))
    update, calls = rl.update, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 4:                                              # step 3; the last checkpoint is after step 1
            raise KeyboardInterrupt
        return update(*args)

    monkeypatch.setattr(rl, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rl.main(rl_arguments(prepared, tiny_folder, "--steps", "5"))
    assert not (prepared / "models" / "synthesizer").exists()
    rl.main(rl_arguments(prepared, tiny_folder, "--steps", "5"))
    assert len(calls) == 4 + 3                                           # steps 2, 3 and 4 are done again
    assert without_times(common.read_rows(prepared / "rl.jsonl")) == without_times(common.read_rows(whole / "rl.jsonl"))
    one, other = (adapter_of(run / "models" / "synthesizer") for run in (whole, prepared))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (whole / "traces" / "recon-grpo.jsonl").read_bytes() == (prepared / "traces" / "recon-grpo.jsonl").read_bytes()


def test_grpo_killed_at_random_moments_ends_like_an_undisturbed_run(rl, prepared, tiny_folder, tmp_path, numbers):
    """SIGKILL to the real program, twice, wherever it stands; then the same rl.jsonl, adapter and traces."""
    whole = tmp_path / "whole"
    shutil.copytree(prepared, whole)
    prepared, whole = whole, prepared                        # this process holds the lock of the folder that it prepared
    settings = ("--steps", "10", "--val-every", "4", "--save-every", "3")
    rl.main(rl_arguments(whole, tiny_folder, *settings))
    command = [sys.executable, str(ROOT / "05_rl_train.py"), *rl_arguments(prepared, tiny_folder, *settings)]
    log = prepared / "rl.jsonl"
    changed = lambda: log.stat().st_mtime_ns if log.exists() else 0
    for _ in range(2):
        before = changed()
        program = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while program.poll() is None and changed() == before:             # the models are loaded, the first step is about to begin
            time.sleep(0.01)
        time.sleep(numbers.uniform(0, 4))
        program.kill()
        program.wait()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert without_times(common.read_rows(log)) == without_times(common.read_rows(whole / "rl.jsonl"))
    one, other = (adapter_of(run / "models" / "synthesizer") for run in (whole, prepared))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (whole / "traces" / "recon-grpo.jsonl").read_bytes() == (prepared / "traces" / "recon-grpo.jsonl").read_bytes()


def test_the_log_exposes_every_way_to_cheat_and_the_curves_are_drawn(rl, prepared, tiny_folder):
    rl.main(rl_arguments(prepared, tiny_folder, "--steps", "1"))
    first, last = common.read_rows(prepared / "rl.jsonl")
    for kind in ("val", "val_sampled"):
        for row in (first, last):
            assert {f"{kind}_{name}" for name in ("reward", "score", "other", "specific", "leak", "leak_1", "reworded", "stopped", "malformed", "length", "auc")} <= row.keys()
            assert 0 <= row[f"{kind}_auc"] <= 1 and row[f"{kind}_specific"] == pytest.approx(row[f"{kind}_score"] - row[f"{kind}_other"])
    assert {"reward", "reward_std", "score", "leak", "zero_variance", "length", "entropy", "grad_norm", "adapter_change", "seconds_sampling", "seconds_reward",
            "seconds_update", "missing_rewards", "empty", "nonfinite"} <= first.keys()
    assert (prepared / "rl.png").read_bytes().startswith(b"\x89PNG")


def test_other_settings_of_the_fit_do_not_cost_the_trained_synthesizer(rl, prepared, tiny_folder, capsys):
    rl.main(rl_arguments(prepared, tiny_folder, "--steps", "1"))
    before = adapter_of(prepared / "models" / "synthesizer")
    with pytest.raises(SystemExit):
        rl.main(rl_arguments(prepared, tiny_folder, "--steps", "1", "--fit-lr", "1e-4"))
    assert "fit_lr was 0.001, is now 0.0001. Remove it" in capsys.readouterr().err
    shutil.rmtree(prepared / "models" / "recon-grpo")
    rl.main(rl_arguments(prepared, tiny_folder, "--steps", "1", "--fit-lr", "1e-4"))
    assert all(torch.equal(before[name], weight) for name, weight in adapter_of(prepared / "models" / "synthesizer").items())
    assert (prepared / "models" / "recon-grpo").is_dir()


def test_an_interrupted_overwrite_does_not_pass_old_work_off_as_new(rl, prepared, tiny_folder, monkeypatch):
    rl.main(rl_arguments(prepared, tiny_folder, "--steps", "2"))
    with monkeypatch.context() as patch:
        patch.setattr(rl, "update", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            rl.main(rl_arguments(prepared, tiny_folder, "--steps", "2", "--overwrite"))
    for name in ("models/synthesizer", "models/recon-grpo", "traces/recon-grpo.jsonl", "rl/recon"):
        assert not (prepared / name).exists(), name
    rl.main(rl_arguments(prepared, tiny_folder, "--steps", "2"))
    assert [row["step"] for row in common.read_rows(prepared / "rl.jsonl")] == [0, 1, 2]


def test_training_can_be_continued_to_more_steps(rl, prepared, tiny_folder, tmp_path):
    whole = tmp_path / "whole"
    shutil.copytree(prepared, whole)
    rl.main(rl_arguments(whole, tiny_folder, "--steps", "4"))
    rl.main(rl_arguments(prepared, tiny_folder, "--steps", "2"))
    rl.main(rl_arguments(prepared, tiny_folder, "--steps", "4"))
    one, other = (adapter_of(run / "models" / "synthesizer") for run in (whole, prepared))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_group_without_variance_is_skipped_and_counted(rl, tiny, numbers):
    model, _ = tiny
    adapted = common.add_adapter(model, 4, 0)
    optimizer = torch.optim.AdamW([weight for weight in adapted.parameters() if weight.requires_grad], lr=1e-2)
    groups = [(random_ids(numbers, 3, 9), [random_ids(numbers, 2, 5) for _ in range(3)]) for _ in range(2)]
    args = grpo_arguments()
    row = rl.update(adapted, optimizer, groups, [[0.0] * 3, [0.0] * 3], args)
    assert row["zero_variance"] == 1 and row["adapter_change"] == 0 and row["grad_norm"] == 0
    row = rl.update(adapted, optimizer, groups, [[0.0] * 3, [1.0, -0.5, -0.5]], args)
    assert row["zero_variance"] == 0.5 and row["adapter_change"] > 0


@pytest.mark.parametrize("lost", [1, None])
def test_a_missing_reward_takes_no_part_and_is_never_taken_for_zero(rl, prepared, tiny_folder, monkeypatch, capsys, lost):
    """A score that is not a number must neither pull the group's mean nor earn an advantage; also if all are missing."""
    assert rl.gate([0.2, None, -0.4], [0, 0.5, 0], 2.0) == [0.2, None, -0.4] and rl.gate([0.2, None], [0.5, 0], 1.0) == [-0.5, None]
    score, update, seen = rl.likelihood_scores, rl.update, []

    def lossy(*args):
        scores, logprobs = score(*args)
        for row in scores if lost is None else scores[lost:lost + 1]:
            row["unsaid"] = row["likelihood"] = float("nan")
        return scores, logprobs

    def watched(model, optimizer, groups, advantages, args):
        seen.append((groups, advantages))
        return update(model, optimizer, groups, advantages, args)

    monkeypatch.setattr(rl, "likelihood_scores", lossy)
    monkeypatch.setattr(rl, "update", watched)
    rl.main(rl_arguments(prepared, tiny_folder, "--steps", "1"))
    (groups, advantages), = seen
    left = 0 if lost is None else 2
    assert all(len(some) == len(completions) == left and abs(sum(some)) < 1e-6 for some, (_, completions) in zip(advantages, groups))
    step, printed = common.read_rows(prepared / "rl.jsonl")[0], capsys.readouterr().out
    assert step["missing_rewards"] == 2 * (3 - left) and f"{2 * (3 - left)} rewards were missing" in printed
    assert (step["adapter_change"] > 0) == bool(left) and (step["reward"] is None) == (not left) and ("nothing to compare" in printed) == (not left)


@pytest.mark.parametrize("written, trace", [("Sam is tired. Sam wants to", "Sam is tired."), ("Sam is tired and wants", "Sam is tired and wants"),
                                            ("Is Sam tired? Sam is! Sam", "Is Sam tired? Sam is!"), ("Sam is sad. It costs 3.5", "Sam is sad.")])
def test_a_trace_at_the_token_limit_loses_its_unfinished_sentence(tiny, written, trace):
    _, tokenizer = tiny
    assert common.trace_of(tokenizer, common.Completion(tokenizer.encode(written))) == trace
    assert common.trace_of(tokenizer, common.Completion(tokenizer.encode(written), finished=True, end=1)) == written


def test_empty_and_unfinished_and_formless_traces_earn_less_than_the_others(rl, tiny, tiny_folder, monkeypatch):
    model, tokenizer = tiny
    texts = ["Sam feels tired of the weeds.", "", "I feel tired.", "Sam feels tired and", "Sam feels tired of gardens."]
    group = [common.Completion(tokenizer.encode(text), finished=True, end=1) for text in texts]
    args = argparse.Namespace(reward="specific", leak_penalty=0.5, reword_penalty=0.3)
    pair, other = make_pair(), make_pair("d/1", "nobody knows what the price of a ticket to rome is")
    monkeypatch.setattr(rl, "guard_traces", lambda encoder, traces, action, context: [{"leak": 0.0, "reworded": 0.0, "stopped": False} for _ in traces])
    rows, = rl.rate_recon(common.add_adapter(model, 4, 0), tokenizer, None, [pair], [other], [group], args)
    assert [row["malformed"] for row in rows] == [False, True, True, True, False]
    rl.gate_rows(rows, args.leak_penalty)
    assert max(rows[place]["reward"] for place in (1, 2, 3)) < (rows[0]["reward"] + rows[4]["reward"]) / 2
    assert rows[0]["reward"] == pytest.approx(rows[0]["score"] - rows[0]["other"])


def test_specific_credits_what_a_trace_adds_to_its_own_action_alone(rl, tiny, monkeypatch):
    """score and other are stage 3's own scores of the same trace, on the pair and on the other pair."""
    model, tokenizer = tiny
    pair, other = make_pair(), make_pair("d/1", "nobody knows what the price of a ticket to rome is")
    trace, adapted = "Sam feels tired of the weeds.", common.add_adapter(model, 4, 0)
    group = [common.Completion(tokenizer.encode(trace), True, 1)]
    monkeypatch.setattr(rl, "guard_traces", lambda *args: [{"leak": 0.0, "reworded": 0.2, "stopped": False}])
    args = argparse.Namespace(reward="specific", leak_penalty=0.5, reword_penalty=0.3)
    (row,), = rl.rate_recon(adapted, tokenizer, None, [pair], [other], [group], args)
    adapted.unload()
    own, foreign = (common.likelihood_scores(model, tokenizer, some, [trace])[0][0]["unsaid"] for some in (pair, other))
    assert row["reward"] == pytest.approx(own - foreign - 0.3 * 0.2, abs=1e-5)
    args.reward = "likelihood"
    adapted = common.add_adapter(model, 4, 0)
    (row,), = rl.rate_recon(adapted, tokenizer, None, [pair], [other], [group], args)
    adapted.unload()
    assert row["reward"] == pytest.approx(common.likelihood_scores(model, tokenizer, pair, [trace])[0][0]["likelihood"], abs=1e-5) and row["fault"] == 0
    assert row["score"] == pytest.approx(own, abs=1e-5)                       # measured alike whatever is rewarded


def test_the_other_pair_is_of_another_conversation_and_stays_the_same_for_a_seed():
    pairs = [make_pair(f"{conversation}/{turn}") for conversation in "cde" for turn in range(3)]
    chosen = common.other_pairs(pairs, pairs, 5)
    assert all(other["conversation"] != pair["conversation"] for pair, other in zip(pairs, chosen)) and chosen == common.other_pairs(pairs[::-1], pairs, 5)[::-1]
    assert len({tuple(other["id"] for other in common.other_pairs(pairs, pairs, seed)) for seed in range(4)}) > 1
    assert common.other_pairs(pairs[:1], pairs[:3], 5)[0]["id"] in ("c/1", "c/2") and common.other_pairs(pairs[:1], pairs[:1], 5) == pairs[:1]


@pytest.mark.parametrize("text, form", [
    ("Sam is worried about the exam and wants to sleep.", True), ("Sam hopes that Alex comes along.", True),
    ("Sam wants Sam to tell Sam about Sam's plans. Sam wants Sam to write Sam about Sam's plans.", False),
    ("Sam is worried about the exam.", True), ("Sam misses the sea.", True), ("Sam is worried about the exam and", False), ("I am worried about the exam.", False), ("You should know that Sam is sad.", False), ("We all know Sam.", False), ("Sam thinks you should go.", False), ("Sam: worried about the exam", False),
    ('Sam feels "so tired".', False), ("Sam feels tired.\nSam: hello", False), ("The exam is tomorrow.", False), ("Sam has an exam tomorrow at noon.", False), ("", False)])
def test_a_trace_is_about_sam_in_the_third_person_and_names_something_that_minds_do(text, form):
    assert common.is_trace(text) == form


def test_e2e_continues_from_an_adapter_and_says_so_if_there_is_none(rl, sft, prepared, tiny, tiny_folder, capsys):
    with pytest.raises(SystemExit) as caught:
        rl.main(rl_arguments(prepared, tiny_folder, "--steps", "1", "--objective", "e2e"))
    assert caught.value.code == 2 and "04_select_sft.py" in capsys.readouterr().err
    model, tokenizer = tiny
    backward = prepared / "models" / "backward"
    backward.parent.mkdir(exist_ok=True)
    sft.fit_user_model(model, [sft.user_example(tokenizer, make_pair(), "x")], fit_arguments(epochs=3), backward,
                       {"arguments": {"model": str(tiny_folder)}, "inputs": {"pairs.jsonl": common.file_hash(prepared / "pairs.jsonl")}})
    rl.main(rl_arguments(prepared, tiny_folder, "--steps", "1", "--objective", "e2e"))
    rows = [row for row in common.read_rows(prepared / "rl.jsonl") if row["objective"] == "e2e"]
    assert rows and (prepared / "models" / "e2e-grpo" / "adapter_model.safetensors").is_file()
    rl.main(rl_arguments(prepared, tiny_folder, "--steps", "1", "--objective", "e2e", "--kl", "0.5", "--updates", "2", "--overwrite"))
    row = [row for row in common.read_rows(prepared / "rl.jsonl") if row["objective"] == "e2e"][0]
    assert row["kl"] is not None and abs(row["kl"]) < 1                     # measured from the adapter it started from, not from the base
    assert {path.name for path in (prepared / "models" / "e2e-grpo").iterdir()} >= {"adapter_model.safetensors"} and not (prepared / "models" / "e2e-grpo" / "reference").exists()
    json.dumps(rows)
