"""One small file of each data set's exact form, read right."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.corpus.reading import Content, Read, Refuse

INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"


def recbole(**options: Any) -> dict[str, Any]:
    return {"format": "recbole", "interactions": "x.inter"} | options


def test_recbole(read: Read) -> None:
    files: dict[str, Content] = {
        "x.inter": INTER + "1\t2\t3\t881250949\n1\t3\t4.0\t881250950\n",
        "x.item": "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
        '2\tToy Story\t1995\tAnimation Comedy\n3\t"Quoted" film\t\t\n',
        "x.user": "user_id:token\tage:float\tgender:token\toccupation:token\tzip:token\n1\t24.0\tM\twriter\t8571\n",
    }
    result = read(files, **recbole(items="x.item", users="x.user"))
    assert result.pairs == [("1", "2"), ("1", "3")]
    assert result.column("rating") == [3.0, 4.0]
    assert result.items == {
        "2": ("Toy Story", "released in 1995, genres: Animation Comedy"),
        "3": ('"Quoted" film', None),
    }
    assert result.users == {"1": "24 years old, male, writer"}
    assert not result.lost


def test_recbole_without_rating_and_time(read: Read) -> None:
    result = read({"x.inter": "user_id:token\titem_id:token\n1\t2\n"}, **recbole())
    assert result.pairs == [("1", "2")]
    assert result.column("rating") == [None]


def test_recbole_with_another_separator(read: Read, refuse: Refuse) -> None:
    files: dict[str, Content] = {"x.inter": INTER.replace("\t", ",") + "1,2,3,881250949\n"}
    assert read(files, **recbole(field_separator=",")).pairs == [("1", "2")]
    assert "field_separator" in refuse(files, **recbole())


def test_recbole_splits_are_kept(read: Read) -> None:
    files: dict[str, Content] = {f"x.{part}.inter": INTER + f"1\t{part}\t3\t4\n" for part in ("train", "valid", "test")}
    result = read(files, **recbole())
    assert result.pairs == [("1", "train"), ("1", "valid"), ("1", "test")]
    assert result.raw.interactions["part"].to_list() == [0, 1, 2]


@pytest.mark.parametrize("key", ["rating_field", "timestamp_field", "text_field"])
def test_a_recbole_field_that_the_recipe_names_must_be_there(refuse: Refuse, key: str) -> None:
    message = refuse({"x.inter": "user_id:token\titem_id:token\n1\t2\n"}, **recbole(**{key: "stars"}))
    assert "'stars'" in message
    assert key in message


def flags(*genres: int) -> str:
    return "|".join(str(int(index in genres)) for index in range(19))


ITEMS_100K = (
    f"1|Toy Story (1995)|01-Jan-1995||http://us.imdb.com/M/title-exact?Toy%20Story%20(1995)|{flags(3, 4, 5)}\n"
    f"2|Misérables, Les (1995)|01-Jan-1995||http://us.imdb.com/x|{flags(0)}\n"
)
RATINGS_1M = "1::1::5::978300760\n1::2::3::978302109\n"
MOVIES_1M = "1::Toy Story (1995)::Animation|Children's|Comedy\n2::Misérables, Les (1995)::(no genres listed)\n"
TITLES = {"1": ("Toy Story (1995)", "genres: Animation, Children's, Comedy"), "2": ("Misérables, Les (1995)", None)}


@pytest.mark.parametrize("encoding", ["latin-1", "utf-8"])
def test_grouplens_100k(read: Read, encoding: str) -> None:
    files: dict[str, Content] = {
        "m/u.data": "1\t1\t3\t881250949\n1\t2\t4\t881250950\n",
        "m/u.item": ITEMS_100K.encode(encoding),
        "m/u.user": "1|24|M|technician|85711\n",
    }
    result = read(files, format="grouplens", edition="100k", folder="m")
    assert result.pairs == [("1", "1"), ("1", "2")]
    assert result.items == TITLES
    assert result.users == {"1": "24 years old, male, technician"}


@pytest.mark.parametrize("encoding", ["latin-1", "utf-8"])
@pytest.mark.parametrize("edition", ["1m", "10m"])
@pytest.mark.parametrize("users", ["", "1::F::1::10::48067\n"])
def test_grouplens_1m_and_10m(read: Read, encoding: str, edition: str, users: str) -> None:
    files: dict[str, Content] = {"m/ratings.dat": RATINGS_1M, "m/movies.dat": MOVIES_1M.encode(encoding)}
    files |= {"m/users.dat": users} if users else {}
    result = read(files, format="grouplens", edition=edition, folder="m")
    assert result.column("timestamp") == [978300760.0, 978302109.0]
    assert result.items == TITLES
    assert result.users == ({"1": "under 18 years old, female, K-12 student"} if users else {})


@pytest.mark.parametrize("edition", ["20m", "25m", "32m", "latest", "csv"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_grouplens_csv(read: Read, edition: str, end: str) -> None:
    ratings = "userId,movieId,rating,timestamp\n1,1,3.5,1112486027\n1,2,4.0,1112486028\n"
    movies = (
        'movieId,title,genres\n1,"American President, The (1995)",Comedy|Drama\n2,"""Great"" Café",(no genres listed)\n'
    )
    files: dict[str, Content] = {"m/ratings.csv": ratings.replace("\n", end), "m/movies.csv": movies.replace("\n", end)}
    result = read(files, format="grouplens", edition=edition, folder="m")
    assert result.column("rating") == [3.5, 4.0]
    assert result.items == {
        "1": ("American President, The (1995)", "genres: Comedy, Drama"),
        "2": ('"Great" Café', None),
    }


