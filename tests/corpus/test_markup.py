"""HTML out of scraped texts, and nothing else."""

from __future__ import annotations

import polars as pl
import pytest

from cllm4rec_dist.corpus.markup import strip_html
from tests.corpus.reading import Read


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("a<br/>b<br />c<BR>d", "a b c d"),
        ('<span id="t" class="a-size">\n Blue mug </span>', "Blue mug"),
        ("<div class='x'><b>big <i>news</i></b></div> tail", "big news tail"),
        ('<a href="http://x?a=1&b=2">link</a>', "link"),
        ("<img src='x' alt='>'/>Mug", "Mug"),
        ('<input type="hidden" id="v" value="" />watch', "watch"),
        ("<P ALIGN=center>Up</P>", "Up"),
        ("x &nbsp; y", "x y"),
        ("5 &lt; 6 &amp; 7 &gt; 3", "5 < 6 & 7 > 3"),
        ("&lt;b&gt;bold&lt;/b&gt; &amp;lt;br /&amp;gt;", "bold"),
        ("<!-- c -->x<script>var a=1;</script>y<style>.a{b:c}</style>", "x y"),
        ("<![CDATA[text]]>", "text"),
        ("text <br", "text"),
        ('text <span class="a-si', "text"),
        ("😀 &#128512; &#x1F600;", "😀 😀 😀"),
    ],
)
def test_tags_scripts_and_entities_go(text: str, clean: str) -> None:
    assert strip_html(pl.Series([text, None])).to_list() == [clean, None]


@pytest.mark.parametrize(
    "text",
    [
        "5 < 6 and 7 > 3",
        "if a<b then c>d",
        "I <3 this",
        "Price <$5",
        "List<String> x",
        "<http://a.b> <someone@mail.com>",
        "<unknown>",
        "AT&T R&D",
        "How to use document.write() properly",
        "The getTime() method explained",
        "function keys (12)",
        "function() is my favourite",
        "JavaScript: var x = 1 explained",
        "{color: red}",
    ],
)
def test_what_only_looks_like_markup_stays(text: str) -> None:
    assert strip_html(pl.Series([text])).to_list() == [text]


REMAINS = [
    "var aPageStart = (new Date()).getTime();",
    "\n  var ue_t0=ue_t0||+new Date();",
    "(function(f) {var _np=(window.P._namespace('x'))",
    "P.when('A', 'ready').execute(function(A){})",
    "window.ue_ihb = 1",
    ".a-box {color: red; margin: 0}",
]


@pytest.mark.parametrize("text", REMAINS)
def test_remains_of_scripts_are_no_texts(text: str) -> None:
    assert strip_html(pl.Series([text])).to_list() == [None]


def test_remains_of_scripts_are_counted(read: Read) -> None:
    reviews = "".join(f'{{"reviewerID": "A", "asin": "B{k}", "overall": 5, "unixReviewTime": {k}}}\n' for k in range(2))
    metadata = f'{{"asin": "B0", "title": "Mug"}}\n{{"asin": "B1", "title": "{REMAINS[0]}"}}\n'
    source = {"format": "amazon", "edition": "2018", "reviews": "r", "metadata": "m"}
    result = read({"r": reviews, "m": metadata}, **source)
    assert result.items == {"B0": ("Mug", None)}
    assert result.lost == {"text that is the remains of a script": (1, "m", 2, REMAINS[0])}
