"""The service over HTTP: what it answers, what it refuses, and that it shows nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from cllm4rec_dist.serving import options as limits
from cllm4rec_dist.serving.web import create_app
from tests.serving.fake import TITLES, FakeItems, FakeRecommender, FakeRun, options

JSON = {"content-type": "application/json"}


def client_of(recommender: FakeRecommender, **changes: Any) -> TestClient:
    return TestClient(create_app(FakeRun(recommender).live(), options(**changes)), raise_server_exceptions=False)


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with client_of(FakeRecommender()) as made:
        yield made


def recommend(client: TestClient, **request: Any) -> dict[str, Any]:
    response = client.post("/recommend", json=request)
    assert response.status_code == 200, response.text
    return response.json()


def listed(answer: dict[str, Any]) -> list[str]:
    return [item["item"] for item in answer["items"]]


def refused(client: TestClient, content: bytes | dict[str, Any], path: str = "/recommend") -> dict[str, Any]:
    """The first violation of a request that is refused with 422."""
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    response = client.post(path, content=content, headers=JSON)
    assert response.status_code == 422, response.text
    first = response.json()["errors"][0]
    assert first["constraint"]
    assert first["cure"].endswith(".")
    assert first["field"] in response.json()["detail"]
    return first


def test_recommends_for_a_basket(client: TestClient) -> None:
    answer = recommend(client, history=["s1"], top=2)
    assert [(item["item"], item["title"], item["category"]) for item in answer["items"]] == [
        ("s2", "Lemon soap", "Soap & shampoo"),
        ("s3", "Rose shampoo", "Soap & shampoo"),
    ]
    assert answer["items"][0]["score"] == pytest.approx(0.99)
    assert answer["items"][0]["because"] is None
    assert (answer["fallback"], answer["known_user"], answer["checkpoint"]) == (False, False, "best-00000010")


def test_recommends_for_a_known_user_and_what_came_later(client: TestClient) -> None:
    answer = recommend(client, user="ann", history=["b1"])
    assert answer["known_user"] is True
    assert not {"s1", "b1"} & set(listed(answer))


def test_items_whose_ids_are_names_of_columns_are_explained(client: TestClient) -> None:
    titles = {"item": "Rose soap", "title": "Lemon soap", "contribution": "Rose brush", "index": "Soap"}
    fake = FakeRecommender(items=FakeItems(titles, with_categories=False))
    with client_of(fake) as renamed:
        answer = recommend(renamed, history=["item", "contribution"], explain=True)
        assert set(listed(answer)) == {"title", "index"}
        for listed_item in answer["items"]:
            assert {(why["item"], why["title"]) for why in listed_item["because"]} == {
                ("item", "Rose soap"),
                ("contribution", "Rose brush"),
            }
        answer = recommend(renamed, history=["title"], explain=True)
        assert [why["item"] for item in answer["items"] for why in item["because"]] == ["title"] * 3


def test_says_popular_items_for_an_empty_history(client: TestClient) -> None:
    for request in ({}, {"history": []}, {"history": ["never heard of"]}, {"user": None}):
        answer = recommend(client, **request)
        assert answer["fallback"] is True
        assert {item["score"] for item in answer["items"]} == {None}
    assert recommend(client, explain=True)["items"][0]["because"] is None


def test_counts_unknown_items_of_a_history(client: TestClient) -> None:
    answer = recommend(client, history=["s1", "gone", "s1"])
    assert answer["unknown_items"] == ["gone"]
    assert answer["fallback"] is False


def test_leaves_out_and_chooses(client: TestClient) -> None:
    assert "s2" not in listed(recommend(client, history=["s1"], exclude=["s2", "unknown"]))
    assert listed(recommend(client, history=["s1"], only=["b1", "unknown"])) == ["b1"]
    assert listed(recommend(client, history=["s1"], only=[])) == []
    assert listed(recommend(client, history=["s1"], exclude_categories=["Soap & shampoo", "Other"])) == ["b1", "b2"]
    assert listed(recommend(client, history=["s1"], min_score=0.5)) == ["s2", "s3"]
    assert "s1" in listed(recommend(client, history=["s1"], include_seen=True))


def test_explains_each_item_by_the_history(client: TestClient) -> None:
    answer = recommend(client, history=["s3", "s1", "gone"], only=["s2"], explain=True)
    assert [(c["item"], c["title"], c["contribution"]) for c in answer["items"][0]["because"]] == [
        ("s1", "Rose soap", 1.0),
        ("s3", "Rose shampoo", 0.0),
    ]


def test_finds_similar_items(client: TestClient) -> None:
    response = client.post("/similar", json={"item": "s1", "top": 2})
    assert [item["item"] for item in response.json()["items"]] == ["s2", "s3"]
    assert response.json()["items"][0]["category"] == "Soap & shampoo"


NEW = {"item": "n1", "title": "Rose candle"}


def test_a_request_may_have_products_that_the_run_does_not_have(client: TestClient) -> None:
    answer = recommend(client, history=["s1"], new_items=[NEW], top=4)
    assert "n1" in listed(answer)
    (entry,) = [item for item in answer["items"] if item["item"] == "n1"]
    assert (entry["title"], entry["category"]) == ("Rose candle", None)
    answer = recommend(client, history=["n1"], new_items=[NEW], explain=True, top=2)
    assert (answer["fallback"], answer["unknown_items"]) == (False, [])
    assert listed(answer) == ["s1", "s3"]
    assert [(why["item"], why["title"], why["contribution"]) for why in answer["items"][0]["because"]] == [
        ("n1", "Rose candle", 1.0)
    ]
    assert listed(recommend(client, history=["s1"], new_items=[NEW], only=["n1", "b1"])) == ["n1", "b1"]
    response = client.post("/similar", json={"item": "n1", "new_items": [NEW], "top": 2})
    assert [item["item"] for item in response.json()["items"]] == ["s1", "s3"]
    response = client.post("/similar", json={"item": "s1", "new_items": [NEW], "top": 3})
    assert "n1" in [item["item"] for item in response.json()["items"]]


def test_all_wrong_new_products_of_a_request_are_named(client: TestClient) -> None:
    wrong = [{"item": "s1", "title": "Soap"}, {"item": "n2", "title": ""}, NEW, NEW]
    response = client.post("/recommend", json={"history": ["s1"], "new_items": wrong})
    assert response.status_code == 422
    rules = [error["constraint"] for error in response.json()["errors"]]
    assert rules == ['"s1" is an item of the run already', '"n2" has no text', '"n1" comes twice']


def test_nothing_of_a_new_product_is_kept(client: TestClient) -> None:
    recommend(client, history=["s1"], new_items=[NEW])
    assert "n1" not in listed(recommend(client, history=["s1"], top=100))
    assert recommend(client, history=["n1"])["unknown_items"] == ["n1"]
    assert refused(client, {"item": "n1"}, "/similar")["field"] == "item"


@pytest.mark.parametrize(
    ("new_items", "field", "says"),
    [
        ([{"item": "s1", "title": "Soap"}], "new_items", '"s1" is an item of the run already'),
        ([NEW, NEW], "new_items", '"n1" comes twice'),
        ([{"item": "n1", "title": " "}], "new_items", '"n1" has no text'),
        ([{"item": "n1"}], "new_items", '"n1" has no text'),
        ([{"item": "n1", "title": "Zahnbürste"}], "new_items", "has no known word"),
        ([{"title": "Soap"}], "new_items.0.item", "is missing"),
        ([{"item": "", "title": "Soap"}], "new_items.0.item", "is empty"),
        ([{"item": 5, "title": "Soap"}], "new_items.0.item", "is not a string"),
        ([{"item": "n", "title": None}], "new_items.0.title", "is not a string"),
        ([{"item": "n", "name": "Soap"}], "new_items.0.name", "is not a field"),
        ([{"item": "n", "title": "x" * 1001}], "new_items.0.title", "more than 1,000 characters"),
        ([{"item": "n", "description": "x" * 10_001}], "new_items.0.description", "more than 10,000 characters"),
        ([{"item": f"n{n}", "title": "Soap"} for n in range(51)], "new_items", "more than 50 entries"),
        ({"n": "Soap"}, "new_items", "is not a list"),
        (["Soap"], "new_items.0", "is not a JSON object"),
    ],
)
def test_wrong_new_products_are_refused(client: TestClient, new_items: Any, field: str, says: str) -> None:
    for path, request in (("/recommend", {"history": ["s1"]}), ("/similar", {"item": "s1"})):
        first = refused(client, request | {"new_items": new_items}, path)
        assert first["field"] == field
        assert says in first["constraint"]


def test_a_field_of_a_product_that_comes_twice_is_refused(client: TestClient) -> None:
    first = refused(client, b'{"new_items": [{"item": "n", "title": "Soap", "title": "Brush"}]}')
    assert (first["field"], first["constraint"]) == ("title", "is given twice")


def test_finds_items_by_title(client: TestClient) -> None:
    result = client.get("/items", params={"query": "brush"}).json()["items"]
    assert result == [
        {"item": "b1", "title": "Hair brush", "category": "Brushes"},
        {"item": "b2", "title": "Tooth brush", "category": "Brushes"},
    ]
    assert len(client.get("/items", params={"query": "brush", "limit": 1}).json()["items"]) == 1


def test_shows_the_run_by_names_only(client: TestClient) -> None:
    shown = client.get("/run").json()
    assert shown["run"] == "shop"
    assert (shown["checkpoint"], shown["date"]) == ("best-00000010", "2026-11-26T03:00:00+00:00")
    assert (shown["best_metric"], shown["best_value"]) == ("recall@20", 0.31)
    assert "/" not in "".join(str(value) for value in shown.values())


@pytest.mark.parametrize(
    ("run", "name"),
    [
        ("/home/shop/runs/finetune", "shop"),
        ("runs/demo/finetune", "demo"),
        ("finetune", "finetune"),
        ("s3://bucket/runs/books", "books"),
    ],
)
def test_a_run_has_the_name_that_people_give_it(run: str, name: str) -> None:
    with client_of(FakeRecommender(), run=run) as client:
        assert client.get("/run").json()["run"] == name


def test_serves_a_run_without_categories() -> None:
    with client_of(FakeRecommender(items=FakeItems(TITLES, with_categories=False))) as client:
        assert recommend(client, history=["s1"])["items"][0]["category"] is None
        first = refused(client, {"exclude_categories": ["Brushes"]})
        assert first["field"] == "exclude_categories"
        assert "no categories" in first["constraint"]


@pytest.mark.parametrize(
    ("content", "field", "says"),
    [
        (b"", "body", "is not JSON"),
        (b"[]", "body", "not a JSON object"),
        (b'{"history": ["s1"]', "body", "is not JSON"),
        (b'{"history": ["\xff"]}', "body", "is not JSON"),
        (b'{"history": ["\\ud800"]}', "body", "is not JSON"),
        (b"[" * 100_000, "body", "is not JSON"),
        (b'{"min_score": NaN}', "min_score", "not a finite number"),
        (b'{"min_score": -Infinity}', "min_score", "not a finite number"),
        (b'{"min_score": 1e999}', "min_score", "not a finite number"),
        (b'{"min_score": "0.5"}', "min_score", "not a finite number"),
        (b'{"top": "10"}', "top", "not a whole number"),
        (b'{"top": 10.0}', "top", "not a whole number"),
        (b'{"top": true}', "top", "not a whole number"),
        (b'{"top": NaN}', "top", "not a whole number"),
        (b'{"top": 0}', "top", "less than 1"),
        (b'{"top": 101}', "top", "more than 100"),
        (b'{"top": 1000000000000000000000000000000}', "top", "more than 100"),
        (b'{"top": 1, "top": 2}', "top", "twice"),
        (b'{"history": "s1"}', "history", "not a list"),
        (b'{"history": [1]}', "history.0", "not a string"),
        (b'{"history": [null]}', "history.0", "not a string"),
        (b'{"history": [""]}', "history.0", "is empty"),
        (b'{"history": {"a": 1}}', "history", "not a list"),
        (b'{"explain": 1}', "explain", "neither true nor false"),
        (b'{"explain": null}', "explain", "neither true nor false"),
        (b'{"user": 5}', "user", "not a string"),
        (b'{"histroy": []}', "histroy", "not a field"),
        (b'{"user": "bob"}', "user", "not a user of this run"),
        (b'{"exclude_categories": ["Brushs"]}', "exclude_categories.0", "not a category"),
    ],
)
def test_names_field_and_cure_of_what_is_wrong(client: TestClient, content: bytes, field: str, says: str) -> None:
    first = refused(client, content)
    assert first["field"] == field
    assert says in first["constraint"]


def test_a_field_that_comes_a_hundred_thousand_times_is_refused(client: TestClient) -> None:
    assert "twice" in refused(client, b'{"top": 1' + b', "top":1' * 100_000 + b"}")["constraint"]


def test_a_cure_helps(client: TestClient) -> None:
    assert '"history"' in refused(client, {"histroy": []})["cure"]
    assert "send their items as history" in refused(client, {"user": "bob"})["cure"]
    assert '"Brushes"' in refused(client, {"exclude_categories": ["Brushs"]})["cure"]
    assert "GET /items" in refused(client, {"item": "gone"}, "/similar")["cure"]
    assert refused(client, {}, "/similar")["field"] == "item"


def test_all_violations_are_named_but_not_endlessly(client: TestClient) -> None:
    response = client.post("/recommend", json={"top": 0, "explain": 1, "x": 2})
    assert {error["field"] for error in response.json()["errors"]} == {"top", "explain", "x"}
    response = client.post("/recommend", json={"history": [1] * 1000})
    assert len(response.json()["errors"]) == 10


def test_sizes_are_limited(client: TestClient) -> None:
    at_most = [f"{number}" for number in range(limits.MAX_HISTORY)]
    assert len(recommend(client, history=at_most)["unknown_items"]) == limits.MAX_HISTORY
    assert "1,000" in refused(client, {"history": [*at_most, "x"]})["constraint"]
    assert "10,000" in refused(client, {"exclude": ["x"] * 10_001})["constraint"]
    assert "10,000" in refused(client, {"only": ["x"] * 10_001})["constraint"]
    assert refused(client, {"history": ["x" * 1001]})["field"] == "history.0"
    assert refused(client, {"history": at_most[:101], "explain": True})["field"] == "explain"


def test_a_large_body_is_refused_before_it_is_read(client: TestClient) -> None:
    response = client.post("/recommend", content=b"x" * (limits.MAX_BODY_BYTES + 1), headers=JSON)
    assert response.status_code == 413
    assert response.json()["errors"][0]["field"] == "body"

    def endless() -> Iterator[bytes]:
        for _ in range(20):
            yield b"x" * 100_000

    response = client.post("/recommend", content=endless(), headers=JSON)
    assert response.status_code == 413


def test_a_body_must_be_json_by_its_header(client: TestClient) -> None:
    response = client.post("/recommend", content=b"{}", headers={"content-type": "text/plain"})
    assert response.status_code == 415
    assert "Content-Type: application/json" in response.json()["detail"]
    assert client.post(
        "/recommend", content=b"{}", headers={"content-type": "application/json; charset=utf-8"}
    ).is_success


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("", "query"),
        ("query=", "query"),
        ("query=a&limit=0", "limit"),
        ("query=a&limit=51", "limit"),
        ("query=a&limit=x", "limit"),
        ("query=a&limt=5", "limt"),
        (f"query={'a' * 201}", "query"),
        ("query=a&query=b", "query"),
        ("query=a&limit=5&limit=5", "limit"),
    ],
)
def test_a_search_is_checked(client: TestClient, query: str, field: str) -> None:
    response = client.get(f"/items?{query}")
    assert response.status_code == 422
    assert response.json()["errors"][0]["field"] == field


def test_other_paths_and_methods_are_told(client: TestClient) -> None:
    assert client.get("/../../etc/passwd").status_code == 404
    for path in ("/page/index.html", "/%2e%2e/secret", "/static/page.js", "//etc/passwd", "/items/../run.txt"):
        response = client.get(path)
        assert response.status_code == 404, path
        assert response.json()["errors"][0]["field"] == "path"
    response = client.get("/recommend")
    assert (response.status_code, response.headers["allow"]) == (405, "POST")


def test_an_error_of_the_service_shows_nothing_of_it(client: TestClient) -> None:
    response = client.post("/recommend", json={"history": ["explode"]})
    assert response.status_code == 500
    assert "secret" not in response.text
    assert "Traceback" not in response.text
    assert recommend(client, history=["s1"])["items"]


def test_every_answer_has_headers_that_forbid_the_rest(client: TestClient) -> None:
    for path in ("/run", "/nothing", "/", "/page.js"):
        headers = client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff", path
        assert "default-src 'none'" in headers["content-security-policy"], path
        assert "frame-ancestors 'none'" in headers["content-security-policy"], path
    policy = client.get("/").headers["content-security-policy"]
    assert "unsafe" not in policy
    assert "script-src 'self'" in policy


def test_pages_load_nothing_from_elsewhere(client: TestClient) -> None:
    for path in ("/", "/docs"):
        page = client.get(path)
        assert page.headers["content-type"].startswith("text/html")
        sources = re.findall(r'(?:src|href)="([^"]+)"', page.text)
        assert sources
        for source in sources:
            assert source.startswith("#") or client.get(f"/{source}").status_code == 200, source
    assert "http" not in re.sub(r"//.*", "", client.get("/page.js").text.replace("http://www.w3.org", ""))


def test_the_schema_describes_requests_and_answers(client: TestClient) -> None:
    schema = client.get("/openapi.json").json()
    assert set(schema["paths"]) == {"/recommend", "/similar", "/items", "/run", "/healthz", "/metrics"}
    body = schema["paths"]["/recommend"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["properties"]["top"]["maximum"] == limits.MAX_TOP
    assert body["properties"]["history"]["description"]
    assert body["additionalProperties"] is False
    assert body["properties"]["new_items"]["maxItems"] == limits.MAX_NEW_ITEMS
    assert body["properties"]["new_items"]["items"]["properties"]["title"]["maxLength"] == limits.MAX_TITLE_LENGTH
    assert "$defs" not in json.dumps(schema)
    assert schema["components"]["schemas"]["RecommendAnswer"]["properties"]["unknown_items"]["description"]


def test_health_and_metrics() -> None:
    with client_of(FakeRecommender()) as client:
        assert client.get("/healthz").json() == {"status": "ok", "checkpoint": "best-00000010", "step": 10}
        recommend(client, history=["s1", "gone"])
        recommend(client)
        refused(client, {"top": 0})
        client.get("/made/up")
        response = client.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain; version=")
        for line in (
            'cllm4rec_requests_total{method="POST",path="/recommend",replica="alone",status="200"} 2.0',
            'cllm4rec_requests_total{method="POST",path="/recommend",replica="alone",status="422"} 1.0',
            'cllm4rec_requests_total{method="GET",path="other",replica="alone",status="404"} 1.0',
            'cllm4rec_request_seconds_count{path="/recommend",replica="alone"} 3.0',
            'cllm4rec_batch_size_count{replica="alone"} 2.0',
            'cllm4rec_fallbacks_total{replica="alone"} 1.0',
            'cllm4rec_unknown_history_items_total{replica="alone"} 1.0',
            'cllm4rec_checkpoint_step{replica="alone"} 10.0',
            'cllm4rec_waiting_requests{replica="alone"} 0.0',
        ):
            assert f"\n{line}\n" in response.text, line
