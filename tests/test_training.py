"""SFT and GRPO: which trace an arm takes, what the losses cover, what moves and what does not, and resuming."""

import importlib
import math
import shutil
from argparse import Namespace

import pytest
import torch
from conftest import make_pair, make_run, random_ids, release, run_stages
from safetensors.torch import load_file

import common
from common import Completion, Control, Scored, Scores

stage = importlib.import_module
sft, rl = stage("04_select_sft"), stage("05_rl_train")
SCORE = "contrast"


def make_scores(name, values, leaks=(), control="c/2") -> Scores:
    candidates = [Scored(trace=f"Sam is {name} {k}.", finished=True, tokens=5 + k, scores={SCORE: value}, leak=leak,
                         paraphrase=0.1, is_leak=leak > 0)
                  for k, (value, leak) in enumerate(zip(values, leaks or [0.0] * 9))]
    return Scores(id=name, candidates=candidates, baseline={SCORE: 0.0}, calls={},
                  control=Control(**candidates[0].model_dump(), id=control))


def write_scores(run, name, rows) -> None:
    inputs = {"pairs.jsonl": common.file_hash(run / "pairs.jsonl")}
    common.write_file(run / name, "".join(map(common.dump_row, rows)), {"arguments": {}, "inputs": inputs})


def train_ids(run) -> list[str]:
    return [pair.id for pair in common.read_rows(run / "pairs.jsonl", common.Pair) if pair.split == "train"]


