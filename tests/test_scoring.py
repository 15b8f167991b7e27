"""Log-probs over a shared prefix against one row at a time, the scores made of them, and the controls of stage 3."""

import pytest
import torch
from conftest import make_pair, make_run, random_ids, run_stages

import common
from common import Candidate, Candidates, Leak, Scores


def slow_logprobs(model, before: list[int], leaf: list[int]) -> torch.Tensor:
    """The obvious version: one plain forward for one row."""
    logprobs = model(torch.tensor([before + leaf])).logits[0].float().log_softmax(-1)
    return torch.stack([logprobs[len(before) + at - 1, token] for at, token in enumerate(leaf)])


@pytest.mark.parametrize("way", ["plain", "past", "checkpointing", "one row", "padded"])
def test_a_tree_of_tokens_reads_as_its_rows_one_at_a_time_and_so_do_its_gradients(tiny, numbers, way):
    """A leaf that saw its neighbour, or a wrong position id, would change both."""
    model, prefix, one = tiny.model.requires_grad_(True), random_ids(numbers, 2, 12), way == "one row"
    stems = [[]] if one else [random_ids(numbers, 0, 5) for _ in range(numbers.randint(1, 3))]
    leaves = [[random_ids(numbers, 1, 6) for _ in range(1 if one else numbers.randint(1, 3))] for _ in stems]
    past = common.read_prefix(model, prefix[:numbers.randrange(1, len(prefix)) if way == "past" else 0])
    trees = [(prefix, stems, leaves)]
    if way == "padded":
        trees += [(random_ids(numbers, 1, 20), [[], [3, 4]], [[[5]], [[6, 7], [8]]]), ([2], [[]], [[[9, 1]]])]
    ours = common.shared_prefix_logprobs(model, trees, past=past, checkpointing=way == "checkpointing")
    slow = [[[slow_logprobs(model, prefix + stem, leaf) for leaf in some] for stem, some in zip(stems, leaves)]
            for prefix, stems, leaves in trees]
    ours, slow = (torch.cat(sum(sum(some, []), [])) for some in (ours, slow))
    torch.testing.assert_close(ours, slow, atol=1e-5, rtol=1e-5)
    names, weights = zip(*model.named_parameters())
    losses = ((some * torch.linspace(-1, 1, len(some))).sum() for some in (ours, slow))
    for name, *both in zip(names, *(torch.autograd.grad(loss, weights) for loss in losses)):
        torch.testing.assert_close(*both, atol=1e-4, rtol=1e-4, msg=name)


def test_likelihood_scores_equal_the_differences_of_plain_forwards(tiny):
    pair, actions = make_pair(setting="A garden."), [make_pair().action, "did you eat yet?", "I hate weeds and work"]
    traces = ["Ann feels tired.", "Sam wants to help with the weeds, which sounds like fun work."]
    ((found, plain),) = common.likelihood_scores(tiny, [(pair, traces, actions[1:])])
    context, mask_of = common.format_context(pair), common.credit_mask

    @torch.no_grad()
    def slow(trace: str | None, action: str) -> torch.Tensor:
        prompt = common.with_trace("transcript", trace, context=context, setting="A garden.")
        before = common.encode_prompt(tiny.tokenizer, prompt)
        return slow_logprobs(tiny.model, before, common.encode_data(tiny.tokenizer, action))

    actions = [f" {action}" for action in actions]             # as in "Sam: text"
    assert plain == pytest.approx(slow(None, actions[0]).mean().item(), abs=1e-4)
    for trace, scores in zip(traces, found):
        gains = [slow(trace, action) - slow(None, action) for action in actions]
        own, one, other = [(gain * torch.tensor(mask_of(tiny.tokenizer, trace, action, context))).mean().item()
                           for gain, action in zip(gains, actions)]
        assert scores == pytest.approx({"likelihood": gains[0].mean().item(), "masked_likelihood": own,
                                        "contrast": own - (one + other) / 2}, abs=1e-4)
    assert abs(found[1]["likelihood"] - found[1]["masked_likelihood"]) > 1e-3             # "sounds", "like", "work"


def test_scores_of_pairs_padded_into_one_forward_are_those_of_each_alone(tiny, numbers, monkeypatch):
    """As on a GPU: pairs of different lengths, numbers of traces and of other actions."""
    items = [(make_pair(action="we " * numbers.randint(2, 9), setting="here " * numbers.randint(1, 30)),
              ["Sam is tired."] * (k + 1), ["not me", "why though"][:k]) for k in range(3)]
    alone = [common.likelihood_scores(tiny, [item])[0] for item in items]
    reads, forward = [], common.shared_prefix_logprobs
    monkeypatch.setattr(common, "PADDED_TOKENS", 10**6)
    monkeypatch.setattr(common, "shared_prefix_logprobs",
                        lambda *rest, **more: reads.append(1) or forward(*rest, **more))
    padded = common.likelihood_scores(tiny, items)
    assert len(reads) == 1
    for (rows, plain), (ours, ours_plain) in zip(alone, padded):
        assert ours_plain == pytest.approx(plain, abs=1e-4)
        assert all(one == pytest.approx(other, abs=1e-4) for one, other in zip(rows, ours, strict=True))


@pytest.mark.parametrize("trace, action, context, share", [
    ("A b, c D too", "a b c d e", "", 0.5), ("a b c d e", "a b c d e", "a b c d", 0.5), ("b a c d", "a b c d", "", 0.0),
    ("Sam says oh yes", "oh yes", "", 1.0), ("Sam says oh and yes", "oh yes", "", 0.0), ("anything", "!!", "", 0.0)])
def test_ngram_leak_is_the_share_of_quoted_four_grams_that_the_context_does_not_hold(trace, action, context, share):
    assert common.ngram_leak(trace, action, context) == share


