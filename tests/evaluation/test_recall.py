"""Recall: what is planted where, answers against stock memory, and how a comparison goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from agentmem.errors import MemoryCapExceeded, SettingsRefused
from agentmem.evaluation import Document, Quiz, Recalled, Terms, default_text, documents, recall
from agentmem.evaluation.facts import FORMATS, Planted, facts
from agentmem.evaluation.recall import Answer, measure, rows, stream
from agentmem.evaluation.terms import Equal
from agentmem.testing import tiny_model
from support.shell import save_tokenizer

TOKENS, PREFIX = 900, 16
QUIZ = Quiz(tokens=TOKENS, facts=12)
TERMS = Terms(slots=64, keep_first=4, keep_recent=8, chunk=48)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One token per byte."""
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def planted(tokenizer: Any) -> tuple[Document, ...]:
    """Three documents of four facts."""
    return documents(tokenizer, default_text(), QUIZ, offset=100, keep_first=PREFIX)


@pytest.fixture(scope="module")
def model() -> Any:
    """A tiny random model."""
    return tiny_model("llama")


# ---- documents


def test_facts_stand_where_they_are_said_to_stand(tokenizer: Any) -> None:
    """Every statement lies whole in its span, behind the first end of a sentence from its depth on."""
    text = " ".join(f"It was hour {hour} of the day." for hour in range(200))
    for document in documents(tokenizer, text, QUIZ, keep_first=PREFIX):
        said = facts(QUIZ, document.index)
        assert len(document.ids) == TOKENS
        for place, (name, fact) in zip(document.facts, said, strict=True):
            assert place.format == name
            assert tokenizer.decode(document.ids[place.start : place.stop].tolist()) == fact.statement
            before = tokenizer.decode(document.ids[: place.start].tolist())
            begin = int(place.depth * TOKENS)
            assert before.endswith(".")
            assert "." not in before[begin:-1]
            assert PREFIX <= begin <= place.start


def test_without_an_end_of_a_sentence_a_fact_stands_48_tokens_on(tokenizer: Any) -> None:
    """A text without full stops is no reason to move a fact further."""
    (document,) = documents(tokenizer, "word " * 400, Quiz(tokens=TOKENS, facts=4))

    assert [place.start - int(place.depth * TOKENS) for place in document.facts] == [48] * 4


def test_the_rest_is_the_text_itself(tokenizer: Any, planted: tuple[Document, ...]) -> None:
    """With the facts taken out, what remains of a document is one stretch of the text; no two begin alike."""
    beginnings = set()
    for document in planted:
        kept = torch.ones(TOKENS, dtype=torch.bool)
        for place in document.facts:
            kept[place.start : place.stop] = False
        rest = tokenizer.decode(document.ids[kept].tolist())
        assert rest in default_text()
        beginnings.add(rest[:100])
    assert len(beginnings) == len(planted)


def test_a_question_ends_in_the_words_that_the_answer_completes(tokenizer: Any, planted: tuple[Document, ...]) -> None:
    """Asked ids are question then answer; the answer stands in the statement, behind the same subject."""
    for document in planted:
        for place, (_, fact) in zip(document.facts, facts(QUIZ, document.index), strict=True):
            asked = list(place.asked)
            assert tokenizer.decode(asked[: -place.answer]) == fact.question
            assert tokenizer.decode(asked[-place.answer :]) == fact.answer
            assert fact.answer in fact.statement


def test_every_format_comes_to_every_depth(planted: tuple[Document, ...]) -> None:
    """Formats take turns, so that depth and format are not one thing."""
    pairs = {(place.depth, place.format) for document in planted for place in document.facts}

    assert pairs == {(depth, name) for depth in QUIZ.depths for name in FORMATS}


