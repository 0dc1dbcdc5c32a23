"""A small rule-based English sentence splitter.

Next-sentence pairs and sentence-aligned blocks tolerate a few wrong boundaries; speed (megabytes
per second) matters more. A regular expression proposes boundaries (a closing mark, white space,
something that may begin a sentence), and a few rules about abbreviations, initials and acronyms
reject some of them.
"""

import re

_OPENING = "\"'“‘«(["
_CLOSING = "\"'”’»)\\]"

# A closing mark with its quotes and brackets, white space, and a lookahead: anything but a
# lower-case ASCII letter may begin a sentence; other alphabets are checked in Python.
_CANDIDATE = re.compile(
    rf"(?<![.!?…])[.!?…]+[{_CLOSING}]*(?P<space>\s+)(?=[{re.escape(_OPENING)}]*[^\sa-z,;:\-–—])"
)
_OPENING_MARKS = re.compile(rf"[{re.escape(_OPENING)}]*")
_FIRST_WORD = re.compile(rf"[{re.escape(_OPENING)}]*([\w’']+)")
_LAST_WORD_CHARS = 24  # no abbreviation is longer

# Never the end of a sentence: a name or an explanation follows.
_NEVER_FINAL = frozenset(
    "mr mrs ms mme mlle messrs dr prof rev fr hon st ste mt ft gen lt col maj capt cmdr sgt cpl "
    "pvt adm brig gov sen rep pres supt insp eds trans cf vs v viz e.g i.e ca approx est pp nos "
    "vols figs eq".split()
)
# Not the end of a sentence before a number ("No. 5"); elsewhere many are words ("said no.").
_BEFORE_NUMBER = frozenset(
    "no vol fig ch sec art ed op nr jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues "
    "wed thu thurs fri sat sun".split()
)
# The end of a sentence only if the next word usually begins one. The letters stand for circa,
# born, died and page ("d. 1602"), or for themselves ("in house d. The").
_SOMETIMES_FINAL = frozenset(
    "jr sr inc co corp ltd bros etc esq dept univ assn ave blvd rd ph.d m.d b.a m.a u.s u.k u.n "
    "d.c a.m p.m b.c a.d al b c d p".split()
)
_STARTERS = frozenset(
    "a after all although an and another as at because before both but by despite during each even "
    "finally first following for from given he her here his how however i if in instead it its "
    "later like many most my new no not now of on once one only or other our she since so some "
    "such that the their then there these they this those though through thus to today two under "
    "until upon we what when where which while who why with within yet you your".split()
)


def split_sentences(text: str) -> list[str]:
    """Splits one paragraph into sentences, without the white space between them.

    Arguments:
      text: English prose; a line break counts as white space.

    Returns:
      Non-empty sentences; joined by single spaces, they give the text with normalised spaces at the
      boundaries.
    """
    sentences = []
    start = 0
    for match in _CANDIDATE.finditer(text):
        if _is_boundary(text, start, match):
            sentences.append(text[start : match.start("space")])
            start = match.end()
    sentences.append(text[start:])
    return [sentence for sentence in map(str.strip, sentences) if sentence]


def split_document(text: str) -> list[str]:
    """Sentences of a document whose paragraphs are separated by newlines, in order."""
    return [
        sentence
        for paragraph in text.split("\n")
        if paragraph
        for sentence in split_sentences(paragraph)
    ]


def cut_document(text: str) -> list[str]:
    """The sentences of `split_document`, each with the white space before it and the last with that
    after it: joined, they give the text. White space alone has no sentence."""
    pieces, end = [], 0
    for sentence in split_document(text):
        start, end = end, text.index(sentence, end) + len(sentence)
        pieces.append(text[start:end])
    return [*pieces[:-1], pieces[-1] + text[end:]] if pieces else []


def _is_boundary(text: str, start: int, match: re.Match[str]) -> bool:
    first = _OPENING_MARKS.match(text, match.end()).end()
    following = text[first : first + 1]
    if following.islower():
        return False
    mark = match.start()
    # Only a single full stop directly after a word can belong to an abbreviation.
    if text[mark] != "." or mark + 1 < len(text) and text[mark + 1] in ".!?…":
        return True
    words = text[max(start, mark - _LAST_WORD_CHARS) : mark].split()
    word = words[-1].lstrip(_OPENING) if words else ""
    if len(word) == 1 and word.isupper():
        # An initial ("J. Smith"); but "World War I. Later" and "at point A. The" do end.
        return word == "I" or _starts_sentence(text, match.end())
    lowered = word.lower()
    if lowered in _NEVER_FINAL:
        return False
    if lowered in _BEFORE_NUMBER:
        return not following.isdigit()
    if lowered in _SOMETIMES_FINAL or ("." in word and word.replace(".", "").isalpha()):
        return _starts_sentence(text, match.end())
    return True


def _starts_sentence(text: str, position: int) -> bool:
    word = _FIRST_WORD.match(text, position)
    return bool(word) and word[1].lower() in _STARTERS
