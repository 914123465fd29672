"""The corpus: splits share nothing, and prompts are real text with its real continuation."""

import random

import pytest

from bench.demo import corpus as corpus_module
from bench.demo.corpus import load_corpus, pieces, sample_prompt, split

_LONG = "a paragraph that is long enough to tie two documents together, because topics quote each other"


@pytest.fixture(scope="module")
def corpus() -> corpus_module.Corpus:
    return load_corpus()


def _long_paragraphs(documents: tuple[str, ...]) -> set[str]:
    return {
        " ".join(paragraph.split())
        for document in documents
        for paragraph in document.split("\n\n")
        if len(paragraph) >= 80
    }


@pytest.mark.parametrize("kind", ["docs", "code"])
def test_no_paragraph_occurs_in_two_splits(corpus, kind):
    parts = getattr(corpus, kind)
    uses = [_long_paragraphs(part) for part in (parts.pretraining, parts.training, parts.prompts, parts.held_out)]
    for index, first in enumerate(uses):
        for second in uses[index + 1 :]:
            assert not first & second


def test_code_and_documentation_share_no_paragraph(corpus):
    docs = corpus.docs.pretraining + corpus.docs.training
    assert not _long_paragraphs(docs) & _long_paragraphs(corpus.code.prompts + corpus.code.held_out)


def test_every_use_has_enough_text_and_one_byte_per_character(corpus):
    assert not corpus.code.pretraining
    for part in (corpus.docs.pretraining, corpus.docs.training, corpus.docs.prompts, corpus.docs.held_out):
        assert sum(map(len, part)) > 20_000
    for document in corpus.docs.prompts + corpus.code.prompts:
        assert document.isascii()


def test_loading_twice_gives_the_same_text(corpus):
    again = load_corpus()
    assert again == corpus
    assert again.digest() == corpus.digest()


def test_digest_tells_texts_apart():
    one = corpus_module.Split(("a", "b"), (), (), ())
    other = corpus_module.Split(("ab",), (), (), ())
    assert corpus_module.Corpus(one, one).digest() != corpus_module.Corpus(other, one).digest()


def test_documents_that_share_a_paragraph_stay_together():
    documents = {"x": f"only x\n\n{_LONG}", "y": f"{_LONG}\n\nonly y", **{f"z{i}": f"text {i}" * 40 for i in range(6)}}
    dealt = split(documents, (0.4, 0.3, 0.2, 0.1))
    homes = [
        {word for word in ("only x", "only y") if any(word in text for text in part)}
        for part in (dealt.pretraining, dealt.training, dealt.prompts, dealt.held_out)
    ]
    assert {"only x", "only y"} in homes
    together = next(
        part for part in (dealt.pretraining, dealt.training, dealt.prompts, dealt.held_out) if "only x" in str(part)
    )
    assert sum(text.count(_LONG) for text in together) == 1


def test_pieces_have_the_length_and_cover_the_documents_once():
    documents = ("abcdefgh", "ijklm")
    cut = pieces(documents, 4, seed=3)
    assert sorted(cut) == ["abcd", "efgh", "ijkl"]
    assert cut == pieces(documents, 4, seed=3)


def test_prompt_is_followed_by_its_reference():
    document = "".join(chr(33 + index % 90) for index in range(500))
    prompt, reference = sample_prompt(("short", document), 100, 32, random.Random(1))
    assert (len(prompt), len(reference)) == (100, 32)
    assert prompt + reference in document


def test_no_document_long_enough_is_an_error():
    with pytest.raises(ValueError, match="132 characters"):
        sample_prompt(("short",), 100, 32, random.Random(1))
