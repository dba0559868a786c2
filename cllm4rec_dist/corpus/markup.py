"""Remove HTML from texts scraped from web pages, such as Amazon's titles, descriptions and reviews.

Tags are removed, scripts and styles with their content; entities become characters. Only HTML's tags count, so `5 < 6`
and `a <b and c> d` stay unchanged. A few titles of the 2018 collection are fragments of the page's scripts; they are
treated as missing.
"""

from __future__ import annotations

import polars as pl

from cllm4rec_dist.corpus.values import unescape_entities

_TAGS = (
    "a|abbr|address|article|aside|audio|b|big|blockquote|body|br|button|canvas|caption|center|cite|code|col|colgroup|dd|"
    "del|details|div|dl|dt|em|embed|figcaption|figure|font|footer|form|frame|h[1-6]|head|header|hr|html|i|iframe|img|"
    "input|ins|kbd|label|legend|li|link|main|map|mark|meta|nav|noscript|object|ol|option|p|param|picture|pre|q|s|samp|"
    "section|select|small|source|span|strike|strong|sub|summary|sup|svg|table|tbody|td|textarea|tfoot|th|thead|time|"
    "title|tr|tt|u|ul|var|video|wbr"
)
_VALUE = r"""\s*=\s*(?:"[^"]*"|'[^']*'|[^\s"'<>]+)"""
_FLAGS = "async|autoplay|checked|controls|defer|disabled|hidden|loop|multiple|muted|nowrap|readonly|required|selected"
_ATTRIBUTES = rf"(?:\s+(?:[\w:-]+{_VALUE}|(?:{_FLAGS})\b))*"
_COMMENT = r"(?s)<!--.*?-->|<!doctype[^>]*>"
_SCRIPT = r"(?is)<(?:script|style)\b[^>]*>.*?(?:</(?:script|style)\s*>|$)"
_TAG = rf"(?is)</?(?:{_TAGS}){_ATTRIBUTES}\s*/?>"
_CDATA = r"<!\[CDATA\[|\]\]>"
_CUT_TAG = rf"(?is)<(?:{_TAGS})\s+[\w:-]+=[^<>]*$|</?(?:br|p|div|span)\s*/?$"
"""A tag at the end of a truncated text."""
_SCRIPT_REMAINS = (
    r"(?s)\(new Date\(\)\)\.getTime\(\)|\baPageStart\b|\bue_t0\b|\bP\.when\(['\"]|"
    r"^\s*var\s+[\w$]+\s*=.*;|^\s*\(?function\s*[\w$]*\s*\([\w$,\s]*\)\s*\{|"
    r"^\s*window\.[\w.$]+\s*=[^=]|\bdocument\.\w+\(['\"]|^\s*[.#][\w-]+[\w\s.#,>-]*\{[^}]*:[^}]*\}|"
    r"^\s*[\w-]+\s*\{[^}]*:[^}]*;[^}]*\}"
)


def strip_html(texts: pl.Series) -> pl.Series:
    """Remove tags, comments, scripts and entities; null for fragments of scripts."""
    if texts.str.contains("<", literal=True).any():
        texts = _without(texts, _COMMENT, _SCRIPT, _CDATA, _TAG, _CUT_TAG)
    # Text that was escaped twice contains `&amp;lt;br /&amp;gt;`.
    texts = unescape_entities(unescape_entities(texts))
    texts = _without(texts, _SCRIPT, _TAG)
    texts = texts.str.replace_all(r"[ \t\u{a0}]*\s[\s\u{a0}]*|\u{a0}", " ").str.strip_chars()
    return texts.set(texts.str.contains(_SCRIPT_REMAINS).fill_null(False), None)


def _without(texts: pl.Series, *patterns: str) -> pl.Series:
    for pattern in patterns:
        texts = texts.str.replace_all(pattern, " ")
    return texts
