"""The page table: which pages of the KV cache are held, which can be found again, which are free."""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as Items
from hashlib import blake2b

from engine.cache_size import CacheSize, num_pages


def page_digest(parent: bytes, tokens: Items[int]) -> bytes:
    """128 bits that stand for a full page and everything before it: `parent` is the digest of the page before, empty
    for the first. K and V depend on nothing else within one engine, so equal digests mean equal pages; two different
    prefixes among 2**32 pages share one with probability 2**-65."""
    return blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()


def page_count(
    entry: CacheSize,
    *,
    page_bytes: int,
    free_bytes: int,
    page_len: int,
    session_len: int,
    most: int | None = None,
) -> int:
    """How many pages `cache_max_entry_count` = `entry` buys, see `engine.cache_size`.

    A share never buys more than `most`. Raises ValueError, naming the options, when one session does not fit.
    """
    pages = num_pages(entry, page_bytes=page_bytes, free_bytes=free_bytes)
    if most is not None and isinstance(entry, int | float) and entry < 1:
        pages = min(pages, most)
    needed = -(-session_len // page_len)
    if pages < needed:
        raise ValueError(
            f"The KV cache has {pages} pages of {page_len} tokens ({page_bytes / 2**20:.1f} MiB each; "
            f"cache_max_entry_count is {entry}, {free_bytes / 2**20:.0f} MiB are free), but one session of "
            f"session_len {session_len} needs {needed}. "
            "Raise cache_max_entry_count, lower session_len, or store the cache as int8 (quant_policy 4)."
        )
    return pages


class PageTable:
    """Reference counts of pages, and an index from a prefix to the pages that hold it.

    A page is in one of three states: free, held (by one sequence or more), or kept: held by nobody but published in
    the index, so that a later sequence finds it; kept pages are given away, least recently used first, when the free
    ones run out. Only `publish` enters a page into the index, and it is called when the page's K and V are written.
    """

    def __init__(self, num_pages: int, page_len: int) -> None:
        assert num_pages >= 1 and page_len >= 1, (num_pages, page_len)
        self.num_pages = num_pages
        self.page_len = page_len
        self._references = [0] * num_pages
        self._digests: list[bytes | None] = [None] * num_pages
        self._index: dict[bytes, int] = {}
        self._free = list(range(num_pages - 1, -1, -1))
        self._kept: OrderedDict[int, None] = OrderedDict()

    @property
    def num_available(self) -> int:
        """Pages that `allocate` can give now."""
        return len(self._free) + len(self._kept)

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_len)

    def lookup(self, digests: Iterable[bytes]) -> list[int]:
        """The published pages of the longest prefix of `digests`. Changes nothing: `acquire` holds them."""
        pages = []
        for digest in digests:
            page = self._index.get(digest)
            if page is None:
                break
            pages.append(page)
        return pages

    def num_available_beside(self, pages: Iterable[int]) -> int:
        """Pages that `allocate` could still give if the found `pages` were acquired."""
        return self.num_available - sum(page in self._kept for page in pages)

    def acquire(self, pages: Iterable[int]) -> None:
        """Hold found pages once more."""
        for page in pages:
            self._kept.pop(page, None)
            self._references[page] += 1

    def allocate(self, count: int) -> list[int]:
        """Hold `count` pages of unknown content; the caller has made sure that so many are available."""
        assert count <= self.num_available, (count, self.num_available)
        pages = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for page in pages:
            self._references[page] = 1
        return pages

    def publish(self, page: int, digest: bytes) -> None:
        """Make a held page, now completely written, findable. Of two pages with one content the first stays."""
        assert self._references[page] > 0, page
        if self._digests[page] is None and digest not in self._index:
            self._digests[page] = digest
            self._index[digest] = page

    def release(self, pages: Items[int]) -> None:
        """Let go of a sequence's pages, given in its order: the tail becomes the first to be evicted, so that what
        remains of a prefix is its beginning, the only part that can be found."""
        for page in reversed(pages):
            assert self._references[page] > 0, page
            self._references[page] -= 1
            if self._references[page] == 0:
                if self._digests[page] is None:
                    self._free.append(page)
                else:
                    self._kept[page] = None

    def _evict(self) -> int:
        page, _ = self._kept.popitem(last=False)
        digest = self._digests[page]
        assert digest is not None
        del self._index[digest]
        self._digests[page] = None
        return page

    def check(self, holdings: Iterable[Items[int]]) -> None:
        """Assert every invariant, given the page lists of all that hold pages."""
        counts = Counter(page for pages in holdings for page in pages)
        free, kept = set(self._free), set(self._kept)
        held = {page for page in range(self.num_pages) if self._references[page]}
        assert len(free) == len(self._free), "a page is free twice"
        assert not free & kept and not free & held and not kept & held, "a page is in two states"
        assert len(free) + len(kept) + len(held) == self.num_pages, "a page is in no state"
        assert all(self._references[page] == counts[page] for page in range(self.num_pages)), "references are off"
        assert {digest: page for page, digest in enumerate(self._digests) if digest} == self._index, "index is astray"
        assert all(self._digests[page] is None for page in free), "a free page can be found"
        assert all(self._digests[page] is not None for page in kept), "a kept page cannot be found"