def adapted(local):
    """The model with an adapter that does something (B starts at 0, where A has no gradient), and its weights."""
    model = common.add_adapter(local.model, 4, 0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return model, [weight for weight in model.parameters() if weight.requires_grad]


def adapter_of(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_each_arm_chooses_its_candidate_and_a_leak_only_if_all_leak():
    row = make_scores("c/1", [0.1, 0.9, 0.2, 0.4, -0.2, 0.0], [0.3, 0.5, 0, 0, 0, 0])
    rows = {"c/1": row, "c/2": make_scores("c/2", [0.1, 0.2, 0.5, 0.3], control="c/1")}
    for k, some in enumerate(row.candidates):
        some.scores["judge"] = float(k)
    chosen = {arm: sft.choose_trace(arm, row, rows, SCORE) for arm in sft.ARMS}
    assert {arm: choice.k for arm, choice in chosen.items()} == {
        "none": None, "backward": 0, "guarded": 2, "recon": 3, "judged": 5, "shuffled": 2, "longest": 5, "worst": 4}
    assert (chosen["none"].trace, chosen["recon"].trace) == (None, "Sam is c/1 3.") and chosen["backward"].is_leak
    assert (chosen["shuffled"].trace, chosen["shuffled"].score) == ("Sam is c/2 2.", 0.5)      # recon's, of the control
    leaks = make_scores("c/1", [0.1, 0.9, 0.4], [0.5, 0.6, 0.2])
    assert [sft.choose_candidate(arm, leaks, SCORE) for arm in ("recon", "worst", "backward")] == [2, 2, 0]


def test_scores_that_differ_by_rounding_tie_and_the_earlier_candidate_is_chosen(numbers):
    near, choose = (lambda: numbers.uniform(-0.4, 0.4) * sft.TIE_TOLERANCE), sft.choose_candidate
    for _ in range(50):
        row = make_scores("c/1", [value + near() for value in (-0.3, 0.4, -0.7, 0.4, -0.7)])
        assert [choose(arm, row, SCORE) for arm in ("recon", "worst")] == [1, 2]
        leaks = [0.3 + near(), 0.2 + near(), 0.2 + near()]
        assert choose("recon", make_scores("c/1", [0.9, 0.3, 0.4], leaks), SCORE) == 2
    step = 3 * sft.TIE_TOLERANCE
    row = make_scores("c/1", [0.4, 0.4 + step, -0.7, -0.7 - step])
    assert [choose(arm, row, SCORE) for arm in ("recon", "worst")] == [1, 3]


def test_a_missing_score_is_never_taken_for_zero(capsys):
    """A pair without the score is left out of all arms, and so is one whose control has none."""
    assert sft.choose_candidate("recon", make_scores("c/1", [-0.5, None, -0.4]), SCORE) == 2
    rows = [make_scores("c/1", [-0.5, None], control="c/4"), make_scores("c/2", [None, None], control="c/1"),
            make_scores("c/3", [0.1, 0.2], control="c/2"), make_scores("c/4", [0.1, 0.2], control="c/1")]
    assert sft.rows_with_score(rows, {row.id: row for row in rows}, SCORE) == [rows[0], rows[3]]
    assert "left out: 2 of 4" in capsys.readouterr().out


def test_all_arms_train_on_the_same_pairs_in_the_same_order(tiny_folder, tmp_path, numbers, monkeypatch, capsys):
    """That of pairs.jsonl, whatever that of the scores, fitted at once or one by one; a second start fits nothing."""
    arms, fit = ["none", "recon", "shuffled"], "04_select_sft --rank 4 --epochs 1 --lr 1e-2 --limit 5 --arms"
    runs = [make_run(tmp_path / name) for name in ("one", "other")]
    train = train_ids(runs[0])
    rows = [make_scores(name, [numbers.random(), numbers.random()], control=other)
            for name, other in zip(train, [*train[1:], train[0]])]
    write_scores(runs[0], "scores.jsonl", rows)
    write_scores(runs[1], "scores.jsonl", numbers.sample(rows, len(rows)))
    run_stages(stage, runs[0], tiny_folder, f"{fit} none,recon,shuffled")
    run_stages(stage, runs[1], tiny_folder, f"{fit} shuffled", f"{fit} recon,none")
    files = [[run / "models" / arm / "adapter_model.safetensors" for run in runs] for arm in arms]
    for arm, (one, other) in zip(arms, files):
        choices = [common.read_rows(run / "traces" / f"{arm}.jsonl", common.Choice) for run in runs]
        assert [row.id for row in choices[0]] == train[:5] and choices[0] == choices[1]
        assert one.read_bytes() == other.read_bytes()
    assert files[1][0].read_bytes() != files[2][0].read_bytes()
    monkeypatch.setattr(common, "load_model", lambda *_: pytest.fail("a model was loaded"))
    run_stages(stage, runs[0], tiny_folder, f"{fit} none,recon,shuffled")
    assert capsys.readouterr().out.count("is complete") == 3


def test_a_tag_takes_the_first_trace_that_passes_and_the_settings_of_the_other_arms(tiny_folder, tmp_path):
    run = make_run(tmp_path / "run", train=3)
    for name, leaks in (("scores.jsonl", [0, 0, 0]), ("scores.grpo.jsonl", [0.4, 0, 0])):
        write_scores(run, name, [make_scores(pair, [0.1, 0.2, 0.3], leaks, "c0/1") for pair in train_ids(run)])
    run_stages(stage, run, tiny_folder, "04_select_sft --arms backward --rank 3 --epochs 1 --seed 5",
               "04_select_sft --tag grpo --rank 8 --lr 1e-5")
    backward, grpo = (common.read_config(run / "models" / arm) for arm in ("backward", "recon-grpo"))
    assert backward["arguments"] == grpo["arguments"] and grpo["arguments"]["seed"] == 5
    assert "scores.grpo.jsonl" in grpo["inputs"] and "scores.jsonl" not in grpo["inputs"]
    assert [row.k for row in common.read_rows(run / "traces" / "recon-grpo.jsonl", common.Choice)] == [1, 1, 1]
    weights = adapter_of(run / "models" / "recon-grpo").items()
    assert {weight.shape[0] for name, weight in weights if "lora_A" in name} == {3}


def test_a_rating_that_is_missing_costs_all_arms_that_pair_whenever_they_are_fitted(tiny_folder, tmp_path):
    """Arms of different pairs could not be compared; the tag's set may miss other ratings, and needs none."""
    run = make_run(tmp_path / "run", train=5)
    ids, fit = train_ids(run), "04_select_sft --rank 4 --epochs 1 --arms"
    for file, missing in (("scores.jsonl", 1), ("scores.grpo.jsonl", 3)):
        rows = [make_scores(name, [0.1, 0.3], control=ids[0]) for name in ids]
        for place, row in enumerate(rows):
            for k, some in enumerate(row.candidates):
                some.scores["judge"] = None if place == missing else float(1 - k)
        write_scores(run, file, rows)
    run_stages(stage, run, tiny_folder, f"{fit} backward,recon", f"{fit} judged", "04_select_sft --tag grpo")
    chosen = {arm: common.read_rows(run / "traces" / f"{arm}.jsonl", common.Choice)
              for arm in ("backward", "recon", "judged", "recon-grpo")}
    assert all([row.id for row in rows] == [*ids[:1], *ids[2:]] for rows in chosen.values())
    assert [{row.k for row in chosen[arm]} for arm in ("recon", "judged")] == [{1}, {0}]


@pytest.mark.parametrize("trace", ["Sam feels fine", None])
def test_the_loss_covers_exactly_trace_action_and_end_token(tiny, trace):
    """Against transformers' own loss with labels of -100 on the prompt."""
    pair = make_pair()
    prompt, completion = sft.user_example(tiny.tokenizer, pair, trace)
    thought = "" if trace is None else f"{trace}\n</think>\n"
    assert tiny.tokenizer.decode(completion) == f"{thought}{pair.action}<|im_end|>"
    assert tiny.tokenizer.decode(prompt).endswith("<|im_start|>assistant\n" + ("<think>\n" if trace else ""))
    labels = torch.tensor([[-100] * len(prompt) + completion])
    expected = tiny.model(torch.tensor([prompt + completion]), labels=labels).loss
    torch.testing.assert_close(sft.completion_loss(tiny.model, [(prompt, completion)], len(completion)), expected)


def test_examples_in_one_row_have_the_loss_and_the_gradients_of_each_alone(tiny, numbers):
    model = common.add_adapter(tiny.model, 4, 0)
    examples = [(random_ids(numbers, 2, 9), random_ids(numbers, 1, 7)) for _ in range(5)]
    examples += [([*examples[0][0], 7], [9])]                                # begins as another one does
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in weights:
        torch.nn.init.normal_(weight, std=0.1)
    packed, alone = (torch.autograd.grad(sum(sft.completion_loss(model, row, 3) for row in rows), weights)
                     for rows in (sft.fill_rows(examples, 40), [[example] for example in examples]))
    for one, other in zip(packed, alone):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_gradients_in_float16_are_finite_and_those_of_float32_but_for_rounding(tiny_folder):
    """As on GPUs before Ampere: float32 adapters and losses keep small ones from vanishing."""
    gradients = {}
    for dtype in ("float32", "float16"):
        local = common.load_model(str(tiny_folder), False, dtype)
        model = common.add_adapter(local.model, 4, 0)
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        for place, weight in enumerate(weights):
            torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(place))
        example = sft.user_example(local.tokenizer, make_pair(), "Sam counts")
        found = torch.autograd.grad(sft.completion_loss(model, [example], 10_000), weights)
        gradients[dtype] = torch.cat([gradient.flatten() for gradient in found])
    assert gradients["float16"].dtype == torch.float32 and gradients["float16"].isfinite().all()
    error = (gradients["float16"] - gradients["float32"]).norm() / gradients["float32"].norm()
    assert error < 0.03


def test_rows_are_filled_in_order_up_to_their_room_and_a_longer_example_stands_alone(numbers):
    examples = [([0] * numbers.randint(1, 30), [0]) for _ in range(40)]
    rows, size = sft.fill_rows(examples, 25), lambda row: sum(len(prompt) + 1 for prompt, _ in row)
    assert sum(rows, []) == examples and all(size(row) <= 25 or len(row) == 1 for row in rows)
    assert all(size([*row, after[0]]) > 25 for row, after in zip(rows, rows[1:]))


def test_fitting_moves_the_adapter_lowers_the_loss_and_leaves_the_base_bit_identical(tiny):
    before = {name: weight.clone() for name, weight in tiny.model.state_dict().items()}
    args = Namespace(rank=4, epochs=10, batch_size=2, lr=1e-2, seed=0, checkpointing=False, row_tokens=300)
    pairs = [make_pair(action=f"number {i} is my answer") for i in range(4)]
    examples = [sft.user_example(tiny.tokenizer, pair, "Sam counts") for pair in pairs]
    model, losses = sft.fit_user_model(tiny.model, examples, args, "recon")
    assert len(losses) == 20 and losses[-1] < losses[0] - 0.3
    moved = [weight.abs().max() for name, weight in model.named_parameters() if "lora_B" in name]
    assert len(moved) == 14 and min(moved) > 0                               # 7 linear layers in each of 2 blocks
    after = model.unload().state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_gradients_through_a_4_bit_base_equal_those_through_its_dequantised_weights(tiny_folder, numbers):
    """Also after sampling, which on some CPUs makes bitsandbytes repack the weights for a kernel without a backward."""
    from bitsandbytes.functional import dequantize_4bit
    quantised, plain = (common.load_model(str(tiny_folder), four_bit, "float32") for four_bit in (True, False))
    layers = [pair for pair in quantised.model.named_modules() if type(pair[1]).__name__ == "Linear4bit"]
    for name, layer in layers:
        weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        plain.model.get_submodule(name).weight.data = weight.float()
    prompt, completions = random_ids(numbers, 3, 9), [random_ids(numbers, 1, 7) for _ in range(3)]
    common.generate(quantised.model, quantised.tokenizer, [(prompt, completions)], 3)
    gradients = []
    for local in (quantised, plain):
        model, weights = adapted(local)
        torch.cat(common.shared_prefix_logprobs(model, [(prompt, [[]], [completions])])[0][0]).sum().backward()
        gradients.append([weight.grad for weight in weights])
    assert len(layers) == 14 and len(gradients[0]) == 28
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


def test_checkpointed_activations_give_the_same_gradients_and_keep_less(tiny, numbers):
    model, weights = adapted(tiny)
    example, kept, gradients = (random_ids(numbers, 30, 40), random_ids(numbers, 5, 9)), [], []
    for checkpointing in (False, True):
        held = []
        keep = lambda tensor: held.append(tensor.numel()) or tensor
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = sft.completion_loss(model, [example], 3, checkpointing)
        gradients.append(torch.autograd.grad(loss, weights))
        kept.append(sum(held))
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)
    assert kept[1] < 0.5 * kept[0]


