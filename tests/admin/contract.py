"""The API's description, fetched from a server, as a judge of what the server answers."""

from __future__ import annotations

from typing import Any

from openapi_schema_validator import OAS31Validator

from tests.support.httpclient import Address, Answer, ask


class Contract:
    """What the document of one server allows."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document

    def responses(self, method: str, template: str) -> dict[str, Any]:
        """By status. Raises: KeyError: the document has no such operation."""
        found: dict[str, Any] = self.document["paths"][template][method.lower()]["responses"]
        return found

    def check(self, method: str, template: str, answer: Answer) -> None:
        """Raises: AssertionError: the document does not allow this answer."""
        responses = self.responses(method, template)
        response = responses.get(str(answer.status))
        if response is None:
            assert answer.status >= 400, f"{method} {template} answers {answer.status}, which is not described"
            response = self.document["components"]["responses"]["problem"]
        content = response.get("content")
        if content is None:
            assert answer.body == b""
            return
        kind = answer.headers["content-type"].partition(";")[0]
        schema = content[kind]["schema"]
        if "json" in kind:
            whole = {"components": self.document["components"], **schema}
            errors = [error.message for error in OAS31Validator(whole).iter_errors(answer.json())]
            assert errors == [], (answer.body, errors)


class Client:
    """Asks a server, and holds each answer against the server's own document."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self.contract = Contract(ask(address, "GET", "/v1/openapi.json").json())

    def ask(self, method: str, template: str, body: object = None, /, query: str = "", **names: str) -> Answer:
        """`template` as in the document; `names` fill it as they are, so already percent-encoded."""
        answer = ask(self.address, method, template.format(**names) + query, body)
        self.contract.check(method, template, answer)
        return answer