def test_documents_follow_from_the_seed(tokenizer: Any, planted: tuple[Document, ...]) -> None:
    """The same quiz gives the same ids, another seed other facts in the same text; no subject is asked for twice."""
    again = documents(tokenizer, default_text(), QUIZ, offset=100, keep_first=PREFIX)
    other = documents(tokenizer, default_text(), Quiz(tokens=TOKENS, facts=12, seed=1), offset=100)

    assert all(
        torch.equal(one.ids, two.ids) and one.facts == two.facts for one, two in zip(planted, again, strict=True)
    )
    assert all(one.facts != two.facts for one, two in zip(planted, other, strict=True))
    for document in planted:
        assert len({place.asked[:-1] for place in document.facts}) == len(document.facts)


def test_a_short_text_gives_windows_over_each_other(tokenizer: Any) -> None:
    """A text of 1,000 tokens still gives three documents of 900, evenly spread."""
    text = default_text()[:1000]
    found = documents(tokenizer, text, QUIZ)
    starts = [text.index(tokenizer.decode(document.ids[:30].tolist())) for document in found]

    assert starts == [0, 50, 100]


def test_the_beginning_token_of_a_tokenizer_comes_first(tokenizer: Any) -> None:
    """A tokenizer that puts one before every text gets it before every document."""

    class Beginning:
        bos_token_id = 0

        def __call__(self, text: str, *, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[int]]:
            ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
            return {"input_ids": [0, *ids] if add_special_tokens else ids}

        def decode(self, ids: Any) -> str:
            return str(tokenizer.decode(ids))

    found = documents(Beginning(), default_text(), QUIZ)  # type: ignore[arg-type]

    assert [int(document.ids[0]) for document in found] == [0, 0, 0]
    assert all(len(document.ids) == TOKENS for document in found)


@pytest.mark.parametrize(
    ("quiz", "keep_first", "message"),
    [
        (Quiz(tokens=300, depths=(0.05,)), 16, "0.05 of 300 tokens is token 15, inside the prefix of 16"),
        (Quiz(tokens=400, depths=(0.1, 0.9)), 4, "leave no room for 2 facts"),
        (Quiz(tokens=100_000), 16, "but a document takes 100000"),
    ],
)
def test_a_quiz_that_does_not_fit_is_refused(tokenizer: Any, quiz: Quiz, keep_first: int, message: str) -> None:
    """A fact in the prefix, one past the end, a text that is too short."""
    with pytest.raises(SettingsRefused, match=message):
        documents(tokenizer, default_text(), quiz, keep_first=keep_first)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"depths": (0.5, 0.2)}, "must ascend"),
        ({"depths": (0.5, 1.0)}, "0 ≤ depth < 1"),
        ({"depths": ()}, "must ascend"),
        ({"formats": ("codes", "codes")}, "must be different"),
        ({"formats": ("riddles",)}, "'codes', 'names' or 'lists'"),
        ({"facts": 0}, "facts: .*got 0"),
    ],
)
def test_a_quiz_that_cannot_be_is_refused(values: dict[str, Any], message: str) -> None:
    """The message has the field and the value."""
    with pytest.raises(SettingsRefused, match=message):
        Quiz.of(**values)


# ---- answers


