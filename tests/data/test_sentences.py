import pytest
from hypothesis import given
from hypothesis import strategies as st

from bipft_jax.data.corpus.sentences import cut_document, split_document, split_sentences


@pytest.mark.parametrize(
    "sentences",
    [
        ["It rained.", "We left!", "Did you?", "No…", "Well..."],
        ["Mr. Smith met Dr. J. R. Jones in St. Louis.", "They talked."],
        ["He lives in the U.S. Army base.", "She moved to the U.S.", "The rest stayed."],
        ["It cost 3.5 million (approx. 2 percent).", "That is a lot."],
        ["See Fig. 3 and pp. 4, vol. 2, no. 5, e.g. the second.", "Then stop."],
        ["Ada, d. 1852 in p. 3 of vol. b. 4, went to house d.", "The woman ran."],
        ["He said no.", "She sat.", "The sun shone on Sept. 3 at No. 7."],
        ["It ended World War I.", "The war was long."],
        ["“Are you awake, Katharine?”", "“Yes, I’m awake.", "What is it?”"],
        ["“At the Zoo?” she asked.", "He nodded."],
        ["(He was late.)", "Nobody cared [at all].", "[Then] it ended."],
        ["Built by Acme Inc. of Ohio.", "Sold to Acme Inc.", "It was cheap."],
        ["We met at 5 p.m. on Monday.", "1984 was published in 1949."],
        ["Über dem Haus.", "Émile war da."],
        ["Visit example.com or version 2.0.1 today.", "Thanks."],
        ["No end mark here"],
    ],
)
def test_sentences_are_found(sentences):
    assert split_sentences(" ".join(sentences)) == sentences


def test_a_lower_case_word_of_another_alphabet_continues_the_sentence():
    text = "Er sagte ... über alles nichts."
    assert split_sentences(text) == [text]


def test_paragraphs_end_sentences_and_white_space_makes_none():
    assert split_document("Title\nOne. Two.\n\n  \nThree") == ["Title", "One.", "Two.", "Three"]
    assert split_document(" \n") == []


@given(st.text(alphabet=st.sampled_from('aA Z.!?…"”’() \nÉé1\u00a0'), max_size=60))
def test_nothing_is_lost_or_invented(text):
    sentences = split_document(text)
    assert "".join("".join(sentences).split()) == "".join(text.split())
    assert all(sentence.strip() == sentence != "" for sentence in sentences)


@given(st.text(st.sampled_from("aB .!\n\t\u00a0"), max_size=30))
def test_a_document_can_be_cut_without_loss(text):
    pieces = cut_document(text)
    assert [piece.strip() for piece in pieces] == split_document(text)
    assert "".join(pieces) == text or not pieces and not text.strip()
