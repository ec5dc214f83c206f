"""Settings of scorers that ask a server: how it is reached, within which limits, and what a judge is asked."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal
from urllib.parse import SplitResult, urlsplit

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from megatron_hapo.config.data_sources import pattern_with_group
from megatron_hapo.config.faults import Fault
from megatron_hapo.config.section import Fraction, PositiveInt, Seconds, Section

GRADING_TEMPLATE = """Grade a response to a problem.

Problem:
{prompt}

Correct answer:
{ground_truth}

Response:
{response}

Say in a few sentences whether the response reaches the correct answer by sound steps. Then end with a line of the form
Score: N
where N is a whole number from 0 (wrong) to 10 (right, with every step sound)."""


def _server_url(url: str) -> str:
    parts = _split(url)
    if (
        parts is None
        or parts.scheme not in ("http", "https")
        or not parts.hostname
        or not url.isprintable()
        or " " in url
        or len(url) > 2000
    ):
        raise PydanticCustomError("url", "must be a URL as http://HOST:PORT/PATH or https://HOST/PATH")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise PydanticCustomError(
            "secret", "must have no user, password, query or fragment; a key belongs into the variable of api_key_env"
        )
    return url.rstrip("/")


def _split(url: str) -> SplitResult | None:
    """The parts of a URL; None if it has none, or a port that cannot be."""
    try:
        parts = urlsplit(url)
        return parts if parts.port != 0 else None
    except ValueError:
        return None


def _variable_name(name: str) -> str:
    if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,127}", name) is None:
        raise PydanticCustomError("secret", "must be the name of an environment variable, and not the key itself")
    return name


def _with_response(template: str) -> str:
    if "{response}" not in template:
        raise PydanticCustomError("template", "must contain {response}, where the response is inserted")
    return template


class ServiceConfig(Section):
    """A server that the driver asks about responses, and its limits."""

    url: Annotated[str, AfterValidator(_server_url)]
    """Where it answers, e.g. http://127.0.0.1:8000/v1."""
    api_key_env: Annotated[str, AfterValidator(_variable_name)] | None = None
    """Environment variable of the driver that holds the server's key, which is sent as a bearer token and neither
    logged nor written. `None`: no key."""
    concurrency: Annotated[int, Field(gt=0, le=4096)] = 16
    """Requests that wait for an answer at once."""
    timeout_seconds: Seconds = 60
    """A request that is not answered within this time has failed."""
    tries: Annotated[int, Field(gt=0, le=100)] = 5
    """Requests about one response. Those that are refused (429), that fail (5xx, no connection, too late) or whose
    answer is useless are repeated, each after twice the time. If the last one fails too, the response could not be
    scored, unless the server answers no request at all."""
    down_after_seconds: Seconds = 300
    """A server that answers no request for this long is down."""
    when_down: Literal["end", "hold"] = "end"
    """`end`: the run ends with an error, and continues from its newest checkpoint when it is started again. `hold`: the
    run waits until the server answers again, and says so every minute."""
    deadline_seconds: Seconds = 3600
    """The run ends if scoring the responses of a step takes longer, without the time for which the server was down."""
    max_failed_share: Fraction = 0.2
    """The run ends if a larger share of a step's responses, and at least four, could not be scored."""


class JudgeConfig(ServiceConfig):
    """A language model that scores responses, behind an endpoint that is compatible with OpenAI's chat completions."""

    model: Annotated[str, Field(min_length=1, max_length=500)]
    """Name of the model, as the server knows it."""
    template: Annotated[str, AfterValidator(_with_response)] = GRADING_TEMPLATE
    """What the judge is asked: {response} stands for the response, between marks that it cannot write itself, {prompt}
    for the last message of the prompt, {ground_truth} for the answer, {NAME} for the text of any other column."""
    system_prompt: str | None = None
    """System message. `None`: none is sent."""
    score_pattern: Annotated[str, AfterValidator(pattern_with_group)] = r"Score:\s*(-?\d+(?:\.\d+)?)"
    """Regular expression that the whole last line of the judge's reply must match; its group is the score, a number."""
    lowest: Annotated[float, Field(ge=-1e6, le=1e6)] = 0.0
    """Score of the worst response: correctness 0."""
    highest: Annotated[float, Field(ge=-1e6, le=1e6)] = 10.0
    """Score of the best response: correctness 1. Scores outside the range are useless answers."""
    max_tokens: PositiveInt = 1024
    """Longest reply, in tokens."""
    temperature: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Sampling temperature of the judge."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further fields of the request, e.g. {seed: 1}; one that is null is not sent, e.g. {temperature: null}."""

    def contradictions(self, key: str) -> Iterator[Fault]:
        """Settings that do not fit each other.

        Args:
            key: of this section.
        """
        if self.highest <= self.lowest:
            yield Fault(
                f"{key}.highest",
                f"must be greater than lowest={self.lowest:g}, got {self.highest:g}",
                (f"{key}.lowest",),
            )