AMAZON = {
    "2014": (
        '{"reviewerID": "A2", "asin": "B1", "reviewerName": "x", "helpful": [2, 3], "reviewText": "I <b>like</b> it.'
        '<br />5 &lt; 6 & 5 < 6 &#34;q&#34;", "overall": 5.0, "summary": "s", "unixReviewTime": 1252800000, '
        '"reviewTime": "09 13, 2009"}\n{"reviewerID": "A3", "asin": "B1", "reviewText": "", "summary": "Only this", '
        '"overall": 4.0, "reviewTime": "09 13, 2009"}\n',
        "{'asin': 'B1', 'title': 'It\\'s &quot;Good&quot;', 'price': 3.17, 'description': u'caf\\xe9 <p>para</p>', "
        "'categories': [['Sports', 'Dance']]}\n{'asin': 'B9', 'salesRank': {'Toys': 1}}\n",
        ['I like it. 5 < 6 & 5 < 6 "q"', "Only this"],
        ('It\'s "Good"', "café para"),
        1252800000.0,
    ),
    "2018": (
        '{"overall": 5.0, "vote": "2", "verified": true, "reviewTime": "09 13, 2009", "reviewerID": "A2", '
        '"asin": "B1", "style": {"Format:": " Hard"}, "reviewText": "Fine", "summary": "s", '
        '"unixReviewTime": 1252800000}\n',
        '{"asin": "B1", "title": "<span id=\\"productTitle\\">\\n Mug </span>", "description": ["<p>One</p>", "", '
        '"Two &amp; three"]}\n',
        ["Fine"],
        ("Mug", "One Two & three"),
        1252800000.0,
    ),
    "2023": (
        '{"rating": 5.0, "title": "Sum", "text": "A<br /><br />B", "images": [], "asin": "B0", "parent_asin": "B1", '
        '"user_id": "AG", "timestamp": 1588687728923, "helpful_vote": 0, "verified_purchase": true}\n',
        '{"main_category": "All", "title": "Mug &amp; cup", "features": ["f"], "description": ["a", "b"], '
        '"price": null, "parent_asin": "B1", "details": {"Brand": "x"}}\n',
        ["A B"],
        ("Mug & cup", "a b"),
        1588687728.923,
    ),
}


