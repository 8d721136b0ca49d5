"""Stored queries: which of the model's own queries are kept, however they arrive, and what they cost."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agentmem.errors import MemoryCapExceeded
from agentmem.memory.ledger import Ledger
from agentmem.planning.model_shape import LayerShape
from agentmem.queries import Part, Source
from agentmem.reference_queries.stored import NORMS, QuerySample, random_bytes
from agentmem.testing import peak_allocated

LAW = settings(deadline=None, derandomize=True, max_examples=100)
LAYER = LayerShape(kv_heads=1, query_heads=2, key_dim=3, value_dim=3)
CHUNKS = st.lists(st.integers(1, 40), min_size=1, max_size=12)
SIZES = st.integers(1, 24)
GENERATOR = torch.Generator()


def asked(tokens: Sequence[int]) -> torch.Tensor:
    """The queries ``[2, n, 3]`` of these tokens: each says which token and head it is of."""
    places = torch.tensor(tokens, dtype=torch.float32)
    return torch.stack((places, places + 0.5)).unsqueeze(-1).repeat(1, 1, 3)


def sample(source: Source, size: int, chunks: Sequence[int] = ()) -> QuerySample:
    """A sample that was offered consecutive tokens in chunks."""
    made = QuerySample(Part(source, 1.0, 2.0), LAYER, size, torch.empty(0), Ledger(1 << 20))
    offer(made, 0, chunks)
    return made


def offer(made: QuerySample, first: int, chunks: Sequence[int]) -> int:
    """Offer chunks from a token on; return the token after them."""
    for chunk in chunks:
        made.offer(asked(range(first, first + chunk)), first)
        first += chunk
    return first


def kept(made: QuerySample) -> list[int]:
    """The tokens whose queries are held, ascending; both heads hold the same, and nothing is held twice."""
    reference = made.reference(GENERATOR, 0)
    if reference is None:
        return []
    tokens = reference.queries[0, :, 0].tolist()
    assert torch.equal(reference.queries, asked(tokens))
    assert len(set(tokens)) == len(tokens)
    return sorted(map(int, tokens))


def strided(count: int, size: int) -> list[int]:
    """Every stride-th of ``count`` tokens, at the first power of two at which no more than ``size`` are wanted."""
    stride = 1
    while len(range(0, count, stride)) > size:
        stride *= 2
    return list(range(0, count, stride))


EXPECTED = {
    "live": lambda count, size: list(range(max(0, count - size), count)),
    "context": strided,
}
KEPT = pytest.mark.parametrize("source", EXPECTED)


@KEPT
@LAW
@given(size=SIZES, chunks=CHUNKS)
def test_what_is_kept_depends_on_the_tokens_alone(source: Source, size: int, chunks: list[int]) -> None:
    """Live: the newest n. Context: every stride-th of everything. Chunks of any length give the same."""
    assert kept(sample(source, size, chunks)) == EXPECTED[source](sum(chunks), size)


@KEPT
@LAW
@given(size=SIZES, before=CHUNKS, lost=st.integers(1, 40), after=CHUNKS)
def test_a_forward_that_is_offered_again_leaves_no_trace(
    source: Source, size: int, before: list[int], lost: int, after: list[int]
) -> None:
    """Tokens of a forward that was taken back and is run again, in smaller pieces, are held once."""
    made = sample(source, size, before)
    first = sum(before)
    offer(made, first, [lost])  # taken back
    pieces = [7] * (lost // 7) + [1] * (lost % 7)
    offer(made, first, [*pieces, *after])

    assert kept(made) == EXPECTED[source](first + lost + sum(after), size)


@LAW
@given(size=SIZES, before=CHUNKS, lost=st.integers(1, 40), after=CHUNKS)
def test_context_forgets_a_forward_that_did_not_happen(
    size: int, before: list[int], lost: int, after: list[int]
) -> None:
    """Other tokens in the place of those taken back are the ones that are held, at regular distances."""
    made = sample("context", size, before)
    first, total = sum(before), sum(before) + sum(after)
    made.offer(asked(range(first, first + lost)) + 0.25, first)
    offer(made, first, after)
    tokens = kept(made)

    assert tokens == list(range(0, total, made.stride))
    assert len(tokens) <= size


def test_a_live_ring_that_shrank_holds_no_token_from_beyond_its_end() -> None:
    """While the ring is not full, what a forward left that was taken back is not handed out."""
    made = sample("live", 10, [3])
    made.offer(asked(range(3, 9)) + 0.25, 3)
    made.offer(asked([3]), 3)

    assert kept(made) == [0, 1, 2, 3]


@pytest.mark.parametrize("source", ["live", "context", "random"])
def test_nothing_is_handed_out_before_the_first_token(source: Source) -> None:
    """An empty sample is no reference."""
    assert sample(source, 8).reference(GENERATOR, 5) is None


@KEPT
def test_a_reference_is_a_view_with_its_part_s_weight(source: Source) -> None:
    """Nothing is copied; source and weight are the part's; no span of the transcript is named."""
    made = sample(source, 8, [5])
    reference = made.reference(GENERATOR, 3)

    assert reference is not None
    assert reference.queries.shape == (2, 5, 3)
    assert reference.queries.untyped_storage().data_ptr() == made.queries.untyped_storage().data_ptr()
    assert (reference.weight, reference.source, reference.span) == (2.0, source, None)