def test_words_in_other_forms_and_order_overlap_but_not_those_of_the_context_and_not_one_alone():
    action = "I love hiking but my knee hurts these days"
    overlap = lambda trace: common.stem_overlap(trace, action, "Alex: how is your knee?")
    assert overlap("his knee is hurting and he loved the hikes") == 0.75                          # not days
    assert overlap("the knee is bad") == overlap("Sam loves it") == 0.0


@pytest.mark.parametrize("trace, action, kept", [
    ("Sam writes: purple mice dance", "purple mice dance", ""), ("Sam isn’t sad", "The weeds isn't", "Theweeds"),
    ("the weeds in the garden", "the Garden needs weeds pulled", "theGardenneedspulled"),
    ("the certificate’s frame, guitars, selling", "sell the guitar, frame certificates", "the,")])
def test_copying_the_action_into_the_trace_earns_nothing_for_its_content_words(tiny, trace, action, kept):
    mask = common.credit_mask(tiny.tokenizer, trace, action, "my garden")
    ids = common.encode_data(tiny.tokenizer, action)
    assert len(mask) == len(ids)
    credited = "".join(tiny.tokenizer.decode([token]) for token, credit in zip(ids, mask) if credit)
    assert credited.replace(" ", "") == kept


def test_negatives_are_of_other_conversations_and_never_the_pair_whose_trace_is_the_control():
    pairs = [make_pair(f"c{number // 2}/{number}", f"action {number}") for number in range(10)]
    for place, pair in enumerate(pairs):
        drawn = [common.choose_negatives(pair, pairs, 3, "c4/8", seed) for seed in range(20)]
        allowed = {f"action {number}" for number in range(10) if number // 2 != place // 2 and number != 8}
        assert all(len(set(some)) == 3 for some in drawn) and set(sum(drawn, [])) == allowed
    assert common.choose_negatives(pairs[0], pairs[:2], 3, "") == []


def test_a_control_is_the_first_passing_trace_of_another_conversation_in_the_same_split(stage, monkeypatch):
    monkeypatch.setattr(common, "detect_leaks", lambda _, traces, *more: [
        Leak(leak=0.0, paraphrase=0.0, is_leak="leak" in trace) for trace in traces])
    pairs = {(name := f"{split}{number // 2}/{number}"): make_pair(name, f"action {name}", split)
             for number in range(6) for split in ("train", "test")}
    traces = {name: [f"leak {name}", f"fine {name}", "later"] for name in pairs} | {"test0/0": ["leak", "a leak"]}
    found = {name: Candidates(id=name, candidates=[Candidate(trace=trace, finished=True, tokens=3) for trace in some])
             for name, some in traces.items()}
    work = stage("03_reconstruct_score").prepare_work(None, list(pairs.values()), found, 4, 0)
    assert [item.id for item in work] == list(pairs) and "test0/0" in {item.control[0] for item in work}
    for item in work:
        other, peers = pairs[item.control[0]], [pair for pair in pairs.values() if pair.split == item.pair.split]
        foreign = [pair for pair in peers if pair.conversation != item.pair.conversation]
        assert other in foreign and item.control[1].trace == traces[other.id][other.id != "test0/0"]
        assert set(item.negatives) == {pair.action for pair in foreign if pair != other}


def test_every_row_of_stage_3_holds_reconstructions_of_its_traces_of_none_and_of_the_control(
        stage, tmp_path, tiny, tiny_folder):
    run_stages(stage, make_run(tmp_path, 3, 3, 3), tiny_folder,
               "02_sample_candidates --num-samples 2 --max-trace-tokens 9",
               "03_reconstruct_score --max-action-tokens 5 --negatives 2")
    rows = {row.id: row for row in common.read_rows(tmp_path / "scores.jsonl", Scores)}
    for pair in common.read_rows(tmp_path / "pairs.jsonl", common.Pair):                          # held-out pairs too
        row = rows.pop(pair.id)
        for trace, text in [*((some.trace, some.reconstruction) for some in (*row.candidates, row.control)),
                            (None, row.baseline_reconstruction)]:
            ((guess,),) = tiny.sample([[common.reconstruction_prompt(pair, trace)]], max_new_tokens=5, stop_text="\n")
            assert text == common.clean_action(guess.text)
        assert row.control.scores.keys() == {"likelihood", "masked_likelihood", "contrast", "embedding"}
        assert row.baseline.keys() == row.control.scores.keys() | {"action_logprob"}
    assert not rows


def test_own_over_control_is_the_share_of_comparisons_won_and_leaves_out_leaks_on_request(stage):
    def row(name: str, own: list[float | None], other: float, leak: int = 9) -> Scores:
        made = [{"trace": "x", "finished": True, "tokens": k, "leak": 0.0, "paraphrase": 0.0, "is_leak": k == leak,
                 "scores": {"s": score}} for k, score in enumerate([*own, other])]
        return Scores(id=name, candidates=made[:-1], control=made[-1] | {"id": "z"}, baseline={"s": 0.0}, calls={})

    scoring, conversations = stage("03_reconstruct_score"), {"a": "A", "b": "B"}
    rows = [row("a", [1.0, 2.0, 3.0], 2.0), row("b", [5.0, None, -1.0], 0.0, leak=0)]
    assert scoring.own_over_control(rows, conversations, "s", False) == (pytest.approx((0 + 0.5 + 1 + 1 + 0) / 5), None)
    assert scoring.own_over_control(rows, conversations, "s", True)[0] == pytest.approx((0 + 0.5 + 1 + 0) / 4)
    assert scoring.own_over_control(rows, conversations, "t", False) == (None, None)
    assert scoring.check_score([row("a", [-1.0, -2.0], 0.0), rows[0]], conversations, "s").no_trace_wins == 0.5
