"""YAML files: scalars, lines, refusals; and what people are told."""

import subprocess
import sys

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from trainers.config import RunConfig
from trainers.errors import InputError
from trainers.yamlfile import MAX_BYTES, load_run, places, read

# --- reading ------------------------------------------------------------------------------------


@pytest.fixture
def write(tmp_path):
    def write(content):
        path = tmp_path / "grid.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def refused(function, path):
    """Message of the InputError, without the folder."""
    with pytest.raises(InputError) as caught:
        function(path)
    return str(caught.value).replace(f"{path.parent}/", "")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E5", 1e5),
        (".5", 0.5),
        ("6e-4", 6e-4),
        ("1.", 1.0),
        ("-.5e+2", -50.0),
        (".inf", float("inf")),
        ("12", 12),
        ("-3", -3),
        ("+3", 3),
        ("0", 0),
        ("0x1F", 31),
        ("0o17", 15),
        ("true", True),
        ("false", False),
        ("on", "on"),
        ("off", "off"),
        ("yes", "yes"),
        ("no", "no"),
        ("null", None),
        ("~", None),
        ("", None),
        ("1:30", "1:30"),
        ("1:30:00", "1:30:00"),
        ("2024-01-31", "2024-01-31"),
        ("1_000", "1_000"),
        ("0b1", "0b1"),
        ("=", "="),
        ("'1e-3'", "1e-3"),
        ('"on"', "on"),
        ("!!str 1e-3", "1e-3"),
        ("!!float 3", 3.0),
        ("[1, a, .5]", [1, "a", 0.5]),
        ("{a: {b: []}}", {"a": {"b": []}}),
    ],
)
def test_scalars_follow_yaml_1_2(write, text, value):
    got = read(write(f"key: {text}\n")).data["key"]
    assert got == value
    assert type(got) is type(value)


def test_keys_are_text(write):
    assert read(write("1: a\non: b\n0.10: c\ntrue: d\n")).data == {
        "1": "a",
        "on": "b",
        "0.10": "c",
        "true": "d",
    }


def test_lines(write):
    document = read(write("a: 1\nb:\n  c:\n    d: 2\n  e: [3,\n      4]\n  f:\n    - 5\n    - g: 6\n"))
    lines = {
        (): 1, ("a",): 1, ("b",): 2, ("b", "c", "d"): 4, ("b", "e"): 5, ("b", "e", 0): 5, ("b", "e", 1): 6,
        ("b", "f", 0): 8, ("b", "f", 1, "g"): 9,
        ("b", "c", "nope"): 3, ("b", "e", 7, "x"): 5, ("z",): 1,
    }  # fmt: skip
    assert {place: document.line(place) for place in lines} == lines


def test_aliases_have_the_line_of_their_use_and_their_content_its_own(write):
    document = read(write("a: &x\n  c: 1\nb: *x\n"))
    assert document.data == {"a": {"c": 1}, "b": {"c": 1}}
    assert (document.line(("b",)), document.line(("b", "c"))) == (3, 2)


def test_byte_order_mark_and_windows_lines_are_fine(write):
    document = read(write(b"\xef\xbb\xbfa: 1\r\nb: 2\r\n"))
    assert document.data == {"a": 1, "b": 2}
    assert document.line(("b",)) == 2


class Quoting(yaml.SafeDumper):
    """Quotes every text: PyYAML writes YAML 1.1, where `1e5` and `08` are text without quotes."""


