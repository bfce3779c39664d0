"""What the server answers in place of a chat completion."""

from typing import Any

from ..model.errors_emma import EmmaError


class RequestError(EmmaError):
    """A request that is not answered, through no fault of the server.

    Args:
        message: the rule, what came instead, the remedy.
        status: HTTP status, in the 400s; 503 where the same request may be answered later.
        code: word for programs, as OpenAI names it.
        param: field of the request that is at fault.
    """

    def __init__(self, message: str, status: int = 400, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param


def error_object(message: str, status: int, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's form."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
