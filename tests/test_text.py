"""Tokenising: against scanners that share no code with the pipelines."""

import json
import resource
import string
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flax_lstm.config import TUTORIAL, DataConfig, UserError
from flax_lstm.text import TextTokenizer
from flax_lstm.vocabulary import fit

SHARED = Path(__file__).parents[2] / "shared" / "data"
WORDS = DataConfig(min_count=1)


def number_at(text, i):
    """End of the number that begins at i: digits, a dot, digits; or None."""
    j = i
    while j < len(text) and text[j].isdecimal():
        j += 1
    k = j + 1
    if j < len(text) and text[j] == "." and text[k : k + 1].isdecimal():
        while k < len(text) and text[k].isdecimal():
            k += 1
        return k
    return j if j > i else None


def reads(text, i, suffixes):
    """Whether text at i reads as some number followed by one of the suffixes."""
    end = number_at(text, i)
    return end is not None and text[end : end + 1] in suffixes and end < len(text)


def scan(text, match, replacement):
    """Replaces what `match(text, i)` ends at, from left to right."""
    out, i = [], 0
    while i < len(text):
        end = match(text, i)
        if end is None:
            out.append(text[i])
            i += 1
        else:
            out.append(replacement)
            i = end
    return "".join(out)


def run_of(text, i, belongs):
    while i < len(text) and belongs(text[i]):
        i += 1
    return i


def after(prefix, belongs):
    def match(text, i):
        start = i + len(prefix)
        if not text.startswith(prefix, i):
            return None
        end = run_of(text, start, belongs)
        return end if end > start else None

    return match


def price(text, i):
    if text[i] == "$":
        end = number_at(text, i + 1)
        return None if end is None or reads(text, i + 1, "%") else end
    end = number_at(text, i)
    if end is None or reads(text, i, "%") or text[end : end + 1] != "$":
        return None
    return end + 1


def plain_number(text, i):
    return None if reads(text, i, "%k") else number_at(text, i)


def signed_digits(text, i):
    start = i + (text[i] in "+-")
    end = run_of(text, start, lambda c: c in string.digits)
    return end if end > start else None


def link(text, i):
    for prefix in ("http://", "https://"):
        end = after(prefix, lambda c: not c.isspace())(text, i)
        if end:
            return end
    return None


def tutorial_words(text):
    """The eleven steps, one scan each, without regular expressions."""

    def is_word(c):
        return c.isalnum() or c == "_"

    text = text.lower()
    letters = string.ascii_letters
    text = scan(text, after("$", lambda c: c in letters), " <TICKER> ")
    text = scan(text, after("@", is_word), " <USER> ")
    text = scan(text, link, " <LINK> ")
    text = scan(text, price, " <PRICE> ")
    text = scan(text, plain_number, " <NUMBER> ")
    text = scan(text, signed_digits, " <NUMBER> ")
    text = scan(text, after("&", is_word), "")
    gone = set(string.punctuation) - {"<", ">"}
    text = "".join(c for c in text if c.isascii() and c not in gone)
    tags = {"<TICKER>", "<USER>", "<LINK>", "<PRICE>", "<NUMBER>"}
    words = [
        word if word in tags else word.replace("<", "").replace(">", "")
        for word in text.split()
    ]
    return [word for word in words if word]


TRICKY = [
    "$SPY to 250.5$ or $.5, 12.5% up; 14% 3.4k 12. 5 -7 +8",
    "see https://x.co/$SPY?a=1 @Bob_1 and http://",
    "S&P &amp; don't win-win <b>bold</b> <TICKER> <<x>> a<5>b $5% 7%$ $7k 1.2.3$",
    "emoji 🚀🚀 café “quoted” 5️⃣ ²³",
    "",
    "<—",
    "100$200 $1$2 .5. ..5 1..2 $ 5 5 $ 12%%",
]


@pytest.mark.parametrize("text", TRICKY)
def test_the_tutorials_eleven_steps_match_a_plain_scanner(text):
    tokenizer, _, _ = fit(TRICKY, TUTORIAL.data)
    assert tokenizer.tokens(text) == tutorial_words(text)


def test_the_tutorials_counts_on_its_own_file():
    """Published numbers: shared data notes on the StockTwits file."""
    if not SHARED.exists():
        pytest.skip("needs ../shared/data, which is not part of the project")
    import pyarrow.parquet as pq

    texts = pq.read_table(SHARED / "stocktwits_spy_2017.parquet")["text"].to_pylist()
    tokenizer, ids, offsets = fit(texts, TUTORIAL.data)
    lengths = np.diff(offsets)
    assert tokenizer.vocabulary_size == 31_981
    assert (len(ids), lengths.max(), (lengths == 0).sum()) == (1_267_980, 39, 1)
    counts = np.bincount(ids)
    assert counts[0] == 0
    assert (np.diff(counts[1:]) <= 0).all()
    assert [(counts[1:] == 1).sum(), (counts[1:] >= 5).sum()] == [17_975, 7_543]
    published = {
        "<TICKER>": 182_726,
        "<NUMBER>": 44_362,
        "<USER>": 24_165,
        "<LINK>": 5_396,
        "<PRICE>": 5_204,
    }
    for tag, count in published.items():
        assert counts[tokenizer.encode([_written(tag)])[0][0]] == count
    # Row by row against the scanner, on a slice that keeps the test quick.
    for text, words in zip(
        texts[::97], map(tokenizer.tokens, texts[::97]), strict=True
    ):
        assert words == tutorial_words(text)


def _written(tag):
    return dict(
        [
            ("<TICKER>", "$spy"),
            ("<NUMBER>", "7"),
            ("<USER>", "@bob"),
            ("<LINK>", "http://a"),
            ("<PRICE>", "$7"),
        ]
    )[tag]