@pytest.mark.parametrize("edition", AMAZON)
def test_amazon(read: Read, edition: str) -> None:
    reviews, metadata, texts, about, time = AMAZON[edition]
    result = read(
        {"r.json": reviews, "m.json": metadata}, format="amazon", edition=edition, reviews="r.json", metadata="m.json"
    )
    assert result.reviews == texts
    assert result.items == {"B1": about}
    assert set(result.column("timestamp")) == {time}


def test_amazon_of_another_edition_is_refused(refuse: Refuse) -> None:
    message = refuse({"r": AMAZON["2023"][0]}, format="amazon", edition="2018", reviews="r")
    assert "has no field reviewerID. Choose the right format or edition" in message


def test_yelp(read: Read) -> None:
    files: dict[str, Content] = {
        "r": '{"review_id":"x","user_id":"u1","business_id":"b1","stars":4.0,"useful":0,"funny":0,"cool":0,'
        '"text":"Nice.\\n\\nGood","date":"2018-07-07 22:09:11"}\n',
        "b": '{"business_id":"b1","name":"Caf\\u00e9","city":"Santa Barbara","categories":"Doctors, Health",'
        '"attributes":{"A":"True"},"hours":null}\n{"business_id":"b2","name":"z","categories":null}\n',
        "u": '{"user_id":"u1","name":"W","review_count":5,"yelping_since":"2007-01-25 16:47:26","elite":"2007,2008"}\n',
    }
    result = read(files, format="yelp", reviews="r", businesses="b", users="u")
    assert result.pairs == [("u1", "b1")]
    assert result.reviews == ["Nice.\n\nGood"]
    assert result.column("timestamp") == [1531001351.0]
    assert result.items == {"b1": ("Café", "Doctors, Health, in Santa Barbara")}
    assert result.users == {"u1": "member since 2007, elite in 2007,2008"}


def test_mind(read: Read) -> None:
    behaviors = (
        "1\tU13740\t11/11/2019 9:05:58 AM\tN55189 N42782\tN55689-1 N35729-0\n"
        "2\tU91836\t11/12/2019 6:11:30 PM\t\tN20678-0 N39317-1 N1-1\n"
        "3\tU5\t11/12/2019 6:11:30 PM\tN9\tN20678-0\n"
        "4\tU6\t11/12/2019 6:11:30 PM\t\tN21 N31\n"  # the test part has no labels
    )
    news = (
        'N55189\tlifestyle\tlifestyleroyals\tThe "Brands" Queen\tShop the notebooks\thttps://x\t[{"Label": "P"}]\t[]\n'
        "N42782\thealth\tweightloss\tFat\t\thttps://y\t[]\t[]\nN1\tsports\tgolf\tGolf\t\thttps://z\t[]\t[]\n"
    )
    result = read(
        {"behaviors.tsv": behaviors, "news.tsv": news}, format="mind", behaviors="behaviors.tsv", news="news.tsv"
    )
    assert result.pairs == [
        ("U13740", "N55189"),
        ("U13740", "N42782"),
        ("U13740", "N55689"),
        ("U91836", "N39317"),
        ("U91836", "N1"),
        ("U5", "N9"),
    ]
    assert result.column("timestamp") == [None, None, 1573463158.0, 1573582290.0, 1573582290.0, None]
    assert result.items["N55189"] == ('The "Brands" Queen', "lifestyle. lifestyleroyals. Shop the notebooks")
    assert result.items["N42782"] == ("Fat", "health. weightloss")


