"""Any content of params.yaml is read correctly or rejected with a message; never a traceback, never a hang."""

import copy
import io
import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from pipeline.errors import PipelineError
from pipeline.settings import config
from tests.conftest import REPOSITORY

TEXT = (REPOSITORY / "params.yaml").read_text(encoding="utf-8")
VALUES = YAML(typ="safe", pure=True).load(TEXT)


def paths(values, prefix=()):
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        yield (*prefix, key)
        if isinstance(value, dict | list):
            yield from paths(value, (*prefix, key))


PATHS = list(paths(VALUES))
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-(10**400), 10**400), st.floats(), st.text(max_size=20),
    st.sampled_from([math.nan, math.inf, -1, 0, 1e308, "null", "../..", "{class_name}", "\u202e", "a\x00b", ""]),
)  # fmt: skip
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def loads_or_rejects(file):
    """Return the configuration, or None if it is rejected with a message that names the file."""
    try:
        return config.load(file)
    except PipelineError as error:
        message = str(error)
        assert str(file) in message and len(message) < 20_000
        return None


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "params.yaml"


def put(values, path, value):
    *parents, key = path
    for parent in parents:
        values = values[parent]
    if value is ...:
        del values[key]
    else:
        values[key] = value


@given(st.lists(st.tuples(st.sampled_from(PATHS), ANYTHING | st.just(...)), min_size=1, max_size=3))
@example([(("train_fl", "num_rounds"), 10**400)])
@example([(("methods", "fedavg"), {"algorithm": ["fedavg"]})])
@example([(("methods", "fedavg"), {"algorithm": {}})])
@example([(("methods",), [])])
@example([(("partitions", "iid"), {"kind": None})])
def test_any_value_in_any_place(file, changes):
    values = copy.deepcopy(VALUES)
    for path, value in changes:
        try:
            put(values, path, value)
        except (KeyError, IndexError, TypeError):
            pass  # an earlier change removed its place
    yaml, stream = YAML(typ="safe", pure=True), io.StringIO()
    yaml.dump(values, stream)
    file.write_text(stream.getvalue(), encoding="utf-8", errors="replace")
    loaded = loads_or_rejects(file)
    if loaded:  # what was accepted equals the content of the file
        again = YAML(typ="safe", pure=True).load(file.read_text(encoding="utf-8"))
        assert loaded.params.model_dump(include={"train_fl", "sweep", "report"}) == {
            key: again[key] for key in ("train_fl", "sweep", "report")
        }


PIECES = st.sampled_from(
    ["\t", "\n", ":", "- ", "[", "]", "{", "}", "*", "&a ", "*a", "<<: *a\n",
    "!!python/object/apply:os.getcwd []", "!!int ",
     "!!binary x", "!!timestamp x", "!!set {", "!!omap ", "? ", "|", ">", "'", '"', "---\n", "...\n",
     "%YAML 1.1\n", "\ufeff",
     "0x", "1e999", ".nan", "2024-13-45", "2024-01-01T99:99:99Z", "9" * 5000, "\x85", "\u2028", "#",
     "!<tag:x>", "[" * 300,
     "{a: " * 300, "null: 1\n", "1: 1\n", "[a]: 1\n", "~", "timestep: 300\n", "1_0", "0o9", "0b2", "-.inf",
     "=", "!!float x"]
)  # fmt: skip


@given(
    st.lists(
        st.tuples(st.integers(0, len(TEXT)), st.integers(0, 12), PIECES | st.text(max_size=5)), min_size=1, max_size=4
    )
)
@example([(TEXT.index("300"), 3, "2024-13-45")])  # a date that is none
@example([(TEXT.index("300"), 3, "9" * 5000)])  # more digits than Python turns into a number
@example([(TEXT.index("300"), 3, "[" * 1000)])  # deeper than the parser goes
@example([(TEXT.index("300"), 3, "!!int x")])
@example([(TEXT.index("300"), 3, "!!timestamp x")])
@example([(TEXT.index("300"), 3, "!!binary \xff")])
@example([(TEXT.index("  timestep"), 0, "  [a]: 1\n")])
@example([(TEXT.index("  timestep"), 0, "  null: 1\n")])
@example([(TEXT.index("  timestep"), 0, "  <<: 1\n")])
@example([(TEXT.index("300"), 3, "&a [*a]")])
@example([(TEXT.index("300"), 3, "&a [&a 1]")])
@example([(0, 0, "%YAML 9.9\n---\n")])
def test_any_text_in_any_place(file, changes):
    text = TEXT
    for start, length, piece in changes:
        text = text[:start] + piece + text[start + length :]
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    loads_or_rejects(file)


@given(st.binary(max_size=300))
@example(b"\x80")
@example(b"a: " + b"[" * 1000)
@example(b"? " * 1000)
@example(b"- " * 1000)
def test_any_bytes(file, content):
    file.write_bytes(content)
    loads_or_rejects(file)


def test_yaml_bomb_is_rejected_quickly(file):
    levels = [f"b{n}: &b{n} [{', '.join([f'*b{n - 1}'] * 10)}]" for n in range(1, 12)]
    bomb = "\n".join(["b0: &b0 [x, x, x, x, x, x, x, x, x, x]", *levels])
    file.write_text(bomb + "\n")
    assert loads_or_rejects(file) is None
    file.write_text(
        TEXT.replace("timestep: 300", "timestep: *b11").replace("prepare_data:", bomb + "\nprepare_data:", 1)
    )
    assert loads_or_rejects(file) is None


@given(st.sampled_from(PATHS), SCALARS)
@example(("extract_features", "timestep"), "9" * 5000)
@example(("extract_features", "timestep"), "2024-13-45")
@example(("extract_features", "timestep"), "[" * 1000)
@example(("extract_features", "timestep"), "!!int x")
def test_any_flag(file, path, value):
    file.write_text(TEXT)
    key = ".".join(map(str, path))
    try:
        config.load(file, {key: config.parse_value(key, str(value))})
    except PipelineError as error:
        assert "command line" in str(error) or "Cannot set" in str(error) or str(file) in str(error)
