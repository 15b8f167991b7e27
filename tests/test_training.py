"""SFT and GRPO: what the loss covers, what moves and what does not, and resuming."""

import argparse
import json
import shutil

import pytest
import torch
from conftest import make_pair, random_ids
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


def test_a_missing_score_is_never_taken_for_zero(sft, capsys):
    row = scored_row([-0.5, None, -0.7])
    assert sft.choose_trace("recon", row, "unsaid")["k"] == 0
    rows = [row, scored_row([None, None], name="c/2")]
    assert sft.rows_with_score(rows, "unsaid") == rows[:1] and "left out: 1 of 2" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        sft.rows_with_score(rows[1:], "unsaid")
    assert "03_reconstruct_score.py" in capsys.readouterr().err


def test_shuffled_gives_every_pair_the_trace_of_another(sft):
    rows = [scored_row([1.0], name=f"c/{i}") for i in range(9)]
    for i, row in enumerate(rows):
        row["candidates"][0]["trace"] = f"of {i}"
    chosen = sft.choose_traces("shuffled", rows, "unsaid", seed=5)
    assert [row["id"] for row in chosen] == [row["id"] for row in rows]
    assert sorted(row["trace"] for row in chosen) == sorted(f"of {i}" for i in range(9))
    assert all(row["trace"] != f"of {i}" for i, row in enumerate(chosen))


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
    return argparse.Namespace(**({"rank": 4, "epochs": 2, "batch": 2, "fit_lr": 1e-2, "seed": 0} | more))


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
        assert rl.group_advantages(rewards, True) == pytest.approx(((values - values.mean()) / values.std()).tolist())
    assert rl.group_advantages([0.3, 0.3, 0.3], True) == [0.0, 0.0, 0.0]


def test_the_policy_gradient_equals_weighted_log_probs_one_row_at_a_time(rl, tiny, numbers):
    model, _ = tiny
    model.requires_grad_(True)
    group = random_ids(numbers, 3, 9), [random_ids(numbers, 1, 7) for _ in range(4)]
    advantages = [numbers.gauss(0, 1) for _ in range(4)]
    loss, _ = rl.policy_loss(model, group, advantages, 50, 0.9)
    assert loss.item() == pytest.approx(-sum(a * len(ids) for a, ids in zip(advantages, group[1])) / 50, abs=1e-5)
    loss.backward()
    packed = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    prefix = group[0]
    for advantage, ids in zip(advantages, group[1]):
        logprobs = (model(torch.tensor([prefix + ids])).logits[0] / 0.9).log_softmax(-1)
        (-advantage * sum(logprobs[len(prefix) + at - 1, token] for at, token in enumerate(ids)) / 50).backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(packed[name], weight.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_leaking_traces_rank_below_every_honest_one_of_their_group(rl, numbers):
    for _ in range(20):
        scores = [numbers.gauss(0, 1) for _ in range(6)]
        leaks = [numbers.choice([0.0, numbers.uniform(0.01, 1)]) for _ in range(6)]
        rewards = rl.gate_leaks(scores, leaks, 2.0)
        honest = [reward for reward, leak in zip(rewards, leaks) if leak == 0]
        leaking = [reward for reward, leak in zip(rewards, leaks) if leak > 0]
        assert honest == [score for score, leak in zip(scores, leaks) if leak == 0]
        assert not honest or not leaking or max(leaking) < min(honest)


def rl_arguments(run, tiny_folder, *more):
    return ["--run", str(run), "--model", str(tiny_folder), "--max-new-tokens", "8", "--rank", "4", "--epochs", "1", "--retries", "1",
            "--prompts", "2", "--group", "3", "--val-every", "2", "--save-every", "2", "--lr", "1e-2", *more]


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
    shutil.rmtree(prepared / "models")
    (prepared / "traces" / "recon-grpo.jsonl").unlink()
    rl.main(rl_arguments(prepared, tiny_folder, "--steps", "4"))
    one, other = (adapter_of(run / "models" / "synthesizer") for run in (whole, prepared))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_group_without_variance_is_skipped_and_counted(rl, tiny, numbers):
    model, _ = tiny
    adapted = common.add_adapter(model, 4, 0)
    optimizer = torch.optim.AdamW([weight for weight in adapted.parameters() if weight.requires_grad], lr=1e-2)
    groups = [(random_ids(numbers, 3, 9), [random_ids(numbers, 2, 5) for _ in range(3)]) for _ in range(2)]
    args = argparse.Namespace(temperature=1.0)
    row = rl.update(adapted, optimizer, groups, [[0.0] * 3, [0.0] * 3], args)
    assert row["zero_variance"] == 1 and row["adapter_change"] == 0 and row["grad_norm"] == 0
    row = rl.update(adapted, optimizer, groups, [[0.0] * 3, [1.0, -0.5, -0.5]], args)
    assert row["zero_variance"] == 0.5 and row["adapter_change"] > 0


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
    json.dumps(rows)