Quoting.add_representer(
    str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"')
)

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 63) - 1) | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs", "Cc", "Cn", "Co"]), max_size=8),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.from_regex(r"[a-z]{1,5}", fullmatch=True), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.dictionaries(st.from_regex(r"[a-z]{1,5}", fullmatch=True), values, min_size=1, max_size=4))
@example(data={"a": "1e5", "b": ["08", {"c": "0o17"}]})
def test_reads_back_what_a_yaml_writer_wrote(write, data):
    text = yaml.dump(data, Dumper=Quoting, allow_unicode=True, sort_keys=False)
    assert read(write(text)).data == data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", 'grid.yaml:1: the file is empty: write "key: value" lines'),
        ("# only a comment\n", 'grid.yaml:1: the file is empty: write "key: value" lines'),
        ("- a\n- b\n", 'grid.yaml:1: the top level is a list: write "key: value" lines'),
        ("hello\n", 'grid.yaml:1: the top level is a single value: write "key: value" lines'),
        (b"a: 1\nb: \xff\xfe\n", "grid.yaml:2: not UTF-8 text: save the file as UTF-8"),
        ("a: 1\n".encode("utf-16"), "grid.yaml:1: not UTF-8 text: save the file as UTF-8"),
        ("a: 1\nb: '\x1b'\n", "grid.yaml:2: control character U+001B: remove it"),
        ("a:\n\tb: 1\n", "grid.yaml:2: a tab in the indentation: use spaces"),
        ("a: &x [*x]\n", "grid.yaml:1: a: an alias that holds itself: write the value out"),
        ("a: 010\n", 'grid.yaml:1: a: leading zero in 010: write 10, or "010" for text'),
        ("a: -00\n", 'grid.yaml:1: a: leading zero in -00: write -0, or "-00" for text'),
        ("a: !!int x\n", 'grid.yaml:1: a: the text "x" is not of the type !!int: remove the tag'),
        ("a: !!timestamp 2024-01-01\n", 'grid.yaml:1: a: tag "!!timestamp" is not allowed: remove it'),
        ("!!set {a, b}\n", 'grid.yaml:1: tag "!!set" is not allowed: remove it'),
        ("? [a]\n: b\n", "grid.yaml:1: a key must be plain text: put it in quotes"),
        ('a:\n  "": b\n', 'grid.yaml:2: a: a key is missing before ":"'),
        ("a: *b\n", "grid.yaml:1: no anchor of this name comes before: "
                    "a text that starts with * needs quotes"),
        ('a: "\\ud800"\n', "grid.yaml:1: a: half of a character (\\ud800 to \\udfff): "
                            "write the character itself"),
        ("a: @b\n", "grid.yaml:1: a text cannot start with this character: put it in quotes"),
        ('a: "\\q"\n', "grid.yaml:1: an unknown \\ escape in double quotes: use single quotes"),
        ("[" * 5000, "grid.yaml:1: nested more than 40 levels deep: write it flatter"),
        (b"a: 1\n" * (MAX_BYTES // 5 + 1), "grid.yaml: larger than 1 MiB: name a YAML file written by hand"),
    ],
)  # fmt: skip
def test_refusals(write, content, message):
    assert refused(read, write(content)) == message


def test_all_problems_at_once(write):
    text = "a: 1\na: 2\nb: {c: 1, c: 2, c: 3}\nd: !!python/name:os.system x\ne: [1, 007, !x y]\n<<: {f: 1}\n"
    assert refused(read, write(text)).splitlines() == [
        "grid.yaml:2: a: the key is given twice (first on line 1): remove one",
        "grid.yaml:3: b.c: the key is given twice (first on line 3): remove one",
        'grid.yaml:4: d: tag "!!python/name:os.system" is not allowed: remove it',
        'grid.yaml:5: e: leading zero in 007: write 7, or "007" for text',
        'grid.yaml:5: e: tag "!x" is not allowed: remove it',
        'grid.yaml:6: "<<" is not part of YAML 1.2: write the keys out',
    ]


def test_a_message_stays_on_its_line(write):
    odd = "x\\ny\\e[2J\\x9b"
    text = f'"{odd}": 1\nmodel: {{family: "{odd}"}}\ndata: {{source: hf, dataset: "{odd}", revision: a}}\n'
    lines = refused(load_run, write(text)).split("\n")
    assert [line.split(":")[1] for line in lines] == ["1", "2", "3"]
    assert all(line.isprintable() for line in lines)


def test_aliases_cannot_explode(write):
    rows = ["a0: &a0 [" + ", ".join("1" * 10) + "]"]
    rows += [f"a{n}: &a{n} [" + ", ".join([f"*a{n - 1}"] * 10) + "]" for n in range(1, 12)]
    assert refused(read, write("\n".join(rows))) == "grid.yaml: more than 100,000 values: use fewer aliases"


def test_no_file_and_a_folder(tmp_path):
    assert refused(read, tmp_path / "no.yaml") == "no.yaml: no such file: check the path"
    (tmp_path / "dir").mkdir()
    assert refused(read, tmp_path / "dir") == "dir: is a folder: name a YAML file in it"


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text("ab:-[]{}'\"&*!|># \n\t0.1e", max_size=40) | st.binary(max_size=20))
def test_any_content_is_read_or_refused(write, text):
    path = write(text)
    try:
        data, message = read(path).data, ""
    except InputError as error:
        data, message = {}, str(error)
    assert isinstance(data, dict)
    assert not message or all(line.startswith(f"{path}:") for line in message.split("\n"))


# --- a run --------------------------------------------------------------------------------------


def test_load_run_takes_shorthand(write):
    run = load_run(
        write("arm: hetero\nattn: stiefel\nmlp: {manifold: dgram, lr_multiplier: 2}\nmodel: {n_layer: 2}\n")
    )
    assert run == RunConfig.model_validate(
        {
            "arm": "hetero",
            "assignment": {"attn": "stiefel", "mlp": {"manifold": "dgram", "lr_multiplier": 2}},
            "model": {"n_layer": 2},
        }
    )


