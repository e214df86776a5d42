"""Tables of configurations: written, read, and chosen from."""

import json
import os

import pytest

from engine.kernels import tune, tuning


@pytest.fixture
def tables(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "TABLES", tmp_path)
    clear()
    yield tmp_path
    clear()


def clear():
    tuning.table.cache_clear()
    tuning.lookup.cache_clear()


def row(op, n, k, m, kernel):
    return {"op": op, "n": n, "k": k, "m": m, "config": {"kernel": kernel}}


def test_a_shape_takes_the_nearest_row_of_its_bucket(tables):
    rows = [row("int4_linear", 4096, 4096, 16, "a"), row("int4_linear", 12288, 4096, 16, "b")]
    tuning.write("card", rows, {"triton": "3.6.0"}, tables)
    assert tuning.lookup("int4_linear", "card", 4096, 4096, 9) == {"kernel": "a"}
    assert tuning.lookup("int4_linear", "card", 11008, 4096, 16) == {"kernel": "b"}
    assert tuning.lookup("int4_linear", "card", 4096, 4096, 17) is None  # of another bucket
    assert tuning.lookup("int4_linear", "card", 4096, 40960, 16) is None  # near no row
    assert tuning.lookup("int8_linear", "card", 4096, 4096, 16) is None
    assert tuning.lookup("int4_linear", "another card", 4096, 4096, 16) is None


def test_new_rows_replace_old_ones_of_the_same_product(tables):
    tuning.write("card", [row("x", 8, 8, 1, "old"), row("x", 16, 8, 1, "kept")], {"triton": "1"}, tables)
    path = tuning.write("card", [row("x", 8, 8, 1, "new")], {"triton": "2"}, tables)
    held = json.loads(path.read_text())
    assert held["triton"] == "2" and [r["config"]["kernel"] for r in held["rows"]] == ["new", "kept"]
    assert tuning.lookup("x", "card", 8, 8, 1) == {"kernel": "new"}


def test_a_row_for_unequal_contexts_goes_with_the_row_beside_it(tables):
    rows = [row(op, n, 8, 64, "old") for op in ("a", "a_uneven") for n in (8, 16)]
    tuning.write("card", rows, {}, tables)
    # Tuned again, where one configuration of the first is now good for all contexts, and not of the second.
    tuning.write(
        "card", [row("a", 8, 8, 64, "new"), row("a_uneven", 16, 8, 64, "new"), row("a", 16, 8, 64, "new")], {}, tables
    )
    assert [held["op"] for held in json.loads((tables / "card.json").read_text())["rows"]] == ["a", "a", "a_uneven"]
    assert tuning.lookup("a_uneven", "card", 16, 8, 64) == {"kernel": "new"}


def test_a_process_that_dies_of_a_configuration_ends_tuning():
    with tune.processes() as pool:
        assert tune.all_checked(pool, str.upper, ["a", "b"]) == ["A", "B"]
        with pytest.raises(ValueError, match="has died"):
            tune.all_checked(pool, os._exit, [1, 2, 3])


@pytest.mark.parametrize(("m", "size"), [(1, 1), (3, 4), (16, 16), (17, 32), (5000, 4096)])
def test_buckets(m, size):
    assert tuning.bucket(m) == size


@pytest.mark.parametrize("path", sorted(tuning.TABLES.glob("*.json")), ids=lambda path: path.stem)
def test_shipped_tables_hold_rows_of_known_operations(path):
    attention = {f"decode_{kind}_{kept}" for kind in ("one", "group") for kept in ("plain", "channels", "tokens")}
    attention |= {f"{op}_uneven" for op in attention}
    fused = {"normed_int4_linear", "normed_int8_linear", "rounded_int8_linear"}
    for held in json.loads(path.read_text())["rows"]:
        assert held["op"] in {"int4_linear", "int8_linear", "dense_linear"} | fused | attention
        assert held["m"] in tuning.BUCKETS and held["n"] > 0 and held["k"] > 0
        assert ("block" if held["op"] in attention else "kernel") in held["config"]


@pytest.mark.parametrize("path", sorted(tuning.TABLES.glob("*.json")), ids=lambda path: path.stem)
def test_shipped_rings_can_be_filled(path):
    """A tile of x must never wait for a place that is given back only after it: see `int4_gluon.default_config`."""
    held = [row["config"] for row in json.loads(path.read_text())["rows"] if row["config"].get("kernel") == "gluon"]
    assert held
    for config in held:
        turn, ahead, ring, slot, wait = (config[name] for name in ("turn", "ahead", "ring", "slot", "wait"))
        assert turn % ahead == turn % slot == slot % wait == ring % wait == 0, config
        assert ring > slot or ring == slot == turn, config