# ---- random directions


WIDE = LayerShape(kv_heads=2, query_heads=4, key_dim=32, value_dim=32)


def loud(dtype: torch.dtype = torch.float32) -> QuerySample:
    """A random part that saw 40 tokens whose query heads have norms of about 1, 10, 100 and 1,000."""
    queries = torch.randn(4, 40, 32, generator=torch.Generator().manual_seed(5))
    queries *= torch.tensor([1.0, 10.0, 100.0, 1000.0])[:, None, None] / 32**0.5
    made = QuerySample(Part("random"), WIDE, NORMS, torch.empty(0, dtype=dtype), Ledger(1 << 20))
    made.offer(queries.to(dtype), 0)
    return made


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
def test_random_queries_have_the_norms_of_live_ones(dtype: torch.dtype, tolerance: float) -> None:
    """Each query head's own: every drawn query is as long as the head's newest 16 are in the root mean square."""
    made = loud(dtype)
    reference = made.reference(torch.Generator().manual_seed(1), 50)
    expected = [(sum(float(x) ** 2 for query in head for x in query.double()) / NORMS) ** 0.5 for head in made.queries]

    assert reference is not None
    assert (reference.queries.shape, reference.queries.dtype) == ((4, 50, 32), dtype)
    norms = reference.queries.double().norm(dim=-1)
    torch.testing.assert_close(
        norms, torch.tensor(expected)[:, None].double().expand(4, 50), rtol=2 * tolerance, atol=0
    )


def test_random_queries_point_everywhere() -> None:
    """Directions are independent: the mean of many is near nothing, and no two are alike."""
    reference = loud().reference(torch.Generator().manual_seed(1), 400)
    assert reference is not None
    directions = torch.nn.functional.normalize(reference.queries[0].double(), dim=-1)

    assert float(directions.mean(0).norm()) < 3 / 400**0.5
    assert float((directions @ directions.T - torch.eye(400)).abs().max()) < 0.9


def test_random_queries_come_from_the_generator_alone() -> None:
    """The same state draws the same queries, the next draw others, and the global state is left alone."""
    made, state = loud(), torch.get_rng_state()
    draws = []
    for seed in (1, 1, 2):
        generator = torch.Generator().manual_seed(seed)
        first, second = made.reference(generator, 6), made.reference(generator, 6)
        assert first is not None
        assert second is not None
        assert not torch.equal(first.queries, second.queries)
        draws.append(first.queries)

    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal(state, torch.get_rng_state())


# ---- bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("source", ["live", "context", "random"])
def test_a_sample_allocates_what_the_ledger_holds(source: Source, dtype: torch.dtype) -> None:
    """Its bytes are fixed at birth and exact; offering tokens, halving included, allocates nothing."""
    ledger, like = Ledger(1 << 20), torch.empty(0, dtype=dtype)
    made: list[QuerySample] = []
    queries = torch.randn(4, 100, 32).to(dtype).transpose(0, 1).contiguous().transpose(0, 1)

    assert peak_allocated(lambda: made.append(QuerySample(Part(source), WIDE, 12, like, ledger))) == ledger.resident
    assert ledger.resident == made[0].held_bytes == 4 * 12 * 32 * dtype.itemsize
    assert peak_allocated(lambda: [made[0].offer(queries, first) for first in (0, 100, 200)]) == 0
    assert made[0].filled >= 6


def test_a_sample_that_does_not_fit_is_refused_before_it_is_allocated() -> None:
    """The ledger is asked first, with the name of what it is for."""
    ledger = Ledger(4 * 12 * 32 * 4 - 1)

    with pytest.raises(MemoryCapExceeded, match="stored queries needs"):
        QuerySample(Part("live"), WIDE, 12, torch.empty(0), ledger)
    assert ledger.resident == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 7, 300])
def test_drawing_allocates_no_more_than_planned(dtype: torch.dtype, tokens: int) -> None:
    """The profiler's peak is within what the plan counts, and what the plan counts is less than 1.5 times as much."""
    made = loud(dtype)
    peak = peak_allocated(lambda: made.reference(torch.Generator().manual_seed(1), tokens))
    planned = random_bytes(WIDE, tokens, dtype.itemsize)

    assert peak <= planned
    if tokens == 300 and dtype != torch.float32:
        assert planned <= 1.5 * peak


def test_slots_born_under_inference_mode_are_written_outside_it() -> None:
    """A sample takes queries in whatever mode they come."""
    with torch.inference_mode():
        made = sample("live", 4, [3])
    offer(made, 3, [2])

    assert kept(made) == [1, 2, 3, 4]
