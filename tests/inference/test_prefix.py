"""A prefix is its tokens, all before them and the salt, whatever the hash says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benthic.inference import prefix
from benthic.inference.blocks import BlockPool
from benthic.inference.generate import generate
from benthic.inference.prefix import salted
from benthic.model.sampling import SamplingParams
from tests.model.configs import CONFIGS, randomised, tiny

HASHES = {"as it is": prefix.hash_of, "of 1 bit": lambda parent, content: sum(content) & 1}


@pytest.fixture(params=HASHES, ids=lambda name: f"hash {name}")
def any_hash(request, monkeypatch):
    monkeypatch.setattr(prefix, "hash_of", HASHES[request.param])


def test_a_prefix_is_its_tokens_all_before_them_and_the_salt(any_hash):
    root = salted("")
    first = root.followed_by([1, 2])
    assert first == salted("").followed_by([1, 2])
    others = [root.followed_by([2, 1]), first.followed_by([1, 2]), salted("a").followed_by([1, 2])]
    different = [root, first, *others, root.followed_by([1, 2, 0]), salted("a"), others[2].followed_by([1, 2])]
    assert len(set(different)) == len(different)
    assert root != ""


def test_a_salt_that_reads_like_a_block_is_none(any_hash):
    block = salted("").followed_by([0x61])
    assert salted("a\0\0\0").content == block.content
    assert salted("a\0\0\0") != block


@given(st.lists(st.tuples(st.integers(0, 1), st.lists(st.integers(0, 3), min_size=1, max_size=4)), max_size=20))
def test_blocks_of_one_hash_are_found_by_their_content(sequences):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix, "hash_of", HASHES["of 1 bit"])
        pool, known = BlockPool(100), {}
        for salt, tokens in sequences:
            here = salted(str(salt))
            for end in range(1, len(tokens) + 1):
                here, content = here.followed_by([tokens[end - 1]]), (salt, *tokens[:end])
                assert pool.find(here) == known.get(content)
                if content not in known:
                    known[content] = pool.take()
                here = pool.publish(known[content], here)
                assert pool.prefix_of(known[content]) is here
        pool.check([[block] for block in known.values()])


@pytest.mark.parametrize("speculative", [False, True])
def test_a_hash_of_1_bit_gives_no_wrong_tokens_and_loses_no_hit(speculative, any_hash, make_engine):
    model, greedy = randomised(tiny(**CONFIGS["v3"])), SamplingParams(max_tokens=8, temperature=0)
    prompts = [[first, *range(2, 22), last] for first in (1, 2, 3) for last in (4, 5)]
    engine = make_engine(model, speculative, block_size=4, num_blocks=100)
    answers = engine.generate(prompts, greedy) + engine.generate(prompts, greedy)
    for prompt, answer in zip(2 * prompts, answers, strict=True):
        assert answer.token_ids == list(generate(model, prompt, greedy))
    assert [answer.cached_tokens for answer in answers[len(prompts) :]] == [20] * len(prompts)
    engine.scheduler.check()
