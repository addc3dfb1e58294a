"""Plain JSON calls to an API server; kubeconfig, credentials and TLS are the `kubernetes`
package's. Every call has a deadline, and every failure is a sentence."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from shoal.cli.errors import CliError

if TYPE_CHECKING:
    from kubernetes.client import ApiClient

CONNECT_SECONDS: Final = 5.0
READ_SECONDS: Final = 30.0
_USER_AGENT: Final = "shoal"

Query = Sequence[tuple[str, str]]


class Refused(CliError):
    """The API server said no; `status` is HTTP's, `reason` one word of Kubernetes'."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason


class KubeClient:
    """One API server, by one context of a kubeconfig."""

    def __init__(self, api: "ApiClient", context: str) -> None:
        """`context`: its name, for messages."""
        self._api = api
        self.context = context
        self.server: str = api.configuration.host
        api.user_agent = _USER_AGENT

    def get(self, path: str, query: Query = ()) -> dict[str, Any]:
        """Raises Refused, CliError."""
        return self.call("GET", path, query)

    def find(self, path: str) -> dict[str, Any] | None:
        """The object at `path`; None where there is none."""
        try:
            return self.get(path)
        except Refused as refused:
            if refused.status == 404 and refused.reason == "NotFound":
                return None
            raise

    def call(
        self,
        method: str,
        path: str,
        query: Query = (),
        body: Mapping[str, Any] | None = None,
        content_type: str = "application/json",
    ) -> dict[str, Any]:
        """The answer's JSON. Raises Refused, CliError."""
        response = self._send(method, path, query, body, content_type, READ_SECONDS)
        try:
            answer = json.loads(response.read() or b"{}")
        except ValueError as error:
            raise CliError(f"{self._who} answers {path} with something else than JSON") from error
        assert isinstance(answer, dict)
        return answer

    def lines(self, path: str, query: Query, seconds: float) -> Iterator[str]:
        """Lines of text as they come, until the server ends them, or for `seconds` nothing
        comes. Raises Refused, CliError."""
        import urllib3

        response = self._send("GET", path, query, None, "application/json", seconds).response
        rest = b""
        try:
            for piece in response.stream(65_536, decode_content=True):
                *whole, rest = (rest + piece).split(b"\n")
                for line in whole:
                    yield line.decode(errors="replace")
        except urllib3.exceptions.HTTPError:
            pass  # cut off, or silent: who follows looks whether the pod is still there
        finally:
            response.release_conn()
        if rest:
            yield rest.decode(errors="replace")

    def signed(self, path: str, query: Query) -> tuple[str, dict[str, str]]:
        """URL and headers of a request that somebody else makes."""
        _, url, headers, _, _ = self._api.param_serialize(
            "GET", path, query_params=list(query), auth_settings=["BearerToken"]
        )
        return url, headers

    @property
    def configuration(self) -> Any:
        """The kubernetes package's, for its websocket client."""
        return self._api.configuration

    @property
    def _who(self) -> str:
        return f"the API server {self.server} (context {self.context})"

    def _send(
        self,
        method: str,
        path: str,
        query: Query,
        body: Mapping[str, Any] | None,
        content_type: str,
        seconds: float,
    ) -> Any:
        import urllib3

        headers = {"Accept": "application/json", "Content-Type": content_type}
        _, url, headers, sent, _ = self._api.param_serialize(
            method,
            path,
            query_params=list(query),
            header_params=headers,
            body=body,
            auth_settings=["BearerToken"],
        )
        try:
            response = self._api.call_api(
                method, url, headers, sent, _request_timeout=(CONNECT_SECONDS, seconds)
            )
        except urllib3.exceptions.HTTPError as error:
            raise CliError(f"{self._who} cannot be reached: {_cause(error)}") from error
        if 200 <= response.status <= 299:
            return response
        raise self._refusal(response)

    def _refusal(self, response: Any) -> Refused:
        text = response.read().decode(errors="replace")
        try:
            status = json.loads(text)
            message, reason = str(status["message"]), str(status.get("reason", ""))
        except (ValueError, KeyError, TypeError):
            message, reason = text.strip() or str(response.reason), ""
        match response.status:
            case 401:
                message = f"{self._who} does not accept the credentials of that context: {message}"
            case 403:
                message = f"not allowed at {self._who}: {message}"
            case 404 | 409 | 422:
                pass  # the API server's own sentence says all
            case status_code:
                message = f"{self._who} says {status_code}: {message}"
        return Refused(response.status, reason, message)


def _cause(error: BaseException) -> str:
    """The innermost reason of an urllib3 error, without addresses of objects."""
    while (inner := getattr(error, "reason", None)) is not None and isinstance(
        inner, BaseException
    ):
        error = inner
    text = str(error)
    return text.rpartition(">: ")[2] or type(error).__name__
