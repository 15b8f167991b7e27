"""Shared-prefix sampling against transformers' own generate, and the independence of rows."""

import torch
from conftest import random_ids

import common


def test_greedy_output_is_identical_to_plain_generate(tiny, numbers):
    """Prompts that share a beginning, prefixes and suffixes of unequal length, left padding inside the cache."""
    model, tokenizer = tiny
    for shared in (0, 7):
        start = random_ids(numbers, shared, shared)
        groups = [(start + random_ids(numbers, 1, 9), [random_ids(numbers, 1, 6) for _ in range(numbers.randint(1, 3))]) for _ in range(4)]
        ours = iter(common.generate(model, tokenizer, groups, 70))       # 70: beyond the spare room of the cache
        for prefix, suffixes in groups:
            for suffix in suffixes:
                plain = model.generate(torch.tensor([prefix + suffix]), attention_mask=torch.ones(1, len(prefix + suffix)), do_sample=False, max_new_tokens=70)[0, len(prefix + suffix):].tolist()
                mine = next(ours)
                assert mine.ids == [token for token in plain if token != tokenizer.eos_token_id]
                assert mine.finished == (tokenizer.eos_token_id in plain)


def test_one_prompt_for_all_rows_needs_no_second_prefill(tiny, numbers):
    model, tokenizer = tiny
    prompt = random_ids(numbers, 5, 9)
    a, b = common.generate(model, tokenizer, [(prompt[:-1], [prompt[-1:]] * 2)], 12)
    plain = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False, max_new_tokens=12)[0, len(prompt):].tolist()
    assert a.ids == b.ids == [token for token in plain if token != tokenizer.eos_token_id]


def test_a_sampled_row_does_not_depend_on_its_neighbours(tiny, numbers):
    model, tokenizer = tiny
    groups = [(random_ids(numbers, 3, 12), [random_ids(numbers, 1, 3)]) for _ in range(6)]
    together = common.generate(model, tokenizer, groups, 20, range(6), 1.0)
    for place in (5, 0, 3):
        alone = common.generate(model, tokenizer, [groups[place]], 20, [place], 1.0)[0]
        assert alone == together[place]


def test_other_seeds_draw_other_completions(tiny, numbers):
    model, tokenizer = tiny
    prompt = random_ids(numbers, 5, 9)
    drawn = common.generate(model, tokenizer, [(prompt[:-1], [prompt[-1:]] * 8)], 12, range(8), 1.0)
    assert len({tuple(completion.ids) for completion in drawn}) > 4


def test_samples_follow_the_softmax_of_the_logits_over_temperature(tiny, numbers):
    model, tokenizer = tiny
    prompt, count = random_ids(numbers, 5, 9), 4000
    with torch.no_grad():
        expected = (model(torch.tensor([prompt])).logits[0, -1] / 0.8).softmax(-1)
    drawn = common.generate(model, tokenizer, [(prompt[:-1], [prompt[-1:]] * count)], 1, [numbers.randrange(2**60) for _ in range(count)], 0.8)
    seen = torch.zeros_like(expected)
    for completion in drawn:
        seen[completion.ids[0] if completion.ids else tokenizer.eos_token_id] += 1 / count
    error = (expected * (1 - expected) / count).sqrt()
    assert ((seen - expected).abs() < 5 * error + 2 / count).all()


def test_min_p_leaves_out_unlikely_tokens(tiny, numbers):
    model, tokenizer = tiny
    prompt = random_ids(numbers, 5, 9)
    with torch.no_grad():
        p = model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    allowed = set((p >= 0.5 * p.max()).nonzero()[:, 0].tolist())
    drawn = common.generate(model, tokenizer, [(prompt[:-1], [prompt[-1:]] * 200)], 1, range(200), 1.0, min_p=0.5)
    assert {completion.ids[0] if completion.ids else tokenizer.eos_token_id for completion in drawn} <= allowed


def test_stop_text_ends_a_completion(tiny, numbers):
    model, tokenizer = tiny
    prompt = random_ids(numbers, 5, 9)
    free = common.generate(model, tokenizer, [(prompt[:-1], [prompt[-1:]])], 30)[0]
    text = tokenizer.decode(free.ids)
    letter = next(c for c in text if c.isalnum() and text.lstrip().find(c) > 0)
    stopped = common.generate(model, tokenizer, [(prompt[:-1], [prompt[-1:]])], 30, stop_text=letter)[0]
    assert stopped.finished and free.ids[:len(stopped.ids)] == stopped.ids
    assert letter in tokenizer.decode(stopped.ids) and letter not in tokenizer.decode(stopped.ids[:-1]).lstrip()


def test_sampling_works_through_an_adapter_and_leaves_the_base_alone(tiny, numbers):
    model, tokenizer = tiny
    prompt = random_ids(numbers, 5, 9)
    before = common.generate(model, tokenizer, [(prompt[:-1], [prompt[-1:]])], 10)
    adapted = common.add_adapter(model, 4, 0)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.5)
    changed = common.generate(adapted, tokenizer, [(prompt[:-1], [prompt[-1:]])], 10)
    with adapted.disable_adapter():
        assert common.generate(adapted, tokenizer, [(prompt[:-1], [prompt[-1:]])], 10) == before
    assert changed != before
    assert common.generate(adapted.unload(), tokenizer, [(prompt[:-1], [prompt[-1:]])], 10) == before
