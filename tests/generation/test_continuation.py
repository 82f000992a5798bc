"""Continuations: transformers' own greedy text, batches that are as each prompt alone, routes of
every token."""

import pytest
import torch
from conftest import make_nexus

from nexus_ds.checkpoint.loading import load_model
from nexus_ds.checkpoint.needs import Way
from nexus_ds.checkpoint.pieces import open_way
from nexus_ds.data.tokenizer import open_tokenizer
from nexus_ds.generation.continuation import Asked, continue_prompts, rows_at_once
from nexus_ds.generation.drawing import Drawing, shares
from nexus_ds.generation.prompts import tokenised

TEXTS = ("tree leaf root", "ship", "sum proof lemma graph prime rain . ship tree", "moss fern")
KINDS = ("dense", "token", "context")
DRAWN = Drawing(1.5, 0.9, seed=3)


@pytest.fixture(params=KINDS)
def checkpoint(request, tmp_path, dense_dir):
    if request.param == "dense":
        return dense_dir
    form = dict(router_input="context", row_norm="fixed") if request.param == "context" else {}
    return make_nexus(tmp_path / "nexus", top_k=2, **form)


def opened(checkpoint):
    tokenizer = open_tokenizer(checkpoint)
    prompts = [tokenised(tokenizer, text, text) for text in TEXTS]
    return load_model(checkpoint), tokenizer, prompts


@pytest.mark.parametrize("routed", [False, True])
def test_greedy_is_what_transformers_generates(checkpoint, routed):
    model, tokenizer, prompts = opened(checkpoint)
    if routed and "nexus" not in str(checkpoint):
        pytest.skip("a dense model has no routes")
    for prompt in prompts:
        ids = torch.tensor([prompt.ids])
        expected = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
        told = []
        [found] = continue_prompts(
            model, tokenizer, [prompt], Asked(8, routed=routed), tell=told.append
        )
        whole = tokenizer.decode(expected[0], skip_special_tokens=True)
        assert prompt.given.replace(" .", ".") + found.text == whole.replace(" .", ".")
        assert found.tokens == expected.shape[1] - ids.shape[1]
        assert told == found.said and sum(said.added for said in told) == found.tokens


@pytest.mark.parametrize("drawing", [Drawing(), DRAWN], ids=["greedy", "drawn"])
def test_a_batch_gives_what_each_prompt_gives_alone(checkpoint, drawing):
    model, tokenizer, prompts = opened(checkpoint)
    routed = "nexus" in str(checkpoint)
    together = continue_prompts(model, tokenizer, prompts, Asked(30, drawing, routed))
    for number, (prompt, found) in enumerate(zip(prompts, together, strict=True)):
        own = Drawing(drawing.temperature, drawing.top_p, drawing.seed + number)
        [alone] = continue_prompts(model, tokenizer, [prompt], Asked(30, own, routed))
        assert found.text == alone.text and found.tokens == alone.tokens
        assert [said.text for said in found.said] == [said.text for said in alone.said]
        for one, other in zip(found.said, alone.said, strict=True):
            if routed:
                assert one.decision.experts == other.decision.experts
                assert one.decision.weights == pytest.approx(other.decision.weights, abs=1e-5)


@pytest.mark.parametrize("drawing", [Drawing(), DRAWN], ids=["greedy", "drawn"])
def test_every_token_is_told_with_where_one_whole_pass_sends_it(nexus_dir, drawing):
    """The prompt's tokens and the last one, too; of texts that end early in a batch as well."""
    model, tokenizer, prompts = opened(nexus_dir)
    for found, prompt in zip(
        continue_prompts(model, tokenizer, prompts, Asked(12, drawing, routed=True)),
        prompts,
        strict=True,
    ):
        ids = [said.token for said in found.said]
        assert ids[: len(prompt.ids)] == prompt.ids
        assert len(ids) == len(prompt.ids) + found.tokens
        with torch.no_grad():
            output = model(input_ids=torch.tensor([ids]), output_router_logits=True)
        logits_LTE = torch.stack(output.router_logits)
        for place, said in enumerate(found.said):
            weight_LE = logits_LTE[:, place].softmax(-1)
            assert said.added == (place >= len(prompt.ids))
            assert said.decision.experts == weight_LE.argmax(-1).tolist()
            expected = pytest.approx(weight_LE.amax(-1).tolist(), abs=1e-5)
            assert said.decision.weights == expected


