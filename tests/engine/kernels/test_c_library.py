"""What is compiled when, where it is kept, and what is said where it cannot be."""

import logging
import os
import stat

import pytest

from engine.kernels import c_library, cpu_linear
from engine.kernels.c_library import NotCompiled

AMD = {"fpu", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"}
needs_compiler = pytest.mark.skipif(cpu_linear.functions() is None, reason="no C compiler is here")


@pytest.fixture
def cache_home(tmp_path, monkeypatch):
    """An empty cache, and a source that compiles in no time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(c_library, "SOURCE", tmp_path / "small.c")
    (tmp_path / "small.c").write_text("long twice(long x) { return 2 * x; }\n")
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("flags", "capability", "told"),
    [
        (AMD, "AVX512", {"-mavx2", "-mfma", "-mf16c", "-mavx512vnni", "-mavx512vl"}),
        (AMD, "AVX2", {"-mavx2", "-mfma", "-mf16c"}),
        (AMD - {"avx512_vnni"}, "AVX512", {"-mavx2", "-mfma", "-mf16c"}),
        (AMD, "DEFAULT", set()),
        (AMD - {"fma"}, "AVX2", set()),
        (set(), "NO AVX", set()),
    ],
)
def test_the_compiler_is_told_what_the_processor_has_and_torch_may_use(flags, capability, told):
    found = set(c_library.instruction_flags(flags, capability))
    assert told <= found and bool(told) == bool(found)
    assert any("avx512" in flag for flag in told) == any("avx512" in flag for flag in found)


@needs_compiler
def test_a_library_is_compiled_once_and_kept_for_its_owner_alone(cache_home, monkeypatch):
    assert c_library.library().twice(4) == 8
    [made] = (cache_home / "ingot" / "kernels").iterdir()
    for path, mode in ((made, 0o700), (made.parent, 0o700)):
        assert stat.S_IMODE(path.stat().st_mode) == mode
    monkeypatch.setattr(c_library, "_compile", lambda *_: pytest.fail("compiled again"))
    c_library.library()


@needs_compiler
def test_another_source_or_compiler_is_another_file(cache_home, monkeypatch):
    c_library.library()
    monkeypatch.setenv("CC", "cc -DOTHER")
    c_library.library()
    c_library.SOURCE.write_text("long twice(long x) { return x + x; }\n")
    c_library.library()
    assert len(list((cache_home / "ingot" / "kernels").iterdir())) == 3


@needs_compiler
def test_a_damaged_file_is_made_again(cache_home, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(c_library, "_loaded", lambda path: None)  # what is loaded once, the linker does not read again
        c_library.library()
    [made] = (cache_home / "ingot" / "kernels").iterdir()
    made.write_bytes(b"no library")
    assert c_library.library().twice(4) == 8
    assert made.read_bytes().startswith(b"\x7fELF")


@needs_compiler
@pytest.mark.parametrize("where", ["file", "folder", "parent", "link"])
def test_what_others_could_have_written_is_not_loaded(cache_home, tmp_path, monkeypatch, where):
    """A file that anybody can write is made anew; from a folder that anybody can write nothing is taken at all."""
    c_library.library()
    folder = cache_home / "ingot" / "kernels"
    [made] = folder.iterdir()
    if where == "link":
        made.rename(tmp_path / "elsewhere.so")
        made.symlink_to(tmp_path / "elsewhere.so")
    else:
        {"file": made, "folder": folder, "parent": cache_home}[where].chmod(0o777)
    compiled = []
    plain = c_library._compile
    monkeypatch.setattr(
        c_library, "_compile", lambda command, target: (compiled.append(target), plain(command, target))
    )
    c_library.library()
    [target] = compiled
    assert (target == made) == (where in ("file", "link"))
    assert not made.is_symlink() and (where != "file" or stat.S_IMODE(made.stat().st_mode) == 0o700)


@needs_compiler
def test_without_a_folder_to_keep_it_in_it_is_compiled_for_this_process(cache_home, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert c_library.cache_folder() is None
    assert c_library.library().twice(4) == 8


@pytest.mark.parametrize(
    ("compiler", "message"),
    [
        ("no-such-compiler", "CC=no-such-compiler is not there"),
        ("false", r"false failed: it said nothing"),
        ("cc -no-such-flag", r"-no-such-flag"),
    ],
)
def test_a_compiler_that_does_not_compile_is_named(cache_home, monkeypatch, compiler, message):
    if compiler.startswith("cc") and cpu_linear.functions() is None:
        pytest.skip("no C compiler is here")
    monkeypatch.setenv("CC", compiler)
    with pytest.raises(NotCompiled, match=message):
        c_library.library()
    folder = cache_home / "ingot" / "kernels"
    assert not folder.exists() or not list(folder.iterdir())


def test_without_a_compiler_torch_computes_and_one_line_says_so(cache_home, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    plain = cpu_linear.functions.__wrapped__
    with caplog.at_level(logging.WARNING):
        assert plain() is None
    [record] = caplog.records
    assert "no C compiler (cc, gcc, clang) is there" in record.getMessage() and "\n" not in record.getMessage()
    monkeypatch.setenv(cpu_linear.SWITCH, cpu_linear.NONE)
    assert plain() is None and len(caplog.records) == 1
    assert os.environ[cpu_linear.SWITCH] == "none"
