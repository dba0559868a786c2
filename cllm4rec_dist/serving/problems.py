"""Strict parsing of JSON requests, and error responses that name field, rule and cure, and nothing internal."""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.responses import Response

from cllm4rec_dist.errors import CLLM4RecError, DataError
from cllm4rec_dist.serving.schemas import Problem, Violation

RequestT = TypeVar("RequestT", bound=BaseModel)
MAX_REPORTED = 10
_SHOWN = 100
"""Maximum length of a value in an error message, in characters."""
_JSON_CURE = 'Send one JSON object in UTF-8, such as {"history": ["ITEM"]}.'


class RequestError(CLLM4RecError):
    """A request that cannot be answered.

    Args:
        violations: what is wrong with it; at least one.
        status: HTTP status.
        headers: additional response headers.
    """

    def __init__(
        self, violations: Sequence[Violation], status: int = 422, headers: dict[str, str] | None = None
    ) -> None:
        first = violations[0]
        super().__init__(first.field, "", first.constraint, first.cure)
        self.violations, self.status, self.headers = violations, status, headers or {}

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.violations, self.status, self.headers)


def request_error(field: str, constraint: str, cure: str, status: int = 422, **headers: str) -> RequestError:
    """Return a RequestError with one violation."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return RequestError([Violation(field=field, constraint=constraint, cure=cure)], status, named)


def parse_request(model: type[RequestT], body: bytes) -> RequestT:
    """Parse and validate a request body.

    Raises:
        RequestError: with up to `MAX_REPORTED` violations.
    """
    try:
        parsed = model.model_validate_json(body)
    except ValidationError as error:
        raise from_validation_errors(error.errors(include_url=False), model) from None
    json.loads(body, object_pairs_hook=lambda pairs: require_once([key for key, _ in pairs]))
    return parsed


def require_once(names: Sequence[str]) -> None:
    """Reject a request, or an object in it, that repeats a field.

    Raises:
        RequestError: for the first repeated field.
    """
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise request_error(twice[0], "is given twice", "Give it once.")


def from_validation_errors(errors: Sequence[Any], model: type[BaseModel]) -> RequestError:
    """Convert pydantic's error dictionaries, at most `MAX_REPORTED` of them."""
    return RequestError([_violation(error, model) for error in errors[:MAX_REPORTED]])


def problem_response(error: RequestError) -> Response:
    """Return the JSON response for an error."""
    detail = "; ".join(f"{v.field}: {v.constraint}. {v.cure}" for v in error.violations)
    content = Problem(detail=detail, errors=list(error.violations)).model_dump_json()
    return Response(content, error.status, headers=error.headers, media_type="application/json")


def from_input_error(error: CLLM4RecError) -> RequestError:
    """Convert a DataError that was caused by a request."""
    assert isinstance(error, DataError)
    return request_error(error.field, f"{shown(error.value)} {error.constraint}", error.cure)


def shown(value: object) -> str:
    """Format a value as JSON, truncated to `_SHOWN` characters."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"


def did_you_mean(value: str, known: Sequence[str]) -> str:
    """Return a sentence that suggests the most similar known name; "" if none is similar."""
    similar = difflib.get_close_matches(value, known, 1)
    return f"Did you mean {shown(similar[0])}? " if similar else ""


def _violation(error: dict[str, Any], model: type[BaseModel]) -> Violation:
    location = error["loc"][1:] if error["loc"][:1] == ("query",) else error["loc"]  # FastAPI prefixes URL parameters
    field = ".".join(map(str, location)) or "body"
    kind = error["type"]
    if kind == "extra_forbidden":
        fields = list(model.model_fields)
        cure = f"{did_you_mean(field, fields)}The fields are {', '.join(fields)}."
        return Violation(field=field[:_SHOWN], constraint="is not a field of this request", cure=cure)
    constraint, cure = _explain(kind, error.get("ctx", {}), error["msg"])
    if kind not in ("json_invalid", "missing", "model_type"):
        constraint = f"{shown(error['input'])} {constraint}"
    return Violation(field=field, constraint=constraint, cure=cure)


def _explain(kind: str, context: dict[str, Any], message: str) -> tuple[str, str]:
    """Rule and cure for a pydantic error type."""
    match kind:
        case "json_invalid":
            return f"is not JSON ({context['error']})", _JSON_CURE
        case "model_type":
            return "is not a JSON object", _JSON_CURE
        case "missing":
            return "is missing", "Add it."
        case "string_type":
            return "is not a string", "Write ids in quotation marks, as they are in the raw data."
        case "int_type" | "int_parsing" | "int_from_float":
            return "is not a whole number", "Write digits only, without quotation marks."
        case "float_type" | "float_parsing" | "finite_number":
            return "is not a finite number", "Write a number without quotation marks."
        case "bool_type" | "bool_parsing":
            return "is neither true nor false", "Write true or false without quotation marks."
        case "list_type":
            return "is not a list", 'Write a list, such as ["ITEM"].'
        case "too_long":
            return f"has more than {context['max_length']:,} entries", f"Send at most {context['max_length']:,}."
        case "string_too_long":
            return f"has more than {context['max_length']:,} characters", "Send a shorter text."
        case "string_too_short":
            return "is empty", "Write something."
        case "less_than_equal":
            return f"is more than {context['le']:,}", f"Send {context['le']:,} or less."
        case "greater_than_equal":
            return f"is less than {context['ge']:,}", f"Send {context['ge']:,} or more."
        case _:
            return f"is invalid ({message})", "See /docs for the allowed values."
