"""The schema says what the comments of values.yaml say, and a comment that is missing is told."""

import re

import pytest

from charts.values_schema import ValuesError, read_values, values_schema, values_table

VALUES = """\
# Title of the file.

# How many, over
# two lines.
# @minimum: 1
count: 2
# Which one.
# @enum: a, b
kind: a
# A part.
part:
  # On or off.
  on: false
  # Free labels.
  # @map: string
  labels: {x: y}
# Names.
# @items: string
names: []
# A share, or none.
# @type: number, null
share: null
"""


def test_types_limits_and_descriptions_are_read() -> None:
    """Types follow from the defaults, limits from the notes, and mappings are closed."""
    schema = values_schema(read_values(VALUES), "Values")
    assert schema["additionalProperties"] is False
    properties = schema["properties"]
    assert properties["count"] == {
        "description": "How many, over two lines.",
        "type": "integer",
        "minimum": 1.0,
    }
    assert properties["kind"]["enum"] == ["a", "b"]
    assert properties["part"]["additionalProperties"] is False
    assert properties["part"]["properties"]["on"]["type"] == "boolean"
    assert properties["part"]["properties"]["labels"]["additionalProperties"] == {"type": "string"}
    assert properties["names"] == {
        "description": "Names.",
        "type": "array",
        "items": {"type": "string"},
    }
    assert properties["share"]["type"] == ["number", "null"]


def test_the_table_has_what_users_set() -> None:
    """One row a leaf, with default and choices; parts have no row of their own."""
    table = values_table(read_values(VALUES)).splitlines()
    assert "| `kind` | `a` | Which one. One of a, b. |" in table
    assert "| `part.labels` | `{x: y}` | Free labels. |" in table
    assert not any(row.startswith("| `part` ") for row in table)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\n", "line 1, a: no description"),
        ("# A.\na: {}\n", "line 2, a: say what the mapping holds"),
        ("# A.\na: []\n", "line 2, a: say what the list holds"),
        ("# A.\na:\n  b: 1\n", "line 3, a.b: no description"),
        ("# A.\na: null\n", "a: say its type"),
    ],
)
def test_what_is_missing_is_told(text: str, said: str) -> None:
    """A key without description or type is an error with its line."""
    with pytest.raises(ValuesError, match=re.escape(said)):
        values_schema(read_values(text), "Values")