def test_advantages_are_against_the_honest_mean_and_never_reward_a_fault(numbers):
    assert rl.group_advantages([0.2, 3.0, -0.1], [False, True, False]) == pytest.approx([0.15, -0.05, -0.15])
    assert rl.group_advantages([9.0, 0.1, 0.1], [False, True, False]) == pytest.approx([0.6, -0.6, -0.6])
    assert rl.group_advantages([1.0, -1.0], [True, True]) == [0.0, 0.0]
    for _ in range(50):
        rewards = torch.tensor([numbers.gauss(0, 0.5) for _ in range(numbers.randint(2, 8))])
        faulty = torch.tensor([False, *(numbers.random() < 0.4 for _ in rewards[1:])])
        gaps = rewards - rewards[~faulty].mean()
        found = torch.tensor(rl.group_advantages(rewards.tolist(), faulty.tolist()))
        expected = torch.where(faulty, gaps.clamp(max=0) - rl.FAULT_MARGIN, gaps).clamp(-0.6, 0.6)
        torch.testing.assert_close(found, expected)
        assert (found[faulty] <= -rl.FAULT_MARGIN).all()


@pytest.mark.parametrize("objective, reward, expected, strict", [
    ("recon", "contrast", 0.4 - 0.02 - 0.05, True), ("recon", "likelihood", 0.7 - 0.05, False),
    ("e2e", "likelihood", 0.7 - 0.05, True), ("e2e", "cosine", 0.3, True)])
