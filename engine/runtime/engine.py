"""The engine: requests in, events out. `Engine.step` is the whole of serving; everything else here prepares it.
(Just above 300 lines: who reads one file first reads all of it.)
"""

from __future__ import annotations

import secrets
import uuid
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from engine.config import EngineConfig, Sampling
from engine.models import ranks
from engine.models.cache import KVScales, PerToken
from engine.models.decoder import Decoder
from engine.models.rope_scaling import is_dynamic, rope_base
from engine.runtime.answer import Answer
from engine.runtime.cache import PageTable
from engine.runtime.completion import Completion, completion_of
from engine.runtime.event import Event, FinishReason, TokenLogprob
from engine.runtime.grammar import Grammars
from engine.runtime.prepare import prepare
from engine.runtime.rank_processes import RankError, RankProcesses, ended_by_errors
from engine.runtime.runner import Launch
from engine.runtime.scheduler import Scheduler
from engine.runtime.sequence import Sequence, check_sampling
from engine.runtime.share import check_share, share_of_workspace
from engine.runtime.tokenizer import IncrementalDecoder, Tokenizer
from engine.storage.config_ini import engine_config_of
from engine.storage.workspace import Workspace

# On a GPU prompts are let in every so many steps while many sequences decode; see `Scheduler`.
PREFILL_INTERVAL = 4
# On a CPU the steps that several owners share are no longer than that; see `ShortSteps`.
MOST_DECODES = 24


