"""OpenAI's request shapes, as far as they can be honoured, and the bodies of its answers.

A field is either honoured, accepted because its value asks for nothing, or refused by name: none is dropped in silence.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from engine.config import Sampling

LARGEST_SEED = 2**63 - 1
StopString = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1, strict=True)]

# Fields of OpenAI's schema whose function is not here; the values listed ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "metadata": (None, {}),
    "min_p": (None, 0),
    "modalities": (None, ["text"]),
    "parallel_tool_calls": (None, True, False),
    "prediction": (None,),
    "presence_penalty": (None, 0),
    "reasoning_effort": (None, "none"),
    "response_format": (None, {"type": "text"}),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "suffix": (None, ""),
    "tool_choice": (None, "none"),
    "tools": (None, []),
    "top_logprobs": (None, 0),
    "verbosity": (None,),
    "web_search_options": (None,),
}


class RefusedField(ValueError):
    """A field, or a value of it, that this server cannot honour."""

    def __init__(self, message: str, *, param: str, code: str = "unsupported_value") -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True, allow_inf_nan=False)


class StreamOptions(Shape):
    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class TextPart(Shape):
    type: Literal["text"]
    text: str


class Message(Shape):
    """One turn. `developer` is OpenAI's newer word for `system` and is passed to the template as that."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None
    annotations: Literal[None] | list[None] = None

    def for_template(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        role = "system" if self.role == "developer" else self.role
        named = {} if self.name is None else {"name": self.name}
        return {"role": role, "content": text, **named}


class Request(Shape):
    """What both endpoints have in common. `user` and the like identify callers and change no answer."""

    model: str
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
    repetition_penalty: float | None = Field(default=None, gt=0, le=100)
    n: int | None = Field(default=None, ge=1, le=128)
    max_tokens: int | None = Field(default=None, ge=1)
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    seed: int | None = Field(default=None, ge=-LARGEST_SEED - 1, le=LARGEST_SEED)
    ignore_eos: bool = False
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="before")
    @classmethod
    def take_neutral_fields(cls, content: Any) -> Any:
        if not isinstance(content, dict):
            return content
        for name in content.keys() & NEUTRAL.keys():
            # `==` alone would take True for 1 and 0 for False.
            if not any(content[name] == value and _same_kind(content[name], value) for value in NEUTRAL[name]):
                raise RefusedField(
                    f"This server cannot honour {name!r} with this value: leave it out.",
                    param=name,
                    code="unsupported_parameter",
                )
        return {name: value for name, value in content.items() if name not in NEUTRAL}

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
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def sampling(self, *, most: int, answer: int) -> Sampling:
        """Sampling of answer number `answer`: with a seed, each answer gets one of its own."""
        return Sampling(
            max_new_tokens=most,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k or 0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            seed=None if self.seed is None else (self.seed + answer) % 2**63,
            stop=self.stop_strings,
            ignore_eos=self.ignore_eos,
        )


class ChatRequest(Request):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def one_limit(self) -> ChatRequest:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise RefusedField(
                "'max_tokens' and 'max_completion_tokens' mean the same: give one of them.", param="max_tokens"
            )
        return self

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(Request):
    prompt: str | Annotated[list[str] | list[TokenId] | list[list[TokenId]], Field(min_length=1, max_length=1000)]

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as text or ids. A flat list of ids is one prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[token_id for token_id in self.prompt if isinstance(token_id, int)]]
        return [prompt for prompt in self.prompt if not isinstance(prompt, int)]


def _same_kind(given: Any, neutral: Any) -> bool:
    return isinstance(given, bool) == isinstance(neutral, bool)


def error_body(message: str, *, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def usage(*, prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }
