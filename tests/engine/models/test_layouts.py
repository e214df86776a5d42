import re
from dataclasses import fields

import pytest

from engine.models import layouts, names
from engine.models.families import FAMILIES
from engine.models.layouts import Layout

ALL = {name: value for name, value in vars(layouts).items() if isinstance(value, Layout)}


def stored(layout, module):
    return layout.modules.get(module, module)


@pytest.mark.parametrize("name", ALL)
def test_every_module_has_a_place_of_its_own_but_those_that_are_packed(name):
    layout = ALL[name]
    assert set(layout.modules) <= set(names.LAYER_SHARDS)
    places = {module: stored(layout, module) for module in names.LAYER_SHARDS}
    packed = {places[module] for module in names.QKV}
    assert len(packed) == (3 if layout.qkv == "apart" else 1)
    apart = [place for module, place in places.items() if module not in names.QKV]
    assert len(set(apart)) == len(apart) and not packed & set(apart)
    assert len({layout.embedding, layout.final_norm, layout.head}) == 3


@pytest.mark.parametrize("name", ALL)
def test_names_are_paths_and_prefixes_end_with_a_point(name):
    layout = ALL[name]
    assert layout.layer_prefix.endswith(".")
    for place in (layout.embedding, layout.final_norm, layout.head):
        assert re.fullmatch(r"[a-z_]+(\.[a-z_]+)*\.weight", place)
    assert not any(place.endswith(layout.ignored) for place in (*layout.modules.values(), layout.head))


def test_every_family_has_a_layout_of_the_table_and_a_plain_one_is_llamas():
    assert {id(family.layout) for family in FAMILIES.values()} <= {id(layout) for layout in ALL.values()}
    plain = Layout()
    assert plain == layouts.HUGGING_FACE and plain.modules == {}
    assert (plain.embedding, plain.head, plain.layer_prefix) == (names.EMBEDDING, names.HEAD, names.LAYER_PREFIX)
    assert len(fields(Layout)) == 9, "a new field needs a row in the tests of the door"
