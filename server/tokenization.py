"""Text to ids and back: /tokenize and /detokenize, and LMDeploy's /v1/encode."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import FailFast, Field, model_validator

from server.generation import Generation
from server.messages import Messages
from server.openai import Name
from server.shapes import RefusedField, Shape, TokenId, at_most

MOST_TEXTS = 1000


class TokenizeRequest(Shape):
    """A `prompt`, or `messages` through the chat template."""

    model: Name | None = None
    prompt: str | None = None
    messages: Annotated[Messages, Field(min_length=1)] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True

    @model_validator(mode="after")
    def one_text(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise RefusedField("Give 'prompt' or 'messages', and not both.", param="prompt")
        return self


class DetokenizeRequest(Shape):
    model: Name | None = None
    tokens: Annotated[list[TokenId], FailFast(), Field(max_length=1 << 20), at_most(1 << 20)]
    skip_special_tokens: bool = False


class EncodeRequest(Shape):
    """`do_preprocess` puts each text, as a message of the user, into the chat template."""

    input: str | Annotated[list[str], Field(min_length=1, max_length=MOST_TEXTS), at_most(MOST_TEXTS)]
    do_preprocess: bool = False
    add_bos: bool = True


class Tokenization:
    """The three endpoints; `router` has them."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation
        self.router = APIRouter()
        self.router.add_api_route("/tokenize", self.tokenize, methods=["POST"])
        self.router.add_api_route("/detokenize", self.detokenize, methods=["POST"])
        self.router.add_api_route("/v1/encode", self.encode, methods=["POST"])

    async def tokenize(self, request: Request, asked: TokenizeRequest) -> dict[str, Any]:
        generation, tokenizer = self._generation, self._generation.tokenizer
        arrival = generation.arrive(request)
        if asked.model is not None:
            generation.check_model(asked.model)
        if asked.prompt is not None:
            text, special = asked.prompt, asked.add_special_tokens
            ids = await generation.made(
                arrival, lambda: tokenizer.encode(text, add_special=special), size=len(text), param="prompt"
            )
        else:
            messages = asked.messages or []
            size = sum(message.size for message in messages)

            def make() -> list[int]:
                turns = [message.for_template() for message in messages]
                return tokenizer.encode_chat(turns, add_generation_prompt=asked.add_generation_prompt)

            ids = await generation.rendered(arrival, make, size=size, param="messages")
        return {"tokens": ids, "count": len(ids), "max_model_len": generation.client.session_len}

    async def detokenize(self, request: Request, asked: DetokenizeRequest) -> dict[str, Any]:
        generation = self._generation
        if asked.model is not None:
            generation.check_model(asked.model)
        ids, skip = asked.tokens, asked.skip_special_tokens
        text = await generation.made(
            generation.arrive(request),
            lambda: generation.tokenizer.decode(ids, skip_special=skip),
            size=len(ids),
            param="tokens",
        )
        return {"prompt": text}

    async def encode(self, request: Request, asked: EncodeRequest) -> dict[str, Any]:
        tokenizer = self._generation.tokenizer
        texts = [asked.input] if isinstance(asked.input, str) else asked.input

        def ids_of(text: str) -> list[int]:
            if asked.do_preprocess:
                return tokenizer.encode_chat([{"role": "user", "content": text}])
            return tokenizer.encode(text, add_special=asked.add_bos)

        size = sum(map(len, texts))
        make = self._generation.rendered if asked.do_preprocess else self._generation.made
        ids = await make(
            self._generation.arrive(request), lambda: [ids_of(text) for text in texts], size=size, param="input"
        )
        if isinstance(asked.input, str):
            return {"input_ids": ids[0], "length": len(ids[0])}
        return {"input_ids": ids, "length": [len(each) for each in ids]}
