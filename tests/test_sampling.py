"""Shared-prefix sampling against transformers' own generate, and the independence of rows."""

import pytest
import torch
from conftest import make_pair, random_ids
from torch.multiprocessing.reductions import StorageWeakRef
from transformers.cache_utils import DynamicLayer

import common
from common import generate


@pytest.mark.parametrize("shared", [0, 7])
def test_greedy_output_is_identical_to_plain_generate(tiny, numbers, shared):
    """Prefixes and suffixes of unequal length, left padding inside the cache, rows that end and rows that go on."""
    start, end = random_ids(numbers, shared, shared), tiny.tokenizer.eos_token_id
    groups = [(start + random_ids(numbers, 1, 9), [random_ids(numbers, 1, 6) for _ in range(numbers.randint(1, 3))])
              for _ in range(4)]
    found = iter(generate(tiny.model, tiny.tokenizer, groups, 70))               # beyond the cache's spare room
    for prompt in (prefix + suffix for prefix, suffixes in groups for suffix in suffixes):
        plain = tiny.model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False,
                                    max_new_tokens=70)[0, len(prompt):].tolist()
        ours = next(found)
        ids = ours.ids + [ours.end] * ours.finished
        if ids == plain:
            assert ours.finished == (end in plain)
        else:                                              # two tokens as likely as each other, but for rounding
            at = next(at for at, (one, other) in enumerate(zip(ids, plain)) if one != other)
            logits = tiny.model(torch.tensor([prompt + plain[:at]])).logits[0, -1]
            assert (logits[ids[at]] - logits[plain[at]]).abs() < 1e-4


def test_a_prompt_is_sampled_in_its_group_and_batch_as_alone(tiny):
    """Through LocalModel.sample: groups that share a beginning, a group of equal prompts, a group of one."""
    pair, other = make_pair(), make_pair("d/1", context=[common.Turn(speaker="bo", text="so what")])
    groups = [[common.reconstruction_prompt(pair, trace) for trace in ("Sam is sad.", None, "Sam wants tea.")],
              [common.synthesis_prompt(other)] * 2, [common.user_prompt(pair, True)]]
    seeds = [[common.stable_seed(g, k) for k in range(len(group))] for g, group in enumerate(groups)]
    sample = lambda prompts, seeds: tiny.sample(prompts, seeds, max_new_tokens=12, temperature=1.0, min_p=0.1)
    together = sample(groups, seeds)
    alone = [[sample([[prompt]], [[seed]])[0][0] for prompt, seed in zip(*both)] for both in zip(groups, seeds)]
    assert together == alone
    assert together[1][0] != together[1][1]


@pytest.mark.parametrize("min_p", [0.0, 0.3])
def test_samples_follow_the_softmax_of_the_logits_over_temperature_without_what_min_p_leaves_out(tiny, numbers, min_p):
    prompt, count = random_ids(numbers, 5, 9), 4000
    with torch.no_grad():
        expected = (tiny.model(torch.tensor([prompt])).logits[0, -1] / 0.8).softmax(-1)
    expected[expected < min_p * expected.max()] = 0
    expected /= expected.sum()
    drawn = generate(tiny.model, tiny.tokenizer, [(prompt[:-1], [prompt[-1:]] * count)], 1,
                     [numbers.randrange(2**60) for _ in range(count)], 0.8, min_p)
    first = torch.tensor([(some.ids or [some.end])[0] for some in drawn])
    seen = torch.bincount(first, minlength=len(expected)) / count
    error = 5 * (expected * (1 - expected) / count).sqrt() + 4 / count
    assert ((seen - expected).abs() <= error * (expected > 0)).all()


def test_stop_text_ends_a_completion_and_stays_in_it(tiny, numbers):
    groups = [(random_ids(numbers, 5, 9), [random_ids(numbers, 1, 1)])]
    sample = lambda seed, **more: generate(tiny.model, tiny.tokenizer, groups, 30, [seed], 1.0, **more)[0]
    seed, free = next((seed, some) for seed in range(99) if len((some := sample(seed)).ids) > 20)
    letter = next(letter for letter in tiny.tokenizer.decode(free.ids)[1:] if letter.isalnum())
    cut = sample(seed, stop_text=letter)
    assert cut.finished and cut.end is None and free.ids[:len(cut.ids)] == cut.ids
    assert letter in tiny.tokenizer.decode(cut.ids) and letter not in tiny.tokenizer.decode(cut.ids[:-1])


def test_sampling_works_through_an_adapter_and_leaves_the_base_alone(tiny, numbers):
    groups = [(random_ids(numbers, 5, 9), [random_ids(numbers, 1, 1)])]
    sample = lambda model: generate(model, tiny.tokenizer, groups, 10)
    before, adapted = sample(tiny.model), common.add_adapter(tiny.model, 4, 0)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.5)
    assert sample(adapted) != before
    with adapted.disable_adapter():
        assert sample(adapted) == before
    assert sample(adapted.unload()) == before


def test_the_roomy_cache_gives_the_keys_of_transformers_own_and_keeps_one_buffer(numbers, monkeypatch):
    """Also while rows are selected and repeated: an old buffer is gone before the new one is looked at."""
    plain, roomy, rows, old, left, look = DynamicLayer(), common.RoomyLayer(), 6, [], [], common.RoomyLayer.look
    monkeypatch.setattr(common.RoomyLayer, "look", lambda layer, length: (
        left.extend(not buffer.expired() for buffer in old), look(layer, length))[1])
    for step in range(6):
        states = torch.randn(rows, 2, numbers.choice([1, 1, 90]), 4)
        assert all(map(torch.equal, *(layer.update(states, -states) for layer in (roomy, plain))))
        if step % 2:
            old = [StorageWeakRef(buffer.untyped_storage()) for buffer in roomy.room]
            index = torch.tensor(numbers.sample(range(rows), rows // 2))
            for layer in (roomy, plain):
                layer.batch_repeat_interleave(3) if step == 1 else layer.batch_select_indices(index)
            assert left == [False, False]
            rows, old, left = len(roomy.keys), [], []
        assert torch.equal(roomy.keys, plain.keys) and torch.equal(roomy.values, plain.values)
        assert [roomy.keys.data_ptr(), roomy.values.data_ptr()] == [buffer.data_ptr() for buffer in roomy.room]
        size, filled = 4 * rows * 2 * 4, roomy.keys.shape[2]
        assert all(buffer.untyped_storage().nbytes() <= size * (filled + 64) for buffer in roomy.room)
        assert step or roomy.room[0].shape[2] == filled + 64       # no copy at each of the next tokens