def test_load_run_merges_shorthand_with_the_long_form(write):
    run = load_run(write("attn: stiefel\nassignment: {mlp: {manifold: dgram}}\n"))
    assert (run.assignment.attn.manifold, run.assignment.mlp.manifold) == ("stiefel", "dgram")


def test_load_run_reads_back_a_dumped_config(write):
    run = RunConfig(seed=7)
    assert load_run(write(yaml.safe_dump(run.model_dump(mode="json")))) == run


SEED = "seed: wants a whole number of at least 0 and at most 2147483647,"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("attn: stifel", 'attn: unknown manifold "stifel" (did you mean "stiefel"?)'),
        ("attn: {manifold: stifel}", 'attn.manifold: unknown manifold "stifel" (did you mean "stiefel"?)'),
        ("assignment: {attn: x}",
         'assignment.attn: unknown manifold "x" (allowed: dgram, none, oblique, spectral, stiefel)'),
        ("assignment: x", 'assignment: wants a mapping with the keys attn, mlp, given the text "x"'),
        ("attn: dgram\nassignment: {attn: none}", 'attn: "assignment.attn" sets this too: remove one'),
        ("model: {n_layers: 4}", 'model.n_layers: unknown key (did you mean "n_layer"?)'),
        ("atn: dgram", 'atn: unknown key (did you mean "attn"?)'),
        ("n_layer: 4", 'n_layer: unknown key here (did you mean "model.n_layer"?)'),
        ("model.n_layer: 4", 'model.n_layer: unknown key: write "n_layer:" below "model:"'),
        ("seed: '3'",
         f'{SEED} given the text "3" (write 3 without quotes)'),
        ("seed: 1e3", f"{SEED} given 1000.0 (write 1000)"),
        ("seed: 1.5", f"{SEED} given 1.5"),
        ("seed: 1_000", f'{SEED} given the text "1_000" (write 1000)'),
        ("seed: [3]", f"{SEED} given a list of 1"),
        ("seed:", f"{SEED} given nothing"),
        ("probes: {spectra: yes}", 'probes.spectra: wants true or false, given the text "yes" (write true)'),
        ("probes: {spectra: 1}", "probes.spectra: wants true or false, given 1"),
        ("model: {dropout: .nan}", "model.dropout: wants a number of at least 0 and below 1, given nan"),
        ("runtime: {compile: maybe}", 'runtime.compile: wants true or false or null, given the text "maybe"'),
        ("data: {text_column: 3}", "data.text_column: wants text, given 3 (put it in quotes)"),
        ("arm: ../up", "arm: '..' is not allowed in a name"),
        ("arm: Up", "arm: wants a name of 1 to 64 lower-case letters, digits, . _ - "
                    'that starts with a letter or digit, given the text "Up"'),
        ("model: {n_head: 5}", "model.n_head: d_model 768 is not a multiple of n_head 5"),
    ],
)  # fmt: skip
def test_load_run_explains(write, text, message):
    assert refused(load_run, write(text)) == f"grid.yaml:1: {message}"


def test_load_run_reports_yaml_and_config_problems_together(write):
    text = "seed: 1\nseed: 2\nmodel:\n  n_head: 012\n  d_model: big\noptimizer: {adamw: {betas: [0.9, 01]}}\n"
    assert refused(load_run, write(text)).splitlines() == [
        "grid.yaml:2: seed: the key is given twice (first on line 1): remove one",
        'grid.yaml:4: model.n_head: leading zero in 012: write 12, or "012" for text',
        'grid.yaml:5: model.d_model: wants a whole number of at least 1, given the text "big"',
        'grid.yaml:6: optimizer.adamw.betas: leading zero in 01: write 1, or "01" for text',
    ]


@pytest.mark.parametrize("place", places(RunConfig), ids=".".join)
def test_every_key_explains_a_wrong_value(write, place):
    """Whatever the schema holds, a list of nothing in its place is refused in plain words."""
    value = "[[]]"
    text = "".join("  " * depth + f"{key}:\n" for depth, key in enumerate(place)).rstrip("\n") + f" {value}\n"
    message = refused(load_run, write(text))
    assert message.startswith(f"grid.yaml:{len(place)}: {'.'.join(place)}: wants ")
    assert "Input should" not in message


def test_does_not_import_torch():
    code = (
        "import sys, trainers.yamlfile; sys.exit(any(m in sys.modules for m in ('torch', 'ray', 'pandas')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