def test_the_reward_and_the_faults_are_those_of_its_name(objective, reward, expected, strict):
    args = Namespace(objective=objective, reward=reward, paraphrase_weight=0.1, limit_cost=0.05)
    seen = rl.Measured(likelihood=0.7, contrast=0.4, cosine=0.3, leak=0.5, paraphrase=0.2, unfinished=True)
    assert rl.reward_of(seen, args) == pytest.approx(expected) and not rl.is_faulty(seen, args)
    assert rl.is_faulty(rl.Measured(is_leak=True), args) == rl.is_faulty(rl.Measured(malformed=True), args) == strict


def test_rewards_are_measured_by_the_frozen_base_whatever_the_adapter_has_learnt(tiny, tiny_folder, encoder):
    pair, others = make_pair(), ["nobody knows what a ticket to rome costs"]
    traces = ["Sam feels tired of the weeds.", "it is a lot of work to me"]
    local = common.load_model(str(tiny_folder), False, "float32")
    ((plain, _),) = common.likelihood_scores(local, [(pair, traces, others)])
    tiny.model, _ = adapted(tiny)
    policy = rl.Policy(tiny, encoder, Namespace(objective="recon", reward="contrast"))
    cut = Completion(f"{traces[0]} Sam wants", False, 9, [])                 # to whole sentences
    (rows,) = policy.measure([(pair, [cut, Completion(traces[1], True, 7, [])], others)])
    for row, expected in zip(rows, plain):
        assert {key: getattr(row, key) for key in expected} == pytest.approx(expected, abs=1e-5)
    assert [(row.is_leak, row.malformed, row.unfinished, row.tokens) for row in rows] == [
        (False, False, True, 9), (True, True, False, 7)]
    policy.args = Namespace(objective="e2e", reward="cosine")
    told = [f"{traces[0]}\n</think>\nSam: {pair.action}", f"{traces[1]}\n</think>\nno", traces[1]]
    (rows,) = policy.measure([(pair, [Completion(text, True, 5, []) for text in told], others)])
    assert [row.likelihood for row in rows] == pytest.approx([plain[k]["likelihood"] for k in (0, 1, 1)], abs=1e-5)
    assert [row.malformed for row in rows] == [False, False, True] and not any(row.is_leak for row in rows)
    assert rows[0].cosine == pytest.approx(1) and rows[1].cosine < 0.7 and rows[2].cosine == -1