def test_draws_follow_the_models_own_logits(nexus_dir):
    """Of 400 seeds, the first token's frequencies: chi-squared within the 1 in 1000 bound."""
    model, tokenizer, [prompt, *_] = opened(nexus_dir)
    drawing = Drawing(0.8, 0.8)
    found = continue_prompts(model, tokenizer, [prompt] * 400, Asked(1, drawing))
    with torch.no_grad():
        scores = model(input_ids=torch.tensor([prompt.ids])).logits[:, -1]
    share_V = shares(scores, drawing)[0]
    drawn = torch.tensor([one.said[0].token for one in found])
    seen = torch.bincount(drawn, minlength=31)
    kept = share_V > 0
    assert seen[~kept].sum() == 0 and 5 < kept.sum() < 31
    expected = 400 * share_V[kept]
    total = ((seen[kept] - expected) ** 2 / expected).sum()
    # Wilson and Hilferty's normal approximation of the quantile 0.999
    freedom = int(kept.sum()) - 1
    assert total < freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3


def test_draws_repeat_and_more_tokens_change_none(nexus_dir):
    model, tokenizer, prompts = opened(nexus_dir)

    def text(tokens, seed):
        asked = Asked(tokens, Drawing(2.0, seed=seed))
        return continue_prompts(model, tokenizer, prompts[:1], asked)[0].text

    assert text(12, 1) == text(12, 1) != text(12, 2)
    assert text(12, 1).startswith(text(5, 1))


def test_settings_of_the_checkpoint_for_draws_are_not_taken(nexus_dir):
    """generation_config.json of an instruct model says top_k 20 and the like."""
    model, tokenizer, prompts = opened(nexus_dir)
    asked = Asked(12, Drawing(2.0, seed=1))
    expected = continue_prompts(model, tokenizer, prompts[:2], asked)
    for key, value in dict(do_sample=True, top_k=1, top_p=0.1, temperature=0.1).items():
        setattr(model.generation_config, key, value)
    assert continue_prompts(model, tokenizer, prompts[:2], asked) == expected
    model.generation_config.num_beams = 3
    assert continue_prompts(model, tokenizer, prompts[:2], asked) == expected


def test_each_prompt_has_its_own_room(nexus_dir):
    """Of 64 positions; a long neighbour takes none away."""
    model, tokenizer, _ = opened(nexus_dir)
    model.generation_config.eos_token_id = None
    prompts = [tokenised(tokenizer, "tree " * count, "it") for count in (62, 3, 63)]
    found = continue_prompts(model, tokenizer, prompts, Asked(20))
    assert [one.tokens for one in found] == [2, 20, 1]


def test_an_end_is_the_last_token(nexus_dir):
    model, tokenizer, prompts = opened(nexus_dir)
    [free] = continue_prompts(model, tokenizer, prompts[:1], Asked(6))
    ids = tokenizer(free.text).input_ids
    model.generation_config.eos_token_id = [30, ids[0]]
    found = continue_prompts(model, tokenizer, prompts, Asked(6, routed=True))
    assert found[0].tokens == 1
    assert [said.added for said in found[0].said] == [False] * 3 + [True]


def test_passes_are_counted(nexus_dir):
    model, tokenizer, prompts = opened(nexus_dir)
    steps = []
    found = continue_prompts(model, tokenizer, prompts, Asked(6), step=lambda: steps.append(1))
    assert len(steps) == max(one.tokens for one in found)


def test_layer_by_layer_it_is_the_same(checkpoint):
    model, tokenizer, prompts = opened(checkpoint)
    asked = Asked(5, DRAWN, routed="nexus" in str(checkpoint))
    streamed = open_way(checkpoint, "fp32", torch.device("cpu"), Way(streamed=True, rows=2))
    expected = continue_prompts(model, tokenizer, prompts, asked)
    found = continue_prompts(streamed, tokenizer, prompts, asked)
    assert [one.text for one in found] == [one.text for one in expected]
    for one, other in zip(found, expected, strict=True):
        for here, there in zip(one.said, other.said, strict=True):
            assert asked.routed is (here.decision is not None)
            assert not asked.routed or here.decision.experts == there.decision.experts


@pytest.mark.parametrize(
    ("rope", "longest", "rows"),
    [
        ({"rope_type": "default"}, 99, 4),
        ({"rope_type": "longrope", "original_max_position_embeddings": 32}, 32, 4),
        ({"rope_type": "longrope", "original_max_position_embeddings": 32}, 33, 1),
        ({"rope_type": "dynamic"}, 2, 1),
    ],
)
def test_prompts_that_would_change_each_others_positions_go_alone(dense_dir, rope, longest, rows):
    model = load_model(dense_dir)
    model.config.rope_parameters = {"rope_theta": 1e4} | rope
    assert rows_at_once(model, longest, 4) == rows
