"""Packed log-probs against one row at a time, and the scores made of them."""

import pytest
import torch
from conftest import make_pair, random_ids

import common


def slow_logprobs(model, prefix, suffix):
    """The obvious version: one plain forward for one prefix and one suffix."""
    logits = model(torch.tensor([prefix + suffix])).logits[0].float()
    logprobs = logits.log_softmax(-1)
    return torch.stack([logprobs[len(prefix) + at - 1, token] for at, token in enumerate(suffix)])


def random_groups(numbers, groups=3):
    return [(random_ids(numbers, 1, 12), [random_ids(numbers, 1, 9) for _ in range(numbers.randint(1, 4))]) for _ in range(groups)]


def test_packed_logprobs_equal_one_row_at_a_time(tiny, numbers):
    model, _ = tiny
    groups = random_groups(numbers)
    with torch.no_grad():
        for (prefix, suffixes), rows in zip(groups, common.packed_logprobs(model, groups)):
            for suffix, row in zip(suffixes, rows):
                torch.testing.assert_close(row, slow_logprobs(model, prefix, suffix), atol=1e-5, rtol=1e-5)


def test_packed_logprobs_can_leave_out_the_start_of_a_suffix(tiny, numbers):
    model, _ = tiny
    groups = [(random_ids(numbers, 2, 9), [random_ids(numbers, 5, 9) for _ in range(3)])]
    starts = [[0, 2, 4]]
    with torch.no_grad():
        whole, part = common.packed_logprobs(model, groups), common.packed_logprobs(model, groups, starts)
    for start, a, b in zip(starts[0], whole[0], part[0]):
        torch.testing.assert_close(a[start:], b)


def test_packed_gradients_equal_one_row_at_a_time(tiny, numbers):
    """A suffix that saw its neighbour, or a wrong position id, would change the gradient of the embeddings."""
    model, _ = tiny
    model.requires_grad_(True)
    groups = random_groups(numbers)
    weights = [[torch.randn(len(suffix)) for suffix in suffixes] for _, suffixes in groups]

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return {name: weight.grad.clone() for name, weight in model.named_parameters()}

    packed = gradients(sum((w * row).sum() for ws, rows in zip(weights, common.packed_logprobs(model, groups)) for w, row in zip(ws, rows)))
    slow = gradients(sum((w * slow_logprobs(model, prefix, suffix)).sum() for ws, (prefix, suffixes) in zip(weights, groups) for w, suffix in zip(ws, suffixes)))
    for name in packed:
        torch.testing.assert_close(packed[name], slow[name], atol=1e-4, rtol=1e-4, msg=name)


def test_reading_the_beginning_of_a_prefix_before_changes_neither_log_probs_nor_gradients(tiny, numbers):
    model, _ = tiny
    model.requires_grad_(True)
    prefix, suffixes = random_ids(numbers, 4, 20), [random_ids(numbers, 1, 6) for _ in range(numbers.choice([1, 3]))]
    cut = numbers.randrange(1, len(prefix))
    gradients = []
    for past in ([], common.read_prefix(model, prefix[:cut])):
        model.zero_grad()
        logits, rows = common.packed_logits(model, prefix, suffixes, past=past)
        (logits.log_softmax(-1)[torch.cat(rows), torch.tensor(sum(suffixes, []))] * torch.arange(1.0, 1 + sum(map(len, suffixes)))).sum().backward()
        gradients.append({name: weight.grad.clone() for name, weight in model.named_parameters()})
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], atol=1e-4, rtol=1e-4, msg=name)
    assert common.read_prefix(model, []) == []


def test_likelihood_score_equals_the_difference_of_plain_forwards(tiny):
    model, tokenizer = tiny
    pair, traces = make_pair(), ["Ann feels tired.", "Sam wants to help with the weeds, which sounds like fun."]
    scores, logprobs = common.likelihood_scores(model, tokenizer, pair, traces)
    action, context = common.encode_data(tokenizer, pair["action"]), common.show_context(pair)
    prefix, suffixes = common.reconstruction_prompt(tokenizer, context, [None, *traces], "transcript")
    with torch.no_grad():
        slow = torch.stack([slow_logprobs(model, prefix + suffix, action) for suffix in suffixes])
    torch.testing.assert_close(torch.tensor(logprobs), slow, atol=1e-4, rtol=0)
    for trace, row, score in zip(traces, slow[1:], scores):
        credit = torch.tensor(common.unsaid_mask(tokenizer, trace, pair["action"], context))
        assert score["likelihood"] == pytest.approx((row - slow[0]).mean().item(), abs=1e-4)
        assert score["unsaid"] == pytest.approx(((row - slow[0]) * credit).sum().item() / len(action), abs=1e-4)


def test_leak_share_counts_copied_four_grams_that_the_context_does_not_hold():
    action = "one two three four five"                                     # two 4-grams
    assert common.leak_share("he said One two, three FOUR then", action, "") == 0.5
    assert common.leak_share("one two three four five", action, "") == 1.0
    assert common.leak_share("one two three four five", action, "one two three four") == 0.5
    assert common.leak_share("one two three and four five", action, "") == 0.0


def test_leak_share_of_a_short_action_takes_it_as_a_whole():
    assert common.leak_share("Sam says oh yes now", "oh yes", "") == 1.0
    assert common.leak_share("Sam says oh and yes", "oh yes", "") == 0.0
    assert common.leak_share("anything", "!!", "") == 0.0


def test_unsaid_mask_withholds_credit_for_content_words_that_the_trace_gives_away(tiny):
    _, tokenizer = tiny
    action, context = "the Garden needs weeds pulled", "Alex: my garden is big"
    mask = common.unsaid_mask(tokenizer, "the weeds in the garden", action, context)
    tokens = tokenizer(action, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    withheld = {action[start:end].strip() for (start, end), credit in zip(tokens, mask) if not credit}
    assert "".join(action[s:e] for (s, e), credit in zip(tokens, mask) if not credit).strip() == "weeds", withheld
    assert len(mask) == len(common.encode_data(tokenizer, action))


def test_copying_the_action_into_the_trace_earns_nothing_for_its_content_words(tiny):
    _, tokenizer = tiny
    action = "purple elephants dance"
    offsets = tokenizer(action, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    mask = common.unsaid_mask(tokenizer, f"Sam writes: {action}", action, "")
    assert not any(credit for (start, end), credit in zip(offsets, mask) if action[start:end].strip())