@pytest.mark.parametrize("text, kept", [("Sam is tired. Sam wants", "Sam is tired."), ("Sam is tired", "Sam is tired"),
                                        (" Is Sam tired? Sam is! Sam", "Is Sam tired? Sam is!")])
def test_the_tokens_behind_the_last_whole_sentence_are_not_credited(tiny, text, kept):
    ids, decode = tiny.tokenizer.encode(text), lambda ids: tiny.tokenizer.decode(ids).strip()
    completion = Completion(text.strip(), False, len(ids), ids)
    found = rl.credited_tokens(tiny.tokenizer, completion, cut=True)
    assert ids[:len(found)] == found and decode(found) == kept and decode(found[:-1]) != kept
    assert rl.credited_tokens(tiny.tokenizer, completion, cut=False) == ids
    ended = Completion(text.strip(), True, len(ids), ids, end=1)             # the policy chose to end there
    assert rl.credited_tokens(tiny.tokenizer, ended, cut=True) == [*ids, 1]


def slow_logprobs(model, prompt, ids, args):
    """log p and entropy by the definition of min-p: token by token, the one that was sampled always kept."""
    found = []
    for at, token in enumerate(ids):
        chances = (model(torch.tensor([prompt + ids[:at]])).logits[0, -1] / args.temperature).softmax(-1)
        allowed = chances >= args.min_p * chances.max()
        allowed[token] = True
        kept = chances[allowed] / chances[allowed].sum()
        found.append(((chances[token] / chances[allowed].sum()).log(), -(kept * kept.log()).sum()))
    return map(torch.stack, zip(*found))


def grpo_arguments(**more):
    settings = {"temperature": 0.8, "min_p": 0.1, "num_iterations": 1, "clip": 0.2, "checkpointing": False}
    return Namespace(**(settings | more))


