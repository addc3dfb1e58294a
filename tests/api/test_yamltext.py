"""YAML that means more than one thing, or nothing in JSON, is refused with its place."""

import pytest

from shoal.api.yamltext import MAX_NODES, InvalidYaml, load_documents


def test_documents_come_in_order_without_empty_ones() -> None:
    """Separators and comments alone make no document."""
    assert load_documents("---\n# nothing\n---\na: 1\n---\n- 2\n") == [{"a": 1}, [2]]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: b: c", "line 1, column 5: this is not YAML"),
        ("a:\n\tb: 1", "indent with spaces, not tabs"),
        ("a: {b: 1", "this is not YAML"),
        ("a: 1\nb: 2\na: 3", "line 3: a is given twice"),
        ("spec:\n  replicas: .nan", "spec.replicas: nan is not a finite number"),
        ("a: [1, -.inf]", "a[1]: -inf is not a finite number"),
        ("revision: 2024-01-31", "revision: 2024-01-31 is read as a date; put it in quotes"),
        ("revision: 2024-13-45", "cannot be read"),
        ("a: {1: x}", "a: the key 1 is not a string; put it in quotes"),
        ("a: !!set {x}", "a: a set has no place in a manifest"),
        ("a: !!python/object:os.system {}", "this is not YAML"),
        ("a: &a [*a]", "nested more than 64 deep"),
        ("[" * 3000, "nested more than 64 deep"),
        ("a: \x00", "this is not YAML"),
    ],
)
def test_what_cannot_be_json_is_refused_with_its_place(text: str, sentence: str) -> None:
    """Every way to be wrong has a sentence that says where, and never another exception."""
    with pytest.raises(InvalidYaml) as refused:
        load_documents(text)
    assert sentence in str(refused.value)


def test_aliases_cannot_blow_up() -> None:
    """A small text whose aliases expand to billions of values is refused quickly."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    with pytest.raises(InvalidYaml, match=f"more than {MAX_NODES} values"):
        load_documents("\n".join(lines))


def test_merge_keys_may_be_overridden() -> None:
    """A merged key given again is an override, which YAML means it to be."""
    (loaded,) = load_documents("base: &b {x: 1, y: 2}\nuse:\n  <<: *b\n  y: 3\n")
    assert loaded == {"base": {"x": 1, "y": 2}, "use": {"x": 1, "y": 3}}
