import dataclasses

from engine.config import Grammar, Sampling
from engine.runtime import channel
from engine.runtime.event import Event, TokenLogprob
from engine.runtime.messages import pack_sampling, unpack_event, unpack_sampling

OTHER = Sampling(
    max_new_tokens=3,
    temperature=0.5,
    top_k=4,
    top_p=0.5,
    min_p=0.25,
    repetition_penalty=1.5,
    presence_penalty=-1.0,
    frequency_penalty=1.0,
    logit_bias=((3, 1.5), (4, -100.0)),
    seed=-7,
    stop=("a", "bc"),
    stop_token_ids=(1, 2),
    ignore_eos=True,
    skip_special_tokens=False,
    logprobs=0,
    grammar=Grammar(kind="regex", text="a+"),
)
EVENT = Event(
    request_id="a",
    token_ids=(3, 4),
    text="x",
    finish_reason="stop",
    prompt_tokens=5,
    cached_tokens=2,
    completion_tokens=2,
    logprobs=(
        TokenLogprob(token_id=3, logprob=-0.5, top=((3, -0.5), (1, -2.0))),
        TokenLogprob(token_id=4, logprob=0.0),
    ),
)


def through_msgpack(packed):
    return channel.unpack(channel.pack({"it": packed})[channel.HEADER :])["it"]


def test_every_option_crosses():
    for each in dataclasses.fields(Sampling):
        assert getattr(OTHER, each.name) != getattr(Sampling(), each.name), f"{each.name} is not tried here"
    for sampling in (OTHER, Sampling()):
        assert unpack_sampling(through_msgpack(pack_sampling(sampling))) == sampling
    assert pack_sampling(Sampling()) == {}


def test_every_field_of_an_event_crosses():
    # Event, TokenLogprob and tuple are equal where their entries are: what a field is has to be looked at.
    there = unpack_event(through_msgpack(EVENT))
    assert there == EVENT
    assert [type(each) for each in there.logprobs] == [TokenLogprob, TokenLogprob]
    assert there.logprobs[0].top == ((3, -0.5), (1, -2.0))
    assert unpack_event(through_msgpack(EVENT._replace(logprobs=()))).logprobs == ()