@pytest.mark.parametrize("min_p", [0.0, 0.1, 0.3])
def test_log_probs_of_the_policy_equal_a_slow_version_of_min_p_with_gradients(tiny, numbers, min_p):
    """Groups of different lengths in one padded forward."""
    model, weights = adapted(tiny)
    groups = [rl.Group(random_ids(numbers, 3, 9), [random_ids(numbers, 1, 6) for _ in range(3)], []) for _ in range(2)]
    args, found = grpo_arguments(min_p=min_p), []
    slow = [torch.cat(parts) for parts in zip(*(slow_logprobs(model, group.prompt, ids, args)
                                                for group in groups for ids in group.completions))]
    for logprobs, entropy in (slow, rl.policy_logprobs(model, groups, args)):
        weighted = logprobs * torch.linspace(-1, 1, len(logprobs))
        found.append([logprobs, entropy, *torch.autograd.grad(weighted.sum(), weights)])
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("padded", [0, 4096])
@pytest.mark.parametrize("more", [{}, {"checkpointing": True}, {"num_iterations": 2}])
def test_an_update_equals_weighted_log_probs_one_row_at_a_time(tiny_folder, numbers, monkeypatch, more, padded):
    """With a group that compares nothing, whose tokens count in the mean; the second iteration is clipped."""
    monkeypatch.setattr(common, "PADDED_TOKENS", padded)
    args, shared, moved = grpo_arguments(**more), random_ids(numbers, 2, 9), []
    groups = [rl.Group(shared + random_ids(numbers, 1, 9), [random_ids(numbers, 1, 5) for _ in advantages], advantages)
              for advantages in ([0.5, -0.3, -0.2], [0.0, 0.0], [numbers.uniform(0.1, 0.6)])]
    rows = [(group.prompt, *pair) for group in groups for pair in zip(group.completions, group.advantages)]
    total = sum(len(ids) for _, ids, _ in rows)
    for slow in (False, True):
        model, weights = adapted(common.load_model(str(tiny_folder), False, "float32"))
        optimizer, olds = torch.optim.SGD(weights, lr=2.0), {}
        if not slow:
            seen = rl.update(model, optimizer, groups, args)
        for _ in range(args.num_iterations if slow else 0):
            loss = entropy = 0.0
            for place, (prompt, ids, advantage) in enumerate(rows):
                logprobs, spread = slow_logprobs(model, prompt, ids, args)
                for ratio in (logprobs - olds.setdefault(place, logprobs.detach())).exp():
                    loss = loss - min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage) / total
                entropy += spread.sum().item() / total * (advantage != 0)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(weights, 1.0).item()
            optimizer.step()
            optimizer.zero_grad()
        moved.append([weight.detach().clone() for weight in weights])
    assert (seen.pop("clipped") > 0) == (args.num_iterations > 1)
    expected = {"idle_groups": 1 / 3, "loss": loss.item(), "entropy": entropy, "grad_norm": norm}
    assert seen == pytest.approx(expected, rel=1e-3, abs=1e-5)
    torch.testing.assert_close(*moved, atol=1e-4, rtol=1e-3)


def test_the_ratio_is_clipped_only_where_that_lowers_the_objective():
    """Good tokens gain nothing above 1.2, bad ones nothing below 0.8, and what went wrong counts in full."""
    logprobs = torch.tensor([1.5, 0.5, 1.5, 0.5, 1.1]).log().requires_grad_()
    loss = rl.policy_loss(logprobs, torch.zeros(5), torch.tensor([1.0, 1.0, -1.0, -1.0, 2.0]), 0.2)
    assert loss.tolist() == pytest.approx([-1.2, -0.5, 1.5, 0.8, -2.2])
    loss.sum().backward()
    assert logprobs.grad.tolist() == pytest.approx([0.0, -0.5, 1.5, 0.0, -2.2])


def test_nothing_moves_without_a_comparison_or_with_a_gradient_that_is_not_finite(tiny, numbers, capsys):
    """The latter stops with one message."""
    model, weights = adapted(tiny)
    before, optimizer = [weight.detach().clone() for weight in weights], torch.optim.AdamW(weights, lr=1e-2)
    group = rl.Group(random_ids(numbers, 3, 9), [random_ids(numbers, 2, 6) for _ in range(2)], [0.0, 0.0])
    assert rl.update(model, optimizer, [group], grpo_arguments())["idle_groups"] == 1
    weights[0].register_hook(lambda grad: grad * math.nan)
    group.advantages = [0.5, -0.5]
    with pytest.raises(SystemExit):
        rl.update(model, optimizer, [group], grpo_arguments())
    assert all(map(torch.equal, before, weights)) and capsys.readouterr().err.count("\n") == 1


TRAIN = "05_rl_train --rank 4 --num-prompts 2 --num-generations 3 --val-every 2 --save-every 2"


@pytest.fixture()
def prepared(tmp_path, encoder, monkeypatch):
    monkeypatch.setattr(common, "load_encoder", lambda name: encoder)
    monkeypatch.setitem(common.PROMPTS, "synthesis", common.PROMPTS["synthesis"][::9])          # without its examples
    run = make_run(tmp_path / "run", train=6, val=1, test=0)
    common.write_file(run / "candidates.jsonl", "", {
        "arguments": {"temperature": 0.9, "min_p": 0.2, "max_trace_tokens": 7}, "inputs": {}})
    return run


