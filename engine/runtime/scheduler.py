"""Which tokens of which sequences are computed next, and in which pages their K and V go.
(Just above 300 lines: one invariant over running, waiting and pages, and every change of them.)
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence as Items
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter

from engine.runtime.cache import PageTable, page_digest
from engine.runtime.fairness import ShortSteps, WaitingLine, prompt_limits, unfair
from engine.runtime.sequence import PENDING, Sequence


@dataclass(frozen=True)
class Plan:
    """One step: every sequence here has `scheduled` > 0 and pages for all its tokens."""

    sequences: tuple[Sequence, ...]

    @cached_property
    def drawing(self) -> list[Sequence]:
        """The sequences that get a new token from this step, in the order in which `commit` takes the tokens: to be
        asked for before the step is taken in."""
        # `Sequence.draws` written out: it is asked for every token.
        return [one for one in self.sequences if one.cached + one.scheduled == len(one.tokens) < one.limit]


class Scheduler:
    """First come, first served among the sequences of one owner, and fair between owners (see `fairness`).

    A step spends `num_tokens_per_iter` tokens on at most `max_batch_size` sequences: on the running ones first, then on
    waiting ones, of which the last may get only a part of its prompt. A sequence is admitted when pages for all its
    tokens are there, with one more for each that already runs to grow into. If pages run out all the same, the one
    admitted last gives its own back and waits again. So does one of the owner that has the most running, where there is
    no room for one of an owner that has fewer. The first sequence of an owner that has none running while others do is
    computed in a step of its own, so that its first token waits for nobody's batch; the step after is for all.

    With `prefill_interval` n above 1, waiting sequences are admitted in every n-th step only, while more than a quarter
    of max_batch_size run: a step that mixes prompts in costs more than one that only decodes, and n prompts at once
    hardly more than one where the host launches it kernel by kernel.

    `most_decodes` is that of `ShortSteps`.

    A step may be scheduled while the one before it is still computed: `advance` says that it was launched, and
    `resolve` later which tokens came of it.
    """

    def __init__(
        self,
        pages: PageTable,
        *,
        max_batch_size: int,
        num_tokens_per_iter: int,
        prefix_caching: bool = True,
        prefill_interval: int = 1,
        most_decodes: int = 0,
    ) -> None:
        for name, value in (
            ("max_batch_size", max_batch_size),
            ("num_tokens_per_iter", num_tokens_per_iter),
            ("prefill_interval", prefill_interval),
        ):
            if value < 1:
                raise ValueError(f"{name} is {value}, but must be at least 1.")
        self.pages = pages
        self.running: list[Sequence] = []
        self.waiting = WaitingLine()
        self.num_preemptions = 0
        self._max_batch_size = max_batch_size
        self._num_tokens_per_iter = num_tokens_per_iter
        self._prefix_caching = prefix_caching
        self._prefill_interval = prefill_interval
        self._steps_since_admission = 0
        self._newcomers_were_alone = False
        self._short_steps = ShortSteps(most_decodes)

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait for its turn. Raises ValueError if the whole cache could not hold it."""
        if self.pages.pages_for(sequence.limit) > self.pages.num_pages:
            raise ValueError(
                f"A sequence of up to {sequence.limit} tokens does not fit the KV cache of {self.pages.num_pages} "
                f"pages of {self.pages.page_len} tokens. Ask for fewer tokens or raise cache_max_entry_count."
            )
        self.waiting.add(sequence)

    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def needs_host(self) -> bool:
        """Whether a running sequence draws its next token with what the host makes of the last ones."""
        return any(map(attrgetter("needs_host"), self.running))

    def schedule(self) -> Plan:
        """Choose the next step. A step that could not be run is simply scheduled anew."""
        newcomers = [] if self._newcomers_were_alone else self._admit_newcomers()
        self._newcomers_were_alone = bool(newcomers)
        planned = newcomers or self._schedule_all()
        self._short_steps.took(planned)
        # Sequences with one token first, as the kernels take them; of these the longest context first, so that of the
        # programs of attention, which start in this order, none that takes long begins when the others are done.
        planned.sort(key=attrgetter("cached"), reverse=True)
        single = [sequence for sequence in planned if sequence.scheduled == 1]
        return Plan((*single, *[sequence for sequence in planned if sequence.scheduled > 1]))

    def _admit_newcomers(self) -> list[Sequence]:
        """Admits and schedules one sequence of each waiting owner that has none running, where others have."""
        owners = {sequence.owner for sequence in self.running}
        admitted: list[Sequence] = []
        budget = self._num_tokens_per_iter
        while owners and budget > 0 and self.waiting:
            sequence = self.waiting.first(self.running)
            if sequence.owner in owners or self._admit_by_force(sequence) is None:
                break
            owners.add(sequence.owner)
            admitted.append(sequence)
            budget -= self._give(sequence, budget, {})
        if admitted:
            self._short_steps.begin()
            for sequence in self.running:
                if sequence not in admitted:
                    sequence.scheduled = 0  # of a step that could not be run
        return admitted

    def _schedule_all(self) -> list[Sequence]:
        budget = self._num_tokens_per_iter
        limits = self._prompt_limits()
        admitting = self._admits()
        resting = self._short_steps.resting(self.running)
        page_len = self.pages.page_len
        index = 0
        while index < len(self.running):
            sequence = self.running[index]
            length = len(sequence.tokens)
            if resting and sequence in resting:
                sequence.scheduled = 0
                index += 1
                continue
            if length == sequence.limit and sequence.pending:
                index += 1  # its last token is being drawn: nothing is left to compute
                continue
            if length > len(sequence.pages) * page_len and not self._grow(sequence):
                self._preempt(self.running[-1])  # the last in `running`: a later arrival, or this sequence itself
                admitting = False
                continue
            if budget and length == sequence.cached + 1:
                sequence.scheduled = 1
                budget -= 1
            else:
                budget -= self._give(sequence, budget, limits)
            index += 1
        while admitting and budget > 0 and self.waiting:
            sequence = self.waiting.first(self.running)
            given_back = self._admit_by_force(sequence)
            if given_back is None:
                break
            budget += given_back
            budget -= self._give(sequence, budget, limits)
        return [sequence for sequence in self.running if sequence.scheduled]

    def _admits(self) -> bool:
        """Whether this is a step that lets waiting sequences in."""
        self._steps_since_admission += 1
        few = len(self.running) <= self._max_batch_size // 4
        return few or self._steps_since_admission >= self._prefill_interval

    def commit(self, plan: Plan, tokens: Items[int]) -> None:
        """Take in a step that was run: `tokens` are the new ones of `plan.drawing`."""
        self.resolve(self.advance(plan), tokens)

    def advance(self, plan: Plan) -> list[Sequence]:
        """A step was launched: its K and V count as cached, and the sequences that draw, which are returned, have one
        more token, PENDING."""
        drawing = plan.drawing
        for sequence in plan.sequences:
            sequence.cached += sequence.scheduled
            sequence.scheduled = 0
        for sequence in drawing:
            sequence.tokens.append(PENDING)
            sequence.pending += 1
        self._publish(plan.sequences)
        return drawing

    def resolve(self, drawing: Items[Sequence], tokens: Items[int]) -> list[Sequence]:
        """The tokens that a launched step drew, in the order of `advance`, which is that of the steps. Returns those of
        `drawing` that have not ended since: the tokens of the others mean nothing."""
        alive = []
        for sequence, token in zip(drawing, tokens, strict=True):
            if not sequence.ended:
                sequence.tokens[-sequence.pending] = token
                sequence.pending -= 1
                alive.append(sequence)
        self._publish(alive)
        return alive

    def finish(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it stands, and let go of its pages. A step that is being computed may still write
        to them: it does so before any later step writes or reads."""
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        sequence.ended = True
        self._release(sequence)

    def _publish(self, sequences: Items[Sequence]) -> None:
        """Make findable what is written and whose tokens are known."""
        if not self._prefix_caching:
            return
        page_len = self.pages.page_len
        for sequence in sequences:
            if sequence.cached < (sequence.published + 1) * page_len or sequence.scored:
                continue  # most steps fill no page
            full = min(sequence.cached, sequence.known) // page_len
            if sequence.published < full:
                digests = self._digests(sequence)
                for index in range(sequence.published, full):
                    self.pages.publish(sequence.pages[index], digests[index])
                sequence.published = full

    def _admit(self, sequence: Sequence) -> bool:
        if sequence.pending:
            return False  # preempted while its token is being drawn, which what it computes begins with
        found: list[int] = []
        if self._shares(sequence):
            # The last token is always computed: its logits are what the next one is drawn from.
            found = self.pages.lookup(self._digests(sequence)[: (len(sequence) - 1) // self.pages.page_len])
        missing = self.pages.pages_for(len(sequence)) - len(found)
        if missing + len(self.running) > self.pages.num_available_beside(found):
            return False
        self.pages.acquire(found)
        sequence.pages = found + self.pages.allocate(missing)
        sequence.cached = len(found) * self.pages.page_len
        sequence.published = len(found)
        if sequence.prefix_hit is None:
            sequence.prefix_hit = sequence.cached
            sequence.admitted = time.monotonic()
        return True

    def _admit_by_force(self, sequence: Sequence) -> int | None:
        """Let a waiting sequence run, and others of an owner that has more running give way where there is no room.
        Returns how many tokens of this step they give back; None where there is no room all the same."""
        given_back = 0
        while len(self.running) == self._max_batch_size or not self._admit(sequence):
            victim = unfair(self.running, sequence.owner)
            if victim is None or sequence.pending:
                return None
            given_back += victim.scheduled
            self._preempt(victim)
        self.waiting.admit(sequence)
        self.running.append(sequence)
        self._steps_since_admission = 0
        return given_back

    def _grow(self, sequence: Sequence) -> bool:
        """Give a running sequence the pages that its tokens lack, if there are so many."""
        missing = self.pages.pages_for(len(sequence)) - len(sequence.pages)
        if missing > self.pages.num_available:
            return False
        sequence.pages += self.pages.allocate(missing)
        return True

    def _prompt_limits(self) -> dict[str, int]:
        """How many tokens of prompts the sequences of each owner may get in this step; empty with one owner."""
        owners = {sequence.owner for sequence in self.running}
        newcomer = self.waiting.first(self.running) if self.waiting else None
        if newcomer is None or newcomer.owner in owners:
            newcomer = None
        if len(owners) + (newcomer is not None) < 2:
            return {}
        needs: Counter[str] = Counter()
        decoding = 0
        for sequence in self.running:
            missing = len(sequence) - sequence.cached
            decoding += missing == 1
            needs[sequence.owner] += missing if missing > 1 else 0
        if newcomer is not None:
            needs[newcomer.owner] = len(newcomer)
        return prompt_limits(+needs, max(0, self._num_tokens_per_iter - decoding))

    def _give(self, sequence: Sequence, budget: int, limits: dict[str, int]) -> int:
        """Schedule what a sequence gets of `budget`, and return how much that is."""
        missing = len(sequence) - sequence.cached
        limit = limits.get(sequence.owner, budget) if missing > 1 else budget
        sequence.scheduled = min(budget, missing, limit)
        if missing > 1 and sequence.owner in limits:
            limits[sequence.owner] -= sequence.scheduled
        return sequence.scheduled

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        self.waiting.add(sequence)
        self.num_preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        self.pages.release(sequence.pages)
        sequence.pages = []
        sequence.cached = sequence.scheduled = sequence.published = 0

    def _shares(self, sequence: Sequence) -> bool:
        return self._prefix_caching and not sequence.scored

    def _digests(self, sequence: Sequence) -> list[bytes]:
        """The digests of the sequence's full pages; tokens are only ever appended, so old ones stay right."""
        digests, page_len = sequence.digests, self.pages.page_len
        for start in range(len(digests) * page_len, sequence.known - page_len + 1, page_len):
            parent = digests[-1] if digests else sequence.prefix_root
            digests.append(page_digest(parent, sequence.tokens[start : start + page_len]))
        return digests

    def figures(self) -> dict[str, float]:
        """How many sequences run and wait, which share of the pages is held, and how many were preempted so far."""
        return {
            "running": len(self.running),
            "waiting": len(self.waiting),
            "cache_usage": 1 - self.pages.num_available / self.pages.num_pages,
            "preemptions": self.num_preemptions,
        }

    def check(self) -> None:
        """Assert every invariant of the sequences and of the page table; for a moment between two steps."""
        self.pages.check([sequence.pages for sequence in self.running])
        assert len(self.running) <= self._max_batch_size, "more sequences than max_batch_size"
        for sequence in self.waiting:
            assert not sequence.pages and not sequence.cached and not sequence.scheduled, "a waiting sequence holds"
        for sequence in self.running:
            assert sequence.cached + sequence.scheduled <= len(sequence) <= sequence.limit, "a sequence is too long"
            assert sequence.cached <= len(sequence.pages) * self.pages.page_len, "tokens without a page"
            assert len(sequence.pages) <= self.pages.pages_for(len(sequence)), "pages without a token"
