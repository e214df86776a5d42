"""What test_adapters.py runs in a virtual environment of its own: `python adapters_client.py URL KEY`.

Prints one line for each thing that was done, and ends with 1 at the first that fails.
"""

import asyncio
import json
import sys

url, key = sys.argv[1:]
QUESTION = "the cat sat"
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "maximum": 9}},
    "required": ["city", "days"],
}


def litellm_does() -> None:
    import litellm

    litellm.telemetry = False
    tool = {"type": "function", "function": {"name": "weather", "parameters": WEATHER}}
    base = {"model": "openai/tiny", "api_base": url, "api_key": key, "max_tokens": 200}
    messages = [{"role": "user", "content": QUESTION}]
    answer = litellm.completion(messages=messages, **{**base, "max_tokens": 8})
    assert answer.choices[0].message.content
    assert answer.usage.completion_tokens
    print("litellm chat")
    pieces = litellm.completion(messages=messages, stream=True, **{**base, "max_tokens": 8})
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces)
    print("litellm stream")
    assert asyncio.run(litellm.acompletion(messages=messages, **{**base, "max_tokens": 8})).choices
    print("litellm async")
    answer = litellm.completion(messages=messages, tools=[tool], tool_choice="required", **base)
    [call, *_] = answer.choices[0].message.tool_calls
    assert set(json.loads(call.function.arguments)) == {"city", "days"}
    print("litellm tool call")
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    talk = [*messages, answer.choices[0].message, result]
    assert litellm.completion(messages=talk, tools=[tool], **{**base, "max_tokens": 8}).choices
    print("litellm tool result")


def langchain_does() -> None:
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI
    from pydantic import BaseModel, Field

    @tool
    def clock(hour: int) -> str:
        """The time at an hour."""
        return str(hour)

    class Cat(BaseModel):
        """A cat."""

        name: str = Field(max_length=6)
        age: int = Field(ge=0, le=30)

    model = ChatOpenAI(model="tiny", base_url=url, api_key=key, max_tokens=8)
    assert model.invoke(QUESTION).content
    print("langchain chat")
    assert "".join(str(piece.content) for piece in model.stream(QUESTION))
    print("langchain stream")
    assert asyncio.run(model.ainvoke(QUESTION)).content
    print("langchain async")
    roomy = ChatOpenAI(model="tiny", base_url=url, api_key=key, max_tokens=300, temperature=0.7, seed=1)
    answer = roomy.bind_tools([clock], tool_choice="required").invoke(QUESTION)
    [call, *_] = answer.tool_calls
    assert call["name"] == "clock"
    assert set(call["args"]) == {"hour"}
    print("langchain tool call")
    talk = [
        HumanMessage(QUESTION),
        answer,
        *(ToolMessage("noon", tool_call_id=each["id"]) for each in answer.tool_calls),
    ]
    assert model.bind_tools([clock]).invoke(talk).response_metadata
    print("langchain tool result")
    for method in ("json_schema", "function_calling"):
        assert isinstance(roomy.with_structured_output(Cat, method=method).invoke(QUESTION), Cat)
        print(f"langchain {method}")


litellm_does()
langchain_does()
