"""Conversion of errors to OpenAI's format: an HTTP status and one error object, never a traceback."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from agentmem import errors
from agentmem.errors import AgentmemError, RequestRefused
from agentmem.serving import logs

_LONGEST = 1000
"""Maximum length of an error message in characters; the message may quote text of the client."""
_MOST = 3
"""Maximum number of violations of one request that the error message lists."""

_STATUS: tuple[tuple[type[AgentmemError], int, str], ...] = (
    (errors.CapTooSmall, 400, "cap_too_small"),
    (errors.UnknownPolicy, 400, "unknown_policy"),
    (errors.SettingsRefused, 400, "invalid_request"),
    (errors.UnsupportedGeneration, 400, "unsupported_parameter"),
    (errors.MemoryCapExceeded, 400, "context_length_exceeded"),
    (errors.TurnEnded, 400, "context_length_exceeded"),
    (errors.RuntimeBusy, 429, "rate_limit_exceeded"),
    (errors.MemoryClosed, 503, "shutting_down"),
    (errors.CompactionFailed, 500, "compaction_failed"),
)
"""HTTP status and error code of each error class; the first class that an error belongs to decides."""
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


def refusal(error: BaseException, *, retry_after: int = 1) -> RequestRefused:
    """Convert any error to the refusal that the client gets, and log unexpected errors.

    ``retry_after`` is the number of seconds that a client is asked to wait after status 429.
    """
    if isinstance(error, RequestRefused):
        return error
    for kind, status, code in _STATUS:
        if isinstance(error, kind):
            wait = retry_after if status == 429 else None  # noqa: PLR2004  # HTTP's number
            return RequestRefused(str(error), status=status, code=code, retry_after=wait)
    logs.failed(error)
    return RequestRefused(
        f"the server failed ({type(error).__name__}); its log says more. Try again", status=500, code="server_error"
    )


def error_object(refused: RequestRefused) -> dict[str, Any]:
    """Return OpenAI's error object for a refusal."""
    kind = _TYPES.get(refused.status, "invalid_request_error" if refused.status < 500 else "server_error")  # noqa: PLR2004
    param = None if refused.param is None else shortened(refused.param)
    return {"message": shortened(str(refused)), "type": kind, "param": param, "code": refused.code}


def response(refused: RequestRefused) -> JSONResponse:
    """Return the HTTP response for a refusal."""
    headers = {} if refused.retry_after is None else {"Retry-After": str(refused.retry_after)}
    if refused.status == 401:  # noqa: PLR2004  # HTTP's number
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse({"error": error_object(refused)}, refused.status, headers)


def shortened(text: str) -> str:
    """Cut a text to a bounded length, and escape characters that UTF-8 cannot encode."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= _LONGEST else text[:_LONGEST] + " …"


def handle(app: FastAPI) -> None:
    """Install error handlers in ``app``, so that it answers all errors in OpenAI's format."""

    @app.exception_handler(AgentmemError)
    async def refused(_: Request, error: AgentmemError) -> JSONResponse:
        return response(refusal(error))

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        return response(refusal(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return response(_invalid(error.errors()))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        said = {404: "there is no such route", 405: "this route has other methods"}.get(error.status_code)
        text = f"{request.method} {request.url.path}: {said or error.detail}"
        code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
        return response(RequestRefused(text, status=error.status_code, code=code))


def _invalid(violations: Sequence[Any]) -> RequestRefused:
    """Return the refusal of a body that is not JSON, lacks fields, or has fields of the wrong type."""
    first = violations[0]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "")
        return RequestRefused(f"the body is no JSON: {reason}; repair it", code="invalid_json")
    if first["loc"] in (("body",), []) and first["type"] in ("missing", "model_attributes_type", "dict_type"):
        return RequestRefused(
            "the body is no JSON object; send one, with the header 'Content-Type: application/json'",
            code="invalid_json",
        )
    lines = [f"{place(item['loc'])}: {item['msg'].removeprefix('Value error, ')}" for item in violations[:_MOST]]
    code = "missing_required_parameter" if first["type"] == "missing" else "invalid_type"
    return RequestRefused("; ".join(lines), code=code, param=place(first["loc"]))


def place(loc: Sequence[str | int]) -> str:
    """Return a location in a body as text in OpenAI's style, such as ``messages[0].content``."""
    text = ""
    for part in loc:
        if part == "body" and not text:
            continue
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text