def logged(run):
    return [row.model_dump(exclude={"seconds"}) for row in common.read_rows(run / "rl.jsonl", rl.Step)]


def test_training_stopped_at_any_step_or_told_to_go_on_ends_like_an_undisturbed_run(
        prepared, tiny_folder, tmp_path, monkeypatch, numbers, capsys):
    """And it samples as stage 2 did, whatever its own options say, with new noise each step but in validation."""
    update, sample, calls, options, noise, stop = rl.update, common.LocalModel.sample, [], set(), set(), [math.inf]
    train = f"{TRAIN} --reward likelihood --lr 1e-2 --steps"                 # this reward sees no faults

    def watched(model, optimizer, groups, args):
        calls.append((args.temperature, args.min_p))
        if len(calls) == stop[0]:
            raise KeyboardInterrupt
        return update(model, optimizer, groups, args)

    def listening(self, prompts, seeds, **more):
        options.add((more["temperature"], more["min_p"], more["max_new_tokens"]))
        noise.update(sum(seeds, []))
        return sample(self, prompts, seeds, **more)

    monkeypatch.setattr(rl, "update", watched)
    monkeypatch.setattr(common.LocalModel, "sample", listening)
    whole, longer = (shutil.copytree(prepared, tmp_path / name) for name in ("whole", "longer"))
    run_stages(stage, whole, tiny_folder, f"{train} 5 --temperature 0.3 --max-new-tokens 99")
    assert options == {(0.9, 0.2, 7)} and calls == [(0.9, 0.2)] * 5 and len(noise) == 5 * 2 * 3 + 4
    run_stages(stage, longer, tiny_folder, f"{train} 3", f"{train} 5")
    assert len(calls) == 5 + 3 + 2                                           # from the last checkpoint on
    calls.clear()
    stop[0] = at = numbers.randint(1, 5)
    with pytest.raises(KeyboardInterrupt):
        run_stages(stage, prepared, tiny_folder, f"{train} 5")
    release()
    run_stages(stage, prepared, tiny_folder, f"{train} 5")
    assert len(calls) == at + 5 - (at - 1) // 2 * 2                          # a checkpoint every 2 steps
    first, *others = (run / "models" / "synthesizer" / "adapter_model.safetensors" for run in (whole, longer, prepared))
    assert {path.read_bytes() for path in others} == {first.read_bytes()}
    assert logged(whole) == logged(longer) == logged(prepared) and len(logged(whole)) == 6
    assert max(weight.abs().max() for name, weight in load_file(first).items() if "lora_B" in name) > 0
    monkeypatch.setattr(common, "load_model", lambda *_: pytest.fail("a model was loaded"))
    run_stages(stage, prepared, tiny_folder, f"{train} 5")
    assert "is complete" in capsys.readouterr().out


def test_e2e_trains_the_user_model_on_from_backward(prepared, tiny_folder):
    """Which by then has learnt to close its think block; an action is written only where it is rewarded."""
    command = f"{TRAIN} --objective e2e --steps 2 --num-generations 6 --max-new-tokens 40 --lr 1e-4 --reward"
    rows = [make_scores("so", [0.1], control="c0/1").model_copy(update={"id": name}) for name in train_ids(prepared)]
    write_scores(prepared, "scores.jsonl", rows)
    run_stages(stage, prepared, tiny_folder, "04_select_sft --arms backward --rank 4 --epochs 25 --lr 2e-2")
    before, tokens = adapter_of(prepared / "models" / "backward"), []
    for reward in ("likelihood", "cosine"):
        run_stages(stage, prepared, tiny_folder, f"{command} {reward} --overwrite")
        after, step = adapter_of(prepared / "models" / "e2e-grpo"), logged(prepared)[0]
        change = max((before[name] - after[name]).abs().max().item() for name in before)
        assert 0 < change < 1e-3 and step["measured"]["malformed"] < 1 and step["reward"] == step["measured"][reward]
        tokens.append(step["measured"]["tokens"])
    assert tokens[0] < tokens[1] and -1 < step["reward"] < 1