def words_by_hand(text):
    """Words with apostrophes inside, a leading $ # @, or one other mark."""
    for tag in ("<br />", "<br>", "<br/>"):
        text = text.replace(tag, " ")
    text = text.replace("\u2019", "'").lower()
    found, i = [], 0
    while i < len(text):
        start, c = i, text[i]
        lead = c in "$#@" and text[i + 1 : i + 2].isalnum()
        if c.isalnum() or lead:
            i += lead
            while i < len(text) and (
                text[i].isalnum() or (text[i] == "'" and text[i + 1 : i + 2].isalnum())
            ):
                i += 1
            found.append(text[start:i])
        else:
            i += 1
            if not c.isspace() and c.isprintable():
                found.append(c)
    return found


@pytest.mark.parametrize(
    "text",
    [
        "I don't LIKE it!! Really<br /><br />good, 10/10.",
        "It’s $SPY, #win @Bob: 'quoted' rock'n'roll",
        "a\x00b\tc\nd\x85e  — … 日本 🚀",
        "",
    ],
)
def test_the_words_of_a_text_match_a_plain_scanner(text):
    tokenizer, _, _ = fit([text, "other"], WORDS)
    assert tokenizer.tokens(text) == words_by_hand(text)


def test_unknown_words_are_shown_as_written_and_counted():
    tokenizer, _, _ = fit(["good film"], WORDS)
    got = tokenizer.analyse(["A Good FILM indeed", ""])
    assert got[0].words == ["a", "good", "film", "indeed"]
    assert got[0].ids.tolist() == [1, 2, 3, 1]
    assert (got[0].unknown, got[0].truncated) == (2, False)
    assert (got[1].ids.size, got[1].words, got[1].unknown) == (0, [], 0)


def test_the_tutorial_skips_unknown_words_and_counts_them():
    tokenizer, _, _ = fit(["good film"], replace(TUTORIAL.data, max_length=2))
    got = tokenizer.analyse(["a good new film good zzz", "nothing known"])
    assert got[0].words == ["good", "film"]
    assert got[0].ids.tolist() == [1, 2]
    assert (got[0].unknown, got[0].truncated) == (2, True)
    assert (got[1].ids.size, got[1].unknown) == (0, 2)
    assert [i.tolist() for i in tokenizer.encode(["a good new film good"])] == [[1, 2]]


@pytest.mark.parametrize("config", [WORDS, TUTORIAL.data], ids=["words", "tutorial"])
def test_saving_and_loading_changes_nothing(config, tmp_path):
    texts = ["The film isn't good :( $SPY 12.5", "a b c d e"]
    tokenizer, _, _ = fit(texts, config)
    tokenizer.save(tmp_path / "tokenizer.json")
    again = TextTokenizer.load(tmp_path / "tokenizer.json")
    assert again.fingerprint() == tokenizer.fingerprint()
    assert (again.pipeline, again.max_length) == (config.pipeline, config.max_length)
    assert again.vocabulary_size == tokenizer.vocabulary_size
    for a, b in zip(again.encode(texts), tokenizer.encode(texts), strict=True):
        assert np.array_equal(a, b)
    other, _, _ = fit(texts[:1], config)
    assert other.fingerprint() != tokenizer.fingerprint()
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["normalizer"]["normalizers"].pop()  # the words stay, the ids do not
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    altered = TextTokenizer.load(tmp_path / "tokenizer.json")
    assert altered.fingerprint() != tokenizer.fingerprint()


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    for content in ("{}", "not json"):
        path.write_text(content)
        with pytest.raises(UserError, match="cannot read the tokenizer"):
            TextTokenizer.load(path)
    with pytest.raises(UserError, match="cannot read the tokenizer"):
        TextTokenizer.load(tmp_path / "absent.json")


def test_a_ten_megabyte_text_is_cut_before_it_costs_memory():
    tokenizer, _, _ = fit(["good film"], replace(WORDS, max_length=100))
    line = "good film " * 1_000_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    [ids] = tokenizer.encode([line])
    [got] = tokenizer.analyse([line])
    assert ids.tolist() == [2, 3] * 50
    assert got.truncated
    assert tokenizer.encode(["x" * 10_000_000])[0].tolist() == [1]
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    # Kilobytes. Two million tokens would be some 400 MB; a million characters of one
    # word with its alignment are below 100 MB.
    assert grown < 150_000


@pytest.mark.parametrize("config", [WORDS, TUTORIAL.data], ids=["words", "tutorial"])
def test_cutting_a_long_text_early_changes_no_kept_token(config):
    config = replace(config, max_length=300)
    text = " ".join(["A $SPY <br /> 12.5% up, don't sell http://a.b/c"] * 5000)
    tokenizer, _, _ = fit([text[:2000]], config)
    want = [w for w, _ in zip(tokenizer.tokens(text), range(300), strict=False)]
    by_hand = words_by_hand if config.pipeline == "words" else tutorial_words
    assert want == by_hand(text[:20_000])[:300]


def test_a_word_through_which_a_text_was_cut_is_not_kept():
    """40,000 characters are read for 2,500 tokens at first: the 2,500th is cut."""
    tokenizer, _, _ = fit(["abcdefghijklmno"], replace(WORDS, max_length=2500))
    [ids] = tokenizer.encode(["  " + "abcdefghijklmno " * 5000])
    assert ids.tolist() == [2] * 2500


def test_lone_surrogates_become_question_marks():
    tokenizer, _, _ = fit(["good ?"], WORDS)
    assert tokenizer.encode(["good \ud800"])[0].tolist() == [2, 3]