class Engine:
    """Continuous batching of requests over one model and one paged KV cache. Not thread-safe: one caller steps it."""

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        config: EngineConfig,
        *,
        session_len: int,
        kv_scales: KVScales | PerToken | None = None,
        others: RankProcesses | None = None,
    ) -> None:
        """The KV cache is int8 if `kv_scales` are given. Of several ranks, model and scales are rank 0's, and `others`
        are at work on theirs. Raises ValueError if the cache cannot hold one session."""
        if session_len < 2:
            raise ValueError(f"session_len is {session_len}, but must hold a prompt and an answer: at least 2 tokens.")
        self.session_len, self.vocab_size = session_len, model.config.vocab_size
        self._model_config, self._tokenizer = model.config, tokenizer
        config = config.complete()
        ends = (*model.config.eos_token_ids, *tokenizer.eos_token_ids, *config.end_ids)
        # -1 stands for none, and what the model has no logit for is never drawn.
        self.eos_token_ids = tuple(dict.fromkeys(end for end in ends if 0 <= end < self.vocab_size))
        self._others = others
        if others is not None:
            others.wait_for("loaded")
            with others.together():
                ranks.join(others.store, 0, others.size, model.device)
        self._runner, num_pages, self.memory = prepare(
            model,
            config,
            session_len=session_len,
            kv_scales=kv_scales,
            eos_token_ids=self.eos_token_ids,
            others=others,
        )
        self._scheduler = Scheduler(
            PageTable(num_pages, config.cache_block_seq_len),
            max_batch_size=config.max_batch_size,
            num_tokens_per_iter=config.num_tokens_per_iter,
            prefix_caching=config.prefix_caching,
            prefill_interval=PREFILL_INTERVAL if model.device.type == "cuda" else 1,
            most_decodes=0 if model.device.type == "cuda" else MOST_DECODES,
        )
        self.grammars = Grammars(tokenizer, vocab_size=self.vocab_size, eos_token_ids=self.eos_token_ids)
        self._requests: dict[str, tuple[Sequence, Answer]] = {}
        self._untold: list[Event] = []
        self._flying: deque[tuple[list[Sequence], Launch]] = deque()

    @classmethod
    def from_workspace(cls, folder: Path, config: EngineConfig, *, digests: dict[str, str] | None = None) -> Engine:
        """The engine of a workspace; what `config` leaves open config.ini says. With `tp` above 1 it starts the other
        ranks, which read their shares themselves, and which `close` ends. `digests` is that of `share_of_workspace`."""
        workspace = Workspace(folder)
        config = config.over(engine_config_of(workspace.ini))
        check_share(workspace, config, 0)
        tokenizer = Tokenizer(workspace.tokenizer_folder)
        others = None
        if config.tp > 1:
            others = RankProcesses(config.tp, {"folder": str(folder.absolute()), "config": asdict(config)})
        with ended_by_errors(others):
            share = share_of_workspace(workspace, config, 0, digests)
            return cls(
                share.model,
                tokenizer,
                config,
                session_len=config.session_len,
                kv_scales=share.kv_scales,
                others=others,
            )

    def close(self) -> None:
        """End the processes of the other ranks. The engine cannot be used afterwards; with one rank there is nothing to
        end, and memory goes with the object."""
        if self._others is not None:
            self._runner.release()
            self._others.close()

    def on_rank_death(self, call: Callable[[RankError], None]) -> None:
        """What is called at once, in a thread of its own, when another rank dies, whatever this one does."""
        if self._others is not None:
            self._others.on_death(call)

    def step(self) -> list[Event]:
        """Launch one step of all requests that fit into it, and tell what came of the last one.

        On a GPU the host works while the device does: a step is launched before the tokens of the one before it are
        read, and those go from one step to the next on the device alone. A request that has ended by a token that was
        not read in time computes one token more, which nobody sees.
        """
        if self._flying and self._scheduler.needs_host():
            self._untold += self._land()  # kept there: the launch may fail
        plan = self._scheduler.schedule()
        if plan.sequences:
            launch = self._runner.launch(plan)
            self._flying.append((self._scheduler.advance(plan), launch))
        if self._flying and (len(self._flying) > self._runner.depth or not plan.sequences):
            self._untold += self._land()
        events, self._untold = self._untold, []
        return events

    def _land(self) -> list[Event]:
        """Wait for the oldest launched step and take in what it drew."""
        drawing, launch = self._flying.popleft()
        drawn = launch()
        self._scheduler.resolve(drawing, drawn.token_ids)
        return [
            self._advance(sequence, token, logprob)
            for sequence, token, logprob in zip(drawing, drawn.token_ids, drawn.logprobs, strict=True)
            if not sequence.ended
        ]

    def add(
        self,
        prompt_ids: list[int],
        sampling: Sampling,
        *,
        request_id: str | None = None,
        owner: str = "",
        priority: int = 0,
    ) -> str:
        """Queue a request and return its id. Owners share the engine fairly; among one's requests, lower `priority`
        comes first. Raises ValueError for a prompt or an option that cannot be served.

        The answer ends with "length" where prompt and answer reach session_len, even before max_new_tokens.
        """
        request_id = request_id or uuid.uuid4().hex
        if request_id in self._requests:
            raise ValueError(f"The request id {request_id!r} is in use: give every request one of its own.")
        check_sampling(sampling, vocab_size=self.vocab_size)
        self._check_prompt(prompt_ids, most=self.session_len - 1)
        limit = min(len(prompt_ids) + sampling.max_new_tokens, self.session_len)
        sequence = Sequence(
            request_id=request_id,
            tokens=list(prompt_ids),
            limit=limit,
            rope_base=self._rope_base(limit),
            sampling=sampling,
            seed=secrets.randbits(64) if sampling.seed is None else sampling.seed,
            constraint=None if sampling.grammar is None else self.grammars.constraint(sampling.grammar),
            owner=owner,
            priority=priority,
        )
        decoder = IncrementalDecoder(self._tokenizer, prompt_ids=prompt_ids, skip_special=sampling.skip_special_tokens)
        answer = Answer(decoder, stop=sampling.stop)
        self._scheduler.add(sequence)
        self._requests[request_id] = sequence, answer
        return request_id

    def abort(self, request_id: str) -> None:
        """End a request and free its pages now; the next step says so. One that is over already is left alone."""
        if request_id in self._requests:
            sequence, answer = self._requests.pop(request_id)
            self._scheduler.finish(sequence)
            self._untold.append(_event(sequence, (), answer.finish(), "abort"))

    def has_work(self) -> bool:
        return self._scheduler.has_work() or bool(self._untold) or bool(self._flying)

    def figures(self) -> dict[str, float]:
        """What the scheduler says of itself, for those who watch."""
        return self._scheduler.figures()

    def check(self) -> None:
        """Assert that no page is lost and every invariant of the scheduler holds."""
        self._scheduler.check()

    def generate(self, prompts: Items[list[int]], sampling: Sampling | Items[Sampling]) -> list[Completion]:
        """Answers to all prompts, in their order; the engine must be idle. `sampling` is for all, or one for each."""
        self._check_idle()
        options = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        ids: list[str] = []
        events: dict[str, list[Event]] = {}
        try:
            for prompt_ids, option in zip(prompts, options, strict=True):
                ids.append(self.add(prompt_ids, option))
            while self.has_work():
                for event in self.step():
                    events.setdefault(event.request_id, []).append(event)
        finally:
            for request_id in ids:
                self.abort(request_id)
            while self._flying:
                self._land()
            self._untold.clear()
        return [completion_of(events[request_id]) for request_id in ids]

    def score(self, items: Items[list[int]], on_logits: Callable[[int, int, Tensor], None]) -> None:
        """Run every item through the KV cache in chunks, without drawing a token; the engine must be idle.

        Calls `on_logits(item, start, logits)` for consecutive pieces of each item: row j of `logits`, float32
        [n, vocab], is what the model says after the token at position start + j.
        """
        self._check_idle()
        for tokens in items:
            self._check_prompt(tokens, most=self.session_len)
        sequences = [
            Sequence(request_id="", tokens=list(t), limit=len(t), scored=True, rope_base=self._rope_base(len(t)))
            for t in items
        ]
        numbers = {sequence: number for number, sequence in enumerate(sequences)}
        unfinished = set(sequences)
        try:
            for sequence in sequences:
                self._scheduler.add(sequence)
            while self._scheduler.has_work():
                plan = self._scheduler.schedule()
                logits = self._runner.logits(plan)
                row = 0
                for sequence in plan.sequences:
                    on_logits(numbers[sequence], sequence.cached, logits[row : row + sequence.scheduled])
                    row += sequence.scheduled
                self._scheduler.commit(plan, ())
                for sequence in plan.sequences:
                    if sequence.cached == len(sequence):
                        self._scheduler.finish(sequence)
                        unfinished.remove(sequence)
        finally:
            for sequence in unfinished:
                self._scheduler.finish(sequence)

    def _advance(self, sequence: Sequence, token: int, logprob: TokenLogprob | None) -> Event:
        """Turn the newest token of a sequence into news, and end the request where that token ends it."""
        _, answer = self._requests[sequence.request_id]
        known = len(sequence.tokens) - sequence.pending
        ended = token in self.eos_token_ids or token in sequence.sampling.stop_token_ids
        text = "" if ended else answer.push(token)
        reason: FinishReason | None = None
        if ended or answer.stopped or known == sequence.limit:
            text += answer.finish()
            reason = "stop" if ended or answer.stopped else "length"
            self._scheduler.finish(sequence)
            del self._requests[sequence.request_id]
        return _event(sequence, (token,), text, reason, () if logprob is None else (logprob,))

    def _rope_base(self, limit: int) -> float | None:
        """The rotary base of a sequence that may reach `limit` tokens; None where all sequences have the model's."""
        return rope_base(self._model_config, limit) if is_dynamic(self._model_config) else None

    def _check_prompt(self, prompt_ids: list[int], *, most: int) -> None:
        if not prompt_ids:
            raise ValueError("The prompt is empty: it must have at least one token.")
        if len(prompt_ids) > most:
            raise ValueError(
                f"The prompt has {len(prompt_ids)} tokens, but with session_len {self.session_len} it can have 1 to "
                f"{most}. Shorten the prompt or raise session_len."
            )
        lowest, highest = min(prompt_ids), max(prompt_ids)
        if lowest < 0 or highest >= self.vocab_size:
            wrong = lowest if lowest < 0 else highest
            raise ValueError(
                f"The prompt has the token id {wrong}, but this model knows 0 to {self.vocab_size - 1}. "
                "Encode the prompt with the tokenizer of this model."
            )

    def _check_idle(self) -> None:
        if self.has_work():
            raise ValueError("The engine has unfinished requests: let step() finish them, or abort them, first.")


def _event(
    sequence: Sequence,
    token_ids: tuple[int, ...],
    text: str,
    reason: FinishReason | None,
    logprobs: tuple[TokenLogprob, ...] = (),
) -> Event:
    prompt = sequence.prompt_length
    return Event(  # without keywords, which take as long again
        sequence.request_id,
        token_ids,
        text,
        reason,
        prompt,
        sequence.prefix_hit or 0,
        len(sequence.tokens) - sequence.pending - prompt,
        logprobs,
        sequence.admitted,
    )
