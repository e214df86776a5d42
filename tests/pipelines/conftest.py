from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="package")
def kernels_of_a_stage() -> Iterator[None]:
    """int4 weights are multiplied as in a stage's own process: see `pipelines.toolchain.fix_instruction_set`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INGOT_C_KERNELS", "exact")
        yield