def drawn(count: int, seed: int) -> list[int]:
    """Random ids."""
    return torch.randint(2, 128, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def greedy(model: Any, ids: list[int], count: int) -> list[int]:
    """What the stock model goes on with."""
    found: list[int] = []
    for _ in range(count):
        found.append(int(model(input_ids=torch.tensor([ids + found]), use_cache=False).logits[0, -1].argmax()))
    return found


def document(model: Any, tokens: int = 200, stops: tuple[int, ...] = (20, 60, 120)) -> Document:
    """Facts that end at ``stops``; the first is asked for with the greedy answer, the others with random ones."""
    ids = drawn(tokens, 1)
    places = []
    for number, stop in enumerate(stops):
        question = drawn(6, 10 + number)
        answer = greedy(model, ids + question, 3) if number == 0 else drawn(3, 20 + number)
        places.append(Planted("codes", stop / tokens, stop - 10, stop, (*question, *answer), 3))
    return Document(0, torch.tensor(ids), tuple(places))


def test_full_memory_answers_as_the_stock_model(model: Any) -> None:
    """Log-probability and exactness of every answer are those of one stock forward over document and question."""
    asked = document(model)
    terms = Terms(slots=300, keep_first=0, keep_recent=0, chunk=48)

    found = measure(model, asked, terms.policy("full"), terms)

    assert [answer.exact for answer in found.answers] == [True, False, False]
    assert (found.num_compactions, [answer.compactions for answer in found.answers]) == (0, [0, 0, 0])
    for place, answer in zip(asked.facts, found.answers, strict=True):
        whole = torch.tensor([[*asked.ids.tolist(), *place.asked]])
        lines = model(input_ids=whole, use_cache=False).logits[0, -4:-1].detach().double().log_softmax(-1)
        expected = sum(float(line[token]) for line, token in zip(lines, place.asked[-3:], strict=True))
        assert answer.log_prob == pytest.approx(expected, abs=1e-4)
        assert answer.tokens == 3


def test_one_wrong_token_makes_an_answer_wrong(model: Any) -> None:
    """Exact means every token: the greedy answer with its last token changed is not exact."""
    asked = document(model)
    first = asked.facts[0]
    other = Planted(first.format, 0.1, 10, 20, (*first.asked[:-1], (first.asked[-1] + 1) % 128), 3)
    terms = Terms(slots=300, keep_first=0, keep_recent=0, chunk=48)

    found = measure(model, Document(0, asked.ids, (first, other)), terms.policy("full"), terms)

    assert [answer.exact for answer in found.answers] == [True, False]


def test_questions_do_not_see_each_other(model: Any) -> None:
    """Asked in another order, every fact gets the very same answer."""
    asked = document(model)
    policy = TERMS.policy("heavy-hitters")

    forward = measure(model, asked, policy, TERMS).answers
    backward = measure(model, Document(0, asked.ids, asked.facts[::-1]), policy, TERMS).answers

    assert forward == backward[::-1]


def test_compactions_count_from_the_first_that_could_touch_the_fact(model: Any) -> None:
    """200 tokens are compacted at 64, 96, 128, 160 and 192; a fact that reaches into the 8 recent tokens is spared."""
    asked = document(model, stops=(20, 56, 57, 120, 121, 184, 185))

    found = measure(model, asked, TERMS.policy("window"), TERMS)

    assert found.num_compactions == 5
    assert [answer.compactions for answer in found.answers] == [5, 5, 4, 3, 2, 1, 0]


def test_a_question_longer_than_a_chunk_is_refused(model: Any) -> None:
    """Its scratch was not planned for."""
    asked = document(model)
    long = Planted("codes", 0.1, 10, 20, tuple(drawn(60, 3)), 3)

    with pytest.raises(MemoryCapExceeded, match="peek: 59 ids"):
        measure(model, Document(0, asked.ids, (long,)), TERMS.policy("window"), TERMS)


# ---- comparisons


def pair(model: Any) -> list[Document]:
    """Two different documents."""
    other = document(model, tokens=180)
    return [document(model), Document(1, other.ids, other.facts)]


def test_window_and_full_are_always_measured(model: Any, tmp_path: Path) -> None:
    """Full memory first, window next, each once although they were asked for too."""
    found = list(stream(model, pair(model), ["heavy-hitters", "window", "full"], TERMS, cache_dir=tmp_path))

    assert [(each.policy, each.document) for each in found] == [
        (name, index) for name in ("full", "window", "heavy-hitters") for index in (0, 1)
    ]
    full, window, hitters = rows(found, "slots", 2)
    assert (full.recovered, window.recovered) in {(1.0, 0.0), (None, None)}
    assert (full.num_compactions, window.num_compactions, hitters.capacity) == (0, 5, 64)
    assert hitters.total_compactions == 5 + 4


def test_a_stopped_comparison_goes_on(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured before is found again; a second comparison has full memory already."""
    asked = pair(model)

    def stop(name: str, done: int) -> None:
        if name == "window" and done > 200:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(stream(model, asked, [], TERMS, cache_dir=tmp_path, progress=stop))
    measured: list[tuple[str, int]] = []

    def count(model: Any, document: Document, policy: Any, *rest: Any, **named: Any) -> Recalled:
        measured.append((policy.name, document.index))
        return measure(model, document, policy, *rest, **named)

    monkeypatch.setattr(recall, "measure", count)
    whole = list(stream(model, asked, [], TERMS, cache_dir=tmp_path))
    again = list(stream(model, asked, [], TERMS, cache_dir=tmp_path))
    list(stream(model, asked, [], TERMS.model_copy(update={"slots": 48}), cache_dir=tmp_path))

    assert whole == again
    assert measured == [("window", 1), ("window", 0), ("window", 1)]


def run(policy: str, log_probs: list[float], compactions: list[int], number: int = 0) -> Recalled:
    """A hand-made run: facts at depths 0.1 and 0.5, codes and names, answers of two tokens; above −1 they are exact."""
    answers = tuple(
        Answer(
            format=("codes", "names")[index % 2],
            depth=(0.1, 0.5)[index % 2],
            start=0,
            compactions=count,
            log_prob=value,
            tokens=2,
            exact=value > -1,
        )
        for index, (value, count) in enumerate(zip(log_probs, compactions, strict=True))
    )
    return Recalled(
        policy=policy, document=number, num_compactions=3, answers=answers, capacity=9, held=8, bytes=number + 1,
        seconds=2.0, compact_seconds=1.5,
    )  # fmt: skip


def test_recovered_lies_between_window_and_full() -> None:
    """(policy − window) / (full − window), over all facts, by depth, by format, and by the policy's own compactions."""
    equal: Equal = "slots"
    found = [
        *(run("full", [-0.5, -2.5], [0, 0], number) for number in (0, 1)),
        *(run("window", [-10.5, -22.5], [2, 1], number) for number in (0, 1)),
        *(run("p", [-0.5, -17.5], [2, 1], number) for number in (0, 1)),
    ]

    full, window, row = rows(found, equal, 2)

    assert (full.recovered, window.recovered) == (1.0, 0.0)
    assert row.recovered == pytest.approx((-9 + 16.5) / (-1.5 + 16.5))
    assert (row.facts, row.exact, row.log_prob, row.log_prob_per_token) == (4, 0.5, -9.0, -4.5)
    assert {key: (score.facts, score.recovered) for key, score in row.by_depth.items()} == {
        "0.1": (2, 1.0), "0.5": (2, 0.25),
    }  # fmt: skip
    assert list(row.by_format) == ["codes", "names"]
    assert {key: score.recovered for key, score in row.by_compactions.items()} == {"1": 0.25, "2": 1.0}
    assert list(full.by_compactions) == ["0"]
    assert (row.bytes, row.seconds, row.seconds_each, row.documents) == (2, 4.0, 0.5, 2)


def test_nothing_is_recovered_where_nothing_was_lost() -> None:
    """Where full memory is less than 0.1 nats better than window there is no ratio."""
    found = [run("full", [-1.0, -2.0], [0, 0]), run("window", [-1.05, -12.0], [0, 1]), run("p", [-3.0, -7.0], [0, 1])]

    row = rows(found, "slots", 1)[-1]

    assert row.by_depth["0.1"].recovered is None
    assert row.by_depth["0.5"].recovered == 0.5


def test_a_policy_that_is_not_finished_is_left_out() -> None:
    """Its mean would be over other facts than the others'; without both ends there is no table."""
    both = [run(name, [-1.0, -2.0], [0, 0], number) for name in ("full", "window") for number in (0, 1)]

    assert [row.policy for row in rows([*both, run("p", [-1.0, -2.0], [0, 0])], "slots", 2)] == ["full", "window"]
    assert rows(both[:3], "slots", 2) == ()
