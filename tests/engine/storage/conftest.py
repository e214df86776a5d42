from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="package")
def exact_kernels() -> Iterator[None]:
    """What is stored is compared by logits to the last bit: 4-bit weights are unpacked, not multiplied as they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INGOT_C_KERNELS", "exact")
        yield
