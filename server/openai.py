"""OpenAI's request shapes, as far as they can be honoured, with the options that this engine adds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import chain
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    PlainValidator,
    StringConstraints,
    TypeAdapter,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from engine.config import Sampling
from engine.runtime.sequence import LARGEST_BIAS, LEAST_PENALTY, MOST_LOGPROBS
from server.messages import Message, Messages
from server.response_format import ResponseFormat, TextFormat
from server.shapes import RefusedField, Shape, StopString, TokenId, at_most, same_value, too_many
from server.tools import NamedChoice, Tool, ToolChoice, Tools, callable_tools, check_tools

LARGEST_SEED = 2**63 - 1
MOST_STOPS = 16
MOST_BIASES = 1024
MOST_IDS = 1 << 20
Bias = Annotated[float, Field(ge=-LARGEST_BIAS, le=LARGEST_BIAS)]
BiasedToken = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,10}$")]
Name = Annotated[str, StringConstraints(max_length=512)]

# Fields of OpenAI's schema, and of LMDeploy's, whose function is not here; the values listed ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "function_call": (None, "none"),
    "functions": (None, []),
    "metadata": (None, {}),
    "modalities": (None, ["text"]),
    "prediction": (None,),
    "reasoning_effort": (None, "none"),
    # A request is its whole conversation here, so each begins anew, as LMDeploy's -1 and true say.
    "renew_session": (None, False, True),
    "session_id": (None, -1),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "suffix": (None, ""),
    "verbosity": (None,),
    "web_search_options": (None,),
}


class StreamOptions(Shape):
    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class Request(Shape, ABC):
    """What both endpoints have in common. Among one key's requests, lower `priority` comes first.
    `user` and the like identify callers and change no answer."""

    model: Name
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    top_k: int | None = Field(default=None, ge=0, le=2**31 - 1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, ge=LEAST_PENALTY, le=100)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: Annotated[dict[BiasedToken, Bias], Field(max_length=MOST_BIASES), at_most(MOST_BIASES)] | None = None
    n: int | None = Field(default=None, ge=1, le=128)
    max_tokens: int | None = Field(default=None, ge=1, le=2**31 - 1)
    stop: StopString | Annotated[list[StopString], Field(max_length=MOST_STOPS), at_most(MOST_STOPS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=128), at_most(128)] | None = None
    seed: int | None = Field(default=None, ge=-LARGEST_SEED - 1, le=LARGEST_SEED)
    ignore_eos: bool | None = None
    priority: int | None = Field(default=None, ge=-(2**31), le=2**31 - 1)
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Name | None = None
    safety_identifier: Name | None = None
    prompt_cache_key: Name | None = None

    @model_validator(mode="before")
    @classmethod
    def take_neutral_fields(cls, content: Any) -> Any:
        if not isinstance(content, dict):
            return content
        for name in content.keys() & NEUTRAL.keys():
            if not any(same_value(content[name], value) for value in NEUTRAL[name]):
                raise RefusedField(
                    f"This server cannot honour {name!r} with this value: leave it out.",
                    param=name,
                    code="unsupported_parameter",
                )
        return {name: value for name, value in content.items() if name not in NEUTRAL}

    @field_validator("stop", mode="before")
    @classmethod
    def stop_is_no_command(cls, stop: Any) -> Any:
        if stop is True:
            raise RefusedField(
                "'stop': true stops a session, which has answers at /v1/chat/interactive alone; here give the strings "
                "to stop at, or close the connection.",
                param="stop",
                code="invalid_value",
            )
        return None if stop is False else stop

    @model_validator(mode="after")
    def options_need_a_stream(self) -> Request:
        if self.stream_options is not None and not self.stream:
            raise RefusedField("'stream_options' is only allowed with 'stream': true.", param="stream_options")
        return self

    @property
    def answers(self) -> int:
        """How many answers to each prompt."""
        return self.n or 1

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return () if not self.stop else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    @abstractmethod
    def wanted_logprobs(self) -> int | None:
        """How many of the likeliest tokens each token comes with; None without log-probabilities."""

    def sampling(self, *, most: int, answer: int) -> Sampling:
        """Sampling of answer number `answer`: with a seed, each answer gets one of its own."""
        return Sampling(
            max_new_tokens=most,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k or 0,
            min_p=self.min_p or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=tuple((int(token), bias) for token, bias in (self.logit_bias or {}).items()),
            seed=None if self.seed is None else (self.seed + answer) % 2**63,
            stop=self.stop_strings,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            skip_special_tokens=self.skip_special_tokens is not False,
            logprobs=self.wanted_logprobs,
        )


Prompt = str | Annotated[list[str] | list[TokenId] | list[list[TokenId]], Field(min_length=1, max_length=MOST_IDS)]
PROMPT_SCHEMA = TypeAdapter(Prompt).json_schema()


def check_prompt(given: Any) -> Any:
    """What Prompt says. By hand: of a list that is all wrong, pydantic would tell every entry, three times."""
    if isinstance(given, str):
        return given
    entries = given if isinstance(given, list) else []
    kinds = set(map(type, entries))
    lists = entries if kinds == {list} else [entries]
    if (found := sum(map(len, lists), start=len(lists))) > MOST_IDS + 1:
        raise too_many(MOST_IDS, found)
    if kinds == {str}:
        return given
    ids = list(chain.from_iterable(lists))
    if kinds and set(map(type, ids)) <= {int} and min(ids, default=0) >= 0 and max(ids, default=0) < 2**31:
        return given
    raise PydanticCustomError(
        "prompt", "It must be text, a list of texts, a list of token ids, or a list of such lists, and not empty"
    )


class ChatRequest(Request):
    """`messages` may be text, as in LMDeploy: one message of the user."""

    messages: str | Annotated[Messages, Field(min_length=1)]
    max_completion_tokens: int | None = Field(default=None, ge=1, le=2**31 - 1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MOST_LOGPROBS)
    response_format: ResponseFormat | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def fields_fit_together(self) -> ChatRequest:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise RefusedField(
                "'max_tokens' and 'max_completion_tokens' mean the same: give one of them.", param="max_tokens"
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise RefusedField("'top_logprobs' is only allowed with 'logprobs': true.", param="top_logprobs")
        check_tools(self.tools, self.tool_choice)
        structured = self.response_format is not None and not isinstance(self.response_format, TextFormat)
        if structured and self.callable:
            raise RefusedField(
                "'response_format' cannot be followed by an answer that may call tools: set 'tool_choice' to \"none\".",
                param="response_format",
            )
        if self.ignore_eos and (structured or self.must_call):
            raise RefusedField(
                "'ignore_eos' is for text: a structured answer ends where it is whole.", param="ignore_eos"
            )
        return self

    @property
    def turns(self) -> list[Message]:
        if isinstance(self.messages, str):
            return [Message(role="user", content=self.messages)]
        return self.messages

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def callable(self) -> list[Tool]:
        """The tools that the answer may call."""
        return callable_tools(self.tools, self.tool_choice)

    @property
    def must_call(self) -> bool:
        return self.tool_choice == "required" or self.names_function

    @property
    def names_function(self) -> bool:
        return isinstance(self.tool_choice, NamedChoice)

    @property
    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Request):
    prompt: Annotated[Prompt, PlainValidator(check_prompt), WithJsonSchema(PROMPT_SCHEMA)]
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS, strict=True)] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as text or ids. A flat list of ids is one prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[token_id for token_id in self.prompt if isinstance(token_id, int)]]
        return [prompt for prompt in self.prompt if not isinstance(prompt, int)]

    @property
    def wanted_logprobs(self) -> int | None:
        return self.logprobs