GAMES = (
    "{u'publisher': u'K', u'genres': [u'Action', u'Indie'], u'app_name': u'Lost &amp; Found', u'title': u'Lost', "
    "u'url': u'x', u'release_date': u'2018-01-04', u'tags': [u'Strategy'], u'price': 4.99, u'id': u'725280'}\n"
    "{u'app_name': u'No id', u'url': u'y'}\n"
)
STEAM: dict[str, tuple[str, list[tuple[str, str]], list[str]]] = {
    "reviews": (
        "{u'username': u'Chaos', u'hours': 0.1, u'product_id': u'725280', u'date': u'2017-12-17', u'text': u'Not "
        "\\n \"good\" \\u2665', u'early_access': False}\n{u'username': u'B', u'user_id': u'76561198', u'product_id': "
        "u'328100', u'date': u'2017-08-02', u'text': u'x'}\n",
        [("Chaos", "725280"), ("B", "328100")],
        ['Not \n "good" ♥', "x"],
    ),
    "users' items": (
        "{u'user_id': u'765', u'items_count': 2, u'steam_id': u'765', u'items': [{u'item_id': u'10', "
        "u'item_name': u'CS', u'playtime_forever': 6}, {u'item_id': u'725280', u'playtime_forever': 0}]}\n"
        "{u'user_id': u'7', u'items': []}\n",
        [("765", "10"), ("765", "725280")],
        [],
    ),
    "users' reviews": (
        "{'user_id': '765', 'user_url': 'x', 'reviews': [{'funny': '', 'posted': 'Posted November 5, 2011.', "
        "'item_id': '725280', 'recommend': True, 'review': 'Simple & great'}]}\n",
        [("765", "725280")],
        ["Simple & great"],
    ),
}


@pytest.mark.parametrize("form", STEAM)
def test_steam(read: Read, form: str) -> None:
    content, pairs, texts = STEAM[form]
    result = read({"r.json": content, "g.json": GAMES}, format="steam", reviews="r.json", games="g.json")
    assert result.pairs == pairs
    assert result.reviews == texts
    assert result.items == {"725280": ("Lost", "genres: Action, Indie, tags: Strategy")}
    assert result.lost == {"row that is a text about an item without id": (1, "g.json", 2, ", No id,")}


PAIRS = [("1", "2"), ("1", "3"), ("2", "3")]


@pytest.mark.parametrize(
    ("content", "options"),
    [
        ("1 2 3\n2 3\n", {}),
        ("1\t2  3\r\n2\t3\r\n", {}),
        ("\ufeff1: 2 3\n\n2: 3\n", {}),
        ("1,2,3\n2,3\n", {"separator": ","}),
        ("1 2,3\n2 3,\n", {"separator": ","}),
        ('{"1": [2, 3], "2": [3.0]}', {}),
        (json.dumps({"1": ["2", "3"], "2": ["3"]}, indent=1), {}),
        ('{"1": [2, 3], "2": [3]}'.encode("utf-16"), {}),
        ('{"user": 1, "items": [2, 3]}\n{"user": 2, "items": [3]}\n', {}),
        ('[{"user": 1, "items": [2, 3]}, {"user": 2, "items": [3]}]', {}),
    ],
)
def test_sequences(read: Read, content: Content, options: dict[str, Any]) -> None:
    result = read({"s": content}, format="sequences", sequences="s", **options)
    assert result.pairs == PAIRS
    assert not result.lost


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("1,2,3\n", "separator: ','"),
        ("1 2,3,4\n2 3,4,5\n", "separator: ','"),
        ('{"user": 1, "items": [2], "times": [3]}', "are not one user and one list of items"),
        ('{"1": [2], "2": "3 4"}', "s: 2: '3 4' is not a list of items"),
        ('{"1": [{"id": 2}]}', "has an id that is neither text nor number"),
        ("[[1, [2, 3]]]", "is not a JSON object"),
    ],
)
def test_sequences_of_another_form_are_refused(refuse: Refuse, content: str, words: str) -> None:
    assert words in refuse({"s": content}, format="sequences", sequences="s")


@pytest.mark.parametrize(
    "titles",
    [
        '2 Toy Story\n3\tThe "x"\n',
        '{"2": "Toy Story", "3": "The \\"x\\"", "9": null}',
        '{"2": {"title": "Toy Story"}, "3": {"title": "The \\"x\\"", "year": 1}}',
    ],
)
def test_titles_of_sequences(read: Read, titles: str) -> None:
    result = read({"s": "1 2 3\n", "t": titles}, format="sequences", sequences="s", titles="t")
    assert result.items == {"2": ("Toy Story", None), "3": ('The "x"', None)}
